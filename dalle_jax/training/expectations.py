"""Says at the start of a training what it will cost, and which key or variant helps if that is too much."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from dalle_jax.reporting.progress import duration

_DAY = 24 * 3600
_TOO_OFTEN = 300  # times that each image is seen
_FULL = 0.9  # of the free memory
_GIB = 2**30
_CONFIG_FILES = {
    "dvae": "dvae.py", "vq": "dvae.py", "vqgan": "vqgan.py", "beit": "beit.py", "prior": "prior.py", "clip": "clip.py",
}  # fmt: skip


def too_long(config: ConfigDict, seconds: float) -> str | None:
    """Returns advice if a training will take more than a day on a CPU, else None."""
    if jax.default_backend() != "cpu" or seconds <= _DAY:
        return None
    return (
        f"this is more than a day on a CPU ({duration(seconds)}). {_small(config)}--config.minutes=60 plans a training "
        "of an hour, and --config.steps=N sets the number of steps."
    )


def seen_too_often(config: ConfigDict, examples: int) -> str | None:
    """Returns advice if a training will see each of its examples more than a few hundred times, else None."""
    times = config.steps * config.batch_size / examples if examples else 0
    if times <= _TOO_OFTEN:
        return None
    fewer = max(1, _TOO_OFTEN // 3 * examples // config.batch_size)
    return (
        f"{config.steps:,} steps of {config.batch_size} show each of the {examples:,} images {times:,.0f} times, so "
        f"the model may learn them by heart. Add images, or give --config.steps={fewer}, which is {_TOO_OFTEN // 3} "
        "times. --config.keep.best=1 keeps the checkpoint that is best on held-out images."
    )


def too_large(config: ConfigDict, update: jax.stages.Compiled) -> str | None:
    """Returns advice if the update needs more memory than a CPU's machine has left, else None. The state exists."""
    free = free_bytes() if jax.default_backend() == "cpu" else None
    needed = _bytes(update) if free is not None else 0
    if free is None or needed <= _FULL * free:
        return None
    return (
        f"the update needs about {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB of memory are free: the machine "
        f"may become very slow or stop this process. {_small(config)}A smaller --config.batch_size or a smaller "
        "--config.data.image_size needs less."
    )


def _small(config: ConfigDict) -> str:
    """Returns a sentence that names the small variant, or "" for a training that is one already."""
    file = "maskgit.py" if config.get("prior") == "maskgit" else _CONFIG_FILES.get(config.task)
    if file is None or config.get("variant") == "small":
        return ""
    return f"--config=configs/{file}:small fits a CPU. "


def _bytes(update: jax.stages.Compiled) -> int:
    """Returns the memory that a call of the update allocates: the new state and the intermediate values."""
    memory = update.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes


def free_bytes(root: str = "/") -> int | None:
    """Returns the memory that this process can still get, or None if the system does not say (not Linux).

    Args:
      root: the root of the file system.
    """
    found = []
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    try:  # the limit of a container
        limit, used = (pathlib.Path(root, "sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current"))
        found += [max(int(limit) - int(used), 0)]
    except (OSError, ValueError):  # no container, or "max"
        pass
    return min(found, default=None)
