"""One process at a time writes into a workdir.

    <workdir>/owner.json    who works there; removed at the end

    with owned(workdir):
        ...

The first command owns the workdir. Every other one ends with a line that names the owner, before it changes anything.
On a local disk the kernel holds the lock (`storage.locks`), so that the workdir of a killed process is free at once. In
a bucket, and on a disk that several hosts share, the owner refreshes its file. An owner on another host that has not
done so for a while counts as dead.

Several hosts of one training have one owner, the first host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging
from etils import epath

from dalle_jax.distributed.turns import first_host_first, is_first
from dalle_jax.errors import CheckpointError, ConfigError, WorkdirInUse
from dalle_jax.storage import json_files, locks
from dalle_jax.storage.files import access, full_path, is_remote, make_workdir
from dalle_jax.storage.names import check_name

_FILE = "owner.json"
_REFRESH_SECONDS = 20.0
_DEAD_SECONDS = 120.0  # without a refresh, after which an owner on another host counts as dead


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that works in a workdir: the content of `owner.json`.

    Attributes:
      host: name of its host.
      kernel: identifies the running kernel of the host, so that containers and restarts are told apart.
      processes: identifies what its process number counts in (the namespace of a container).
      pid: its process number.
      started: when the kernel started it, because process numbers are used again.
      since: date and time at which it began to work there.
      token: differs for each lock.
      refreshed: seconds since 1970 at the last refresh.
    """

    host: str
    kernel: str
    processes: str
    pid: int
    started: str
    since: str
    token: str
    refreshed: int

    def to_bytes(self) -> bytes:
        """Returns the content of the file."""
        return f"{json.dumps(dataclasses.asdict(self), indent=1)}\n".encode()

    @classmethod
    def read(cls, content: bytes) -> Owner | None:
        """Returns the owner that a file names, or None if the file is damaged."""
        try:
            values = json_files.parse(content)
            found = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
            return dataclasses.replace(found, pid=int(found.pid), refreshed=int(found.refreshed))
        except (ValueError, LookupError, TypeError, OverflowError):
            return None

    def is_here(self) -> bool:
        """Returns whether its process number counts among those of this process."""
        return (self.kernel, self.processes) == (_kernel(), _processes())

    def is_dead(self, unlocked: bool) -> bool:
        """Returns whether the process has ended without releasing its lock.

        Args:
          unlocked: whether the kernel of this host says that no process of this host holds the lock.
        """
        if unlocked and self.kernel == _kernel():
            return True
        if self.is_here():  # a lock of this process that it could not release is free as well
            return self.pid == os.getpid() or _started(self.pid) != self.started
        if self.host == socket.gethostname() and self.kernel != _kernel():
            return True  # this host has restarted since
        return self.silent() > _DEAD_SECONDS

    def silent(self) -> float:
        """Returns the seconds since the last refresh. A clock in the future counts as much as one in the past."""
        return abs(time.time() - self.refreshed)


def _kernel() -> str:
    return _text("/proc/sys/kernel/random/boot_id") or socket.gethostname()


