"""Daemons end when they are told to, with what they started; waiting is bounded and says what it waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.federation.processes import Daemon, FederationError, run_command, wait_until

PARENT = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print('up', flush=True); time.sleep(600)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def started(tmp_path: Path, program: str) -> Daemon:
    daemon = Daemon("worker", [sys.executable, "-c", program], tmp_path / "worker.log", os.environ)
    daemon.start()
    wait_until(lambda: "up" in daemon.log.read_text(), "it is up", 20, [daemon])
    return daemon


def test_stopping_ends_what_a_killed_daemon_left_behind(tmp_path: Path) -> None:
    daemon = started(tmp_path, PARENT)
    (child,) = daemon.offspring()
    daemon.kill()
    assert daemon.exit_code == -9
    assert child.is_running()
    daemon.stop()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_daemon_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    daemon = started(tmp_path, DEAF)
    daemon.stop(grace_s=0.2)
    assert daemon.exit_code == -9


def test_a_daemon_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import os, sys, pathlib; from tests.federation.processes import Daemon\n"
        f"d = Daemon('w', [sys.executable, '-c', 'import time; time.sleep(600)'], pathlib.Path({str(tmp_path / 'w.log')!r}), os.environ)\n"
        f"d.start(); pathlib.Path({str(pid_file)!r}).write_text(str(d.pid)); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    pid = int(pid_file.read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it is gone", 10)


def test_waiting_ends_at_once_when_the_daemon_it_needs_is_gone(tmp_path: Path) -> None:
    daemon = Daemon("worker", [sys.executable, "-c", "raise SystemExit('no port')"], tmp_path / "worker.log", os.environ)
    daemon.start()
    began = time.monotonic()
    with pytest.raises(FederationError, match=r"worker ended with 1 while waiting until it listens(.|\n)*no port"):
        wait_until(lambda: False, "it listens", 60, [daemon])
    assert time.monotonic() - began < 30


def test_waiting_is_bounded() -> None:
    with pytest.raises(FederationError, match="in vain until pigs fly"):
        wait_until(lambda: False, "pigs fly", 0.1)


def test_a_failed_command_is_quoted_and_logged(tmp_path: Path) -> None:
    log = tmp_path / "commands.log"
    assert run_command([sys.executable, "-c", "print('done')"], log, os.environ) == "done\n"
    with pytest.raises(FederationError, match="exit 3\nhint: try again"):
        run_command([sys.executable, "-c", "import sys; print('hint: try again', file=sys.stderr); sys.exit(3)"], log, os.environ)
    assert "exit 0" in log.read_text()
    assert "exit 3" in log.read_text()
