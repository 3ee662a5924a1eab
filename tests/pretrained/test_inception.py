"""Our Inception-v3 equals the PyTorch ports that compute FID, and every file format gives the same parameters."""

import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from torchvision_on_cpu import import_torchvision

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.errors import ConfigError, PretrainedError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.metrics import frechet
from dalle_jax.models import inception as network
from dalle_jax.pretrained import inception

needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "torchvision", "torch_fidelity", "pytorch_fid")),
    reason="needs torch, torchvision, torch-fidelity==0.4.0 and pytorch-fid==0.3.0 (the latter two with --no-deps)",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 52, 3), np.uint8)


def random_arrays():
    """Returns a state dict with random weights and batch statistics, with which activations stay near 1."""
    rng = np.random.default_rng(1)
    variables = jax.eval_shape(network.Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        *place, kind = (key.key for key in path)
        name, out = ".".join(place), leaf.shape[-1]
        normal = rng.standard_normal(leaf.shape[::-1][:2] + leaf.shape[:-2], np.float32)
        if kind == "kernel" and leaf.ndim == 4:
            arrays[f"{name}.conv.weight"] = normal * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
            arrays[f"{name}.bn.weight"] = rng.uniform(0.8, 1.2, out).astype(np.float32)
            arrays[f"{name}.bn.bias"] = rng.normal(0, 0.2, out).astype(np.float32)
            arrays[f"{name}.bn.running_mean"] = rng.normal(0, 0.2, out).astype(np.float32)
            arrays[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, out).astype(np.float32)
        elif kind == "kernel":
            arrays[f"{name}.weight"] = normal / np.float32(np.sqrt(leaf.shape[0]))
        elif name == "fc":
            arrays[f"{name}.bias"] = rng.standard_normal(leaf.shape, np.float32)
    return arrays


@pytest.fixture(scope="module")
def arrays():
    return random_arrays()


@pytest.fixture(scope="module")
def params(arrays):
    return inception.convert(arrays)


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# -- the network --------------------------------------------------------------------------------------------------


def features(params, path):
    """Returns (ours, theirs) of the features of `IMAGES` by name. `path` is a file of the same weights."""
    import_torchvision()
    import pytorch_fid.inception
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.tensor(IMAGES).permute(0, 3, 1, 2)
    fidelity = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=str(path)
    )
    with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(path)):
        original = pytorch_fid.inception.InceptionV3([3]).eval()
    with torch.no_grad():
        theirs = [features.numpy() for features in fidelity(images)]
        their_pool = original(images.float() / 255)[0][:, :, 0, 0].numpy()
    ours = network.extract(params, IMAGES)
    return {
        "pool, torch-fidelity": (ours.pool, theirs[0]),
        "logits without bias, torch-fidelity": (ours.unbiased_logits, theirs[1]),
        "logits, torch-fidelity": (ours.logits, theirs[2]),
        "pool, pytorch-fid": (network.extract(params, IMAGES, "bilinear_half_pixel").pool, their_pool),
    }


@needs_packages
def test_same_features_as_the_packages(arrays, params, tmp_path):
    """All three read the weights from the same file."""
    import torch

    path = tmp_path / inception.FILE
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
    same(inception.load(path), params)
    both = features(params, path)
    for name, (ours, theirs) in both.items():
        assert 0.1 < np.std(theirs) < 10, name
        np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=name)
    pools = both["pool, torch-fidelity"][1], both["pool, pytorch-fid"][1]
    assert np.abs(pools[0] - pools[1]).max() > 1e-2  # the two preprocess differently
    assert frechet.add(frechet.empty(network.WIDTH), both["pool, torch-fidelity"][0]).count == 2


@needs_packages
@pytest.mark.parametrize("shape", [(40, 52), (299, 310), (512, 299)], ids=str)
def test_same_input_as_the_packages(shape):
    import_torchvision()
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    x = torch.tensor(images).permute(0, 3, 1, 2).float()
    fidelity = (interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False) - 128) / 128
    fid = 2 * torch.nn.functional.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    for resize, theirs in (("bilinear_tf1", fidelity), ("bilinear_half_pixel", fid)):
        ours = network.preprocess(jnp.asarray(images), resize)
        np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=2e-4)


def test_resizing():
    half = 0.5
    for resize, smaller, larger in (
        ("bilinear_tf1", [[1, 0, 0, 0], [0, 0, 1, 0]], [[1, 0], [half, half], [0, 1], [0, 1]]),
        ("bilinear_half_pixel", [[half, half, 0, 0], [0, 0, half, half]], [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
    ):
        np.testing.assert_array_equal(network.resize_matrix(4, 2, resize), smaller)
        np.testing.assert_array_equal(network.resize_matrix(2, 4, resize), larger)
    for resize in network.RESIZES:
        np.testing.assert_array_equal(network.resize_matrix(299, 299, resize), np.eye(299))
    with pytest.raises(ConfigError, match="bicubic"):
        network.preprocess(IMAGES, "bicubic")
    with pytest.raises(ValueError, match="uint8"):
        network.preprocess(IMAGES.astype(np.float32))


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_plain_files(arrays, params, tmp_path, kind):
    path = tmp_path / f"inception.{kind}"
    counted = {**arrays, "Conv2d_1a_3x3.bn.num_batches_tracked": np.int64([7])}
    np.savez(path, **counted) if kind == "npz" else save_file(counted, path)
    same(inception.load(path), params)


@pytest.mark.slow
def test_devices_share_the_images(arrays, params, tmp_path):
    """`feature_extractors.inception` on a mesh, where each device has all weights and some of the images."""
    np.savez(tmp_path / "inception.npz", **arrays)
    extractor = feature_extractors.inception(tmp_path / "inception.npz", rows_at_once=2, mesh=make_mesh(data=2))
    [(pool, logits)] = extractor.extract(IMAGES)
    expected = network.extract(params, IMAGES)
    np.testing.assert_allclose(pool, expected.pool, atol=1e-4)
    np.testing.assert_allclose(logits, expected.unbiased_logits, atol=1e-4)


def test_no_file(tmp_path):
    with pytest.raises(PretrainedError, match=re.escape(inception.FILE)):
        inception.load(None)
    with pytest.raises(PretrainedError, match=r"nothing\.pth"):
        inception.load(tmp_path / "nothing.pth")


def test_arrays_that_do_not_fit(arrays, tmp_path):
    missing = {name: array for name, array in arrays.items() if not name.startswith("Mixed_6")}
    with pytest.raises(PretrainedError, match=r"Mixed_6a\.branch3x3\.conv\.weight"):
        inception.convert(missing)
    usual = {**arrays, "fc.weight": np.zeros((1000, 2048), np.float32)}
    with pytest.raises(PretrainedError, match=r"fc\.weight.*1000"):
        inception.convert(usual)
    with pytest.raises(PretrainedError, match=r"AuxLogits\.fc\.bias"):
        inception.convert({**arrays, "AuxLogits.fc.bias": np.zeros(3), "AuxLogits.fc.weight": np.zeros(3)})
    path = tmp_path / "other.npz"
    np.savez(path, weight=np.zeros(3))
    with pytest.raises(PretrainedError, match=r"other\.npz"):
        inception.load(path)
