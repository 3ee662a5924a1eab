"""What a compiled program does: matrix products, memory traffic and collectives, each as often as it runs.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trip count. Here the text of the optimised
program (`hlo.py`) is read instead: computations, which of them call which, and how often. All figures are those of one
device. Of the branches of a conditional the one with the most work counts, each time.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from dalle_jax.aot import hlo
from dalle_jax.aot.hlo import Instruction

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# They move nothing: names for what is there, or the halves of something counted elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "async-done", "async-update", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


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
      silent: whether it is a kernel that does not tell what it computes.
    """

    name: str
    opcode: str
    times: int
    flops: float
    bytes: float
    cycles: int
    silent: bool

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
        self._computations, self._entry = hlo.parse(text)
        self.unknown_loops: list[str] = []
        self._times: dict[str, int] = collections.Counter()
        self._loops: dict[str, bool] = {}
        self._inside: set[str] = set()  # of fusions and asynchronous calls: counted with the instruction that calls
        self._beside: dict[str, bool] = {}  # of these: whether what they exchange has other work beside it
        self._channels: dict[str, str] = {}
        self._later: set[str] = set()  # of these: the later parts of an exchange that is counted where it starts
        self._visit(self._entry, 1, False)

    def _visit(self, name: str, times: int, in_loop: bool) -> None:
        self._times[name] += times
        self._loops[name] = self._loops.get(name, False) or in_loop
        for one in self._computations[name].values():
            called = hlo.called(one)
            if one.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.attributes)
                count = int(trips[1]) if trips else self._limit(one)
                if not count:
                    self.unknown_loops.append(one.name)
                    count = 1
                for inner in called:
                    self._visit(inner, times * count, True)
            elif one.opcode == "conditional":
                self._visit(max(called, key=self._size), times, in_loop)
            elif one.opcode in ("fusion", "call", "async-start"):
                for inner in called:
                    if one.opcode in ("fusion", "async-start"):
                        self._inside.add(inner)
                        works = any(x.opcode in ("dot", "convolution") for x in self._computations[inner].values())
                        self._beside[inner] = works or self._overlapped(name, one)
                    if one.opcode == "fusion" and self._channel(inner):
                        self._join(name, one, inner)
                    self._visit(inner, times, in_loop)

    def _join(self, name: str, one: Instruction, inner: str) -> None:
        """Of an exchange in parts, fusions of one computation with one channel (its start, some with other work, its
        end), only the first counts; it has other work beside it where anything is done until the last."""
        order, channel = list(self._computations[name].values()), self._channel(inner)
        parts = [i for i, x in enumerate(order) if x.opcode == "fusion" and self._channel(*hlo.called(x)) == channel]
        if order[parts[0]] is not one:
            self._later.add(inner)
            return
        works = lambda x: x.opcode not in _FREE and not x.opcode.endswith(("-start", "-done"))
        between = any(works(order[i]) for i in range(parts[0], parts[-1]) if i not in parts)
        fused = (x.opcode for i in parts for x in self._computations[hlo.called(order[i])[0]].values())
        self._beside[inner] = between or any(opcode in ("dot", "convolution") for opcode in fused)

    def _size(self, name: str) -> float:
        """A measure of the work of a computation: bytes of all that it and what it calls compute."""
        ones = self._computations[name].values()
        return sum(hlo.size(one.type) + sum(map(self._size, hlo.called(one))) for one in ones)

    def _channel(self, name: str) -> str:
        """The channel over which a fusion exchanges; "" where it does not."""
        if name not in self._channels:
            of = (one.attribute("channel_id") for one in self._computations[name].values() if _kind(one) in KINDS)
            self._channels[name] = next(of, "")
        return self._channels[name]

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
                            int(cycles[1]) if cycles else 0, _silent(one),
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

    @functools.cached_property
    def silent_kernels(self) -> dict[str, int]:
        """Calls of kernels (Pallas) that do not tell what they compute, by name: of these, only what their operands and
        results cost is in the other figures."""
        calls = collections.Counter()
        for name, times in self._times.items():
            for one in self._computations[name].values():
                if _silent(one):
                    calls[one.name.rpartition(".")[0] or one.name] += times
        return dict(calls)

    def _flops(self, one: Instruction, types: dict[str, Instruction]) -> float:
        if one.opcode in ("dot", "convolution"):
            left, right = (hlo.shape(types[x].type) for x in one.operands)
            return (_dot_flops if one.opcode == "dot" else _convolution_flops)(one, left, right)
        if one.opcode == "custom-call":
            stated = re.search(r'cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
            return float(stated[1]) if stated else 0.0
        if one.opcode == "fusion":
            bodies = [self._computations[name] for name in hlo.called(one)]
            return sum(self._flops(inner, body) for body in bodies for inner in body.values())
        return 0.0

    def _moved(self, one: Instruction, types: dict[str, Instruction]) -> float:
        """Bytes of main memory that one instruction reads and writes."""
        if one.opcode == "fusion":
            return self._fusion_bytes(one, types)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * hlo.size(one.type, hbm=True)
        if one.opcode == "dynamic-update-slice":
            return 2 * hlo.size(types[one.operands[1]].type, hbm=True)
        if one.opcode.endswith("-start"):  # its type is (destination, source, …) or (source, destination, …)
            return sum(hlo.size(f"{dtype}[{shape}]{layout}", hbm=True) for dtype, shape, layout in hlo.arrays(one)[:2])
        return hlo.size(one.type, hbm=True) + sum(hlo.size(types[x].type, hbm=True) for x in one.operands)

    def _fusion_bytes(self, fusion: Instruction, types: dict[str, Instruction]) -> float:
        """What a fusion reads and writes. An operand that it only slices counts by its slices, a result into which it
        only writes a slice by that slice; what it exchanges beside its work, not at all."""
        inside = hlo.called(fusion)[0]
        body = self._computations[inside]
        exchanged = _exchanged(body)
        moved, kept = 0.0, 0.0
        for one in body.values():
            if one.opcode != "parameter" or one.name in exchanged:
                continue
            whole = hlo.size(types[fusion.operands[_number(one)]].type, hbm=True)
            sliced = self._sliced(inside, one.name) if whole else None
            read, left = sliced or (whole, 0.0)
            moved, kept = moved + min(whole, read), kept + left
        root, written = list(body.values())[-1], hlo.size(fusion.type, hbm=True)
        if exchanged:
            made = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
            written = sum(hlo.size(one.type, hbm=True) for one in made if one.name not in exchanged)
        return moved + max(written - kept, 0.0)

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Of each computation's values the instructions that take them."""
        found = {}
        for computation, body in self._computations.items():
            users = found[computation] = collections.defaultdict(list)
            for one in body.values():
                for operand in dict.fromkeys(one.operands):
                    users[operand].append(one)
        return found

    def _sliced(self, computation: str, name: str) -> tuple[float, float] | None:
        """Of a value that a computation only slices, or writes slices into, the bytes that it reads, and those that it
        leaves as they are in what it writes; None of any other."""
        body, users = self._computations[computation], self._users[computation][name]
        read = left = 0.0
        for user in users:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                read += hlo.size(user.type)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                left += hlo.size(user.type) - hlo.size(body[user.operands[1]].type)
            elif user.opcode == "fusion":  # within the fusion
                inside = hlo.called(user)[0]
                named = {_number(p): p.name for p in self._computations[inside].values() if p.opcode == "parameter"}
                for place in (i for i, operand in enumerate(user.operands) if operand == name):
                    inner = self._sliced(inside, named[place])
                    if inner is None:
                        return None
                    read, left = read + inner[0], left + inner[1]
            else:
                return None
        return (read, left) if users else None

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        found = []
        everything = ((name, one) for name in self._times for one in self._computations[name].values())
        for name, one in everything:
            kind = _kind(one)
            if kind not in KINDS or name in self._later:
                continue
            if name.startswith("all-reduce-scatter"):  # a fusion of both
                kind = "reduce-scatter"
            types, times = self._computations[name], self._times[name]
            size = hlo.size(hlo.last(one.type) if one.opcode.endswith("-start") else one.type)
            if one.opcode == "reduce-scatter":
                size = sum(hlo.size(types[x].type) for x in one.operands)
            asked = re.search(r'op_name="([^"]*)"', one.attributes)
            found.append(
                Collective(
                    kind, size, hlo.first_group(one.attributes), times, self._loops[name],
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


def _silent(one: Instruction) -> bool:
    """Whether it is a kernel (Pallas) that does not tell what it computes."""
    return 'custom_call_target="tpu_custom_call"' in one.attributes and "cost_estimate" not in one.attributes


def _kind(one: Instruction) -> str:
    """One of `KINDS`, where it is an exchange or the start of one."""
    return one.opcode.removesuffix("-start")


def _number(parameter: Instruction) -> int:
    """Which of its computation's parameters it is."""
    return int(parameter.attributes.split(")")[0])


def _exchanged(body: dict[str, Instruction]) -> set[str]:
    """Names of what takes part in the exchange of a fusion: the exchange, what it and its kin read, what they give."""
    found = {one.name for one in body.values() if _kind(one) in KINDS}
    if found:
        found |= {one.name for one in body.values() if one.opcode == "custom-call" and found & set(one.operands)}
        found |= {operand for name in list(found) for operand in body[name].operands}
    return found


# -- floating-point operations ------------------------------------------------------------------------------------


def _dot_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    del right
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i) if contracted else 1
    return 2.0 * math.prod(hlo.shape(one.type)) * inner


def _convolution_flops(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Counts the places where window and picture meet, without padding: TPU programs write every matrix product,
    batched ones too, as a convolution."""
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, out = (dict(zip(text, shape)) for text, shape in zip(names.groups(), (left, right, hlo.shape(one.type))))
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
