"""Tests of the metric writer's local files; `tests/storage` has those of object storage."""

import math
import os
import struct

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dalle_jax.errors import UserError
from dalle_jax.reporting.metric_writer import MetricWriter, read_metrics
from dalle_jax.storage import obstacles


def events(folder):
    """Reads TensorBoard's events in the order in which TensorBoard does: records of length, CRC, event, CRC."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        content = path.read_bytes() if path.is_file() else b""
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


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(obstacles.logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff", b"\0" * 4096, b"[]", b"null", b"7", b'"x"', b"NaN", b"{}", b"[" * 100_000, b'{"step": "1"}',
        b'{"step": 1.5}', b'{"step": true}', b'{"step": -1}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": [1]}',
        b'{"step": 1, "loss": true}', b'{"step": 1' + b"0" * 400 + b"}", b'{"step": 1, "train/loss": 2.5',
    ],
)  # fmt: skip
def test_damaged_lines_are_left_out(tmp_path, warnings, damage):
    """The run continues with the other lines, says so in one line, and keeps the file under another name."""
    content = b'{"step": 1, "loss": 1.0}\n' + damage + b'\n{"step": 2, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    expected = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert read_metrics(str(tmp_path)) == expected
    MetricWriter(str(tmp_path), start=2).close()
    assert read_metrics(str(tmp_path)) == expected
    assert len(warnings) == 1 and "metrics.jsonl" in warnings[0] and "line 2" in warnings[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    MetricWriter(str(tmp_path), start=2).close()
    assert len(warnings) == 1


@pytest.mark.parametrize("last", [b'{"step": 2, "lo', b"\xff", b"\0\0"])
def test_half_a_line_at_the_end_is_usual(tmp_path, warnings, last):
    """A process that is killed while writing leaves one."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + last)
    MetricWriter(str(tmp_path), start=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n' and not warnings


def test_values_that_are_no_numbers_are_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": NaN, "b": 1e999, "c": 1' + b"0" * 400 + b', "d": null}')
    assert read_metrics(str(tmp_path)) == [{"step": 1, "a": None, "b": None, "c": None, "d": None}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "tensorboard", "samples/preview_0000001.png"])
@pytest.mark.parametrize("kind", ["folder", "file", "pipe", "lost link"])
def test_something_else_in_the_place_of_a_file(tmp_path, warnings, name, kind):
    """It is kept under another name, and the files are written."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        (path / "inside").mkdir(parents=True)
    elif kind == "file":
        path.write_bytes(b"\xff")
    elif kind == "pipe" and "png" not in name:
        os.mkfifo(path)
    elif kind == "lost link" and "png" not in name:
        path.symlink_to(tmp_path / "nowhere" / "else")
    writer = MetricWriter(str(tmp_path))
    writer.scalars(1, {"loss": 2.5})
    writer.image(1, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert (
        read_metrics(str(tmp_path)) == [{"step": 1, "loss": 2.5}] and len(list(events(tmp_path / "tensorboard"))) == 4
    )
    with Image.open(tmp_path / "samples" / "preview_0000001.png") as image:
        assert image.size == (6, 4) and len(warnings) <= 1
    if kind == "folder" and name in ("metrics.jsonl", "samples/preview_0000001.png"):
        assert (tmp_path / f"{name}.damaged" / "inside").is_dir()


def test_a_file_without_rights(tmp_path, warnings, monkeypatch):
    """Root may read everything, so that the error is raised by hand."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("/")), "read_bytes", denied)
        assert read_metrics(str(tmp_path)) == []
        MetricWriter(str(tmp_path), start=1).close()
    assert len(warnings) == 1 and "Permission denied" in warnings[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == '{"step": 1}\n'
