"""What a compiled program does: matrix products, memory traffic and collectives, each as often as it runs.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trip count. Here the text of the optimised
program (`compiled.as_text()`) is read instead: computations, which of them call which, and how often. All figures are
those of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "u4": 0.5, "s4": 0.5, "u2": 0.25, "s2": 0.25, "u1": 0.125}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
# They move nothing: names for what is there, or the halves of something counted elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "async-done", "async-update", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: %name = type opcode(operands), attributes."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str:
        """The value of name=value up to the next comma or blank; "" where there is none."""
        found = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array that is gathered, reduced or sent, on one device.
      group: indices (in the order of the mesh's devices) of the first group of devices that exchange.
      times: how often it runs.
      in_loop: whether it stands in a loop.
      overlapped: whether the program does other work between its start and its end.
      name: the operation of the model that asked for it, as far as the compiler knows.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: int
    in_loop: bool
    overlapped: bool
    name: str

    @property
    def sent(self) -> float:
        """Bytes that each device receives over its links, all runs together, by the best algorithm on a ring."""
        n = len(self.group)
        if n < 2:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share * self.times


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction that runs, a whole fusion for instance.

    Attributes:
      name, opcode: its own.
      times: how often it runs.
      flops: floating-point operations of the matrix products and convolutions in it, each time.
      bytes: of main memory that it reads and writes, each time: operands and results, without those that the compiler
        placed in the fast memory; of sliced operands the slices.
      cycles: the compiler's own estimate, 0 where it made none.
    """

    name: str
    opcode: str
    times: int
    flops: float
    bytes: float
    cycles: int

    @property
    def aside(self) -> bool:
        """Whether it runs beside what follows it: copies into the fast memory, exchanges."""
        return self.opcode.endswith("-start") or self.opcode in KINDS


