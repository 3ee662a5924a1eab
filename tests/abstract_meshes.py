"""Meshes of devices that this machine does not have, to trace for them."""

import dataclasses

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dalle_jax.distributed.mesh import MESH_AXES


def mesh_of(kind, platform):
    """Returns an abstract mesh of data = fsdp = 2."""
    fields = {"device_kind": kind, "num_cores": 1, "platform": platform}
    # Not every version of JAX knows the platform of an abstract device.
    known = {field.name for field in dataclasses.fields(AbstractDevice)}
    device = AbstractDevice(**{name: value for name, value in fields.items() if name in known})
    return AbstractMesh((2, 2, 1), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=device)
