"""Files of weights from strangers: each of them ends in a `PretrainedError`, in little time and memory."""

import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import restricted_pickle, state_dict

MODULE = "torch.nn.Module"


def archive(path, pickled, files=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("archive/data.pkl", pickled)
        for name, data in files:
            written.writestr(f"archive/{name}", data, compression)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"J\x04\x00\x00\x00tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
TENSOR = REBUILD + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}tR"
DATA = [("data/0", np.arange(4, dtype=np.float32).tobytes())]
RECORD = f"ctorch.nn\nModule\n{''}".encode() + b")R"


def chained_records(count):
    """Returns records that each hold the next one twice: 2**count paths."""
    content = b"\x80\x02" + RECORD + b"}(" + text(b"_parameters") + b"}" + text(b"_modules") + b"}ubq\x01"
    for _ in range(count):
        children = b"}(" + text(b"a") + b"h\x01" + text(b"b") + b"h\x01u"
        content += b"0" + RECORD + b"}(" + text(b"_parameters") + b"}" + text(b"_modules") + children + b"ubq\x01"
    return content + b"."


def nested_tuples(count):
    """Returns a tuple of 2**count paths as the key of a dictionary, whose hash would never end."""
    return b"\x80\x02}" + b")q\x01" + b"".join(b"h\x01h\x01\x86q\x01" for _ in range(count)) + b"Ns."


