"""What a person types, carried out in this process: the same command line and the same words, without another interpreter's start.

Owns this process's standard streams while a command runs, so one at a time. Must not know what a command does. Tests of what rounds compute
spare some forty processes each with it. That the programs start at all, daemons and `cosilo run watch` show in every one of them; the demo and
the runbooks type everything.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final
from unittest import mock

from cosilo_client.cli import main as cosilo_site
from cosilo_server.cli.main import main as cosilo
from tests.federation.processes import FederationError

PROGRAMS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = {"cosilo": cosilo, "cosilo-site": cosilo_site}


def call_command(program: str, arguments: Sequence[str], log: Path) -> str:
    """A command's standard output; raises FederationError, quoting it, where it fails. It is asked nothing: its standard input is empty."""
    started, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.stdin", io.StringIO()):
        code = PROGRAMS[program](arguments)
    said, line = out.getvalue() + err.getvalue(), " ".join([program, *arguments])
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {line}  # called, {code}, {time.monotonic() - started:.2f} s\n{said}")
    if code:
        raise FederationError(f"{line}: exit {code}\n{said}".rstrip())
    return out.getvalue()
