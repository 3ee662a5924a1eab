"""Tests of `config.minutes`: the number of updates is planned once, and a planned run equals one with that number."""

import dataclasses
import signal
import types

import jax
import numpy as np
import pytest
from ml_collections.config_dict import placeholder
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import read_config
from dalle_jax.configuration.config_files import load
from dalle_jax.configuration.sections import check_minutes
from dalle_jax.errors import ConfigError, Preempted
from dalle_jax.jobs import train as train_job
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.tasks.task import Job
from dalle_jax.training import budget, loop
from dalle_jax.training.budget import Costs, most_steps, plan
from dalle_jax.training.loop import train

FAST = Costs(start=1.0, step=1.0, evaluation=2.0, preview=3.0, checkpoint=0.5)
SLOW = dataclasses.replace(FAST, step=10.0)


def minutes_config(**changes):
    """The tiny configuration with schedules and a cadence that follow `steps`, and with `minutes`."""
    config = tiny_config(cadence__eval=4, cadence__checkpoint=4)
    config.minutes = placeholder(float)
    steps = config.get_oneway_ref("steps")
    del config.schedules.learning_rate
    config.schedules.learning_rate = {"kind": "cosine", "start": 3e-2, "end": 1e-4, "steps": steps}
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture
def machine(monkeypatch):
    """A machine of given costs, on which no time passes before the plan. Tasks have schedules that follow `steps`."""

    def build(config, workdir, rows=None):
        job = tiny_job(config)
        job.task.schedules = {"noise": lambda step: 0.1 * (1 - step / config.steps)}
        return job

    monkeypatch.setattr(loop, "build", build)
    monkeypatch.setattr(budget, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))

    def of(costs):
        measured = []
        monkeypatch.setattr(budget, "measure", lambda *_: measured.append(1) or costs)
        return measured

    return of


def lines(workdir):
    """The metrics without those that are times."""
    slow = ("seconds", "examples_per_second")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in slow)}
        for line in read_metrics(str(workdir))
    ]


def assert_states_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run(workdir, **changes):
    return train(minutes_config(**changes), str(workdir), began=0.0)


# 60 s: 1 s to start, 14 updates, 4 evaluations of 2 s, 1 preview and 4 checkpoints in each minute of FAST's costs.
def planned_by_hand(costs, seconds, every):
    fitting = [
        n
        for n in range(1, 1000)
        if costs.start + n * costs.step + -(-n // every) * (costs.evaluation + costs.checkpoint) + costs.preview
        <= seconds
    ]
    return max(fitting, default=0)


@pytest.mark.parametrize("seconds", [0, 5, 20.5, 33, 100, 401])
@pytest.mark.parametrize("costs", [FAST, SLOW])
def test_the_most_steps_that_fit(costs, seconds):
    assert most_steps(minutes_config(), costs, seconds) == planned_by_hand(costs, seconds, every=4)


def test_the_cadence_follows():
    config = load("configs/prior.py:shapes")
    assert config.cadence.eval == 1050
    costs = dataclasses.replace(FAST, preview=0.0, checkpoint=0.0, evaluation=10.0)
    steps = most_steps(config, costs, 1041.0)
    assert steps == 1000  # 1 s to start, four evaluations whatever the number
    assert config.steps == 4200


def test_equals_a_run_with_that_number_of_steps(machine, tmp_path):
    """Bit for bit: state, metrics, schedules."""
    assert machine(FAST) == []
    state = run(tmp_path / "planned", minutes=0.5)
    steps = planned_by_hand(FAST, 30, every=4)
    assert int(state.step) == steps == read_config(tmp_path / "planned")["steps"]
    assert read_config(tmp_path / "planned")["schedules"]["learning_rate"]["steps"] == steps
    expected = run(tmp_path / "given", steps=steps)
    assert_states_equal(state, expected)
    assert lines(tmp_path / "planned") == lines(tmp_path / "given")
    assert lines(tmp_path / "given")[0]["train/noise"] == pytest.approx(0.1)


def test_a_resumed_run_repeats_it_on_a_slower_machine(machine, tmp_path, monkeypatch):
    machine(FAST)
    whole = run(tmp_path / "whole", minutes=0.5)
    queue = loop.Run.queue

    def stopped(self, step, batch):
        queue(self, step, batch)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "queue", stopped)
        with pytest.raises(Preempted):
            run(tmp_path / "stopped", minutes=0.5)
    assert len(lines(tmp_path / "stopped")) < len(lines(tmp_path / "whole"))
    measured = machine(SLOW)
    assert_states_equal(run(tmp_path / "stopped", minutes=0.5), whole)
    assert not measured and lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_plan_without_a_checkpoint_holds(machine, tmp_path):
    """A run that was killed before its first checkpoint repeats its plan, but another `minutes` plans again."""
    machine(FAST)
    steps = int(run(tmp_path, minutes=0.5).step)
    (tmp_path / "checkpoints").rename(tmp_path / "lost")
    measured = machine(SLOW)
    config = minutes_config(minutes=0.5)
    assert budget.fixed_steps(config, str(tmp_path)) == steps
    config.minutes = 3.0
    assert budget.fixed_steps(config, str(tmp_path)) is None
    state = run(tmp_path, minutes=3.0)
    assert measured and int(state.step) == planned_by_hand(SLOW, 180, every=4)


