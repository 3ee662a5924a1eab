"""Validation that stands still or rises, the early stop, the best checkpoint, and the summary at the end."""

import dataclasses
import json
import math
import os
import re
import signal

import jax
import numpy as np
import pytest
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import is_complete, read_finished
from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError, Preempted
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training.evaluations import Evaluations
from dalle_jax.training.loop import train
from dalle_jax.training.summary import _delaying

# One for each evaluation, which is every two steps. The third is the best, and three evaluations follow that are not.
ERRORS = [3.0, 2.0, 1.0, 1.5, 1.5, 1.5, 0.5, 0.4]


def run(workdir, errors=ERRORS, *, signal_at=None, best_metric="error", after=0, **changes):
    """Trains with given validation errors; those of `after` earlier evaluations are left out.

    A signal arrives while the line of the `signal_at`-th step of this process is logged.
    """
    config = tiny_config(**{"steps": 16, "cadence__eval": 2, "cadence__checkpoint": 2, "ema__decay": 0.0, **changes})
    job, values, logged = tiny_job(config, best_metric=best_metric), iter(errors[after:]), []
    job.task.evaluate = lambda *_: {"error": next(values)}

    def data_counts():
        logged.append(1)
        if len(logged) == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    return train(config, str(workdir), dataclasses.replace(job, data_counts=data_counts, examples=32, held_out=5))


def measured(workdir):
    return {line["step"]: line["eval/error"] for line in read_metrics(str(workdir)) if "eval/error" in line}


def of(*values, best_metric="error", train_losses=None):
    """Evaluations with given values at steps 1, 2, …, and a falling training loss."""
    found = Evaluations(best_metric)
    for step, value in enumerate(values, 1):
        loss = 1 / step if train_losses is None else train_losses[step - 1]
        found.add(step, {"train/loss": loss, "train/seconds_per_step": 2.0})
        found.add(step, {"eval/error": value, "eval/other": 0.0})
    return found


# -- the history --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best_metric, sign", [("error", 1), ("+error", -1)])
def test_counts_evaluations_without_improvement(best_metric, sign):
    counts = [
        of(*[sign * x for x in values], best_metric=best_metric).without_improvement
        for values in (
            [3.0],
            [3, 2, 1],
            [3, 1, 2],
            [3, 1, 0.9995, 0.9992],
            [3, 1, 0.9995, 0.998],
            [3, math.nan, math.nan],
        )
    ]
    assert counts == [0, 0, 1, 2, 0, 2]


@pytest.mark.parametrize("best_metric, value, best", [("error", 1.0, 2), ("+error", 5.0, 4)])
def test_the_best_follows_the_direction(best_metric, value, best):
    found = of(2.0, 1.0, math.nan, 5.0, best_metric=best_metric).best
    assert (found.step, found.metrics["error"]) == (best, value)
    assert of(math.nan, None).best is None and Evaluations("error").best is None


def test_overfitting_needs_a_falling_training_loss():
    assert of(2, 1, 1.2, 1.4).overfits
    assert not of(2, 1, 1.2, 1.4, train_losses=[1, 1, 1, 1]).overfits
    assert not of(2, 1, 1.005, 1.005).overfits  # it stands still
    assert not of(2, 1.4, 1.2, 1).overfits


def test_news_come_once():
    def news(*values, **options):
        return [of(*values[:n], **options).news() for n in range(1, len(values) + 1)]

    assert news(3, 1, 1.5, 1.6, 1.7, 1.8, 0.5, 1, 2) == [None] * 3 + ["overfits"] + [None] * 5
    flat = {"train_losses": [1] * 9}
    assert news(3, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5, **flat) == [None] * 4 + ["stands still"] + [None] * 4
    assert news(3, 2, 1.9, 1.8, 1.7) == [None] * 5


def test_lines_of_a_file_give_the_same_history():
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 1.0, "train/seconds_per_step": 0.5}]
    lines += [{"step": 2, "eval/error": 1.0, "eval/other": None}, {"step": 3, "train/loss": None}]
    lines += [{"step": 4, "eval/error": 2.0}, {"step": 4, "eval/error": 9.0}, {"step": 6, "eval/error": 5.0}]
    found = Evaluations.read("error", lines, until=4)
    assert [each.step for each in found.done] == [2, 4] and found.done[1].metrics == {"error": 2.0}
    assert found.done[0].train_loss == 2.0 and math.isnan(found.done[1].train_loss) and found.seconds == 1.0
    sent = json.dumps(found.to_json())  # to the other hosts
    assert json.dumps(Evaluations.from_json("error", json.loads(sent)).to_json()) == sent


# -- the early stop -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped")
    return workdir, run(workdir, stop_after=3)


