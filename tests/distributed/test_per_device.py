"""Products with parameters that are split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_meshes import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.distributed import per_device
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.per_device import contract
from dalle_jax.distributed.rows import to_mesh
from dalle_jax.distributed.sharding import batch_sharding, on_mesh, partition_spec

MIXED = ("embed", None, "heads"), (0,)  # contracted along fsdp, split along tensor
SUMMED = ("heads", "embed"), (0,)  # contracted along tensor, gathered along fsdp


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 2), (4, 2, 1), (1, 8, 1), (2, 1, 4)])
@pytest.mark.parametrize("names, contracted", [MIXED, SUMMED, (("vocab", "embed"), (1,))])
@pytest.mark.parametrize("in_turn", [False, True])
def test_contract_is_the_product(axes, names, contracted, in_turn, monkeypatch):
    """Values and gradients are those of the plain product, on every mesh and for every split."""
    monkeypatch.setattr(per_device, "scatters_in_turn", lambda: in_turn)
    rng = np.random.default_rng(0)
    shape = (8, 3, 8)[: len(names)] if len(names) == 3 else (8, 16)
    kernel = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(8, 5, shape[contracted[0]])).astype(np.float32)
    product = lambda x, k: jnp.tensordot(x, k, ((2,), contracted))
    loss = lambda x, k: jnp.sin(contract(product, x, k, names, contracted)).sum()
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = step(x, kernel)
    mesh = make_mesh(*axes)
    with on_mesh(mesh):
        layout = NamedSharding(mesh, partition_spec(names, shape, mesh))
        rows = to_mesh({"x": x}, batch_sharding(mesh))["x"]
        value, gradients = step(rows, jax.device_put(kernel, layout))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for ours, theirs in zip(gradients, expected[1]):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_contract_gathers_once_and_scatters_once():
    """The program has one all-gather of the kernel and one reduce-scatter of its gradient, summed over `data`."""
    mesh = make_mesh(data=2, fsdp=4)
    with on_mesh(mesh):
        kernel = jax.device_put(np.ones((16, 8), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
        x = to_mesh({"x": np.ones((8, 3, 16), np.float32)}, batch_sharding(mesh))["x"]
        loss = lambda k: jnp.square(contract(jnp.matmul, x, k, ("embed", "mlp"), (0,))).sum()
        text = jax.jit(jax.grad(loss)).lower(kernel).as_text()
    assert text.count("stablehlo.all_gather") == 1 and text.count("stablehlo.reduce_scatter") == 1
    sums = [line for line in text.splitlines() if line.lstrip().startswith("}) : (tensor<")]
    assert any("(tensor<4x8xf32>) -> tensor<4x8xf32>" in line for line in sums)  # a quarter of the kernel's 16 rows
    assert not any("(tensor<16x8xf32>) -> tensor<16x8xf32>" in line for line in sums)


def test_contract_of_rows_that_cannot_be_split():
    mesh = make_mesh(data=2, fsdp=4)
    one = np.arange(16, dtype=np.float32).reshape(1, 1, 16)
    with on_mesh(mesh):
        kernel = jax.device_put(np.eye(16, dtype=np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
        ours = jax.jit(lambda x, k: contract(jnp.matmul, x, k, ("embed", "mlp"), (0,)))(one, kernel)
    np.testing.assert_array_equal(ours, one)


@pytest.mark.parametrize(
    "device, names, in_turn",
    [
        (("TPU v5 lite", "tpu"), ("embed", "mlp"), True),
        (("TPU v5 lite", "tpu"), ("heads", "embed"), True),
        (("TPU v5 lite", "tpu"), ("mlp", "embed"), False),
        (("TPU v6 lite", "tpu"), ("embed", "mlp"), False),
        (("TPU v5", "tpu"), ("embed", "mlp"), False),
        (("NVIDIA H100 80GB HBM3", "gpu"), ("embed", "mlp"), False),
        (("cpu", "cpu"), ("embed", "mlp"), False),
    ],
    ids=str,
)
def test_without_sparse_cores_gradients_are_scattered_in_turn(device, names, in_turn):
    """The backward pass continues after the barrier. An MLP's hidden units have none, see `contract`."""
    loss = lambda x, kernel: contract(jnp.matmul, x, kernel, names, (0,)).sum()
    with jax.sharding.use_abstract_mesh(mesh_of(*device)):
        traced = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(np.ones((8, 3, 16), "f4"), np.ones((16, 16), "f4")))
    assert traced.count("optimization_barrier") == in_turn
    if in_turn:
        assert traced.index("reduce_scatter") < traced.index("optimization_barrier")
