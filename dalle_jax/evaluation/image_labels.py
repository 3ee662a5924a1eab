"""Labels of images, by attribute: the questions that linear probes answer.

| Data                     | Attributes                                                                           |
|--------------------------|--------------------------------------------------------------------------------------|
| `shapes_captions`        | objects, relation, background; shape, color and size of the first and second object  |
| `emoji_captions`         | kind, gender, tone                                                                   |
| folders that are classes | class: see `class_folders.py`                                                        |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle_jax.data.builders.shapes_captions.scenes import Scene
from dalle_jax.data.sources.folder.class_folders import ClassFolders
from dalle_jax.data.sources.record import Record

Labels = dict[str, str | None]  # class by attribute; None if the image has none

_PLACES = ("first", "second")  # of an object, in reading order


def labels_of(record: Record, folders: ClassFolders) -> Labels:
    """Returns the labels of an example.

    Args:
      record: the example. Its image is not read.
      folders: of the data set, which are the classes of an example without labels of another kind.
    """
    if "scene" in record.extra:
        return _of_scene(Scene.from_json(record.extra["scene"]))
    if "sequence" in record.extra:
        return _of_emoji(record.extra)
    return {"class": folders.class_of(record.name)}


def _of_scene(scene: Scene) -> Labels:
    """Returns what the caption states about a scene; an attribute that it leaves open is None."""
    labels = {"objects": str(len(scene.objects)), "relation": scene.relation, "background": scene.background}
    for place, item in zip(_PLACES, scene.objects):
        labels |= {f"{place} {name}": getattr(item, name) for name in ("shape", "color", "size")}
    return labels


def _of_emoji(extra: Mapping[str, Any]) -> Labels:
    name, role, tone = extra["name"], extra["role"], extra["tone"]
    kind = next((each for each in ("flag", "keycap") if name.startswith(f"{each}:")), None)
    kind = kind or ("person" if role else "hand or body" if tone else "thing")
    return {"kind": kind, "gender": extra["gender"] or None, "tone": tone or None}