def test_stops_and_is_complete(stopped, capsys):
    """The run ends at step 12. The same command trains no further, and a prior accepts such a tokenizer."""
    workdir, state = stopped
    assert int(state.step) == 12 and list(measured(workdir)) == [2, 4, 6, 8, 10, 12]
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(workdir, errors=[], stop_after=3)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    said = capsys.readouterr().out
    assert (
        "complete" in said
        and "stop_after=3" in said
        and "stop_after=N" not in said
        and (workdir / "metrics.jsonl").read_bytes() == before
    )
    given = {"steps": 16, "stop_after": 3}
    assert is_complete(workdir, given) and is_complete(workdir, {"steps": 12})
    assert is_complete(workdir, {**given, "stop_after": 2})
    for further in ({"stop_after": 0}, {"stop_after": 4}):
        assert not is_complete(workdir, {**given, **further})
    (workdir / "finished.json").write_text("{")
    assert not is_complete(workdir, given)
    run(workdir, errors=[], stop_after=3)
    assert is_complete(workdir, given)


def test_a_stopped_run_can_be_continued(tmp_path):
    run(tmp_path, stop_after=3)
    assert int(run(tmp_path, after=6, stop_after=0).step) == 16
    assert list(measured(tmp_path).values()) == ERRORS
    assert is_complete(tmp_path, {"steps": 16}) and read_finished(tmp_path)["best"]["step"] == 16


@pytest.mark.parametrize("signal_at", [5, 8, 10])
def test_an_interrupted_run_stops_at_the_same_step(stopped, tmp_path, signal_at):
    """Also if the signal comes at a step whose evaluation is due."""
    workdir, state = stopped
    with pytest.raises(Preempted):
        run(tmp_path, stop_after=3, signal_at=signal_at)
    resumed = run(tmp_path, stop_after=3, after=len(measured(tmp_path)))
    assert int(resumed.step) == 12 and measured(tmp_path) == measured(workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)


def test_never_stops_by_default(tmp_path):
    assert int(run(tmp_path).step) == 16


@pytest.mark.parametrize("value, eval_every", [(-1, 2), (True, 2), (2, 0)])
def test_rejects_stop_after(tmp_path, value, eval_every):
    with pytest.raises(ConfigError, match="stop_after"):
        run(tmp_path, stop_after=value, cadence__eval=eval_every)


# -- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best_metric, best", [("error", 6), ("+error", 2)])
def test_keeps_the_best_in_both_directions(tmp_path, best_metric, best):
    """Also if no checkpoint was due at its step."""
    run(tmp_path, ERRORS[:6], steps=12, best_metric=best_metric, keep__last=1, cadence__checkpoint=4)
    with Checkpoints(str(tmp_path), best_metric=best_metric, keep_best=1, read_only=True) as checkpoints:
        assert checkpoints.steps == [best, 12] and checkpoints.best_step == best
        assert checkpoints.resolve("best") == best
    assert read_finished(tmp_path)["best"] == {"step": best, "metric": "error", "value": ERRORS[best // 2 - 1]}


# -- the words ----------------------------------------------------------------------------------------------------


def test_the_log_says_that_it_overfits_once(tmp_path, capsys):
    run(tmp_path, ERRORS[:6], steps=12)
    lines = [line for line in capsys.readouterr().out.splitlines() if "by heart" in line]
    assert "step 6" in lines[0] and "stop_after" in lines[0]
    assert len(lines) == 2 and "step 6 of 12" in lines[1]  # the second one is in the summary


@pytest.mark.parametrize(
    "target, changes, flags",
    [
        ("prior.py:small", {}, ["data.augment=prior", "data_tokens=each_batch", "model.trunk.dropout=0.15"]),
        ("prior.py:small", {"data.augment": "prior", "data_tokens": "each_batch"}, ["model.trunk.dropout=0.15"]),
        ("prior.py:folder", {"model.trunk.dropout": 0.1}, []),
        ("dvae.py:small", {}, ["data.augment=dvae"]),
        ("vqgan.py:small", {}, ["data.augment=dvae"]),
        ("clip.py:small", {}, ["data.augment=clip"]),
    ],
)
def test_it_names_what_delays_overfitting(target, changes, flags):
    config = config_files.load(f"configs/{target}")
    config.update_from_flattened_dict({"data.path": "."} | changes)
    said = _delaying(config)
    assert re.findall(r"--config\.(\S+)", said) == flags and bool(said) == bool(flags)


def test_the_summary(tmp_path, capsys):
    """It repeats itself when a finished run is repeated, and names the best step, the data, the files and the use."""
    for after in (0, 6):
        run(tmp_path, ERRORS[:6], after=after, steps=12)
        text = capsys.readouterr().out
        summary = text[text.index("tiny net") :]
        for token in ("212 parameters", "12 updates", "6 epochs over 32", "step 6 of 12", "error 1", "error of 1.5"):
            assert token in summary, token
        assert f"{tmp_path}/samples" in summary and f"use {tmp_path} --config.step=best" in summary


def test_the_summary_of_a_run_that_still_improves(tmp_path, capsys):
    run(tmp_path, [3.0, 2.0], steps=4)
    text = capsys.readouterr().out
    assert "step 4 of 4" in text and "--config.steps=8" in text and "--config.step=best" not in text
