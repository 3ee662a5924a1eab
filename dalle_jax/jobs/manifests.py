"""The manifest of generated images: the model that drew them, how to draw each again, and which files are its images.

    <folder>/manifest.json              written last: if it exists, all its images do
    <folder>/manifest.unfinished.json   the images of a run that is not finished, or was killed

A manifest may come from a stranger. A file is removed only if it has the name of an image that this job writes, stands
in the folder itself, is no link, and holds the bytes whose SHA-256 the manifest records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.errors import DataError
from dalle_jax.pytree import fingerprint
from dalle_jax.storage import hub, json_files
from dalle_jax.storage.checksummed import checksum
from dalle_jax.storage.files import expanded, full_path, is_regular_file, is_remote, write_errors, write_json
from dalle_jax.text_to_image.text_to_image import TextToImage

NAME, _UNFINISHED = "manifest.json", "manifest.unfinished.json"
_IMAGE = re.compile(r"[0-9]{4,}-[0-9]{3,}\.png")
# The fields that `read` checks: their types, and the type of the elements of a list.
_FIELDS: dict[str, tuple[type, ...]] = {
    "workdir": (str,), "step": (int, str), "seed": (int,), "n": (int,), "rows_at_once": (int,), "sampling": (dict,),
    "negative": (str, type(None)), "captions": (list,), "samples": (list,), "mesh": (dict,), "fingerprints": (dict,),
    "weights": (str, type(None)), "edit": (dict, type(None)), "upsampler": (dict, type(None)),
}  # fmt: skip
_UPSAMPLER_FIELDS = {name: _FIELDS[name] for name in ("workdir", "step", "fingerprints", "sampling")}
# Earlier versions did not write these.
_LATER_FIELDS = {"negative": None, "mesh": {"data": 1}, "fingerprints": {}, "weights": None, "edit": None}
_LATER_FIELDS |= {"upsampler": None}
_LATER_UPSAMPLER_FIELDS = {"sampling": {}}
_SAMPLE = {"file": str, "caption_index": int, "index": int}
_AXES = {"data", "fsdp", "tensor"}


def image_name(caption: int, place: int) -> str:
    """Returns the file name of an image of a caption, "0001-002.png"."""
    return f"{caption:04d}-{place:03d}.png"


# -- the files of a folder ----------------------------------------------------------------------------------------


def begin(out: epath.Path, images: Mapping[str, bytes]) -> None:
    """Records the images that are about to be written, and removes those of earlier runs, finished or not.

    Args:
      out: the folder.
      images: content of each image by file name.

    Raises:
      UserError: a file cannot be written or removed.
    """
    earlier = _recorded(out)
    owned = {(name, digest) for name, digest in earlier if _is_ours(out / name, digest)}
    write_json(out / _UNFINISHED, {"images": sorted(owned | {(name, checksum(data)) for name, data in images.items()})})
    with write_errors(out / NAME):
        (out / NAME).unlink(missing_ok=True)
        for name, _ in owned:
            (out / name).unlink(missing_ok=True)
    left = sorted({name for name, _ in earlier if name not in images and (out / name).exists()})
    if left:
        logging.warning(
            "%d images of an earlier manifest stay, such as %s: they have changed, or an old version wrote them.",
            len(left),
            out / left[0],
        )


def finish(out: epath.Path, manifest: Mapping[str, Any], images: Mapping[str, bytes]) -> None:
    """Writes the manifest, with the SHA-256 of each image. All images must have been written.

    Args:
      out: the folder.
      manifest: its other fields.
      images: content of each image by file name.

    Raises:
      UserError: a file cannot be written or removed.
    """
    write_json(out / NAME, {**manifest, "sha256": {name: checksum(data) for name, data in images.items()}})
    with write_errors(out / _UNFINISHED):
        (out / _UNFINISHED).unlink(missing_ok=True)


def _recorded(out: epath.Path) -> set[tuple[str, str]]:
    """Returns the file name and the SHA-256, or "", of each image that a record in the folder lists."""
    manifest, unfinished = _parsed(out / NAME), _parsed(out / _UNFINISHED)
    pairs: list[Any] = []
    if manifest is not None:
        digests, samples = manifest.get("sha256"), manifest.get("samples")
        pairs += digests.items() if isinstance(digests, dict) else []
        if not pairs and isinstance(samples, list):  # an earlier version wrote it
            pairs += [(sample.get("file"), "") for sample in samples if isinstance(sample, dict)]
    if unfinished is not None and isinstance(unfinished.get("images"), list):
        pairs += [pair for pair in unfinished["images"] if isinstance(pair, list) and len(pair) == 2]
    texts = [(name, digest) for name, digest in pairs if isinstance(name, str) and isinstance(digest, str)]
    return {(name, digest) for name, digest in texts if _IMAGE.fullmatch(name)}


def _parsed(path: epath.Path) -> dict[str, Any] | None:
    """Returns the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json_files.parse(path.read_bytes()) if is_regular_file(path) else None
    except (OSError, ValueError):
        return None


