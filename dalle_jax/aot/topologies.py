"""TPU topologies without TPUs: devices that the TPU compiler knows, and what their chips can do.

The TPU compiler (libtpu, `pip install -e '.[tpu]'`) runs on any machine. A topology's name is a generation and the
number of chips along each axis of its torus: "v5e:16x16" (256 chips), "v5p:8x8x8" (512 chips), "v6e:16x16" (256 chips).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from dalle_jax.errors import ConfigError, MeshError

GIB = 2**30
NAMES = "v5e:AxB and v6e:AxB with A and B 2, 4, 8 or 16; v5p:AxBxC with A and B even (numbers of chips along each axis)"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's published figures (cloud.google.com/tpu/docs, and "How to Scale Your Model" for the links).

    Attributes:
      name: of its generation.
      flops: peak of bfloat16 matrix products, operations a second.
      memory: bytes of main memory (HBM).
      memory_rate: of that memory, bytes a second.
      link_rate: of one link to a neighbour, one way, bytes a second; each axis of the torus has two.
      whole_axis: an axis of at least so many chips, where a multiple of it, closes to a ring.
      clock: cycles a second, in which the compiler's own estimates are.
      cores: of one device, which some kernels share.
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


def devices(name: str) -> Sequence[Any]:
    """The devices of a topology, to build a mesh of and compile for; nothing can run on them.

    Sets what libtpu reads from the environment, and makes this process compute on its CPU: a machine's own TPU stays
    free.

    Args:
      name: such as "v5p:8x8x8".

    Raises:
      ConfigError: where libtpu is missing, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("Compiling for TPUs needs libtpu, which is not installed: pip install -e '.[tpu]'.")
    if not re.fullmatch(r"v\w+:\d+x\d+(x\d+)?", name):
        raise ConfigError(f"config.topology={name!r}: expected a name such as v5p:8x8x8. Known: {NAMES}.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks a cloud machine's metadata server, for minutes
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # after the environment: it loads libtpu

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"config.topology={name!r}: the TPU compiler refuses it ({reason}). Known: {NAMES}."
        ) from None
    if found[0].device_kind not in CHIPS:
        known = ", ".join(chip.name for chip in CHIPS.values())
        raise ConfigError(f"config.topology={name!r}: figures are known for chips of {known}, not of {name}.")
    logging.info("%s: %d chips", name, len(found))
    return found


def chip(device: Any) -> Chip:
    """The figures of a device's chip."""
    if device.device_kind not in CHIPS:
        raise MeshError(f"No figures are known for {device.device_kind}; there are some for {', '.join(CHIPS)}.")
    return CHIPS[device.device_kind]


def exchange_rate(group: Sequence[Any], everything: Sequence[Any]) -> float:
    """Bytes a second that each device of a group can receive from the others: both links of each axis of the torus
    along which the group extends, one link's worth where the axis is no ring.

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
