"""Captions of the data sets that this package draws itself: examples for model cards and for the page in a browser.

Captions of other data sets are not copied into an export, because they may be private.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CAPTIONS = {
    "shapes_captions": (
        "a red circle above a blue square",
        "a purple diamond left of a yellow cross on a gray background",
        "a large yellow triangle above a large red cross, a black background",
        "a green triangle left of an orange circle on a white background",
    ),
    "emoji_captions": ("red heart", "woman running", "thumbs up: medium skin tone", "man in tuxedo: dark skin tone"),
}


def known_captions(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Returns a few captions that a model can draw, from the data set of its training.

    Args:
      config: configuration of the training, or None.

    Returns:
      The captions; () for an unknown data set.
    """
    data = (config or {}).get("data")
    return CAPTIONS.get(str(data.get("source")), ()) if isinstance(data, Mapping) else ()
