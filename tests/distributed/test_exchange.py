"""Shares of the work, and arrays that hosts exchange."""

import jax
import numpy as np
import pytest
from processes import finish, free_address, spawn

from dalle_jax.distributed import exchange

HOST = """
import sys

_, address, index, folder = sys.argv
sys.path.append("tests/distributed")
import numpy as np
from dalle_jax.distributed import exchange
from dalle_jax.distributed.joining import start
from test_exchange import arrays

exchange._PIECE = 2**10
start("evaluate", address, 2, int(index), connect_seconds=120)
for turn, names in enumerate((None, ("tiny",))):
    mine = arrays(int(index))
    parts = exchange.from_all_hosts(mine if names is None else {name: mine[name] for name in names})
    for host, part in enumerate(parts):
        np.savez(f"{folder}/{turn}_{index}_{host}.npz", **part)
"""


def arrays(host):
    """Returns arrays that differ between hosts: their shapes, and one name."""
    rng = np.random.default_rng(host)
    return {
        "doubles": rng.normal(size=(3 + 500 * host, 2)),
        "images": rng.integers(0, 256, (4, 3, 3, 3), np.uint8),
        "big/numbers": np.array([2**62 + host, -1]),
        "none": np.zeros((0, 7), np.float32),
        "tiny": np.float64(1 / 3 + host),
        f"of host {host}": np.array([True, False]),
    }


def test_hosts_exchange_arrays_bit_for_bit(tmp_path):
    address = free_address()
    ended = finish([spawn(["-c", HOST, address, str(i), str(tmp_path)]) for i in range(2)])
    assert [status for status, *_ in ended] == [0, 0], ended
    for reader in range(2):
        for host in range(2):
            expected = arrays(host)
            for turn, names in ((0, expected), (1, ["tiny"])):
                found = dict(np.load(tmp_path / f"{turn}_{reader}_{host}.npz"))
                assert list(found) == list(names)
                for name, array in found.items():
                    np.testing.assert_array_equal(array, expected[name], strict=name != "tiny")
                    assert array.dtype == expected[name].dtype


def test_one_host_has_everything():
    (part,) = exchange.from_all_hosts({"x": np.arange(3)})
    np.testing.assert_array_equal(part["x"], np.arange(3))
    assert exchange.share(7) == range(7)


@pytest.mark.parametrize("count", [3, 7, 8, 30_000])
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_shares_cover_all_rows_once(monkeypatch, hosts, count):
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    shares = []
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(exchange.share(count))
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