class Program:
    """A program read from its text.

    Attributes:
      unknown_loops: names of loops whose trip count the compiler did not find; their bodies are counted once.
    """

    def __init__(self, text: str):
        """
        Args:
          text: of an optimised program, as `compiled.as_text()` gives it.

        Raises:
          ValueError: where it holds no program.
        """
        self._computations, self._entry = _parse(text)
        self.unknown_loops: list[str] = []
        self._times: dict[str, int] = collections.Counter()
        self._loops: dict[str, bool] = {}
        self._inside: set[str] = set()  # of fusions and asynchronous calls: counted with the instruction that calls
        self._beside: dict[str, bool] = {}  # of these: whether what they exchange has other work beside it
        self._visit(self._entry, 1, False)

    def _visit(self, name: str, times: int, in_loop: bool) -> None:
        self._times[name] += times
        self._loops[name] = self._loops.get(name, False) or in_loop
        for one in self._computations[name].values():
            called = _called(one)
            if one.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.attributes)
                count = int(trips[1]) if trips else self._limit(one)
                if not count:
                    self.unknown_loops.append(one.name)
                    count = 1
                for inner in called:
                    self._visit(inner, times * count, True)
            elif one.opcode in ("fusion", "call", "conditional", "async-start"):
                for inner in called:
                    if one.opcode in ("fusion", "async-start"):
                        self._inside.add(inner)
                        works = any(x.opcode in ("dot", "convolution") for x in self._computations[inner].values())
                        self._beside[inner] = works or self._overlapped(name, one)
                    self._visit(inner, times, in_loop)

    def _limit(self, loop: Instruction) -> int:
        """N of a loop that runs while a counter from 0 is below the constant N, as scans do; 0 where it is another."""
        condition = self._computations[loop.attribute("condition").lstrip("%")]
        test = list(condition.values())[-1]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return 0
        bound = condition[test.operands[1]]
        number = re.match(r"(\d+)\)", bound.attributes)
        return int(number[1]) if bound.opcode == "constant" and number else 0

    @functools.cached_property
    def work(self) -> tuple[Work, ...]:
        """Everything it runs, in no order. What stands inside of a fusion is part of that fusion's."""
        done = []
        for name, times in self._times.items():
            if name in self._inside:
                continue
            types = self._computations[name]
            for one in types.values():
                if one.opcode not in _FREE and not one.opcode.endswith("-done"):
                    cycles = re.search(r'estimated_cycles":"(\d+)', one.attributes)
                    done.append(
                        Work(
                            one.name, one.opcode, times, self._flops(one, types), self._moved(one, types),
                            int(cycles[1]) if cycles else 0,
                        )
                    )  # fmt: skip
        return tuple(done)

    @property
    def flops(self) -> float:
        """Floating-point operations of its matrix products and convolutions, and of the kernels that state theirs."""
        return sum(one.flops * one.times for one in self.work)

    @property
    def hbm_bytes(self) -> float:
        """Bytes read from and written to the device's main memory."""
        return sum(one.bytes * one.times for one in self.work)

    @property
    def silent_kernels(self) -> int:
        """How often it calls kernels (Pallas) that do not tell what they compute: in none of the other figures."""
        calls = ((name, one) for name in self._times for one in self._computations[name].values())
        return sum(
            self._times[name]
            for name, one in calls
            if 'custom_call_target="tpu_custom_call"' in one.attributes and "cost_estimate" not in one.attributes
        )

    def _flops(self, one: Instruction, types: dict[str, Instruction]) -> float:
        if one.opcode in ("dot", "convolution"):
            left, right = (_shape(types[x].type) for x in one.operands)
            return (_dot_flops if one.opcode == "dot" else _convolution_flops)(one, left, right)
        if one.opcode == "custom-call":
            stated = re.search(r'cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
            return float(stated[1]) if stated else 0.0
        if one.opcode == "fusion":
            bodies = [self._computations[name] for name in _called(one)]
            return sum(self._flops(inner, body) for body in bodies for inner in body.values())
        return 0.0

    def _moved(self, one: Instruction, types: dict[str, Instruction]) -> float:
        """Bytes of main memory that one instruction reads and writes."""
        if one.opcode == "fusion":
            return self._fusion_bytes(one, types)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _bytes(one.type, hbm=True)
        if one.opcode == "dynamic-update-slice":
            return 2 * _bytes(types[one.operands[1]].type, hbm=True)
        if one.opcode.endswith("-start"):  # its type is (destination, source, …) or (source, destination, …)
            return sum(_bytes(f"{dtype}[{shape}]{layout}", hbm=True) for dtype, shape, layout in _arrays(one)[:2])
        return _bytes(one.type, hbm=True) + sum(_bytes(types[x].type, hbm=True) for x in one.operands)

    def _fusion_bytes(self, fusion: Instruction, types: dict[str, Instruction]) -> float:
        """What a fusion reads and writes. An operand that it only slices counts by its slices, a result into which it
        only writes a slice by that slice."""
        body = self._computations[_called(fusion)[0]]
        users = collections.defaultdict(list)
        for one in body.values():
            for operand in one.operands:
                users[operand].append(one)
        moved, updated = 0.0, 0.0
        for one in body.values():
            if one.opcode != "parameter":
                continue
            number = int(one.attributes.split(")")[0])
            whole = _bytes(types[fusion.operands[number]].type, hbm=True)
            uses = users[one.name]
            slices = [u for u in uses if u.opcode in ("dynamic-slice", "slice", "gather") and u.operands[0] == one.name]
            updates = [u for u in uses if u.opcode == "dynamic-update-slice" and u.operands[0] == one.name]
            if whole and uses and len(slices) + len(updates) == len(uses):
                whole = min(whole, sum(_bytes(u.type) for u in slices))
                for update in updates:
                    part, full = _bytes(body[update.operands[1]].type), _bytes(update.type)
                    updated += full - part
            moved += whole
        return moved + max(_bytes(fusion.type, hbm=True) - updated, 0.0)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        found = []
        everything = ((name, one) for name in self._times for one in self._computations[name].values())
        for name, one in everything:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            types, times = self._computations[name], self._times[name]
            size = _bytes(one.type if one.opcode == kind else _last(one.type))
            if kind == "reduce-scatter":
                size = sum(_bytes(types[x].type) for x in one.operands)
            asked = re.search(r'op_name="([^"]*)"', one.attributes)
            found.append(
                Collective(
                    kind, size, _first_group(one.attributes), times, self._loops[name],
                    self._overlapped(name, one), asked[1] if asked else "",
                )
            )  # fmt: skip
        return tuple(found)

    def _overlapped(self, name: str, one: Instruction) -> bool:
        """Whether other work is scheduled between the start and the end of an asynchronous collective, or within one
        fusion with it."""
        if self._beside.get(name):
            return True
        if not one.opcode.endswith("-start"):
            return False
        order = list(self._computations[name].values())
        after = order[order.index(one) + 1 :]
        for other in after:
            if one.name in other.operands:
                return False
            if other.opcode not in _FREE and not other.opcode.endswith(("-start", "-done")):
                return True
        return False


# -- the text -----------------------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name in their order; and the name of the first one to run."""
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
    # A parameter's number, a constant's value stand where others have operands: kept with the attributes.
    attributes = rest[opening + 1 :] if opcode in ("parameter", "constant") else rest[closing + 1 :]
    return Instruction(name, kind, opcode, tuple(_NAME.findall(inside)), attributes)


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"A parenthesis is never closed in {text[:100]!r}.")


