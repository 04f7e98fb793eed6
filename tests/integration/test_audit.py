"""The coordinator's audit log, through a real coordinator and the real command: who did what, what cannot be logged, what was changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from cosilo_common.audit import AUDIT_FILE, AuditLog, AuditTrail, Entry
from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.rpc.v1 import admin_pb2
from cosilo_server.cli.main import main
from tests.identity_parties import found
from tests.integration.coordinator_world import ANYWHERE, SITES, TIMEOUT_S, World, a_coordinator, three_members

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A coordinator, and three members whose list its admin has put."""
    async with three_members(found(tmp_path / "f"), tmp_path / "data") as made:
        async with asyncio.timeout(TIMEOUT_S):
            while entries(made)[-1].what != "members list in force":  # written as it counts, which may be after the answer
                await asyncio.sleep(0.01)
        yield made


def entries(world: World) -> list[Entry]:
    return list(AuditLog(world.data / AUDIT_FILE).entries())


async def cosilo(world: World, *arguments: str) -> int:
    """The command, which waits for its answers, in a thread beside the coordinator's event loop."""
    address = world.coordinator.endpoints["federation"]
    return await asyncio.to_thread(main, ["--admin", str(world.founded.admin.folder), "--address", address, *arguments])


def invitation(name: str) -> admin_pb2.PutInvitationRequest:
    return admin_pb2.PutInvitationRequest(
        name=name, role="site", token_public=public_bytes(make_signing_key()), expires_unix_s=int(time.time()) + 86_400
    )


async def test_what_an_admin_did_is_shown_with_the_admins_name(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await world.admin.StopRun(admin_pb2.StopRunRequest(run=b"\1" * 32), timeout=TIMEOUT_S)
    capsys.readouterr()  # what the coordinator logged
    assert await cosilo(world, "audit", "show", "--who", "admin", "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["entries"]
    admin = f"admin {world.founded.admin.membership.name}"
    assert {entry["who"] for entry in found} == {admin}
    assert [entry["what"] for entry in found] == ["members list", "members list in force", "stop run", "stop run: refused"]
    assert found[1]["detail"] == {"version": 2, "added": sorted(f"site {name}" for name in SITES), "removed": []}
    assert found[2]["detail"] == {"run": "01" * 32, "abandon": False}
    assert "no run 010101010101 is known" in found[3]["detail"]["reason"]
    assert await cosilo(world, "audit", "show", "--last", "1") == 0
    assert "stop run: refused reason=" in capsys.readouterr().out


async def test_a_change_that_cannot_be_logged_is_not_made(world: World) -> None:
    log = world.data / AUDIT_FILE
    log.rename(world.data / "aside")
    log.mkdir()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.admin.PutInvitation(invitation("late"), timeout=TIMEOUT_S)
    assert "audit" in (refused.value.details() or "")
    log.rmdir()
    (world.data / "aside").rename(log)
    listed = await world.admin.ListEnrolments(admin_pb2.ListEnrolmentsRequest(), timeout=TIMEOUT_S)
    assert list(listed.enrolments) == []
    await world.admin.PutInvitation(invitation("late"), timeout=TIMEOUT_S)
    assert entries(world)[-1].detail == {"name": "late", "role": "site", "preapproved": False}


async def test_a_changed_byte_a_removed_line_and_a_cut_tail_are_found(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, head = world.data / AUDIT_FILE, tmp_path / "head.json"
    whole = log.read_bytes()
    assert await cosilo(world, "audit", "verify", "--head", str(head)) == 0
    assert f"the chain holds: {len(entries(world))} entries" in capsys.readouterr().out
    lines = whole.splitlines(keepends=True)
    for changed, said in (
        (whole.replace(b'"version":2', b'"version":3'), "was changed"),
        (b"".join(lines[:1] + lines[2:]), "line 2 does not follow the line before it"),
        (b"".join(lines[:-1]), f"it ends after line {len(lines) - 1}, and had {len(lines)}"),
    ):
        log.write_bytes(changed)
        assert await cosilo(world, "audit", "verify", "--head", str(head)) == 1
        assert said in capsys.readouterr().err
    log.write_bytes(b"".join(lines[:-1]))
    assert await cosilo(world, "audit", "verify") == 0, "without a kept head nothing shows that the end is missing"
    log.write_bytes(whole)
    assert await cosilo(world, "audit", "verify", "--head", str(head)) == 0


async def test_a_start_and_a_stop_are_noted(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    coordinator = a_coordinator(founded, tmp_path / "data", ANYWHERE)
    await coordinator.start()
    await coordinator.stop()
    found_entries = list(AuditLog(tmp_path / "data" / AUDIT_FILE).entries())
    assert [(entry.who, entry.what) for entry in found_entries] == [("coordinator", "started"), ("coordinator", "stopped")]


async def test_notes_are_written_in_order_and_a_failure_is_counted(tmp_path: Path) -> None:
    failures: list[None] = []
    trail = AuditTrail(AuditLog(tmp_path / "log"), lambda: failures.append(None))
    for number in range(50):
        trail.note("site a", "did", number=number)
    trail.close()
    assert [entry.detail["number"] for entry in AuditLog(tmp_path / "log").entries()] == list(range(50))
    lost = AuditTrail(AuditLog(tmp_path / "absent" / "log"), lambda: failures.append(None))
    lost.note("site a", "did")
    with pytest.raises(CosiloError, match="absent"):
        await lost.write("site a", "did")
    lost.close()
    assert failures == [None]
