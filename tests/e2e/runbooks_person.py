"""A person at a machine: a home, a shell, the commands on the PATH, and what the shell exported before.

Owns how lines are typed and that each is remembered by page, section and its own words. Must not know what the lines do. `sudo` only runs the
command: who may do what is shown on real machines by `make e2e-systemd`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from tests.e2e.checklist import expect
from tests.e2e.runbooks_pages import part_of, put_in, section_block, shell_lines, spoken

Typed: TypeAlias = dict[tuple[str, str], set[str]]  # (page, section) to its lines that anybody typed

COMMANDS = ("cosilo", "cosilo-coordinator", "cosilo-site")
TYPED_TIMEOUT_S = 180.0  # a block; the slowest draws a grid or waits for two rounds
_SUDO = '#!/bin/sh\n[ "$1" = -u ] && shift 2\nexec "$@"\n'
_KEEP = "\nexport -p >.exported\n"


def make_commands(folder: Path) -> None:
    """The commands as files that only run the real ones, for a PATH."""
    folder.mkdir(parents=True)
    scripts = {name: f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n' for name in COMMANDS}
    for name, text in {**scripts, "sudo": _SUDO}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


class Person:
    """Types into a shell of their own. home: made if it is missing; typed: what anybody typed, added to."""

    def __init__(self, home: Path, commands: Path, typed: Typed, log: Path) -> None:
        self.home = home
        self._commands, self._typed = commands, typed
        self._log = log
        home.mkdir(parents=True, exist_ok=True)
        quiet = {key: value for key, value in os.environ.items() if not key.startswith(("COSILO_", "XDG_"))}
        self._environment = {**quiet, "HOME": str(home), "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def beside(self, home: Path) -> Person:
        """Somebody else on the same terms."""
        return Person(home, self._commands, self._typed, self._log)

    def types(
        self,
        page: str,
        heading: str,
        number: int = 0,
        named: Mapping[str, str] | None = None,
        answer: str = "",
        code: int = 0,
        part: str = "",
    ) -> str:
        """The number-th block of shell under a heading, or the part of it after a comment. Returns what it printed.

        named: what stands there as an example, and what it is here; a line that is nothing here was not typed.
        """
        text = section_block(page, heading, number)
        text = part_of(text, part) if part else text
        gone = {line for example, here in (named or {}).items() if not here.strip() for line in shell_lines(example)}
        self._remember(page, heading, shell_lines(text) - gone)
        return self._run(put_in(f"{page}, {heading}", text, named or {}), answer, code)

    def takes(self, page: str, heading: str, number: int) -> str:
        """The last line of a block, which the caller types elsewhere: it starts a daemon, or another page has it too."""
        line = section_block(page, heading, number).rstrip("\n").rsplit("\n", 1)[-1]
        self._remember(page, heading, {line})
        return line

    def says(self, page: str, heading: str, command: str, named: Mapping[str, str] | None = None, answer: str = "", code: int = 0) -> str:
        """A command that stands in a sentence or a table there. Returns what it printed."""
        self._remember(page, heading, {command})
        return self._run(put_in(f"{page}, {heading}", spoken(page, heading, command), named or {}), answer, code)

    def runs(self, command: str, answer: str = "", code: int = 0) -> str:
        """A command of this test's own."""
        return self._run(command, answer, code)

    def _remember(self, page: str, heading: str, lines: set[str]) -> None:
        self._typed.setdefault((page, heading), set()).update(lines)

    def _run(self, text: str, answer: str, code: int) -> str:
        done = subprocess.run(
            ["/bin/sh", "-ec", f"cd\n[ -e .exported ] && . ./.exported\ncd\n{text}{_KEEP}"],
            env=self._environment,
            input=answer,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TYPED_TIMEOUT_S,
            check=False,
        )
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"--- {self.home.name} types ---\n{text}--- exit {done.returncode} ---\n{done.stdout}\n")
        expect(done.returncode == code, f"{self.home.name} typed\n{text}\nand it ended with {done.returncode}, not {code}:\n{done.stdout}")
        return done.stdout
