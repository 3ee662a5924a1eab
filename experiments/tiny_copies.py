"""Writes tiny data sets in the layouts of the real ones, for tests, short runs, and as examples of the layouts.

    python experiments/tiny_copies.py --output DIR

Each function writes a few small images with captions into a folder and returns the folder. File names and tables are
those of the official archives or of img2dataset.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 60)}
SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani")


def image(number: int, size: tuple[int, int] = (72, 60), kind: str = "JPEG") -> bytes:
    """Returns an encoded image of one colour with some noise.

    Args:
      number: selects the colour and seeds the noise.
      size: width and height.
      kind: one of Pillow's formats.
    """
    noise = np.random.default_rng(number).integers(-20, 20, (size[1], size[0], 3))
    pixels = np.clip(noise + list(COLORS.values())[number % len(COLORS)], 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def caption(number: int, version: int) -> str:
    """Returns one of several captions of an image."""
    return f"A {list(COLORS)[number % len(COLORS)]} image, number {number}, caption {version}."


def coco(root: Path, year: int = 2014, train: int = 8, val: int = 4) -> Path:
    """Writes MS-COCO as its archives unpack (`train<year>.zip`, …), with five captions per image."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    first = 0
    for split, count in (("train", train), ("val", val)):
        folder = f"{split}{year}"
        (root / folder).mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(first, first + count):
            key = 9 + 16 * number
            prefix = f"COCO_{folder}_" if year == 2014 else ""
            name = f"{prefix}{key:012}.jpg"
            (root / folder / name).write_bytes(image(number))
            images.append({"license": 5, "file_name": name, "height": 60, "width": 72, "id": key, "coco_url": ""})
            annotations += [
                {"image_id": key, "id": 1000 * version + key, "caption": caption(number, version)}
                for version in range(5)
            ]
        # The official files are not sorted.
        content = {"info": {"year": year}, "images": images[::-1], "licenses": [], "annotations": annotations[::-1]}
        (root / "annotations" / f"captions_{folder}.json").write_text(json.dumps(content))
        first += count
    return root


def cub(root: Path, per_species: int = 4) -> Path:
    """Writes CUB-200-2011 as its archive unpacks, with four species, and the captions of Reed et al. next to it."""
    data, reed = root / "CUB_200_2011", root / "cvpr2016_cub"
    names = [
        f"{species}/{species.split('.')[1]}_{number + 1:04}_{796000 + number}.jpg"
        for species in SPECIES
        for number in range(per_species)
    ]
    for number, name in enumerate(names):
        for file, content in (
            (data / "images" / name, image(number)),
            (
                (reed / "text_c10" / name).with_suffix(".txt"),
                "".join(f"{caption(number, version)}\n" for version in range(10)).encode(),
            ),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    rows = range(1, len(names) + 1)
    tables = {
        "images.txt": [f"{row} {names[row - 1]}" for row in rows],
        "classes.txt": [f"{row} {species}" for row, species in enumerate(SPECIES, 1)],
        "image_class_labels.txt": [f"{row} {(row - 1) // per_species + 1}" for row in rows],
        "bounding_boxes.txt": [f"{row} {float(row)} 2.0 40.0 30.0" for row in rows],
        "train_test_split.txt": [f"{row} {row % 2}" for row in rows],
    }
    for name, lines in tables.items():
        (data / name).write_text("".join(f"{line}\n" for line in lines))
    for name, species in (("trainvalclasses.txt", SPECIES[:3]), ("testclasses.txt", SPECIES[3:])):
        (reed / name).write_text("".join(f"{each}\n" for each in species))
    return root


def sample(number: int, ending: str = "jpg") -> dict[str, bytes]:
    """Returns the files of one sample by ending, as img2dataset writes them."""
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending]
    text = caption(number, 0)
    facts = {"caption": text, "url": f"http://images/{number}", "key": f"{number:09}", "status": "success"}
    return {ending: image(number, kind=kind), "txt": text.encode(), "json": json.dumps(facts).encode()}


def write_tar(file: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Writes a tar of the members, in order. As in WebDataset, the times need an extended header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1700000000.25
            archive.addfile(entry, io.BytesIO(content))
    return file


def tar_shards(root: Path, shards: int = 2, samples: int = 10, ending: str = "jpg") -> Path:
    """Writes shards like img2dataset: `00000.tar` with `000000000.jpg`, `.txt` and `.json`."""
    for shard in range(shards):
        keys = range(10000 * shard, 10000 * shard + samples)
        members = [(f"{key:09}.{end}", content) for key in keys for end, content in sample(key, ending).items()]
        write_tar(root / f"{shard:05}.tar", members)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    for folder in (coco(output / "coco"), cub(output / "cub"), tar_shards(output / "tar_shards")):
        print(folder)


if __name__ == "__main__":
    main()
