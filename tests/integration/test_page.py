"""The status page of a real coordinator, over real sockets: what it says, what it pushes, whom it refuses, how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2
from cosilo_server.page import server as server_module
from cosilo_server.page.app import STREAMS_MAX
from cosilo_server.page.server import PagePort
from tests.identity_parties import FEDERATION, found
from tests.integration.coordinator_world import ANYWHERE, SITES, TIMEOUT_S, HandSite, World, a_coordinator, start, three_members

PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A coordinator with a page, and three members."""
    root = tmp_path_factory.mktemp("page")
    async with three_members(found(root / "f"), root / "data", ANYWHERE) as made:
        yield made


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()


async def fetch(address: str, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """One request, byte by byte as a stranger might send it; returns status, headers and body."""
    async with asyncio.timeout(TIMEOUT_S), connection(address) as (reader, writer):
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host or address}\r\nContent-Length: 0\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        return int(status.split()[1]), {name.lower(): value for name, _, value in pairs}, body


async def hung_up(reader: asyncio.StreamReader) -> bool:
    """Whether a connection ends without an answer."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


class Stream:
    """A browser that watches."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def until(self, holds: Any) -> dict[str, Any]:
        """The first standing of which `holds` is true."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                line = await self._reader.readline()
                assert line, "the stream ended"
                if line.startswith(b"data: "):
                    standing: dict[str, Any] = json.loads(line[6:])
                    if holds(standing):
                        return standing


@asynccontextmanager
async def watching(address: str) -> AsyncIterator[Stream]:
    async with connection(address) as (reader, writer):
        writer.write(f"GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        async with asyncio.timeout(TIMEOUT_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200") and "content-type: text/event-stream" in head
        yield Stream(reader)


def page_of(world: World) -> str:
    return world.coordinator.endpoints["page"]


def run_in(standing: dict[str, Any], run: bytes) -> dict[str, Any]:
    return next((one for one in standing["runs"] if one["run"] == run.hex()), {"current": None, "state": ""})


async def test_the_page_answers_where_endpoints_json_says(world: World) -> None:
    assert json.loads((world.data / "endpoints.json").read_text())["page"] == page_of(world)
    for path, kind, part in (
        ("/", "text/html", b"<title>Cosilo</title>"),
        ("/page.js", "text/javascript", b"EventSource"),
        ("/page.css", "text/css", b"prefers-color-scheme"),
        ("/icon.svg", "image/svg+xml", b"<svg"),
    ):
        status, headers, body = await fetch(page_of(world), path)
        assert (status, headers["content-type"].partition(";")[0], headers["x-content-type-options"]) == (200, kind, "nosniff")
        assert part in body
    assert (await fetch(page_of(world), "/", "POST"))[0] == 405
    assert (await fetch(page_of(world), "/events", "POST"))[0] == 405
    assert (await fetch(page_of(world), "/", host="evil.example"))[0] == 421
    assert (await fetch(page_of(world), "/runs/../state.db"))[0] == 404


async def test_a_watcher_is_told_of_sites_rounds_progress_and_why_a_round_failed(world: World) -> None:
    run = await world.create(world.manifest("watched"))
    async with watching(page_of(world)) as stream:
        first = await stream.until(lambda standing: run_in(standing, run)["state"] == "idle")
        assert (first["federation"], [site["site"] for site in first["sites"]]) == (FEDERATION, list(SITES))
        assert set(first["sites"][0]) == {"site", "connected", "last_seen_unix_s", "certificate_expires_unix_s"}
        assert [site["connected"] for site in first["sites"]] == [False] * 3
        assert run_in(first, run)["phases"] == ["gathering", "training", "uploading", "opening", "closed"]

        sites = {name: await HandSite(world, name).join() for name in SITES}
        await stream.until(lambda standing: all(site["connected"] for site in standing["sites"]))
        await start(world, run)
        owed = await sites["st-anna"].owed(run, site_pb2.ROUND_PHASE_TRAINING)
        progress = site_pb2.Progress(run=run, round=owed.round, activity=site_pb2.SITE_ACTIVITY_TRAINING, tenths=4)
        sites["st-anna"].say(progress=progress)

        def anna_trains(standing: dict[str, Any]) -> bool:
            current = run_in(standing, run)["current"]
            return current is not None and any(site["site"] == "st-anna" and site["tenths"] == 4 for site in current["sites"])

        told = run_in(await stream.until(anna_trains), run)
        assert (told["state"], told["current"]["phase"], told["current"]["invited"]) == ("running", "training", 3)
        assert told["current"]["sites"][0] == {
            "site": "st-anna",
            "connected": True,
            "activity": "training",
            "tenths": 4,
            "bytes": 0,
            "delivered": False,
            "declined": None,
            "late": False,
        }

        await world.admin.StopRun(admin_pb2.StopRunRequest(run=run, abandon=True), timeout=TIMEOUT_S)
        ended = await stream.until(
            lambda standing: run_in(standing, run)["state"] == "stopped" and run_in(standing, run)["current"]["seconds"]
        )
        current = run_in(ended, run)["current"]
        assert (current["phase"], current["failed_in"], current["reason"]) == ("abandoned", "training", "stopped by an admin")
        status, _, body = await fetch(page_of(world), f"/runs/{run.hex()}.json")
        history = json.loads(body)
        assert (status, [(one["round"], one["phase"], one["reason"]) for one in history["rounds"]]) == (
            200,
            [(1, "abandoned", "stopped by an admin")],
        )
        for site in sites.values():
            await site.leave()
        gone = await stream.until(lambda standing: not any(site["connected"] for site in standing["sites"]))
        assert all(site["last_seen_unix_s"] > 0 for site in gone["sites"])


async def test_grids_are_shown_and_nothing_else_among_the_artifacts_is(world: World) -> None:
    run = await world.create(world.manifest("sampled"))
    async with watching(page_of(world)) as stream:
        await stream.until(lambda standing: run_in(standing, run).get("grids") == 0)
        drawn = await world.admin.Sample(admin_pb2.SampleRequest(run=run, newest=True, per_class=1, steps=1, seed=1), timeout=120)
        await stream.until(lambda standing: run_in(standing, run)["grids"] == 1)
    grids = json.loads((await fetch(page_of(world), f"/runs/{run.hex()}.json"))[2])["grids"]
    assert [(grid["round"], grid["digest"]) for grid in grids] == [(0, drawn.png_digest.hex())]
    status, headers, body = await fetch(page_of(world), f"/grids/{drawn.png_digest.hex()}.png")
    assert (status, headers["content-type"], len(body), body[:8]) == (200, "image/png", drawn.bytes, PNG)
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    for path in (world.data / "artifacts").iterdir():
        if path.is_file() and path.name != drawn.png_digest.hex():
            assert (await fetch(page_of(world), f"/grids/{path.name}.png"))[0] == 404
    (world.data / "artifacts" / drawn.png_digest.hex()).unlink()
    assert (await fetch(page_of(world), f"/grids/{drawn.png_digest.hex()}.png"))[0] == 404
    assert json.loads((await fetch(page_of(world), f"/runs/{run.hex()}.json"))[2])["grids"] == []
    assert (await fetch(page_of(world), f"/runs/{'0' * 64}.json"))[0] == 404


async def test_streams_and_connections_are_bounded_and_those_that_say_nothing_are_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [watching(page_of(world)) for _ in range(STREAMS_MAX)]
    for stream in streams:
        await stream.__aenter__()
    status, headers, _ = await fetch(page_of(world), "/events")
    assert (status, headers["retry-after"]) == (503, "10")
    assert (await fetch(page_of(world), "/"))[0] == 200
    for stream in streams:
        await stream.__aexit__(None, None, None)

    monkeypatch.setattr(server_module, "REQUEST_TIMEOUT_S", 0.05)
    async with asyncio.timeout(TIMEOUT_S), connection(page_of(world)) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: loc")
        assert await hung_up(reader)
    monkeypatch.setattr(server_module, "CONNECTIONS_MAX", 0)
    async with asyncio.timeout(TIMEOUT_S), connection(page_of(world)) as (reader, writer):
        assert await hung_up(reader)
    counted = world.coordinator.metrics.registry.get_sample_value
    assert [counted("cosilo_rejected_messages_total", {"reason": f"page_{why}"}) for why in ("slow", "connections")] == [1, 1]


async def test_a_port_in_use_is_named_before_anything_has_begun(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        page = f"127.0.0.1:{taken.getsockname()[1]}"
        coordinator = a_coordinator(found(tmp_path / "f"), tmp_path / "data", page)
        with pytest.raises(CosiloError) as caught:
            await coordinator.start()
        assert (caught.value.operation, caught.value.subject) == ("open the page's port", f"{page}: Address already in use")
        assert caught.value.hint == 'stop what uses it, or choose another for page in [listen] of coordinator.toml; page = "" is none'
        assert not (tmp_path / "data" / "endpoints.json").exists()
        with pytest.raises(CosiloError, match=r"127\.0\.0\.1:99999: .*port must be 0-65535"):
            PagePort("127.0.0.1:99999")


async def test_it_is_off_unless_configured_and_a_stop_ends_the_streams(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    without = a_coordinator(founded, tmp_path / "without", "")
    await without.start()
    assert set(without.endpoints) == {"federation", "enrolment", "metrics"}
    await without.stop()

    coordinator = a_coordinator(founded, tmp_path / "data", ANYWHERE)
    await coordinator.start()
    address = coordinator.endpoints["page"]
    async with connection(address) as (reader, writer):
        writer.write(f"GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        async with asyncio.timeout(TIMEOUT_S):
            await reader.readuntil(b"event: standing\n")
            await coordinator.stop()
            assert (await reader.read()).endswith(b"0\r\n\r\n")  # ended in order, not cut
    with pytest.raises(OSError):
        await fetch(address, "/")


async def test_when_a_site_was_there_is_known_after_a_restart(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    coordinator = a_coordinator(founded, tmp_path / "data", "")
    await coordinator.start()
    keys, tls = {SITES[0]: make_signing_key()}, {SITES[0]: founded.party(Role.SITE, SITES[0])}
    world = World(founded, coordinator, tmp_path / "data", None, keys, tls)
    world.admin = admin_pb2_grpc.AdminServiceStub(world.channel(founded.admin.tls))
    draft = founded.members.draft().approve(SITES[0], Role.SITE, public_bytes(keys[SITES[0]]))
    signed = sign_members(founded.members, draft, founded.admin.membership.name, founded.admin_key)
    await world.admin.PutMembers(admin_pb2.PutMembersRequest(members=signed.canonical()), timeout=TIMEOUT_S)
    site = await HandSite(world, SITES[0]).join()
    store = coordinator._store
    began = store.sites_seen()[SITES[0]].at
    presence = asyncio.create_task(coordinator.watch_presence())
    async with asyncio.timeout(TIMEOUT_S):
        while store.sites_seen()[SITES[0]].at <= began:
            await asyncio.sleep(0.02)
    presence.cancel()
    await site.leave()
    for channel in world.channels:
        await channel.close()
    await coordinator.stop()
