"""Our VQGAN equals the authors' code, and files that are not the weights of a VQGAN are rejected by name."""

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib
import re
import sys
import types
import typing

import flax.serialization
import jax
import numpy as np
import pytest
import taming_originals
from flax import traverse_util
from safetensors.numpy import save_file

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
        np.testing.assert_allclose(found[key], values, atol=1e-4, err_msg=key)


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


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_plain_files(tmp_path, case, kind):
    options, arrays, _, _ = case
    path = tmp_path / "weights"  # no suffix: the format is detected from the content
    losses = {"loss.discriminator.main.0.weight": np.zeros((2, 3), np.float32), "loss.logvar": np.zeros(())}
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays, **losses)
    else:
        save_file(arrays | losses, path)
    tokenizer, params = vqgan.load(path, image_size=options.image_size)
    assert tokenizer.options == options
    same(params, vqgan.convert(arrays, options))
    workdir.save_tokenizer(tmp_path / "run", tokenizer, params)
    again, loaded = workdir.load_tokenizer(tmp_path / "run")
    assert again == tokenizer
    same(loaded, params)


class Command:
    """Runs a command when Python's unpickler reads it."""

    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture
def classes(monkeypatch):
    """Returns classes with names of Lightning and OmegaConf, which can be pickled while their modules are there."""
    bases = {
        "pytorch_lightning.utilities.parsing.AttributeDict": dict,  # hyper-parameters
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": object,  # the key of its state
        "omegaconf.dictconfig.DictConfig": object,  # its parts refer to it
    }
    made = {}
    for full, base in bases.items():
        module, _, name = full.rpartition(".")
        made[name] = type(name, (base,), {"__module__": module})
        for parent in itertools.accumulate(module.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, made[name])
    return made


def make(cls, **attributes):
    made = cls()
    made.__dict__ |= attributes
    return made


