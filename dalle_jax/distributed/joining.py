"""Joins the processes of several hosts to one training or evaluation.

Every host runs the same command. It joins the others before it uses a device, if one of these asks for it:

    flags         --coordinator_address=HOST:PORT --num_processes=N --process_id=I, with the address of host 0
    environment   DALLE_JAX_COORDINATOR_ADDRESS, DALLE_JAX_NUM_PROCESSES, DALLE_JAX_PROCESS_ID: defaults of the flags
    the cluster   --coordinator_address=auto: JAX's own detection (Cloud TPU slices, GKE, SLURM, Open MPI)

The detection is also used without a flag if SLURM, Open MPI or GKE announces several processes in the environment, or
if Google's metadata server does so on a Cloud TPU VM. `--coordinator_address=none` runs alone in spite of them.

Host 0 is the first host. It alone writes configuration, metrics, images and progress. It also goes first where
something is created once, such as a data set or a text model, which the others then find (`turns.py`).
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags

from dalle_jax.errors import ConfigError, UserError

CONNECT_SECONDS = 300  # default: how long to wait for all hosts at the start
LOST_HOST_SECONDS = 60  # default: how long a host may be silent
_METADATA_SECONDS = 5
_FLAGS = ("coordinator_address", "num_processes", "process_id")
_JOBS = ("train", "encode", "evaluate", "evaluate_classes")  # those that several hosts share

_lost_host_seconds = LOST_HOST_SECONDS


def define_flags() -> Callable[[str], None]:
    """Defines the flags of several hosts.

    Returns:
      A function of the job that calls `start` with the values of the flags.
    """
    flags.DEFINE_string("coordinator_address", None, "Several hosts: HOST:PORT of host 0, auto, or none.")
    flags.DEFINE_integer("num_processes", None, "Several hosts: number of processes.")
    flags.DEFINE_integer("process_id", None, "Several hosts: index of this process, from 0.")
    for name, seconds, what in (
        ("connect_seconds", CONNECT_SECONDS, "longest time until all have joined"),
        ("lost_host_seconds", LOST_HOST_SECONDS, "longest silence before a host counts as lost"),
    ):
        flags.DEFINE_integer(name, seconds, f"Several hosts: {what}.", lower_bound=1)
    names = (*_FLAGS, "connect_seconds", "lost_host_seconds")
    return lambda job: start(job, **{name: flags.FLAGS[name].value for name in names})


def start(
    job: str,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    connect_seconds: float = CONNECT_SECONDS,
    lost_host_seconds: int = LOST_HOST_SECONDS,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other hosts, or does nothing on a single host.

    Args:
      job: `config.job`. Only those of `_JOBS` run on several hosts.
      coordinator_address: "HOST:PORT" of the first host, "auto", or "none". None: read from the environment.
      num_processes: number of processes.
      process_id: index of this process.
      connect_seconds: how long to wait for the first host. The first host waits as long for all others.
      lost_host_seconds: a host that is silent for this long counts as lost, which ends the others. A host that exits
        waits as long for the others to exit.
      environment: variables of launchers. Cloud TPUs are always detected with `os.environ`.

    Raises:
      ConfigError: one of the three values is missing or wrong, or several processes run another job.
      UserError: the other hosts did not join in time.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    for name in _FLAGS:
        if given[name] is None:
            given[name] = environment.get(f"DALLE_JAX_{name.upper()}") or None
    if given["coordinator_address"] == "none":
        return
    unasked = all(value is None for value in given.values())
    detected = given["coordinator_address"] == "auto" or unasked and _launched_by(environment)
    if unasked and not detected:
        return
    values = {} if detected else _checked(given)
    if values.get("num_processes") == 1:
        return
    if job not in _JOBS:
        raise ConfigError(
            f"config.job={job!r} runs in one process, and "
            f"{'the cluster has' if detected else '--num_processes asks for'} several. Run it on one host with "
            "--coordinator_address=none."
        )
    global _lost_host_seconds
    _lost_host_seconds = lost_host_seconds
    # Only training answers to a signal that JAX has caught. Other jobs would ignore it.
    jax.config.update("jax_enable_preemption_service", job == "train")
    began = time.monotonic()
    if values and values["process_id"] > 0:
        _wait_for(values["coordinator_address"], connect_seconds)
    failures = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **values,
                cluster_detection_method=None if detected else "deactivate",
                initialization_timeout=int(connect_seconds) + 3600,  # at the end of which JAX would abort the process
                heartbeat_timeout_seconds=2 * lost_host_seconds,  # the last resort: the watchdog notices earlier
                shutdown_timeout_seconds=lost_host_seconds,
            )
        except Exception as error:
            failures.append(error)

    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(max(connect_seconds - (time.monotonic() - began), 1.0))
    if connecting.is_alive():
        who = f"all of {values['num_processes']} processes" if values else "all hosts"
        raise UserError(
            f"Not {who} joined within {connect_seconds:g} s (--connect_seconds). Start the same command on every host, "
            "each with its own --process_id. If one is missing, read its output."
        )
    if failures:
        raise ConfigError(
            f"JAX could not join this process to others: {failures[0]}. Give --coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=I, or --coordinator_address=none to run alone. (A Cloud TPU needs libtpu: "
            "pip install -e '.[tpu]'.)"
        ) from failures[0]


def _launched_by(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher that JAX supports has started several processes."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    counts = ["MEGASCALE_NUM_SLICES", "OMPI_COMM_WORLD_SIZE"]
    if "SLURM_STEP_NODELIST" in environment:
        counts.append("SLURM_NTASKS")
    if "," in workers or any(environment.get(name) not in (None, "", "1") for name in counts):
        return True
    return not workers and _tpu_workers() > 1


def _tpu_workers() -> int:
    """Returns the number of hosts of this machine's Cloud TPU, or 1 without one.

    Asks the metadata server, as JAX does, because `gcloud … tpu-vm create` sets no environment variables.
    """
    # JAX sets the first variable at import if it finds no TPU chip.
    if "TPU_SKIP_MDS_QUERY" in os.environ or "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return 1
    workers = _metadata("worker-network-endpoints")
    slices = re.search(r"^MEGASCALE_NUM_SLICES: '?(\d+)", _metadata("tpu-env") if workers else "", re.MULTILINE)
    return len(workers.split(",")) * int(slices[1] if slices else 1)


def _metadata(name: str) -> str:
    """Reads an attribute of this machine from Google's metadata server. Returns "" without an answer or attribute."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for wait in (1.0, 1.0, 0.0):
        try:
            with directly.open(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "code", None) == 404:
                break
            time.sleep(wait)
    return ""  # not a machine of Google, or no answer: `training.loop.check` detects hosts that were not joined


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Validates the three values and returns them as arguments of `jax.distributed.initialize`."""
    how = "of --coordinator_address, --num_processes and --process_id (or DALLE_JAX_COORDINATOR_ADDRESS, …)"
    if missing := [name for name in _FLAGS if given[name] is None]:
        raise ConfigError(f"Each of several hosts needs all three {how}: {', '.join(missing)} is missing.")
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count:
        raise ConfigError(
            f"num_processes={given['num_processes']}, process_id={given['process_id']}: expected whole numbers, "
            "with process_id from 0 to num_processes - 1."
        )
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"coordinator_address={given['coordinator_address']!r}: expected HOST:PORT of the first host and a port "
            "that is free there, or 'auto', or 'none'."
        )
    return {"coordinator_address": given["coordinator_address"], "num_processes": count, "process_id": index}


def _wait_for(address: str, seconds: float) -> None:
    """Waits until a process listens at `address`, because JAX would abort this process without a clear message."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"No answer from the first host at {address} within {seconds:g} s (--connect_seconds): {error}. "
                    "Check that the process with --process_id=0 runs there and that this host can reach the port."
                ) from error
            time.sleep(0.1)


def check_devices() -> None:
    """Checks that JAX finds a device.

    Raises:
      ConfigError: it finds none, for instance because JAX_PLATFORMS names a kind that this machine does not have.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms}" if jax.config.jax_platforms else "this machine"
        found = str(error).partition(". ")[0].partition(" (set ")[0] or "this kind is not installed or not present"
        raise ConfigError(
            f"JAX finds no device of {asked}: {found}. Unset JAX_PLATFORMS to use what there is, or set it to cpu."
        ) from None


def lost_host_seconds() -> float:
    """Returns the `lost_host_seconds` of `start`."""
    return _lost_host_seconds
