"""The job of `configs/generate.py`: draws captions as PNGs, with a grid and a manifest to draw each image again.

python -m dalle_jax.main --config=configs/generate.py --config.model_workdir=DIR --config.prompts="a red circle"
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.checkpoints.downloaded import local
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.values import natural
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.jobs import edits, manifests
from dalle_jax.jobs.checks import MOST_IMAGES, check_drawing
from dalle_jax.priors.decoding_weights import check_weights
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.reporting.images import image_grid, png, save_png
from dalle_jax.storage.files import check_writable, expanded, is_regular_file, write_file
from dalle_jax.text_to_image.best_of_n import Ranked
from dalle_jax.text_to_image.sampling_parameters import parse
from dalle_jax.text_to_image.text_to_image import TextToImage


def run(config: ConfigDict, workdir: str) -> None:
    """Writes one PNG per sample, `grid.png`, and last `manifest.json`.

    A run that is killed leaves nothing that the next run into the same folder does not remove.

    Args:
      config: see `configs/generate.py`.
      workdir: the folder of the results.

    Raises:
      UserError: a file cannot be written; see also `check` and `TextToImage.load`.
    """
    captions, options, enlarging, mesh = check(config, workdir)
    sampling = {"negative": config.negative or None, **dataclasses.asdict(options)}
    out = expanded(workdir)
    model = TextToImage.load(
        config.model_workdir, config.step, config.rows_at_once, config.clip, mesh, config.base, config.weights
    )
    upsampler = _load_upsampler(config.upsampler, None, config.rows_at_once, mesh) if config.upsampler else None
    if config.candidates:
        ranked = model.best_of(captions, config.candidates, config.n, config.seed, **sampling)
    else:
        images = model.generate(captions, config.n, config.seed, **sampling)
        ranked = Ranked(images, None, np.tile(np.arange(config.n), (len(captions), 1)))
    enlarged_by = None
    if upsampler is not None:
        how = dataclasses.asdict(enlarging)
        enlarged_by = {**manifests.describe_model(upsampler, out, None), "sampling": how}
        small = ranked.images.reshape(-1, *ranked.images.shape[2:])
        texts = np.repeat(captions, config.n).tolist()
        large = upsampler.upsample(small, texts, config.seed, **how)
        ranked = dataclasses.replace(ranked, images=large.reshape(*ranked.images.shape[:2], *large.shape[1:]))
    images = {
        manifests.image_name(i, j): png(ranked.images[i, j]) for i in range(len(captions)) for j in range(config.n)
    }
    manifests.begin(out, images)
    for name, content in images.items():
        write_file(out / name, content)
    shown = min(config.n, 8)
    save_png(out / "grid.png", image_grid([(c, ranked.images[i, :shown]) for i, c in enumerate(captions[:16])]))
    clip = (local(config.clip) or model.workdir) if config.candidates else None
    manifest = {
        **manifests.describe_model(model, out, clip),
        "upsampler": enlarged_by,
        "seed": config.seed, "sampling": dataclasses.asdict(options), "negative": config.negative or None,
        "rows_at_once": config.rows_at_once, "mesh": dict(mesh.shape), "captions": captions,
        "n": config.candidates or config.n, "samples": _samples(captions, ranked),
    }  # fmt: skip
    manifests.finish(out, manifest, images)
    print(f"Wrote {len(images)} images, grid.png and manifest.json to {out}")


def check(config: ConfigDict, workdir: str) -> tuple[list[str], SamplingOptions, SamplingOptions, Mesh]:
    """Rejects whatever can be rejected before the model is loaded, and creates `workdir`.

    Returns:
      The captions, the sampling parameters of the prior and of the upsampler, and the mesh.

    Raises:
      ConfigError: a value out of range, `negative` without guidance, sampling parameters of an upsampler without one,
        or a `workdir` that cannot be written.
      DataError: no captions.
      MeshError: the mesh does not fit the devices.
    """
    captions = read_captions(config)
    options = from_config(SamplingOptions, config.sampling, "sampling")
    parse({"negative": config.negative or None, **dataclasses.asdict(options)})
    enlarging = from_config(SamplingOptions, config.upsampler_sampling, "upsampler_sampling")
    parse(dataclasses.asdict(enlarging))
    if not config.upsampler and enlarging != SamplingOptions():
        raise ConfigError(
            "config.upsampler_sampling is set, and no upsampler is given: set --config.upsampler=DIR, or leave "
            "config.upsampler_sampling as it is."
        )
    check_drawing(config)
    check_weights(config.weights)
    natural("config.n", config.n, 1, MOST_IMAGES)
    natural("config.candidates", config.candidates, 0, MOST_IMAGES)
    if 0 < config.candidates < config.n:
        raise ConfigError(
            f"config.n is {config.n}, but config.candidates is {config.candidates}: CLIP keeps n of the candidates. "
            f"Give --config.candidates={config.n} or more, or 0 to draw n images without CLIP."
        )
    mesh = local_mesh(**config.mesh)
    check_writable(workdir)
    return captions, options, enlarging, mesh


def _load_upsampler(workdir: str, step: int | None, rows_at_once: int, mesh: Mesh | None) -> TextToImage:
    """Loads a prior that enlarges images; raises a `ConfigError` if it is another kind."""
    model = TextToImage.load(workdir, step, rows_at_once, mesh=mesh)
    if model.prior.layout.condition.reads_requests:
        raise ConfigError(
            f"config.upsampler={workdir!r} draws images given {model.prior.layout.condition!r}, and enlarges none. "
            "Give the workdir of configs/maskgit.py:upsample."
        )
    return model


def _samples(captions: Sequence[str], ranked: Ranked) -> list[dict[str, Any]]:
    """Describes each image: its file, its caption, its number among those drawn, and its score if it was ranked."""
    entries = []
    for i, caption in enumerate(captions):
        for j, number in enumerate(ranked.numbers[i]):
            file = manifests.image_name(i, j)
            entry = {"file": file, "caption": caption, "caption_index": i, "index": int(number)}
            entries.append(entry if ranked.scores is None else entry | {"score": float(ranked.scores[i, j])})
    return entries


def remake(manifest: str, file: str, model_workdir: str | None = None) -> np.ndarray:
    """Draws one image of a manifest again, bit for bit on the same kind and number of devices.

    The manifest is one of this job, or of an image that was saved on the page of `dalle_jax.demo`.

    Args:
      manifest: path of a `manifest.json`.
      file: file name of a sample in it.
      model_workdir: workdir of the prior that drew the images. None looks where it was, first by its absolute path,
        then from the folder of the manifest.

    Returns:
      uint8 [H, W, 3].

    Raises:
      DataError: the manifest is missing or damaged, does not list that file, or its model is not found or has changed.
      UserError: see `TextToImage.load`.
    """
    record = manifests.read(manifest)
    entry = next((sample for sample in record["samples"] if sample["file"] == file), None)
    if entry is None:
        raise DataError(f"{manifest} lists no sample {file!r}; it has {len(record['samples'])} samples.")
    if math.prod(record["mesh"].values()) <= jax.local_device_count():
        mesh = local_mesh(**record["mesh"])
    else:
        mesh = None
        logging.warning(
            "%s was drawn on more devices than this host has. A pixel may be rounded differently.", manifest
        )
    workdir = model_workdir or manifests.workdir_of(record, manifest)
    model = TextToImage.load(workdir, record["step"], record["rows_at_once"], mesh=mesh, weights=record["weights"])
    manifests.check_model(model, record, manifest)
    sampling = {"negative": record["negative"], **record["sampling"]}
    i, j = entry["caption_index"], entry["index"]
    if record["edit"] is not None:
        edit = edits.read(record["edit"], expanded(manifest).parent)
        return edit.apply(model, record["captions"][i], record["n"], record["seed"], **sampling)[j]
    image = model.generate_one(record["captions"], record["n"], i, j, record["seed"], **sampling)
    if record["upsampler"] is None:
        return image
    found = record["upsampler"]
    upsampler = _load_upsampler(manifests.workdir_of(found, manifest), found["step"], record["rows_at_once"], mesh)
    manifests.check_model(upsampler, found, manifest)
    return upsampler.upsample(image, record["captions"][i], record["seed"], **found["sampling"])[0]


def read_captions(config: ConfigDict) -> list[str]:
    """Returns the captions of `config.prompts` (separated by "|"), or the lines of the file `config.prompts_file`.

    Raises:
      DataError: neither or both are set, a caption is empty, or the file cannot be read or is empty.
    """
    if bool(config.prompts) == bool(config.prompts_file):
        raise DataError(
            "Give captions by --config.prompts='a red circle|a blue square' or by --config.prompts_file=FILE."
        )
    if config.prompts:
        captions = [part.strip() for part in config.prompts.split("|")]
        if "" in captions:
            raise DataError(
                f"config.prompts={config.prompts!r} has an empty caption; expected one between each two '|'."
            )
        return captions
    path = expanded(config.prompts_file)
    try:
        if not is_regular_file(path):
            found = "is not a text file" if path.exists() else "does not exist"
            raise DataError(f"config.prompts_file={str(path)!r} {found}; expected a file with one caption per line.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"config.prompts_file={str(path)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"config.prompts_file={str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8 text with one "
            "caption per line."
        ) from error
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    if not captions:
        raise DataError(f"{path} holds no caption; expected one per line.")
    return captions
