"""Compares the variants that are named after papers with these papers: "paper says / we have / why not".

    python experiments/papers.py                                            # prints the tables
    python experiments/papers.py --output experiments/results/papers.md     # writes them, after a config changed

The column "we have" is read from the configs. `paper_rows.py` has the other two. A row without a reason has the paper's
value. The tests fail if that is not so, if a config has a key that no row reads, or if the written tables are old.
`paper_notes.py` has the differences that no option changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from paper_notes import NOTES
from paper_rows import TABLES as OF_GENERATORS
from paper_rows import Row
from paper_rows_beit import TABLES as OF_BEIT

from dalle_jax.configuration import config_files

ROOT = Path(__file__).resolve().parent.parent
TABLES = OF_GENERATORS | OF_BEIT
WRITTEN = ROOT / "experiments" / "results" / "papers.md"

# Sections of a configuration that a paper could speak of. Of `data`, these are image_size, augment and bpe_dropout.
SECTIONS = ("model", "objective", "negatives", "optimizer", "schedules", "ema", "text", "batch_size", "steps")
# Keys inside of them that say how to compute the same numbers, or where a file is.
NOT_IN_PAPERS = {
    "model.trunk.remat",
    "model.trunk.scan",
    "model.trunk.attention_kernel",
    "model.attention_kernel",
    "optimizer.accumulate_steps",
    "text.path",
}


def load(target: str) -> ConfigDict:
    """Returns the configuration of a target such as "dvae.py:paper"."""
    return config_files.load(str(ROOT / "configs" / target))


def keys_of(config: ConfigDict) -> set[str]:
    """Returns the dotted keys that a table has to read. A schedule is one key."""

    def flat(prefix: str, value: Any) -> set[str]:
        if not isinstance(value, ConfigDict) or not value or "kind" in value:
            return {prefix}
        return set().union(*(flat(f"{prefix}.{name}", value[name]) for name in value))

    found = set().union(*(flat(name, config[name]) for name in SECTIONS if name in config))
    data = {"data.image_size", "data.augment"} | ({"data.bpe_dropout"} if "text" in config else set())
    return (found | data) - NOT_IN_PAPERS


def value_of(config: ConfigDict, key: str) -> Any:
    """Returns the value of a dotted key.

    Raises:
      KeyError: the configuration has no such key.
    """
    value = config
    for name in key.split("."):
        value = value[name]
    return value.to_dict() if isinstance(value, ConfigDict) else value


def shown(value: Any) -> str:
    """Formats a value as the tables have it."""
    if isinstance(value, Mapping):
        return SCHEDULES[value["kind"]](value) if "kind" in value else ", ".join(value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return f"{value:,}" if isinstance(value, int) else str(value)


SCHEDULES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "constant": lambda s: shown(s["value"]),
    "cosine": lambda s: f"{shown(s['start'])} to {shown(s['end'])}, cosine, {shown(s['steps'])} updates",
    "warmup_constant": lambda s: f"0 to {shown(s['value'])} in {shown(s['warmup_steps'])} updates, then constant",
    "warmup_cosine": lambda s: (
        f"0 to {shown(s['peak'])} in {shown(s['warmup_steps'])} updates, "
        f"cosine to {shown(s['end'])} at {shown(s['steps'])}"
    ),
}


def have(row: Row, config: ConfigDict) -> str:
    """Returns what a configuration has for a row.

    Raises:
      KeyError: the configuration has no key of the row.
    """
    values = [value_of(config, key) for key in row.keys.split()]
    return row.show(*values) if row.show else ", ".join(map(shown, values))


def faults(rows: Sequence[Row], config: ConfigDict) -> list[str]:
    """Returns what is wrong with a table: rows that do not fit the configuration, and keys that no row reads."""
    found, read = [], {key for row in rows for key in row.keys.split()}
    for row in rows:
        try:
            ours = have(row, config)
        except KeyError:
            found.append(f"{row.what}: the configuration has no key {row.keys}.")
            continue
        if not row.why and ours != row.paper:
            found.append(
                f"{row.what}: the paper says {row.paper}, we have {ours} ({row.keys}), and no reason is given."
            )
        if row.why and ours == row.paper:
            found.append(f"{row.what}: {ours} is the paper's, but the row gives a reason against it ({row.keys}).")
    return found + [f"{key} is in the configuration, but in no row." for key in sorted(keys_of(config) - read)]


def table(target: str) -> list[str]:
    """Returns the lines of a target's table, in Markdown."""
    config = load(target)
    lines = [f"## `{target}`", "", "| | paper says | we have | why not |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.paper} | {have(row, config)} | {row.why} |" for row in TABLES[target]]
    lines += ["", "No option changes these:", "", "| | paper has | we have | why not |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(note)} |" for note in NOTES[target]]


def document() -> str:
    """Returns the whole document."""
    lines = [
        "# The papers and our variants of them",
        "",
        "`python experiments/papers.py --output experiments/results/papers.md` wrote these tables. The values that "
        "we have are read from the configs. In brackets stands the section, or `released` for the authors' code.",
    ]
    for target in TABLES:
        lines += ["", *table(target)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="file to write instead of printing")
    arguments = parser.parse_args()
    if arguments.output:
        Path(arguments.output).write_text(document())
    else:
        print(document(), end="")


if __name__ == "__main__":
    main()
