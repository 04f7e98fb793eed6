"""Who did what, in an append-only file of hash-chained lines: a changed, removed or inserted line is found.

One JSON object a line, canonical: n (from 1), at (UTC seconds), who, what, detail (plain values), before (the hash of the line before, hex;
64 zeros for the first), hash: SHA-256 of the line without its hash. A chain finds every change but one that rewrites the whole rest of the file;
whoever wants that found too keeps a head (how many entries, and the newest hash) somewhere else, and has `verify` compare. Must not know what
the entries mean. Holds no secret: names, digests and counts only. A process appends under a lock on the file, so a command and a daemon may
share one.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cosilo_common.canonical import MalformedBytes, canonical_json, sha256
from cosilo_common.errors import CosiloError
from cosilo_common.telemetry import get_logger
from cosilo_common.transfer import sync_folder

FIRST = "0" * 64
LINE_BYTES_MAX = 128 << 10  # hundreds of bytes, but for a round's 1000 sites by name: 66 KB
_AT_MAX = 253402300800.0  # the year 10000, where a date has no words any more
AUDIT_FILE = "audit.log"  # in the coordinator's data folder, and in a site's state folder
_FIELDS = {"n", "at", "who", "what", "detail", "before", "hash"}

logger = get_logger("cosilo.audit")


class Note(Protocol):
    """Whoever takes notes: AuditTrail.note, or nobody."""

    def __call__(self, who: str, what: str, /, **detail: Any) -> None: ...


def no_note(_who: str, _what: str, /, **_detail: Any) -> None:
    """Nobody takes notes."""


@dataclass(frozen=True)
class Entry:
    """One line. at: UTC seconds; who: "admin ada", "site st-anna", "coordinator"; what: a word or two; hash: hex."""

    n: int
    at: float
    who: str
    what: str
    detail: Mapping[str, Any]
    before: str
    hash: str


@dataclass(frozen=True)
class Head:
    """What a log came to: its entries, and the last one's hash (hex). Kept elsewhere, it shows that a log was cut short or written anew."""

    entries: int
    hash: str


