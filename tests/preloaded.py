"""Python processes that start in milliseconds.

Importing the library takes seconds of CPU time. A server imports it once and forks a process for each program.
The forked process then behaves like `python ARGUMENTS`: it has its own environment, signals, session and output, and
it ends through Python's usual shutdown. The server never uses a JAX device, so that it may fork.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "tests")
# `dalle_jax.main` is missing, because programs run it as `__main__` and it defines flags.
LIBRARY = (
    "jobs.train",
    "jobs.generate",
    "jobs.evaluate",
    "jobs.quickstart",
    "distributed.joining",
    "distributed.turns",
)
_NUMBER = struct.Struct("i")


class Program:
    """A running program. It has the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], session: bool):
        self.args = list(arguments)
        self.returncode: int | None = None
        pipes = [os.pipe() for _ in range(3)]
        request = {"arguments": self.args, "environment": dict(environment), "session": session}
        socket.send_fds(_server(), [json.dumps(request).encode()], [writing for _, writing in pipes])
        for _, writing in pipes:
            os.close(writing)
        out, error, self._status = (reading for reading, _ in pipes)
        self.stdout, self.stderr = open(out), open(error)
        self.pid = self._number()

    def _number(self) -> int:
        number = os.read(self._status, _NUMBER.size)
        if not number:
            raise RuntimeError("The server of preloaded processes has ended.")
        return _NUMBER.unpack(number)[0]

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status; -N after signal N."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._number()
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        """Returns the exit status, or None while the program runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the program at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Reads the rest of both outputs and waits for the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        rest = ["", ""]

        def read(i, file):
            rest[i] = "" if file.closed else file.read()

        readers = [threading.Thread(target=read, args=pair) for pair in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.daemon = True
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(deadline - time.monotonic(), 0))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.stdout.close()
        self.stderr.close()
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
        return rest[0], rest[1]


@functools.cache
def _server() -> socket.socket:
    """Starts the server of this process; returns the connection to it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        server = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(its.fileno())], pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, HERE]), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def stop():
        ours.close()
        server.wait()

    atexit.register(stop)
    return ours


# -- the server --------------------------------------------------------------------------------------------------------


def _preload() -> None:
    sys.modules["torch"] = None  # tensorboardX would import it, which takes seconds
    for name in LIBRARY:
        importlib.import_module(f"dalle_jax.{name}")
    del sys.modules["torch"]
    import compiled_programs

    compiled_programs.share()


def _serve(connection: socket.socket) -> tuple[dict, int, int]:
    """Forks a process for each request.

    Returns:
      In that process only: the request, and its stdout and stderr. The server itself ends with its client.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes ended processes
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    connection.close()
    request, (out, error, status) = json.loads(message), descriptors
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program = os.fork()
    if program:  # this process reports how the program ends
        os.close(out)
        os.close(error)
        _, ended = os.waitpid(program, 0)
        os.write(status, _NUMBER.pack(os.waitstatus_to_exitcode(ended)))
        os._exit(0)
    if request["session"]:
        os.setsid()
    os.write(status, _NUMBER.pack(os.getpid()))
    os.close(status)
    return request, out, error


def _prepare(request: dict, out: int, error: int) -> tuple[types.CodeType, types.ModuleType]:
    """Gives this process what `python ARGUMENTS` has at its start.

    Returns:
      The code to run, and the module `__main__`.
    """
    for descriptor, standard in ((out, 1), (error, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    first, *rest = request["arguments"]
    if first == "-c":
        source, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        code = compile(source, "<string>", "exec")
    elif first == "-m":
        name, *rest = rest
        sys.path[0] = os.getcwd()
        main.__spec__ = spec = importlib.util.find_spec(name)
        main.__file__, main.__package__ = spec.origin, spec.parent
        sys.argv = [spec.origin, *rest]
        code = spec.loader.get_code(name)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        main.__file__ = first
        with open(first, encoding="utf-8") as file:
            code = compile(file.read(), first, "exec")
    return code, main


if __name__ == "__main__":
    sys.modules["preloaded"] = sys.modules["__main__"]  # keeps these functions when `__main__` is replaced
    _preload()
    CODE, MAIN = _prepare(*_serve(socket.socket(fileno=int(sys.argv[1]))))
    exec(CODE, MAIN.__dict__)
