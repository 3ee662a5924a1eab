"""Adapters of a prior: merged kernels are the sum of two products, in every layout, and begin at the base."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.errors import ConfigError
from dalle_jax.models.dense import Dense
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import unstack
from dalle_jax.priors import lora
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.lora import LoRAOptions
from dalle_jax.priors.matching import Rows, Vocabularies, match
from dalle_jax.pytree import by_path, nested
from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(Text(9, 3), image_vocab=11, height=2, width=3)
OPTIONS = LoRAOptions(rank=2, alpha=3.0)


def prior(**trunk):
    options = TransformerOptions(**{"width": 8, "depth": 5, "heads": 2, "dtype": "float32", "scan": False, **trunk})
    return AutoregressivePrior(LAYOUT, AutoregressiveOptions(options, kernel=3))


def random(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), tree)


def base_of(made, seed=0):
    return random(nn.meta.unbox(jax.eval_shape(made.init, jax.random.key(0))), seed)


def adapters_of(base):
    return random(lora.init(jax.random.key(1), base, OPTIONS), 5)


def inputs():
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.integers(0, 9, (2, 3))), jnp.asarray(rng.integers(0, 11, (2, 6)))


def logits(made, params):
    return jax.jit(lambda p: made.model.apply({"params": p}, *inputs(), False))(params)


def unmerged(made, base, adapters):
    """Computes the logits with each dense product as x·W + alpha/rank · (x·down)·up."""
    flat = by_path(adapters)

    def dense(call, args, kwargs, context):
        y = call(*args, **kwargs)
        path = "/".join((*context.module.path, "kernel"))
        if not isinstance(context.module, Dense) or f"{path}/down" not in flat:
            return y
        x, count = args[0], len(context.module.inputs)
        change = x.reshape(*x.shape[: x.ndim - count], -1) @ flat[f"{path}/down"] @ flat[f"{path}/up"]
        return y + (OPTIONS.alpha / OPTIONS.rank * change).reshape(y.shape)

    with nn.intercept_methods(dense):
        return jax.jit(lambda p: made.model.apply({"params": p}, *inputs(), False))(base)


def test_merged_is_unmerged():
    made = prior()
    base = base_of(made)
    adapters = adapters_of(base)
    merged = logits(made, lora.merge(base, adapters, OPTIONS))
    for one, other, plain in zip(merged, unmerged(made, base, adapters), logits(made, base)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert np.abs(one - plain).max() > 0.01, "the adapters must change the logits"


def test_a_scan_has_an_adapter_for_each_layer():
    stacked = prior(scan=True)
    base = base_of(stacked)
    adapters = adapters_of(base)
    merged = unstack(lora.merge(base, adapters, OPTIONS)["trunk"])
    single, flat = {**base, "trunk": unstack(base["trunk"])}, {}
    for path, x in by_path(adapters).items():
        if "/units/" in path:
            place, rest = path.split("/units/layer_")[1].split("/", 1)
            unit = len(base["trunk"]["units"])
            flat |= {f"trunk/layer_{r * unit + int(place)}/{rest}": x[r] for r in range(len(x))}
        else:
            flat[path] = x
    expected = lora.merge(single, nested(flat), OPTIONS)["trunk"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
    assert len([path for path in flat if path.endswith("down")]) == 4 * 5, "four kernels in each of five layers"


@pytest.mark.parametrize("scan", [True, False])
def test_adapters_begin_at_the_base_and_all_of_them_learn(scan):
    made = prior(scan=scan)
    base = base_of(made)
    adapters = lora.init(jax.random.key(1), base, OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base, adapters, OPTIONS), base)

    def loss(adapters):
        params = lora.merge(base, adapters, OPTIONS)
        return made.loss(params, *inputs(), jax.random.key(0), train=False)[0]

    for path, gradient in by_path(jax.jit(jax.grad(loss))(adapters)).items():
        assert bool(jnp.any(gradient != 0)) == path.endswith("/up"), path


def test_options():
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"rank": 10**6}):
        with pytest.raises(ConfigError, match=rf"lora\.{next(iter(wrong))}"):
            dataclasses.replace(OPTIONS, **wrong)


def test_text_rows_follow_their_spelling():
    """Rows of pieces that both vocabularies have, and of paddings, are taken over; the others stay fresh."""
    given = {"embedding": {"text": np.arange(14.0).reshape(7, 2), "text_head_kernel": np.arange(10.0).reshape(5, 2)}}
    own = {"embedding": {"text": np.zeros((6, 2)), "text_head_kernel": np.zeros((4, 2)), "image": np.zeros((3, 2))}}
    found = match(own, given, Vocabularies(["<unk>", "a", "b", "c"], ["<unk>", "c", "x"], 4, 3))
    table = found["embedding/text"]
    assert isinstance(table, Rows) and table.places.tolist() == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(table.values, given["embedding"]["text"][[0, 3, 4, 5, 6]])
    head = found["embedding/text_head_kernel"]
    assert head.places.tolist() == [0, 1, 3] and head.values[-1].tolist() == [8.0, 9.0]
    assert found["embedding/image"] is None
    assert match(own, given, Vocabularies(None, ["a"], 4, 3))["embedding/text"].places.tolist() == [3, 4, 5]
