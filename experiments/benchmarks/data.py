"""Times the preparation of training batches: reading, decoding and resizing images, without a model.

| case                   | what is timed                                                                             |
|------------------------|-------------------------------------------------------------------------------------------|
| folder_640, tars_640   | batches of JPEG 640x480 at 256 pixels, `augment="prior"`: from a folder, from tar shards  |
| folder_256, tars_256   | the same of JPEG 256x256                                                                  |
| folder_4000            | the same of JPEG 4000x3000                                                                |
| tokens_256             | batches of tar shards whose images were encoded to 1,024 tokens: captions only            |
| decode_640, resize_640 | parts of folder_640                                                                       |
| index_256              | the index of tar shards of JPEG 256x256, which is created once                            |

The images are smooth noise with grain, so that a 640x480 JPEG of quality 90 has about 105,000 bytes. A line has
`images_per_core_s`, images a second and core: batches are created in one thread, and its CPU time is measured, so that
other processes matter little. Divide the images a second that a card needs by it. That is the number of cores.
"""

import functools
import io
import pathlib
import sys
import tarfile
import tempfile
import time

import _measure as m  # first: it limits the threads
import numpy as np
import PIL.Image

from dalle_jax.data.augment import augment
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.record import Record
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.data.token_store import TokensInMemory
from dalle_jax.token_layout import PaddedIds

SIDE, BATCH = 256, 32
SIZES = {640: (640, 480), 256: (256, 256), 4000: (4000, 3000)}
CAPTION = "a photograph of some smooth noise with grain, number {}"


def photo(width: int, height: int, seed: int) -> bytes:
    """Returns a JPEG of smooth noise with grain."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-12, 13, pixels.shape, np.int16)
    written = io.BytesIO()
    PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(written, "JPEG", quality=90)
    return written.getvalue()


def write_files(folder: pathlib.Path, size: tuple[int, int], count: int) -> None:
    """Writes images with captions, of which 16 differ."""
    folder.mkdir()
    contents = [photo(*size, seed) for seed in range(min(count, 16))]
    for i in range(count):
        (folder / f"{i:05}.jpg").write_bytes(contents[i % len(contents)])
        (folder / f"{i:05}.txt").write_text(CAPTION.format(i))


def write_shards(folder: pathlib.Path, files: pathlib.Path, each: int = 1000) -> None:
    """Writes the files of a folder as tar shards."""
    folder.mkdir()
    names = sorted(path.name for path in files.iterdir())
    for start in range(0, len(names), 2 * each):
        with tarfile.open(folder / f"{start // (2 * each):05}.tar", "w") as archive:
            for name in names[start : start + 2 * each]:
                archive.add(files / name, name)


def cpu(run, runs: int) -> tuple[float, list[float]]:
    """Returns the median CPU seconds of this thread for a call, and all of them. The first call is not counted."""
    seconds = []
    for _ in range(runs + 1):
        began = time.thread_time()
        run()
        seconds.append(time.thread_time() - began)
    return float(np.median(seconds[1:])), seconds[1:]


def line(seconds: float, times: list[float], images: int, shape: dict) -> dict:
    return {
        "images_per_core_s": round(images / seconds, 1),
        "ms_per_image": round(1e3 * seconds / images, 3),
        "times_ms": [round(1e3 * value / images, 3) for value in times],
        "shape": shape,
    }


def batches(source: str, pixels: int, tokens: int, runs: int, smoke: bool) -> dict:
    """Times the creation of training batches in this thread."""
    size, side = ((48, 32), 16) if smoke else (SIZES[pixels], SIDE)
    batch, count = (2, 8) if smoke else (BATCH, 4 * BATCH)
    model = TextModel.train([CAPTION.format(i) for i in range(200)], vocab_size=128)
    grid = round(tokens**0.5) or 1
    captions = PaddedIds(model.vocab_size, 32)
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        write_files(root / "files", size, count)
        if source == "tars":
            write_shards(root / "tars", root / "files")
        options = DataOptions(
            source="folder" if source == "folder" else "tar_shards",
            path=str(root / ("files" if source == "folder" else "tars")),
            data_dir=str(root / "prepared"), image_size=side, augment="none" if tokens else "prior",
            train_split="all" if source == "folder" else "train",
        )  # fmt: skip
        make = functools.partial(Pipeline, options, model, captions, split=options.train_split, train=True)
        pipeline = make(batch_size=batch)
        if tokens:
            encoded = np.zeros((len(pipeline.source), grid * grid), np.uint16)
            pipeline = make(batch_size=batch, source=pipeline.source, tokens=TokensInMemory(encoded, {}))
        numbers = iter(range(10**6))
        seconds, times = cpu(lambda: pipeline._make(next(numbers)), runs or 9)
    shape = {"source": source, "image": list(size), "to": side, "batch": batch, "tokens": tokens}
    return line(seconds, times, batch, shape)


def part(name: str, runs: int, smoke: bool) -> dict:
    """Times decoding or resizing one 640x480 JPEG."""
    size, side = ((48, 32), 16) if smoke else (SIZES[640], SIDE)
    record, rng = Record(photo(*size, 0), (), "", {}), np.random.default_rng(0)
    image = decode_image(record)
    run = (lambda: decode_image(record)) if name == "decode" else (lambda: augment(image, side, "prior", rng))
    seconds, times = cpu(run, runs or 30)
    return line(seconds, times, 1, {"image": list(size), "to": side})


def index_tars(runs: int, smoke: bool) -> dict:
    """Times the index of tar shards, which is created once."""
    size, count = ((32, 32), 8) if smoke else (SIZES[256], 1000)
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        write_files(root / "files", size, count)
        write_shards(root / "tars", root / "files")
        prepared = iter(range(10**6))

        def index():
            folder = str(root / f"prepared{next(prepared)}")
            options = DataOptions(source="tar_shards", path=str(root / "tars"), data_dir=folder)
            return len(Pipeline(options, split="train", train=False, batch_size=1).source)

        seconds, times = cpu(index, runs or 5)
    return line(seconds, times, count, {"source": "tars", "image": list(size)})


CASES = {
    **{f"{source}_{pixels}": functools.partial(batches, source, pixels, 0)
       for source, pixels in (("folder", 640), ("tars", 640), ("folder", 256), ("tars", 256),
                              ("folder", 4000))},
    "tokens_256": functools.partial(batches, "tars", 256, 1024),
    "decode_640": functools.partial(part, "decode"),
    "resize_640": functools.partial(part, "resize"),
    "index_256": index_tars,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
