"""The mesh, the layout rules, and the way of batches to the mesh."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.distributed import mesh as mesh_module
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import check_batch, to_mesh
from dalle_jax.distributed.sharding import batch_sharding, constrain, on_mesh, partition_spec, platform, shardings_of
from dalle_jax.errors import ConfigError, MeshError


@pytest.mark.parametrize(
    "asked, shape",
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
        ({"data": 1}, (1, 1, 1)),
    ],
)
def test_mesh_sizes(asked, shape):
    mesh = make_mesh(**asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and tuple(mesh.shape.values()) == shape
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "asked, token",
    [
        ({"data": 16}, "16"),
        ({"data": -1, "tensor": 3}, "multiple of 3"),
        ({"data": -1, "fsdp": -1}, "-1"),
        ({"data": 0}, "data=0"),
    ],
)
def test_mesh_that_does_not_fit(asked, token):
    with pytest.raises(MeshError, match=token):
        make_mesh(**asked)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """The attributes of a TPU device that a mesh of several slices reads."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


@pytest.mark.parametrize(
    "slices, asked, shape", [(2, {}, (8, 1, 1)), (2, {"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
                             (4, {"data": -1, "tensor": 2}, (4, 1, 2))],
)  # fmt: skip
def test_only_data_crosses_slices(slices, asked, shape):
    devices = [FakeDevice(i, i % slices, (i // slices % 2, i // slices // 2, 0)) for i in range(8)]
    mesh = make_mesh(**asked, devices=devices)
    assert tuple(mesh.shape.values()) == shape and len(set(mesh.devices.flat)) == 8
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    for row in mesh.devices:  # each index of `data` lies in one slice
        assert len({device.slice_index for device in row.flat}) == 1
    along_data = [row.flat[0].slice_index for row in mesh.devices]
    assert along_data == sorted(along_data) and set(along_data) == set(range(slices))  # the fewest crossings


@pytest.mark.parametrize(
    "slice_of, asked",
    [
        (lambda i: i % 2, {"data": 1, "fsdp": 8}),
        (lambda i: i % 2, {"data": 1, "fsdp": 2, "tensor": 2}),
        (lambda i: int(i < 3), {}),
    ],
)
def test_slices_that_do_not_fit(slice_of, asked):
    with pytest.raises(MeshError, match="2 slices"):
        make_mesh(**asked, devices=[FakeDevice(i, slice_of(i)) for i in range(8)])


def test_layout_of_parameters():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    init = nn.initializers.zeros

    def params(_):
        boxed = nn.with_logical_partitioning
        return {
            "q": boxed(init, ("layers", "embed", "heads", "kv"))(jax.random.key(0), (3, 4, 2, 5)),
            "conv": boxed(init, (None, None, "conv_in", "conv_out"))(jax.random.key(0), (7, 7, 3, 8)),
            "plain": jnp.zeros((4,)),
        }

    shardings = shardings_of(jax.eval_shape(params, 0), mesh)
    assert shardings["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert shardings["conv"].spec == PartitionSpec(None, None, None, "tensor")  # three channels stay whole
    assert shardings["plain"].spec == PartitionSpec()


def test_bad_names_are_errors():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="widht"):
        partition_spec(("embed", "widht"), (4, 4), mesh)
    with pytest.raises(ValueError, match="mlp.*heads"):
        partition_spec(("mlp", "heads"), (4, 4), mesh)
    with pytest.raises(ValueError, match=r"\(4, 4, 4\)"):
        partition_spec(("embed", "mlp"), (4, 4, 4), mesh)
    with pytest.raises(MeshError, match="big.*1025"):
        partition_spec(("embed", "mlp"), (1025, 1026), mesh, "big")
    with on_mesh(mesh), pytest.raises(ValueError, match="widht"):
        jax.jit(lambda x: constrain(x, "batch", "widht"))(jnp.zeros((8, 4)))


def test_constrain_lays_out_activations():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def f(x):
        return constrain(x * 2, "batch", "mlp")

    x = jnp.arange(32.0).reshape(8, 4)
    with on_mesh(mesh):
        y = jax.jit(f)(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)  # without a mesh it does nothing


def test_the_default_device_decides_the_platform_without_a_mesh(monkeypatch):
    """A process with a GPU that computes on its CPU, by the device or by its name."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = []
    function = jax.jit(lambda x: found.append(platform()) or x)
    function(1)
    for device in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(device):
            function(1)
    assert found == ["gpu", "cpu", "cpu"]


def test_batches_reach_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharding = batch_sharding(mesh)
    batch = {"image": np.arange(8 * 2, dtype=np.uint8).reshape(8, 2), "text": np.arange(8)}
    put = to_mesh(batch, sharding)
    np.testing.assert_array_equal(put["image"], batch["image"])
    assert {shard.data.shape for shard in put["image"].addressable_shards} == {(2, 2)}
    assert to_mesh(put, sharding)["text"] is put["text"]


def test_batch_that_cannot_be_split():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_batch(mesh, 12)
    check_batch(mesh, 24, accumulate_steps=3)
    for rows in (0, -4):
        with pytest.raises(ConfigError, match=f"batch_size={rows}"):
            check_batch(mesh, rows)
    with pytest.raises(MeshError, match="batch_size=10.* 4"):
        check_batch(mesh, 10)
    with pytest.raises(MeshError, match="batch_size=16.* 12"):
        check_batch(mesh, 16, accumulate_steps=3)


def test_unused_devices_are_logged_once(caplog):
    mesh_module._warn_once.cache_clear()
    for _ in range(2):
        make_mesh(data=3)
    (record,) = caplog.records
    assert "3 of 8" in record.message