def test_other_minutes_do_not_change_a_run(machine, tmp_path, caplog):
    machine(FAST)
    steps = int(run(tmp_path, minutes=0.5).step)
    measured = machine(FAST)
    with caplog.at_level("INFO"):
        assert int(run(tmp_path, minutes=3.0).step) == steps
    assert not measured and "--workdir" in caplog.text and "0.5 minutes" in caplog.text


@pytest.mark.parametrize("cache", [False, True])
def test_measures_with_the_real_run(tmp_path, monkeypatch, cache):
    """The throw-away run leaves nothing behind, and its costs are those that the parts of the loop have."""
    now, spent = [0.0], {"step": 2.0, "evaluation": 30.0, "preview": 7.0}
    monkeypatch.setattr(budget, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    seen = {}

    def passing(name):
        original = getattr(budget.Run, {"step": "queue", "evaluation": "evaluate"}.get(name, name))

        def passes(self, *args):
            seen[name] = seen.get(name, 0) + 1
            now[0] += spent[name] + (100.0 if seen[name] == 1 else 0.0)  # the first time compiles
            return original(self, *args)

        monkeypatch.setattr(budget.Run, original.__name__, passes)

    for name in spent:
        passing(name)
    config = minutes_config(minutes=100.0, steps=1000)
    with config.unlocked():
        config.data.cache = cache
    how, tiny = loop.validate(config), tiny_job(config)
    job = dataclasses.replace(tiny, examples=999, train_batches=lambda start=0: tiny.train_batches())
    with loop.on_mesh(how[0]):
        costs = budget.measure(config, str(tmp_path), job, *how)
    assert costs == Costs(start=102.0, step=2.0, evaluation=30.0, preview=7.0, checkpoint=0.0, first_pass=63)
    assert seen["step"] == 1 + 3 + 10 + cache * (3 + 5)  # 20 s of 2 s each, and 10 s on the same batches again
    assert list(tmp_path.iterdir()) == []


class Simulated:
    """A run on a machine where reading is slow for few images, and perhaps only the first time."""

    now = 0.0

    def __init__(self, costs, cache):
        self.costs, self.cache, self.place = costs, cache, 0
        self.read = set(range(33)) if cache else set()  # by the start of the codes
        self.batches = self.checkpoints = self

    def __call__(self, config, workdir, job, *_, **__):
        job.train_batches()
        return self

    def begin(self, start=0):
        self.place = start

    def perf_counter(self):
        return self.now

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place

    def next_batch(self):
        batch = self.place % len(self.costs)
        self.place += 1
        self.now += 0.0 if batch in self.read else self.costs[batch]
        self.read |= {batch} if self.cache else set()

    def queue(self, step, batch):
        self.now += 0.1

    def nothing(self, *_, **__):
        """Evaluations, previews and checkpoints take no time."""

    report = evaluate = preview = save = wait = nothing


@pytest.mark.parametrize(("cache", "minutes", "tolerance"), [(True, 36.0, 0.05), (True, 5.0, 0.2), (False, 36.0, 0.2)])
@pytest.mark.parametrize("seed", range(4))
def test_few_slow_images_do_not_spoil_the_plan(tmp_path, monkeypatch, cache, minutes, tolerance, seed):
    """Half of the time for reading goes to less than a tenth of the images."""
    images = np.random.default_rng(seed).lognormal(0.0, 2.0, (226, 32))
    images *= 0.2 / images.sum(axis=1).mean()  # seconds
    ordered = np.sort(images, axis=None)
    assert ordered[-images.size // 10 :].sum() > 0.5 * ordered.sum()
    simulated = Simulated(images.sum(axis=1), cache)
    monkeypatch.setattr(budget, "Run", simulated)
    monkeypatch.setattr(budget, "time", simulated)
    config = minutes_config(minutes=minutes, batch_size=32)
    with config.unlocked():
        config.data.cache = cache
    job = Job(None, simulated.begin, list, examples=images.size)
    costs = budget.measure(budget.with_steps(config, 10_000), str(tmp_path), job, None, None, None)
    passed = simulated.now
    assert passed < 0.05 * 60 * minutes + 3
    steps = plan(config, "somewhere", costs, passed).steps
    real = Simulated(simulated.costs, cache)
    for step in range(steps):
        real.queue(step, real.next_batch())
    assert passed + real.now == pytest.approx(60 * minutes, rel=tolerance)


def test_slow_updates_in_the_beginning_do_not_end_the_timing(monkeypatch):
    simulated = Simulated([3.0] * 5 + [0.0] * 1000, cache=False)
    monkeypatch.setattr(budget, "time", simulated)
    done, mean = budget._timed(simulated, 4, 20.0, until=1000)
    assert done == simulated.place + 4 and 40 < simulated.place < 60
    assert mean == pytest.approx(simulated.now / simulated.place)
    simulated.place = simulated.now = 0
    assert budget._timed(simulated, 4, 20.0, until=12)[0] == 12
    assert budget._timed(simulated, 4, 20.0, until=6)[0] == 9


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    """With real times: it plans, trains, and compares planned and real time."""
    monkeypatch.setattr(loop, "build", lambda config, workdir, rows=None: tiny_job(config))
    costs, real = [], budget.measure

    def measure(*args):  # the tiny training is so fast that a minute would be many thousand steps
        costs.append(real(*args))
        return dataclasses.replace(costs[0], step=1.0)

    monkeypatch.setattr(budget, "measure", measure)
    state = train(minutes_config(minutes=0.8, cadence__eval=0, cadence__checkpoint=0), str(tmp_path))
    assert 10 <= int(state.step) <= 47 and 0 < costs[0].step < 1 and costs[0].start > 0
    assert "planned 48 s, took" in capsys.readouterr().out
    assert not (tmp_path / "timing").exists()
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert checkpoints.steps == [int(state.step)]


def test_too_few_minutes():
    config = minutes_config(minutes=0.2)
    with pytest.raises(ConfigError, match=r"config\.minutes=0\.2"):
        plan(config, "somewhere", FAST, passed=0.0)
    assert plan(minutes_config(minutes=1.0), "somewhere", FAST, passed=0.0).steps >= budget.LEAST_STEPS
    with pytest.raises(ConfigError, match="minutes"):  # all of the time has passed
        plan(minutes_config(minutes=1.0), "somewhere", FAST, passed=3600.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_wrong_minutes(tmp_path, wrong):
    with pytest.raises(ConfigError, match="minutes"):
        run(tmp_path / "run", minutes=wrong)
    assert not (tmp_path / "run").exists()


# -- the chain, and the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["prior.py:shapes", "maskgit.py:shapes", "dvae.py:shapes", "clip.py:shapes"])
def test_every_training_has_minutes(file):
    config = load(f"configs/{file}")
    assert config.minutes is None
    config.minutes = 10.0
    if "tokenizer" in config:
        assert config.tokenizer.minutes == pytest.approx(3.0)


def test_the_tokenizer_gets_its_share(tmp_path, monkeypatch):
    """References between keys survive the job, so that the schedules of both trainings follow their plans."""
    seen = []

    def train(config, workdir, **clock):
        assert config.steps is None and read_config(workdir)["steps"] is None  # a killed run is planned again
        seen.append((budget.with_steps(config, 123), clock))
        if config.task == "dvae":
            raise KeyError

    monkeypatch.setattr(train_job, "train", train)
    config = load("configs/prior.py:shapes")
    config.minutes, config.tokenizer.workdir = 10.0, str(tmp_path / "dvae")
    with pytest.raises(KeyError):
        train_job.run(config, str(tmp_path / "prior"))
    monkeypatch.setattr(train_job, "_freeze_tokenizer", lambda config, workdir: None)
    train_job.run(config, str(tmp_path / "prior"))
    (tokenizer, _), (prior, clock) = seen
    assert tokenizer.minutes == pytest.approx(3.0)
    assert tokenizer.schedules.learning_rate.steps == 123 and tokenizer.schedules.temperature.steps == 61
    assert prior.minutes == 10 and prior.schedules.learning_rate.steps == 123 and prior.cadence.eval == 31
    assert clock["began"] > 0


@pytest.mark.parametrize("task", ["prior", "maskgit"])
def test_own_steps_of_the_tokenizer(task):
    config = load(f"configs/{task}.py:shapes")
    config.minutes, config.tokenizer.steps = 10.0, 77
    check_minutes(config, ["minutes", "tokenizer.steps"])
    assert config.tokenizer.minutes is None and config.minutes == 10
    config = load(f"configs/{task}.py:shapes")
    config.minutes, config.steps = 10.0, 77
    with pytest.raises(ConfigError, match="minutes"):
        check_minutes(config, ["minutes", "steps"])
