"""Our VQGAN equals the authors' code, and files that are not the weights of a VQGAN are rejected by name."""

import collections
import dataclasses
import pickle
import sys
import types

import jax
import numpy as np
import pytest
import taming_originals
from test_restricted_pickle import torch_like_zip

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import state_dict, vqgan

needs_package = pytest.mark.skipif(not taming_originals.AVAILABLE, reason=taming_originals.REASON)


@pytest.fixture(scope="module", params=list(taming_originals.CASES))
def case(request):
    """Options, arrays, images, and the outputs of the authors' code."""
    options, *rest = taming_originals.golden(request.param)
    return VQGANOptions(**options), *rest


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# -- the network --------------------------------------------------------------------------------------------------


def check_outputs(options, arrays, images, expected):
    """Compares features, logits, tokens and pixels with those of the authors' code."""
    assert vqgan.options_of(arrays, options.image_size) == options
    tokenizer, params = VQGANTokenizer(options), vqgan.convert(arrays, options)
    features = jax.jit(tokenizer.features)(params, images)
    np.testing.assert_allclose(features, expected["features"], atol=1e-4)
    if options.quantizer == "gumbel":
        logits = jax.jit(tokenizer.code_logits)(params, features)
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_array_equal(jax.jit(tokenizer.encode)(params, images), expected["tokens"])
    decode = lambda params, tokens: tokenizer.decode_vectors(params, tokenizer.codebook(params)[tokens])
    pixels = jax.jit(decode)(params, expected["tokens"])
    np.testing.assert_allclose(pixels, expected["pixels"], atol=1e-4)
    shown = jax.jit(tokenizer.decode)(params, expected["tokens"])
    np.testing.assert_allclose(shown, np.clip(expected["pixels"] / 2 + 0.5, 0, 1), atol=1e-4)
    assert np.std(expected["features"]) > 0.5 and np.std(expected["pixels"]) > 0.2
    assert len(np.unique(expected["tokens"])) > 8


def test_same_outputs_as_the_golden_file(case):
    check_outputs(*case)


@needs_package
@pytest.mark.parametrize("name", taming_originals.CASES)
def test_the_golden_file_is_what_the_authors_code_computes(name):
    options, arrays, images, expected = taming_originals.golden(name)
    found = taming_originals.outputs(taming_originals.original(options), arrays, images)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-5, err_msg=key)


@needs_package
@pytest.mark.parametrize(("name", "side"), [("vqgan-f16-1024", 64), ("vqgan-gumbel-f8", 32)])
def test_same_outputs_at_the_published_sizes(name, side):
    options = vqgan.PUBLISHED[name]
    module = taming_originals.original(dataclasses.asdict(options))
    arrays = taming_originals.random_arrays(taming_originals.shapes_of(module))
    images = taming_originals.images_of(side, side)
    check_outputs(options, arrays, images, taming_originals.outputs(module, arrays, images))
    (entry,) = [one for one in vqgan.IMPORTERS if one.name == name]
    assert entry.parameters == sum(array.size for array in arrays.values())
