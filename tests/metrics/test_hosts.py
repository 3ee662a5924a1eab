"""Two processes, each with its own part of the batches, against one that has seen everything."""

import json
import os

import numpy as np
from processes import finish, free_address, spawn

from dalle_jax.metrics import frechet, hosts, image_quality, inception_score, precision_recall

WIDTH, COUNT = 6, 24

PROGRAM = """
import json, sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_, host, address, folder, result = sys.argv
jax.distributed.initialize(address, 2, int(host))
sys.path.insert(0, folder)
from test_hosts import MERGES, accumulate, figures
from dalle_jax.metrics import hosts

devices = np.array(jax.devices())
assert len(devices) == 4 and len(jax.local_devices()) == 2
once = NamedSharding(Mesh(devices, "a"), PartitionSpec("a"))
# Every row on a device of each host: only one of the two may count it.
twice = NamedSharding(Mesh(devices.reshape(2, 2), ("b", "a")), PartitionSpec("a"))
place = lambda layout: lambda whole: jax.make_array_from_callback(whole.shape, layout, lambda index: whole[index])
stats = accumulate(place(once), place(twice))
merged = [hosts.merge_over_hosts(part, merge) for part, merge in zip(stats, MERGES)]
turned = NamedSharding(Mesh(devices[::-1], "a"), PartitionSpec("a"))
rows = hosts.local_rows(place(turned)(np.arange(8))).tolist()
with open(result, "w") as file:  # not on stdout, where native threads write too
    json.dump({"count": stats[0].count, "figures": figures(merged), "rows": rows}, file)
"""

MERGES = (frechet.merge, inception_score.merge, precision_recall.merge, image_quality.merge)


def accumulate(place, place_twice):
    """Accumulators of three batches, laid out as the functions say."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(COUNT, WIDTH)) + 3
    images = rng.integers(0, 256, (2, COUNT, 12, 12, 3), np.uint8)
    stats = [
        frechet.empty(WIDTH, "test"), inception_score.empty(COUNT, 3, WIDTH), precision_recall.empty(WIDTH, "test"),
        image_quality.empty(),
    ]  # fmt: skip
    for i, put in enumerate((place, place_twice, place)):
        batch = slice(8 * i, 8 * i + 8)
        rows, valid = put(features[batch].astype(np.float32)), put(np.ones(8, bool))
        stats = [
            frechet.add(stats[0], rows, valid),
            inception_score.add(stats[1], rows, put(np.arange(COUNT)[batch])),
            precision_recall.add(stats[2], rows),
            image_quality.add(stats[3], *(put(side[batch]) for side in images), valid),
        ]
    return stats


def figures(stats):
    """What the accumulators say; order does not matter to any of it."""
    rng = np.random.default_rng(1)
    other = frechet.add(frechet.empty(WIDTH, "test"), rng.normal(size=(50, WIDTH)))
    others = precision_recall.add(precision_recall.empty(WIDTH, "test"), rng.normal(size=(50, WIDTH)) + 2)
    return {
        **frechet.compute(stats[0], other), **inception_score.compute(stats[1]),
        **precision_recall.compute(stats[2], others), **image_quality.compute(stats[3]),
    }  # fmt: skip


def test_two_hosts_measure_what_one_measures(tmp_path):
    expected = figures(accumulate(np.asarray, np.asarray))
    address, here, results = free_address(), os.path.dirname(__file__), [tmp_path / "0.json", tmp_path / "1.json"]
    said = finish(
        [spawn(["-c", PROGRAM, str(i), address, here, str(result)], devices=2) for i, result in enumerate(results)]
    )
    assert [status for status, *_ in said] == [0, 0], said
    results = [json.loads(result.read_text()) for result in results]
    assert [result["count"] for result in results] == [16, 8]
    assert [result["rows"] for result in results] == [[4, 5, 6, 7], [0, 1, 2, 3]]  # in the order of the batch
    assert results[0]["figures"] == results[1]["figures"]
    for name, value in expected.items():
        np.testing.assert_allclose(results[0]["figures"][name], value, rtol=1e-6, err_msg=name)


def test_one_host_has_nothing_to_merge():
    stats = image_quality.empty()
    assert hosts.merge_over_hosts(stats, image_quality.merge) is stats
