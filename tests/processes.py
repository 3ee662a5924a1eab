"""Starts processes of this machine, which may simulate several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import preloaded

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def free_address() -> str:
    """Returns an address that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def host_flags(address: str, count: int, index: int) -> list[str]:
    """Returns the flags of a command that runs as one of `count` hosts."""
    return [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}"]


def spawn(
    arguments: Sequence[str], devices: int = 1, session: bool = False, **environment: str
) -> preloaded.Program | subprocess.Popen:
    """Starts `python ARGUMENTS` with this many simulated CPU devices; its outputs are pipes of text.

    On Linux the process is forked from one that has imported the library. A fresh process starts if JAX or Python
    must read other variables at import, and on other systems.

    Args:
      arguments: the command-line arguments.
      devices: number of simulated devices.
      session: whether the process leads its own group, for `os.killpg`. Terminals and batch systems signal groups.
      **environment: variables to set in addition.
    """
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *others])
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path} | environment
    if sys.platform == "linux" and not any(name.startswith(("JAX_", "PYTHON")) for name in environment):
        return preloaded.Program(arguments, variables, session)
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=session, env=variables,
    )  # fmt: skip


def finish(
    processes: Sequence[preloaded.Program | subprocess.Popen], seconds: float = 240
) -> list[tuple[int, str, str]]:
    """Waits for all processes and returns (status, stdout, stderr) of each. Kills them after the time or an error."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, error) for process, (out, error) in zip(processes, outputs)]
