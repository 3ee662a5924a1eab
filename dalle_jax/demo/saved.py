"""An image with the manifest that draws it again, as one zip archive.

0000-000.png     the image
manifest.json    for `dalle_jax.jobs.generate.remake("manifest.json", "0000-000.png")`
input.png        of an edit: the given image
mask.png         of an edit with a mask: white where it was drawn again
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from typing import Any

from dalle_jax.configuration.values import finite, natural
from dalle_jax.demo import requests, studio
from dalle_jax.errors import DataError
from dalle_jax.jobs import manifests
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.reporting.images import png
from dalle_jax.storage.checksummed import checksum
from dalle_jax.storage.files import expanded, json_bytes
from dalle_jax.text_to_image.text_to_image import TextToImage

_FILE = manifests.image_name(0, 0)


def archive(models: Mapping[str, TextToImage], given: Any, places: Mapping[str, str] | None = None) -> bytes:
    """Packs an image that the page shows.

    Args:
      models: the models of the page by name.
      given: the JSON object of the page: "request" as for `requests.parse` with one run, "number" of the image among
        those that were drawn, "score" of CLIP or None, and "image", its PNG file in base64.
      places: see `Studio.places`.

    Returns:
      The bytes of the zip archive.

    Raises:
      UserError: see `requests.parse`; or a number out of range.
    """
    if not isinstance(given, Mapping):
        raise DataError("The request to save an image is no JSON object.")
    request = requests.parse(given.get("request"), list(models))
    model, drawn = models[request.runs[0]], request.candidates or request.n
    number = natural("number", given.get("number"), most=drawn - 1)
    sample = {"file": _FILE, "caption": request.caption, "caption_index": 0, "index": number}
    if given.get("score") is not None:
        sample["score"] = finite("score", given["score"])
    edit = None if request.method == "generate" else request.edit(model)
    image = png(requests.decoded(given.get("image")))
    described = manifests.describe_model(model, expanded("."), None)
    place = (places or {}).get(request.runs[0], described["workdir"])
    manifest = {
        **described, "workdir": place, "workdir_from_here": None, "seed": request.seed,
        "sampling": dataclasses.asdict(SamplingOptions(**studio.sampling_of(model, request))),
        "negative": request.negative, "rows_at_once": model.rows_at_once,
        "mesh": {"data": 1} if model.mesh is None else dict(model.mesh.shape), "captions": [request.caption],
        "n": drawn, "samples": [sample], "edit": edit and edit.record(), "sha256": {_FILE: checksum(image)},
    }  # fmt: skip
    files = {_FILE: image, manifests.NAME: json_bytes(manifest), **(edit.files() if edit else {})}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)
    return packed.getvalue()
