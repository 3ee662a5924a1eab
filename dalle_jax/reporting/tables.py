"""Nested metrics and configurations as text, as CSV and as JSON files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml
from etils import epath

from dalle_jax.storage.files import write_json

# A spreadsheet takes a cell that begins with one of these for a formula; the last four are full-width.
_FORMULA = tuple("=+-@\t\n＝＋－＠")


def save_json(path: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON, floats with six significant digits; see `write_json`."""
    write_json(path, _rounded(values))


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Formats rows as CSV.

    Args:
      rows: cells of each row. Floats get six significant digits. A text that a spreadsheet would take for a formula
        gets an apostrophe in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").replace("\r", "\n")  # the writer quotes only line feeds
        return f"'{value}" if value.startswith(_FORMULA) else value
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


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
