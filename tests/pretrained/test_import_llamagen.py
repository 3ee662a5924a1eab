"""Our VQGAN equals LlamaGen's tokenizer, and files that are not its weights are rejected by name."""

import dataclasses

import jax
import numpy as np
import pytest
import taming_originals

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import llamagen

pytest.importorskip("torch", reason="the plain module of this test needs torch")
import plain_llamagen
import torch

SMALL = VQGANOptions(
    image_size=16, vocab_size=40, code_dim=6, latent=8, hidden=32, multipliers=(1, 2), blocks=1, attention_levels=(1,),
    normalized_codes=True,
)  # fmt: skip
LARGER = dataclasses.replace(
    SMALL, image_size=32, vocab_size=60, multipliers=(1, 1, 2), blocks=2, attention_levels=(2,), latent=16
)


@pytest.fixture(params=["small", "larger", pytest.param("llamagen-vq-ds16", marks=pytest.mark.slow)])
def case(request):
    """Options, arrays, images, and the outputs of the plain module."""
    options = {"small": SMALL, "larger": LARGER}.get(request.param) or llamagen.PUBLISHED[request.param]
    module = plain_llamagen.Tokenizer(dataclasses.asdict(options))
    arrays = taming_originals.random_arrays(taming_originals.shapes_of(module))
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    images = taming_originals.images_of(32, 48)
    return options, arrays, images, module.outputs(images)


def test_same_outputs_as_the_plain_module(case):
    options, arrays, images, expected = case
    tokenizer, params = VQGANTokenizer(options), llamagen.convert(arrays, options)
    features = jax.jit(tokenizer.features)(params, images)
    np.testing.assert_allclose(features, expected["features"], atol=1e-4)
    np.testing.assert_array_equal(jax.jit(tokenizer.encode)(params, images), expected["tokens"])
    decode = lambda params, tokens: tokenizer.decode_vectors(params, tokenizer.codebook(params)[tokens])
    np.testing.assert_allclose(jax.jit(decode)(params, expected["tokens"]), expected["pixels"], atol=1e-4)
    assert np.std(expected["pixels"]) > 0.2 and len(np.unique(expected["tokens"])) > 8


def test_a_checkpoint_of_the_authors(tmp_path, monkeypatch):
    monkeypatch.setattr(llamagen, "PUBLISHED", {"llamagen-vq-ds16": SMALL})
    module = plain_llamagen.Tokenizer(dataclasses.asdict(SMALL))
    halves = {name: tensor.half() for name, tensor in module.state_dict().items()}
    torch.save({"model": halves, "optimizer": {"state": {}}, "steps": 3}, tmp_path / "vq_ds16_c2i.pt")
    (one,) = [one for one in llamagen.IMPORTERS if one.name == "llamagen-vq-ds16"]
    one.run([tmp_path / "vq_ds16_c2i.pt"], str(tmp_path / "run"), {"image_size": 32})
    tokenizer, params = workdir.load_tokenizer(str(tmp_path / "run"))
    assert tokenizer.options == dataclasses.replace(SMALL, image_size=32)
    expected = llamagen.convert({name: tensor.numpy() for name, tensor in halves.items()}, SMALL)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("encoder.mid.1.q.weight", None, ["missing", "encoder.mid.1.q.weight"]),
        ("decoder.conv_blocks.0.upsample.conv.bias", None, ["missing", "decoder.conv_blocks.0.upsample.conv.bias"]),
        ("quantize.embedding.weight", (40, 5), ["another shape", r"quantize.embedding.weight \[40, 5\]"]),
        ("encoder.down.0.block.0.conv1.weight", (2, 3), ["unexpected", "encoder.down.0.block.0.conv1.weight"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(name, shape, tokens):
    arrays = {name: np.zeros(shape, np.float32) for name, (_, shape) in llamagen.layout(SMALL).items()}
    arrays.pop(name, None)
    if shape is not None:
        arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(PretrainedError, match=".*".join(tokens)):
        llamagen.convert(arrays, SMALL)
