"""The audit log: what is written is read, and any changed byte is found."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.audit import FIRST, AuditLog, Head
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
    assert log.verify() == Head(2, second.hash)
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_an_empty_log_verifies(log: AuditLog) -> None:
    assert log.verify() == Head(0, FIRST)


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
    assert log.verify() == Head(2, second.hash)


def test_a_last_line_that_is_no_entry_is_refused_and_nothing_is_added(log: AuditLog, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(CosiloError, match="its last line is not an entry"):
        log.append("admin ada", "x")
    assert path.read_bytes() == b"{}\n"


def test_a_line_that_the_disk_took_in_part_is_refused_and_the_log_is_as_before(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = log.append("admin ada", "x")
    before = (tmp_path / "audit.jsonl").read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:40]))
        with pytest.raises(CosiloError, match="No space left on device"):
            log.append("admin ada", "y")
    assert (tmp_path / "audit.jsonl").read_bytes() == before
    assert log.verify() == Head(1, first.hash)


def test_with_a_kept_head_a_tail_that_was_cut_off_is_found_and_named(log: AuditLog, tmp_path: Path) -> None:
    for k in range(4):
        last = log.append("admin ada", "x", k=k)
    path = tmp_path / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for left in range(4):
        path.write_bytes(b"".join(lines[:left]))
        with pytest.raises(CosiloError, match=f"it ends after line {left}, and had 4"):
            log.verify(Head(4, last.hash))
    path.write_bytes(b"".join(lines))
    newer = log.append("admin ada", "y")
    assert log.verify(Head(4, last.hash)) == Head(5, newer.hash)


def test_with_a_kept_head_a_log_that_was_written_anew_is_found(log: AuditLog, tmp_path: Path) -> None:
    for k in range(2):
        kept = log.append("admin ada", "x", k=k)
    (tmp_path / "audit.jsonl").unlink()
    for k in range(3):
        log.append("admin eve", "x", k=k)
    with pytest.raises(CosiloError, match="line 2 is not the one whose hash was kept"):
        log.verify(Head(2, kept.hash))


def test_two_lines_that_changed_places_are_found(log: AuditLog, tmp_path: Path) -> None:
    for k in range(4):
        log.append("admin ada", "x", k=k)
    path = tmp_path / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    with pytest.raises(CosiloError, match="line 2 does not follow"):
        log.verify()
