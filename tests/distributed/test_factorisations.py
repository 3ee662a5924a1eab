"""Loss and gradients of every task on every mesh of eight devices equal those on one device.

The tests run in float32, and devices sum in another order than a single device.

| quantity                                     | measured | allowed |
|----------------------------------------------|----------|---------|
| loss, relative                               | 7e-7     | 2e-6    |
| gradients, relative to the array's largest   | 8e-7     | 1e-5    |
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import to_mesh
from dalle_jax.distributed.sharding import batch_sharding, on_mesh, replicated, shardings_of
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.tasks.dvae import DVAETask
from dalle_jax.tasks.prior import PriorTask
from dalle_jax.token_layout import TokenLayout

ROWS, SIZE, VOCAB = 8, 16, 24
LAYOUT = TokenLayout(Text(19, 5), image_vocab=VOCAB, height=4, width=4)
TRUNK = TransformerOptions(width=32, depth=2, heads=8, dtype="float32", scan=False)
DVAE = DVAEOptions(
    image_size=SIZE, vocab_size=VOCAB, hidden=16, groups=1, blocks_per_group=1, codebook_dim=8, in_kernel=3,
    stem_factor=4,
)  # fmt: skip
TOWERS = CLIPOptions(
    image_size=SIZE, patch=8, image_width=32, image_depth=1, image_heads=8, text_width=32, text_depth=1, text_heads=8,
    embed_dim=16, text_length=6, text_vocab=20, end_id=19,
)  # fmt: skip


@functools.cache
def task_of(kind):
    tokenizer = DVAETokenizer(DVAE)
    if kind == "dvae":
        return DVAETask(tokenizer, schedules.Constant(0.5), schedules.Constant(3.0))
    if kind == "clip":
        return CLIPTask(CLIP(TOWERS), text_model=None)
    made = {
        "autoregressive": lambda: AutoregressivePrior(LAYOUT, AutoregressiveOptions(TRUNK, kernel=3)),
        "maskgit": lambda: MaskGITPrior(LAYOUT, MaskGITOptions(TRUNK, steps=4)),
    }[kind]()
    frozen = jax.jit(lambda key: nn.meta.unbox(tokenizer.init(key)))(jax.random.key(3))
    return PriorTask(made, tokenizer, frozen, text_model=None)


def batch():
    """Returns rows that all differ, with images of flat blocks."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    text = np.stack([LAYOUT.condition.pad(rng.integers(0, 19, 1 + i % 5)) for i in range(ROWS)])
    return {"image": images, "text": text}


@functools.cache
def compiled(kind):
    """Returns a function of (parameters, frozen, batch) that returns ((loss, scalars), gradients)."""
    loss = functools.partial(task_of(kind).loss, key=jax.random.key(1), step=jnp.int32(2))
    return jax.jit(jax.value_and_grad(lambda p, f, b: loss(p, f, b), has_aux=True))


@functools.cache
def boxed(kind):
    return jax.jit(task_of(kind).init)(jax.random.key(0))


@functools.cache
def on_one_device(kind):
    return jax.device_get(compiled(kind)(nn.meta.unbox(boxed(kind)), task_of(kind).frozen, batch()))


FACTORISATIONS = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


CASES = [(kind, axes) for kind in ("autoregressive", "maskgit", "dvae", "clip") for axes in FACTORISATIONS]
FAST = ("dvae", (2, 2, 2))  # tests/priors/test_protocol.py and test_clip_task.py run this mesh for the other tasks


@pytest.mark.parametrize(
    "kind, axes", [case if case == FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_loss_and_gradients_are_those_of_one_device(kind, axes):
    (expected, scalars), gradients = on_one_device(kind)
    params, mesh = nn.meta.unbox(boxed(kind)), make_mesh(*axes)
    with on_mesh(mesh):
        layout = shardings_of(boxed(kind), mesh)
        placed = jax.device_put(params, layout), jax.device_put(task_of(kind).frozen, replicated(mesh))
        (loss, ours), mesh_gradients = compiled(kind)(*placed, to_mesh(batch(), batch_sharding(mesh)))
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for name in scalars:
        np.testing.assert_allclose(ours[name], scalars[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(mesh_gradients), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
    if axes[1] * axes[2] > 1:  # the parameters are really split
        assert any(x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(placed[0]))
