"""Several processes of this machine as several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def free_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def host_flags(address: str, count: int, index: int) -> list[str]:
    """The flags that make a command one of `count` hosts."""
    return [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]


def spawn(arguments: Sequence[str], devices: int = 1, session: bool = False, **environment: str) -> subprocess.Popen:
    """Starts `python ARGUMENTS` with so many simulated CPU devices; stdout and stderr come as text through pipes.

    With `session` it leads a group of its own, for `os.killpg`: what a terminal's Ctrl-C and a batch system do.
    """
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *others])
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=session,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path} | environment,
    )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Waits for all: (status, stdout, stderr) of each. Ends those that are still there after the time, or an error."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, error) for process, (out, error) in zip(processes, outputs)]
