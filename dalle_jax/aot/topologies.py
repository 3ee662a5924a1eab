"""TPU topologies without TPUs: devices to compile for, and the published data of their chips.

The TPU compiler (libtpu, `pip install -e '.[tpu]'`) runs on any machine. The name of a topology holds the generation
and the number of chips along each axis of the torus:

    v5e:16x16   256 chips
    v5p:8x8x8   512 chips
    v6e:16x16   256 chips
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from absl import logging

from dalle_jax.errors import ConfigError, MeshError

GIB = 2**30
NAMES = "v5e:AxB and v6e:AxB with A and B 2, 4, 8 or 16; v5p:AxBxC with A and B even (numbers of chips along each axis)"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published data of a chip (cloud.google.com/tpu/docs; the links from "How to Scale Your Model").

    Attributes:
      name: name of the generation.
      flops: peak of bfloat16 matrix products, in operations per second.
      memory: main memory (HBM), in bytes.
      memory_rate: bandwidth of the main memory, in bytes per second.
      link_rate: bandwidth of one link to a neighbour in one direction, in bytes per second. Each axis of the torus has
        two links.
      whole_axis: an axis whose number of chips is a multiple of this closes to a ring.
      clock: cycles per second, the unit of the compiler's own estimates.
      cores: cores of one device, over which some kernels split their work.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    whole_axis: int
    clock: float
    cores: int


CHIPS = {
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 8.1e11, 4.5e10, 16, 1.5e9, 1),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2.765e12, 9e10, 4, 1.75e9, 2),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1.64e12, 9e10, 16, 1.75e9, 1),
}


def devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology, for a mesh to compile for. They cannot run programs.

    Sets environment variables of libtpu, and makes this process compute on the CPU, so that a TPU of this machine stays
    free.

    Args:
      name: name of the topology, such as "v5p:8x8x8".

    Raises:
      ConfigError: libtpu is missing, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("Compilation for TPUs needs libtpu, which is not installed: pip install -e '.[tpu]'.")
    if not re.fullmatch(r"v\w+:\d+x\d+(x\d+)?", name):
        raise ConfigError(f"config.topology={name!r}: expected a name such as v5p:8x8x8. Known: {NAMES}.")
    # Without the first variable, libtpu queries the metadata server of cloud machines for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # loads libtpu, which reads the environment

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"config.topology={name!r}: the TPU compiler rejects it ({reason}). Known: {NAMES}."
        ) from None
    if found[0].device_kind not in CHIPS:
        known = ", ".join(chip.name for chip in CHIPS.values())
        raise ConfigError(f"config.topology={name!r}: chips of {known} are known, but not those of {name}.")
    logging.info("%s: %d chips", name, len(found))
    return found


def chip(device: jax.Device) -> Chip:
    """Returns the chip data of a device.

    Raises:
      MeshError: the kind of device is unknown.
    """
    if device.device_kind not in CHIPS:
        raise MeshError(f"Unknown chip {device.device_kind}: expected one of {', '.join(CHIPS)}.")
    return CHIPS[device.device_kind]


def exchange_rate(group: Sequence[jax.Device], everything: Sequence[jax.Device]) -> float:
    """Returns the bytes per second that each device of a group can receive from the others.

    Each axis of the torus along which the group extends adds two links if it is a ring, otherwise one.

    Args:
      group: devices that exchange.
      everything: all devices of the mesh.
    """
    one, rate = chip(group[0]), 0.0
    for axis in range(3):
        size = 1 + max(device.coords[axis] for device in everything)
        places = {device.coords[axis] for device in group}
        if len(places) > 1:
            ring = len(places) == size and size % one.whole_axis == 0
            rate += (2 if ring else 1) * one.link_rate
    return rate or one.link_rate
