"""Dense layers: every path computes the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import dense


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("inputs, outputs", [((6,), (10,)), ((10,), (6,)), ((6,), (3, 2, 4)), ((2, 3), (5,))])
def test_accelerators_and_cpus_agree(monkeypatch, inputs, outputs, dtype, tolerance):
    """Values and both gradients agree, whichever operand is narrower."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 7, *inputs), (*inputs, *outputs)))

    def loss(x, kernel):
        y = dense._dense(x, kernel, len(inputs))
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    found = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(dense, "platform", lambda platform=platform: platform)
        found.append(jax.grad(loss, (0, 1), has_aux=True)(x, kernel))
    ours, theirs = (jax.tree.map(lambda y: np.asarray(y, np.float32), each) for each in found)
    assert ours[1].shape == (2, 7, *outputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * np.abs(a).max()), ours, theirs)
    flat = x.reshape(14, -1).astype(np.float32) @ kernel.reshape(-1, np.prod(outputs)).astype(np.float32)
    np.testing.assert_allclose(ours[1].reshape(14, -1), flat, atol=tolerance * np.abs(flat).max())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_a_decode_step_takes_the_decode_path(monkeypatch, platform):
    """The path follows the argument and not the rank, and both paths give the same product. Barriers are for CPUs."""
    monkeypatch.setattr(dense, "platform", lambda: platform)
    layer, x = dense.Dense((6,), (10,), ("embed", "mlp"), "float32"), np.ones((3, 6), np.float32)
    params = layer.init(jax.random.key(0), x)
    program = lambda **kwargs: str(jax.make_jaxpr(lambda x: layer.apply(params, x, **kwargs))(x))  # noqa: E731
    assert ("optimization_barrier" in program(decode_step=True)) == (platform == "cpu")
    assert "optimization_barrier" not in program()
    plain = layer.apply(params, x)
    np.testing.assert_array_equal(plain, layer.apply(params, x[:, None])[:, 0])
    np.testing.assert_allclose(layer.apply(params, x, decode_step=True), plain, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_stored_kernels_are_restored(monkeypatch, platform):
    """Only CPUs get copies with the outputs first; kernels of the right dtype stay as they are on other devices."""
    monkeypatch.setattr(dense, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    shapes = {"qkv": (4, 3, 2, 5), "out": (2, 5, 4), "up": (4, 6)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), "bfloat16")} for name, shape in shapes.items()}
    params["norm"] = {"scale": jnp.ones(4)}
    stored, restore = dense.outputs_first(params, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, restore(stored), params)
    assert stored["norm"]["scale"] is params["norm"]["scale"]
    assert stored["out"]["kernel"].shape == ((4, 10) if platform == "cpu" else (2, 5, 4))
    assert stored["qkv"]["kernel"].shape == ((30, 4) if platform == "cpu" else (4, 3, 2, 5))
