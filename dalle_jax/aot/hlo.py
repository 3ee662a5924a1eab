"""Parses the text of a compiled program (`compiled.as_text()`) into computations and instructions."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "u4": 0.5, "s4": 0.5, "u2": 0.25, "s2": 0.25, "u1": 0.125}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value` up to the next comma or blank, or "" without one."""
        found = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
        return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Parses a program.

    Returns:
      The instructions of each computation, in order and by name, and the name of the entry computation.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            one = _instruction(found[1], found[2])
            current[one.name] = one
    if not entry:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    # Parameters have their number and constants their value in place of operands. Both stay with the attributes.
    attributes = rest[opening + 1 :] if opcode in ("parameter", "constant") else rest[closing + 1 :]
    return Instruction(name, kind, opcode, tuple(_NAME.findall(inside)), attributes)


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"A parenthesis is not closed in {text[:100]!r}.")


def kind(one: Instruction) -> str:
    """Returns the opcode without "-start", which is one of `COLLECTIVES` for every exchange between devices."""
    return one.opcode.removesuffix("-start")


def called(one: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    return _CALLED.findall(one.attributes) + (_NAME.findall(branches[1]) if branches else [])


def arrays(one: Instruction) -> list[tuple[str, str, str]]:
    """Returns dtype, dimensions and layout of each array in the type of an instruction, as text."""
    return _ARRAY.findall(one.type)


def shape(type_: str) -> tuple[int, ...]:
    """Returns the dimensions of the type of an array."""
    return tuple(int(x.strip("<=")) for x in _ARRAY.search(type_)[2].split(",") if x)


def size(type_: str, *, hbm: bool = False) -> float:
    """Returns the bytes of all arrays of a type. With `hbm`, counts only arrays in main memory."""
    total = 0.0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if hbm and "S(1)" in layout:
            continue
        width = _BYTES.get(dtype) or (int(found[1]) / 8 if (found := re.match(r"[a-z]+(\d+)", dtype)) else 0)
        total += width * math.prod(int(x.strip("<=")) for x in shape.split(",") if x)
    return total


def last(type_: str) -> str:
    """Returns the result type of an asynchronous collective: the last array of (operands, results)."""
    dtype, shape, layout = [x for x in _ARRAY.findall(type_) if x[0] not in ("u32", "s32") or x[1]][-1]
    return f"{dtype}[{shape}]{layout}"


def first_group(attributes: str) -> tuple[int, ...]:
    """Returns the devices of the first group of a collective, in any notation of HLO."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        sizes = [int(size) for size in axes.values()]
        devices = np.arange(math.prod(sizes))
        if order := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2] or ""):
            devices = devices.reshape([int(x) for x in order[1].split(",")])
            devices = devices.transpose([int(x) for x in order[2].split(",")]) if order[2] else devices
        devices = devices.reshape(sizes)
        chosen = re.findall(r"'([^']+)'", mesh[3])
        index = tuple(slice(None) if axis in chosen else 0 for axis in axes)
        return tuple(devices[index].reshape(-1).tolist())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        devices = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            devices = devices.transpose([int(x) for x in iota[3].split(",")])
        return tuple(devices.reshape(shape[0], -1)[0].tolist())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return tuple(int(x) for x in listed[1].split(",") if x)
    return ()
