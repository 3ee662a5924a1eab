"""Folders of captioned images and tar shards for tests, and tiny overrides of the configs that train on them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

_COLOURS = ("red", "green", "blue", "grey", "pink", "black", "white", "brown")

# Sizes of a tokenizer and of a prior that are traced quickly.
TINY_DVAE = {
    "model.vocab_size": 16,
    "model.hidden": 8,
    "model.codebook_dim": 8,
    "model.blocks_per_group": 1,
    "batch_size": 8,
}
TINY_VQ = {"model.vocab_size": 16, "model.hidden": 8, "model.code_dim": 4, "model.decoder_blocks": 1, "batch_size": 8}
TINY_VQGAN = {
    "model.vocab_size": 16,
    "model.hidden": 8,
    "model.code_dim": 4,
    "model.latent": 8,
    "discriminator.filters": 8,
    "batch_size": 8,
}
TINY_BEIT = TINY_PRIOR = {"model.trunk.width": 16, "model.trunk.depth": 1, "model.trunk.heads": 2}
TINY_CLIP = {f"model.{tower}_{size}": n for tower in ("image", "text") for size, n in
             (("width", 16), ("depth", 1), ("heads", 2))} | {"batch_size": 8}  # fmt: skip


class Trained(Exception):
    """A training would begin now."""


def images(count: int = 24, side: int = 8) -> dict[str, bytes]:
    """Returns PNG images of random pixels with a caption each, by file name."""
    rng, files = np.random.default_rng(0), {}
    for i in range(count):
        written = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(written, "PNG")
        files[f"{i:03}.png"] = written.getvalue()
        files[f"{i:03}.txt"] = f"a {_COLOURS[i % 8]} image number {i}".encode()
    return files


def make_folder(path: Path, count: int = 24) -> str:
    """Writes `images` into a new folder and returns its name."""
    path.mkdir(parents=True)
    for name, content in images(count).items():
        (path / name).write_bytes(content)
    return str(path)


def make_shards(path: Path, count: int = 24) -> str:
    """Writes `images` as one tar shard with a parquet file next to it, as img2dataset does; returns the folder."""
    path.mkdir(parents=True)
    with tarfile.open(path / "00000.tar", "w") as archive:
        for name, content in images(count).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (path / "00000.parquet").write_bytes(b"PAR1")
    (path / "00000_stats.json").write_text("{}")
    return str(path)
