"""Makes class folders of the clip art of the Debian package `openclipart-png`, for BEiT's ablation.

    python experiments/clipart_classes.py --output DIR

    DIR/classes/train/CLASS/*.png, DIR/classes/val/CLASS/*.png    at most 400 images of each of twelve classes
    DIR/all/*.png                                                 all images but those of `val`, for pre-training

A fifth of each class is in `val`. The hash of a file's path decides which images are chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path("/usr/share/openclipart/png")
CLASSES = (
    "animals", "computer", "food", "geography", "office", "people", "plants", "recreation", "shapes",
    "signs_and_symbols", "tools", "transportation",
)  # fmt: skip
_MOST, _EVERY = 400, 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    output = parser.parse_args(arguments).output
    if not SOURCE.is_dir():
        parser.error(f"{SOURCE} does not exist: apt-get install openclipart-png")
    if output.exists():
        parser.error(f"--output={output} exists: give a new folder")
    for folder in sorted(path for path in SOURCE.iterdir() if path.is_dir()):
        files = sorted(folder.rglob("*.png"), key=lambda file: hashlib.md5(str(file).encode()).hexdigest())
        for i, file in enumerate(files):
            labelled = folder.name in CLASSES and i < _MOST
            split = "val" if labelled and i % _EVERY == 0 else "train"
            places = [output / "classes" / split / folder.name] if labelled else []
            places += [output / "all"] if split == "train" else []
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / "__".join(file.relative_to(SOURCE).parts))
    counts = {name: len(list((output / name).rglob("*.png"))) for name in ("classes/train", "classes/val", "all")}
    print(", ".join(f"{name}: {count} images" for name, count in counts.items()))


if __name__ == "__main__":
    main()
