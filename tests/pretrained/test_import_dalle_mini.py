"""Imports of DALL-E mini: the outputs of min-dalle's code, files as they are published, and files that do not fit."""

import functools

import dalle_mini_originals
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import taming_originals
from dalle_mini_originals import CASES, GUIDANCE

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, DataError, PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions
from dalle_jax.pretrained import catalogue, dalle_mini, state_dict, vqgan
from dalle_jax.pretrained.dalle_mini_layout import SIDES, WITHOUT_GAIN, convert, prior_of
from dalle_jax.priors import encoder

needs_package = pytest.mark.skipif(not dalle_mini_originals.AVAILABLE, reason=dalle_mini_originals.REASON)
every_case = pytest.mark.parametrize("case", CASES)
IDS = {"begin_id": dalle_mini_originals.BEGIN, "end_id": dalle_mini_originals.END}


def arrays_of(case):
    sizes, gains, _ = CASES[case]
    return {side: dalle_mini_originals.random_arrays(sizes, side, gains) for side in SIDES}


def imported(case):
    """The prior and its parameters; captions, of which the first is the null text; image tokens of the captions."""
    sizes, _, start = CASES[case]
    prior = prior_of(sizes)
    params = convert(**arrays_of(case), sizes=sizes, prior=prior, start_id=start, **IDS)
    captions, tokens = dalle_mini_originals.inputs_of(sizes)
    condition = prior.layout.condition
    text = np.stack([condition.empty(), *(condition.pad(ids) for ids in captions)])
    return prior, params, text, tokens.astype(np.int32)


def apply(prior, method):
    return lambda params, *args: prior.model.apply({"params": params}, *args, method=method)


# -- the original -------------------------------------------------------------------------------------------------


@needs_package
@every_case
def test_the_golden_file_is_what_the_original_gives(case):
    expected = dalle_mini_originals.golden()[case]
    for name, found in dalle_mini_originals.outputs(case).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-5)


@every_case
def test_states_of_the_encoder_are_those_of_the_original(case):
    """At all positions that attention reads. Padding is hidden, except for that of the null text's begin and end."""
    prior, params, text, _ = imported(case)
    read = lambda m, rows: encoder.read(m.options, m.embedding, m.encoder, rows)[1]
    memory = jax.jit(apply(prior, read))(params, text)
    captions, _ = dalle_mini_originals.inputs_of(CASES[case][0])
    for row, length in enumerate([2, *map(len, captions)]):
        np.testing.assert_array_equal(memory.visible[row], np.arange(text.shape[1]) < length)
    states = dalle_mini_originals.golden()[case]["states"]
    for row, visible in enumerate(np.asarray(memory.visible)):
        expected = states[0, 0] if row == 0 else states[row - 1, 1]
        np.testing.assert_allclose(memory.states[row][visible], expected[visible], atol=1e-4)
    assert np.abs(memory.states).max() > 2


@every_case
def test_logits_of_all_positions_are_those_of_the_original(case):
    prior, params, text, tokens = imported(case)
    logits = dalle_mini_originals.golden()[case]["logits"][..., : prior.layout.image_vocab]
    compute = jax.jit(prior.model.apply)
    for rows, expected in ((text[1:], logits[:, 1]), (np.repeat(text[:1], len(tokens), axis=0), logits[:, 0])):
        words, found = compute({"params": params}, rows, tokens)
        assert words is None, "captions are not predicted"
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(logits).max() > 2 and np.abs(logits[:, 0] - logits[:, 1]).max() > 0.5


