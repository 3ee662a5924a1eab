"""Reads a CSV table so that a fault costs one row.

The `csv` module of Python accepts an unclosed quote and puts the following rows into one cell. Here such a row is
reported, and reading continues at the next line. A quoted cell may hold several lines, unless one of them is a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

_DELIMITERS = (",", ";", "\t")
_UNCLOSED = "a quote is not closed, or a text follows it"
_LINE_END = re.compile(r"\r\n|\r|\n")
_PATTERNS = {
    delimiter: (
        re.compile(rf' *+"([^"]*+(?:""[^"]*+)*+)" *+(?=[{delimiter}\r\n]|\Z)'),
        re.compile(rf"[^{delimiter}\r\n]*+"),
    )
    for delimiter in _DELIMITERS
}


class CsvRow(NamedTuple):
    """A row of a table.

    Attributes:
      line: the line where it begins, from 1.
      cells: its cells by column, in lower case; absent ones, and those after a fault, are empty.
      fault: what is wrong with it, or "".
    """

    line: int
    cells: dict[str, str]
    fault: str


def csv_rows(text: str, known: Collection[str], is_file: Callable[[str], bool]) -> Iterator[CsvRow]:
    """Yields the rows of a CSV table.

    The first line names the columns. The delimiter is the one of comma, semicolon and tab that finds most known columns
    in it. Blanks around cells and empty cells after the last column are dropped.

    Args:
      text: the table.
      known: names of columns that are expected, in lower case.
      is_file: whether a cell names an image, so that a line inside quotes is recognised as a row.

    Yields:
      Every row that is not empty.
    """
    lines = _line_starts(text)
    if not lines:
        return
    delimiter = max(_DELIMITERS, key=lambda each: len(set(_columns(text, lines[0], each)) & set(known)))
    columns = _columns(text, lines[0], delimiter)
    if not columns:
        yield CsvRow(1, {}, _UNCLOSED)
        return
    number = 1
    while number < len(lines):
        cells, end, fault = _record(text, lines[number], delimiter)
        following = number + 1
        while not fault and following < len(lines) and lines[following] < end:
            inner, _, _ = _record(text, lines[following], delimiter)
            if len(inner) == len(columns) and any(map(is_file, inner)):
                fault = _UNCLOSED
            following += 1
        while len(cells) > len(columns) and not cells[-1]:
            cells.pop()
        if not fault and len(cells) > len(columns):
            fault = f"{len(cells)} cells for {len(columns)} columns: put quotes around a text with {delimiter!r} in it"
        if fault or any(cells):
            yield CsvRow(number + 1, dict.fromkeys(columns, "") | dict(zip(columns, cells)), fault)
        number = number + 1 if fault else following


def _line_starts(text: str) -> list[int]:
    starts = [0, *(match.end() for match in _LINE_END.finditer(text))]
    return [start for start in starts if start < len(text)]


def _columns(text: str, start: int, delimiter: str) -> list[str]:
    cells, _, fault = _record(text, start, delimiter)
    return [] if fault else [cell.lower() for cell in cells]


def _record(text: str, start: int, delimiter: str) -> tuple[list[str], int, str]:
    """Reads the row that begins at a position.

    Returns:
      cells: the cells before the fault, if there is one.
      end: the position after the last cell.
      fault: what is wrong, or "".
    """
    quoted, plain = _PATTERNS[delimiter]
    cells, at = [], start
    while True:
        if found := quoted.match(text, at):
            cells.append(found[1].replace('""', '"'))
        else:
            found = plain.match(text, at)
            cell = found[0].strip()
            if cell.startswith('"'):
                return cells, found.end(), _UNCLOSED
            cells.append(cell)
        at = found.end()
        if at == len(text) or text[at] in "\r\n":
            return cells, at, ""
        at += 1
