"""The bounds that docs/limits.md lists, where the coordinator itself puts them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles, enrolment_channel, federation_channel
from cosilo_common.rpc.v1 import enrolment_pb2, enrolment_pb2_grpc, site_pb2, site_pb2_grpc
from cosilo_server.config import CoordinatorConfig, Limits, Listen, Paths
from cosilo_server.coordinator import Coordinator
from cosilo_server.services import federation
from tests.identity_parties import ADMIN, FEDERATION, found

TIMEOUT_S = 20.0
STREAMS = 2
HELLO = site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=1, software="hand"))


@dataclass
class World:
    """A coordinator with one member site, who opens streams by hand."""

    coordinator: Coordinator
    tls: TlsFiles
    channel: grpc.aio.Channel

    async def stream(self) -> Any:
        call = site_pb2_grpc.SiteServiceStub(self.channel).Attend()
        await call.write(HELLO)
        return call

    def rejected(self, reason: str) -> float:
        return self.coordinator.metrics.registry.get_sample_value("cosilo_rejected_messages_total", {"reason": reason}) or 0.0


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    founded = found(tmp_path / "f")
    paths = Paths(identity=founded.coordinator.folder, data=tmp_path / "data")
    paths.data.mkdir()
    listen = Listen(federation="127.0.0.1:0", enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
    config = CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths, limits=Limits(streams_per_site=STREAMS))
    coordinator = Coordinator(config)
    draft = founded.members.draft().approve("st-anna", Role.SITE, public_bytes(make_signing_key()))
    coordinator._members.put(sign_members(founded.members, draft, ADMIN, founded.admin_key).canonical())
    await coordinator.start()
    tls = founded.party(Role.SITE, "st-anna")
    channel = federation_channel(coordinator.endpoints["federation"], tls)
    yield World(coordinator, tls, channel)
    await channel.close()
    await coordinator.stop()


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(TIMEOUT_S):
        return await call.code(), await call.details() or ""


async def test_a_site_has_so_many_streams_and_no_more(world: World) -> None:
    """Whichever way one ends, its place is free again."""
    for _ in range(3):
        standing = [await world.stream() for _ in range(STREAMS)]
        for call in standing:
            assert isinstance(await call.read(), site_pb2.AttendResponse)
        code, details = await ended(await world.stream())
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, f"st-anna has {STREAMS} streams open already")
        standing[0].cancel()
        await standing[1].done_writing()
        assert (await ended(standing[1]))[0] is grpc.StatusCode.OK
        async with asyncio.timeout(TIMEOUT_S), world.coordinator.conductor.watch() as changed:
            while world.coordinator.conductor.connected("st-anna"):
                await changed.wait()
                changed.clear()
    assert world.rejected("too_many_streams") == 3


async def test_a_stream_without_a_hello_gives_its_place_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "HELLO_TIMEOUT_S", 0.1)
    for _ in range(STREAMS + 1):
        silent = site_pb2_grpc.SiteServiceStub(world.channel).Attend()
        assert (await ended(silent))[0] is grpc.StatusCode.INVALID_ARGUMENT
    good = await world.stream()
    assert isinstance(await good.read(), site_pb2.AttendResponse)
    good.cancel()
    assert world.rejected("no_hello") == STREAMS + 1


async def test_a_site_that_talks_without_end_is_read_more_slowly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost and nothing is refused: what is not read waits in the sender's window."""
    monkeypatch.setattr(federation, "ATTENDING_PER_MINUTE_MAX", 600)
    call = await world.stream()
    await call.read()
    for _ in range(605):
        await call.write(site_pb2.AttendRequest(progress=site_pb2.Progress(run=bytes(32), round=1)))
    await call.done_writing()
    assert (await ended(call))[0] is grpc.StatusCode.OK
    assert world.rejected("attend_rate") >= 1


async def test_one_address_enrols_so_often_at_once(world: World) -> None:
    """Headers without a request hold two places, and the third call of that address is told to wait."""
    channel = enrolment_channel(world.coordinator.endpoints["enrolment"], world.tls.ca.read_bytes())
    async with channel:
        enrol = channel.stream_unary("/cosilo.v1.EnrolmentService/Enrol")
        silent = [enrol() for _ in range(2)]
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                call = stub.Enrol(enrolment_pb2.EnrolRequest())
                if (await ended(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    break
        assert world.rejected("calls_of_one_caller") == 1
        for call in silent:
            call.cancel()