class AuditLog:
    """One party's audit file, made 0600 at the first entry. now: UTC seconds."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now

    def append(self, who: str, what: str, /, **detail: Any) -> Entry:
        """Adds an entry and returns when it is on disk. Raises CosiloError where the disk is full or the file's last line is no entry."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CosiloError("audit", f"{self._path}: {error.strerror}", "check the folder, its owner and its free space") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            last = self._last(fd)
            if last is None and os.geteuid() == 0:  # a person's command, as root: the daemon, which is not, must be able to go on
                folder = self._path.parent.stat()
                os.fchown(fd, folder.st_uid, folder.st_gid)
            plain = {
                "n": last.n + 1 if last else 1,
                "at": round(self._now(), 3),
                "who": who,
                "what": what,
                "detail": detail,
                "before": last.hash if last else FIRST,
            }
            entry = Entry(**plain, hash=_hash(plain))  # type: ignore[arg-type]  # the dict's values have these types
            line = canonical_json({**plain, "hash": entry.hash}) + b"\n"
            if len(line) > LINE_BYTES_MAX:
                raise CosiloError("audit", f"an entry of {len(line)} bytes; at most {LINE_BYTES_MAX}")
            size = os.fstat(fd).st_size
            if os.write(fd, line) != len(line):  # a full disk takes a part, and says so only by the count (write(2))
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
            if last is None:
                sync_folder(self._path.parent)  # else a power cut loses the file's name, and every entry with it
            return entry
        except OSError as error:
            raise CosiloError("audit", f"{self._path}: {error.strerror}", "free space on that disk") from None
        finally:
            os.close(fd)

    def entries(self, kept: Head | None = None) -> Iterator[Entry]:
        """Every entry, oldest first, each checked against the one before it. Raises CosiloError at the first that does not fit."""
        return follow(self.lines(), str(self._path), kept)

    def verify(self, kept: Head | None = None) -> Head:
        """What the log comes to, once the whole chain holds and goes on from the kept head. Raises CosiloError with the line that does not."""
        return head_of(self.entries(kept))

    def lines(self) -> Iterator[bytes]:
        """The file's lines as they are, unchecked: for whoever checks them elsewhere."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # nobody is half-way through a line now
            left = os.fstat(file.fileno()).st_size
            fcntl.flock(file, fcntl.LOCK_UN)  # and nobody who reads for long stops a daemon
            while left > 0 and (line := file.readline(min(left, LINE_BYTES_MAX + 1))):
                left -= len(line)
                yield line

    def _last(self, fd: int) -> Entry | None:
        """The last entry. A line that a power cut left without its end is cut off: it was never acknowledged."""
        size = os.fstat(fd).st_size
        if size == 0:
            return None
        window = os.pread(fd, min(size, 2 * LINE_BYTES_MAX), max(0, size - 2 * LINE_BYTES_MAX))
        if not window.endswith(b"\n"):
            torn = len(window) - (window.rfind(b"\n") + 1)
            os.ftruncate(fd, size - torn)
            return self._last(fd)
        line = window[:-1].rsplit(b"\n", 1)[-1] + b"\n"
        return _parse(line, str(self._path), -1)


class AuditTrail:
    """A log that is written from an event loop and from threads: one entry after another, in a thread of its own.

    failed: called, from that thread, for each noted entry that could not be written.
    """

    def __init__(self, log: AuditLog, failed: Callable[[], None] = lambda: None) -> None:
        self._log = log
        self._failed = failed
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")

    async def write(self, who: str, what: str, /, **detail: Any) -> None:
        """Returns when the entry is on disk. Raises CosiloError where it cannot be, so that what it is of is not done."""
        await asyncio.wrap_future(self._writer.submit(partial(self._log.append, who, what, **detail)))

    def note(self, who: str, what: str, /, **detail: Any) -> None:
        """For what has happened already, or must whatever the disk says: a failure is logged and counted."""
        try:
            self._writer.submit(self._append, who, what, detail)
        except RuntimeError:  # closed: the daemon ends, and this is one of its last words
            self._append(who, what, detail)

    def lines(self) -> Iterator[bytes]:
        """As AuditLog.lines."""
        return self._log.lines()

    def close(self) -> None:
        """Returns when everything that was noted is on disk."""
        self._writer.shutdown(wait=True)

    def _append(self, who: str, what: str, detail: Mapping[str, Any]) -> None:
        try:
            self._log.append(who, what, **detail)
        except CosiloError as error:
            self._failed()
            logger.error("not in the audit log", who=who, what=what, reason=str(error))


def follow(lines: Iterable[bytes], where: str, kept: Head | None = None) -> Iterator[Entry]:
    """The entries of a log's lines, each checked against the one before it, and all of them against a kept head.

    where: whose log, for the words. Raises CosiloError, naming the line, at the first that does not fit.
    """
    before, number = FIRST, 0
    for number, line in enumerate(lines, start=1):
        entry = _parse(line, where, number)
        if entry.n != number or entry.before != before:
            raise _broken(where, f"line {number} does not follow the line before it", "a line was removed, inserted or changed")
        if kept is not None and number == kept.entries and entry.hash != kept.hash:
            raise _broken(where, f"line {number} is not the one whose hash was kept", "the log was written anew up to there")
        before = entry.hash
        yield entry
    if kept is not None and number < kept.entries:
        raise _broken(where, f"it ends after line {number}, and had {kept.entries}", "its end was cut off")


def head_of(entries: Iterable[Entry]) -> Head:
    """What a whole log comes to."""
    count, last = 0, FIRST
    for entry in entries:
        count, last = entry.n, entry.hash
    return Head(count, last)


def _broken(where: str, what: str, why: str) -> CosiloError:
    return CosiloError("verify audit log", f"{where}: {what}", f"{why}: compare with a backup")


def _parse(line: bytes, where: str, number: int) -> Entry:
    which = "its last line" if number < 0 else f"line {number}"
    try:
        plain = json.loads(line)
        if not isinstance(plain, dict) or set(plain) != _FIELDS or canonical_json(plain) + b"\n" != line:
            raise ValueError
        entry = Entry(**plain)
        if not _typed(entry):
            raise ValueError
    except (ValueError, TypeError, MalformedBytes, RecursionError):
        raise CosiloError("verify audit log", f"{where}: {which} is not an entry", "compare with a backup") from None
    del plain["hash"]
    if _hash(plain) != entry.hash:
        raise CosiloError("verify audit log", f"{where}: {which} was changed", "compare with a backup")
    return entry


def _typed(entry: Entry) -> bool:
    """Whether every field is what it is said to be: a log may come from somebody who hashes rightly and lies."""
    texts = (entry.who, entry.what, entry.before, entry.hash)
    at_fits = type(entry.at) in (int, float) and 0 <= entry.at < _AT_MAX
    return at_fits and type(entry.n) is int and isinstance(entry.detail, dict) and all(isinstance(text, str) for text in texts)


def _hash(plain: Mapping[str, Any]) -> str:
    return sha256(canonical_json(dict(plain))).hex()
