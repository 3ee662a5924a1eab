"""Several hosts, simulated by processes of this machine: equal training, and errors instead of hangs.

Processes sum in another order than a single one, so the last bits of floats differ. After ten steps, losses and
parameters of order one differed by at most 1e-7 (measured). The tests allow 1e-6.
"""

import http.server
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from processes import finish, free_address, host_flags, spawn
from tiny_job import tiny_config, tiny_job

from dalle_jax.distributed import joining
from dalle_jax.distributed.joining import start
from dalle_jax.distributed.turns import first_host_first, first_host_says, is_first
from dalle_jax.errors import ConfigError
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training.loop import train

TOLERANCE = 1e-6
TINY = """
import json, sys

_, address, count, index, workdir, changes = sys.argv
# Python's output alone, because threads of libraries write to the streams of the process in the middle of lines.
sys.stdout = sys.stderr = open(f"{workdir}/host_{index}.txt", "w", buffering=1)
import jax
import numpy as np
from dalle_jax.distributed.joining import start
from dalle_jax.distributed.rows import to_host
from dalle_jax.training.loop import train
from tiny_job import tiny_config, tiny_job

start("train", address, int(count), int(index), connect_seconds=120)
config = tiny_config(**json.loads(changes))
state = train(config, workdir, tiny_job(config))
leaves = jax.tree.leaves(to_host((state.params, state.ema)))
np.savez(f"{workdir}/host_{index}", *leaves)
"""


