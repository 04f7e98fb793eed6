"""The simulated disk: a folder in memory whose unsynced writes a power cut can take back, and a point of death at every write.

Owns the model of what is durable. It stands between production code and `os`: while a simulation runs, the calls that change files are
replaced by ones that note what was written but not synced, and that ask the process whether it lives. The model:
- a file's bytes are durable once the file was synced; before that a power cut leaves the old bytes, a part, or noise in their place
- making, renaming and removing a name is durable once its folder was synced; before that a power cut undoes a tail of what was done
  there, in order, as a journaling file system does
- a commit of SQLite is durable when it returns (both databases are FULL), and a process can die before it or after it; torn pages within
  SQLite's own files are not simulated, nor is a disk that lies about a sync
Must not know what the files are.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy.engine.default import DefaultDialect

from tests.simulation.process import CURRENT, Process

DATABASE = ".db"
PID = 10_000  # written into lock files: a torn one must not depend on how long this process's number is
_WRITING = os.O_WRONLY | os.O_RDWR
_OWNERS: dict[int, Process] = {}  # open descriptors of simulated processes


@dataclass
class _Change:
    """One change of a folder's names that a power cut may undo."""

    order: int
    path: str
    undo: Callable[[], None]


@dataclass
class Disk:
    """One machine's disk, below `root`. renumbered: change times (ns) that undoing has altered, new by old: no program can set them."""

    root: str
    random: random.Random
    full: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    renumbered: dict[int, int] = field(default_factory=dict)
    _baselines: dict[str, bytes | None] = field(default_factory=dict)
    _changes: dict[str, list[_Change]] = field(default_factory=dict)
    _order: int = 0

    def holds(self, path: str) -> bool:
        """Whether a path lies on this disk."""
        return path.startswith(self.root)

    def written(self, path: str) -> None:
        """A file is about to be written: until it is synced a power cut may take that back."""
        if path not in self._baselines:
            existed = os.path.exists(path)
            self._baselines[path] = _read(path) if existed else None
            if not existed:
                self._note(path, lambda: _remove(path))

    def synced(self, path: str) -> None:
        """A file or a folder was synced."""
        self._baselines.pop(path, None)
        self._changes.pop(path, None)

    def durable(self, path: str) -> bool:
        """Whether a power cut now would leave a file as it is, and under its name."""
        return path not in self._baselines and all(change.path != path for change in self._changes.get(os.path.dirname(path), []))

    def replaced(self, source: str, target: str, old: bytes | None, old_changed_ns: int) -> None:
        """A file took another's name."""
        baseline = self._baselines.pop(source, b"")
        self._baselines.pop(target, None)
        if baseline is None:
            self._baselines[target] = b""  # renamed before it was synced: it may turn out empty

        def undo() -> None:
            REAL["replace"](target, source)
            if old is not None:
                _restore(target, old)
                self.renumbered[old_changed_ns] = os.stat(target).st_ctime_ns

        self._note(target, undo)

    def removed(self, path: str, content: bytes) -> None:
        """A file's name was removed."""
        self._baselines.pop(path, None)
        self._note(path, lambda: _restore(path, content))

    def made(self, path: str) -> None:
        """A folder was made."""
        self._note(path, lambda: os.rmdir(path))

    def unmade(self, path: str) -> None:
        """A folder was removed: what was done in it stands and falls with its own removal."""
        inner = self._changes.pop(path, [])
        self._changes.setdefault(os.path.dirname(path), []).extend(inner)
        self._note(path, lambda: REAL["mkdir"](path, 0o700))

    def lose_power(self) -> None:
        """Takes back what was not synced, as far as it is drawn."""
        undone: list[_Change] = []
        for changes in self._changes.values():
            undone += changes[self.random.randint(0, len(changes)) :]
        for change in sorted(undone, key=lambda each: -each.order):
            with suppress(OSError):  # it hung on something that is itself undone, or gone for good
                change.undo()
                self.faults["names lost"] += 1
        for path, baseline in self._baselines.items():
            if os.path.isfile(path):
                self._tear(path, baseline)
        self._baselines.clear()
        self._changes.clear()

    def _tear(self, path: str, baseline: bytes | None) -> None:
        now = _read(path)
        cut = self.random.randint(0, len(now))
        torn = self.random.choice(
            [now, baseline or b"", now[:cut], now[:cut] + bytes(len(now) - cut), now[:cut] + self.random.randbytes(len(now) - cut)]
        )
        if torn != now:
            self.faults["writes torn"] += 1
            _restore(path, torn)

    def _note(self, path: str, undo: Callable[[], None]) -> None:
        self._order += 1
        self._changes.setdefault(os.path.dirname(path), []).append(_Change(self._order, path, undo))


