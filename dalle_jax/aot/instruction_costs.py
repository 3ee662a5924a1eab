"""Floating-point operations and memory traffic of single instructions of a compiled program."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax.aot import hlo
from dalle_jax.aot.hlo import COLLECTIVES, Instruction


class InstructionCosts:
    """Computes the costs of one run of an instruction, on one device."""

    def __init__(self, computations: Mapping[str, Mapping[str, Instruction]]):
        """Stores the program.

        Args:
          computations: instructions by name, of each computation by name, as from `hlo.parse`.
        """
        self._computations = computations

    def flops(self, computation: str, one: Instruction) -> float:
        """Returns the operations of matrix products, convolutions and kernels with a stated cost.

        A product of float32 factors in full precision counts once for each product of bfloat16 factors that it takes.
        """
        if one.opcode in ("dot", "convolution"):
            left, right = (hlo.shape(self._computations[computation][x].type) for x in one.operands)
            flops = _dot_flops(one, left) if one.opcode == "dot" else _convolution_flops(one, left, right)
            return flops * _passes(one)
        if one.opcode == "custom-call":
            stated = re.search(r'cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
            return float(stated[1]) if stated else 0.0
        if one.opcode == "fusion":
            return sum(self.flops(name, x) for name in hlo.called(one) for x in self._computations[name].values())
        return 0.0

    def traffic(self, computation: str, one: Instruction) -> float:
        """Returns the bytes of main memory that an instruction reads and writes."""
        if one.opcode == "fusion":
            return self._fusion_traffic(computation, one)
        types = self._computations[computation]
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * hlo.size(one.type, hbm=True)
        if one.opcode == "dynamic-update-slice":
            return 2 * hlo.size(types[one.operands[1]].type, hbm=True)
        if one.opcode.endswith("-start"):  # its type is (destination, source, …) or (source, destination, …)
            return sum(hlo.size(f"{dtype}[{shape}]{layout}", hbm=True) for dtype, shape, layout in hlo.arrays(one)[:2])
        return hlo.size(one.type, hbm=True) + sum(hlo.size(types[x].type, hbm=True) for x in one.operands)

    def _fusion_traffic(self, computation: str, fusion: Instruction) -> float:
        """Returns the bytes that a fusion reads and writes.

        An operand that the fusion only slices counts as its slices. A result into which it only writes a slice counts
        as that slice. Arrays that it exchanges with other devices while it works do not count.
        """
        types = self._computations[computation]
        inside = hlo.called(fusion)[0]
        body = self._computations[inside]
        exchanged = _exchanged(body)
        moved, kept = 0.0, 0.0
        for one in body.values():
            if one.opcode != "parameter" or one.name in exchanged:
                continue
            whole = hlo.size(types[fusion.operands[_parameter_number(one)]].type, hbm=True)
            sliced = self._sliced(inside, one.name) if whole else None
            read, left = sliced or (whole, 0.0)
            moved, kept = moved + min(whole, read), kept + left
        root, written = list(body.values())[-1], hlo.size(fusion.type, hbm=True)
        if exchanged:
            results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
            written = sum(hlo.size(one.type, hbm=True) for one in results if one.name not in exchanged)
        return moved + max(written - kept, 0.0)

    def _sliced(self, computation: str, name: str) -> tuple[float, float] | None:
        """Returns the traffic of a value that a computation only slices, or only writes slices into.

        Returns:
          The bytes that it reads, and the bytes that it leaves unchanged in its results. None for any other value.
        """
        body, users = self._computations[computation], self._users[computation][name]
        read = left = 0.0
        for user in users:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                read += hlo.size(user.type)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                left += hlo.size(user.type) - hlo.size(body[user.operands[1]].type)
            elif user.opcode == "fusion":  # a fusion within the fusion
                inside = hlo.called(user)[0]
                parameters = [one for one in self._computations[inside].values() if one.opcode == "parameter"]
                named = {_parameter_number(one): one.name for one in parameters}
                for place in (i for i, operand in enumerate(user.operands) if operand == name):
                    inner = self._sliced(inside, named[place])
                    if inner is None:
                        return None
                    read, left = read + inner[0], left + inner[1]
            else:
                return None
        return (read, left) if users else None

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        """The instructions that use each value, by computation and name of the value."""
        found = {}
        for computation, body in self._computations.items():
            users = found[computation] = collections.defaultdict(list)
            for one in body.values():
                for operand in dict.fromkeys(one.operands):
                    users[operand].append(one)
        return found


def _parameter_number(parameter: Instruction) -> int:
    return int(parameter.attributes.split(")")[0])


def _exchanged(body: Mapping[str, Instruction]) -> set[str]:
    """Returns the names of the values in the exchange of a fusion: the collective, its inputs and its results."""
    found = {one.name for one in body.values() if hlo.kind(one) in COLLECTIVES}
    if found:
        found |= {one.name for one in body.values() if one.opcode == "custom-call" and found & set(one.operands)}
        found |= {operand for name in list(found) for operand in body[name].operands}
    return found


def _passes(one: Instruction) -> int:
    """Returns the number of bfloat16 products in a product of the units of a TPU, by its precision."""
    precision = re.search(r"operand_precision=\{(\w+)", one.attributes)
    return {"high": 3, "highest": 6}.get(precision[1], 1) if precision else 1


def _dot_flops(one: Instruction, left: tuple[int, ...]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
    return 2.0 * math.prod(hlo.shape(one.type)) * inner


def _convolution_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Counts the positions where window and image overlap, without padding.

    TPU programs write every matrix product, batched ones too, as a convolution.
    """
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, out = (dict(zip(text, shape)) for text, shape in zip(names.groups(), (left, right, hlo.shape(one.type))))
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = sorted(axis for axis in lhs if axis.isdigit())
    listed = lambda name, default: fields[name].split("x") if name in fields else [default] * len(axes)
    overlaps = 1
    for axis, stride, pad, lhs_dilation, rhs_dilation in zip(
        axes, listed("stride", "1"), listed("pad", "0_0"), listed("lhs_dilate", "1"), listed("rhs_dilate", "1")
    ):
        place = np.arange(out[axis])[:, None] * int(stride) + np.arange(rhs[axis])[None] * int(rhs_dilation)
        place -= int(pad.split("_")[0])
        inside = (place >= 0) & (place % int(lhs_dilation) == 0) & (place // int(lhs_dilation) < lhs[axis])
        overlaps *= int(inside.sum())
    groups = int(one.attribute("batch_group_count") or 1)
    return 2.0 * rhs["i"] * rhs["o"] * (lhs["b"] // groups) * overlaps
