"""BEiT's network: masked patches are not read, positions matter, and the trunk's fields have their effect."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.patterns import Bidirectional
from dalle_jax.models.beit import BEiT, BEiTOptions, pixel_targets
from dalle_jax.models.relative_positions import RelativePositions, relative_index
from dalle_jax.models.transformer import Block
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk, unstack
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import PaddedIds, TokenLayout

TRUNK = TransformerOptions(width=16, depth=2, heads=2, dtype="float32", positions="relative", scan=False)
OPTIONS = BEiTOptions(TRUNK, patch=4, smallest_block=2)
SIDE, SIZE = 3, 12
LAYOUT = TokenLayout(PaddedIds(1, 1), 1, SIDE, SIDE)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
MASKED = np.zeros((2, SIDE * SIDE), bool)
MASKED[:, [1, 4]] = True


def beit(trunk=None, **options):
    trunk = dataclasses.replace(TRUNK, **(trunk or {}))
    return BEiT(dataclasses.replace(OPTIONS, trunk=trunk, **options), SIZE, 7)


def drawn(init, *inputs):
    """Random parameters, so that every input matters."""
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))
    rng = np.random.default_rng(1)
    around = lambda path: 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    draw = lambda path, leaf: (around(path) + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(model, params, images=IMAGES, masked=MASKED):
    return np.asarray(jax.jit(lambda p, x, m: model(p, x, m))(params, images, masked))


def test_a_masked_patch_is_not_read_and_the_others_are():
    model = beit()
    params = drawn(model.init)
    outputs = run(model, params)
    assert outputs.shape == (2, 9, 7) and outputs.dtype == np.float32
    for patch, read in ((4, False), (5, True)):
        row, column = divmod(patch, SIDE)
        changed = IMAGES.copy()
        changed[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
        assert np.allclose(run(model, params, changed), outputs, atol=1e-6) != read


@pytest.mark.parametrize("positions", ["relative", "learned", "table", "rotary"])
def test_the_place_of_a_patch_matters(positions):
    """Without positions, an image whose rows of patches are exchanged would give the same outputs, exchanged."""
    model = beit({"positions": positions})
    params = drawn(model.init)
    rolled = np.roll(IMAGES, 4, axis=1)
    outputs, moved = (run(model, params, images, np.zeros_like(MASKED)) for images in (IMAGES, rolled))
    moved = np.roll(moved.reshape(2, SIDE, SIDE, 7), -1, axis=1).reshape(outputs.shape)
    assert not np.allclose(outputs, moved, atol=1e-3)


def test_relative_positions_are_one_bias_for_each_displacement():
    index = relative_index(LAYOUT)
    assert index.shape == (10, 10) and len(np.unique(index)) == index.max() + 1 == 25 + 3
    cells = index[1:, 1:].reshape(SIDE, SIDE, SIDE, SIDE)
    assert cells[0, 0, 1, 1] == cells[1, 1, 2, 2] and cells[0, 0, 1, 1] != cells[1, 1, 0, 0]
    assert len(np.unique(np.diagonal(index[1:, 1:]))) == 1
    assert len({index[0, 0], index[0, 1], index[1, 0], cells[0, 0, 0, 0]}) == 4
    module = RelativePositions(2, LAYOUT)
    params = drawn(module.init)["params"]
    bias = module.apply({"params": params})
    np.testing.assert_array_equal(bias[1], params["bias"][index, 1])


def test_the_bias_is_added_to_the_scores():
    """A bias that is large for one displacement makes each patch read its right neighbour alone."""
    block = Block(TRUNK, LAYOUT, (Bidirectional(True),))
    x = jnp.asarray(RNG.normal(size=(1, 10, 16)), jnp.float32)
    params = drawn(lambda key: block.init(key, x, False))["params"]
    bias = np.full((2, 10, 10), -1e4, np.float32)
    bias[:, np.arange(10), np.minimum(np.arange(10) + 1, 9)] = 0
    apply = jax.jit(lambda x: block.apply({"params": params}, x, False, None, None, jnp.asarray(bias)))
    gradient = jax.jacobian(lambda x: apply(x)[0].sum(-1))(x)[:, 0]  # [output, input, D]
    reads = np.abs(gradient).sum(-1) > 1e-6
    assert reads[3, 4] and not reads[3, 5] and not reads[3, 2]


def trunk_outputs(trunk, params, key=None):
    module = Trunk(trunk, LAYOUT, (Bidirectional(True),) * trunk.depth)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(64, 10, 16)), jnp.float32)
    if params is None:
        params = drawn(lambda key: module.init(key, x[:1], False))["params"]
    rngs = None if key is None else {"dropout": jax.random.key(key)}
    apply = jax.jit(lambda p: module.apply({"params": p}, x, key is not None, rngs=rngs))
    return np.asarray(apply(params)), params


def test_scanned_layers_read_the_same_bias_and_scales():
    scanned = dataclasses.replace(TRUNK, depth=4, scan=True, layer_scale=0.1)
    outputs, params = trunk_outputs(scanned, None)
    assert "units" in params and "relative_positions" in params
    flat, _ = trunk_outputs(dataclasses.replace(scanned, scan=False), unstack(params))
    np.testing.assert_allclose(flat, outputs, rtol=1e-4, atol=1e-5)


def test_layer_scale_multiplies_each_branch():
    plain = dataclasses.replace(TRUNK, depth=1)
    scaled = dataclasses.replace(plain, layer_scale=0.1)
    outputs, params = trunk_outputs(plain, None)
    fresh = Trunk(scaled, LAYOUT, (Bidirectional(True),)).init(jax.random.key(0), jnp.zeros((1, 10, 16)), False)[
        "params"
    ]
    gains = nn.meta.unbox(fresh)["layer_0"]["attention_scale"]
    np.testing.assert_array_equal(gains, np.full(16, 0.1, np.float32))
    with_ones = {
        **params,
        "layer_0": {**params["layer_0"], **dict.fromkeys(("attention_scale", "mlp_scale"), jnp.ones(16))},
    }
    np.testing.assert_allclose(trunk_outputs(scaled, with_ones)[0], outputs, rtol=1e-5, atol=1e-5)
    # Without the branches only the final norm is left.
    none = {
        **params,
        "layer_0": {**params["layer_0"], **dict.fromkeys(("attention_scale", "mlp_scale"), jnp.zeros(16))},
    }
    bare = {**none, "layer_0": jax.tree.map(jnp.zeros_like, none["layer_0"])}
    np.testing.assert_allclose(trunk_outputs(scaled, none)[0], trunk_outputs(scaled, bare)[0], atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_leaves_out_whole_branches_more_often_in_later_layers(scan):
    """One layer has the rate 0. Of two, the second drops each branch of half of the examples and doubles the others."""
    trunk = dataclasses.replace(TRUNK, depth=2, drop_path=0.5, scan=scan, final_norms=0)
    whole, params = trunk_outputs(trunk, None)
    dropped, _ = trunk_outputs(trunk, params, key=0)
    first, _ = trunk_outputs(dataclasses.replace(trunk, depth=1, scan=False), _first_layer(params), key=0)
    untouched = np.isclose(dropped, first, atol=1e-4).all(axis=(1, 2))
    assert 4 <= untouched.sum() <= 28  # both branches of a quarter of 64 examples
    assert not np.isclose(dropped, whole, atol=1e-3).all(axis=(1, 2)).any()
    np.testing.assert_allclose(trunk_outputs(trunk, params)[0], whole)  # no key: nothing is dropped


def _first_layer(params):
    flat = unstack(params)
    return {name: part for name, part in flat.items() if name != "layer_1"}


def test_drop_path_keeps_the_expectation():
    trunk = dataclasses.replace(TRUNK, depth=2, drop_path=0.5, final_norms=0)
    _, params = trunk_outputs(trunk, None)
    # Without the attention of the second layer, its output is linear in what is dropped.
    params["layer_1"]["attention"]["out"]["kernel"] = jnp.zeros_like(params["layer_1"]["attention"]["out"]["kernel"])
    whole = trunk_outputs(trunk, params)[0]
    mean = np.mean([trunk_outputs(trunk, params, key)[0] for key in range(24)], axis=0)
    assert np.abs(mean - whole).mean() < 0.35 * np.abs(trunk_outputs(trunk, params, 0)[0] - whole).mean()


def test_pixel_targets():
    targets = np.asarray(pixel_targets(IMAGES, 4, False))
    np.testing.assert_allclose(targets[0, 1], (IMAGES[0, :4, 4:8] / 127.5 - 1).reshape(-1), atol=1e-6)
    normalized = np.asarray(pixel_targets(IMAGES, 4, True))
    np.testing.assert_allclose(normalized.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(-1), 1, atol=1e-3)
    flat = np.asarray(pixel_targets(np.full((1, 4, 4, 3), 9, np.uint8), 4, True))
    np.testing.assert_allclose(flat, 0, atol=1e-2)


def test_labels_are_read_from_the_whole_image_and_need_no_mask():
    model = beit(target="labels")
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    assert "mask" not in params and "head_labels" in params
    shape = jax.eval_shape(model, params, jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8)).shape
    assert shape == (2, 7)


@pytest.mark.parametrize("options", [AutoregressiveOptions, MaskGITOptions])
def test_no_prior_has_relative_positions(options):
    with pytest.raises(ConfigError, match="relative"):
        options(trunk=TRUNK)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: dataclasses.replace(TRUNK, attention_kernel="splash"), "attention_kernel"),
        (lambda: OPTIONS.side(13), "patch"),
        (lambda: BEiTOptions(masked_share=0.0), "masked_share"),
        (lambda: BEiTOptions(target="colours"), "target"),
    ],
)
def test_what_cannot_work_is_rejected(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


def test_bfloat16():
    model = beit({"dtype": "bfloat16", "drop_path": 0.1, "layer_scale": 0.1, "depth": 4, "scan": True})
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    arguments = params, jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8), jax.ShapeDtypeStruct(MASKED.shape, bool)
    key = jax.eval_shape(jax.random.key, 0)
    assert jax.eval_shape(model, *arguments, key).dtype == jnp.float32
