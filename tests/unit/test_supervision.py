"""What systemd hears: the datagrams themselves, received on a real socket."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosilo_common.journald import DATAGRAM_BYTES_MAX, datagram, is_journal
from cosilo_common.supervision import Supervisor
from cosilo_common.telemetry import REDACTED, configure_logging, get_logger


class Manager:
    """The receiving end of a datagram socket."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)

    def heard(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self._socket.recv(DATAGRAM_BYTES_MAX))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def supervisor(manager: Manager, watchdog_us: int = 300_000) -> Supervisor:
    return Supervisor.of_this_process({"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": str(watchdog_us), "WATCHDOG_PID": str(os.getpid())})


def test_ready_and_stopping_are_said(manager: Manager) -> None:
    said = supervisor(manager)
    said.ready()
    said.stopping()
    assert manager.heard() == [b"READY=1", b"STOPPING=1\nSTATUS=stopping"]


def test_children_cannot_speak_in_this_process_s_name(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Supervisor.of_this_process(environment)
    assert environment == {"PATH": "/bin"}


def test_without_a_manager_nothing_happens() -> None:
    said = Supervisor.of_this_process({})
    said.ready()
    said.stopping()


async def feed(said: Supervisor, well: bool, seconds: float) -> None:
    feeding = asyncio.create_task(said.feed_for_ever(lambda: (well, "stuck"), lambda: (False, "not connected:\n refused")))
    await asyncio.sleep(seconds)
    feeding.cancel()


async def test_the_watchdog_is_fed_three_times_a_period_while_the_daemon_is_healthy(manager: Manager) -> None:
    await feed(supervisor(manager, watchdog_us=300_000), True, 0.35)
    heard = manager.heard()
    assert heard[:2] == [b"WATCHDOG=1", b"STATUS=not connected: refused"]
    assert 2 <= heard.count(b"WATCHDOG=1") <= 4
    assert set(heard) == {b"WATCHDOG=1", b"STATUS=not connected: refused"}, "the line is told once while it stays the same"


async def test_an_unhealthy_daemon_leaves_the_watchdog_unfed_and_says_why(manager: Manager) -> None:
    await feed(supervisor(manager), False, 0.25)
    assert manager.heard() == [b"STATUS=stuck"]


async def test_a_manager_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    said = Supervisor(str(tmp_path / "nobody"), watchdog_s=0.1)
    said.ready()
    await feed(said, True, 0.1)


def test_each_field_reaches_journald_under_its_own_name() -> None:
    event = {"event": "round moved", "level": "warning", "logger": "x", "round": 3, "phase": "training", "reason": None, "timestamp": "t"}
    assert datagram(event, "cosilo-coordinator").decode().splitlines() == [
        "MESSAGE=round moved  round=3 phase=training",
        "PRIORITY=4",
        "SYSLOG_IDENTIFIER=cosilo-coordinator",
        "COSILO_LOGGER=x",
        "COSILO_ROUND=3",
        "COSILO_PHASE=training",
    ]


def test_a_newline_in_a_value_cannot_forge_a_field() -> None:
    sent = datagram({"event": "refused", "reason": "no\nPRIORITY=0"}, "cosilo-site")
    assert b"COSILO_REASON\n" + (13).to_bytes(8, "little") + b"no\nPRIORITY=0\n" in sent


def test_a_datagram_is_bounded() -> None:
    sent = datagram({"event": "e", **{f"field{n}": "é" * 20_000 for n in range(100)}}, "cosilo-site")
    assert len(sent) <= DATAGRAM_BYTES_MAX


def test_a_stream_is_the_journal_only_where_systemd_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert is_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert not is_journal(stream)


def test_what_journald_does_not_take_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr("cosilo_common.journald.SOCKET", str(tmp_path / "nobody"))
    path = tmp_path / "stderr"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        configure_logging("auto", "info", stream)
        (handler,) = root.handlers
        try:
            get_logger("cosilo.test").info("kept", round=1, token="c4n4ry")
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            handler.close()
    line = json.loads(path.read_text())
    assert (line["event"], line["round"], line["token"]) == ("kept", 1, REDACTED)
