"""Checkpoints: round trips, what is kept, other meshes, and every way they can fail."""

import errno
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_job import TinyTask, tiny_batches, tiny_config

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
        checkpoints.save(7, state, batches, config)
        expected = next(batches)  # the state of the iterator was read by save, not later

    again = tiny_batches(4)
    _, abstract = initial(data=2, fsdp=2, tensor=2)
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step == 7
        restored = checkpoints.restore(abstract, again, config)
    assert_trees_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
    assert restored.params["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert_trees_equal(next(again), expected)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_parameters_alone(tmp_path, average):
    state, _ = initial(average)
    if average:
        state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state, tiny_batches(4), tiny_config())
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
            checkpoints.save(step, state, tiny_batches(4), tiny_config(), None if error is None else {"error": error})
            if step == 4:  # goes on in a new process
                checkpoints.close()
                checkpoints = Checkpoints(str(tmp_path), **options)
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6] and checkpoints.best_step == 2
        checkpoints.close()
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()) == [2, 5, 6]


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    assert checkpoints.latest_step is None
    with pytest.raises(CheckpointError, match="No checkpoint in .*Train first"):
        checkpoints.restore_params()
    assert not (tmp_path / "checkpoints").exists()


def test_step_that_is_not_there(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, initial()[0], tiny_batches(4), tiny_config())
        with pytest.raises(CheckpointError, match=r"No checkpoint of step 3 .*\[4\]"):
            checkpoints.restore_params(3)


def test_damaged_checkpoint(tmp_path):
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state, tiny_batches(4), tiny_config())
    for file in (tmp_path / "checkpoints" / "4" / "params").rglob("manifest.ocdbt"):
        file.unlink()
    with (
        Checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(CheckpointError, match="No checkpoint in .*can be read into this model: step 4: params: "),
    ):
        checkpoints.restore(abstract, tiny_batches(4), tiny_config())


def test_model_of_another_shape(tmp_path):
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state, tiny_batches(4), tiny_config())
        up = abstract.params["up"]
        wider = {"kernel": jax.ShapeDtypeStruct((8, 99), jnp.float32, sharding=up["kernel"].sharding)}
        other = abstract.replace(params={**abstract.params, "up": {**up, **wider}})
        with pytest.raises(CheckpointError, match=r"up/kernel is \(8, 16\) there, \(8, 99\) here"):
            checkpoints.restore(other, tiny_batches(4), tiny_config())


def test_too_little_space(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 19})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"no space left on the device \(a checkpoint needs 1.1 MiB, 0.5 MiB are free\)"
        ):
            checkpoints.save(1, initial()[0], tiny_batches(4), tiny_config())
        assert checkpoints.steps == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError('RESOURCE_EXHAUSTED: Error writing "x": [OS error 28: ENOSPC No space left on device]'),
    ],
)
def test_full_disk(tmp_path, monkeypatch, error):
    """Whichever file hits the end of the disk, and in whichever thread: one message, and the older ones intact."""

    state, abstract = initial()
    checkpoints = Checkpoints(str(tmp_path), keep_last=1)
    checkpoints.save(1, state, tiny_batches(4), tiny_config())
    checkpoints.wait()

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("tensorstore.open", full)
    with pytest.raises(CheckpointError, match="no space left on.*device.*Checkpoints written before are intact"):
        checkpoints.save(2, state, tiny_batches(4), tiny_config())
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    with Checkpoints(str(tmp_path), keep_last=1) as again:
        assert again.steps == [1]
        assert_trees_equal(again.restore(abstract, tiny_batches(4), tiny_config()), state)
        again.save(2, state, tiny_batches(4), tiny_config())
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if "tmp" in name]


def large_state(value):
    """A state with one array that is larger than what array files carry checksums of."""
    params = {"w": jax.random.normal(jax.random.key(value), (256, 64))}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero + value, params=params, ema=None, opt_state=(), skipped=zero, skipped_in_row=zero)


def test_flipped_bit(tmp_path, caplog):
    """One bit of a large array: found by readers and by a training, which alone moves the checkpoint aside."""
    config, states = tiny_config(ema__decay=0.0), {step: large_state(step) for step in (1, 2)}
    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, tiny_batches(4), config)
    folder = tmp_path / "checkpoints"
    path = max((folder / "2" / "params").rglob("d/*"), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert_trees_equal(checkpoints.restore_params(), states[1].params)
        assert checkpoints.resolve(None) == 1 and checkpoints.config() == to_json(config)
    assert "checkpoints/2 is damaged (params: w changed since it was written): passed over" in caplog.text
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="step 2: params: w changed.*Ask for another step"):
            checkpoints.restore_params(2)
    assert sorted(os.listdir(folder)) == ["1", "2"]

    with Checkpoints(str(tmp_path), keep_last=2) as checkpoints:
        assert_trees_equal(checkpoints.restore(states[2], tiny_batches(4), config), states[1])
        assert checkpoints.latest_step == 1
        checkpoints.save(2, states[2], tiny_batches(4), config)
    assert sorted(os.listdir(folder)) == ["1", "2", "2.damaged"]
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert_trees_equal(checkpoints.restore_params(), states[2].params)


def test_damaged_measures(tmp_path, caplog):
    """The best checkpoint is another one; nothing else is lost."""
    state, _ = initial()
    options = {"keep_last": 2, "keep_best": 1, "best_metric": "error"}
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        for step, error in ((1, 2.0), (2, 1.0)):
            checkpoints.save(step, state, tiny_batches(4), tiny_config(), {"error": error})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"err')
    with Checkpoints(str(tmp_path), **options) as checkpoints:
        assert checkpoints.steps == [1, 2] and checkpoints.best_step == 1
        assert_trees_equal(checkpoints.restore_params(2), state.ema)
    assert "measures of the checkpoint" in caplog.text


def test_another_optimizer_is_not_damage(tmp_path):
    """Nothing is passed over, and nothing moved, where the checkpoint is whole and the command is another."""
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state, tiny_batches(4), tiny_config())
        with pytest.raises(CheckpointError, match=r"rest: opt_state/0 is None there, \(\) here"):
            checkpoints.restore(abstract.replace(opt_state=(abstract.step,)), tiny_batches(4), tiny_config())
        assert checkpoints.steps == [4]


def test_checkpoint_without_checksums(tmp_path):
    """As earlier versions wrote them."""
    state, abstract = initial()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(4, state, tiny_batches(4), tiny_config())
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "checksums")
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert_trees_equal(checkpoints.restore(abstract, tiny_batches(4), tiny_config()), state)
        assert_trees_equal(checkpoints.restore_params(), state.ema)
