"""Compilation for TPUs without TPUs."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle_jax.aot import costs, remedies, topologies
from dalle_jax.aot.compiler import compile_target
from dalle_jax.aot.target import CompileOptions, load_target, lower_sampler, make_subject
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError, DoesNotFit, UserError
from dalle_jax.jobs import compile as compile_module
from dalle_jax.jobs.compile import run
from dalle_jax.tasks.registry import abstract
from dalle_jax.training.step import LEAVE_ROOM, OVERLAP, SPARSE_CORE, overlapping

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install -e '.[tpu]')"
)


# -- targets ------------------------------------------------------------------------------------------------------


def test_overrides_have_the_types_of_the_keys():
    config = load_target("configs/prior.py:paper", "mesh.fsdp=64, model.trunk.remat=dots,optimizer.eps=1e-6")
    assert (config.mesh.fsdp, config.model.trunk.remat, config.optimizer.eps) == (64, "dots", 1e-6)


@pytest.mark.parametrize(
    "target, overrides, token",
    [
        ("configs/prior.py:papr", "", '"paper"'),
        ("configs/nothing.py", "", "configs/nothing.py"),
        ("", "", "config.target=''"),
        (":paper", "", "config.target=':paper'"),
        ("configs", "", "configs"),
        ("README.md", "", "README.md"),
        ("configs/generate.py:paper", "", "configs/generate.py:paper"),
        ("configs/generate.py", "", "'generate'"),
        ("configs/prior.py", "mesh.fsdb=2", "mesh.fsdb=2"),
        ("configs/prior.py", "mesh.fsdp=two", "mesh.fsdp='two'"),
        ("configs/prior.py", "mesh.fsdp", "'mesh.fsdp'"),
    ],
)
def test_invalid_targets(target, overrides, token):
    with pytest.raises(ConfigError, match=token):
        load_target(target, overrides)


def test_a_file_without_get_config(tmp_path):
    (tmp_path / "no_config.py").write_text("")
    with pytest.raises(ConfigError, match="no_config.py.*get_config"):
        load_target(str(tmp_path / "no_config.py"))


@pytest.mark.parametrize(
    "overrides, token",
    [
        ("batch_size=0", "batch_size"),
        ("model.trunk.width=0", "trunk.width"),
        ("model.trunk.heads=0", "trunk.heads"),
        ("model.trunk.depth=-1", "trunk.depth"),
        ("model.trunk.width=65,model.trunk.heads=4", "65"),
    ],
)
def test_invalid_sizes(overrides, token):
    with pytest.raises(ConfigError, match=token):
        make_subject(load_target("configs/prior.py", overrides), jax.devices())


@pytest.mark.parametrize(
    "wrong, token", [({"what": "fly"}, "what"), ({"rows": 0}, "rows"), ({"effort": "some"}, "effort")]
)
def test_invalid_options(wrong, token):
    with pytest.raises(ConfigError, match=token):
        CompileOptions("configs/prior.py", "v5e:2x2", **wrong)


@pytest.mark.parametrize("target", ["dvae.py:paper", "clip.py:folder", "maskgit.py:folder", "dvae.py:small"])
def test_your_own_data_is_not_needed(target):
    subject = make_subject(load_target(f"configs/{target}", "mesh.fsdp=1,mesh.data=-1"), jax.devices())
    assert subject.batch["image"].shape[0] == subject.config.batch_size


def test_rows_that_cannot_be_split():
    subject = make_subject(load_target("configs/maskgit.py", "mesh.data=4,mesh.tensor=2"), jax.devices())
    with pytest.raises(ConfigError, match="config.rows=3"):
        lower_sampler(subject, 3)


def run_config(target, **options):
    return ConfigDict({"job": "compile", "workdir": "", "target": target, "topology": "v5e:2x2", **options})


@pytest.mark.parametrize("where", ["/proc/x", "/proc", "a_file", "a_file/x"])
def test_an_unwritable_workdir_is_rejected_before_compilation(where, tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(compile_module, "compile_target", lambda options: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match=f"{where}'"):
        run(run_config("configs/prior.py"), str(tmp_path / where))


def test_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        topologies.devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e", "v9z:2x2", "v5e:3x3", "v4:2x2x1", "8x8"])
def test_topologies_that_do_not_exist(name):
    with pytest.raises(ConfigError, match=f"topology='{name}'"):
        topologies.devices(name)


# -- tasks without data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["configs/prior.py", "configs/dvae.py", "configs/clip.py", "configs/maskgit.py"])
def test_abstract_batches_equal_those_of_the_pipeline(target, tmp_path, monkeypatch):
    config = load_target(target, "batch_size=4,data.builder_kwargs.num_train=512")
    _, batch = abstract(config)
    from dalle_jax.data.pipeline import Pipeline
    from dalle_jax.data.sources.source import DataOptions
    from dalle_jax.data.token_store import TokensInMemory, token_dtype
    from dalle_jax.token_layout import PaddedIds

    class Ids:
        vocab_size = config.get("text", {}).get("vocab_size", 1)

        def encode(self, *_, **__):
            return [1, 2], False

        def unknown_letters(self, text):
            return ""

    layout = PaddedIds(Ids.vocab_size, config.text.length) if "text" in config else None
    options = from_config(DataOptions, config.data, "data")
    tokens = None
    if "tokens" in batch:  # encoded once
        tokens = TokensInMemory(np.zeros((512, 64), token_dtype(config.tokenizer.model.vocab_size)), {})
    how = dict(split="train", train=True, batch_size=4, tokens=tokens)
    real = next(iter(Pipeline(options, Ids() if layout else None, layout, **how)))
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (x.shape, x.dtype) for k, x in real.items()}


# -- whole compilations -------------------------------------------------------------------------------------------


XLA = "model.trunk.attention_kernel=xla"  # the program states the cost of this one


@pytest.fixture(scope="module")
def compiled_prior():
    split = "mesh.data=2,mesh.fsdp=2,batch_size=8,overlap_exchanges=True,model.trunk.depth=3"
    return compile_target(CompileOptions("configs/prior.py", "v5e:2x2", f"{XLA},{split}"))


@needs_libtpu
def test_costs_of_the_shapes_prior(compiled_prior):
    f = compiled_prior
    assert f["fits"] and f["chips"] == 4 and f["chip"] == "v5e" and not f["unknown_loops"] and not f["silent_kernels"]
    size = f["bytes"]
    state = 4 * f["parameters"] * 4
    # Parameters are split two ways, some arrays stay whole.
    assert state / 4 < size["parameters"] + size["average"] + size["optimizer"] < state
    assert size["arguments"] >= size["parameters"] + size["average"] + size["optimizer"] + size["batch"]
    assert f["flops"]["model"] < f["flops"]["program"] < 2 * f["flops"]["model"]
    assert f["collectives"]["all-gather"]["count"] and f["collectives"]["all-reduce"]["count"]
    assert 0 < f["utilisation"] < 1 and f["seconds"]["step"] >= f["seconds"]["instructions"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, overlapped", [("v5e:2x2", 0.0), ("v6e:2x2", 1.0)])
def test_gradients_are_scattered_while_the_chip_computes_if_it_has_sparse_cores(topology, overlapped):
    split = "mesh.data=1,mesh.fsdp=-1,batch_size=8,overlap_exchanges=True"
    small = "model.trunk.depth=3,model.trunk.width=512,model.trunk.dtype=bfloat16"
    found = compile_target(CompileOptions("configs/prior.py", topology, f"{XLA},{split},{small}"))
    scattered = found["collectives"]["reduce-scatter"]
    assert scattered["count"] and scattered["overlapped"] == overlapped


@needs_libtpu
@pytest.mark.parametrize(
    "topology, more", [("v5e:2x2", LEAVE_ROOM), ("v5p:2x2x2", SPARSE_CORE), ("v6e:2x2", SPARSE_CORE)]
)
def test_options_of_the_compiler_by_chip(topology, more):
    assert overlapping(topologies.devices(topology)[0]) == OVERLAP | more
    assert overlapping(jax.devices()[0]) is None


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
        ("configs/maskgit.py", "mesh.data=-1,mesh.tensor=2,batch_size=8,model.trunk.depth=2"),
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
    printed = costs.table(f)  # lists the arguments of the sampler, but not the optimizer state of the training
    assert "parameters  " in printed and "captions  " in printed and "optimizer" not in printed
    assert 1 <= f["bytes"]["arguments"] / (f["bytes"]["parameters"] + f["bytes"]["captions"]) < 1.2
    with pytest.raises(ConfigError, match="'clip'"):
        compile_target(CompileOptions("configs/clip.py", "v5e:2x2", what="sample"))


# -- programs that do not fit -------------------------------------------------------------------------------------


@needs_libtpu
def test_a_program_that_the_compiler_rejects_ends_with_a_remedy():
    big = "batch_size=65536,data.image_size=64,mesh.data=-1"
    with pytest.raises(DoesNotFit, match=r"accumulate_steps=\d+") as raised:
        compile_target(CompileOptions("configs/dvae.py", "v5e:2x2", big))
    assert raised.value.exit_code != 0 and isinstance(raised.value, UserError)


@needs_libtpu
def test_a_compiled_program_that_does_not_fit_ends_with_a_remedy(tmp_path, capsys, monkeypatch):
    """The compiler rejects most programs that do not fit, but not all."""
    measured = costs.costs_of

    def larger(*arguments):
        f = measured(*arguments)
        return {**f, "fits": False, "bytes": {**f["bytes"], "total": 20 * 2**30}}

    monkeypatch.setattr(costs, "costs_of", larger)
    with pytest.raises(DoesNotFit, match=r"20.00 GiB.*16.00.*accumulate_steps="):
        run(run_config("configs/prior.py", overrides=f"{XLA},model.trunk.depth=1", effort="low"), str(tmp_path))
    assert "DOES NOT FIT" in capsys.readouterr().out and not json.loads((tmp_path / "compile.json").read_text())["fits"]


def test_the_message_of_the_compiler_is_parsed():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert remedies.needed_and_available(said) == (20.5 * 2**30, 15.75 * 2**30)
    assert remedies.needed_and_available("something else") is None
