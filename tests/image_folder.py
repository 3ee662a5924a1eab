"""Folders of tiny images for tests of the folder reader, and short forms of what it finds."""

import io
import json
import pathlib

import PIL.Image

from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.source import DataOptions


def png() -> bytes:
    """Returns a PNG of 2×2 pixels."""
    written = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), (255, 0, 0)).save(written, "PNG")
    return written.getvalue()


_PNG = png()


def fill(root: pathlib.Path, images: str, texts: dict | None = None) -> pathlib.Path:
    """Writes images by their names, separated by blanks, and other files with their content. Lists become JSONL."""
    files = {name: _PNG for name in images.split()} | (texts or {})
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(f"{json.dumps(row)}\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return root


def opened(root, split: str = "all", **options) -> FolderSource:
    """Opens a folder with options of `DataOptions`."""
    return FolderSource(root, split, DataOptions(source="folder", path=str(root), **options))


def names(source) -> list[str]:
    """Returns the names of a source's images in order."""
    return [source.record(index).name for index in range(len(source))]


def captions(source) -> dict[str, list]:
    """Returns the captions of each image, as text if they are UTF-8."""
    found = {}
    for index in range(len(source)):
        record = source.record(index)
        found[record.name] = [c.decode() if isinstance(c, bytes) else c for c in record.captions]
    return found


def left_out(source) -> dict[str, int]:
    """Returns how many are left out, by reason."""
    return {found.reason: found.count for found in source.left_out}


def labels(source) -> str:
    """Returns the names of everything that is left out."""
    return ", ".join(name for found in source.left_out for name in found.names)
