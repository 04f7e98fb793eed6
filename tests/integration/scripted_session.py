"""A site's session under test, over real gRPC with real certificates, and the scripted coordinator that it attends.

Fixtures, imported by name where they are used.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import NetworkTable
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Owed
from cosilo_client.session import Session
from cosilo_client.wire import owed_from
from cosilo_common.identity.folder import Identity, Membership
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles, server_credentials, server_options
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_common.transfer import CHUNK_BYTES
from tests.identity_parties import FEDERATION, Founded, found

RUN = bytes(range(32))
WEIGHTS = random.Random(7).randbytes(3 * CHUNK_BYTES + 123)
DIGEST = hashlib.sha256(WEIGHTS).digest()
SPOOL = random.Random(8).randbytes(4 * CHUNK_BYTES + 55)
FAST = NetworkTable(timeout_s=5.0, stall_s=5.0, backoff_min_s=0.01, backoff_max_s=0.05)

Context = grpc.aio.ServicerContext[Any, Any]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@dataclass
class ScriptedCoordinator(site_pb2_grpc.SiteServiceServicer):
    """Does what its fields say. cuts: offsets at which a transfer is cut, one a call; corrupt: fetches to spoil."""

    snapshots: asyncio.Queue[site_pb2.AttendResponse | None] = field(default_factory=asyncio.Queue)
    hellos: list[site_pb2.Hello] = field(default_factory=list)
    said: asyncio.Queue[site_pb2.AttendRequest] = field(default_factory=asyncio.Queue)
    first: site_pb2.AttendResponse = field(default_factory=lambda: site_pb2.AttendResponse(protocol_version=1))
    cuts: list[int] = field(default_factory=list)
    corrupt: int = 0
    fetches: list[int] = field(default_factory=list)
    held: bytearray = field(default_factory=bytearray)
    puts: list[int] = field(default_factory=list)
    submitted: list[bytes] = field(default_factory=list)
    statuses: list[grpc.StatusCode] = field(default_factory=list)
    stall: bool = False
    data_losses: int = 0

    async def Attend(self, request_iterator: Any, context: Context) -> AsyncIterator[site_pb2.AttendResponse]:
        hello = await anext(aiter(request_iterator))
        self.hellos.append(hello.hello)
        if self.statuses:
            await context.abort(self.statuses.pop(0), "scripted")
        yield self.first

        async def listen() -> None:
            async for request in request_iterator:
                self.said.put_nowait(request)

        listener = asyncio.create_task(listen())
        try:
            while (snapshot := await self.snapshots.get()) is not None:
                yield snapshot
        finally:
            listener.cancel()

    async def GetArtifact(self, request: site_pb2.GetArtifactRequest, context: Context) -> AsyncIterator[site_pb2.GetArtifactResponse]:
        self.fetches.append(request.offset)
        if request.digest != DIGEST:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not weights of your run")
        data = bytearray(WEIGHTS)
        if self.corrupt:
            self.corrupt -= 1
            data[-1] ^= 1
        end = self.cuts.pop(0) if self.cuts else len(data)
        stalls, self.stall = self.stall, False  # this call's, even if the site cancels it before it comes to stall
        yield site_pb2.GetArtifactResponse(total_bytes=len(data))
        for at in range(request.offset, end, CHUNK_BYTES):
            yield site_pb2.GetArtifactResponse(data=bytes(data[at : min(end, at + CHUNK_BYTES)]))
        if stalls:
            await asyncio.Event().wait()
        if end < len(data):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def PutUpdate(self, request_iterator: Any, context: Context) -> AsyncIterator[site_pb2.PutUpdateResponse]:
        requests = aiter(request_iterator)
        header = (await anext(requests)).header
        if header.run != RUN:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "header.run: no such run")
        self.puts.append(len(self.held))
        yield site_pb2.PutUpdateResponse(resume_offset=len(self.held))
        cut = self.cuts.pop(0) if self.cuts else None
        async for request in requests:
            self.held += request.data
            if cut is not None and len(self.held) >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        if self.data_losses:
            self.data_losses -= 1
            self.held.clear()
            await context.abort(grpc.StatusCode.DATA_LOSS, "digest; send it again from the start")
        assert bytes(self.held) == SPOOL
        yield site_pb2.PutUpdateResponse(stored=True)

    async def Submit(self, request: site_pb2.SubmitRequest, context: Context) -> site_pb2.SubmitResponse:
        if self.statuses:
            await context.abort(self.statuses.pop(0), "scripted: rule R2")
        self.submitted.append(request.message)
        return site_pb2.SubmitResponse()

    async def GetMembers(self, request: site_pb2.GetMembersRequest, context: Context) -> site_pb2.GetMembersResponse:
        return site_pb2.GetMembersResponse(members=b"members")


async def listen(servicer: ScriptedCoordinator, tls: TlsFiles, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=server_options())
    site_pb2_grpc.add_SiteServiceServicer_to_server(servicer, server)
    port = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(tls))
    await server.start()
    return server, port


def identity_of(parties: Founded, tls: TlsFiles, port: int) -> Identity:
    membership = Membership(
        federation=FEDERATION,
        role=Role.SITE,
        name="site-a",
        address=f"127.0.0.1:{port}",
        enrolment_address="127.0.0.1:1",
        anchor=parties.members.anchor(),
    )
    return Identity(folder=tls.certificate.parent, membership=membership)


@dataclass
class Attended:
    """A session under test, the server it attends, and what came of it."""

    session: Session
    servicer: ScriptedCoordinator
    server: grpc.aio.Server
    port: int
    tls: TlsFiles
    cache: ArtifactCache
    metrics: SiteMetrics
    snapshots: asyncio.Queue[Sequence[Owed]]
    members: asyncio.Queue[bytes]
    moved: list[int] = field(default_factory=list)

    async def snapshot(self) -> Sequence[Owed]:
        return await asyncio.wait_for(self.snapshots.get(), 20)


@pytest.fixture
async def attended(parties: Founded, tmp_path: Path) -> AsyncIterator[Attended]:
    servicer = ScriptedCoordinator()
    server, port = await listen(servicer, parties.coordinator.tls)
    tls = parties.party(Role.SITE, "site-a")
    cache, metrics = ArtifactCache(tmp_path / "artifacts", 1 << 30), SiteMetrics()
    snapshots: asyncio.Queue[Sequence[Owed]] = asyncio.Queue()
    members: asyncio.Queue[bytes] = asyncio.Queue()
    session = Session(identity_of(parties, tls, port), cache, FAST, metrics, snapshots.put_nowait, members.put_nowait, random.Random(1))
    running = asyncio.create_task(session.run())
    found = Attended(session, servicer, server, port, tls, cache, metrics, snapshots, members)
    yield found
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    servicer.snapshots.put_nowait(None)
    await found.server.stop(0)


def assignment(**changes: object) -> site_pb2.Assignment:
    fields: dict[str, object] = {
        "run": RUN,
        "round": 3,
        "kind": site_pb2.ROUND_KIND_TRAIN,
        "phase": site_pb2.ROUND_PHASE_TRAINING,
        "invited": True,
        "attempt": 1,
        "invited_sites": ["site-a", "site-b"],
        "base_digest": DIGEST,
        "base_bytes": len(WEIGHTS),
    }
    return site_pb2.Assignment(**{**fields, **changes})  # type: ignore[arg-type]  # a test's table of fields


OWED = owed_from(assignment())
