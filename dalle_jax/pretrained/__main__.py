"""Imports published weights as folders that trainings, evaluations and `generate` read.

    python -m dalle_jax.pretrained --list                                            # what can be imported
    python -m dalle_jax.pretrained NAME --weights=FILE [--weights=FILE] --output=RUN
    python -m dalle_jax.pretrained NAME --help                                       # further options of NAME

Users download the files themselves, or give their address on a hub (hf://OWNER/NAME/FILE). Nothing in them is executed,
and torch is not needed.

| exit status | meaning                                                              |
|-------------|----------------------------------------------------------------------|
| 0           | done                                                                 |
| 1           | the files cannot be imported                                         |
| 2           | a wrong name, flag or number of files, or a folder that is not free  |
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dalle_jax.configuration.options import closest
from dalle_jax.errors import UserError
from dalle_jax.pretrained.catalogue import IMPORTERS, import_files
from dalle_jax.pretrained.importer import Importer

_USAGE = (
    "python -m dalle_jax.pretrained NAME --weights=FILE … --output=RUN\n       python -m dalle_jax.pretrained --list"
)


def table() -> str:
    """Returns the table of importers: sizes, licences, where the weights are published, files, and their use."""
    return "\n\n".join(_described(one) for one in IMPORTERS.values())


def _described(one: Importer) -> str:
    size = "any" if one.parameters is None else f"{one.parameters:,} parameters, {4e-6 * one.parameters:,.0f} MB"
    rows = {
        "model": one.title, "size": size, "licence": one.licence, "published": one.source,
        "files": ", ".join(one.files), "read by": one.use,
    }  # fmt: skip
    return "\n".join([one.name, *(f"    {name:<11}{value}" for name, value in rows.items())])


def _parser(one: Importer) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m dalle_jax.pretrained {one.name}",
        description=_described(one),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    expected = f"Files or addresses (hf://OWNER/NAME/FILE), in this order: {', '.join(one.files)}."
    parser.add_argument("--weights", action="append", required=True, metavar="FILE", help=expected)
    parser.add_argument("--output", required=True, metavar="RUN", help="Folder to write.")
    for setting in one.settings:
        parser.add_argument(
            f"--{setting.name}", type=setting.kind, default=setting.default, required=setting.required,
            choices=setting.choices, help=setting.help,
        )  # fmt: skip
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: its arguments, without the name of the program.

    Returns:
      The exit status.
    """
    if "--list" in argv:
        print(table())
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {_USAGE}\n\n{table()}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in IMPORTERS:
        print(f"{name!r} cannot be imported{closest(name, IMPORTERS)}. Known: {', '.join(IMPORTERS)}.", file=sys.stderr)
        return 2
    settings = vars(_parser(IMPORTERS[name]).parse_args(rest))
    files, output = settings.pop("weights"), settings.pop("output")
    try:
        found = import_files(name, files, output, settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{output}: {found}\nUse it: {IMPORTERS[name].use}={output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