@every_case
def test_cached_decoding_is_that_of_the_original(case):
    """Logits at every position from the decode caches, and the tokens of greedy decoding with guidance."""
    prior, params, text, tokens = imported(case)
    stored, text = dalle_mini_originals.golden()[case], text[1:]
    logits, kv, caches = jax.jit(apply(prior, "start"), static_argnums=2)(params, text, len(tokens))

    @jax.jit
    def later(params, tokens, kv, caches):
        def step(caches, place):
            cells = (jnp.full(len(tokens), cell) for cell in (place, place + 1))
            logits, caches = apply(prior, "step")(params, tokens[:, place], place, *cells, kv, caches)
            return caches, logits

        return jax.lax.scan(step, caches, jnp.arange(prior.layout.image_length - 1))[1]

    found = np.concatenate([logits[None], later(params, tokens, kv, caches)]).swapaxes(0, 1)
    np.testing.assert_allclose(found, stored["logits"][:, 1, :, : prior.layout.image_vocab], atol=1e-4)
    keys = jax.random.split(jax.random.key(0), len(text))
    drawn = prior.sample(params, text, keys, temperature=0.0, guidance=GUIDANCE - 1)
    np.testing.assert_array_equal(drawn, stored["drawn"])
    alone = prior.sample(params, text, keys, temperature=0.0)
    assert (np.asarray(alone) != stored["drawn"]).any(), "guidance has an effect"


@pytest.mark.parametrize("name", dalle_mini.PUBLISHED)
def test_published_sizes(name):
    sizes, _ = dalle_mini.PUBLISHED[name]
    count = lambda shape: np.prod(shape, dtype=int)
    theirs = sum(
        count(shape) for side in SIDES for name, shape in sizes.shapes(side).items() if not WITHOUT_GAIN.fullmatch(name)
    )
    assert catalogue.IMPORTERS[name].parameters == theirs + catalogue.IMPORTERS["vqgan-f16-16384"].parameters
    prior = prior_of(sizes)
    assert prior.options.trunk.hidden == sizes.hidden and prior.options.trunk.size_per_head == 64
    assert prior.layout.image_vocab == 16_384 and prior.layout.image_length == 256
    params = jax.eval_shape(prior.init, jax.random.key(0))
    ours = sum(count(leaf.shape) for leaf in jax.tree.leaves(params))
    gains = sum(
        count(shape) for side in SIDES for name, shape in sizes.shapes(side).items() if WITHOUT_GAIN.fullmatch(name)
    )
    attentions, width = 3 * sizes.depth, sizes.width
    biases = attentions * width + 2 * sizes.depth * (2 * sizes.hidden + width)  # zeros
    rows = 2 * (sizes.image_rows - sizes.codes) * width  # of special ids: left out
    start_and_padding = (1 + sizes.text_length) * width
    assert ours == theirs + gains + biases - rows + start_and_padding


@pytest.mark.parametrize("hidden", [50, 55, 66, 110])
def test_the_hidden_width_is_exact(hidden):
    """Some ratios F / D times D are rounded below F."""
    sizes = CASES["published"][0].__class__(1, 48, 3, hidden, 9, 9, 9)
    assert prior_of(sizes).options.trunk.hidden == hidden


# -- files --------------------------------------------------------------------------------------------------------

