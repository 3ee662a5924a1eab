"""Counts the work of a compiled program: matrix products, memory traffic and collectives, times their number of runs.

XLA's `cost_analysis()` counts the body of a loop once, whatever its trip count. This module reads the text of the
optimised program (`hlo.py`) instead: the computations, their calls and their trip counts. All numbers are per device. A
conditional counts as its branch with the most work.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

from dalle_jax.aot import hlo
from dalle_jax.aot.hlo import COLLECTIVES, Instruction
from dalle_jax.aot.instruction_costs import InstructionCosts

# These move no data: they name existing values, or are parts of an operation that is counted elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "async-done", "async-update", "after-all", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip

_ASYNCHRONOUS = ("async-start", "call-start")  # the second one runs on a SparseCore


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `hlo.COLLECTIVES`.
      bytes: size of the complete array that one device gathers, reduces or sends.
      group: the first group of devices that exchange, as indices into the devices of the mesh.
      times: number of runs.
      in_loop: whether it is inside a loop.
      overlapped: whether the program does other work between its start and its end.
      name: the operation of the model that caused it, or "" if the compiler does not say.
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
        """Bytes that each device receives in all runs, with the best algorithm on a ring."""
        n = len(self.group)
        if n < 2:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share * self.times


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction that runs, such as a complete fusion.

    Attributes:
      name, opcode: as in the program.
      times: number of runs.
      flops: floating-point operations of its matrix products and convolutions, per run.
      bytes: main memory that it reads and writes, per run. Arrays in fast memory do not count, and sliced operands
        count as their slices.
      cycles: estimate of the compiler, or 0.
      silent: whether it is a kernel that does not state its cost.
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
        """Whether it runs in parallel with the next instructions, as copies into fast memory and exchanges do."""
        return self.opcode.endswith("-start") or self.opcode in COLLECTIVES


class Program:
    """The work of a program, read from its text.

    Attributes:
      unknown_loops: names of loops with unknown trip count. Their bodies are counted once.
    """

    def __init__(self, text: str):
        """Parses the program.

        Args:
          text: an optimised program, as from `compiled.as_text()`.

        Raises:
          ValueError: the text is not a compiled program.
        """
        self._computations, entry = hlo.parse(text)
        self._costs = InstructionCosts(self._computations)
        self.unknown_loops: list[str] = []
        self._times: dict[str, int] = collections.Counter()
        self._loops: dict[str, bool] = {}
        self._inside: set[str] = set()  # bodies of fusions and asynchronous calls: counted with their caller
        self._parallel: dict[str, bool] = {}  # of these bodies: whether their exchange overlaps with other work
        self._channels: dict[str, str] = {}
        self._later: set[str] = set()  # of these bodies: later parts of an exchange that is counted where it starts
        self._visit(entry, 1, False)

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
            elif one.opcode in ("fusion", "call", *_ASYNCHRONOUS):
                for inner in called:
                    if one.opcode in ("fusion", *_ASYNCHRONOUS):
                        self._inside.add(inner)
                        works = any(x.opcode in ("dot", "convolution") for x in self._computations[inner].values())
                        self._parallel[inner] = works or self._overlapped(name, one)
                    if one.opcode == "fusion" and self._channel(inner):
                        self._join(name, one, inner)
                    self._visit(inner, times, in_loop)

    def _join(self, name: str, one: Instruction, inner: str) -> None:
        """Joins the parts of an exchange: fusions of one computation with one channel.

        Only the first part counts. It overlaps with other work if anything runs until the last part.
        """
        order, channel = list(self._computations[name].values()), self._channel(inner)
        parts = [i for i, x in enumerate(order) if x.opcode == "fusion" and self._channel(*hlo.called(x)) == channel]
        if order[parts[0]] is not one:
            self._later.add(inner)
            return
        works = lambda x: x.opcode not in _FREE and not x.opcode.endswith(("-start", "-done"))
        between = any(works(order[i]) for i in range(parts[0], parts[-1]) if i not in parts)
        fused = (x.opcode for i in parts for x in self._computations[hlo.called(order[i])[0]].values())
        self._parallel[inner] = between or any(opcode in ("dot", "convolution") for opcode in fused)

    def _size(self, name: str) -> float:
        """Estimates the work of a computation by the bytes of all values that it and its callees compute."""
        ones = self._computations[name].values()
        return sum(hlo.size(one.type) + sum(map(self._size, hlo.called(one))) for one in ones)

    def _channel(self, name: str) -> str:
        """Returns the channel of the exchange in a fusion, or "" without one."""
        if name not in self._channels:
            exchanges = (one for one in self._computations[name].values() if hlo.kind(one) in COLLECTIVES)
            self._channels[name] = next((one.attribute("channel_id") for one in exchanges), "")
        return self._channels[name]

    def _limit(self, loop: Instruction) -> int:
        """Returns N for a loop that counts from 0 to a constant N, as scans do, and 0 for any other loop."""
        condition = self._computations[loop.attribute("condition").lstrip("%")]
        test = list(condition.values())[-1]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return 0
        bound = condition[test.operands[1]]
        number = re.match(r"(\d+)\)", bound.attributes)
        return int(number[1]) if bound.opcode == "constant" and number else 0

    @functools.cached_property
    def work(self) -> tuple[Work, ...]:
        """All instructions that run, in no order. The inside of a fusion is part of the fusion."""
        done = []
        for name, times in self._times.items():
            if name in self._inside:
                continue
            for one in self._computations[name].values():
                if one.opcode not in _FREE and not one.opcode.endswith("-done"):
                    cycles = re.search(r'estimated_cycles":"(\d+)', one.attributes)
                    done.append(
                        Work(
                            one.name, one.opcode, times, self._costs.flops(name, one), self._costs.traffic(name, one),
                            int(cycles[1]) if cycles else 0, _silent(one),
                        )
                    )  # fmt: skip
        return tuple(done)

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products, convolutions, and kernels that state their cost."""
        return sum(one.flops * one.times for one in self.work)

    @property
    def hbm_bytes(self) -> float:
        """Bytes read from and written to main memory."""
        return sum(one.bytes * one.times for one in self.work)

    @functools.cached_property
    def silent_kernels(self) -> dict[str, int]:
        """Number of calls of Pallas kernels that do not state their cost, by name.

        All other numbers include only the memory traffic of their operands and results.
        """
        calls = collections.Counter()
        for name, times in self._times.items():
            for one in self._computations[name].values():
                if _silent(one):
                    calls[one.name.rpartition(".")[0] or one.name] += times
        return dict(calls)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """All exchanges between devices, in no order."""
        found = []
        everything = ((name, one) for name in self._times for one in self._computations[name].values())
        for name, one in everything:
            kind = hlo.kind(one)
            if kind not in COLLECTIVES or name in self._later:
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
        """Returns whether other work runs between the start and the end of a collective, or in the same fusion."""
        if self._parallel.get(name):
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
    """Returns whether an instruction is a Pallas kernel that does not state its cost."""
    return 'custom_call_target="tpu_custom_call"' in one.attributes and "cost_estimate" not in one.attributes
