"""Retrieval among a few: how often an image finds its caption, and a caption its image.

n examples    E embedding    T text positions
"""

from __future__ import annotations

import numpy as np

AMONG = 64


def retrieval(images: np.ndarray, captions: np.ndarray, text: np.ndarray, among: int = AMONG) -> dict[str, float]:
    """Computes retrieval@1 within consecutive groups of `among` examples.

    Captions with the same ids are one caption. Each of them, and each of their images, counts as right.

    Args:
      images, captions: unit vectors, float [n, E]. Row i of `captions` describes row i of `images`.
      text: int [n, T], the captions' ids.
      among: examples in a group. Examples after the last whole group are not used. If n is smaller, all n examples are
        one group.

    Returns:
      "image_to_text@1", "text_to_image@1", their mean "retrieval@1", and the size of a group, "among".
    """
    among = min(among, len(images))
    right = np.zeros(2)
    groups = len(images) // among
    for start in range(0, groups * among, among):
        rows = slice(start, start + among)
        similarity, ids = images[rows] @ captions[rows].T, text[rows]
        for direction, found in enumerate((similarity.argmax(1), similarity.argmax(0))):
            right[direction] += (ids[found] == ids).all(1).sum()
    to_text, to_image = (float(x) / (groups * among) for x in right)
    return {
        "retrieval@1": (to_text + to_image) / 2,
        "image_to_text@1": to_text,
        "text_to_image@1": to_image,
        "among": float(among),
    }
