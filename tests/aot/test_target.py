"""Compiling for TPUs without TPUs."""

import importlib.util
import json

import jax
import pytest
from ml_collections import ConfigDict

from dalle_jax.aot import costs, remedies, topologies
from dalle_jax.aot.target import CompileOptions, compile_target, load_target, lower_sampler, make_subject
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError, DoesNotFit, UserError
from dalle_jax.jobs import compile as compile_module
from dalle_jax.jobs.compile import run
from dalle_jax.tasks.registry import abstract

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install -e '.[tpu]')"
)


# -- targets ------------------------------------------------------------------------------------------------------


def test_overrides_have_the_types_of_the_keys():
    config = load_target("configs/prior.py:paper", "mesh.fsdp=64, model.trunk.remat=dots,optimizer.eps=1e-6")
    assert (config.mesh.fsdp, config.model.trunk.remat, config.optimizer.eps) == (64, "dots", 1e-6)


@pytest.mark.parametrize(
    "target, overrides, words",
    [
        ("configs/prior.py:papr", "", 'did you mean "paper"'),
        ("configs/nothing.py", "", "There is no config file"),
        ("", "", "config.target='' names no file; expected a config such as"),
        (":paper", "", "config.target=':paper' names no file"),
        ("configs", "", "There is no config file configs"),
        ("README.md", "", "README.md is not a Python file; expected a config file"),
        ("configs/__init__.py", "", "config.target=configs/__init__.py: no config, for it has no get_config"),
        ("configs/generate.py:paper", "", "config.target=configs/generate.py:paper: this config has no variants"),
        ("configs/generate.py", "", "job 'generate'; expected a training"),
        ("configs/prior.py", "mesh.fsdb=2", "mesh.fsdb=2 does not fit"),
        ("configs/prior.py", "mesh.fsdp=two", "mesh.fsdp='two' does not fit"),
        ("configs/prior.py", "mesh.fsdp", "expected key=value"),
    ],
)
def test_targets_that_cannot_be(target, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_target(target, overrides)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("batch_size=0", "batch_size=0: expected at least 1"),
        ("model.trunk.width=0", "config.model: model.trunk.width is 0; expected at least 1"),
        ("model.trunk.heads=0", "config.model: model.trunk.heads is 0"),
        ("model.trunk.depth=-1", "config.model: model.trunk.depth is -1"),
        ("model.trunk.width=65,model.trunk.heads=4", "width 65 is not a multiple of .*heads 4; .* width to 64"),
    ],
)
def test_sizes_that_cannot_be(overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_subject(load_target("configs/prior.py", overrides), jax.devices())


@pytest.mark.parametrize(
    "wrong, words",
    [({"what": "fly"}, "one of train, sample"), ({"rows": 0}, "at least 1"), ({"effort": "some"}, "one of full, low")],
)
def test_options_that_cannot_be(wrong, words):
    with pytest.raises(ConfigError, match=words):
        CompileOptions("configs/prior.py", "v5e:2x2", **wrong)


def test_rows_that_cannot_be_split():
    subject = make_subject(load_target("configs/maskgit.py", "mesh.data=4,mesh.tensor=2"), jax.devices())
    with pytest.raises(ConfigError, match="config.rows=3 cannot be split over 4 devices .*: give a multiple of 4"):
        lower_sampler(subject, 3)


def run_config(target, **options):
    return ConfigDict({"job": "compile", "workdir": "", "target": target, "topology": "v5e:2x2", **options})


@pytest.mark.parametrize("where", ["/proc/x", "/proc", "a_file", "a_file/x"])
def test_a_workdir_that_cannot_be_written_is_known_before_compiling(where, tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(compile_module, "compile_target", lambda options: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match=f"Cannot use '.*{where}' as the workdir: .* Give another --workdir"):
        run(run_config("configs/prior.py"), str(tmp_path / where))


def test_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        topologies.devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v9z:2x2", "v5e:3x3", "v4:2x2x1", "8x8"])
def test_topologies_that_do_not_exist(name):
    with pytest.raises(ConfigError, match="v5p:AxBxC|of v5e, v5p, v6e"):
        topologies.devices(name)


# -- tasks without data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["configs/prior.py", "configs/dvae.py", "configs/clip.py", "configs/maskgit.py"])
def test_abstract_batches_are_those_of_the_pipeline(target, tmp_path, monkeypatch):
    config = load_target(target, "batch_size=4,data.builder_kwargs.num_train=512")
    _, batch = abstract(config)
    from dalle_jax.data.pipeline import Pipeline
    from dalle_jax.data.sources.source import DataOptions
    from dalle_jax.token_layout import TokenLayout

    class Ids:
        vocab_size = config.get("text", {}).get("vocab_size", 1)

        def encode(self, *_, **__):
            return [1, 2], False

    layout = TokenLayout(Ids.vocab_size, 1, config.text.length, 1, 1) if "text" in config else None
    options = from_config(DataOptions, config.data, "data")
    real = next(iter(Pipeline(options, Ids() if layout else None, layout, split="train", train=True, batch_size=4)))
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (x.shape, x.dtype) for k, x in real.items()}


# -- whole compilations -------------------------------------------------------------------------------------------


XLA = "model.trunk.attention_kernel=xla"  # whose operations the program tells


@pytest.fixture(scope="module")
def compiled_prior():
    split = "mesh.data=2,mesh.fsdp=2,batch_size=8,overlap_exchanges=True"
    return compile_target(CompileOptions("configs/prior.py", "v5e:2x2", f"{XLA},{split}"))


@needs_libtpu
def test_figures_of_the_shapes_prior(compiled_prior):
    f = compiled_prior
    assert f["fits"] and f["chips"] == 4 and f["chip"] == "v5e" and not f["unknown_loops"] and not f["silent_kernels"]
    size = f["bytes"]
    state = 4 * f["parameters"] * 4
    assert state / 4 < size["parameters"] + size["average"] + size["optimizer"] < state  # two ways, some of it whole
    assert size["arguments"] >= size["parameters"] + size["average"] + size["optimizer"] + size["batch"]
    assert f["flops"]["model"] < f["flops"]["program"] < 2 * f["flops"]["model"]
    assert f["collectives"]["all-gather"]["count"] and f["collectives"]["all-reduce"]["count"]
    assert 0 < f["utilisation"] < 1 and f["seconds"]["step"] >= f["seconds"]["instructions"]


@needs_libtpu
def test_the_table_and_the_file(compiled_prior, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_module, "compile_target", lambda options: compiled_prior)
    run(run_config("configs/prior.py"), str(tmp_path / "new"))
    printed = capsys.readouterr().out
    assert "fits" in printed and "utilisation" in printed and "all-gather" in printed
    assert json.loads((tmp_path / "new" / "compile.json").read_text())["chips"] == 4
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["compile.json"]


@needs_libtpu
@pytest.mark.parametrize(
    "target, overrides",
    [
        ("configs/maskgit.py", "mesh.data=-1,mesh.tensor=2,batch_size=8"),
        ("configs/dvae.py", ""),
        ("configs/clip.py", "mesh.data=-1,mesh.fsdp=2,model.image_depth=1,model.text_depth=1"),
    ],
)
def test_small_configs_compile(target, overrides):
    f = compile_target(CompileOptions(target, "v5e:2x2", overrides, effort="low"))
    assert f["fits"] and f["kernels_known"]
    assert bool(f["silent_kernels"]) == ("maskgit" in target)  # splash attention, forward and backward


@needs_libtpu
def test_the_sampler_compiles():
    few = f"{XLA},model.trunk.depth=2,mesh.data=-1"
    f = compile_target(CompileOptions("configs/maskgit.py", "v5e:2x2", few, what="sample", rows=8))
    assert f["fits"] and f["rows"] == 8
    assert 0.95 < f["flops"]["program"] / f["flops"]["model"] < 2
    printed = costs.table(f)  # what it takes, and not what a training has beside it
    assert "parameters  " in printed and "captions  " in printed and "optimizer" not in printed
    assert 1 <= f["bytes"]["arguments"] / (f["bytes"]["parameters"] + f["bytes"]["captions"]) < 1.2
    with pytest.raises(ConfigError, match="only a prior draws"):
        compile_target(CompileOptions("configs/clip.py", "v5e:2x2", what="sample"))


# -- what does not fit --------------------------------------------------------------------------------------------


@needs_libtpu
def test_what_does_not_fit_ends_with_a_remedy():
    big = "batch_size=65536,data.image_size=64,mesh.data=-1"
    with pytest.raises(DoesNotFit, match=r"does not fit v5e:2x2.*GiB.*accumulate_steps=\d+") as raised:
        compile_target(CompileOptions("configs/clip.py".replace("clip", "dvae"), "v5e:2x2", big))
    assert raised.value.exit_code != 0 and isinstance(raised.value, UserError)


@needs_libtpu
def test_what_was_compiled_and_does_not_fit_ends_with_a_remedy(tmp_path, capsys, monkeypatch):
    """The compiler itself refuses most of it, but not all."""
    measured = costs.figures

    def larger(*arguments):
        f = measured(*arguments)
        return {**f, "fits": False, "bytes": {**f["bytes"], "total": 20 * 2**30}}

    monkeypatch.setattr(costs, "figures", larger)
    with pytest.raises(
        DoesNotFit, match=r"does not fit v5e:2x2.*it needs 20.00 GiB of v5e's 16.00 .*accumulate_steps="
    ):
        run(run_config("configs/dvae.py", effort="low"), str(tmp_path))
    assert "DOES NOT FIT" in capsys.readouterr().out and not json.loads((tmp_path / "compile.json").read_text())["fits"]


def test_the_compilers_message_is_read():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert remedies.needed_and_available(said) == (20.5 * 2**30, 15.75 * 2**30)
    assert remedies.needed_and_available("something else") is None
