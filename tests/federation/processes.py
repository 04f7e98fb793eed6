"""Real processes under a test's hand: started, waited for, killed and never left behind, each with a log file of its own.

Owns processes and bounded waiting. Must not know what the processes do. Everything ends by pid, and only what was started
here or by a process that was started here (a site's trainer).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

Found = TypeVar("Found")

POLL_S = 0.05  # short beside anything waited for, long enough to cost nothing
STOP_GRACE_S = 15.0  # a daemon that gets SIGTERM finishes its store's transaction and tells its peers
TAIL_LINES = 25  # of each log, where something failed
TAIL_BYTES = 64 << 10
COMMAND_TIMEOUT_S = 120.0  # one command; the slowest makes initial weights in a torch process
_DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)  # prctl(2), PR_SET_PDEATHSIG, SIGTERM: it survives the exec
    os.getppid() == int(sys.argv[1]) or sys.exit("its parent is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""


class FederationError(Exception):
    """Something of a local federation failed: what, and the last lines of the logs that may say why."""

    def __init__(self, what: str, logs: Iterable[Path] = ()) -> None:
        self.what = what
        self.tails = "".join(f"\n--- {path.name}: last lines ---\n{tail(path)}" for path in logs if path.exists())
        super().__init__(what + self.tails)


class Daemon:
    """One long-running process: its command, its environment, its log."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._offspring: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        """The process's id; raises FederationError where it never started."""
        if self._process is None:
            raise FederationError(f"{self.name} was never started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Starts it; its log is appended to."""
        if self.alive:
            raise FederationError(f"{self.name} is running already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the one who started the federation, who then stops it in order
            )

    def kill(self) -> None:
        """SIGKILL to this process alone, as a power cut of the daemon would be; returns when it is gone."""
        self._remember_offspring()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; then whatever it started and left."""
        self._remember_offspring()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for child in self._offspring:
            if child.is_running():  # psutil compares start times too: a pid that was used again is not ours
                child.kill()
        psutil.wait_procs(self._offspring, timeout=STOP_GRACE_S)
        self._offspring.clear()

    def offspring(self) -> list[psutil.Process]:
        """What it started that still runs, now or before it was killed."""
        self._remember_offspring()
        return [child for child in self._offspring if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    def _remember_offspring(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        try:
            found = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._offspring = list({*self._offspring, *found})


def run_command(command: Sequence[str], log: Path, environment: Mapping[str, str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Runs a command to its end and returns its standard output; raises FederationError, quoting it, where it fails."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FederationError(f"{' '.join(command)}: no answer within {timeout_s:.0f} s\n{error.stderr!r}") from None
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}  # exit {done.returncode}, {time.monotonic() - started:.2f} s\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise FederationError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def wait_until(condition: Callable[[], Found], what: str, timeout_s: float, needs: Iterable[Daemon] = (), poll_s: float = POLL_S) -> Found:
    """Asks until the answer is truthy, and returns it.

    Raises FederationError after `timeout_s`, or as soon as a daemon of `needs` is gone: then it can never become true.
    """
    needed = list(needs)
    deadline = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        for daemon in needed:
            if not daemon.alive:
                raise FederationError(f"{daemon.name} ended with {daemon.exit_code} while waiting until {what}", [daemon.log])
        if time.monotonic() > deadline:
            raise FederationError(f"waited {timeout_s:.0f} s in vain until {what}", [daemon.log for daemon in needed])
        time.sleep(poll_s)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """A log's last lines."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
