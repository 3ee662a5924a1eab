"""The models of the page, and the events of a drawing.

An event is a JSON object with the key "kind":

    run       a run begins: run
    note      a message of the library, such as that it compiles once: run, text
    frame     images while they are drawn: run, first (number of the first image), count (images that are drawn
              together), progress, images (at most those that are shown)
    images    the result of a run: run, images, numbers, scores, seconds, drawn, steps, compiled
    error     a run, or the whole request, failed: run or None, text
    end       the last event

Images are data URLs. Results are PNG; frames of large images are JPEG and not more than ten a second.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from PIL import Image

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.data.known_captions import known_captions
from dalle_jax.demo import requests
from dalle_jax.demo.requests import Request
from dalle_jax.errors import ConfigError, UserError
from dalle_jax.jobs.edits import METHODS
from dalle_jax.reporting.images import png
from dalle_jax.storage import json_files
from dalle_jax.storage.files import expanded, full_path
from dalle_jax.text_to_image.best_of_n import Ranked
from dalle_jax.text_to_image.drawing import Frame
from dalle_jax.text_to_image.text_to_image import TextToImage

Event = dict[str, Any]

_SMALL = 64  # pixels; frames of larger images are compressed, and some are left out
_FRAME_SECONDS = 0.1  # between frames of larger images
_PATIENCE = 60.0  # seconds that a drawing waits for a visitor to read the next event
_WAITING = 4  # events that are drawn ahead of the visitor
_EXAMPLES = 4  # captions
_FEW_TOKENS, _FIRST_CANDIDATES = 64, 16  # of images that are drawn and ranked in about a second, and of a new page


class Stopped(Exception):
    """The visitor no longer reads the events."""


@dataclasses.dataclass(frozen=True)
class Studio:
    """The models of a page by name.

    Attributes:
      models: each run's model.
      places: the run's workdir in the manifests of saved images, if it is not the path of the run: its address on a
        hub, or its name on a page that strangers visit.
    """

    models: Mapping[str, TextToImage]
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Returns all that the page shows before anything is drawn."""
        devices = jax.local_devices()
        kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        return {
            "device": f"{len(devices)} × {kind}" if len(devices) > 1 else kind,
            "runs": [_described(name, model) for name, model in self.models.items()],
            "captions": _examples(list(self.models.values())),
            "candidates": _FIRST_CANDIDATES if all(map(_ranks_at_once, self.models.values())) else 0,
            "most": {
                "images": requests.MOST_IMAGES,
                "candidates": requests.MOST_CANDIDATES,
                "characters": requests.MOST_CHARACTERS,
                "bytes": requests.MOST_BYTES,
            },
        }

    def public(self, text: str) -> str:
        """Returns a message of the library for visitors: with the names of runs instead of their paths."""
        for name, model in self.models.items():
            for path in (str(full_path(model.workdir)), model.workdir):
                if path.strip("./"):  # a run in the current folder has the path "."
                    text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w/-])", lambda _, name=name: name, text)
        return text

    def draw(self, given: Any) -> Iterator[Event]:
        """Draws what a visitor asks for, and yields the events. Closing the iterator stops the drawing."""
        events: queue.Queue[Event] = queue.Queue(_WAITING)
        stopped = threading.Event()

        def send(event: Event) -> None:
            event = event | ({"text": self.public(event["text"])} if "text" in event else {})
            waited = time.monotonic()
            while not stopped.is_set() and time.monotonic() - waited < _PATIENCE:
                try:
                    return events.put(event, timeout=0.2)
                except queue.Full:
                    continue
            raise Stopped

        thread = threading.Thread(target=self._draw_all, args=(given, send), daemon=True)
        thread.start()
        try:
            while True:
                yield (event := events.get())
                if event["kind"] == "end":
                    return
        finally:
            stopped.set()

    def _draw_all(self, given: Any, send: Callable[[Event], None]) -> None:
        """Draws with one run after the other. An error of one run does not stop the next one."""
        with contextlib.suppress(Stopped):
            try:
                request = requests.parse(given, list(self.models))
                for name in request.runs:
                    send({"kind": "run", "run": name})
                    try:
                        send(self._draw_one(name, request, send))
                    except UserError as error:
                        send({"kind": "error", "run": name, "text": str(error)})
            except UserError as error:
                send({"kind": "error", "run": None, "text": str(error)})
            except Stopped:
                raise
            except Exception as error:
                absl_logging.exception("The page could not draw.")
                send({"kind": "error", "run": None, "text": f"{type(error).__name__}: see the log of the server."})
            send({"kind": "end"})

    def _draw_one(self, name: str, request: Request, send: Callable[[Event], None]) -> Event:
        """Draws with one run, and returns its event of kind "images"."""
        model, last, away = self.models[name], 0.0, 0.0  # away: seconds of encoding and sending

        def on_frame(frame: Frame) -> None:
            nonlocal last, away
            small = model.image_size <= _SMALL
            if frame.progress == 1 or not (small or time.monotonic() - last >= _FRAME_SECONDS):
                return
            drawn, begun = frame.images()[0], time.monotonic()
            images = [_data_url(image, lossless=small) for image in drawn[: request.n]]
            counts = {"first": frame.candidate, "count": len(drawn), "progress": frame.progress}
            send({"kind": "frame", "run": name, "images": images, **counts})
            last = time.monotonic()
            away += last - begun

        began = time.monotonic()
        with _notes(lambda text: send({"kind": "note", "run": name, "text": text})) as notes:
            ranked = draw(dataclasses.replace(model, on_frame=on_frame), request)
        seconds = time.monotonic() - began - away
        scores = None if ranked.scores is None else [round(float(score), 3) for score in ranked.scores[0]]
        return {
            "kind": "images", "run": name, "images": [_data_url(image) for image in ranked.images[0]],
            "numbers": ranked.numbers[0].tolist(), "scores": scores, "seconds": seconds,
            "drawn": request.candidates or request.n, "compiled": any("ompiling" in note for note in notes),
            "steps": model.prior.decoding_steps(sampling_of(model, request).get("steps")),
        }  # fmt: skip


