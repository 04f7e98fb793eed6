"""The one terminal voice of `cosilo-site`: results on stdout, `warning`, `error` and `hint` on stderr.

Must not know what a command does. The same voice as `cosilo`'s, which lives in a package that a site does not install.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TextIO

from cosilo_common.errors import CosiloError, one_line, printable


class ExitCode(IntEnum):
    """What the process answers (docs/cli-site.md)."""

    DONE = 0
    FAILED = 1
    BAD_USAGE = 2
    UNREACHABLE = 3


def say(line: str = "") -> None:
    """One line of result."""
    _write(sys.stdout, line)


def say_json(document: Mapping[str, object]) -> None:
    """A result for programs: one JSON object."""
    say(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def note(line: str) -> None:
    """One line about what is going on, apart from the result."""
    _write(sys.stderr, line)


def refuse(what: str, hint: str = "") -> None:
    """An error, and the next thing to do where there is one."""
    note(f"error: {what}")
    if hint:
        note(f"hint: {hint}")


def explain(error: CosiloError) -> None:
    """Says what failed and what to do next."""
    refuse(f"{error.operation}: {error.subject}", error.hint)


def columns(rows: Iterable[tuple[str, ...]]) -> None:
    """Rows of cells, each column as wide as its widest cell."""
    table = [tuple(map(one_line, row)) for row in rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))] if table else []
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def ask(question: str) -> bool:
    """Asks a person; anything but y or yes is no, and so is the end of the input."""
    note(f"{question} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def ask_to_type(words: str) -> bool:
    """Asks a person to type exactly these words; anything else is no, and so is the end of the input."""
    note(f"To go on, type: {words}")
    return sys.stdin.readline().strip() == words


def _write(stream: TextIO, line: str) -> None:
    stream.write(f"{printable(line)}\n")
    stream.flush()
