"""The bounds that docs/limits.md lists, on what is not a call: counts, uploads, enrolments, the HTTP ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from cosilo_common import transfer
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.framing import frame_data
from cosilo_common.identity.enrolment import EnrolRequest
from cosilo_common.identity.names import Role
from cosilo_common.secagg.messages import MessageType, RoundKind, Upload
from cosilo_common.telemetry import CONNECTIONS_MAX, serve_telemetry
from cosilo_common.transfer import Refusal, TransferError, free_bytes
from cosilo_server import store as coordinator_store
from cosilo_server.enrolment import (
    ATTEMPTS_IN_ALL_MAX,
    ATTEMPTS_WINDOW_S,
    WRONG_TRIES_MAX,
    EnrolmentDesk,
    EnrolmentRefused,
    OpenInvitation,
    RefusalReason,
)
from cosilo_server.membership import StoredInvitations
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.state import Phase
from cosilo_server.services.admission import (
    CALLERS_MAX,
    CALLS_MAX,
    CALLS_PER_CALLER_MAX,
    CALLS_PER_MINUTE_MAX,
    CONNECTIONS_PER_CALLER_MAX,
    ENROLMENT_LIMITS,
    Bucket,
    CallTally,
    MethodLimit,
    Refused,
    source_of,
)
from cosilo_server.services.turns import Turn
from cosilo_server.services.uploads import SMALL_CHUNKS_MAX, STALL_BYTES, UploadDesk
from cosilo_server.spool import Spool
from tests.identity_parties import NOW, Founded, InvitationsInMemory, MembersInMemory, found
from tests.integration.test_run_pause import Standing
from tests.protocol.test_review_uploads import Desk

MANY = MethodLimit(each=10**6, everybody=10**6)


def refused(tally: CallTally, caller: str, connection: str = "c", method: str = "Submit") -> str:
    with pytest.raises(Refused) as caught:
        tally.enter(caller, connection, method)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    return caught.value.reason


def test_open_calls_are_bounded_by_method_by_caller_and_in_all() -> None:
    tally = CallTally({"Submit": MethodLimit(each=2, everybody=3), "Attend": MANY})
    tally.enter("a", "c", "Submit")
    tally.enter("a", "c", "Submit")
    assert refused(tally, "a") == "calls_of_one_caller"
    tally.enter("b", "c", "Submit")
    assert refused(tally, "c") == "calls_in_all"
    tally.leave("a", "c", "Submit")
    tally.enter("c", "c", "Submit")
    for _ in range(CALLS_PER_CALLER_MAX - 1):
        tally.enter("c", "c", "Attend")
    assert refused(tally, "c", method="Attend") == "calls_of_one_caller"


def test_open_calls_of_everybody_are_bounded() -> None:
    tally = CallTally({"Attend": MANY})
    for number in range(CALLS_MAX):
        tally.enter(f"site {number}", "c", "Attend")
    assert refused(tally, "one more", method="Attend") == "calls_in_all"
    tally.leave("site 0", "c", "Attend")
    tally.enter("one more", "c", "Attend")


def test_connections_of_one_caller_are_bounded() -> None:
    tally = CallTally({"Attend": MANY})
    for number in range(CONNECTIONS_PER_CALLER_MAX):
        tally.enter("a", f"connection {number}", "Attend")
    assert refused(tally, "a", "one more", "Attend") == "connections_of_one_caller"
    tally.enter("a", "connection 0", "Attend")
    tally.enter("b", "one more", "Attend")
    tally.leave("a", "connection 1", "Attend")
    tally.enter("a", "one more", "Attend")


def test_calls_a_minute_are_bounded_and_come_back() -> None:
    now = [0.0]
    tally = CallTally({"Submit": MANY, "RenewCertificate": MethodLimit(a_minute=6)}, lambda: now[0])
    for _ in range(6):
        tally.enter("a", "c", "RenewCertificate")
        tally.leave("a", "c", "RenewCertificate")
    assert refused(tally, "a", method="RenewCertificate") == "call_rate"
    now[0] = 10.0
    tally.enter("a", "c", "RenewCertificate")
    for _ in range(int(CALLS_PER_MINUTE_MAX)):
        tally.enter("b", "c", "Submit")
        tally.leave("b", "c", "Submit")
    assert refused(tally, "b") == "call_rate"


def test_a_bucket_says_how_long_to_wait() -> None:
    bucket = Bucket(60, 0.0)
    assert [bucket.take(0.0) for _ in range(60)] == [0.0] * 60
    assert bucket.take(0.0) == 1.0
    assert bucket.take(0.25) == 0.75
    assert bucket.take(-100.0) == 0.75  # a clock that goes back gives nothing and takes nothing


def test_callers_are_forgotten_when_they_are_gone_and_not_before() -> None:
    tally = CallTally({}, callers_max=2)
    tally.enter("busy", "c", "Submit")
    for number in range(5):
        tally.enter(f"passing {number}", "c", "Submit")
        tally.leave(f"passing {number}", "c", "Submit")
    assert len(tally._callers) == 2
    assert "busy" in tally._callers
    assert CALLS_MAX <= CALLERS_MAX


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        ("ipv4:192.0.2.1:50000", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:50000", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:50001", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:4", "192.0.2.1"),
        ("unix:", "unix"),
        ("", "unknown"),
    ],
)
def test_a_network_is_one_source(peer: str, source: str) -> None:
    assert source_of(peer) == source


# Uploads


async def put(desk: Desk, uploads: UploadDesk, *chunks: bytes, then: asyncio.Event | None = None) -> TransferError:
    payload = b"\x01" * desk.round.size

    async def messages() -> AsyncIterator[bytes]:
        yield desk.header(payload)
        for chunk in chunks:
            yield frame_data(chunk)
        if then is not None:
            await then.wait()

    with pytest.raises(TransferError) as caught:
        async for _ in uploads.receive("mallory", messages()):
            pass
    return caught.value


async def test_an_upload_that_does_not_advance_frees_its_place(tmp_path: Path) -> None:
    """Bytes that trickle do not hold it either: what counts is STALL_BYTES in the time, not a byte."""
    desk, metrics = Desk(tmp_path), CoordinatorMetrics()
    uploads = UploadDesk(desk.round, coordinator_store.Store(tmp_path / "s.db"), desk.spool, metrics, stall_s=0.3)  # type: ignore[arg-type]  # as Desk has it
    error = await put(desk, uploads, b"\x01", b"\x01", then=asyncio.Event())
    assert error.refusal is Refusal.STALLED
    assert error.subject == f"less than {STALL_BYTES} bytes came in 0.3 s"
    assert desk.open_files() == []

    async def trickle() -> AsyncIterator[bytes]:
        yield desk.header(b"\x01" * desk.round.size)
        for _ in range(desk.round.size - 2):
            await asyncio.sleep(0.02)
            yield frame_data(b"\x01")

    with pytest.raises(TransferError) as caught:
        async for _ in uploads.receive("mallory", trickle()):
            pass
    assert caught.value.refusal is Refusal.STALLED


async def test_chunks_that_are_too_small_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.round.size = 0  # the statement below says its own size
    size = SMALL_CHUNKS_MAX + 2
    statement = desk.round.signed(MessageType.UPLOAD, Upload(sha256(bytes(size)), size))
    sink = desk.spool.receive(desk.round.run.hex(), 1, "mallory", size, sha256(bytes(size)).hex())

    async def ones() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield frame_data(b"\0")

    with pytest.raises(TransferError) as caught:
        await desk.desk._fill(sink, ones(), desk.round.state, "mallory", Turn(None))
    sink.close()
    assert caught.value.subject == f"{SMALL_CHUNKS_MAX + 1} chunks: they are too small"
    assert statement.site == "mallory"


def test_uploads_leave_the_disk_s_reserve_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path, free_bytes_min=free_bytes(tmp_path) * 2)
    with pytest.raises(Exception, match="bytes missing"):
        spool.receive("ab" * 32, 1, "st-anna", 10, "cd" * 32)
    assert Spool(tmp_path).receive("ab" * 32, 1, "st-anna", 10, "cd" * 32).offset == 0


async def test_a_round_that_has_no_room_stays_asked_for_and_starts_when_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing(tmp_path)
    await standing.up()
    with monkeypatch.context() as full:
        full.setattr(transfer, "free_bytes", lambda path: 1)
        with pytest.raises(CosiloError, match=r"bytes needed, 1 free, \d+ bytes missing; free space on .*; they stay asked for, "):
            await standing.conductor.order(standing.run, RoundKind.TRAIN, 1)
        assert standing.round is None
    standing.conductor._runs[standing.run].not_before = 0.0  # the clock's next look
    await standing.tick()
    assert standing.round == (1, Phase.TRAINING)
    await standing.down()


# Enrolments


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


def wrong(token_public: bytes) -> EnrolRequest:
    return EnrolRequest("st-anna", token_public, b"", bytes(32), bytes(64), bytes(64))


def reason(desk: EnrolmentDesk, request: EnrolRequest, source: str, at_s: float = 0.0) -> RefusalReason:
    with pytest.raises(EnrolmentRefused) as caught:
        desk.enrol(request, source, NOW + timedelta(seconds=at_s))
    return caught.value.reason


def test_a_flood_from_many_addresses_is_stopped_in_all(founded: Founded) -> None:
    desk = EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members))
    reasons = [reason(desk, wrong(bytes(32)), f"source {n}") for n in range(ATTEMPTS_IN_ALL_MAX)]
    assert set(reasons) == {RefusalReason.UNKNOWN}
    assert reason(desk, wrong(bytes(32)), "another") is RefusalReason.RATE
    assert reason(desk, wrong(bytes(32)), "another", ATTEMPTS_WINDOW_S) is RefusalReason.UNKNOWN


def test_an_unknown_token_costs_no_signature(founded: Founded, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: Any) -> bool:
        raise AssertionError("a signature was looked at")

    monkeypatch.setattr("cosilo_server.enrolment.signature_holds", never)
    desk = EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members))
    assert reason(desk, wrong(bytes(32)), "a") is RefusalReason.UNKNOWN


def test_a_token_is_burnt_by_wrong_tries_and_stays_so(founded: Founded, tmp_path: Path) -> None:
    """Over a restart too: the count is in the store."""
    token = b"\x07" * 32

    def desk() -> EnrolmentDesk:
        book = StoredInvitations(coordinator_store.Store(tmp_path / "state.db"))
        return EnrolmentDesk(founded.authority, book, MembersInMemory(founded.members))

    invitation = OpenInvitation("st-anna", Role.SITE, token, int((NOW + timedelta(days=1)).timestamp()))
    first = desk()
    first.invite(invitation, NOW)
    first.invite(replace(invitation, name="st-beda", token_public=b"\x08" * 32), NOW)
    assert [reason(first, wrong(token), f"source {n}") for n in range(WRONG_TRIES_MAX)] == [RefusalReason.SIGNATURE] * WRONG_TRIES_MAX
    assert reason(first, wrong(token), "another") is RefusalReason.BURNT
    assert reason(desk(), wrong(token), "after a restart") is RefusalReason.BURNT
    assert reason(first, wrong(b"\x08" * 32), "the other invitation") is RefusalReason.SIGNATURE


def test_enrolments_at_once_are_few() -> None:
    tally = CallTally(ENROLMENT_LIMITS)
    for number in range(8):
        tally.enter(f"192.0.2.{number // 2}", f"c {number}", "Enrol")
    assert refused(tally, "192.0.2.99", method="Enrol") == "calls_in_all"
    tally.leave("192.0.2.0", "c 0", "Enrol")
    tally.leave("192.0.2.1", "c 2", "Enrol")
    tally.enter("192.0.2.0", "c 0", "Enrol")
    assert refused(tally, "192.0.2.0", method="Enrol") == "calls_of_one_caller"


# The metrics' port


def ended_at(connection: socket.socket) -> bytes:
    connection.settimeout(20.0)
    got = b""
    while True:
        try:
            part = connection.recv(4096)
        except ConnectionError:
            return got
        if not part:
            return got
        got += part


def test_the_metrics_port_ends_those_who_trickle_and_those_who_are_too_many() -> None:
    reasons: list[str] = []
    server, port = serve_telemetry(
        "127.0.0.1:0", CollectorRegistry(), lambda: (True, "ok"), lambda: (True, "ok"), refused=reasons.append, life_s=0.5
    )
    try:
        with socket.create_connection(("127.0.0.1", port)) as trickling:
            trickling.send(b"GET /metr")
            assert ended_at(trickling) == b""
        assert reasons == ["metrics_slow"]
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.send(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert ended_at(asking).endswith(b"ok\n")
    finally:
        server.close()


def test_connections_to_the_metrics_port_are_bounded() -> None:
    reasons: list[str] = []
    server, port = serve_telemetry("127.0.0.1:0", CollectorRegistry(), lambda: (True, "ok"), lambda: (True, "ok"), refused=reasons.append)
    standing = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS_MAX)]
    try:
        with socket.create_connection(("127.0.0.1", port)) as one_more:
            assert ended_at(one_more) == b""
        assert reasons == ["metrics_connections"]
    finally:
        for connection in standing:
            connection.close()
        server.close()