def checkpoint(arrays, classes):
    """Returns what Lightning stores: the weights among settings, callbacks and optimisers."""
    import torch

    weights = collections.OrderedDict((name, torch.tensor(array)) for name, array in arrays.items())
    weights["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 4, 1, 1)
    config = classes["DictConfig"]
    settings = make(config, _content={"ch": make(config, _val=128, ref_type=typing.Any)})
    settings._parent = settings
    score = {"best_model_score": torch.tensor(0.5), "best_model_path": pathlib.Path("a/b.ckpt")}
    return {
        "epoch": 7,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": weights,
        "callbacks": {classes["ModelCheckpoint"]: score},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": classes["AttributeDict"](ddconfig=settings, lr=np.float64(1e-4), sides=np.arange(3)),
        "args": argparse.Namespace(seed=collections.defaultdict(int, a=1), size=torch.Size([2, 3]), kind=torch.float16),
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_checkpoints_of_lightning(tmp_path, case, classes, monkeypatch, container):
    torch = pytest.importorskip("torch", reason="torch writes the files of this test")
    options, arrays, _, _ = case
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(arrays, classes), path, _use_new_zipfile_serialization=container == "zip")
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules and "omegaconf" not in sys.modules
    tokenizer, params = vqgan.load(path, image_size=options.image_size)
    assert tokenizer.options == options
    same(params, vqgan.convert(arrays, options))


def test_code_in_a_checkpoint_is_rejected_and_not_run(tmp_path, classes, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch writes the files of this test")
    monkeypatch.chdir(tmp_path)
    content = checkpoint({"a": np.zeros(2, np.float32)}, classes)
    content["hyper_parameters"]["command"] = Command()
    torch.save(content, "last.ckpt")
    with pytest.raises(PretrainedError, match=r"'posix\.system'"):
        state_dict.read("last.ckpt")
    assert not (tmp_path / "owned").exists()


def flax_names(arrays):
    """Returns the arrays as Flax's port names and transposes them: numbered modules have names such as `down_0`."""
    found = {}
    for name, array in arrays.items():
        *modules, leaf = re.sub(r"\.(\d+)\.", r"_\1.", re.sub(r"\.(\d+)\.", r"_\1.", name)).split(".")
        if array.ndim == 4:
            leaf, array = leaf.replace("weight", "kernel"), array.transpose(2, 3, 1, 0)
        found[(*modules, leaf.replace("weight", "embedding" if modules[0] == "quantize" else "scale"))] = array
    return found


@pytest.mark.parametrize("root", ["", "params"])
def test_the_flax_port_of_dalle_mini(tmp_path, root):
    """Its modules are `Encoder.down`, `DownsamplingBlock.block`, `MidBlock.attn_1` and so on."""
    sizes, arrays, *_ = taming_originals.golden("nearest")
    named = flax_names(arrays)
    for path in (
        "encoder/down_0/block_0/norm1/scale", "encoder/down_0/downsample/conv/kernel", "decoder/up_1/attn_1/q/bias",
        "decoder/up_1/upsample/conv/kernel", "encoder/mid/attn_1/proj_out/kernel", "decoder/mid/block_2/conv1/kernel",
        "encoder/down_1/block_0/nin_shortcut/kernel", "quantize/embedding/embedding", "post_quant_conv/bias",
    ):  # fmt: skip
        assert tuple(path.split("/")) in named, path
    tree = traverse_util.unflatten_dict(named)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes({root: tree} if root else tree))
    options = VQGANOptions(**sizes)
    tokenizer, params = vqgan.load(path, image_size=options.image_size)
    assert tokenizer.options == options
    same(params, vqgan.convert(arrays, options))
    assert vqgan.published_name(state_dict.read(path)) == vqgan.OWN


# -- other files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("encoder.mid.attn_1.q.weight", None, ["missing", "encoder.mid.attn_1.q.weight"]),
        ("decoder.up.1.upsample.conv.bias", None, ["missing", "decoder.up.1.upsample.conv.bias"]),
        ("encoder.norm_out.bias", (5,), ["another shape", r"encoder.norm_out.bias \[5\]"]),
        ("first_stage.encoder.conv_in.weight", (2, 3), ["unexpected", "first_stage.encoder.conv_in.weight"]),
        ("quantize.used", (3,), ["unexpected", "quantize.used"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(case, name, shape, tokens):
    options, arrays, _, _ = case
    changed = {key: array for key, array in arrays.items() if key != name}
    if shape is not None:
        changed[name] = np.zeros(shape, np.float32)
    for derived in (options, vqgan.options_of(changed, options.image_size)):
        with pytest.raises(PretrainedError, match=".*".join(tokens)):
            vqgan.convert(changed, derived)
    assert vqgan.published_name(changed) is None, "an incomplete file is no importer's"


def test_several_faults_are_named_at_once(case):
    options, arrays, _, _ = case
    renamed = {name.replace("decoder.", "generator."): array for name, array in arrays.items()}
    renamed["quant_conv.bias"] = np.zeros(2)
    with pytest.raises(PretrainedError) as caught:
        vqgan.convert(renamed, options)
    for token in ("decoder.conv_in", "generator.conv_in", "quant_conv.bias [2]", "more"):
        assert token in str(caught.value), token


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_numbers_are_named(case, value):
    options, arrays, _, _ = case
    with pytest.raises(PretrainedError, match=r"quant_conv\.bias"):
        vqgan.convert({**arrays, "quant_conv.bias": np.full_like(arrays["quant_conv.bias"], value)}, options)


@pytest.mark.parametrize("missing", ["encoder.conv_in.weight", "quant_conv.weight", "encoder.down.0.block.0"])
def test_arrays_from_which_no_sizes_follow(case, missing):
    _, arrays, _, _ = case
    with pytest.raises(PretrainedError, match=r"encoder\.conv_in\.weight"):
        vqgan.options_of({name: array for name, array in arrays.items() if not name.startswith(missing)})


def test_many_names_of_a_hostile_file_cost_little():
    names = [f"encoder.down.{level}.block.{block}.x" for level in range(12) for block in (0, 255)]
    with pytest.raises(PretrainedError, match="24 blocks"):
        vqgan.options_of(dict.fromkeys(names, np.zeros(1)))


def test_an_image_size_that_the_model_cannot_encode(tmp_path, case):
    _, arrays, _, _ = case
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(ConfigError, match="33"):
        vqgan.load(tmp_path / "weights.npz", image_size=33)
