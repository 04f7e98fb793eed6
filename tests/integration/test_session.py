"""The site's session against a real gRPC server with real certificates and a scripted coordinator.

It comes back, is told everything, and believes nobody else. Its transfers are test_session_transfers's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.backoff import Backoff
from cosilo_client.coordinator import Unreachable
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Activity, Decline, DeclineCode, Owed, Phase, Progress
from cosilo_client.session import Session
from cosilo_client.transport import Transport
from cosilo_client.wire import chunk_from, frame_chunk
from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.transfer import CHUNK_BYTES
from tests.identity_parties import NOW, Founded
from tests.integration.scripted_session import FAST, RUN, Attended, ScriptedCoordinator, assignment, attended, identity_of, listen, parties

__all__ = ["attended", "parties"]  # the fixtures


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
