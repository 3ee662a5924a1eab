"""Tests of the metric writer's local files; `tests/storage` has those of object storage."""

import math
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dalle_jax.errors import UserError
from dalle_jax.reporting.metric_writer import MetricWriter, read_metrics


def events(folder):
    """Reads TensorBoard's events in the order in which TensorBoard does: records of length, CRC, event, CRC."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_scalars_and_images(tmp_path):
    image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    writer = MetricWriter(str(tmp_path))
    writer.scalars(1, {"loss": 2.5, "norm": math.inf})
    writer.image(1, "preview", image)
    writer.close()
    assert read_metrics(str(tmp_path)) == [{"step": 1, "loss": 2.5, "norm": None}]
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "preview_0000001.png"), image)
    _, _, scalars, preview = events(tmp_path / "tensorboard")
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {"loss": 2.5, "norm": math.inf}
    assert (preview.step, preview.summary.value[0].image.width) == (1, 6)


def test_a_resumed_run_hides_later_steps(tmp_path):
    """metrics.jsonl loses their lines; in TensorBoard the second start hides all events from its step on."""
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricWriter(str(tmp_path), start=start)
        for step in steps:
            writer.scalars(step, {"loss": float(10 * start + step)})
        writer.close()
    assert [line["loss"] for line in read_metrics(str(tmp_path))] == [1, 2, 23, 24]
    shown = {}
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[event.step] = value.simple_value
    assert shown == {1: 1, 2: 2, 3: 23, 4: 24}


@pytest.mark.parametrize("last", ["flush", "close"])
def test_full_disk(tmp_path, monkeypatch, last):
    """The writer raises in the calling thread, so that the run stops with a message instead of losing events."""

    class Full:
        def write(self, content):
            pass  # into a buffer

        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: Full())
    writer = MetricWriter(str(tmp_path))
    writer.scalars(1, {"loss": 1.0})
    with pytest.raises(UserError, match="No space left"):
        getattr(writer, last)()
    writer._jsonl.close()
