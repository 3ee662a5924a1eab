"""Fine-tuning on own images: from a run and from an export, of all parameters and of adapters."""

import json
import pathlib

import jax
import numpy as np
import pytest
import untrained_run
from ml_collections import ConfigDict

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.exported import Exported
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration import config_files
from dalle_jax.data.text import TextModel
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.errors import CheckpointError, ConfigError, ConfigMismatch
from dalle_jax.export.__main__ import main
from dalle_jax.jobs import preparation, train
from dalle_jax.priors import trained
from dalle_jax.pytree import by_path
from dalle_jax.tasks import prior
from dalle_jax.training.step import frozen_shardings

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "finetune.py"
SHORT = {
    "batch_size": 4, "eval_batches": 1, "mesh.data": 1, "cadence.log": 1, "cadence.eval": 2, "cadence.preview": 0,
    "cadence.checkpoint": 2, "lora.rank": 2,
}  # fmt: skip


def configured(variant, images, start_from, **changes):
    config = config_files.load(f"{CONFIG}:{variant}")
    values = {**SHORT, "data.path": images, "start_from": str(start_from), "steps": 2}
    if variant == "all":
        values["lora.rank"] = 0
    config.update_from_flattened_dict(values | {key.replace("__", "."): value for key, value in changes.items()})
    return config


def parameters(workdir):
    with open_run(workdir) as run:
        return jax.device_get(trained.restore(run, workdir))


def images_of(workdir, **how):
    model = TextToImage.load(str(workdir), rows_at_once=2, mesh=make_mesh(data=1), **how)
    return model.generate("a green star", n=2)


