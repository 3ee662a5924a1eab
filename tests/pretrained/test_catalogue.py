"""The command `python -m dalle_jax.pretrained`, and files that belong to another importer."""

import dataclasses
import itertools
import json

import dalle_mini_originals
import jax
import numpy as np
import pytest
import rudalle_originals
import taming_originals
import test_import_clip
import test_import_maskgit
import test_import_mindalle
import test_openai_dvae

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, PretrainedError
from dalle_jax.image_tokenizers.dvae import DVAETokenizer
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import __main__ as command
from dalle_jax.pretrained import (
    catalogue,
    dalle_mini,
    inception,
    llamagen,
    lpips,
    maskgit,
    mindalle,
    rudalle,
    state_dict,
    vqgan,
)
from dalle_jax.text_to_image.clip_scorer import ClipScorer

VQGANS = ("vqgan-f16-1024", "vqgan-f16-16384", "vqgan-gumbel-f8", "vqgan")
SIZES = {"image_size": 256, "blocks": 1, "hidden": 32, "multipliers": (1, 1), "latent": 4, "code_dim": 4}


def tiny_vqgan(**changes):
    return VQGANOptions(**{**SIZES, "attention_levels": (), "vocab_size": 10, **changes})


TINY = {
    "vqgan-f16-1024": tiny_vqgan(),
    "vqgan-f16-16384": tiny_vqgan(vocab_size=11),
    "vqgan-gumbel-f8": tiny_vqgan(quantizer="gumbel"),
}
LLAMAGEN = {
    "llamagen-vq-ds16": tiny_vqgan(normalized_codes=True),
    "llamagen-vq-ds8": tiny_vqgan(normalized_codes=True, vocab_size=11),
}
RUDALLE = {  # sizes, heads, version, file
    name: (rudalle.Sizes(2, 8, text_ids=9, text_length=3, image_vocab=4 + number, side=3), 2, "v3", "file")
    for number, name in enumerate(rudalle.PUBLISHED)
}
DALLE_MINI = {  # sizes and ending of the files
    name: (dalle_mini.Sizes(1, 8, 2, 8, text_ids=200 + number, image_rows=12, codes=11, text_length=4, side=2), "")
    for number, name in enumerate(dalle_mini.PUBLISHED)
}
MASKGIT = {"maskgit-imagenet256": (4, 2), "maskgit-imagenet512": (3, 2)}  # grid and decoding steps


