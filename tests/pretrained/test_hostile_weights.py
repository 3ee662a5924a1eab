"""Files of weights from strangers: each of them ends in a `PretrainedError`, in little time and memory."""

import io
import json
import os
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
from dalle_jax.pretrained import pickle_machine, restricted_pickle, state_dict, torch_objects

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
    return b"\x80\x02)q\x010" + b"h\x01h\x01\x86q\x010" * count + b"}h\x01Ns."


def shared_tables(count, entries):
    """Returns nested records of 2**count paths that share one large table of parameters."""
    table = b"}(" + b"".join(text(b"p%d" % i) + b"h\x02" for i in range(entries)) + b"u"
    content = b"\x80\x02" + TENSOR + b"q\x020" + table + b"q\x030"
    content += RECORD + b"}(" + text(b"_parameters") + b"h\x03" + text(b"_modules") + b"}ubq\x01"
    for _ in range(count):
        children = b"}(" + text(b"a") + b"h\x01" + text(b"b") + b"h\x01u"
        content += b"0" + RECORD + b"}(" + text(b"_parameters") + b"h\x03" + text(b"_modules") + children + b"ubq\x01"
    return content + b"."


def long_names(count, length):
    """Returns nested records whose names add up: 2**count paths of `count` times `length` characters."""
    name = text(b"n" * length) + b"q\x020"
    tables = b"}(" + text(b"_parameters") + b"}h\x02" + TENSOR + b"s" + text(b"_modules")
    content = b"\x80\x02" + name + RECORD + tables + b"}ubq\x01"
    for _ in range(count):
        children = b"}(h\x02h\x01" + text(b"b") + b"h\x01u"
        content += b"0" + RECORD + tables + children + b"ubq\x01"
    return content + b"."


HOSTILE = {
    "modules that share a large table": shared_tables(20, 3_000),
    "names that add up": long_names(20, 100_000),
    "children of numbers": b"\x80\x02"
    + RECORD
    + b"}("
    + text(b"_parameters")
    + b"}"
    + text(b"_modules")
    + b"}K\x01Nsub.",
    "a view of another storage": (b"\x80\x02" + TENSOR + b".").replace(b"J\x04\x00\x00\x00tQ", b"J\x04\x00\x00\x00)tQ"),
    "a storage of two types": b"\x80\x02" + TENSOR + TENSOR.replace(b"FloatStorage", b"HalfStorage") + b"\x86.",
    "a storage of two sizes": b"\x80\x02"
    + TENSOR
    + TENSOR.replace(b"J\x04", b"J\x03").replace(b"K\x04", b"K\x03")
    + b"\x86.",
    "many empty sets": b"\x80\x04" + b"\x8f" * 500_001 + b".",
    "a negative size": b"\x80\x02" + STORAGE.replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\xff") + b".",
    "a huge size of a storage": b"\x80\x02" + STORAGE.replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\x7f") + b".",
    "a size of zero and 2**62": b"\x80\x02"
    + REBUILD
    + b"("
    + STORAGE
    + b"K\x00K\x00\x8a\x08"
    + struct.pack("<q", 2**62)
    + b"\x86K\x01K\x01\x86\x89}tR.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call with a list": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "a state of a list": b"\x80\x02]}b.",
    "a state twice": b"\x80\x02" + RECORD + b"}b}b.",
    "a dotted name": b"\x80\x04" + text(b"torch._utils") + text(b"_rebuild_tensor_v2.__globals__") + b"\x93.",
    "a name that is a number": b"\x80\x04K\x01" + text(b"x") + b"\x93.",
    "a set of unhashable members": b"\x80\x04\x8f(]\x90.",
    "a frozen set": b"\x80\x04(K\x01\x91.",
    "a bytearray": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
    "an object of a class with keywords": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "a pop of a mark": b"\x80\x02((00N1.",
    "a text of 2**63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "an old persistent reference": b"\x80\x02Pstorage\n.",
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
        with pytest.raises(PretrainedError, match="file.pt|nested|names of its|not a text"):
            loaded = restricted_pickle.load(path, MODULE.__eq__)
            restricted_pickle.module_parameters(loaded)
        assert tracemalloc.get_traced_memory()[1] < 150e6
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


def test_overlapping_storages_are_rejected(tmp_path, monkeypatch):
    """As in zip bombs whose entries contain each other: each is no larger than the file, but their sum is."""
    storages = [STORAGE.replace(text(b"0"), text(b"%d" % i)) for i in range(3)]
    path = archive(tmp_path / "file.pt", b"\x80\x02" + b"".join(storages) + b"\x87.", [("data/0", bytes(1000))])
    read = zipfile.ZipFile.read
    inside = lambda zipped, name: read(zipped, "archive/data/0" if "/data/" in name else name)
    monkeypatch.setattr(zipfile.ZipFile, "read", inside)
    with pytest.raises(PretrainedError, match="overlap"):
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
        {"a": {**ENTRY, "dtype": "F8_E4M3"}},
        {"a": {**ENTRY, "dtype": ["F32"]}},
        {"a": {**ENTRY, "shape": [-1]}},
        {"a": {**ENTRY, "shape": [2**40, 0, 2**40], "data_offsets": [0, 0]}},
        {"a": {**ENTRY, "data_offsets": [0.0, 16.0]}},
        {"a": {**ENTRY, "data_offsets": [16, 0]}},
        b'{"a":"' + b"x" * (11 << 20) + b'"}',
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
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf\n <HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"Entry not found", "Entry not found"),
        (b"404: Not Found\n", "404: Not Found"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b'{\n "metadata": {}, "weight_map": {}}', "JSON"),
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
        (b"\x93NUMPY\x01\x00" + bytes(60), "npz"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path, content, token):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match=token):
        state_dict.read(path)


