"""Imports of ru-DALL-E: the outputs of the authors' code, files of fp16, and files that do not fit."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rudalle_originals
import taming_originals
from rudalle_originals import CASES
from youtokentome_cases import MERGES, vocabulary_of

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, PretrainedError, UserError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions
from dalle_jax.models.attention.patterns import Toroidal
from dalle_jax.pretrained import catalogue, rudalle, state_dict, vqgan
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

needs_package = pytest.mark.skipif(not rudalle_originals.AVAILABLE, reason=rudalle_originals.REASON)
every_version = pytest.mark.parametrize("version", CASES)


def imported(version):
    """The prior and its parameters, captions and tokens of a case."""
    sizes, heads = CASES[version]
    prior = rudalle.prior_of(sizes, heads, version)
    params = rudalle.convert(rudalle_originals.random_arrays(sizes), sizes, prior)
    captions, tokens = rudalle_originals.inputs_of(sizes)
    return prior, params, np.stack([prior.layout.condition.pad(ids) for ids in captions]), tokens.astype(np.int32)


# -- the original -------------------------------------------------------------------------------------------------


@needs_package
@every_version
def test_the_golden_file_is_what_the_original_gives(version):
    expected = rudalle_originals.golden()[version]
    for name, found in rudalle_originals.outputs(version).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-5)


@every_version
def test_logits_of_all_positions_are_those_of_the_original(version):
    prior, params, text, tokens = imported(version)
    classes, t = prior.layout.condition.ids, prior.layout.condition.length
    logits = rudalle_originals.golden()[version]["logits"]
    ours = jax.jit(prior.model.apply)({"params": params}, text, tokens)
    shift = int(version == "v2")  # begin is one more position
    np.testing.assert_allclose(ours[0], logits[:, : t - 1 + shift, :classes], atol=1e-4)
    np.testing.assert_allclose(ours[1], logits[:, t - 1 + shift : None if shift else -1, classes:], atol=1e-4)
    assert np.abs(ours[1]).max() > 2


@every_version
def test_cached_decoding_is_that_of_the_original(version):
    """Logits at every position from the decode caches, and the tokens of greedy decoding."""
    prior, params, text, tokens = imported(version)
    stored = rudalle_originals.golden()[version]
    bound = lambda method: lambda params, *args: prior.model.apply({"params": params}, *args, method=method)
    logits, kv, caches = jax.jit(bound("start"), static_argnums=2)(params, text, len(tokens))

    @jax.jit
    def later(params, tokens, kv, caches):
        def step(caches, place):
            cells = (jnp.full(len(tokens), cell) for cell in (place, place + 1))
            logits, caches = bound("step")(params, tokens[:, place], place, *cells, kv, caches)
            return caches, logits

        return jax.lax.scan(step, caches, jnp.arange(prior.layout.image_length - 1))[1]

    found = np.concatenate([logits[None], later(params, tokens, kv, caches)]).swapaxes(0, 1)
    begin = prior.layout.condition.length - 1 + (version == "v2")
    expected = stored["logits"][:, begin:, prior.layout.condition.ids :][:, : found.shape[1]]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    drawn = prior.sample(params, text, jax.random.split(jax.random.key(0), len(text)), temperature=0.0)
    np.testing.assert_array_equal(drawn[:, : stored["drawn"].shape[1]], stored["drawn"])


def test_the_loss_of_version_2_is_that_of_the_original():
    """In version 3 the original counts the first image token as a text class."""
    prior, params, text, tokens = imported("v2")
    loss, _ = prior.loss(params, text, tokens, jax.random.key(0), train=False)
    np.testing.assert_allclose(loss, rudalle_originals.golden()["v2"]["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", rudalle.PUBLISHED)
def test_published_sizes(name):
    sizes, heads, version, _ = rudalle.PUBLISHED[name]
    prior = rudalle.prior_of(sizes, heads, version)
    leaves = jax.tree.leaves(jax.eval_shape(prior.init, jax.random.key(0)))
    count = sum(np.prod(leaf.shape, dtype=int) for leaf in leaves)
    theirs = sum(np.prod(shape, dtype=int) for shape in sizes.shapes().values())
    # Version 3 does not read the position of begin. Version 2 adds it to the id of begin.
    assert count == theirs - (0 if version == "v2" else sizes.width)
    of_vae = catalogue.IMPORTERS["vqgan-gumbel-f8"].parameters
    assert catalogue.IMPORTERS[name].parameters == theirs + of_vae


# -- files --------------------------------------------------------------------------------------------------------

VAE = VQGANOptions(
    image_size=24, vocab_size=9, code_dim=4, latent=4, hidden=32, multipliers=(1, 1), blocks=1, attention_levels=(),
    quantizer="gumbel",
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """The three files of the case "v2", transformer and image tokenizer in half precision."""
    arrays = {name: x.astype(np.float16) for name, x in rudalle_originals.random_arrays(CASES["v2"][0]).items()}
    vae = taming_originals.random_arrays({name: shape for name, (_, shape) in vqgan.layout(VAE).items()})
    np.savez(tmp_path / "model.npz", **arrays)
    np.savez(tmp_path / "vae.npz", **vae)
    (tmp_path / "bpe.model").write_text(vocabulary_of())
    return [tmp_path / "model.npz", tmp_path / "vae.npz"]


def settings_of(files):
    return {"heads": 3, "version": "v2", "vocabulary": files[0].with_name("bpe.model")}


def test_an_import_is_a_workdir_that_draws(tmp_path, files):
    run = str(tmp_path / "run")
    catalogue.import_files("rudalle", files, run, settings_of(files))
    model = TextToImage.load(run)
    assert model.prior == rudalle.prior_of(*CASES["v2"], "v2") and model.image_size == 24
    assert model.text_model.encode("Аб вг", max_length=9)[0] == [2, 11, 4, 12, 3]
    images = model.generate(["аб", "вг"], n=2, seed=1)
    assert images.shape == (2, 2, 24, 24, 3) and (images[0] != images[1]).any()
    # The kernels on disk are as small as in the file, and the numbers are the same.
    kernel = model.params["trunk"]["layer_0"]["mlp"]["up"]["kernel"]
    expected = np.load(files[0])["transformer.layers.0.mlp.dense_h_to_4h.weight"].T
    assert kernel.dtype == np.float16 and model.params["embedding"]["text"].dtype == np.float32
    np.testing.assert_array_equal(kernel, expected)
    with pytest.raises(ConfigError, match="--output"):
        catalogue.import_files("rudalle", files, run, settings_of(files))


def test_half_precision_on_disk_computes_as_float32(files):
    """Parameters in half precision are read as if they were converted to float32 first."""
    prior, params = rudalle.load(files[0], "rudalle", 3, "v2")
    full = jax.tree.map(functools.partial(np.asarray, dtype=np.float32), params)
    text, tokens = imported("v2")[2:]
    logits = [jax.jit(prior.model.apply)({"params": each}, text, tokens)[1] for each in (params, full)]
    np.testing.assert_array_equal(*logits)


@needs_package
@every_version
def test_a_checkpoint_of_the_authors(tmp_path, version):
    """`torch.save` of the half module, whose masks tell the version."""
    import torch

    sizes, heads = CASES[version]
    arrays = rudalle_originals.random_arrays(sizes)
    model = rudalle_originals.model_of(version, arrays).half()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    prior, params = rudalle.load(tmp_path / "pytorch_model.bin", "rudalle", heads, version)
    halves = {name: x.astype(np.float16) for name, x in arrays.items()}
    jax.tree.map(np.testing.assert_array_equal, params, rudalle.convert(halves, sizes, prior))
    other = {"v2": "v3", "v3": "v2"}[version]
    with pytest.raises(PretrainedError, match=version):
        rudalle.load(tmp_path / "pytorch_model.bin", "rudalle", heads, other)


def test_the_mask_of_version_2():
    sizes, _ = CASES["v2"]
    layout = TokenLayout(Text(9, sizes.text_length), 9, sizes.side, sizes.side)
    mask = Toroidal(11).mask(layout)
    assert rudalle.version_of({"transformer.conv_mask": mask.astype(np.float16)}, sizes) == "v2"
    assert rudalle.version_of({}, sizes) is None
    with pytest.raises(PretrainedError, match="conv_mask"):
        rudalle.version_of({"transformer.conv_mask": ~mask}, sizes)


@pytest.mark.parametrize(
    "change, token",
    [
        (lambda a: a.pop("to_logits.1.bias"), "missing.*to_logits.1.bias"),
        (lambda a: a.update({"extra.weight": np.zeros(3, np.float32)}), "extra.weight"),
        (lambda a: a.update({"transformer.layers.1.attention.dense.bias": np.zeros(5, np.float32)}), r"\[24\]"),
        (lambda a: a.update({"text_embeddings.weight": np.full((21, 24), np.nan, np.float32)}), "NaN"),
        (lambda a: a.update({"image_embeddings.weight": np.zeros((9, 24), np.int8)}), "int8"),
        (lambda a: [a.pop(name) for name in list(a) if "layers" in name], "ru-DALL-E"),
        (lambda a: a.update({f"x{name}": a.pop(name) for name in list(a)}), "ru-DALL-E"),
    ],
)
def test_wrong_weights(tmp_path, files, change, token):
    arrays = dict(np.load(files[0]))
    change(arrays)
    np.savez(files[0], **arrays)
    with pytest.raises(PretrainedError, match=rf"model\.npz.*{token}"):
        catalogue.import_files("rudalle", files, str(tmp_path / "run"), settings_of(files))
    assert not Path(tmp_path, "run").exists()


def test_files_that_do_not_belong_together(tmp_path, files):
    run, own = str(tmp_path / "run"), settings_of(files)
    own["vocabulary"].write_text(vocabulary_of(MERGES[:-1]))
    with pytest.raises(PretrainedError, match=r"bpe\.model has 15"):
        catalogue.import_files("rudalle", files, run, own)
    with pytest.raises(PretrainedError, match=r"missing\.model"):
        catalogue.import_files("rudalle", files, run, {**own, "vocabulary": "missing.model"})
    with pytest.raises(PretrainedError, match="heads=5"):
        catalogue.import_files("rudalle", files, run, {**own, "heads": 5})
    with pytest.raises(PretrainedError, match="text_embeddings.weight"):
        catalogue.import_files("rudalle", files[::-1], run, own)
    with pytest.raises(PretrainedError, match="dalle_jax.pretrained rudalle`"):
        catalogue.import_files("rudalle-malevich", files, run, own)
    assert not workdir.has_config(run)


def test_models_of_one_size_are_not_taken_for_each_other(monkeypatch, files):
    """Malevich, Emojich and Surrealist have the same names and shapes. Only the masks, if stored, tell versions."""
    sizes, heads = CASES["v2"]
    small = {name: (sizes, heads, "v2", "file") for name in ("rudalle-malevich", "rudalle-emojich")}
    monkeypatch.setattr(rudalle, "PUBLISHED", rudalle.PUBLISHED | small)
    monkeypatch.setitem(vqgan.PUBLISHED, "vqgan-gumbel-f8", dataclasses.replace(VAE, image_size=256))
    assert catalogue.importers_of(files[0]) == list(small)
    arrays = dict(state_dict.read(files[0]))
    arrays["text_embeddings.weight"] = arrays["text_embeddings.weight"] * np.nan
    np.savez(files[0], **arrays)
    with pytest.raises(UserError, match="^(?!.*holds the weights of).*NaN"):
        catalogue.import_files("rudalle-emojich", files, "run", settings_of(files))
