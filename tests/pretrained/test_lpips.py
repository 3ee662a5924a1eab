"""LPIPS equals the package of its authors, and files that are not its weights are rejected by name."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torchvision_on_cpu import import_torchvision

from dalle_jax.checkpoints import frozen
from dalle_jax.errors import ConfigError, PretrainedError
from dalle_jax.models.lpips import LPIPS, SMALLEST_SIDE, distance
from dalle_jax.pretrained import catalogue, lpips, state_dict
from dalle_jax.tasks import perceptual
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("lpips") is None,
    reason="needs lpips==0.1.4 (pip install --no-deps --target DIR, PYTHONPATH=DIR)",
)


@pytest.fixture(scope="module")
def arrays():
    """VGG-16 and stage weights with random numbers, by their original names. Activations stay near 1."""
    random, made = np.random.RandomState(0), {}
    for name, (_, shape) in lpips._layout().items():
        values = random.standard_normal(shape)
        if name.startswith("lin"):
            values = np.abs(values)
        elif name.endswith("weight"):
            values *= (2 / np.prod(shape[1:])) ** 0.5
        else:
            values *= 0.1
        made[name] = values.astype(np.float32)
    return made


def images(height, width, seed=0):
    first = np.random.RandomState(seed).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    noise = np.random.RandomState(seed + 1).standard_normal(first.shape).astype(np.float32)
    return first, np.clip(first + np.array([0.1, 0.5])[:, None, None, None] * noise, -1, 1).astype(np.float32)


@needs_package
@pytest.mark.filterwarnings("ignore:.*(pretrained|weight enum):UserWarning")  # the package asks for an old argument
def test_the_distance_and_its_gradient_are_the_packages(arrays):
    import torch

    import_torchvision()
    import lpips as original

    module = original.LPIPS(pretrained=False, net="vgg", pnet_rand=True, verbose=False)
    state, ours = module.state_dict(), iter(arrays)
    for name in state:  # its layers stand in slices, in the same order
        if name.startswith("net."):
            state[name] = torch.tensor(arrays[next(key for key in ours if key.startswith("features."))])
        elif name.startswith("lin"):
            layer = name.replace("lins.", "lin").partition(".")[0]
            state[name] = torch.tensor(arrays[f"{layer}.model.1.weight"])
    module.load_state_dict(state)
    params = jax.tree.map(jnp.asarray, lpips.convert(arrays))
    measure = lambda x, y, params: (distance(params, y, x).sum(), distance(params, y, x))
    compute = jax.jit(jax.value_and_grad(measure, has_aux=True))
    for sides in ((32, 32), (48, 80)):
        real, other = images(*sides)
        given = [torch.tensor(x).permute(0, 3, 1, 2).requires_grad_() for x in (real, other)]
        expected = module(*given).reshape(-1)
        expected.sum().backward()
        (_, found), gradient = compute(other, real, params)
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradient, given[1].grad.permute(0, 2, 3, 1).numpy(), atol=1e-4)
        assert found[1] > 1.5 * found[0] > 0.03


@needs_package
def test_the_packages_own_stage_weights_have_these_names():
    file = pathlib.Path(importlib.util.find_spec("lpips").origin).parent / "weights/v0.1/vgg.pth"
    shapes = {name: array.shape for name, array in state_dict.read(file).items()}
    assert shapes == {name: shape for name, (_, shape) in lpips._layout().items() if name.startswith("lin")}


def test_equal_images_have_no_distance(arrays):
    params, (first, second) = lpips.convert(arrays), images(SMALLEST_SIDE, SMALLEST_SIDE)
    compute = jax.jit(jax.value_and_grad(lambda x, y, params: distance(params, x, y).sum()))
    found, grads = compute(first, first, params)
    assert found < 1e-9 and np.isfinite(grads).all()
    black = np.zeros_like(second)
    assert np.isfinite(compute(black, second, params)[1]).all()


# -- files --------------------------------------------------------------------------------------------------------


def write(folder, arrays):
    """Writes the two files of the users, VGG-16 with its classifier; returns their paths."""
    parts = {"vgg16.npz": {"classifier.0.weight": np.zeros((2, 3), np.float32)}, "vgg.npz": {}}
    for name, array in arrays.items():
        parts["vgg.npz" if name.startswith("lin") else "vgg16.npz"][name] = array
    for name, content in parts.items():
        np.savez(folder / name, **content)
    return [folder / name for name in parts]


def test_the_two_files_in_any_order(tmp_path, arrays):
    files = write(tmp_path, arrays)
    for i, given in enumerate((files, files[::-1])):
        assert "14,716,160" in catalogue.import_files("lpips", given, str(tmp_path / f"run{i}"), {})
    distance, params = perceptual.load(VQGANObjectiveOptions(lpips=str(tmp_path / "run1")))
    assert distance.name == "lpips"
    jax.tree.map(np.testing.assert_array_equal, params, lpips.convert(arrays))
    shape = jnp.zeros((1, 16, 16, 3))
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(LPIPS().init, jax.random.key(0), shape, shape)["params"]
    )


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda arrays: {k: v for k, v in arrays.items() if k != "lin3.model.1.weight"}, "missing: lin3.model.1"),
        (
            lambda arrays: {**arrays, "features.2.bias": np.zeros(3, np.float32)},
            r"another shape: features.2.bias \[3\]",
        ),
        (lambda arrays: {**arrays, "features.1.weight": np.zeros(3, np.float32)}, r"unexpected: features.1.weight"),
        (lambda arrays: {**arrays, "features.2.bias": np.full(64, np.nan, np.float32)}, "features.2.bias"),
        (lambda arrays: {k.replace("features", "slice"): v for k, v in arrays.items()}, "missing: features.0.weight"),
    ],
)
def test_other_files_are_rejected(tmp_path, arrays, change, token):
    files = write(tmp_path, change(arrays))
    with pytest.raises(PretrainedError, match=token):
        catalogue.import_files("lpips", files, str(tmp_path / "run"), {})
    assert not (tmp_path / "run").exists()


def test_folders_without_the_weights(tmp_path):
    for folder in (None, str(tmp_path), "vgg16-397923af.pth"):
        with pytest.raises(ConfigError, match=r"--weights=vgg16-397923af\.pth.*config\.objective\.perceptual_weight=0"):
            perceptual.check(VQGANObjectiveOptions(lpips=folder))
    frozen.save(tmp_path, {"kind": "inception"}, {"a": np.zeros(1)})
    with pytest.raises(ConfigError, match="inception"):
        perceptual.load(VQGANObjectiveOptions(lpips=str(tmp_path)))
