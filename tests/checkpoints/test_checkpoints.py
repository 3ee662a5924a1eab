"""Tests of checkpoints: round trips, retention, other meshes, and every way they can fail."""

import errno
import functools
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_job import TinyTask, tiny_batches, tiny_config

from dalle_jax.checkpoints import checksums
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh, replicated
from dalle_jax.errors import CheckpointError
from dalle_jax.optim import optimizers
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.training.step import TrainState, make_init


@functools.cache
def initial(average=0.9, **mesh):
    mesh = make_mesh(**(mesh or {"data": 1}))
    with on_mesh(mesh):
        init, abstract = make_init(
            TinyTask(), optimizers.make_optimizer(OptimizerOptions()), AverageOptions(decay=average), mesh, seed=3
        )
        return init(), abstract


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_on_another_mesh(tmp_path):
    config, batches = tiny_config(), tiny_batches(4)
    state, _ = initial()
    state = state.replace(step=state.step + 7, skipped=state.skipped + 2)
    for _ in range(3):
        next(batches)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(7, state.items(), batches, config)
        expected = next(batches)  # save reads the state of the iterator, not the writing that follows

    again = tiny_batches(4)
    _, abstract = initial(data=2, fsdp=2, tensor=2)
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = TrainState.from_items(checkpoints.restore(abstract.items(), again, config))
    assert_trees_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
    assert restored.params["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert_trees_equal(next(again), expected)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_restores_parameters_alone(tmp_path, average):
    state, _ = initial(average)
    if average:
        state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state.items(), tiny_batches(4), tiny_config())
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert_trees_equal(checkpoints.restore_params(), state.eval_params)
        assert_trees_equal(checkpoints.restore_params(1, ema=False), state.params)
        everywhere = replicated(make_mesh())
        kernel = checkpoints.restore_params(layout=lambda stored: jax.tree.map(lambda _: everywhere, stored))["up"][
            "kernel"
        ]
        assert kernel.sharding == everywhere
        assert checkpoints.config() == to_json(tiny_config())


def test_keeps_the_last_and_the_best(tmp_path):
    state, _ = initial()
    errors = {1: 5.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 3.0}
    options = {"keep_last": 2, "keep_best": 1, "best_metric": "error"}
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        for step, error in errors.items():
            metrics = None if error is None else {"error": error}
            checkpoints.save(step, state.items(), tiny_batches(4), tiny_config(), metrics)
            if step == 4:  # the run resumes in a new process
                checkpoints.close()
                checkpoints = Checkpoints(str(tmp_path), **options)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6] and checkpoints.best_step == 2
        checkpoints.close()
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()) == [2, 5, 6]


def test_orbax_logs_nothing(tmp_path, caplog):
    state, _ = initial()
    caplog.clear()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state.items(), tiny_batches(4), tiny_config())
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        checkpoints.restore_params()
    assert not caplog.messages


def test_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert checkpoints.latest_step is None
    with pytest.raises(CheckpointError, match="No checkpoint"):
        checkpoints.restore_params()
    assert not (tmp_path / "checkpoints").exists()


def test_missing_step(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, initial()[0].items(), tiny_batches(4), tiny_config())
        with pytest.raises(CheckpointError, match="step 3"):
            checkpoints.restore_params(3)
        assert checkpoints.resolve("4") == checkpoints.resolve(4) == 4, "flags are texts"


def test_damaged_checkpoint(tmp_path):
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state.items(), tiny_batches(4), tiny_config())
    for file in (tmp_path / "checkpoints" / "4" / "params").rglob("manifest.ocdbt"):
        file.unlink()
    with Checkpoints(str(tmp_path)) as checkpoints, pytest.raises(CheckpointError, match="step 4: params"):
        checkpoints.restore(abstract.items(), tiny_batches(4), tiny_config())


def test_model_of_another_shape(tmp_path):
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state.items(), tiny_batches(4), tiny_config())
        up = abstract.params["up"]
        wider = {"kernel": jax.ShapeDtypeStruct((8, 99), jnp.float32, sharding=up["kernel"].sharding)}
        other = abstract.replace(params={**abstract.params, "up": {**up, **wider}})
        with pytest.raises(CheckpointError, match="up/kernel"):
            checkpoints.restore(other.items(), tiny_batches(4), tiny_config())


def test_too_little_space(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 19})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(CheckpointError, match="1.1 MiB, 0.5 MiB"):
            checkpoints.save(1, initial()[0].items(), tiny_batches(4), tiny_config())
        assert checkpoints.steps == []