def draw(model: TextToImage, request: Request) -> Ranked:
    """Draws the images of a request with one model.

    Returns:
      C = 1. Without candidates the scores are None, and image i has the number i.

    Raises:
      UserError: as in the methods of `TextToImage`.
    """
    sampling = sampling_of(model, request) | {"negative": request.negative}
    count = request.candidates or request.n
    if request.candidates and request.candidates < request.n:
        raise ConfigError(
            f"n is {request.n}, but candidates is {request.candidates}: CLIP keeps n of the candidates. Give "
            f"candidates={request.n} or more, or 0 to draw n images without CLIP."
        )
    if request.method == "generate" and request.candidates:
        return model.best_of(request.caption, request.candidates, request.n, request.seed, **sampling)
    if request.method == "generate":
        images = model.generate(request.caption, request.n, request.seed, **sampling)
    else:
        images = request.edit(model).apply(model, request.caption, count, request.seed, **sampling)
    drawn = Ranked(images[None], None, np.arange(count)[None])
    if not request.candidates:
        return drawn
    if model.scorer is None:
        raise ConfigError(
            "CLIP ranks the candidates, but this run was loaded without one: start the page with --clip=DIR."
        )
    scores = model.scorer.score(images, request.caption)
    return dataclasses.replace(drawn, scores=np.asarray(scores)[None]).best(request.n)


def sampling_of(model: TextToImage, request: Request) -> dict[str, Any]:
    """Returns the sampling parameters of a request for one model.

    Parameters that the prior does not have are left out, so that an autoregressive prior can stand next to a MaskGIT
    prior on the page.
    """
    return {name: value for name, value in request.sampling.items() if name not in model.prior.absent_options}


def _ranks_at_once(model: TextToImage) -> bool:
    """Returns whether a model can show the best of many candidates without a long wait."""
    return model.scorer is not None and model.prior.layout.image_length <= _FEW_TOKENS


def _described(name: str, model: TextToImage) -> dict[str, Any]:
    layout = model.prior.layout
    return {
        "name": name, "prior": model.prior.name, "size": model.image_size, "grid": [layout.height, layout.width],
        "edits": [method for method in METHODS if model.prior.any_order or method == "complete"],
        "takesSteps": model.prior.takes_steps, "steps": model.prior.decoding_steps(None), "fit": model.fit,
        "clip": model.scorer is not None, "guidance": bool(model.prior.options.caption_drop),
        "choice": getattr(model.prior.options, "choice_temperature", None),
        "about": f"{model.prior.name} prior, {model.image_size} × {model.image_size} pixels as {layout.height} × "
        f"{layout.width} tokens, step {model.step}",
    }  # fmt: skip


def _examples(models: Sequence[TextToImage]) -> list[str]:
    """Returns a few captions like those of the training, of the first run that knows some."""
    for model in models:
        path = expanded(model.workdir) / "data.json" if model.workdir else None
        try:
            first = json_files.parse(path.read_bytes())["captions"]["first"] if path and path.exists() else []
        except (OSError, ValueError, KeyError, TypeError):
            first = []
        if captions := [text for text in first if isinstance(text, str) and text.strip()]:
            return captions[:_EXAMPLES]
        if model.workdir and workdirs.has_config(model.workdir):  # an export holds no captions of its training data
            if captions := list(known_captions(workdirs.read_config(model.workdir))):
                return captions[:_EXAMPLES]
    return []


@contextlib.contextmanager
def _notes(tell: Callable[[str], None]) -> Iterator[list[str]]:
    """Context that passes the library's warnings of this thread to a function. They say when it compiles, and why.

    Yields:
      The texts so far.
    """
    texts, thread = [], threading.get_ident()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                texts.append(record.getMessage())
                tell(texts[-1])

    handler = Handler(logging.WARNING)
    logging.getLogger("absl").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("absl").removeHandler(handler)


def _data_url(image: np.ndarray, lossless: bool = True) -> str:
    """Encodes an image, uint8 [H, W, 3], as a data URL: PNG, or JPEG if it may lose details."""
    if lossless:
        return "data:image/png;base64," + base64.b64encode(png(image)).decode()
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