def _is_ours(path: epath.Path, digest: str) -> bool:
    """Returns whether a file is no link and has this SHA-256."""
    linked = not is_remote(path) and os.path.islink(path)
    return bool(digest) and not linked and is_regular_file(path) and checksum(path.read_bytes()) == digest


# -- the model ----------------------------------------------------------------------------------------------------


def describe_model(model: TextToImage, out: epath.Path, clip: str | None) -> dict[str, Any]:
    """Returns the fields that name a model, so that it is found from any directory and recognised.

    Args:
      model: the model.
      out: folder of the manifest.
      clip: folder of the CLIP that ranked the images; None if none did.
    """
    workdir, here = full_path(model.workdir), full_path(out)
    local = not is_remote(workdir) and not is_remote(here)
    return {
        "workdir": str(workdir),
        "workdir_from_here": os.path.relpath(workdir, here) if local else None,
        "step": model.step,
        "weights": model.weights,
        "clip": clip and str(full_path(clip)),
        "fingerprints": fingerprints(model) | ({"clip": model.scorer.fingerprint()} if clip and model.scorer else {}),
    }


def fingerprints(model: TextToImage) -> dict[str, str]:
    """Hashes all that decides an image: the prior, the image tokenizer, and the models of its condition."""
    path = workdirs.text_model_path(model.workdir)
    found = {"prior": model.fingerprint(), "image_tokenizer": fingerprint(model.tokenizer_params)}
    if path.exists():
        found["text_model"] = checksum(path.read_bytes())[:16]
    if (params := getattr(model.text_model, "params", None)) is not None:
        found["model_of_the_condition"] = fingerprint(params)
    return found


def workdir_of(record: Mapping[str, Any], manifest: epath.PathLike) -> str:
    """Returns the workdir of the model of a manifest: where it was, or the same way from the folder of the manifest.

    An address on a hub is returned without looking.

    Args:
      record: the manifest, from `read`.
      manifest: its path.

    Raises:
      DataError: there is none.
    """
    places, relative = [record["workdir"]], record.get("workdir_from_here")
    if isinstance(relative, str):
        places.append(os.path.normpath(str(full_path(manifest).parent / relative)))
    for place in places:
        if hub.is_hub(place) or workdirs.has_config(place):
            return place
    raise DataError(
        f"The model of {manifest} is not in {' or '.join(map(repr, dict.fromkeys(places)))}. Give model_workdir=DIR, "
        "the workdir of the prior that drew the images."
    )


def check_model(model: TextToImage, record: Mapping[str, Any], manifest: epath.PathLike) -> None:
    """Raises a DataError if a model is not the one that drew the images of a manifest."""
    for part, found in fingerprints(model).items():
        if found != record["fingerprints"].get(part, found):
            raise DataError(
                f"{model.workdir}, step {model.step}, is not the model that drew the images of {manifest}: its "
                f"{part.replace('_', ' ')} is another one. Give model_workdir=DIR, the workdir of that prior."
            )


# -- reading ------------------------------------------------------------------------------------------------------


def read(manifest: epath.PathLike) -> dict[str, Any]:
    """Reads a manifest.

    Returns:
      Its fields, those that an earlier version did not write with their defaults.

    Raises:
      DataError: there is no such file, or it is not a manifest.
    """
    path = expanded(manifest)
    if not is_regular_file(path):
        raise DataError(f"There is no manifest {manifest}; expected the path of a manifest.json that generate wrote.")
    record = _parsed(path)
    if record is None:
        raise DataError(f"{manifest} is damaged, or not the manifest of generated images.")
    record = {**_LATER_FIELDS, **record}
    wrong = _wrong(record, _FIELDS)
    if wrong is None and record["upsampler"] is not None:
        record["upsampler"] = {**_LATER_UPSAMPLER_FIELDS, **record["upsampler"]}
        wrong = _wrong(record["upsampler"], _UPSAMPLER_FIELDS) and "upsampler"
    if wrong is None and not all(isinstance(caption, str) for caption in record["captions"]):
        wrong = "captions"
    if wrong is None and not all(map(_is_sample, record["samples"])):
        wrong = "samples"
    if wrong is None and not (
        record["mesh"].keys() <= _AXES and all(type(n) is int and n > 0 for n in record["mesh"].values())
    ):
        wrong = "mesh"
    if wrong is not None:
        raise DataError(f"{manifest} is damaged, or not the manifest of generated images: see its field {wrong!r}.")
    return record


def _wrong(record: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> str | None:
    """Returns the first field that is missing or has another type, or None."""
    return next((name for name, kinds in fields.items() if type(record.get(name)) not in kinds), None)


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, dict) and all(type(sample.get(name)) is kind for name, kind in _SAMPLE.items())