def train_on_hosts(workdir, count, **changes):
    """Trains the tiny job on `count` hosts with eight devices in total.

    Returns:
      The printed text of each host, and the final parameters and EMA of each host as lists of complete arrays.
    """
    address = free_address()
    arguments = [address, str(count)], [str(workdir), json.dumps(changes)]
    processes = [spawn(["-c", TINY, *arguments[0], str(i), *arguments[1]], devices=8 // count) for i in range(count)]
    ended = finish(processes)
    said = [(workdir / f"host_{i}.txt").read_text() for i in range(count)]
    assert [status for status, *_ in ended] == [0] * count, (said, ended)
    leaves = [list(np.load(workdir / f"host_{i}.npz").values()) for i in range(count)]
    return said, leaves


def assert_same_series(one, other, tolerance=TOLERANCE):
    """Compares all metrics of all steps except times and counts of truncated captions, which cover one host's rows."""
    one, other = read_metrics(str(one)), read_metrics(str(other))
    assert [list(line) for line in one] == [list(line) for line in other]
    for a, b in zip(one, other):
        for name in (name for name in a if "second" not in name and not name.endswith("captions_truncated")):
            np.testing.assert_allclose(b[name], a[name], rtol=tolerance, atol=tolerance, err_msg=f"{a['step']} {name}")


@pytest.mark.parametrize(
    "hosts, mesh",
    [
        (2, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(4, {"data": 8}, marks=pytest.mark.slow),
        # Two devices per host: each row of a batch is on two hosts, each parameter is split over four.
        pytest.param(4, {"data": 1, "fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
)
def test_hosts_train_as_one(tmp_path, hosts, mesh):
    """All steps are equal, and only the first host writes files and prints."""
    changes = {**{f"mesh__{axis}": size for axis, size in mesh.items()}, "cadence__preview": 5}
    config = tiny_config(**changes)
    state = train(config, str(tmp_path / "one"), tiny_job(config))
    (tmp_path / "many").mkdir()
    said, leaves = train_on_hosts(tmp_path / "many", hosts, **changes)
    assert_same_series(tmp_path / "one", tmp_path / "many")
    for host in leaves:
        for x, first, alone in zip(host, leaves[0], jax.tree.leaves((state.params, state.ema))):
            np.testing.assert_array_equal(x, first)
            np.testing.assert_allclose(x, alone, rtol=0, atol=TOLERANCE)
    written = sorted(path.name for path in (tmp_path / "many").iterdir() if not path.name.startswith("host_"))
    assert written == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(list((tmp_path / "many" / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "many" / "samples").iterdir())) == 2
    assert "step 10/10" in said[0]
    assert said[1:] == [""] * (hosts - 1)


@pytest.mark.slow
def test_the_command_line_trains_tokenizer_and_prior_on_two_hosts(tmp_path):
    """Shared files are created once, and both trainings equal those on one host.

    After three steps the gradient norm of the dVAE differed by up to 2e-5, all other metrics by 3e-7 (measured).
    """
    address = free_address()
    for hosts in (1, 2):
        command = ["-m", "dalle_jax.main", f"--config=tests/small_prior.py:{tmp_path}/{hosts}"]
        flags = [host_flags(address, hosts, i) for i in range(hosts)]
        said = finish([spawn([*command, *flags[i]], devices=4 // hosts) for i in range(hosts)], seconds=500)
        assert [status for status, *_ in said] == [0] * hosts, said
    for run in ("dvae", "prior"):
        assert_same_series(tmp_path / "1" / run, tmp_path / "2" / run, tolerance=1e-4)
    priors = [tmp_path / hosts / "prior" for hosts in "12"]
    text, other = ((prior / "text" / "sentencepiece.model").read_bytes() for prior in priors)
    assert text == other
    options, others = (json.loads((prior / "image_tokenizer" / "options.json").read_text()) for prior in priors)
    assert {**options, "checksums": None} == {**others, "checksums": None}  # those of the parameters differ
    assert len(list((tmp_path / "2" / "prior").glob("tokens-*/part-*.npy"))) == 1
    previews = [np.asarray(Image.open(tmp_path / hosts / "dvae" / "samples" / "preview_0000003.png")) for hosts in "12"]
    assert previews[0].shape == previews[1].shape and np.mean(previews[0] != previews[1]) < 0.01
    assert "training it first" in said[0][2] and "step 3/3" in said[0][1]
    assert "configs/generate.py" in said[0][1] and "configs/generate.py" not in said[1][1]
    assert "training it first" not in said[1][2] and "step" not in said[1][1]


TURNS = """
import sys
from dalle_jax.distributed.joining import start
from dalle_jax.distributed.turns import first_host_first, first_host_says, is_first
from dalle_jax.errors import UserError

_, address, index, made = sys.argv
start("train", address, 2, int(index), connect_seconds=120)
with first_host_first("a file"):
    if is_first():
        with first_host_first("its folder"):  # the other host finds the file and skips this
            open(made, "w").write("whole")
    print(open(made).read())
print(first_host_says("who", {"host": index}))
try:
    with first_host_first("a file"):
        if is_first():
            raise OSError("the disk is full")
        print("never here")
except (OSError, UserError) as error:
    print(error)
"""


def test_the_first_host_goes_first(tmp_path):
    address = free_address()
    said = finish([spawn(["-c", TURNS, address, str(i), str(tmp_path / "made")]) for i in range(2)])
    assert [status for status, *_ in said] == [0, 0], said
    assert said[0][1].splitlines() == ["whole", "{'host': '0'}", "the disk is full"]
    assert said[1][1].splitlines() == [
        "whole", "{'host': '0'}", "The first host could not create a file: OSError: the disk is full"
    ]  # fmt: skip


@pytest.mark.parametrize("index, token", [(0, "2 processes"), (1, "--process_id=0")])
def test_a_host_that_stays_alone(tmp_path, index, token):
    """The command ends with status 1 and one clear line instead of a hang."""
    flags = [*host_flags(free_address(), 2, index), "--connect_seconds=1"]
    command = ["-m", "dalle_jax.main", "--config=configs/dvae.py", f"--workdir={tmp_path}/run", *flags]
    ((status, _, error),) = finish([spawn(command)], seconds=120)
    assert status == 1, error
    assert "error: " in error and token in error and "1 s (--connect_seconds)" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


# -- how several hosts are requested --------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """The arguments of `jax.distributed.initialize`, once per call."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **values: calls.append(values))
    monkeypatch.setattr(joining, "_wait_for", lambda *_: None)
    return calls


SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}
OWN = {"DALLE_JAX_COORDINATOR_ADDRESS": "a:1", "DALLE_JAX_NUM_PROCESSES": "3", "DALLE_JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ({}, {}, None),
        ({"coordinator_address": "a:1", "num_processes": 1, "process_id": 0}, {}, None),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}, {}, ("a:1", 2, 0)),
        ({}, OWN, ("a:1", 3, 2)),
        ({"process_id": 0}, OWN, ("a:1", 3, 0)),  # flags override the environment
        ({"coordinator_address": "none"}, OWN, None),
        ({"coordinator_address": "none"}, SLURM, None),
        ({"coordinator_address": "auto"}, {}, "detected"),
        ({}, SLURM, "detected"),
        ({}, {**SLURM, "SLURM_NTASKS": "1"}, None),
        ({}, {"SLURM_NTASKS": "4"}, None),  # a batch script, outside of srun
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, "detected"),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, "detected"),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({}, {"MEGASCALE_NUM_SLICES": "2"}, "detected"),
        ({}, {"MEGASCALE_NUM_SLICES": "", "OMPI_COMM_WORLD_SIZE": "", **SLURM, "SLURM_NTASKS": ""}, None),
        ({}, dict.fromkeys(OWN, ""), None),
    ],
)
def test_flags_and_environments_that_request_several_hosts(joined, flags, environment, expected):
    start("train", **flags, environment=environment)
    if expected is None:
        assert not joined
        return
    (call,) = joined
    if expected == "detected":
        assert "coordinator_address" not in call and call["cluster_detection_method"] is None
    else:
        assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == expected
        assert call["cluster_detection_method"] == "deactivate"


ENDPOINTS = "worker-network-endpoints"
TPU_ENV = "ACCELERATOR_TYPE: 'v5p-128'\nMEGASCALE_NUM_SLICES: '2'\nZONE: 'us-east5-a'\n"


@pytest.mark.parametrize(
    "attributes, platforms, expected",
    [
        ({ENDPOINTS: "unused:a:10.0.0.2,unused:b:10.0.0.3"}, "", True),
        ({ENDPOINTS: "10.0.0.2", "tpu-env": "ZONE: 'us-east5-a'\n"}, "", False),
        ({ENDPOINTS: "10.0.0.2", "tpu-env": TPU_ENV}, "tpu,cpu", True),
        ({ENDPOINTS: "10.0.0.2,10.0.0.3", "busy": 2}, "", True),
        ({ENDPOINTS: "10.0.0.2,10.0.0.3"}, "cpu", False),  # the user disabled TPUs: there are no other hosts
        ({}, "", False),
    ],
)
def test_hosts_of_a_cloud_tpu_are_read_from_the_metadata_server(joined, monkeypatch, attributes, platforms, expected):
    """`gcloud … tpu-vm create` announces them nowhere else."""

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            busy = attributes.pop("busy", 0)  # number of requests to reject
            if busy:
                attributes["busy"] = busy - 1
            found = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(503 if busy else 200 if found else 404)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if found and not busy else b"not found")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        try:
            start("train", environment={})
        finally:
            server.shutdown()
            thread.join()
    assert bool(joined) == expected


@pytest.mark.parametrize(
    "flags, token",
    [
        ({"process_id": 0}, "coordinator_address, num_processes"),
        ({"coordinator_address": "a:1", "num_processes": 2}, "process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "process_id=2"),
        ({"coordinator_address": "a:1", "num_processes": "two", "process_id": 0}, "num_processes=two"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "coordinator_address='a'"),
    ],
)
def test_rejected_flags(joined, flags, token):
    with pytest.raises(ConfigError, match=token):
        start("train", **flags, environment={})
    assert not joined


def test_other_jobs_run_alone(joined):
    for flags, environment in (({}, SLURM), ({}, OWN)):
        with pytest.raises(ConfigError, match="config.job='generate'"):
            start("generate", **flags, environment=environment)
        start("generate", coordinator_address="none", environment=environment)
    assert not joined


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_signals_end_every_job_but_training(joined, job):
    """JAX catches SIGTERM for training, which then saves. An evaluation would never notice it."""
    start(job, environment=OWN)
    assert len(joined) == 1
    assert jax.config.jax_enable_preemption_service == (job == "train")
    start("train", environment=OWN)


def test_a_cluster_that_jax_cannot_detect_is_an_error(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match="should be defined"):
        start("train", "auto", environment={})


def test_a_single_host_is_the_first():
    with first_host_first("nothing"):
        assert is_first()
    assert first_host_says("list", [1]) == [1]
