"""The audit log: what is written is read, and any changed byte is found."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.audit import FIRST, AuditLog
from cosilo_common.errors import CosiloError


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    clock = iter(range(1000, 2000))
    return AuditLog(tmp_path / "audit.jsonl", lambda: next(clock))


def test_entries_come_back_in_order_and_chained(log: AuditLog, tmp_path: Path) -> None:
    first = log.append("admin ada", "run created", run="ab" * 32)
    second = log.append("site st-anna", "consented", round=3, survivors=["st-anna", "st-beda"])
    assert list(log.entries()) == [first, second]
    assert (first.n, first.at, first.before) == (1, 1000, FIRST)
    assert (second.n, second.before, second.detail["round"]) == (2, first.hash, 3)
    assert log.verify() == (2, second.hash)
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_an_empty_log_verifies(log: AuditLog) -> None:
    assert log.verify() == (0, FIRST)


@settings(max_examples=200)
@given(st.data())
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    log = AuditLog(path, lambda: 5.0)
    for k in range(3):
        log.append("admin ada", "round ordered", rounds=k)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 2))  # the last newline alone may go: that is a torn line, and nothing else is lost
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(CosiloError):
        log.verify()


def test_a_removed_line_is_found_wherever_it_stood_but_at_the_end(log: AuditLog, tmp_path: Path) -> None:
    for k in range(4):
        log.append("admin ada", "x", k=k)
    path = tmp_path / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for gone in range(3):
        path.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
        with pytest.raises(CosiloError, match=f"line {gone + 1} does not follow"):
            log.verify()


def test_a_line_that_a_power_cut_tore_is_cut_off_and_the_chain_goes_on(log: AuditLog, tmp_path: Path) -> None:
    first = log.append("coordinator", "started")
    path = tmp_path / "audit.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    second = log.append("coordinator", "started")
    assert (second.n, second.before) == (2, first.hash)
    assert log.verify() == (2, second.hash)


def test_a_last_line_that_is_no_entry_is_refused_and_nothing_is_added(log: AuditLog, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(CosiloError, match="its last line is not an entry"):
        log.append("admin ada", "x")
    assert path.read_bytes() == b"{}\n"