HOSTILE = {
    "state of a tensor": b"\x80\x02" + TENSOR + b"}" + text(b"offset") + b"J\x00\x00\x00\x10sb.",
    "state of a tensor's slots": b"\x80\x02" + TENSOR + b"N}" + text(b"size") + b"K\x09\x85s\x86b.",
    "state of a storage": b"\x80\x02" + STORAGE + b"}" + text(b"numel") + b"J\x00\x00\x00\x10sb.",
    "a call of a storage": b"\x80\x02" + STORAGE + b")R.",
    "a storage that is a record": b"\x80\x02" + REBUILD + b"(" + RECORD + b"K\x00K\x04\x85K\x01\x85\x89}tR.",
    "a size of texts": b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00" + text(b"a") + b"\x85K\x01\x85\x89}tR.",
    "a huge memo index": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b"Y.",
    "a huge integer": b"\x80\x02\x8b" + struct.pack("<i", 10_000) + b"\x01" * 10_000 + b".",
    "a key of nested tuples": nested_tuples(60),
    "an unhashable key": b"\x80\x02}]Ns.",
    "items of a number": b"\x80\x02K\x01NNs.",
    "append to a tuple": b"\x80\x02)Na.",
    "an old class": b"\x80\x02(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "no value": b"\x80\x02.",
    "no end": b"\x80\x02N",
    "a get without a put": b"\x80\x02h\x07.",
    "records of 2**40 paths": chained_records(40),
    "a tuple in itself": b"\x80\x02]q\x01h\x01\x85q\x02ah\x02.",
    "a deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "copies of a set": b"\x80\x02](" + b"N" * 50_000 + b"eq\x010" + b"cbuiltins\nset\n(h\x01tR0" * 1000 + b"N.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_rejected_at_once(tmp_path, content):
    path = archive(tmp_path / "file.pt", content, DATA)
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(PretrainedError, match="file.pt|nested"):
            loaded = restricted_pickle.load(path, MODULE.__eq__)
            restricted_pickle.module_parameters(loaded)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 30, "a hang, and not a slow machine"


def test_many_views_of_one_storage_are_rejected(tmp_path):
    numel, views = 100_000, 200
    storage = STORAGE.replace(b"J\x04\x00\x00\x00", b"J" + struct.pack("<i", numel))
    tensor = REBUILD + b"(h\x01K\x00J" + struct.pack("<i", numel) + b"\x85K\x01\x85\x89}tR"
    content = b"\x80\x02" + storage + b"q\x010(" + tensor * views + b"l."
    path = archive(tmp_path / "file.pt", content, [("data/0", bytes(4 * numel))])
    with pytest.raises(PretrainedError, match="file.pt"):
        restricted_pickle.load(path)


def test_compressed_parts_of_a_torch_file_are_rejected(tmp_path):
    for name in ("byteorder", "data/0"):
        path = archive(tmp_path / "file.pt", b"\x80\x02N.", [(name, bytes(10_000_000))], zipfile.ZIP_DEFLATED)
        with pytest.raises(PretrainedError, match="compressed"):
            restricted_pickle.load(path)


def test_the_same_tensor_twice_is_read(tmp_path):
    content = b"\x80\x02}(" + text(b"a") + TENSOR + b"q\x07" + text(b"b") + b"h\x07u."
    arrays = state_dict.read(archive(tmp_path / "file.pt", content, DATA))
    np.testing.assert_array_equal(arrays["a"], np.arange(4))
    np.testing.assert_array_equal(arrays["b"], np.arange(4))


def safetensors(path, header, data=b"\0" * 16):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": ENTRY, "b": ENTRY},
        {"a": {**ENTRY, "data_offsets": [0, 99]}},
        {"a": {**ENTRY, "data_offsets": [-16, 16]}},
        {"a": {**ENTRY, "data_offsets": None}},
        {"a": {**ENTRY, "dtype": "X"}},
        {"a": {**ENTRY, "shape": [5]}},
        {"a": {**ENTRY, "shape": "4"}},
        {"a": 7},
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{",
        b"{}" + b"\xff",
    ],
)
def test_a_hostile_safetensors_header_is_rejected(tmp_path, header):
    with pytest.raises(PretrainedError, match="safetensors"):
        state_dict.read(safetensors(tmp_path / "model.safetensors", header))


def npz_bomb(path):
    np.savez_compressed(path, a=np.zeros(10_000_000, np.float32))


def npz_with_a_long_header(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("a.npy", header.getvalue() + bytes(16))


def npz_of_objects(path):
    np.savez(path, a=np.array([{"x": 1}], object))


@pytest.mark.parametrize("write", [npz_bomb, npz_with_a_long_header, npz_of_objects])
def test_a_hostile_npz_is_rejected(tmp_path, write):
    write(tmp_path / "model.npz")
    with pytest.raises(PretrainedError, match="model.npz"):
        state_dict.read(tmp_path / "model.npz")


def test_ordinary_npz_files_are_read(tmp_path):
    arrays = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b/c": np.float16(3), "empty": np.zeros((0, 2))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "model.npz", **arrays)
        read = state_dict.read(tmp_path / "model.npz")
        assert read.keys() == arrays.keys()
        for name in arrays:
            np.testing.assert_array_equal(read[name], arrays[name])
            assert read[name].dtype == arrays[name].dtype


@pytest.mark.parametrize(
    ("content", "token"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs"), (b"<!DOCTYPE html><html>", "web page")],
)
def test_what_a_failed_download_leaves_is_named(tmp_path, content, token):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match=token):
        state_dict.read(path)


def samples(folder):
    """Writes one intact file of each format, and returns their contents."""
    archive(folder / "zip.pt", b"\x80\x02}" + text(b"a") + TENSOR + b"s.", DATA)
    np.savez(folder / "model.npz", a=np.arange(4.0))
    safetensors(folder / "model.safetensors", {"a": ENTRY})
    (folder / "plain.pkl").write_bytes(pickle.dumps({"state_dict": [1, (2.0, "x"), {"a"}, b"b" * 40]}, 2))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_end_in_an_error_or_in_arrays(tmp_path_factory, data):
    """Flips, cuts, inserts and repeats bytes of intact files of each format."""
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(data.draw(st.sampled_from(samples(folder))))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            content[place:place] = content[max(place - 40, 0) : place]
    path = folder / "damaged"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        arrays = state_dict.read(path)
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
    except PretrainedError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50e6
