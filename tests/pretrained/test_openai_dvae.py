"""Our encoder and decoder equal those of the published package, and every file format gives the same parameters."""

import collections
import importlib.util

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.pretrained import openai_dvae

needs_package = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("dall_e")),
    reason="needs torch and DALL-E 0.1 (pip install torch==2.13.0; pip install --no-deps DALL-E==0.1)",
)
SMALL = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}
FULL = {"n_hid": 256, "n_blk_per_group": 2, "vocab_size": 8192}


def original(sizes, seed=0):
    """Returns encoder and decoder of the package with random weights, and a large codebook, so that errors show."""
    import torch
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder

    torch.manual_seed(seed)
    encoder, decoder = Encoder(requires_grad=False, **sizes), Decoder(requires_grad=False, **sizes)
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_(std=0.1)
    decoder.blocks.input.w.data *= sizes["vocab_size"] ** 0.5
    return encoder, decoder


def arrays_of(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@needs_package
@pytest.mark.parametrize(("sizes", "pixels"), [(SMALL, 64), (FULL, 32)], ids=["small", "full width"])
def test_same_outputs_as_the_package(sizes, pixels):
    import dall_e
    import torch

    encoder, decoder = original(sizes)
    images = np.random.default_rng(0).integers(0, 256, (2, pixels, pixels, 3), np.uint8)
    with torch.no_grad():
        their_logits = encoder(dall_e.map_pixels(torch.tensor(images).permute(0, 3, 1, 2).float() / 255))
        their_tokens = their_logits.argmax(1)
        one_hot = torch.nn.functional.one_hot(their_tokens, sizes["vocab_size"]).permute(0, 3, 1, 2).float()
        their_maps = decoder(one_hot)
        their_images = dall_e.unmap_pixels(torch.sigmoid(their_maps[:, :3]))
    channels_last = lambda tensor: tensor.permute(0, 2, 3, 1).numpy()  # noqa: E731

    arrays = arrays_of(encoder), arrays_of(decoder)
    options = openai_dvae.options_of(*arrays)
    assert options == DVAEOptions(
        vocab_size=sizes["vocab_size"], hidden=sizes["n_hid"], blocks_per_group=sizes["n_blk_per_group"]
    )
    params, tokenizer = openai_dvae.convert(*arrays, options), DVAETokenizer(options)
    logits = tokenizer.encode_logits(params, images)
    maps = np.concatenate(tokenizer.decode_maps(params, their_tokens.numpy()), axis=-1)
    assert np.abs(logits).max() > 0.5 and np.abs(maps).max() > 0.2
    np.testing.assert_allclose(logits, channels_last(their_logits), atol=1e-4)
    np.testing.assert_allclose(maps, channels_last(their_maps), atol=1e-4)
    np.testing.assert_array_equal(tokenizer.encode(params, images), their_tokens.numpy())
    np.testing.assert_allclose(tokenizer.decode(params, their_tokens.numpy()), channels_last(their_images), atol=1e-4)


# -- files --------------------------------------------------------------------------------------------------------


def random_arrays(seed=0):
    """Returns two state dicts of a tiny dVAE in the original layout, without using the package."""
    rng, options = np.random.default_rng(seed), DVAEOptions(32, 16, 4, 2, 1, 8, 3)
    params = nn.meta.unbox(jax.eval_shape(DVAETokenizer(options).init, jax.random.key(0)))
    sides = {"encoder": {}, "decoder": {}}
    for path, leaf in jax.tree.leaves_with_path(params):
        side, *inner, kind = (key.key for key in path)
        where = (
            "blocks.input"
            if side == "codebook"
            else {"input": "blocks.input", "output": "blocks.output.conv"}.get(inner[0])
        )
        if where is None:
            group, block = inner[0].split("_")[1], inner[0].split("_")[3]
            where = f"blocks.group_{group}.block_{block}." + (
                "id_path" if inner[1] == "skip" else f"res_path.{inner[1]}"
            )
        shape = (
            leaf.shape if kind == "bias" else (*leaf.shape[::-1][:2], *(leaf.shape[:2] if leaf.ndim == 4 else (1, 1)))
        )
        name = f"{where}.{'b' if kind == 'bias' else 'w'}"
        sides["decoder" if side == "codebook" else side][name] = rng.normal(size=shape).astype(np.float32)
    return sides["encoder"], sides["decoder"], options


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_plain_files(tmp_path, kind):
    *sides, options = random_arrays()
    paths = []
    for name, arrays in zip(("encoder", "decoder"), sides):
        paths.append(tmp_path / name)  # no suffix: the format is detected from the content
        if kind == "npz":
            with open(paths[-1], "wb") as file:
                np.savez(file, **arrays)
        else:
            pytest.importorskip("safetensors.numpy").save_file(arrays, paths[-1])
    tokenizer, params = openai_dvae.load(*paths, image_size=32)
    assert tokenizer.options == options
    same(params, openai_dvae.convert(*sides, options))


@needs_package
@pytest.mark.parametrize("what", ["module", "state dict"])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_files_by_torch(tmp_path, what, container):
    import torch

    modules = original(SMALL)
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for path, module in zip(paths, modules):
        content = module if what == "module" else module.state_dict()
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    tokenizer, params = openai_dvae.load(*paths)
    same(params, openai_dvae.convert(*map(arrays_of, modules), tokenizer.options))


def test_an_imported_tokenizer_can_be_saved_for_a_prior(tmp_path):
    *sides, options = random_arrays()
    params = openai_dvae.convert(*sides, options)
    workdir.save_tokenizer(tmp_path, DVAETokenizer(options), params)
    tokenizer, loaded = workdir.load_tokenizer(tmp_path)
    assert tokenizer.options == options
    same(loaded, params)


# -- invalid files ------------------------------------------------------------------------------------------------


def test_arrays_that_do_not_fit():
    encoder, decoder, options = random_arrays()
    missing = {name: array for name, array in decoder.items() if name != "blocks.output.conv.b"}
    with pytest.raises(PretrainedError, match="decoder.*output.*bias"):
        openai_dvae.convert(encoder, missing, options)
    with pytest.raises(PretrainedError, match=r"loss\.weight"):
        openai_dvae.convert({**encoder, "loss.weight": np.zeros(3)}, decoder, options)
    with pytest.raises(PretrainedError, match="encoder.*input"):
        openai_dvae.convert({**encoder, "blocks.input.w": np.zeros((4, 3, 5, 5))}, decoder, options)


def test_files_that_hold_something_else(tmp_path):
    other = tmp_path / "clip.npz"
    np.savez(other, weight=np.zeros(3))
    with pytest.raises(PretrainedError, match=r"blocks\.output\.conv\.w"):
        openai_dvae.load(other, other)
    objects = tmp_path / "objects.npz"
    np.savez(objects, weight=np.array([collections.OrderedDict()], dtype=object))
    with pytest.raises(PretrainedError, match=r"objects\.npz"):
        openai_dvae.load(objects, objects)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 7 + b"\x00{}")
    with pytest.raises(PretrainedError, match=r"broken\.safetensors"):
        openai_dvae.load(broken, broken)
