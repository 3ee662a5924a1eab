"""Exported folders: the same images to the last bit, and nothing half, damaged or hostile is read."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_run
import yaml

from dalle_jax import ClipScorer, TextToImage
from dalle_jax.checkpoints import exported
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.exported import Exported
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.errors import CheckpointError, ConfigError, DamagedError, UserError
from dalle_jax.export.__main__ import main
from dalle_jax.export.write import without_paths
from dalle_jax.storage import json_files, tensor_file

CAPTION = "a red circle"


def load(folder):
    return TextToImage.load(folder, rows_at_once=2, mesh=make_mesh(data=1))


def images(folder):
    return load(folder).generate(CAPTION, n=2, seed=3)


def export(run, output, *flags):
    assert main([f"--workdir={run}", f"--output={output}", *flags]) == 0
    return pathlib.Path(output)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run.prior(tmp_path_factory.mktemp("runs") / "prior")


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exports") / "shapes", "--license=apache-2.0")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the exported folder that a test may damage."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


# -- round trips --------------------------------------------------------------------------------------------------


def test_an_export_draws_the_images_of_its_run(run, folder):
    drawn = images(run)
    np.testing.assert_array_equal(images(str(folder)), drawn)
    assert drawn.std() > 10, "flat images would hide differences"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "config.json", "export.json", "model.safetensors", "image_tokenizer/options.json",
        "image_tokenizer/model.safetensors", "text/sentencepiece.model", "text/sentencepiece.model.sha256",
    }  # fmt: skip
    assert load(str(folder)).fingerprint() == load(run).fingerprint()


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16_is_the_bfloat16_that_the_run_loads_as(tmp_path, scan):
    run = untrained_run.prior(tmp_path / "run", "maskgit.py:shapes", dtype="bfloat16", scan=scan, depth=4)
    folder = export(run, tmp_path / "export", "--dtype=bfloat16")
    stored = tensor_file.decode((folder / "model.safetensors").read_bytes())
    kinds = {str(x.dtype): name for name, x in stored.items()}
    assert set(kinds) == {"bfloat16", "float32"} and kinds["bfloat16"].endswith("kernel")
    np.testing.assert_array_equal(images(str(folder)), images(run))


def test_a_prior_with_an_encoder(tmp_path):
    """Kernels of both trunks are bfloat16, and the images are those of the run."""
    model = {"encoder_depth": 2, "encoder_padding": 1, "attention": "full"}
    trunk = {"dtype": "bfloat16", "scan": True, "norm_placement": "normformer", "embedding_norm": True}
    run = untrained_run.prior(tmp_path / "run", model=model, **trunk)
    folder = export(run, tmp_path / "export", "--dtype=bfloat16")
    stored = tensor_file.decode((folder / "model.safetensors").read_bytes())
    kernels = {name: x.dtype for name, x in stored.items() if name.startswith("encoder/") and name.endswith("/kernel")}
    assert kernels and set(map(str, kernels.values())) == {"bfloat16"}
    found = load(str(folder))
    assert found.prior.options.encoder_depth == 2 and found.prior == load(run).prior
    drawn = images(str(folder))
    np.testing.assert_array_equal(drawn, images(run))
    assert (drawn != found.generate("a green star", n=2, seed=3)).any(), "the caption has an effect"


def test_a_float32_model_in_bfloat16_has_the_rounded_parameters(run, tmp_path):
    folder = export(run, tmp_path / "export", "--dtype=bfloat16")
    rounded, whole = load(str(folder)).params, load(run).params
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), exported.rounded(whole, "bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, rounded, expected)
    assert (folder / "model.safetensors").stat().st_size < 0.9 * sum(x.nbytes for x in jax.tree.leaves(whole))


def test_a_compact_export_rounds_everything_with_two_axes(run, tmp_path):
    folder = export(run, tmp_path / "export", "--dtype=bfloat16", "--compact")
    for name in ("model.safetensors", "image_tokenizer/model.safetensors"):
        stored = tensor_file.decode((folder / name).read_bytes())
        assert {str(x.dtype) for x in stored.values() if x.ndim > 1} == {"bfloat16"}, name
    found, whole = load(str(folder)), load(run)
    for read, given in ((found.params, whole.params), (found.tokenizer_params, whole.tokenizer_params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(b.dtype), b, rtol=2**-8, atol=1e-30), read, given)
    assert {str(x.dtype) for x in jax.tree.leaves(found.tokenizer_params)} == {"float32"}
    embedding = Exported(folder).restore_params()["embedding"]  # before the model is prepared for drawing
    assert {str(x.dtype) for x in jax.tree.leaves(embedding)} == {"float32"}
    assert found.generate(CAPTION, n=2, seed=3).shape == whole.generate(CAPTION, n=2, seed=3).shape


@pytest.mark.parametrize("flags", [["--compact"], ["--compact", "--dtype=bfloat16", "--adapters"]])
def test_compact_needs_a_prior_in_bfloat16(run, tmp_path, capsys, flags):
    assert main([f"--workdir={run}", f"--output={tmp_path / 'x'}", *flags]) == 2
    assert "--compact" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_export_of_an_export(run, folder, tmp_path):
    again = export(folder, tmp_path / "again", "--license=apache-2.0")
    for name in Exported(folder).files:
        if name != "config.json":
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_large_parameters_are_several_files(tmp_path):
    params = {"a": {"kernel": np.arange(600.0, dtype=np.float32)}, "b": np.ones((3, 5)), "c": np.float32(7)}
    exported.begin(tmp_path / "x")
    exported.write_params(tmp_path / "x", params, shard_bytes=2000)
    exported.finish(tmp_path / "x", {"kind": "prior", "dtype": "float32", "step": 1, "frozen": None, "base": None})
    found = Exported(tmp_path / "x")
    assert sorted(found.files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, found.restore_params(), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_tokenizer(tmp_path, dtype):
    run = untrained_run.image_tokenizer(tmp_path / "run")
    folder = export(run, tmp_path / "export", f"--dtype={dtype}")
    (first, params), (second, read) = workdirs.load_tokenizer(run), workdirs.load_tokenizer(str(folder))
    assert first == second
    expected = jax.tree.map(lambda x: x.astype(np.float32), exported.rounded(params, dtype))
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    assert workdirs.latest_step(str(folder)) == untrained_run.STEP
    restored = Exported(folder).restore_params()
    assert jax.tree.structure(restored) == jax.tree.structure(params)


def test_an_imported_tokenizer_without_configuration(run, tmp_path):
    workdirs.save_tokenizer(tmp_path / "imported", *workdirs.load_tokenizer(run))
    folder = export(tmp_path / "imported", tmp_path / "export")
    assert Exported(folder).step is None and not (folder / "config.json").exists()
    jax.tree.map(np.testing.assert_array_equal, *(workdirs.load_tokenizer(x)[1] for x in (run, str(folder))))


def test_a_clip_alone_and_with_a_prior(run, tmp_path):
    scorer = untrained_run.clip()
    scorer.save(tmp_path / "clip")
    folder = export(tmp_path / "clip", tmp_path / "export")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    expected = ClipScorer.load(tmp_path / "clip").score(pixels, CAPTION)
    np.testing.assert_array_equal(ClipScorer.load(folder).score(pixels, CAPTION), expected)
    both = export(run, tmp_path / "both", f"--clip={folder}")
    # Another number of devices, so that sums differ in their last bit.
    np.testing.assert_allclose(load(str(both)).scorer.score(pixels, CAPTION), expected, atol=1e-6)


# -- the model card -----------------------------------------------------------------------------------------------


def test_the_model_card(folder):
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "text-to-image"
    for said in (
        "shapes_captions",
        "1.25 nats per image token",
        "'validation'",
        f"| updates | {untrained_run.STEP}",
    ):
        assert said in body, said
    assert "a red circle above a blue square" in body and 'TextToImage.load("shapes")' in body


def test_the_card_of_an_evaluated_model_names_the_protocol(run, tmp_path):
    report = {"maskgit": {"fid_clip": 0.5}, "protocol": {"captions": "256, first", "seed": 0, "weights": {}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    folder = export(run, tmp_path / "export", f"--report={tmp_path}", "--caption=it's red")
    text = (folder / "README.md").read_text()
    assert "| fid_clip | 0.5 |" in text and "256, first" in text and "Not stated" in text
    assert """--config.prompts='it'"'"'s red'""" in text


def test_a_published_configuration_names_no_folder_of_this_machine():
    config = {"workdir": "/home/a/runs/x", "data": {"path": "/home/a/photos/", "source": "folder"}, "start_from": "a/b"}
    cached = "/home/a/.cache/hub/models--owner--name/snapshots/c0ffee"
    assert without_paths({"start_from": cached}) == {"start_from": "hf://owner/name@c0ffee"}
    found = without_paths({**config, "text": {"path": "/home/a/text", "length": 3}, "base": "hf://a/b"})
    assert "home" not in json.dumps(found) and found["data"] == {"path": "photos", "source": "folder"}
    assert found["text"]["length"] == 3 and found["base"] == "hf://a/b" and found["start_from"] is None


# -- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "text/sentencepiece.model", "image_tokenizer/model.safetensors"]
)
@pytest.mark.parametrize("harm", ["missing", "half", "flipped", "folder"])
def test_damage_is_named(copy, name, harm):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if harm == "half":
        (copy / name).write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        (copy / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "folder":
        (copy / name).mkdir()
    with pytest.raises(UserError, match=name.rpartition("/")[2].replace(".", r"\.")):
        load(str(copy))


def test_export_json_is_all_or_nothing(copy, capsys):
    content = (copy / "export.json").read_bytes()
    for harmed in (
        content[:-20],
        b"",
        b"[]",
        content.replace(b"float32", b"float16"),
        content.replace(b'"prior"', b"7"),
    ):
        (copy / "export.json").write_bytes(harmed)
        with pytest.raises(DamagedError, match=r"export\.json"):
            load(str(copy))
    (copy / "export.json").unlink()
    with pytest.raises(CheckpointError):
        load(str(copy))


def rewritten(copy, **changes):
    """Changes fields of export.json as a stranger could, with a checksum that fits."""
    content = json_files.parse((copy / "export.json").read_bytes())
    content.pop("checksum")
    content.update(changes)
    (copy / "export.json").write_text(json.dumps({**content, "checksum": exported._sum(content)}))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b/c", "..", "text/../../x", "a\\b", ".hidden", ""]
)
def test_a_hostile_name_of_a_file(copy, name):
    rewritten(copy, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(DamagedError, match=r"export\.json"):
        Exported(copy)


@pytest.mark.parametrize(
    "changes",
    [{"kind": "pickle"}, {"step": True}, {"files": {"config.json": {"bytes": 10**12, "sha256": ""}}}, {"format": 2},
     {"files": {"config.json": 7}}, {"base": "x"}],
)  # fmt: skip
def test_hostile_fields(copy, changes):
    rewritten(copy, **changes)
    with pytest.raises(CheckpointError, match=r"export\.json"):
        Exported(copy)


def with_file(copy, name, content):
    """Replaces a file as a stranger could, so that sizes and checksums fit."""
    (copy / name).write_bytes(content)
    exported.finish(copy, {key: value for key, value in vars_of(copy).items()})


def vars_of(copy):
    content = json_files.parse((copy / "export.json").read_bytes())
    return {key: content[key] for key in ("kind", "dtype", "step", "frozen", "base")}


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", b"\xff" * 64, tensor_file.encode({"trunk": np.ones(3)}),
     tensor_file.encode({"a/" * 9999: np.ones(3)}), tensor_file.encode({"a": np.ones(3), "a/b": np.ones(3)})],
)  # fmt: skip
def test_hostile_parameters(copy, content):
    with_file(copy, "model.safetensors", content)
    with pytest.raises(CheckpointError):
        load(str(copy))


@pytest.mark.parametrize(
    "change",
    [{"data": {"image_size": 10**9}}, {"data": {"image_size": "16"}}, {"model": {}}, {"model": 3}, {"prior": "pickle"},
     {"text": {"length": -1}}, {"text": {"length": 10**12}}, {"model": {"trunk": {"width": 2**40}}}, {"task": "clip"}],
)  # fmt: skip
def test_a_hostile_configuration(copy, change):
    config = json.loads((copy / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and value else value
    with_file(copy, "config.json", json.dumps(config).encode())
    with pytest.raises(UserError):
        load(str(copy))


def test_another_tokenizer_is_noticed(copy, run, tmp_path):
    tokenizer, params = workdirs.load_tokenizer(run)
    other = tmp_path / "other"
    workdirs.save_tokenizer(other, tokenizer, jax.tree.map(lambda x: -x, params))
    for name in ("options.json", "params.msgpack"):
        (copy / "image_tokenizer" / name).write_bytes((other / "image_tokenizer" / name).read_bytes())
    with pytest.raises(CheckpointError, match="image_tokenizer"):
        load(str(copy))


# -- the command --------------------------------------------------------------------------------------------------


def test_the_output_must_be_free(run, folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([f"--workdir={run}", f"--output={tmp_path}"]) == 2
    assert main([f"--workdir={run}", f"--output={run}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert capsys.readouterr().err.count("--output") == 2


def test_an_interrupted_export_is_not_read_and_is_replaced(run, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exported, "finish", broken)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "export")
    assert not exported.exists(tmp_path / "export")
    monkeypatch.undo()
    export(run, tmp_path / "export")
    export(run, tmp_path / "export", "--dtype=bfloat16")
    assert Exported(tmp_path / "export").dtype == "bfloat16"
    assert not list((tmp_path / "export").glob("*unfinished*"))


def test_wrong_arguments(run, tmp_path, capsys):
    assert main([f"--workdir={run}", f"--output={tmp_path}/x", "--license=My Licence!"]) == 2
    assert main([f"--workdir={run}", f"--output={tmp_path}/x", "--step=99"]) == 1
    assert main([f"--workdir={tmp_path}/nothing", f"--output={tmp_path}/x"]) == 1
    assert main([f"--workdir={run}", f"--output={tmp_path}/x", "--push=name"]) == 2
    said = capsys.readouterr().err
    assert "--license" in said and "99" in said and "nothing" in said and "--push" in said
    with pytest.raises(ConfigError):
        TextToImage.load(run, step="last")


def test_a_training_does_not_write_into_an_export(folder):
    from dalle_jax.jobs import earlier

    config = untrained_run.config_of("prior.py:shapes")
    with pytest.raises(ConfigError, match="start_from"):
        earlier.check_resumes(config, str(folder))
