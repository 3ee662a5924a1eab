"""Lists the runs of a folder: task, data, step, result, size, and what may be deleted. Deletes nothing.

    python -m dalle_jax.runs            # the folder runs
    python -m dalle_jax.runs FOLDER

| exit status | meaning                        |
|-------------|--------------------------------|
| 0           | listed                         |
| 1           | the folder cannot be read      |
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle_jax.checkpoints import exported
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.reporting.units import with_unit
from dalle_jax.storage.files import expanded, is_remote

_DEPTH = 4  # folders below the given one in which runs are looked for
# config.task → the metric that usually selects its best checkpoint. The tasks themselves take seconds to import.
_METRICS = {"clip": "loss", "dvae": "psnr", "prior": "image_nats", "vq": "psnr", "vqgan": "psnr"}
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclasses.dataclass(frozen=True)
class Deletable:
    """Files of a run that may be deleted.

    Attributes:
      path: the file or folder.
      size: bytes.
      reason: why, as a clause.
    """

    path: str
    size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in a folder.

    Attributes:
      path: its workdir, or an exported folder.
      kind: task, prior and variant.
      data: source, path and size of the images.
      progress: the latest step and the planned one.
      result: the metric that selects the best checkpoint.
      size: bytes of all files.
      deletable: what may be deleted.
      tokenizer: workdir of the image tokenizer that is frozen into the run, or None.
    """

    path: str
    kind: str
    data: str
    progress: str
    result: str
    size: int
    deletable: Sequence[Deletable]
    tokenizer: str | None


def find(folder: str) -> list[Run]:
    """Describes the runs in a local folder and in the folders below it, in the order of their paths.

    Raises:
      CheckpointError: there is no such folder, or it is remote.
    """
    if is_remote(folder):
        raise CheckpointError(f"{folder} is on object storage; expected a local folder.")
    path = str(expanded(folder))
    if not os.path.isdir(path):
        raise CheckpointError(f"There is no folder {folder}. Check the path; trainings write into runs/.")
    return _with_copied_tokenizers([_describe(run) for run in _workdirs(path, _DEPTH)])


def _workdirs(folder: str, depth: int) -> Iterator[str]:
    """Yields the workdirs and exported folders in a folder, without looking inside of them."""
    if os.path.isfile(os.path.join(folder, "config.json")):
        yield folder
    elif depth:
        inside = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        for path in sorted(inside):
            yield from _workdirs(path, depth - 1)


def _describe(path: str) -> Run:
    try:
        config = workdirs.read_config(path)
    except UserError as error:
        return Run(path, "damaged", "", "", str(error).partition(". ")[0], size_of(path), (), None)
    finished, lines = workdirs.read_finished(path), read_metrics(path)
    steps = workdirs.steps_of(path)
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]
    best = finished.get("best") or {}
    tokenizer = config.get("tokenizer") or {}
    return Run(
        path,
        _kind(config) + (", exported" if exported.exists(path) else ""),
        _data(config["data"]),
        _progress(max(steps, default=0), config.get("steps"), finished, lines),
        _result(config, best, evaluations),
        size_of(path),
        tuple(_deletable(path, steps, best.get("step"))),
        tokenizer.get("workdir") if workdirs.has_tokenizer(path) and not config.get("tokenizer_from") else None,
    )


def _kind(config: Mapping[str, Any]) -> str:
    task = config["task"] if config["task"] != "prior" else f"{config.get('prior', '')} prior"
    return f"{task} {config['variant']}" if config.get("variant") else task


def _data(data: Mapping[str, Any]) -> str:
    parts = [data.get("path") or data.get("source") or "", f"{data['image_size']} px"]
    return ", ".join(part for part in parts if part)


def _progress(latest: int, total: int | None, finished: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    done = max([latest, *(line["step"] for line in lines)])
    if finished.get("step") == done or (total and latest >= total):
        return f"{done:,} steps, finished"
    if not total:
        return f"step {done:,}"
    saved = f", saved {latest:,}" if latest != done else ""
    return f"step {done:,} of {total:,}{saved}"


def _result(config: Mapping[str, Any], best: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Returns the last value of the metric that selects checkpoints, and the best one if it is another."""
    name = best.get("metric") or _METRICS.get(config["task"], "loss")
    values = [line[f"eval/{name}"] for line in evaluations if line.get(f"eval/{name}") is not None]
    if not values:
        return ""
    text = f"{name} {with_unit(name, values[-1])}"
    if best.get("value") is not None and abs(best["value"] - values[-1]) > 1e-6 * abs(values[-1]):
        text += f" (best {with_unit(name, best['value'])} at {best['step']:,})"
    return text


# -- what may be deleted ------------------------------------------------------------------------------------------


def _deletable(path: str, steps: Sequence[int], best: int | None) -> Iterator[Deletable]:
    kept = {max(steps, default=None), best}
    for step in steps:
        folder = os.path.join(path, "checkpoints", str(step))
        if step not in kept and os.path.isdir(folder):
            yield Deletable(folder, size_of(folder), "neither the latest nor the best checkpoint")
    reasons = {
        "tokens-": "only training needs them, and encodes them again",
        "profile": "recorded times of steps",
        "wandb": "files of Weights & Biases, if they were uploaded",
    }
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        reason = next((why for name, why in reasons.items() if entry.name.startswith(name)), None)
        if entry.name.endswith((".damaged", ".unfinished")):
            reason = "damaged or unfinished, and replaced since"
        if reason:
            yield Deletable(entry.path, size_of(entry.path), reason)


def _with_copied_tokenizers(runs: Sequence[Run]) -> list[Run]:
    """Adds to each tokenizer's run that priors hold a copy of it."""
    copies: dict[str, list[str]] = {}
    for run in runs:
        if run.tokenizer:
            copies.setdefault(os.path.abspath(run.tokenizer), []).append(run.path)
    found = []
    for run in runs:
        if holders := copies.get(os.path.abspath(run.path)):
            reason = f"{', '.join(holders)} holds a copy; only further trainings would read it"
            run = dataclasses.replace(run, deletable=[*run.deletable, Deletable(run.path, run.size, reason)])
        found.append(run)
    return found


def size_of(path: str) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    if not os.path.isdir(path):
        return os.path.getsize(path) if os.path.exists(path) else 0
    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(os.lstat(file).st_size for file in files if os.path.lexists(file))


def bytes_as_text(count: int) -> str:
    """Formats a number of bytes: "512 B", "1.2 MB"."""
    size, power = float(count), 0
    while size >= 1000 and power < len(_UNITS) - 1:
        size, power = size / 1000, power + 1
    return f"{count} B" if not power else f"{size:.3g} {_UNITS[power]}"


# -- the command --------------------------------------------------------------------------------------------------


def described(runs: Sequence[Run], folder: str) -> str:
    """Returns the list of runs as text."""
    if not runs:
        return f"{folder} holds no runs: no folder in it has a config.json."
    lines = []
    for run in runs:
        lines.append(f"{run.path}  ({bytes_as_text(run.size)})")
        about = [run.kind, run.data, run.progress, run.result]
        lines.append(f"  {' · '.join(part for part in about if part)}")
        lines += [
            f"  may be deleted: {each.path} ({bytes_as_text(each.size)}), {each.reason}" for each in run.deletable
        ]
    lines.append(f"{len(runs)} runs, {bytes_as_text(sum(run.size for run in runs))}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: its arguments, without the name of the program.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dalle_jax.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="runs", help="The folder; runs by default.")
    given = parser.parse_args(argv)
    try:
        print(described(find(given.folder), given.folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