def wait_for_writers(folder):
    """Waits until orbax's threads, which a failed save leaves behind, no longer create files."""
    before = None
    while (now := sorted(folder.rglob("*"))) != before:
        before = now
        time.sleep(0.3)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError('RESOURCE_EXHAUSTED: Error writing "x": [OS error 28: ENOSPC No space left on device]'),
    ],
)
def test_full_disk(tmp_path, monkeypatch, error):
    """One message for any file and thread that meets the full disk; earlier checkpoints stay intact."""
    state, abstract = initial()
    checkpoints = Checkpoints(str(tmp_path), keep_last=1)
    checkpoints.save(1, state.items(), tiny_batches(4), tiny_config())
    checkpoints.wait()

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("tensorstore.open", full)
    with pytest.raises(CheckpointError, match="no space left"):
        checkpoints.save(2, state.items(), tiny_batches(4), tiny_config())
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    wait_for_writers(tmp_path)
    with Checkpoints(str(tmp_path), keep_last=1) as again:
        assert again.steps == [1]
        assert_trees_equal(again.restore(abstract.items(), tiny_batches(4), tiny_config()), state.items())
        again.save(2, state.items(), tiny_batches(4), tiny_config())
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if "tmp" in name]


def large_state(value):
    """A state whose array is larger than those that array files carry checksums of."""
    params = {"w": jax.random.normal(jax.random.key(value), (256, 64))}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero + value, params=params, ema=None, opt_state=(), skipped=zero, skipped_in_row=zero)


def flip_a_bit(tmp_path, step):
    """Changes one bit of the largest parameter file of a checkpoint."""
    path = max((tmp_path / "checkpoints" / str(step) / "params").rglob("d/*"), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_flipped_bit(tmp_path, caplog):
    """Readers and trainings find a flipped bit of a large array; only a training moves the checkpoint aside."""
    config, states = tiny_config(ema__decay=0.0), {step: large_state(step) for step in (1, 2)}
    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state.items(), tiny_batches(4), config)
    folder = tmp_path / "checkpoints"
    flip_a_bit(tmp_path, 2)

    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert_trees_equal(checkpoints.restore_params(), states[1].params)
        assert checkpoints.resolve(None) == 1 and checkpoints.config() == to_json(config)
    assert "checkpoints/2 is damaged (params: w " in caplog.text
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="step 2: params: w"):
            checkpoints.restore_params(2)
    assert sorted(os.listdir(folder)) == ["1", "2"]

    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        assert_trees_equal(checkpoints.restore(states[2].items(), tiny_batches(4), config), states[1].items())
        assert checkpoints.latest_step == 1
        checkpoints.save(2, states[2].items(), tiny_batches(4), config)
    assert sorted(os.listdir(folder)) == ["1", "2", "2.damaged"]
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert_trees_equal(checkpoints.restore_params(), states[2].params)


@pytest.mark.parametrize("choice", ["latest first", "best first"])
def test_best_is_never_a_damaged_one(tmp_path, choice, caplog):
    """`best` skips a checkpoint that was found damaged, by an earlier read or by this one, for the next best."""
    config, states = tiny_config(ema__decay=0.0), {step: large_state(step) for step in (1, 2, 3)}
    options = {"keep_last": 3, "best_metric": "error"}
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        for (step, state), error in zip(states.items(), (2.0, 3.0, 1.0), strict=True):
            checkpoints.save(step, state.items(), tiny_batches(4), config, {"error": error})
        assert checkpoints.resolve("best") == checkpoints.best_step == 3
    flip_a_bit(tmp_path, 3)
    with Checkpoints(str(tmp_path), read_only=True, **options) as checkpoints:
        if choice == "latest first":
            assert_trees_equal(checkpoints.restore_params(), states[2].params)
        assert_trees_equal(checkpoints.restore_params("best"), states[1].params)
        assert checkpoints.resolve("best") == checkpoints.best_step == 1
    assert "checkpoints/3 is damaged (params: w " in caplog.text


def test_damaged_metrics(tmp_path, caplog):
    """A checkpoint with damaged metrics is not the best one, but remains readable."""
    state, _ = initial()
    options = {"keep_last": 2, "keep_best": 1, "best_metric": "error"}
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        for step, error in ((1, 2.0), (2, 1.0)):
            checkpoints.save(step, state.items(), tiny_batches(4), tiny_config(), {"error": error})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"err')
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        assert checkpoints.steps == [1, 2] and checkpoints.best_step == 1
        assert_trees_equal(checkpoints.restore_params(2), state.ema)
    assert "metrics of the checkpoint" in caplog.text