def _called(one: Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    return _CALLED.findall(one.attributes) + (_NAME.findall(branches[1]) if branches else [])


def _arrays(one: Instruction) -> list[tuple[str, str, str]]:
    return _ARRAY.findall(one.type)


def _shape(kind: str) -> tuple[int, ...]:
    """The dimensions of an array's type."""
    return tuple(int(x.strip("<=")) for x in _ARRAY.search(kind)[2].split(",") if x)


def _bytes(kind: str, *, hbm: bool = False) -> float:
    """Bytes of a type's arrays; with `hbm`, of those in main memory alone."""
    total = 0.0
    for dtype, shape, layout in _ARRAY.findall(kind):
        if hbm and "S(1)" in layout:
            continue
        width = _BYTES.get(dtype) or (int(found[1]) / 8 if (found := re.match(r"[a-z]+(\d+)", dtype)) else 0)
        total += width * math.prod(int(x.strip("<=")) for x in shape.split(",") if x)
    return total


def _last(kind: str) -> str:
    """The type of an asynchronous collective's result: the last array of (operands, results)."""
    dtype, shape, layout = [x for x in _ARRAY.findall(kind) if x[0] not in ("u32", "s32") or x[1]][-1]
    return f"{dtype}[{shape}]{layout}"


def _first_group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group of a collective, in any of the notations for them."""
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


# -- floating-point operations ------------------------------------------------------------------------------------


def _dot_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    del right
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
    return 2.0 * math.prod(_shape(one.type)) * inner


def _convolution_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Counts the places where window and picture meet, without padding: TPU programs write every matrix product,
    batched ones too, as a convolution."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, out = (dict(zip(text, shape)) for text, shape in zip(names.groups(), (left, right, _shape(one.type))))
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = sorted(axis for axis in lhs if axis.isdigit())
    listed = lambda name, default: fields[name].split("x") if name in fields else [default] * len(axes)
    meetings = 1
    for axis, stride, pad, spread, step in zip(
        axes, listed("stride", "1"), listed("pad", "0_0"), listed("lhs_dilate", "1"), listed("rhs_dilate", "1")
    ):
        place = np.arange(out[axis])[:, None] * int(stride) + np.arange(rhs[axis])[None] * int(step)
        place -= int(pad.split("_")[0])
        meetings *= int(((place >= 0) & (place % int(spread) == 0) & (place // int(spread) < lhs[axis])).sum())
    groups = int(one.attribute("batch_group_count") or 1)
    return 2.0 * rhs["i"] * rhs["o"] * (lhs["b"] // groups) * meetings
