"""The configs of this package, from any working directory: `prior:small` and `configs/prior.py:small` are the same.

In a checkout they are the top-level folder `configs`. An installed package has a copy of it (see setup.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dalle_jax.configuration.options import closest

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "shipped" / "configs", _PACKAGE.parent / "configs")

FOLDER = next((place for place in _PLACES if (place / "__init__.py").is_file()), _PLACES[-1])


def names(folder: Path = FOLDER) -> list[str]:
    """Returns the names of the configs, such as "prior"."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))


def located(config: str) -> str:
    """Returns "FILE[:VARIANT]" with the path of the file.

    Args:
      config: "prior", "prior.py" or "configs/prior.py", with or without ":VARIANT". A file that exists under this path
        is meant first. Everything else is returned unchanged.
    """
    name, colon, variant = config.partition(":")
    path = Path(name)
    if (path.suffix and path.is_file()) or str(path.parent) not in (".", "configs"):
        return config
    ours = FOLDER / (path.name if path.suffix else f"{path.name}.py")
    return f"{ours}{colon}{variant}" if path.name and ours.is_file() else config


def with_located(argv: Sequence[str]) -> list[str]:
    """Returns a command line in which the value of --config is the path of its file."""
    found = list(argv)
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") != "config" or not name.startswith("-"):
            continue
        if equals:
            found[place] = f"{name}={located(value)}"
        elif place + 1 < len(argv):
            found[place + 1] = located(argv[place + 1])
    return found


def instead_of(config: str) -> str:
    """Returns what to give instead of a config that does not exist, as a clause."""
    here = names()
    return f"expected {', '.join(here)}, or the path of another file{closest(Path(config).stem, here)}"
