"""`cosilo round trace` against a real coordinator: what it measured itself of a round that sites went through, over gRPC with certificates."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cosilo_common.canonical import sha256
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_server.cli.main import main
from tests.integration.coordinator_world import (
    SITES,
    TIMEOUT_S,
    HandSite,
    World,
    code_of,
    payload_of,
    start,
    world,  # noqa: F401 - the fixture
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def cosilo(at: World, *arguments: str) -> int:
    address = at.coordinator.endpoints["federation"]
    return await asyncio.to_thread(main, ["--admin", str(at.founded.admin.folder), "--address", address, *arguments])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said, without the coordinator's log, which goes to the same stdout here."""
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in lines if not re.match(r"(\x1b\[\S*)?\d{4}-\d\d-\d\d ", line))


async def test_where_a_round_went(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811 - the fixture
    manifest = world.manifest("traced")
    run = await world.create(manifest)
    sites = {name: await HandSite(world, name).join() for name in SITES}
    await start(world, run)
    for name in SITES:
        owed = await sites[name].owed(run, site_pb2.ROUND_PHASE_TRAINING)
        fetched = b"".join(
            [m.data async for m in sites[name].stub.GetArtifact(site_pb2.GetArtifactRequest(digest=owed.base_digest), timeout=TIMEOUT_S)]
        )
        assert sha256(fetched) == owed.base_digest
        await sites[name].advert(owed)
    payloads = {}
    for name in SITES[:2]:
        due = await sites[name].owed(run, site_pb2.ROUND_PHASE_UPLOADING)
        payloads[name] = payload_of(due, np.zeros(manifest.tensor_table.size), 10, (1.0, 1.0, 1.0))
        await sites[name].put(due, payloads[name])

    assert await cosilo(world, "round", "trace", "traced", "1", "--json") == 0  # while it goes on
    live = json.loads(said(capsys))
    assert (live["phase"], [p["phase"] for p in live["phases"]]) == ("uploading", ["training"])

    late = sites["st-clara"]
    due = await late.owed(run, site_pb2.ROUND_PHASE_UPLOADING)
    payload = payload_of(due, np.zeros(manifest.tensor_table.size), 10, (1.0, 1.0, 1.0))
    cut = late.stub.PutUpdate(timeout=TIMEOUT_S)
    await cut.write(late.header(due, payload))
    assert (await cut.read()).resume_offset == 0
    await cut.write(site_pb2.PutUpdateRequest(data=payload[:1000]))
    await cut.done_writing()
    assert await code_of(cut) is grpc.StatusCode.UNAVAILABLE
    await late.put(due, payload)
    await late.owed(run, site_pb2.ROUND_PHASE_CLOSED)

    file = tmp_path / "trace.json"
    assert await cosilo(world, "round", "trace", "traced", "1", "--json", "--perfetto", str(file)) == 0
    trace = json.loads(said(capsys))
    assert (trace["run"], trace["round"], trace["phase"], trace["left_out"]) == (run.hex(), 1, "closed", 0)
    assert [p["phase"] for p in trace["phases"]] == ["training", "uploading", "opening"]
    uploading = trace["phases"][1]
    assert uploading["last_site"] == "st-clara"
    assert 0 < uploading["alone_s"] < uploading["seconds"]

    def moved(what: str) -> list[tuple[str, int, Any]]:
        found = [s for s in trace["spans"] if (s["lane"], s["what"]) == ("transfer", what)]
        return sorted((s["party"], s["bytes"], s["outcome"]) for s in found)

    rest = len(payload) - 1000
    assert moved("fetch") == [(name, len(fetched), None) for name in SITES]
    assert moved("digest") == [(name, 0, None) for name in SITES]
    assert sorted(moved("upload"), key=lambda m: (m[0], m[1])) == [
        ("st-anna", len(payload), None),
        ("st-beda", len(payload), None),
        ("st-clara", 1000, "cut"),
        ("st-clara", rest, None),
    ]
    opening = {s["what"]: s for s in trace["spans"] if s["lane"] == "opening"}
    assert set(opening) == {"sum early", "reconstruct", "sum and write", "commit"}
    phase = trace["phases"][2]
    early = opening.pop("sum early")
    assert early["began_s"] + early["seconds"] <= phase["began_s"]  # of the first two uploads, while the third was on its way
    assert all(phase["began_s"] <= s["began_s"] for s in opening.values())
    assert not any(s["running"] for s in trace["spans"])
    events = json.loads(file.read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == len(trace["spans"])

    assert await cosilo(world, "round", "trace", "traced", "1") == 0
    text = said(capsys).splitlines()
    assert text[0].startswith("round 1 of traced: train, closed, ")
    assert {"coordinator", *SITES} <= set(text)
    assert all(len(line) <= 80 and line.isascii() for line in text)
    for site in sites.values():
        await site.leave()


async def test_no_such_round_and_no_admin(world: World, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811 - the fixture
    run = await world.create(world.manifest("untraced"))
    assert await cosilo(world, "round", "trace", "untraced", "3") == 1
    assert "there is no round 3" in capsys.readouterr().err
    site_as_admin = world.channel(world.tls["st-anna"]).unary_unary(
        "/cosilo.v1.AdminService/GetRoundTrace", request_serializer=admin_pb2.GetRoundTraceRequest.SerializeToString
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site_as_admin(admin_pb2.GetRoundTraceRequest(run=run, round=1), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