def export(run, output, *flags):
    assert main([f"--workdir={run}", f"--output={output}", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A MaskGIT prior, and its export."""
    place = tmp_path_factory.mktemp("base")
    run = untrained_run.prior(place / "run", "maskgit.py:shapes")
    return run, export(run, place / "export")


@pytest.fixture(scope="module")
def tuned(base, folder, tmp_path_factory):
    """The workdir of adapters that were trained from the export for two updates."""
    workdir = str(tmp_path_factory.mktemp("tuned") / "run")
    state = train.run(configured("lora", folder, base[1], schedules__learning_rate__peak=0.5), workdir)
    return workdir, state


# -- adapters -----------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained(base, tuned):
    run, _ = base
    workdir, state = tuned
    before, after = by_path(parameters(run)), by_path(parameters(workdir))
    frozen, origin = trained.load_base(workdir)
    for path, value in by_path(frozen).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert origin == str(base[1])
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    kernels = {path for path in before if path.startswith("trunk/") and path.endswith("/kernel")}
    assert moved == kernels
    stored = by_path(state.params)
    assert {path.rpartition("/")[2] for path in stored} == {"down", "up"} and len(stored) == 2 * len(kernels)
    size = sum(path.stat().st_size for path in (pathlib.Path(workdir) / "checkpoints").rglob("*") if path.is_file())
    assert size < 200_000
    assert not np.array_equal(images_of(workdir), images_of(run))


def test_the_base_is_split_over_the_mesh(base, folder, tuned, tmp_path):
    """On four devices each holds about half of the base's kernels, and the adapters become the same."""
    assert jax.device_count() >= 4
    changes = dict(schedules__learning_rate__peak=0.5, mesh__data=1, mesh__fsdp=2, mesh__tensor=2)
    config = configured("lora", folder, base[1], **changes)
    state = train.run(config, str(tmp_path / "run"))
    for ours, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(tuned[1].params), strict=True):
        np.testing.assert_allclose(jax.device_get(ours), jax.device_get(expected), atol=2e-3)
    workdir, mesh = str(tmp_path / "run"), make_mesh(1, 2, 2)
    task = prior.build(ConfigDict(workdirs.read_config(workdir)), workdir).task
    placed = jax.device_put(task.frozen, frozen_shardings(task, mesh))
    kernels = {path: x for path, x in by_path(placed["base"]).items() if path.endswith("/kernel")}
    assert kernels and all(x.addressable_shards[0].data.size <= x.size // 2 for x in kernels.values())
    tokenizer = jax.tree.leaves(placed["tokenizer"])
    assert all(x.addressable_shards[0].data.size == x.size for x in tokenizer)


def test_exports_of_adapters_and_of_the_merged_model_draw_the_same(base, tuned, tmp_path):
    workdir, _ = tuned
    drawn = images_of(workdir)
    whole, adapters = export(workdir, tmp_path / "whole"), export(workdir, tmp_path / "adapters", "--adapters")
    np.testing.assert_array_equal(images_of(whole), drawn)
    np.testing.assert_array_equal(images_of(adapters), drawn)  # the export names its base
    np.testing.assert_array_equal(images_of(adapters, base=base[0]), drawn)
    assert set(Exported(adapters).files) == {
        "config.json", "model.safetensors", "text/sentencepiece.model", "text/sentencepiece.model.sha256",
    }  # fmt: skip
    assert f'base="{base[1]}"' in (adapters / "README.md").read_text()
    assert json.loads((whole / "config.json").read_text())["lora"]["rank"] == 0
    with pytest.raises(ConfigError, match="base"):
        images_of(whole, base=base[0])


@pytest.mark.parametrize("how", ["rounded", *(pytest.param(x, marks=pytest.mark.slow) for x in ("other", "wider"))])
def test_adapters_need_their_base(base, tuned, tmp_path, how):
    adapters, wrong = export(tuned[0], tmp_path / "adapters", "--adapters"), str(tmp_path / how)
    if how == "rounded":
        export(base[0], wrong, "--dtype=bfloat16")
    else:
        untrained_run.prior(wrong, "maskgit.py:shapes", seed=9, width=32 if how == "wider" else 16)
    with pytest.raises(CheckpointError, match=wrong):
        images_of(adapters, base=wrong)
    with pytest.raises(ConfigError, match="base=DIR"):
        images_of(adapters, base=str(tmp_path / "nowhere"))


def test_a_published_export_names_a_base_that_others_have(base, tuned, tmp_path, capsys):
    flags = [f"--workdir={tuned[0]}", f"--output={tmp_path}/out", "--push=owner/name"]
    assert main([*flags, "--adapters"]) == 2 and "--base" in capsys.readouterr().err
    assert main([f"--workdir={base[0]}", f"--output={tmp_path}/out", "--adapters"]) == 2
    assert "lora.rank" in capsys.readouterr().err


def test_a_training_of_adapters_resumes_and_keeps_its_options(base, tuned, folder):
    workdir, state = tuned
    peak = {"schedules__learning_rate__peak": 0.5}
    assert int(train.run(configured("lora", folder, base[1], **peak), workdir).step) == int(state.step)
    with pytest.raises(ConfigMismatch, match=r"lora\.alpha"):
        train.run(configured("lora", folder, base[1], lora__alpha=1.0, steps=3, **peak), workdir)


def test_adapters_need_a_start_and_its_text_model(base, folder, tmp_path):
    config = config_files.load(f"{CONFIG.parent}/prior.py:small")
    config.data.path, config.lora.rank = folder, 4
    with pytest.raises(ConfigError, match=r"start_from"):
        train.check(config, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"text\.path"):
        train.run(configured("lora", folder, base[1], text__path="new"), str(tmp_path / "text"))


# -- all parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sizes_and_models_come_from_the_start(base, folder, tmp_path, place):
    """From a run or from its export; with step size 0 every parameter stays."""
    still = {"schedules__learning_rate": {"kind": "constant", "value": 0.0}}
    config = configured("all", folder, base[place], steps=1, model__trunk__dropout=0.1, **still)
    train.run(config, str(tmp_path))
    stored = workdirs.read_config(tmp_path)
    assert (stored["prior"], stored["data"]["image_size"], stored["text"]["length"]) == ("maskgit", 16, 8)
    assert stored["model"]["trunk"]["width"] == 16 and stored["model"]["trunk"]["dropout"] == 0.1
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), parameters(base[0]))
    first, second = (workdirs.load_tokenizer(folder)[1] for folder in (tmp_path, base[0]))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_step_size_follows_the_start(base, folder):
    learned = workdirs.read_config(base[0])["schedules"]["learning_rate"]["peak"]
    config = configured("all", folder, base[0])
    assert preparation.prepare(config).schedules.learning_rate.peak == pytest.approx(0.2 * learned)
    assert preparation.prepare(configured("lora", folder, base[0])).schedules.learning_rate.peak == learned
    config.schedules.learning_rate.peak = 0.25
    assert preparation.prepare(config).schedules.learning_rate.peak == 0.25


def test_a_text_model_of_ones_own(base, folder, tmp_path):
    """`text.path=new` trains one. Embeddings of pieces that both vocabularies have stay, as all other parameters do."""
    still = {"schedules__learning_rate": {"kind": "constant", "value": 0.0}}
    train.run(configured("all", folder, base[1], steps=1, text__path="new", **still), str(tmp_path))
    old, new = (TextModel.load(workdirs.text_model_path(place)) for place in (base[0], tmp_path))
    before, after = by_path(parameters(base[0])), by_path(parameters(tmp_path))
    assert set(old.pieces()) != set(new.pieces())
    common = set(old.pieces()) & set(new.pieces())
    assert len(common) > 5
    for piece in common:
        rows = (by[1]["embedding/text"][by[0].pieces().index(piece)] for by in ((old, before), (new, after)))
        np.testing.assert_array_equal(*rows, err_msg=piece)
    for path in before:
        if not path.startswith("embedding/text"):
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    assert images_of(tmp_path).shape == (2, 16, 16, 3)


def test_fine_tuning_needs_a_start(folder, tmp_path):
    config = configured("all", folder, "")
    config.start_from = None
    with pytest.raises(ConfigError, match="start_from"):
        preparation.prepare(config)
