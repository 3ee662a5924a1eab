"""Initialisation of the dVAE from clusters of patches."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.kmeans_init import kmeans, kmeans_init
from dalle_jax.metrics import codebook
from dalle_jax.pytree import leaf_path

TOKENIZER = DVAETokenizer(
    DVAEOptions(
        image_size=16, vocab_size=12, hidden=100, groups=1, blocks_per_group=2, codebook_dim=100, in_kernel=1,
        stem_factor=4,
    )
)  # fmt: skip


def test_separate_clusters_are_found():
    rng = np.random.default_rng(0)
    centres = 20 * rng.normal(size=(6, 5))
    features = (centres[:, None] + 0.1 * rng.normal(size=(6, 40, 5))).reshape(-1, 5).astype(np.float32)
    features = rng.permutation(features)
    found, nearest = jax.jit(kmeans, static_argnums=1)(features, 6, jax.random.key(0))
    distances = np.linalg.norm(np.asarray(found)[:, None] - centres[None], axis=-1)
    assert sorted(distances.argmin(1).tolist()) == list(range(6)), "one centre for each cluster"
    assert distances.min(1).max() < 0.1
    np.testing.assert_allclose(np.mean((features - found[nearest]) ** 2), 0.1**2, rtol=0.2)


def test_fewer_kinds_of_feature_than_centres():
    features = jnp.asarray(np.repeat(np.eye(3, dtype=np.float32), 10, axis=0))
    found, nearest = jax.jit(kmeans, static_argnums=1)(features, 5, jax.random.key(0))
    assert np.isfinite(found).all() and float(jnp.abs(features - found[nearest]).max()) < 1e-6


@pytest.fixture(scope="module")
def started():
    """Parameters before and after, and the images: blocks of 4×4 pixels in twelve colours."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 3), np.uint8)
    images = colours[rng.integers(0, 12, (32, 4, 4))].repeat(4, axis=1).repeat(4, axis=2)
    before = jax.jit(lambda key: nn.meta.unbox(TOKENIZER.init(key)))(jax.random.key(0))
    after = jax.jit(lambda p, key: kmeans_init(TOKENIZER, p, images, key, sharpness=10.0))(before, jax.random.key(1))
    return before, after, images


def test_every_code_is_used_at_initialisation(started):
    before, after, images = started

    def used(params):
        count = codebook.count(TOKENIZER.encode(params, images), 12)
        return float(codebook.perplexity(count)), float(codebook.usage(count))

    perplexity, usage = used(after)
    assert usage == 1.0 and perplexity > 10.0
    assert used(before)[0] < 8.0


def test_a_code_stands_for_a_colour(started):
    _, params, images = started
    tokens = np.asarray(TOKENIZER.encode(params, images))
    pairs = {(int(token), *pixel) for token, pixel in zip(tokens.ravel(), images[:, ::4, ::4].reshape(-1, 3).tolist())}
    assert len(pairs) == 12


def test_nothing_else_changes(started):
    before, after, _ = started
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    changed = {
        leaf_path(path)
        for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after))
        if not np.array_equal(a, b)
    }
    blocks = [f"{part}/group_1_block_{i}" for part in ("encoder", "decoder") for i in (1, 2)]
    assert changed == {
        "encoder/output/kernel", "encoder/output/bias", "codebook/kernel", "decoder/output/kernel",
        "decoder/output/bias", *(f"{block}/conv_4/kernel" for block in blocks),
    }  # fmt: skip
    assert all(np.abs(leaf).max() == 0 for path, leaf in jax.tree.leaves_with_path(after) if "conv_4" in str(path))


def test_an_untrained_dvae_decodes_a_code_to_its_mean_patch(started):
    _, params, images = started
    decoded = TOKENIZER.decode(params, TOKENIZER.encode(params, images))
    np.testing.assert_allclose(decoded, images / 255, atol=2e-3)


@pytest.mark.parametrize("sizes", [dict(groups=2), dict(hidden=92, codebook_dim=92), dict(codebook_dim=120)])
def test_sizes_that_cannot_hold_a_patch(sizes):
    options = dataclasses.replace(TOKENIZER.options, **sizes)
    with pytest.raises(ConfigError, match="kmeans"):
        kmeans_init(DVAETokenizer(options), {}, np.zeros((1, 16, 16, 3), np.uint8), jax.random.key(0), sharpness=10.0)
