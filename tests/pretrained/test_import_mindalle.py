"""The import of minDALL-E: golden logits, cached decoding, drawing from captions, and files that do not fit.

tests/golden/published holds random weights in the published layout, and what the authors' code computes from them.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import taming_originals

from dalle_jax import TextToImage
from dalle_jax.errors import DataError, PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions
from dalle_jax.pretrained import catalogue, mindalle, state_dict, vqgan

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
STAGE2 = GOLDEN / "mindalle_stage2.npz"
HEAD_SIZE = 6
TINY = VQGANOptions(
    image_size=256, vocab_size=11, code_dim=4, latent=4, hidden=32, multipliers=(1, 1), blocks=1, attention_levels=(1,)
)


def golden():
    """Returns the prior, its parameters, and the golden file with the text in our ids."""
    arrays = mindalle.stage(state_dict.read(STAGE2), 2)
    prior = mindalle.prior_of(arrays, HEAD_SIZE)
    stored = dict(np.load(GOLDEN / "mindalle.npz"))
    stored["text"] = np.where(stored["text"] == 19, prior.layout.condition.empty()[None], stored["text"]).astype(
        np.int32
    )
    return prior, mindalle.convert(arrays, prior), stored


def apply(prior, method):
    return lambda params, *args: prior.model.apply({"params": params}, *args, method=method)


# -- the transformer ----------------------------------------------------------------------------------------------


def test_golden_logits():
    prior, params, stored = golden()
    embed, logits = apply(prior, "embed"), apply(prior, "logits")
    compute = jax.jit(lambda params, text, tokens: logits(params, embed(params, text, tokens)))
    text, image = compute(params, stored["text"], stored["tokens"])
    np.testing.assert_allclose(text, stored["text_logits"], atol=1e-4)
    np.testing.assert_allclose(image, stored["image_logits"], atol=1e-4)
    assert (stored["text"] > prior.layout.condition.vocab).any() and np.std(stored["image_logits"]) > 0.1


def test_greedy_drawing_follows_the_golden_logits():
    """A drawing at temperature 0 whose first tokens are given continues by the most likely token at each position."""
    prior, params, stored = golden()
    embed, logits = apply(prior, "embed"), apply(prior, "logits")
    compute = jax.jit(lambda params, text, tokens: logits(params, embed(params, text, tokens))[1])
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = np.asarray(prior.sample(params, jnp.asarray(stored["text"]), keys, temperature=0.0))
    np.testing.assert_array_equal(drawn, compute(params, stored["text"], drawn).argmax(-1))
    np.testing.assert_array_equal(drawn[:, 0], stored["image_logits"][:, 0].argmax(-1))


def test_sizes_at_the_published_size():
    sizes = {"D": 1536, "F": 6144, "T": 64, "N": 256, "W": 16384, "V": 16384}
    count = lambda letters: np.prod([sizes[letter] for letter in letters], dtype=int)
    layers = 42 * sum(map(count, mindalle._SHAPES_OF_LAYER.values()))
    image = sum(np.prod(shape, dtype=int) for _, shape in vqgan.layout(vqgan.PUBLISHED["vqgan-f16-16384"]).values())
    assert mindalle.IMPORTER.parameters == sum(map(count, mindalle._SHAPES.values())) + layers + image


# -- the workdir --------------------------------------------------------------------------------------------------


@pytest.fixture
def vocabulary(tmp_path):
    """A folder like the published one, with 19 ids and the padding."""
    tokenizers = pytest.importorskip("tokenizers", reason="the text model of minDALL-E needs tokenizers")
    made = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    made.train_from_iterator(
        ["a cat", "the cat"] * 9, vocab_size=19, special_tokens=["[UNK]"], limit_alphabet=9, show_progress=False
    )
    made.add_tokens([f"word{i}" for i in range(19 - made.get_vocab_size())])
    (tmp_path / "tokenizer").mkdir()
    made.save_model(str(tmp_path / "tokenizer"), "bpe-16k")
    path = tmp_path / "tokenizer.json"
    made.add_special_tokens(["[PAD]"])
    made.save(str(path))
    return path


def stage1(prefix=""):
    shapes = {name: shape for name, (_, shape) in vqgan.layout(TINY).items()}
    return {prefix + name: array for name, array in taming_originals.random_arrays(shapes).items()}


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "stage1.npz", **stage1())
    return [STAGE2, tmp_path / "stage1.npz"]


def settings(vocabulary, **changes):
    return {"vocabulary": str(vocabulary), "head_size": HEAD_SIZE, **changes}


def test_an_imported_model_draws_captions(tmp_path, files, vocabulary):
    run = str(tmp_path / "run")
    catalogue.import_files("mindalle", files, run, settings(vocabulary))
    model = TextToImage.load(run)
    images = model.generate(["A cat", "the cat"], n=2, seed=1, top_k=5)
    assert images.shape == (2, 2, 8, 8, 3) and np.std(images) > 5
    np.testing.assert_array_equal(images[0], model.generate("a  CAT", n=2, seed=1, top_k=5))
    _, params, _ = golden()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), params)


@pytest.mark.parametrize("container", ["npz", "ckpt"])
def test_both_stages_in_one_file_and_in_half_precision(tmp_path, vocabulary, container):
    both = {**state_dict.read(STAGE2), **stage1("stage1.")}
    halves = {name: array.astype(np.float16) for name, array in both.items()}
    path = tmp_path / f"both.{container}"
    if container == "npz":
        np.savez(path, **halves)
    else:
        torch = pytest.importorskip("torch", reason="torch writes the file of this test")
        torch.save({"state_dict": {name: torch.tensor(array) for name, array in halves.items()}}, path)
    run = str(tmp_path / "run")
    catalogue.import_files("mindalle", [path, path], run, settings(vocabulary, dtype="bfloat16"))
    options = TextToImage.load(run).prior.options
    assert options.trunk.dtype == "bfloat16" and options.trunk.heads == 4


# -- files that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("stage2.blocks.1.attn.proj.bias", None, ["missing", "blocks.1.attn.proj.bias"]),
        ("stage2.head_txt.weight", (19, 24), ["another shape", r"head_txt.weight \[19, 24\]"]),
        ("stage2.head_txt.bias", (20,), ["unexpected", "head_txt.bias"]),
        ("stage2.tok_emb_img.weight", None, ["tok_emb_img.weight"]),
        ("stage2.pos_emb_img.weight", (15, 24), ["15 image tokens"]),
        ("stage2.pos_emb_img.weight", (), ["pos_emb_img.weight"]),
        ("stage2.blocks.1.mlp.0.weight", (2, 2), [r"blocks.1.mlp.0.weight \[2, 2\]"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, files, name, shape, tokens):
    arrays = dict(state_dict.read(STAGE2))
    arrays.pop(name, None)
    arrays |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    np.savez(tmp_path / "partial.npz", **arrays)
    with pytest.raises(PretrainedError, match="partial.*" + ".*".join(tokens)):
        catalogue.import_files(
            "mindalle", [tmp_path / "partial.npz", files[1]], str(tmp_path / "run"), settings("none")
        )
    assert not (tmp_path / "run").exists()


def test_damaged_numbers_are_named(tmp_path, files, vocabulary):
    arrays = dict(state_dict.read(STAGE2))
    arrays["stage2.ln_f.bias"] = np.full_like(arrays["stage2.ln_f.bias"], np.nan)
    np.savez(tmp_path / "nan.npz", **arrays)
    with pytest.raises(PretrainedError, match=r"nan\.npz.*ln_f\.bias"):
        catalogue.import_files(
            "mindalle", [tmp_path / "nan.npz", files[1]], str(tmp_path / "run"), settings(vocabulary)
        )


def test_an_image_tokenizer_with_other_codes(tmp_path, files):
    shapes = {name: shape for name, (_, shape) in vqgan.layout(dataclasses.replace(TINY, vocab_size=12)).items()}
    np.savez(tmp_path / "other.npz", **taming_originals.random_arrays(shapes))
    with pytest.raises(PretrainedError, match=r"other\.npz.*12"):
        catalogue.import_files("mindalle", [STAGE2, tmp_path / "other.npz"], str(tmp_path / "run"), settings("none"))


def test_a_vocabulary_of_another_size(tmp_path, files, vocabulary):
    smaller = vocabulary.parent / "tokenizer"  # without the added words
    with pytest.raises(DataError, match="--vocabulary"):
        catalogue.import_files("mindalle", files, str(tmp_path / "run"), settings(smaller))
    with pytest.raises(DataError, match="nothing"):
        catalogue.import_files("mindalle", files, str(tmp_path / "run"), settings(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()
