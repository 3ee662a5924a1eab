"""AdamW, gradient accumulation, and the EMA of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.optim import optimizers
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions


def test_equals_optax_adamw():
    options = OptimizerOptions(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=0.5)
    ours = optimizers.make_optimizer(options)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.01, 0.8, 0.95, 1e-6, weight_decay=0.1, mask={"kernel": True, "bias": False}),
    )
    a = b = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    state_a, state_b = ours.init(a), theirs.init(b)
    for i in range(5):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), a)
        up_a, state_a = ours.update(grads, state_a, a)
        up_b, state_b = theirs.update(grads, state_b, b)
        a = optax.apply_updates(a, jax.tree.map(lambda u: -0.01 * u, up_a))
        b = optax.apply_updates(b, up_b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6)


def test_only_kernels_decay():
    params = {"dense": {"kernel": 1, "bias": 1}, "norm": {"scale": 1}, "embedding": 1, "out_kernel": 1}
    mask = optimizers.decay_mask(params, OptimizerOptions(weight_decay=0.1))
    assert mask == {
        "dense": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "embedding": False,
        "out_kernel": True,
    }
    assert all(jax.tree.leaves(optimizers.decay_mask(params, OptimizerOptions(decay="all"))))


def test_all_but_gains_and_biases_decay():
    params = {
        "dense": {"kernel": 1, "bias": 1},
        "norm": {"scale": 1},
        "positions": 1,
        "logit_scale": 1,
        "image_bias": 1,
    }
    mask = optimizers.decay_mask(params, OptimizerOptions(weight_decay=0.1, decay="weights"))
    assert mask == {
        "dense": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "positions": True,
        "logit_scale": False,
        "image_bias": False,
    }


def test_state_has_one_structure():
    params = {"kernel": jnp.ones(2)}
    structures = {
        jax.tree.structure(optimizers.make_optimizer(options).init(params))
        for options in (
            OptimizerOptions(weight_decay=0.1, decay="weights"),
            OptimizerOptions(),
            OptimizerOptions(clip_norm=1.0, weight_decay=0.1, decay="all"),
            OptimizerOptions(first_moment="bfloat16"),
        )
    }
    assert len(structures) == 1


def test_a_first_moment_in_bfloat16():
    params = {"kernel": jnp.linspace(-1, 1, 7)}
    moved = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = optimizers.make_optimizer(OptimizerOptions(first_moment=dtype))
        state = optimizer.init(params)
        for i in range(5):
            grads = {"kernel": jnp.sin(params["kernel"] * (i + 1))}
            updates, state = optimizer.update(grads, state, params)
        adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
        assert adam.mu["kernel"].dtype == dtype and adam.nu["kernel"].dtype == jnp.float32
        moved[dtype] = updates["kernel"]
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_large_batch(steps):
    def loss(params, batch, key):
        del key
        error = jnp.square(jnp.tanh(batch["x"] @ params["w"]) - batch["y"])
        return jnp.mean(error), {"largest": jnp.mean(jnp.max(error, axis=-1))}

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (4, 3))}
    batch = {"x": jax.random.normal(keys[1], (8, 4)), "y": jax.random.normal(keys[2], (8, 3))}
    (value, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, keys[0])
    got, got_scalars = optimizers.accumulated_gradients(loss, params, batch, keys[0], steps)
    np.testing.assert_allclose(got["w"], grads["w"], atol=1e-6)
    np.testing.assert_allclose(got_scalars["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(got_scalars["largest"], scalars["largest"], rtol=1e-6)


def test_each_slice_has_its_own_key():
    def loss(params, batch, key):
        return params["w"] * jax.random.uniform(key), {"x": jnp.mean(batch)}

    grads, scalars = optimizers.accumulated_gradients(loss, {"w": 1.0}, jnp.arange(4.0), jax.random.key(1), 2)
    drawn = [jax.random.uniform(jax.random.fold_in(jax.random.key(1), i)) for i in range(2)]
    np.testing.assert_allclose(grads["w"], np.mean(drawn), rtol=1e-6)
    np.testing.assert_allclose(scalars["x"], 1.5)


def test_average():
    options = AverageOptions(decay=0.5, every=2)
    old, new = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
    assert float(optimizers.update_average(old, new, jnp.int32(3), options)["w"]) == 0.0
    # Warmup of the decay: min(0.5, (1 + 1) / (10 + 1)).
    np.testing.assert_allclose(optimizers.update_average(old, new, jnp.int32(2), options)["w"], 1 - 2 / 11, rtol=1e-6)
    np.testing.assert_allclose(optimizers.update_average(old, new, jnp.int32(200), options)["w"], 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "make, token",
    [
        (lambda: OptimizerOptions(decay="some"), "decay"),
        (lambda: OptimizerOptions(accumulate_steps=0), "accumulate_steps"),
        (lambda: OptimizerOptions(first_moment="float16"), "first_moment"),
        (lambda: OptimizerOptions(clip_norm=-1.0), "clip_norm"),
        (lambda: AverageOptions(decay=1.0), "decay"),
        (lambda: AverageOptions(decay=0.9, every=0), "every"),
        (lambda: from_config(OptimizerOptions, {"weigth_decay": 0.1}, "optimizer"), "weigth_decay"),
    ],
)
def test_invalid_options(make, token):
    with pytest.raises(ConfigError, match=token):
        make()
