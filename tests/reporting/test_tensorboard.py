"""TensorBoard's files: the loss comes first, and values that never change are left out."""

import pytest
from test_metric_writer import events

from dalle_jax.reporting.metric_writer import MetricWriter, read_metrics
from dalle_jax.reporting.tensorboard import tag_of


def written(folder):
    """Returns the values of each tag by step."""
    found = {}
    for event in events(folder / "tensorboard"):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


NAMES = [
    "train/loss", "eval/loss", "train/image_nats", "eval/image_nats", "eval/psnr", "train/learning_rate",
    "train/gradient_norm", "train/skipped", "train/kl_weight", "train/seconds_per_step", "train/examples_per_second",
    "train/captions_truncated", "train/left_out/empty", "eval/retrieval@1",
]  # fmt: skip


def test_the_loss_is_the_first_group():
    """TensorBoard sorts groups, the part before the slash, by name."""
    tags = sorted(map(tag_of, NAMES))
    assert tags[:2] == ["loss/eval", "loss/train"] and len(set(tags)) == len(NAMES)
    assert {tag.partition("/")[0] for tag in tags} == {"loss", "metrics", "optimizer", "skipped_data", "time"}
    assert tag_of("preview") == "preview"


def test_constant_training_values_are_left_out(tmp_path):
    writer = MetricWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.scalars(step, {"train/loss": 2.0, "train/skipped": 0.0, "train/cut": float(step > 2), "eval/psnr": 20.0})
    writer.close()
    found = written(tmp_path)
    assert found == {
        "loss/train": {1: 2.0, 2: 2.0, 3: 2.0},
        "metrics/psnr (eval)": {1: 20.0, 2: 20.0, 3: 20.0},
        "metrics/cut (train)": {1: 0.0, 3: 1.0},
    }
    assert [line["train/skipped"] for line in read_metrics(str(tmp_path))] == [0.0] * 3, "metrics.jsonl has all"


def test_a_value_is_written_in_full_once_it_has_changed(tmp_path):
    writer = MetricWriter(str(tmp_path))
    for step, value in enumerate((0.0, 0.0, 1.0, 1.0, 0.0), 1):
        writer.scalars(step, {"train/skipped": value})
    writer.close()
    assert written(tmp_path) == {"optimizer/skipped": {1: 0.0, 3: 1.0, 4: 1.0, 5: 0.0}}


@pytest.mark.parametrize("writers", ["", "tensorboard"])
def test_writers(tmp_path, writers):
    writer = MetricWriter(str(tmp_path), writers=writers)
    writer.scalars(1, {"train/loss": 1.0})
    writer.flush()
    writer.close()
    assert read_metrics(str(tmp_path)) == [{"step": 1, "train/loss": 1.0}]
    assert (tmp_path / "tensorboard").exists() == bool(writers)