def random_of(layout):
    return taming_originals.random_arrays({name: shape for name, (_, shape) in layout.items()})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes one file of each importer, two for the dVAE, and returns their paths. "Published" sizes are tiny here."""
    monkeypatch.setattr(vqgan, "PUBLISHED", TINY)
    monkeypatch.setattr(llamagen, "PUBLISHED", LLAMAGEN)
    monkeypatch.setattr(maskgit, "PUBLISHED", MASKGIT)
    monkeypatch.setattr(dalle_mini, "PUBLISHED", DALLE_MINI)
    monkeypatch.setattr(rudalle, "PUBLISHED", RUDALLE)
    transformer = state_dict.read(test_import_maskgit.TRANSFORMER)
    positions = "Embed_0/position_embeddings/embedding"
    encoder, decoder, _ = test_openai_dvae.random_arrays()
    stored = {
        name: random_of(vqgan.layout(options))
        for name, options in {**TINY, "vqgan": tiny_vqgan(attention_levels=(1,))}.items()
    } | {
        **{name: random_of(llamagen.layout(options)) for name, options in LLAMAGEN.items()},
        **{name: rudalle_originals.random_arrays(sizes) for name, (sizes, *_) in RUDALLE.items()},
        **{name: dalle_mini_originals.random_arrays(sizes, "encoder") for name, (sizes, _) in DALLE_MINI.items()},
        "rudalle": rudalle_originals.random_arrays(rudalle_originals.CASES["v3"][0]),
        "maskgit-imagenet256": transformer,
        "maskgit-imagenet512": transformer | {positions: transformer[positions][:10]},
        "mindalle": state_dict.read(test_import_mindalle.STAGE2),
        "openai-dvae": encoder,
        "decoder": decoder,
        "clip": test_import_clip.random_arrays(),
        "inception": {"Mixed_5b.branch1x1.conv.weight": np.zeros((64, 192, 1, 1), np.float32)},
        "lpips": {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)},
    }
    for name, arrays in stored.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    return {name: tmp_path / f"{name}.npz" for name in stored}


@pytest.fixture
def vocabulary(tmp_path):
    pytest.importorskip("tokenizers", reason="the vocabulary of published weights needs tokenizers")
    return test_import_clip.small_vocabulary(tmp_path / "tokenizer.json")


CLIP_SETTINGS = {"activation": "quick_gelu", "image_head_dim": 16, "text_head_dim": 16}


def settings_of(name, vocabulary):
    known = {"clip": {**CLIP_SETTINGS, "vocabulary": vocabulary}, "mindalle": {"vocabulary": vocabulary}}
    known |= {name: {"vocabulary": vocabulary} for name in (*RUDALLE, *DALLE_MINI)}
    known |= {"rudalle": {"vocabulary": vocabulary, "heads": 2}}
    return known.get(name, {})


def test_each_importer_rejects_the_files_of_all_others_by_name(tmp_path, files, vocabulary):
    for name, other in itertools.permutations(catalogue.IMPORTERS, 2):
        if (name in ("mindalle", *DALLE_MINI) and other == "vqgan-f16-16384") or (
            name in RUDALLE and other == "vqgan-gumbel-f8"
        ):
            continue  # their own image tokenizers have this layout
        given = [files[other]] * len(catalogue.IMPORTERS[name].files)
        with pytest.raises(PretrainedError, match=rf"{other}\.npz holds the weights of {other}, not of {name}"):
            catalogue.import_files(name, given, str(tmp_path / "run"), settings_of(name, vocabulary))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", VQGANS)
def test_an_imported_vqgan_is_a_tokenizer(tmp_path, files, name):
    run = str(tmp_path / "run")
    assert "64" in catalogue.import_files(name, [files[name]], run, {"image_size": 64})
    tokenizer, params = workdir.load_tokenizer(run)
    expected = TINY.get(name, tiny_vqgan(attention_levels=(1,)))
    assert tokenizer == VQGANTokenizer(dataclasses.replace(expected, image_size=64))
    assert jax.eval_shape(tokenizer.encode, params, np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 32, 32)


@pytest.mark.parametrize("order", [1, -1])
def test_the_two_files_of_the_dvae_in_any_order(tmp_path, files, order):
    given = [files["openai-dvae"], files["decoder"]][::order]
    catalogue.import_files("openai-dvae", given, str(tmp_path / "run"), {"image_size": 32})
    tokenizer, _ = workdir.load_tokenizer(str(tmp_path / "run"))
    assert tokenizer == DVAETokenizer(test_openai_dvae.random_arrays()[2])


def test_an_imported_clip_is_a_scorer(tmp_path, files, vocabulary):
    catalogue.import_files("clip", [files["clip"]], str(tmp_path / "run"), settings_of("clip", vocabulary))
    assert ClipScorer.load(tmp_path / "run").clip.options == test_import_clip.SMALL


def test_an_imported_inception_is_read_by_evaluations(tmp_path, monkeypatch):
    params = {"fc": {"kernel": np.ones((2, 3), np.float32)}}
    monkeypatch.setattr(inception, "convert", lambda arrays: params)
    np.savez(tmp_path / "inception.npz", fc=np.zeros(2))
    catalogue.import_files("inception", [tmp_path / "inception.npz"], str(tmp_path / "run"), {})
    jax.tree.map(np.testing.assert_array_equal, inception.load(tmp_path / "run"), params)
    options = tmp_path / "run" / "options.json"
    options.write_text(json.dumps({"kind": "dvae"}))
    with pytest.raises(PretrainedError, match="dvae"):
        inception.load(tmp_path / "run")


# -- the command --------------------------------------------------------------------------------------------------


def test_the_list_names_all_that_is_needed(capsys):
    assert command.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for one in catalogue.IMPORTERS.values():
        section = shown.partition(f"{one.name}\n")[2].partition("\n\n")[0]
        for needed in (one.licence, one.source, one.use, *one.files):
            assert needed in section, f"{one.name}: {needed}"
        assert f"{one.parameters:,}" in section if one.parameters else "any" in section


def test_the_sizes_in_the_list_are_those_of_the_models():
    count = lambda options: sum(np.prod(shape, dtype=int) for _, shape in vqgan.layout(options).values())
    sizes = {name: count(options) for name, options in vqgan.PUBLISHED.items()}
    sizes |= {name: count(options) for name, options in llamagen.PUBLISHED.items()}
    # tests/pretrained/test_import_*.py count these.
    for one in (*maskgit.IMPORTERS, *dalle_mini.IMPORTERS, mindalle.IMPORTER, *rudalle.IMPORTERS[:-1]):
        sizes[one.name] = one.parameters
    sizes["openai-dvae"] = 53_786_240 + 43_829_766  # tests/image_tokenizers/test_dvae.py
    sizes["inception"] = sum(np.prod(shape, dtype=int) + shape[-1] for shape in inception._kernels().values())
    sizes["lpips"] = sum(np.prod(shape, dtype=int) for _, shape in lpips._layout().values())
    assert sizes == {name: one.parameters for name, one in catalogue.IMPORTERS.items() if one.parameters}


def test_the_command_imports(tmp_path, files, capsys):
    run = tmp_path / "run"
    assert command.main(["vqgan-f16-1024", f"--weights={files['vqgan-f16-1024']}", f"--output={run}"]) == 0
    assert f"--config.tokenizer_from={run}" in capsys.readouterr().out
    assert workdir.load_tokenizer(str(run))[0].options == TINY["vqgan-f16-1024"]


@pytest.mark.parametrize(
    ("arguments", "status", "token"),
    [
        (["vqgan-f16-1042"], 2, "vqgan-f16-1024"),
        (["vqgan", "--weights={vqgan}", "--weights={vqgan}", "--output={run}"], 2, "2 files"),
        (["maskgit-imagenet256", "--weights={vqgan}", "--output={run}"], 2, "tokenizer_imagenet256_checkpoint"),
        (["openai-dvae", "--weights={decoder}", "--output={run}"], 2, "encoder.pkl"),
        (["vqgan", "--weights={clip}", "--output={run}"], 1, "dalle_jax.pretrained clip"),
        (["vqgan", "--weights=nothing.ckpt", "--output={run}"], 1, "nothing.ckpt"),
        (["vqgan", "--weights={vqgan}", "--output={run}", "--image_size=33"], 2, "33"),
    ],
)
def test_wrong_commands(tmp_path, files, capsys, arguments, status, token):
    given = [argument.format(run=tmp_path / "run", **files) for argument in arguments]
    assert command.main(given) == status
    shown = capsys.readouterr().err
    assert token in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (["clip", "--weights=a", "--output=b"], "--vocabulary"),
        (["mindalle", "--weights=a", "--weights=b", "--output=c"], "--vocabulary"),
        (["dalle-mini", "--weights=a", "--output=c", "--vocabulary=d", "--start_id=x"], "--start_id"),
        (["maskgit-imagenet256", "--weights=a", "--weights=b", "--output=c", "--dtype=float16"], "--dtype"),
        (["vqgan", "--weights=a", "--output=b", "--image=64"], "--image=64"),
        (["vqgan", "--output=b"], "--weights"),
    ],
)
def test_missing_and_unknown_flags(arguments, token, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and token in capsys.readouterr().err.splitlines()[-1]


def test_the_workdir_of_a_training_is_not_overwritten(tmp_path, files):
    training = {"task": "dvae", "data": {"image_size": 32}, "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(training))
    with pytest.raises(ConfigError, match="--output"):
        catalogue.import_files("vqgan", [files["vqgan"]], str(tmp_path), {})
