"""The one terminal voice: results on stdout, `warning`, `error` and `hint` on stderr, columns that grep and cut can
read.

Must not know the wire. Results are plain lines; only the live view (watch_view.py) draws.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import TextIO

from cosilo_common.errors import CosiloError, one_line, printable

SHORT_DIGEST_CHARS = 12  # 48 bits tell any federation's runs apart; a person can still compare two of them
COLUMN_GAP = "  "
NOTHING = "-"  # an empty cell would shift the columns after it for anything that splits on blanks
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class ExitCode(IntEnum):
    """What the process answers (docs/cli.md)."""

    DONE = 0
    FAILED = 1
    BAD_USAGE = 2
    UNREACHABLE = 3


class CoordinatorUnreachable(CosiloError):
    """Nobody answered where the coordinator should be."""


def say(line: str = "") -> None:
    """One line of result."""
    print(printable(line), file=sys.stdout, flush=True)


def say_json(document: Mapping[str, object]) -> None:
    """A result for programs: one JSON object, in the shape that docs/cli.md gives."""
    say(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def note(line: str) -> None:
    """One line about what is going on, apart from the result."""
    _tell(line)


def warn(line: str) -> None:
    """Something that a person should weigh; the command goes on."""
    _tell(f"warning: {line}")


def explain(error: CosiloError) -> ExitCode:
    """Says what failed and what to do next; returns the code to end with."""
    refuse(f"{error.operation}: {error.subject}" if error.operation else error.subject, error.hint)
    return ExitCode.UNREACHABLE if isinstance(error, CoordinatorUnreachable) else ExitCode.FAILED


def refuse(what: str, hint: str = "") -> None:
    """An error, and the next thing to do where there is one."""
    _tell(f"error: {what}")
    if hint:
        _tell(f"hint: {hint}")


def agree(question: str) -> bool | None:
    """Asks on stderr, so that a result in a pipe stays clean; None where nobody is there to answer. Only yes is yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not is_terminal(sys.stdin):
        _tell("")  # nobody's return key ended the line
    return answer.strip().lower() in ("y", "yes") if answer else None


def must_agree(yes: bool, question: str, refusal: str) -> None:
    """Asks, unless yes was given beforehand. Raises CosiloError with the refusal where the answer is not yes."""
    if yes:
        return
    agreed = agree(question)
    if agreed is None:
        raise CosiloError("", f"{refusal}: nobody answered the question", "answer it on a terminal, or add --yes")
    if not agreed:
        raise CosiloError("", refusal)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under a header, each column as wide as its widest cell; an empty cell shows as a dash."""
    table = [tuple(header), *(tuple(one_line(cell) or NOTHING for cell in row) for row in rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(header))]
    for row in table:
        say(COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    listed = [(name, one_line(value) or NOTHING) for name, value in pairs]
    width = max(len(name) for name, _ in listed)
    for name, value in listed:
        say(f"{name.ljust(width)}{COLUMN_GAP}{value}")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person watches the stream."""
    return stream.isatty()


def short(digest: bytes | str) -> str:
    """A digest's first characters; empty for none."""
    return (digest.hex() if isinstance(digest, bytes) else digest)[:SHORT_DIGEST_CHARS]


def byte_words(count: int) -> str:
    """A number of bytes in decimal units, as in `2.6 MB`."""
    size = float(count)
    for unit in _BYTE_UNITS[:-1]:
        if size < 999.95:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {_BYTE_UNITS[-1]}"


def second_words(seconds: float) -> str:
    """A duration, as in `8.2 s`, `4 min 12 s`, `3 h 5 min`, `12 d 4 h`."""
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole // 60} min {whole % 60} s"


def time_words(unix_s: float) -> str:
    """A moment in UTC, as in `2026-03-01 12:00:00Z`; empty for 0, which the wire uses for never."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if unix_s else ""


def number_words(value: float | None) -> str:
    """A loss or a norm in four significant digits; empty where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
