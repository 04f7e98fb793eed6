"""Who did what, in an append-only file of hash-chained lines: a changed, removed or inserted line is found.

One JSON object a line, canonical: n (from 1), at (UTC seconds), who, what, detail (plain values), before (the hash of the line before, hex;
64 zeros for the first), hash: SHA-256 of the line without its hash. A chain finds every change but one that rewrites the whole rest of the file;
whoever wants that found too keeps the newest hash somewhere else, such as in a ticket or on paper. Must not know what the entries mean. Holds
no secret: names, digests and counts only. A process appends under a lock on the file, so a command and a daemon may share one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosilo_common.canonical import MalformedBytes, canonical_json, sha256
from cosilo_common.errors import CosiloError

FIRST = "0" * 64
LINE_BYTES_MAX = 16 << 10  # an entry is names, digests and counts: hundreds of bytes
_FIELDS = {"n", "at", "who", "what", "detail", "before", "hash"}


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


class AuditLog:
    """One party's audit file, made 0600 at the first entry. now: UTC seconds."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now

    def append(self, who: str, what: str, **detail: Any) -> Entry:
        """Adds an entry and returns when it is on disk. Raises CosiloError where the disk is full or the file's last line is no entry."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CosiloError("audit", f"{self._path}: {error.strerror}", "check the folder, its owner and its free space") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            last = self._last(fd)
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
            os.write(fd, line)
            os.fsync(fd)
            return entry
        except OSError as error:
            raise CosiloError("audit", f"{self._path}: {error.strerror}", "free space on that disk") from None
        finally:
            os.close(fd)

    def entries(self) -> Iterator[Entry]:
        """Every entry, oldest first, each checked against the one before it. Raises CosiloError at the first that does not fit."""
        before = FIRST
        for number, line in enumerate(self._lines(), start=1):
            entry = _parse(line, self._path, number)
            if entry.n != number or entry.before != before:
                raise CosiloError(
                    "verify audit log",
                    f"{self._path}: line {number} does not follow the line before it",
                    "a line was removed, inserted or changed: compare with a backup",
                )
            before = entry.hash
            yield entry

    def verify(self) -> tuple[int, str]:
        """(entries, hash of the last), once the whole chain holds. Raises CosiloError with the line that does not."""
        count, last = 0, FIRST
        for entry in self.entries():
            count, last = entry.n, entry.hash
        return count, last

    def _lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX + 1):
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
        return _parse(line, self._path, -1)


def _parse(line: bytes, path: Path, number: int) -> Entry:
    where = "its last line" if number < 0 else f"line {number}"
    try:
        plain = json.loads(line)
        if not isinstance(plain, dict) or set(plain) != _FIELDS or canonical_json(plain) + b"\n" != line:
            raise ValueError
        entry = Entry(**plain)
    except (ValueError, TypeError, MalformedBytes, RecursionError):
        raise CosiloError("verify audit log", f"{path}: {where} is not an entry", "compare with a backup") from None
    del plain["hash"]
    if _hash(plain) != entry.hash:
        raise CosiloError("verify audit log", f"{path}: {where} was changed", "compare with a backup")
    return entry


def _hash(plain: Mapping[str, Any]) -> str:
    return sha256(canonical_json(dict(plain))).hex()