VAE = VQGANOptions(
    image_size=256, vocab_size=13, code_dim=4, latent=4, hidden=32, multipliers=(1, 1), blocks=1, attention_levels=(1,)
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of the case "published", encoder and decoder in half precision, and a folder of the vocabulary."""
    monkeypatch.setitem(dalle_mini.PUBLISHED, "dalle-mini", (CASES["published"][0], "_mini"))
    monkeypatch.setitem(vqgan.PUBLISHED, "vqgan-f16-16384", VAE)
    for side, arrays in arrays_of("published").items():
        np.savez(tmp_path / f"{side}.npz", **{name: x.astype(np.float16) for name, x in arrays.items()})
    vae = taming_originals.random_arrays({name: shape for name, (_, shape) in vqgan.layout(VAE).items()})
    np.savez(tmp_path / "vae.npz", **vae)
    dalle_mini_originals.write_vocabulary(tmp_path, "_mini")
    return [tmp_path / f"{name}.npz" for name in (*SIDES, "vae")]


def settings_of(files, **changes):
    return {"vocabulary": str(files[0].parent), "start_id": 13, **changes}


def test_an_import_is_a_workdir_that_draws(files, tmp_path):
    run = str(tmp_path / "run")
    found = catalogue.import_files("dalle-mini", files, run, settings_of(files))
    assert "captions of 7 tokens" in found and "6 pixels" in found
    model = TextToImage.load(run)
    assert model.prior == prior_of(CASES["published"][0]) and model.image_size == 6
    images = model.generate(["A red cat", "10 cats"], n=2, seed=1, guidance=3.0, top_k=8)
    assert images.shape == (2, 2, 6, 6, 3) and (images[0] != images[1]).any()
    np.testing.assert_array_equal(images[0], model.generate("a RED cat\u00e9", n=2, seed=1, guidance=3.0, top_k=8)[0:2])
    # The kernels on disk are as small as in the file, and the numbers are the same.
    kernel = model.params["trunk"]["layer_0"]["mlp"]["gate"]["kernel"]
    expected = np.load(files[1])["layers.0.glu.fc1.weight"].T
    assert kernel.dtype == np.float16 and model.params["embedding"]["text"].dtype == np.float32
    np.testing.assert_array_equal(kernel, expected)
    with pytest.raises(ConfigError, match="--output"):
        catalogue.import_files("dalle-mini", files, run, settings_of(files))


def test_half_precision_on_disk_computes_as_float32():
    sizes, _, start = CASES["published"]
    halves = {
        side: {name: x.astype(np.float16) for name, x in arrays.items()}
        for side, arrays in arrays_of("published").items()
    }
    prior = prior_of(sizes)
    params = convert(**halves, sizes=sizes, prior=prior, start_id=start, **IDS)
    assert not any(halves.values()), "the arrays are taken out one by one"
    full = jax.tree.map(functools.partial(np.asarray, dtype=np.float32), params)
    text, tokens = imported("published")[2:]
    logits = [jax.jit(prior.model.apply)({"params": each}, text[1:], tokens)[1] for each in (params, full)]
    np.testing.assert_array_equal(*logits)


def test_the_start_of_the_image_is_a_setting(files, tmp_path):
    starts = []
    for start in (13, 12):
        run = tmp_path / f"run-{start}"
        catalogue.import_files("dalle-mini", files, str(run), settings_of(files, start_id=start))
        starts.append(np.asarray(TextToImage.load(run).params["embedding"]["start_of_image"]))
    table, positions = (
        np.load(files[1])[f"embed_{name}.weight"].astype(np.float32) for name in ("tokens", "positions")
    )
    np.testing.assert_array_equal(starts, [table[row][None] + positions[:1] for row in (13, 12)])
    for start in (14, -1):
        with pytest.raises(PretrainedError, match=f"start_id={start}"):
            catalogue.import_files("dalle-mini", files, str(tmp_path / "run"), settings_of(files, start_id=start))
    assert not (tmp_path / "run").exists()


@needs_package
def test_files_as_min_dalle_converts_them(files, tmp_path):
    """Layers are transposed views of one stacked storage of all layers, which `torch.save` writes as such."""
    import torch

    for side, arrays in arrays_of("gains").items():
        stored = {}
        for name, array in arrays.items():
            stacked = torch.tensor(np.stack([array.T, array.T])).half()
            stored[name] = stacked[1].mT if array.ndim == 2 else stacked[1]
        torch.save(stored, tmp_path / f"{side}.pt")
        read = state_dict.read(tmp_path / f"{side}.pt")
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array.astype(np.float16))


@pytest.mark.parametrize("names", [("vocab_mini.json", "merges_mini.txt"), ("vocab.json", "merges.txt")])
def test_vocabularies_of_a_folder_or_two_files(tmp_path, names):
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    dalle_mini_originals.write_vocabulary(folder, names[0].removeprefix("vocab").removesuffix(".json"))
    read = functools.partial(dalle_mini.read_vocabulary, "dalle-mini", text_ids=150)
    vocab, merges = (folder / name for name in names)
    for model in (read(folder, None), read(vocab, merges), read(str(vocab), str(merges))):
        assert model.vocab_size == 150 and model.encode("a cat", max_length=9)[0][0] == dalle_mini_originals.BEGIN
    with pytest.raises(DataError, match="--merges"):
        read(vocab, None)
    with pytest.raises(DataError, match="expected 0 to 99"):
        dalle_mini.read_vocabulary("dalle-mini", vocab, merges, text_ids=100)
    merges.unlink()
    with pytest.raises(DataError, match=r"vocab_mini\.json and merges_mini\.txt"):
        read(folder, None)


def test_the_published_names_of_a_model_come_first(tmp_path):
    """A folder with all files of min-dalle holds both vocabularies."""
    dalle_mini_originals.write_vocabulary(tmp_path)
    dalle_mini_originals.write_vocabulary(tmp_path, "_mini")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    encode = lambda name: dalle_mini.read_vocabulary(name, tmp_path, None, 150).encode("cat", max_length=9)[0]
    assert len(encode("dalle-mini")) == 3 and len(encode("dalle-mega")) == 6


# -- files that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "change", "token"),
    [
        ("encoder", lambda a: a.pop("layers.0.self_attn.q_proj.weight"), "missing.*q_proj"),
        ("encoder", lambda a: a.pop("layers.0.self_attn_layer_norm.weight"), "missing.*self_attn_layer_norm.weight"),
        ("decoder", lambda a: a.update({"extra.weight": np.zeros(3, np.float32)}), r"unexpected.*extra\.weight"),
        ("decoder", lambda a: a.update({"layers.0.glu.fc2.weight": np.zeros((5, 5))}), r"fc2.weight \[5, 5\]"),
        ("decoder", lambda a: a.update({"final_ln.bias": np.full(48, np.nan, np.float32)}), r"final_ln\.bias.*NaN"),
        ("encoder", lambda a: a.update({"embed_tokens.weight": np.zeros((150, 48), np.int8)}), "int8"),
        ("encoder", lambda a: a.update({f"x{name}": a.pop(name) for name in list(a)}), "another model"),
        ("decoder", lambda a: a.pop("lm_head.weight"), "the encoder; expected the decoder"),
    ],
)
def test_wrong_weights(files, tmp_path, side, change, token):
    path = tmp_path / f"{side}.npz"
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(PretrainedError, match=rf"{side}\.npz.*{token}"):
        catalogue.import_files("dalle-mini", files, str(tmp_path / "run"), settings_of(files))
    assert not (tmp_path / "run").exists()


def test_a_gain_that_some_layers_have_is_missing_in_others(monkeypatch):
    """No layer has the gains of the published files. A file in which only some layers have them is damaged."""
    sizes, _, start = CASES["gains"]
    name = "layers.1.glu.ln1.weight"
    arrays = arrays_of("gains")
    del arrays["decoder"][name]
    with pytest.raises(PretrainedError, match=f"missing.*{name}"):
        convert(**arrays, sizes=sizes, prior=prior_of(sizes), start_id=start, **IDS)


def test_files_that_do_not_belong_together(files, tmp_path):
    run, own = str(tmp_path / "run"), settings_of(files)
    with pytest.raises(PretrainedError, match=r"decoder\.npz.*the decoder; expected the encoder"):
        catalogue.import_files("dalle-mini", [files[1], files[0], files[2]], run, own)
    with pytest.raises(PretrainedError, match=r"encoder\.npz holds the weights of dalle-mini, not of dalle-mega"):
        catalogue.import_files("dalle-mega", files, run, own)
    with pytest.raises(PretrainedError, match=r"encoder\.npz"):
        catalogue.import_files("dalle-mini", [*files[:2], files[0]], run, own)
    with pytest.raises(DataError, match="nothing"):
        catalogue.import_files("dalle-mini", files, run, settings_of(files, vocabulary="nothing", merges="nothing"))
    assert not workdir.has_config(run)


def test_a_decoder_of_a_vqgan_alone_is_no_image_tokenizer(files, tmp_path):
    arrays = {name.replace("quantize.", ""): x for name, x in np.load(files[2]).items()}
    arrays = {name: x for name, x in arrays.items() if not name.startswith(("encoder.", "quant_conv."))}
    np.savez(tmp_path / "detoker.npz", **arrays)
    with pytest.raises(PretrainedError, match=r"detoker\.npz.*flax_model\.msgpack"):
        catalogue.import_files(
            "dalle-mini", [*files[:2], tmp_path / "detoker.npz"], str(tmp_path / "run"), settings_of(files)
        )
