"""Files of torch.save are read without torch, and files with code are rejected without running it."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import restricted_pickle


class Asks:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_like_zip(path, content, files=()):
    """Writes an archive like torch.save around a pickle of `content`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, 2))
        for name, data in files:
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the files of this test")

    def save(content):
        path = tmp_path / "file.pt"
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return save


def test_tensors_come_back_as_arrays(save):
    import torch

    grid = torch.arange(12.0).reshape(3, 4)
    content = {
        "plain": grid,
        "transposed": grid.t(),
        "slice": grid[1:, 2],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "half": torch.tensor([0.5, 2.0], dtype=torch.float16),
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "integers": torch.tensor([[1, -2]]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "nested": [1, ("two", None), {"three": torch.zeros(1)}],
    }
    loaded = restricted_pickle.load(save(content))
    assert loaded.keys() == content.keys()
    for name in content:
        if name != "nested":
            expected = content[name].detach()
            assert str(loaded[name].dtype) == str(expected.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(np.float64(loaded[name]), expected.double().numpy(), err_msg=name)
    assert loaded["nested"][:2] == [1, ("two", None)]


def test_only_allowed_modules_become_records(save):
    import torch

    path = save(torch.nn.Sequential(collections.OrderedDict(first=torch.nn.Linear(2, 3), second=torch.nn.Linear(3, 1))))
    with pytest.raises(PretrainedError, match=r"'torch\.nn\.modules\.container\.Sequential'"):
        restricted_pickle.load(path)
    record = restricted_pickle.load(path, lambda name: name.startswith("torch.nn.modules."))
    assert record.qualified_name == "torch.nn.modules.container.Sequential"
    arrays = restricted_pickle.module_parameters(record)
    assert {name: array.shape for name, array in arrays.items()} == {
        "first.weight": (3, 2), "first.bias": (3,), "second.weight": (1, 3), "second.bias": (1,)
    }  # fmt: skip


def test_code_in_a_torch_file_is_rejected_and_not_run(save, tmp_path):
    target = tmp_path / "owned"
    path = save({"weights": Asks(os.system, f"touch {target}")})
    with pytest.raises(PretrainedError, match=r"file\.pt.*'posix\.system'"):
        restricted_pickle.load(path, lambda name: name.startswith("torch.nn."))
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content",
    [
        Asks(os.system, "touch owned"),
        Asks(eval, "open('owned', 'w')"),
        Asks(getattr, collections.OrderedDict, "fromkeys"),
        Asks(io.FileIO, "owned", "w"),
        [Asks(collections.deque, [1])],
    ],
)
def test_code_in_any_pickle_is_rejected_and_not_run(tmp_path, monkeypatch, protocol, content):
    monkeypatch.chdir(tmp_path)
    path = torch_like_zip(tmp_path / "file.pt", pickle.dumps(content, protocol))
    with pytest.raises(PretrainedError, match="safetensors"):
        restricted_pickle.load(path, lambda name: name.startswith("torch.nn."))
    assert not (tmp_path / "owned").exists()


def test_attributes_of_allowed_names_are_rejected(tmp_path):
    # Protocol 4 allows dotted names, but an allowed class must not expose its attributes.
    content = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    with pytest.raises(PretrainedError, match=r"OrderedDict\.fromkeys"):
        restricted_pickle.load(torch_like_zip(tmp_path / "file.pt", content))


@pytest.mark.parametrize("state", [b"}U\x04evilK\x01s", b"(N}U\x04evilK\x01st"], ids=["attributes", "slots"])
@pytest.mark.parametrize(
    "name",
    [
        b"torch._utils\n_rebuild_tensor_v2",
        b"torch._utils\n_rebuild_parameter",
        b"torch\ndevice",
        b"torch\nFloatStorage",
        b"torch\nBFloat16Storage",
        b"collections\nOrderedDict",
        b"builtins\nset",
    ],
)
def test_a_file_cannot_change_the_reader(tmp_path, name, state):
    """BUILD sets attributes or calls `__setstate__`. It must fail on every object that the reader provides."""
    content = b"\x80\x02c" + name + b"\n" + state + b"b."
    with pytest.raises(PretrainedError, match="readable"):
        restricted_pickle.load(torch_like_zip(tmp_path / "file.pt", content))


def storage_pickle(size, stride, numel, offset=0):
    """Returns a handwritten pickle of one float32 tensor."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", Asks_storage, "0", "cpu", numel) if value is Storage else None

    class Asks_storage:  # noqa: N801  (stands for torch.FloatStorage)
        pass

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return Rebuild, (Storage, offset, size, stride, False, collections.OrderedDict())

    def Rebuild(*arguments):  # noqa: N802
        pass

    names = {Asks_storage: "ctorch\nFloatStorage\n", Rebuild: "ctorch._utils\n_rebuild_tensor_v2\n"}

    class Named(pickle._Pickler):
        persistent_id = Writer.persistent_id

        def save_global(self, value, name=None):
            if value in names:
                self.write(names[value].encode())
                self.memoize(value)
            else:
                super().save_global(value, name)

        dispatch = {**pickle._Pickler.dispatch, type: save_global, type(Rebuild): save_global}

    buffer = io.BytesIO()
    Named(buffer, 2).dump(Tensor())
    return buffer.getvalue()


def test_a_tensor_beyond_its_storage_is_rejected(tmp_path):
    data = [("data/0", np.arange(6, dtype=np.float32).tobytes())]
    load = lambda *numbers: restricted_pickle.load(  # noqa: E731
        torch_like_zip(tmp_path / "file.pt", storage_pickle(*numbers), data)
    )
    np.testing.assert_array_equal(load((2, 3), (3, 1), 6), np.arange(6).reshape(2, 3))
    for numbers in [
        ((2, 4), (3, 1), 6),  # too many elements
        ((2, 3), (4, 1), 6),  # strides that leave the storage
        ((6,), (1,), 6, 1),  # an offset that leaves it
        ((2, 3), (-3, 1), 6),
        ((10**12,), (0,), 6),  # a few bytes repeated into terabytes
    ]:
        with pytest.raises(PretrainedError, match="size"):
            load(*numbers)
    with pytest.raises(PretrainedError):
        load((7,), (1,), 7)  # a storage that the file does not hold


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04", pickle.dumps(3), pickle.dumps({"a": 1}, 2)])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match="file.pkl"):
        restricted_pickle.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(PretrainedError, match="nothing.pkl"):
        restricted_pickle.load(tmp_path / "nothing.pkl")