def _processes() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Returns when the kernel started a process, "" if it does not say, or None without such a process."""
    if os.path.exists("/proc/self/stat"):
        fields = (_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
        return fields[19] if fields and fields[0] not in "ZX" else None  # Z, X: dead, but not yet waited for
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


class Lease:
    """The right to write into a workdir, as long as its `owned` block runs."""

    def __init__(self, workdir: str):
        """Takes the lock. The workdir must exist.

        Raises:
          WorkdirInUse: another process works there.
        """
        self.workdir = workdir
        self._owner = Owner(
            host=socket.gethostname(),
            kernel=_kernel(),
            processes=_processes(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=uuid.uuid4().hex,
            refreshed=int(time.time()),
        )
        self._folder = full_path(workdir)
        path = self._folder / _FILE
        if not is_remote(path) and path.is_dir():
            raise ConfigError(f"{path} is a folder, but it names who works in {workdir}. Move it away.")
        self._lock = locks.make_lock(path)
        self._taken_over = False
        self._take()
        self._leaving = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, name="owner", daemon=True)
        self._refreshing.start()

    def _take(self) -> None:
        def replaceable(content: bytes, unlocked: bool) -> bool:
            earlier = Owner.read(content)
            return earlier is None or earlier.is_dead(unlocked)

        try:
            found = self._lock.take(self._owner.to_bytes(), replaceable)
        except locks.Held as held:
            raise WorkdirInUse(_in_use(self.workdir, Owner.read(held.content))) from None
        earlier = Owner.read(found)
        if earlier and earlier.token != self._owner.token:
            logging.info(
                "%s: taken over from process %d on %s, which began there at %s and was killed.",
                self.workdir, earlier.pid, earlier.host, earlier.since,
            )  # fmt: skip
        if not self._lock.atomic:
            logging.warning("%s cannot be locked: do not start two commands that write there.", self.workdir)

    def _refresh(self) -> None:
        while not self._leaving.wait(_REFRESH_SECONDS):
            self._owner = dataclasses.replace(self._owner, refreshed=int(time.time()))
            with contextlib.suppress(Exception):  # of a storage that cannot be reached now: the next time counts
                self._taken_over |= not self._lock.refresh(self._owner.to_bytes())

    def has_vanished(self) -> bool:
        """Returns whether a local workdir no longer exists. A disk that cannot be asked now counts as there."""
        if is_remote(self._folder):
            return False
        try:
            return not stat.S_ISDIR(os.stat(self._folder).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def check(self) -> None:
        """Checks that the workdir is still there and still this process's. Call it before work is saved.

        Raises:
          CheckpointError: it has vanished, or another process has taken it over.
        """
        if self.has_vanished():
            raise _vanished(self.workdir)
        try:
            content = self._lock.read()
        except Exception:  # as in `_refresh`; the files to be saved give the reason
            return
        found = Owner.read(content or b"")
        if found is None:  # somebody has removed the file
            self._lock.release()
            self._take()
        elif found.token != self._owner.token:
            raise CheckpointError(
                f"{self.workdir} has been taken over by process {found.pid} on {found.host} since {found.since}. This "
                "process ends, because two would spoil each other's files."
            )

    def release(self) -> None:
        """Ends the ownership."""
        self._leaving.set()
        self._refreshing.join(_REFRESH_SECONDS)
        with contextlib.suppress(Exception):  # an error here would hide that of the work
            self._lock.release()


def _vanished(workdir: epath.PathLike) -> CheckpointError:
    return CheckpointError(
        f"{workdir} has vanished while this process worked there: it was deleted, renamed or unmounted. Work that was "
        "not saved is lost. Put it back and run the same command again: it resumes from the last checkpoint. Or give "
        "another --workdir=DIR."
    )


def _in_use(workdir: str, owner: Owner | None) -> str:
    """Returns the message of a second command."""
    if owner is None:
        return f"{workdir} is in use by another process. Wait for its end, or give another --workdir=DIR."
    who = "this process" if owner.is_here() and owner.pid == os.getpid() else f"process {owner.pid} on {owner.host}"
    text = f"{workdir} is in use: {who} has worked there since {owner.since}. Wait for its end, "
    text += "or give another --workdir=DIR."
    if owner.kernel != _kernel():
        left = max(_DEAD_SECONDS - owner.silent(), 0.0) + 1
        text += f" If that process no longer runs, start again in {left:.0f} s: it counts as dead then."
    return text


@dataclasses.dataclass
class _Entry:
    """A workdir that a thread owns. It has no lease on other hosts than the first."""

    process: int
    thread: int
    lease: Lease | None = None


_entries: dict[str, _Entry] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def owned(workdir: epath.PathLike) -> Iterator[Lease | None]:
    """Owns a workdir inside the block. Creates it if needed, and removes it again if it stays empty.

    A block inside another one of the same thread and workdir does nothing. Every host must enter equally many blocks.

    Args:
      workdir: local or remote directory.

    Yields:
      The lease; None on other hosts than the first.

    Raises:
      WorkdirInUse: another process, or another thread of this one, works there.
      ConfigError: the workdir cannot be created or written.
      CheckpointError: the workdir vanished during the block, which therefore failed.
    """
    if not str(workdir):
        raise ConfigError("--workdir is empty: give a directory for the run's files.")
    check_name(workdir)
    key = _key(workdir)
    with _guard:
        entry = _entries.get(key)
        inside = entry is not None and entry.process == os.getpid()  # a forked process inherits the entries
        if inside and entry.thread != threading.get_ident():
            raise WorkdirInUse(f"{workdir} is in use: another thread of this process works there. Wait for its end.")
        if not inside:
            entry = _entries[key] = _Entry(os.getpid(), threading.get_ident())
    if inside:
        yield entry.lease
        return
    try:
        with _created(workdir):
            with first_host_first(f"the lock of {workdir}"), access(workdir):
                lease = entry.lease = Lease(make_workdir(workdir)) if is_first() else None
            try:
                yield lease
            except Exception as error:
                if lease is not None and lease.has_vanished():
                    raise _vanished(workdir) from error
                raise
            finally:
                if lease is not None:
                    lease.release()
    finally:
        with _guard:
            _entries.pop(key, None)


def _key(workdir: epath.PathLike) -> str:
    path = str(full_path(workdir))
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path)


@contextlib.contextmanager
def _created(workdir: epath.PathLike) -> Iterator[None]:
    """Removes the folders of a workdir at the end that the block has created and left empty."""
    path = full_path(workdir)
    with access(workdir):
        missing = [] if is_remote(path) else [each for each in (path, *path.parents) if not each.exists()]
    try:
        yield
    finally:
        for folder in missing if is_first() else ():
            with contextlib.suppress(OSError):
                os.rmdir(folder)