REAL: dict[str, Callable[..., Any]] = {
    name: getattr(os, name) for name in ("open", "close", "fsync", "replace", "unlink", "mkdir", "rmdir", "write", "pwrite", "ftruncate")
} | {"io_open": io.open, "rmtree": shutil.rmtree, "disk_usage": shutil.disk_usage, "commit": DefaultDialect.do_commit}


@contextmanager
def simulated_disks() -> Iterator[None]:
    """Within it every change that a simulated process makes to its disk is modelled."""
    simulated = {
        "open": _open,
        "close": _close,
        "fsync": _fsync,
        "replace": _replace,
        "unlink": _unlink,
        "mkdir": _mkdir,
        "rmdir": _rmdir,
        "write": _write,
        "pwrite": _pwrite,
        "ftruncate": _ftruncate,
        "getpid": lambda: PID,
    }
    with mock.patch.multiple(os, **simulated), mock.patch.object(io, "open", _io_open):
        with mock.patch.object(shutil, "rmtree", _rmtree), mock.patch.object(DefaultDialect, "do_commit", _commit):
            with mock.patch.object(shutil, "disk_usage", _disk_usage):
                yield


# What production code calls


def _open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    process = _process_at(path)
    if process is None:
        return int(REAL["open"](path, flags, mode, dir_fd=dir_fd))
    name = os.fspath(path)
    if flags & _WRITING and not name.endswith(DATABASE):  # SQLite writes there, and answers for it
        if not os.path.exists(name):
            _has_room(process, name)
        process.point(f"open {name}")
        process.disk.written(name)
    descriptor = int(REAL["open"](path, flags, mode, dir_fd=dir_fd))
    process.files[descriptor] = name
    _OWNERS[descriptor] = process
    return descriptor


def _close(descriptor: int) -> None:
    _disown(descriptor)
    REAL["close"](descriptor)


def _fsync(descriptor: int) -> None:
    process = CURRENT.get()
    if process is None:
        return
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    process.point(f"before the sync of {path}")
    process.disk.synced(path)
    process.point(f"after the sync of {path}")


def _replace(source: Any, target: Any, **options: Any) -> None:
    process = _process_at(target)
    if process is None:
        REAL["replace"](source, target, **options)
        return
    name = os.fspath(target)
    process.point(f"before the rename to {name}")
    exists = os.path.exists(name)
    old, changed_ns = (_read(name), os.stat(name).st_ctime_ns) if exists else (None, 0)
    REAL["replace"](source, target)
    process.disk.replaced(os.fspath(source), name, old, changed_ns)
    process.point(f"after the rename to {name}")


def _unlink(path: Any, *, dir_fd: int | None = None) -> None:
    process = _process_at(path)
    if process is None:
        REAL["unlink"](path, dir_fd=dir_fd)
        return
    name = os.fspath(path)
    if os.path.exists(name):
        process.point(f"before the removal of {name}")
        content = _read(name)
        REAL["unlink"](name)
        process.disk.removed(name, content)
    else:
        REAL["unlink"](name)  # raises as it should


def _mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
    process = _process_at(path)
    if process is not None:
        process.point(f"mkdir {os.fspath(path)}")
    REAL["mkdir"](path, mode, dir_fd=dir_fd)
    if process is not None:
        process.disk.made(os.fspath(path))


