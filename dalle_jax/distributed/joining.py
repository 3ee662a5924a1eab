"""Several hosts, one training: how their processes find each other, and who does what first.

Every host runs the same command. It becomes one of several, before any use of a device, where one of these says so:

    flags         --coordinator_address=HOST:PORT --num_processes=N --process_id=I, the address being host 0's
    environment   DALLE_JAX_COORDINATOR_ADDRESS, DALLE_JAX_NUM_PROCESSES, DALLE_JAX_PROCESS_ID: the same, for flags
                  that are not given
    the cluster   --coordinator_address=auto: JAX's own detection (Cloud TPU slices, GKE, SLURM, Open MPI). Used unasked
                  where what SLURM, Open MPI or GKE sets up in the environment, or on a Cloud TPU VM Google's metadata
                  server, says that there are several processes

`--coordinator_address=none` runs alone in spite of them.

Host 0 is the first: it alone writes configuration, metrics, pictures and progress, and where something is made once
(a data set, a text model), it goes first, and the others then find it made.
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

CONNECT_SECONDS = 300


LOST_HOST_SECONDS = 60


_METADATA_SECONDS = 5


_FLAGS = ("coordinator_address", "num_processes", "process_id")


_lost_host_seconds = LOST_HOST_SECONDS


def define_flags() -> Callable[[str], None]:
    """Defines the command line's flags; gives the function that calls `start` with their values, for a job."""
    flags.DEFINE_string("coordinator_address", None, "Several hosts: host 0's HOST:PORT; or auto; or none.")
    flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "Several hosts: which of them this one is, from 0.")
    for name, seconds, what in (
        ("connect_seconds", CONNECT_SECONDS, "how long to wait for all to be there"),
        ("lost_host_seconds", LOST_HOST_SECONDS, "how long one may be silent"),
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
    """Joins the other hosts, where there are any; else does nothing.

    Args:
      job: `config.job`; "train" is the one that several hosts do together.
      coordinator_address: "HOST:PORT" of the first host, "auto", "none", or None: as the environment says.
      num_processes: how many there are.
      process_id: which one this is.
      connect_seconds: how long to wait for the first host, or as the first one for all others.
      lost_host_seconds: a host that is silent for so long counts as lost, and ends the others; also how long a host
        that ends waits for the others to end.
      environment: where variables of launchers are looked up; about Cloud TPUs `os.environ` is asked.

    Raises:
      ConfigError: some of the three values are missing or wrong, or several processes are to do another job.
      UserError: the others are not there in time.
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
    if job != "train":
        raise ConfigError(
            f"config.job={job!r} runs in one process, and "
            f"{'the cluster has' if detected else '--num_processes asks for'} several: run it on one host, with "
            "--coordinator_address=none."
        )
    global _lost_host_seconds
    _lost_host_seconds = lost_host_seconds
    began = time.monotonic()
    if values and values["process_id"] > 0:
        _wait_for(values["coordinator_address"], connect_seconds)
    failures = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **values,
                cluster_detection_method=None if detected else "deactivate",
                initialization_timeout=int(connect_seconds) + 3600,  # JAX would abort the process; see below
                heartbeat_timeout_seconds=2 * lost_host_seconds,  # the last resort: `watchdog.py` says it first
                shutdown_timeout_seconds=lost_host_seconds,
            )
        except Exception as error:
            failures.append(error)

    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(max(connect_seconds - (time.monotonic() - began), 1.0))
    if connecting.is_alive():
        who = f"all of {values['num_processes']} processes" if values else "the other hosts"
        raise UserError(
            f"Not {who} were there within {connect_seconds:g} s (--connect_seconds). Start the same command on every "
            "host, each with its own --process_id, and look at what the missing ones say."
        )
    if failures:
        raise ConfigError(
            f"JAX could not join this process to others: {failures[0]}. Give --coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=I, or --coordinator_address=none to run alone. (A Cloud TPU needs libtpu: "
            "pip install -e '.[tpu]'.)"
        ) from failures[0]


def _launched_by(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    counts = ["MEGASCALE_NUM_SLICES", "OMPI_COMM_WORLD_SIZE"]
    if "SLURM_STEP_NODELIST" in environment:
        counts.append("SLURM_NTASKS")
    if "," in workers or any(environment.get(name) not in (None, "", "1") for name in counts):
        return True
    return not workers and _tpu_workers() > 1


def _tpu_workers() -> int:
    """How many hosts the Cloud TPU has that this one is of; 1 where it is of none.  Asks as JAX does.

    `gcloud … tpu-vm create` puts nothing into the environment of its machines.
    """
    # JAX, when it was imported, set the first where it found no TPU chip.
    if "TPU_SKIP_MDS_QUERY" in os.environ or "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return 1
    workers = _metadata("worker-network-endpoints")
    slices = re.search(r"^MEGASCALE_NUM_SLICES: '?(\d+)", _metadata("tpu-env") if workers else "", re.MULTILINE)
    return len(workers.split(",")) * int(slices[1] if slices else 1)


def _metadata(name: str) -> str:
    """An attribute of this machine, from Google's metadata server; empty where there is none, or no answer."""
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
    return ""  # another maker's machine; of several hosts `train.check` finds that they were not joined


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The three values, as `jax.distributed.initialize` takes them."""
    how = "of --coordinator_address, --num_processes and --process_id (or DALLE_JAX_COORDINATOR_ADDRESS, …)"
    if missing := [name for name in _FLAGS if given[name] is None]:
        raise ConfigError(f"Of several hosts each needs all three {how}: {', '.join(missing)} is missing.")
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
    """Waits until somebody listens there: JAX itself would abort the process, without a word of ours."""
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
                    f"No answer from the first host at {address} within {seconds:g} s (--connect_seconds): {error}. Is "
                    "the process with --process_id=0 running there, and is the port open to this host?"
                ) from error
            time.sleep(0.1)


def lost_host_seconds() -> float:
    """What `start` was given, or its default."""
    return _lost_host_seconds
