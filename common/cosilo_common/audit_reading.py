"""An audit log as people read it: which entries, in which words, and the head that they keep elsewhere.

Must not know where the lines come from: a site reads its file, an admin is sent the coordinator's.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cosilo_common.audit import LINE_BYTES_MAX, Entry, Head
from cosilo_common.errors import CosiloError, one_line

SHOWN_MAX = 1_000_000  # entries at once: years of a busy federation


@dataclass(frozen=True)
class Selection:
    """Which entries to show. who, what: parts of those fields, in any case; since: UTC seconds; last: how many at most."""

    who: str = ""
    what: str = ""
    since: float = 0.0
    last: int = SHOWN_MAX

    def of(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those of a whole log. Raises what the log raises where its chain does not hold, so that nothing of a changed log is shown as true."""
        return list(deque((entry for entry in entries if self._fits(entry)), maxlen=self.last))

    def _fits(self, entry: Entry) -> bool:
        return entry.at >= self.since and self.who.lower() in entry.who.lower() and self.what.lower() in entry.what.lower()


def plain(entry: Entry) -> Mapping[str, Any]:
    """An entry as JSON: n, at_unix_s, who, what, detail, hash."""
    return {
        "n": entry.n,
        "at_unix_s": entry.at,
        "who": entry.who,
        "what": entry.what,
        "detail": dict(entry.detail),
        "hash": entry.hash,
    }


def verified(head: Head, kept: Path | None) -> str:
    """The words of a log that was verified whole. kept: where the head is kept from now on."""
    if kept is not None:
        write_head(kept, head)
    last = f", the last one's hash {head.hash}" if head.entries else ""
    return f"the chain holds: {head.entries} entries{last}" + (f"; kept in {kept}" if kept else "")


def read_head(path: Path) -> Head | None:
    """A head that `write_head` kept; None where there is no such file yet. Raises CosiloError where it is something else."""
    try:
        plain = json.loads(path.read_bytes()[:LINE_BYTES_MAX])
        count, last = plain["entries"], plain["hash"]
        if type(count) is not int or count < 0 or not re.fullmatch("[0-9a-f]{64}", last):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise CosiloError("read kept head", f"{path} is none", "give the file that audit verify --head wrote") from None
    return Head(count, last)


def write_head(path: Path, head: Head) -> None:
    """Keeps a head. Raises CosiloError where the file cannot be written."""
    try:
        path.write_text(json.dumps({"entries": head.entries, "hash": head.hash}) + "\n", encoding="ascii")
    except OSError as error:
        raise CosiloError("keep head", f"{path}: {error.strerror}", "name a file in a folder of yours") from None


def moment(text: str, now: float) -> float:
    """UTC seconds of "2026-11-23", of "2026-11-23T14:00", or of an age such as "90m", "24h", "7d". Raises CosiloError."""
    if age := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return now - int(age[1]) * {"m": 60, "h": 3600, "d": 86400}[age[2]]
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise CosiloError("read time", f"{text[:40]!r} is neither a date nor an age", "give 2026-11-23, or 24h, or 7d") from None


def in_words(entry: Entry) -> str:
    """One entry on one line, for people."""
    detail = " ".join(f"{key}={_plain(value)}" for key, value in entry.detail.items())
    at = datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return one_line(f"{entry.n:>6}  {at}  {entry.who}: {entry.what}{' ' if detail else ''}{detail}")


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