def test_a_changed_metric(tmp_path, caplog):
    """A metric whose digit changed does not decide which checkpoint is the best."""
    state, _ = initial()
    options = {"keep_last": 2, "keep_best": 1, "best_metric": "error"}
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        for step, error in ((1, 1.5), (2, 2.5)):
            checkpoints.save(step, state.items(), tiny_batches(4), tiny_config(), {"error": error})
    for step, before, after in ((2, "2.5", "0.5"), (1, "1.5", "9.5")):
        path = tmp_path / "checkpoints" / str(step) / "metrics" / "metrics"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
        with Checkpoints(str(tmp_path), **options) as checkpoints:
            assert checkpoints.best_step == (1 if step == 2 else 2)
        assert f"checkpoints/{step} are damaged" in caplog.text


@pytest.mark.parametrize("part", [".", "data", "checksums"])
def test_parts_of_another_step(tmp_path, part):
    """A checkpoint with the parts of another step is damaged, also if each part is whole."""
    states = {step: large_state(1) for step in (1, 2)}
    batches, config = tiny_batches(4), tiny_config(ema__decay=0.0)
    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        for step, state in states.items():
            next(batches)
            checkpoints.save(step, state.items(), batches, config)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "2" / part)
    shutil.copytree(folder / "1" / part, folder / "2" / part)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.restore(states[1].items(), tiny_batches(4), config)
        assert checkpoints.latest_step == 1


def test_checksums_of_early_versions(tmp_path):
    """Checkpoints with the first rule and without a step and a metric are checked with that rule."""
    state = large_state(1)
    config = tiny_config(ema__decay=0.0)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state.items(), tiny_batches(4), config, {"error": 1.0})
    path = tmp_path / "checkpoints" / "1" / "checksums" / "metadata"
    sums = {
        "arrays": {item: checksums.of_arrays(tree, "sum") for item, tree in state.items().items()},
        "config": checksums.of_json(to_json(config)),
    }
    path.write_text(json.dumps({**sums, "these": checksums.of_json(sums)}))
    with Checkpoints(str(tmp_path), best_metric="error") as checkpoints:
        assert_trees_equal(checkpoints.restore(state.items(), tiny_batches(4), config), state.items())
        assert checkpoints.best_step == 1
    flip_a_bit(tmp_path, 1)
    with Checkpoints(str(tmp_path)) as checkpoints, pytest.raises(CheckpointError, match="params: w"):
        checkpoints.restore(state.items(), tiny_batches(4), config)


def test_other_frozen_modules(tmp_path):
    """A checkpoint is not read with another image tokenizer; one of an early version does not know its tokenizer."""
    state, config = large_state(1), tiny_config(ema__decay=0.0)
    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        checkpoints.save(1, state.items(), tiny_batches(4), config)
        for frozen in ("a", None):
            checkpoints.restore_params(frozen=frozen)
        checkpoints.save(2, state.items(), tiny_batches(4), config, frozen="a")
        for frozen in ("a", None):
            checkpoints.restore_params(frozen=frozen)
            checkpoints.restore(state.items(), tiny_batches(4), config, frozen=frozen)
        with pytest.raises(CheckpointError, match="image_tokenizer"):
            checkpoints.restore_params(frozen="b")
        with pytest.raises(CheckpointError, match="image_tokenizer"):
            checkpoints.restore(state.items(), tiny_batches(4), config, frozen="b")
        assert checkpoints.steps == [1, 2], "not damaged"


def test_another_optimizer_is_not_damage(tmp_path):
    """An intact checkpoint of another model is neither skipped nor moved."""
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state.items(), tiny_batches(4), tiny_config())
        with pytest.raises(CheckpointError, match="opt_state/0"):
            checkpoints.restore(abstract.replace(opt_state=(abstract.step,)).items(), tiny_batches(4), tiny_config())
        assert checkpoints.steps == [4]


def test_checkpoint_without_checksums(tmp_path):
    """Checkpoints of earlier versions have no checksums and stay readable."""
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state.items(), tiny_batches(4), tiny_config())
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "checksums")
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert_trees_equal(checkpoints.restore(abstract.items(), tiny_batches(4), tiny_config()), state.items())
        assert_trees_equal(checkpoints.restore_params(), state.ema)
