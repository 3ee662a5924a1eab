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
