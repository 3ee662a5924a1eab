"""Reference statistics in npz files: read right, and rejected if they are damaged or of another kind."""

import numpy as np
import pytest

from dalle_jax.errors import DataError
from dalle_jax.evaluation.reference import read_npz

WIDTH = 2048
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 4, 5, 3), np.uint8)
MEAN = RNG.normal(size=WIDTH)
COVARIANCE = np.diag(RNG.random(WIDTH)) + 0.1
SPATIAL = {"mu_s": np.zeros(9), "sigma_s": np.eye(9)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file with the arrays of ADM's."""
    path = tmp_path_factory.mktemp("reference") / "VIRTUAL_small_labeled.npz"
    np.savez(path, arr_0=IMAGES, mu=MEAN, sigma=COVARIANCE, **SPATIAL)
    return path


def test_statistics_and_images(file):
    found = read_npz(file)
    assert (found.count, found.description, found.labels) == (7, "VIRTUAL_small_labeled.npz", None)
    np.testing.assert_array_equal(found.statistics.mean, MEAN)
    np.testing.assert_array_equal(found.statistics.covariance, COVARIANCE)
    assert found.statistics.metric == "fid"
    for places in (range(7), range(3, 6), range(6, 7), range(2, 2)):
        batches = list(found.batches(places, 2))
        assert all(len(batch) <= 2 for batch in batches)
        np.testing.assert_array_equal(np.concatenate([IMAGES[:0], *batches]), IMAGES[places.start : places.stop])


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_of_images_alone(tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", arr_0=IMAGES)
    found = read_npz(tmp_path / "a.npz")
    assert found.statistics is None and found.count == 7
    np.testing.assert_array_equal(np.concatenate(list(found.batches(range(1, 7), 4))), IMAGES[1:])


def test_a_file_of_statistics_alone(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MEAN.astype(np.float32), sigma=COVARIANCE)
    found = read_npz(tmp_path / "a.npz")
    assert found.count == 0 and list(found.batches(range(0), 4)) == []
    assert found.statistics.mean.dtype == np.float64


@pytest.mark.parametrize(
    "arrays, token",
    [
        ({"mu": MEAN[:-1], "sigma": COVARIANCE}, "mu: float64 .2047,."),
        ({"mu": MEAN, "sigma": COVARIANCE[:5]}, r"sigma: float64 .5, 2048."),
        ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "mu: int64"),
        ({"mu": MEAN}, "mu: float64"),
        ({"images": IMAGES}, "images: uint8"),
        ({"arr_0": IMAGES / 255}, "arr_0: float64"),
        ({"arr_0": IMAGES[..., :1]}, r"arr_0: uint8 .7, 4, 5, 1."),
        ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran"),
        ({"arr_0": IMAGES[0], "mu": MEAN, "sigma": COVARIANCE}, r"arr_0: uint8 .4, 5, 3."),
        ({"mu": np.full(WIDTH, np.nan), "sigma": COVARIANCE}, "not finite"),
    ],
)
def test_other_arrays(tmp_path, arrays, token):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=token):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(tmp_path, file, kept):
    content = file.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match="cut.npz"):
        read_npz(tmp_path / "cut.npz")


def test_damaged_images(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.find(IMAGES.tobytes())
    content[place + 9] ^= 255
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(DataError, match="arr_0"):
        list(read_npz(tmp_path / "a.npz").batches(range(7), 3))


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere.npz"):
        read_npz(tmp_path / "nowhere.npz")
