"""Nested metrics and configurations as text and as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from etils import epath


def save_json(path: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON, floats with six significant digits."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(values), indent=2) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return value


def table(values: Mapping[str, Any]) -> str:
    """Formats nested metrics as aligned lines, "section.name   value"."""
    flat: list[tuple[str, str]] = []

    def walk(prefix: str, section: Mapping[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            else:
                flat.append((f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)))

    walk("", _rounded(values))
    width = max((len(name) for name, _ in flat), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in flat)


def plain_text(values: Mapping[str, Any]) -> str:
    """Formats a nested mapping as YAML of plain values: no tags, and one line for each innermost section.

    Args:
      values: for instance a configuration, as `ConfigDict.to_dict()` gives it. Tuples are written as lists.
    """
    plain = json.loads(json.dumps(values, default=str))
    return yaml.safe_dump(plain, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110)
