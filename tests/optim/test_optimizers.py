"""AdamW, gradient accumulation, and the EMA of the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from prior_cases import autoregressive

from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.optim import optimizers
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.pytree import by_path


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
            OptimizerOptions(first_moment="bfloat16", clip_variance=5.0),
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


def test_equals_optax_adam_to_the_last_bit():
    """Stored runs and published results stay as they are."""
    params = {"kernel": jnp.linspace(-1, 1, 64).reshape(8, 8), "bias": jnp.linspace(-3, 2, 5)}
    ours = optimizers.make_optimizer(OptimizerOptions(b1=0.9, b2=0.96, eps=1e-8))
    theirs = optax.scale_by_adam(0.9, 0.96, 1e-8)

    def run(optimizer):
        def step(state, i):
            updates, state = optimizer.update(jax.tree.map(lambda x: jnp.sin(x * i) / i, params), state, params)
            return state, updates

        return jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), jnp.arange(1.0, 20.0)))()

    state, updates = run(ours)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    jax.tree.map(np.testing.assert_array_equal, (adam, updates), run(theirs))


KINDS = {  # parameters of a prior, and of an untied one of random orders
    "kernel": ("trunk/layer_0/attention/qkv/kernel", "trunk/layer_0/mlp/down/kernel"),
    "gain": ("trunk/layer_0/mlp_norm/norm/scale", "trunk/final_norm/norm/scale"),
    "bias": ("trunk/layer_0/mlp_norm/norm/bias", "trunk/layer_0/mlp/down/bias"),
    "embedding": (
        "embedding/text", "embedding/image", "embedding/text_positions", "embedding/rows", "embedding/next_columns",
        "embedding/start_of_text", "embedding/start_of_image",
    ),
    "unembedding": ("embedding/text_head_kernel", "embedding/image_head_kernel"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_kernels_of_layers_have_a_first_moment_of_16_bits(kind):
    prior = autoregressive(attention="full", order="random", start_tokens=True)
    optimizer = optimizers.make_optimizer(OptimizerOptions(first_moment="bfloat16"))

    def moments():
        params = nn.meta.unbox(prior.init(jax.random.key(0)))
        state = optimizer.init(params)
        _, after = optimizer.update(params, state, params)
        return [next(part for part in each if isinstance(part, optax.ScaleByAdamState)) for each in (state, after)]

    for adam in jax.eval_shape(moments):
        mu, nu = by_path(adam.mu), by_path(adam.nu)
        for name in KINDS[kind]:
            assert (mu[name].dtype == jnp.bfloat16) == (kind == "kernel") and nu[name].dtype == jnp.float32, name
        assert {name for name, x in mu.items() if x.dtype == jnp.bfloat16} == {x for x in mu if x.endswith("/kernel")}


def test_a_clipped_variance():
    """The second moment stays at the bound, and the update and the next moment use the bound (appendix B.2)."""
    params = {"kernel": jnp.zeros(2)}
    grads = {"kernel": jnp.array([10.0, 1.0])}  # 0.5 · 10² is above the bound, 0.5 · 1² is not
    optimizer = optimizers.make_optimizer(OptimizerOptions(b1=0.0, b2=0.5, eps=1e-9, clip_variance=5.0))
    state, variance = optimizer.init(params), np.zeros(2)
    for count in (1, 2, 3):
        variance = np.minimum(0.5 * variance + 0.5 * np.array([100.0, 1.0]), 5.0)
        updates, state = optimizer.update(grads, state, params)
        adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
        np.testing.assert_allclose(adam.nu["kernel"], variance, rtol=1e-6)
        expected = np.array([10.0, 1.0]) / np.sqrt(variance / (1 - 0.5**count))
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    quiet = {"kernel": jnp.zeros(2)}
    _, state = optimizer.update(quiet, state, params)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.nu["kernel"][0], 2.5, rtol=1e-6)  # half of the bound


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
        (lambda: OptimizerOptions(clip_variance=-5.0), "clip_variance"),
        (lambda: AverageOptions(decay=1.0), "decay"),
        (lambda: AverageOptions(decay=0.9, every=0), "every"),
        (lambda: from_config(OptimizerOptions, {"weigth_decay": 0.1}, "optimizer"), "weigth_decay"),
    ],
)
def test_invalid_options(make, token):
    with pytest.raises(ConfigError, match=token):
        make()
