"""The site's session against a real gRPC server with real certificates and a scripted coordinator.

It comes back, resumes where it was cut, and never wedges.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import cosilo_client.session
from cosilo_client.artifacts import ArtifactCache
from cosilo_client.backoff import Backoff
from cosilo_client.config import NetworkTable
from cosilo_client.coordinator import Refused, Unreachable, UploadHeader
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Activity, Decline, DeclineCode, Owed, Phase, Progress
from cosilo_client.session import Session
from cosilo_client.transport import Transport
from cosilo_client.wire import chunk_from, frame_chunk, owed_from
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Identity, Membership
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles, server_credentials, server_options
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.transfer import CHUNK_BYTES, partial_path
from tests.identity_parties import FEDERATION, NOW, Founded, found

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


# The stream


async def test_a_site_says_hello_and_hands_on_snapshots_whole(attended: Attended) -> None:
    assert await attended.snapshot() == []
    attended.servicer.snapshots.put_nowait(site_pb2.AttendResponse(owed=[assignment(), assignment(run=b"\1" * 32)]))
    first, second = await attended.snapshot()
    assert (first.run, first.round, first.phase, first.kind) == (RUN, 3, Phase.TRAINING, RoundKind.TRAIN)
    assert second.run == b"\1" * 32
    (hello,) = attended.servicer.hellos
    assert hello.protocol_version == 1
    assert hello.software.startswith("cosilo-site ")


@pytest.mark.parametrize(("theirs", "older"), [(2, "cosilo-site at this site"), (0, "the coordinator")])
async def test_a_coordinator_of_another_version_is_not_listened_to_and_the_log_says_which_to_upgrade(
    attended: Attended, theirs: int, older: str
) -> None:
    await attended.snapshot()
    attended.servicer.first = site_pb2.AttendResponse(protocol_version=theirs, owed=[assignment()])
    attended.servicer.snapshots.put_nowait(None)  # the stream ends: the coordinator is another one when the site comes back
    said = f"not connected: attend: the site speaks protocol version 1 and the coordinator {theirs}: upgrade {older}"
    async with asyncio.timeout(20):
        while not attended.session.state()[1].startswith(said):
            await asyncio.sleep(0.01)
    assert attended.snapshots.empty()


async def test_an_assignment_that_cannot_be_is_left_out_and_the_rest_handed_on(attended: Attended) -> None:
    await attended.snapshot()
    bad = [assignment(run=b"\1"), assignment(phase=99), assignment(attempt=0), assignment(base_digest=b"")]
    attended.servicer.snapshots.put_nowait(site_pb2.AttendResponse(owed=[*bad, assignment()]))
    assert [owed.run for owed in await attended.snapshot()] == [RUN]


async def test_what_is_said_reaches_the_coordinator_and_is_said_again_on_a_new_stream(attended: Attended) -> None:
    await attended.snapshot()
    attended.session.say(Progress(RUN, 3, Activity.TRAINING, 4, 0))
    said = await asyncio.wait_for(attended.servicer.said.get(), 20)
    assert (said.progress.activity, said.progress.tenths) == (site_pb2.SITE_ACTIVITY_TRAINING, 4)
    attended.session.say(Decline(RUN, 3, DeclineCode.TRAINER))
    assert (await asyncio.wait_for(attended.servicer.said.get(), 20)).decline.code == site_pb2.DECLINE_CODE_TRAINER
    attended.servicer.snapshots.put_nowait(None)
    await attended.snapshot()
    assert (await asyncio.wait_for(attended.servicer.said.get(), 20)).decline.round == 3


async def test_a_site_comes_back_to_a_coordinator_that_was_restarted(attended: Attended, parties: Founded) -> None:
    await attended.snapshot()
    assert attended.session.state() == (True, "connected")
    await attended.server.stop(0)
    async with asyncio.timeout(20):
        while attended.session.state()[0]:
            await asyncio.sleep(0.01)
    assert attended.metrics.registry.get_sample_value("cosilo_connected") == 0
    attended.server, _ = await listen(attended.servicer, parties.coordinator.tls, attended.port)
    await attended.snapshot()
    assert len(attended.servicer.hellos) == 2
    assert attended.metrics.registry.get_sample_value("cosilo_connected") == 1


async def test_a_refused_stream_is_tried_again(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED]
    attended.servicer.snapshots.put_nowait(None)
    await attended.snapshot()
    assert len(attended.servicer.hellos) == 4


async def test_after_a_handshake_failed_the_certificate_is_read_again(parties: Founded, tmp_path: Path) -> None:
    servicer = ScriptedCoordinator()
    server, port = await listen(servicer, parties.coordinator.tls)
    past = parties.party(Role.SITE, "site-a", NOW - timedelta(days=3))  # expired
    snapshots: asyncio.Queue[Sequence[Owed]] = asyncio.Queue()
    session = Session(
        identity_of(parties, past, port),
        ArtifactCache(tmp_path / "artifacts", 1 << 30),
        FAST,
        SiteMetrics(),
        snapshots.put_nowait,
        lambda _: None,
        random.Random(1),
    )
    running = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(20):
            while "expired" not in session.state()[1]:
                await asyncio.sleep(0.01)
        assert snapshots.empty()
        good = parties.party(Role.SITE, "site-a")
        for old, new in ((past.key, good.key), (past.certificate, good.certificate)):
            new.replace(old)
        assert await asyncio.wait_for(snapshots.get(), 20) == []
        assert session.state() == (True, "connected")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        servicer.snapshots.put_nowait(None)
        await server.stop(0)


async def test_the_members_list_is_fetched_on_connecting_and_when_it_is_newer(attended: Attended) -> None:
    await attended.snapshot()
    assert await asyncio.wait_for(attended.members.get(), 20) == b"members"
    attended.servicer.snapshots.put_nowait(site_pb2.AttendResponse(members_version=2))
    assert await asyncio.wait_for(attended.members.get(), 20) == b"members"
    attended.servicer.snapshots.put_nowait(site_pb2.AttendResponse(members_version=2))
    await attended.snapshot()
    assert attended.members.empty()


def test_backoff_doubles_within_its_bounds_and_is_drawn_anew() -> None:
    backoff = Backoff(1.0, 60.0, random.Random(3))
    for failures, bound in ((1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (1000, 60.0)):
        drawn = {backoff.wait_s(failures) for _ in range(50)}
        assert len(drawn) > 40
        assert all(bound / 2 <= wait <= bound for wait in drawn)


# Transfers


async def test_weights_are_fetched_once_and_found_afterwards(attended: Attended) -> None:
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    assert path.read_bytes() == WEIGHTS
    assert attended.moved[-1] == len(WEIGHTS)
    assert await attended.session.fetch(OWED, False, attended.moved.append) == path
    assert attended.servicer.fetches == [0]


async def test_a_forced_fetch_fetches_what_is_here(attended: Attended) -> None:
    await attended.session.fetch(OWED, False, attended.moved.append)
    await attended.session.fetch(OWED, True, attended.moved.append)
    assert attended.servicer.fetches == [0, 0]


async def test_a_cut_fetch_goes_on_at_its_offset(attended: Attended) -> None:
    attended.servicer.cuts = [CHUNK_BYTES + 5, 2 * CHUNK_BYTES]
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    assert path.read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, CHUNK_BYTES + 5, 2 * CHUNK_BYTES]


async def test_a_fetch_goes_on_where_an_earlier_process_was_killed(attended: Attended) -> None:
    path = attended.cache.path(DIGEST)
    partial_path(path, DIGEST.hex()).write_bytes(WEIGHTS[:1000])
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [1000]


async def test_corrupt_weights_are_discarded_and_fetched_again_from_the_start(attended: Attended) -> None:
    attended.servicer.corrupt = 2
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 0, 0]


async def test_weights_that_are_always_corrupt_are_an_error_and_leave_nothing(attended: Attended) -> None:
    attended.servicer.corrupt = 99
    with pytest.raises(CosiloError, match="SHA-256"):
        await attended.session.fetch(OWED, False, attended.moved.append)
    assert attended.servicer.fetches == [0] * cosilo_client.session.CORRUPT_MAX
    assert list(attended.cache.path(DIGEST).parent.iterdir()) == []


async def test_weights_that_rotted_on_the_disk_are_fetched_again(attended: Attended) -> None:
    path = await attended.session.fetch(OWED, False, attended.moved.append)
    path.write_bytes(WEIGHTS[:-1] + b"?")
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 0]


async def test_another_size_than_the_assignment_s_is_an_error(attended: Attended) -> None:
    wrong = owed_from(assignment(base_bytes=len(WEIGHTS) + 1))
    with pytest.raises(CosiloError, match=f"has {len(WEIGHTS)} bytes there and {len(WEIGHTS) + 1} in the assignment"):
        await attended.session.fetch(wrong, False, attended.moved.append)


async def test_a_fetch_that_moves_nothing_is_begun_again(attended: Attended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attended.session, "_network", FAST.model_copy(update={"stall_s": 0.3}))
    await attended.snapshot()
    attended.servicer.snapshots.put_nowait(None)  # the next connection has the shorter patience
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [CHUNK_BYTES], True
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, CHUNK_BYTES]


async def test_a_fetch_outlives_the_connection(attended: Attended, parties: Founded) -> None:
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [2 * CHUNK_BYTES], True
    fetching = asyncio.create_task(attended.session.fetch(OWED, False, attended.moved.append))
    async with asyncio.timeout(20):
        while 2 * CHUNK_BYTES not in attended.moved:
            await asyncio.sleep(0.01)
    await attended.server.stop(0)
    attended.server, _ = await listen(attended.servicer, parties.coordinator.tls, attended.port)
    assert (await asyncio.wait_for(fetching, 20)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 2 * CHUNK_BYTES]


async def test_the_least_recently_used_weights_go_when_the_cache_is_full(attended: Attended) -> None:
    cache = ArtifactCache(attended.cache.path(DIGEST).parent, 2 * len(WEIGHTS))
    session = attended.session
    session._cache = cache
    old, held = cache.path(b"\1" * 32), cache.path(b"\2" * 32)
    for path in (old, held):
        path.write_bytes(bytes(len(WEIGHTS)))
    cache.use(b"another run", b"\2" * 32)
    await session.fetch(OWED, False, attended.moved.append)
    assert sorted(path.name for path in cache.path(DIGEST).parent.iterdir()) == sorted([held.name, DIGEST.hex()])


HEADER = UploadHeader(RUN, 3, 1, b"statement")


async def test_an_upload_goes_up_whole(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert bytes(attended.servicer.held) == SPOOL
    assert (attended.moved[0], attended.moved[-1]) == (0, len(SPOOL))


async def test_a_cut_upload_goes_on_where_the_coordinator_has_it(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.cuts = [1, 2 * CHUNK_BYTES]
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert bytes(attended.servicer.held) == SPOOL
    assert attended.servicer.puts == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


async def test_an_upload_that_is_there_already_sends_nothing(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.held += SPOOL
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert attended.moved == [len(SPOOL)]


async def test_an_upload_that_a_link_corrupted_is_sent_again(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    attended.servicer.data_losses = 1
    await attended.session.put(HEADER, tmp_path / "spool", attended.moved.append)
    assert attended.servicer.puts == [0, 0]
    assert bytes(attended.servicer.held) == SPOOL


async def test_a_refused_upload_says_why_and_is_not_tried_again(attended: Attended, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(SPOOL)
    with pytest.raises(Refused, match=r"FAILED_PRECONDITION: header.run: no such run"):
        await attended.session.put(UploadHeader(bytes(32), 3, 1, b""), tmp_path / "spool", attended.moved.append)
    assert attended.moved == []


async def test_a_message_is_handed_in_through_failures_that_pass(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
    await attended.session.submit(b"signed")
    assert attended.servicer.submitted == [b"signed"]


async def test_a_refused_message_says_why_and_is_not_tried_again(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.FAILED_PRECONDITION]
    with pytest.raises(Refused, match="rule R2") as raised:
        await attended.session.submit(b"signed")
    assert raised.value.status == "FAILED_PRECONDITION"
    assert attended.servicer.submitted == []


async def test_tries_that_move_nothing_are_bounded(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.statuses = [grpc.StatusCode.UNAVAILABLE] * (cosilo_client.session.TRIES_MAX + 5)
    with pytest.raises(Unreachable, match="UNAVAILABLE"):
        await attended.session.submit(b"signed")
    assert len(attended.servicer.statuses) == 4


async def test_a_cancelled_fetch_is_cancelled_and_keeps_what_arrived(attended: Attended) -> None:
    await attended.snapshot()
    attended.servicer.cuts, attended.servicer.stall = [2 * CHUNK_BYTES], True
    fetching = asyncio.create_task(attended.session.fetch(OWED, False, attended.moved.append))
    async with asyncio.timeout(20):
        while max(attended.moved, default=0) < CHUNK_BYTES:  # told when the second chunk is here, which is written behind the first
            await asyncio.sleep(0.01)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert (await attended.session.fetch(OWED, False, attended.moved.append)).read_bytes() == WEIGHTS
    assert attended.servicer.fetches == [0, 2 * CHUNK_BYTES]


# Who is at the other end


async def test_another_site_s_server_cannot_pass_as_the_coordinator(parties: Founded) -> None:
    server, port = await listen(ScriptedCoordinator(), parties.party(Role.SITE, "site-b"))
    transport = Transport.open(f"127.0.0.1:{port}", parties.party(Role.SITE, "site-a"), timeout_s=5, stall_s=5)
    try:
        with pytest.raises(Unreachable):
            await transport.submit(b"signed")
    finally:
        await transport.close()
        await server.stop(0)


# Framing


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, CHUNK_BYTES])
def test_chunks_framed_by_hand_are_the_protocol_s_own_messages(size: int) -> None:
    chunk = bytes(range(256)) * (size // 256 + 1)
    chunk = chunk[:size]
    assert frame_chunk(chunk) == site_pb2.PutUpdateRequest(data=chunk).SerializeToString()
    data, total = chunk_from(site_pb2.GetArtifactResponse(data=chunk).SerializeToString())
    assert (bytes(data), total) == (chunk, 0)


def test_a_chunk_with_a_size_and_one_without_data_are_read() -> None:
    both = site_pb2.GetArtifactResponse(data=b"abc", total_bytes=9).SerializeToString()
    assert (bytes(chunk_from(both)[0]), chunk_from(both)[1]) == (b"abc", 9)
    assert (bytes(chunk_from(b"")[0]), chunk_from(b"")[1]) == (b"", 0)


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff", b"\x0a\x05abc", b"\xff"])
def test_what_is_no_chunk_is_an_error(message: bytes) -> None:
    with pytest.raises(CosiloError, match="not a message of this protocol"):
        chunk_from(message)