def _rmdir(path: Any, *, dir_fd: int | None = None) -> None:
    process = _process_at(path)
    if process is not None:
        process.point(f"rmdir {os.fspath(path)}")
    REAL["rmdir"](path, dir_fd=dir_fd)
    if process is not None:
        process.disk.unmade(os.fspath(path))


def _rmtree(path: Any, *arguments: Any, **options: Any) -> None:
    if _process_at(path) is None:
        REAL["rmtree"](path, *arguments, **options)
        return
    for entry in sorted(os.scandir(path), key=lambda each: each.name):
        _rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else _unlink(entry.path)
    _rmdir(path)


def _write(descriptor: int, data: Any) -> int:
    _before_writing(descriptor)
    return int(REAL["write"](descriptor, data))


def _pwrite(descriptor: int, data: Any, offset: int) -> int:
    _before_writing(descriptor)
    return int(REAL["pwrite"](descriptor, data, offset))


def _ftruncate(descriptor: int, length: int) -> None:
    process = _OWNERS.get(descriptor)
    if process is not None:
        process.disk.written(process.files[descriptor])
    REAL["ftruncate"](descriptor, length)


def _io_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
    if isinstance(file, int):
        _disown(file)  # a file object has it now, and closes it
    process = _process_at(file) if isinstance(file, str | os.PathLike) else None
    if process is not None and set(mode) & set("wax+"):
        name = os.fspath(file)
        _has_room(process, name)
        process.point(f"open {name}")
        process.disk.written(name)
    return REAL["io_open"](file, mode, *arguments, **options)


def _disk_usage(path: Any) -> Any:
    process = CURRENT.get()
    usage = REAL["disk_usage"](path)
    return usage._replace(free=0) if process is not None and process.disk.full else usage


def _commit(dialect: DefaultDialect, connection: Any) -> None:
    process = CURRENT.get()
    if process is None or not connection.in_transaction:
        REAL["commit"](dialect, connection)
        return
    changed = None if isinstance(connection, sqlite3.Connection) else connection.info  # cosilo_common.statements only commits what it wrote
    if changed is not None and connection.total_changes == changed.get("changes", 0):  # it only read
        REAL["commit"](dialect, connection)
        return
    if process.disk.full:
        process.disk.faults["commits refused by a full disk"] += 1
        raise sqlite3.OperationalError("database or disk is full")
    process.point("before a commit")
    REAL["commit"](dialect, connection)
    if changed is not None:
        changed["changes"] = connection.total_changes
    process.point("after a commit")


# The parts


def _process_at(path: Any) -> Process | None:
    """The running process, where the path lies on its disk."""
    process = CURRENT.get()
    if process is None or isinstance(path, int):
        return None
    return process if process.disk.holds(os.fspath(path)) else None


def _disown(descriptor: int) -> None:
    owner = _OWNERS.pop(descriptor, None)
    if owner is not None:
        owner.files.pop(descriptor, None)


def _before_writing(descriptor: int) -> None:
    process = _OWNERS.get(descriptor)
    if process is not None and CURRENT.get() is not None:
        name = process.files[descriptor]
        _has_room(process, name)
        process.point(f"write {name}")
        process.disk.written(name)


def _has_room(process: Process, path: str) -> None:
    if process.disk.full and process.alive:
        process.disk.faults["writes refused by a full disk"] += 1
        raise OSError(28, "No space left on device", path)


def _read(path: str) -> bytes:
    with REAL["io_open"](path, "rb") as file:
        return bytes(file.read())


def _restore(path: str, content: bytes) -> None:
    with REAL["io_open"](path, "wb") as file:
        file.write(content)
    os.chmod(path, 0o600)


def _remove(path: str) -> None:
    REAL["unlink"](path)


def discard_folder(path: Path) -> None:
    """Removes what a simulation left, outside of any."""
    REAL["rmtree"](path, ignore_errors=True)