def test_pipes_folders_and_missing_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, token in ((tmp_path / "pipe", "pipe is not"), (tmp_path, "not a file"), (tmp_path / "no", "no does not")):
        with pytest.raises(PretrainedError, match=token):
            state_dict.read(path)


def test_shards_are_named(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(100))
    with pytest.raises(PretrainedError, match="shards"):
        state_dict.read(tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_rejected(tmp_path, share):
    for content in samples(tmp_path):
        (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
        with pytest.raises(PretrainedError, match="cut"):
            state_dict.read(tmp_path / "cut")


@pytest.mark.parametrize(
    ("keys", "token"),
    [(["model"], None), (["state_dict"], None), (["model", "state_dict"], "several"), (["weights"], "'weights'")],
)
def test_state_dicts_of_trainings_are_found(tmp_path, keys, token):
    content = b"\x80\x02}(" + text(b"epoch") + b"K\x07"
    content += b"".join(text(key.encode()) + b"}" + text(b"module.a") + TENSOR + b"s" for key in keys) + b"u."
    path = archive(tmp_path / "file.pt", content, DATA)
    if token is None:
        np.testing.assert_array_equal(state_dict.read(path)["a"], np.arange(4))
    else:
        with pytest.raises(PretrainedError, match=token):
            state_dict.read(path)


def samples(folder):
    """Writes one intact file of each format, and returns their contents."""
    archive(folder / "zip.pt", b"\x80\x02}" + text(b"a") + TENSOR + b"s.", DATA)
    np.savez(folder / "model.npz", a=np.arange(4.0))
    safetensors(folder / "model.safetensors", {"a": ENTRY})
    (folder / "plain.pkl").write_bytes(pickle.dumps({"state_dict": [1, (2.0, "x"), {"a"}, b"b" * 40]}, 2))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


# Opcodes of `pickle_machine`, and others; those with an argument get a small one.
PIECES = [bytes([code]) for code in b"().0123NQRabdelostu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94]}"]
PIECES += [
    b"K\x00",
    b"K\x04",
    b"J\x00\x00\x00\x80",
    b"G" + bytes(8),
    b"h\x00",
    b"h\x01",
    b"q\x00",
    b"q\x01",
    b"\x8a\x01\x05",
]
PIECES += [text(b"storage"), text(b"0"), text(b"_parameters"), text(b"_modules"), b"ctorch\nFloatStorage\n", REBUILD]
PIECES += [
    b"ctorch.nn\nModule\n",
    b"ccollections\nOrderedDict\n",
    b"cbuiltins\nset\n",
    b"c__torch__.A\nB\n",
    STORAGE,
    TENSOR,
    RECORD,
]


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=60), scale=st.sampled_from([1, 1, 1, 3000]))
def test_random_programs_end_in_an_error_or_in_plain_values(tmp_path_factory, pieces, scale):
    """Programs of valid opcodes in any order, some of them repeated thousands of times."""
    path = archive(tmp_path_factory.mktemp("fuzz") / "file.pt", b"\x80\x04" + b"".join(pieces) * scale + b".", DATA)
    kept = dict(vars(torch_objects)), dict(vars(pickle_machine))
    tracemalloc.start()
    try:
        loaded = restricted_pickle.load(path, MODULE.__eq__)
        assert type(loaded).__module__ in ("builtins", "numpy", torch_objects.__name__)
        restricted_pickle.module_parameters(loaded)
    except PretrainedError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 150e6
    assert (dict(vars(torch_objects)), dict(vars(pickle_machine))) == kept, "the reader is as it was"


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
