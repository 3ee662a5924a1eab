"""A prior starts from the parameters of another: layers agree although scans stack them in different ways."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import unstack
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import TokenLayout
from dalle_jax.training import warm_start as module
from dalle_jax.training.step import TrainState

LAYOUT = TokenLayout(Text(9, 3), image_vocab=9, height=2, width=2)
TRUNK = TransformerOptions(width=8, depth=4, heads=2, dtype="float32")


def params_of(prior, seed):
    shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def started(monkeypatch, own, given):
    """Returns the parameters of a fresh state after `warm_start` from a checkpoint with the given ones."""
    monkeypatch.setattr(module, "open_run", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(module.trained, "restore", lambda *_: given)
    zero = jnp.zeros((), jnp.int32)
    return module.warm_start(TrainState(zero, own, None, (), zero, zero), "elsewhere", "here", "prior").params


@pytest.mark.parametrize("scans", [(True, True), (True, False), (False, True)])
def test_copies_every_layer(monkeypatch, scans):
    """The autoregressive scan stacks two units of two layers. The scan of MaskGIT stacks four units of one layer."""
    first, second = (dataclasses.replace(TRUNK, scan=scan) for scan in scans)
    given = params_of(AutoregressivePrior(LAYOUT, AutoregressiveOptions(first, kernel=3)), 1)
    own = params_of(MaskGITPrior(LAYOUT, MaskGITOptions(second)), 2)
    mixed = started(monkeypatch, own, given)
    ours, theirs = unstack(mixed["trunk"]), unstack(given["trunk"])
    assert set(ours) == {"layer_0", "layer_1", "layer_2", "layer_3", "final_norm"}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.structure(mixed) == jax.tree.structure(own)


def test_layers_of_another_width_or_depth_stay_fresh(monkeypatch):
    given = params_of(
        AutoregressivePrior(LAYOUT, AutoregressiveOptions(dataclasses.replace(TRUNK, depth=2), kernel=3)), 1
    )
    own = params_of(MaskGITPrior(LAYOUT, MaskGITOptions(TRUNK)), 2)
    mixed = started(monkeypatch, own, given)
    jax.tree.map(np.testing.assert_array_equal, mixed["trunk"]["units"], own["trunk"]["units"])
    np.testing.assert_array_equal(mixed["embedding"]["text"], given["embedding"]["text"])
