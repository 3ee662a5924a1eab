"""Executes a pickle without Python's unpickler: a small stack machine with the opcodes that files of weights use.

A pickle is a program. Python's unpickler may call functions, set attributes and allocate memory as the program asks.
This machine builds plain containers only. Every name, call and object state goes through the functions that the caller
gives it. Other opcodes are rejected. So are numbers beyond 64 bits and keys that are not plain: their hashes could be
chosen so that a dictionary becomes very slow.

Memory and time are bounded by the size of the pickle: an opcode creates at most one object, and nothing is copied.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from dalle_jax.errors import PretrainedError

# CLIP ViT-L/14 as a scripted module has about 40,000 opcodes. One opcode creates at most 216 bytes, an empty set.
_MAX_OPCODES = 500_000
_MAX_INTEGER = 2**63
_MARK = object()

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_PYTHON_2_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_STORES = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_LOADS = {"GET", "BINGET", "LONG_BINGET"}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Machine:
    """Executes pickles. It creates plain values only; the caller's functions create everything else.

    Args:
      name: maps "module.Class" of the file to an object.
      call: maps such an object and its arguments, a tuple, to a value.
      set_state: gives a value of `call` its state. Values of other origin have no state.
      persistent: maps a persistent reference of the file to a value.
      key: returns the plain value that stands for the key of a dictionary or the member of a set.
      drop_content: raises unless a value of `call` may be filled like a container. The content is dropped.
      long_integers: allows integers beyond 64 bits.
    """

    def __init__(
        self,
        *,
        name: Callable[[str], Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        set_state: Callable[[Any, Any], None],
        persistent: Callable[[Any], Any],
        key: Callable[[Any], Any],
        drop_content: Callable[[Any], None],
        long_integers: bool = False,
    ):
        self._name, self._call, self._set_state, self._persistent = name, call, set_state, persistent
        self._key, self._drop_content = key, drop_content
        self._long_integers = long_integers

    def run(self, file: BinaryIO) -> Any:
        """Executes one pickle, and leaves the file at its end.

        Raises:
          PretrainedError: an opcode or a value that weights do not need, or an object that the caller rejects.
          Exception: damage, of any kind.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(file))):
            if number >= _MAX_OPCODES:
                raise PretrainedError(f"The pickle has more than {_MAX_OPCODES:,} opcodes, which no weights need.")
            if opcode.name == "STOP":
                return self._pop()
            self._execute(opcode.name, argument)
        raise pickle.UnpicklingError("the pickle does not end")

    def _execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _STORES:
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in _LOADS:
            stack.append(self._memo[argument])
        elif name in _NUMBERS:
            if type(argument) is int and abs(argument) > _MAX_INTEGER and not self._long_integers:
                raise PretrainedError("The pickle holds an integer beyond 64 bits, which weights do not need.")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TEXTS or name in _BYTES:
            stack.append(argument)
        elif name in _PYTHON_2_TEXTS:
            stack.append(argument.encode("latin-1").decode("utf-8"))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack.append(tuple([self._pop() for _ in range(count)][::-1]))
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise PretrainedError(f"The pickle uses the opcode {name}, which weights do not need. It was rejected.")

    # -- the stack --

    def _pop(self) -> Any:
        if self._top() is _MARK:
            raise pickle.UnpicklingError("a value is missing")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise pickle.UnpicklingError("the stack is empty")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        place = next((i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK), None)
        if place is None:
            raise pickle.UnpicklingError("a mark is missing")
        values = stack[place + 1 :]
        del stack[place:]
        return values

    def _container(self, kind: type) -> Any:
        """Returns the container on top of the stack, which the file is filling, or one whose content is dropped."""
        if type(self._top()) is kind:
            return self._stack[-1]
        self._drop_content(self._top())
        return kind()

    # -- the operations --

    def _pairs(self, values: list[Any]) -> Iterator[tuple[Any, Any]]:
        if len(values) % 2:
            raise pickle.UnpicklingError("a key without a value")
        return zip(map(self._key, values[::2]), values[1::2], strict=True)

    def _pop_value(self, _: Any) -> None:
        if self._stack and self._stack[-1] is _MARK:
            self._stack.pop()
        else:
            self._pop()

    def _duplicate(self, _: Any) -> None:
        value = self._pop()
        self._stack += [value, value]

    def _make_dict(self, _: Any) -> None:
        self._stack.append(dict(self._pairs(self._pop_to_mark())))

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._container(dict)[self._key(key)] = value

    def _set_items(self, _: Any) -> None:
        pairs = list(self._pairs(self._pop_to_mark()))
        self._container(dict).update(pairs)

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._container(list).append(value)

    def _extend(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._container(list).extend(values)

    def _add(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._container(set).update(map(self._key, values))

    def _load_name(self, asked: str) -> None:
        self._stack.append(self._name(asked.replace(" ", ".", 1)))

    def _load_stacked_name(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise pickle.UnpicklingError("a name that is not a text")
        self._stack.append(self._name(f"{module}.{name}"))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("arguments that are not a tuple")
        self._stack.append(self._call(function, arguments))

    def _build(self, _: Any) -> None:
        state = self._pop()
        self._set_state(self._top(), state)

    def _refer(self, text: Any) -> None:
        self._stack.append(self._persistent(self._pop() if text is None else text))


class _Bounded:
    """A file that never reserves more memory than its size, whatever length an opcode claims."""

    def __init__(self, file: BinaryIO):
        self._file, self.readline, self.tell = file, file.readline, file.tell
        place = file.tell()
        self._size = file.seek(0, io.SEEK_END)
        file.seek(place)

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


def plain_key(key: Any) -> Any:
    """Returns the key of a dictionary or the member of a set, which must be a plain value."""
    if type(key) not in (str, bytes, int, bool, float, type(None)):
        raise PretrainedError("A dictionary of the pickle has a key that is not a plain value.")
    return key


_OPERATIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "POP": Machine._pop_value,
    "POP_MARK": lambda machine, argument: machine._pop_to_mark() and None,
    "DUP": Machine._duplicate,
    "EMPTY_LIST": lambda machine, argument: machine._stack.append([]),
    "EMPTY_DICT": lambda machine, argument: machine._stack.append({}),
    "EMPTY_SET": lambda machine, argument: machine._stack.append(set()),
    "LIST": lambda machine, argument: machine._stack.append(machine._pop_to_mark()),
    "TUPLE": lambda machine, argument: machine._stack.append(tuple(machine._pop_to_mark())),
    "DICT": Machine._make_dict,
    "SETITEM": Machine._set_item,
    "SETITEMS": Machine._set_items,
    "APPEND": Machine._append,
    "APPENDS": Machine._extend,
    "ADDITEMS": Machine._add,
    "GLOBAL": Machine._load_name,
    "STACK_GLOBAL": Machine._load_stacked_name,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "BUILD": Machine._build,
    "PERSID": Machine._refer,
    "BINPERSID": Machine._refer,
}
