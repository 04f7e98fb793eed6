"""The bounds that docs/limits.md lists, on calls: real gRPC, a servicer that says what it did, and callers who overdo it."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from cosilo_common.identity.names import Role, peer_from_certificate
from cosilo_common.identity.tls import (
    ENROLMENT_CONNECTIONS_MAX,
    METADATA_BYTES_MAX,
    STREAMS_PER_CONNECTION_MAX,
    Options,
    TlsFiles,
    enrolment_server_options,
    federation_channel,
    server_credentials,
    server_options,
)
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.services.admission import FEDERATION_LIMITS, WARNINGS_PER_MINUTE_MAX, FrontDoor, MethodLimit
from tests.identity_parties import Founded, found

TIMEOUT_S = 20.0
SHORT_S = 0.3
MIB = 1 << 20


class Servicer(site_pb2_grpc.SiteServiceServicer):
    """Answers, and counts what it was asked and what it has open."""

    def __init__(self) -> None:
        self.asked = 0
        self.sending = 0

    async def Submit(self, request: site_pb2.SubmitRequest, context: Any) -> site_pb2.SubmitResponse:
        self.asked += 1
        if request.message == b"fail":
            raise ZeroDivisionError("a canary")
        if request.message == b"wait":
            await asyncio.sleep(TIMEOUT_S)
        return site_pb2.SubmitResponse()

    async def GetArtifact(self, request: site_pb2.GetArtifactRequest, context: Any) -> AsyncIterator[site_pb2.GetArtifactResponse]:
        self.sending += 1
        try:
            for _ in range(request.offset or 64):
                yield site_pb2.GetArtifactResponse(data=bytes(MIB))
        finally:
            self.sending -= 1


@dataclass
class Port:
    """A server behind the door, and a site's channel to it."""

    address: str
    servicer: Servicer
    door: FrontDoor
    metrics: CoordinatorMetrics
    tls: TlsFiles

    def channel(self) -> grpc.aio.Channel:
        return federation_channel(self.address, self.tls)

    def rejected(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("cosilo_rejected_messages_total", {"reason": reason}) or 0.0

    async def until_open(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.door.tally.open_calls() != count:
                await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


@asynccontextmanager
async def serving(
    founded: Founded, limits: Mapping[str, MethodLimit] = FEDERATION_LIMITS, options: Options | None = None
) -> AsyncIterator[Port]:
    metrics, servicer = CoordinatorMetrics(), Servicer()
    door = FrontDoor(metrics, limits, request_timeout_s=SHORT_S, stall_s=SHORT_S)
    server = grpc.aio.server(options=options or server_options(), interceptors=[door])
    site_pb2_grpc.add_SiteServiceServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(founded.coordinator.tls))
    await server.start()
    try:
        yield Port(f"127.0.0.1:{port}", servicer, door, metrics, founded.party(Role.SITE, "st-anna"))
    finally:
        await server.stop(None)


def submit(channel: grpc.aio.Channel, **options: Any) -> Any:
    call = channel.unary_unary("/cosilo.v1.SiteService/Submit")
    return lambda body: call(body, timeout=TIMEOUT_S, **options)


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def message(text: bytes) -> bytes:
    return site_pb2.SubmitRequest(message=text).SerializeToString()


async def test_bytes_that_are_no_message_are_the_callers_fault(founded: Founded) -> None:
    async with serving(founded) as port, port.channel() as channel:
        assert await status(submit(channel)(b"\xff\xff")) == (grpc.StatusCode.INVALID_ARGUMENT, "Submit: the request is not its message")
        assert port.servicer.asked == 0
        assert port.rejected("malformed_message") == 1


async def test_a_message_is_no_larger_than_its_method_needs(founded: Founded) -> None:
    size_max = FEDERATION_LIMITS["Submit"].request_bytes
    async with serving(founded) as port, port.channel() as channel:
        code, details = await status(submit(channel)(bytes(size_max + 1)))
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, f"Submit: a message of {size_max + 1} bytes; at most {size_max}")
        assert port.rejected("oversize_message") == 1


async def test_a_message_larger_than_the_port_takes_is_never_held(founded: Founded) -> None:
    async with serving(founded, options=server_options(MIB)) as port, port.channel() as channel:
        code, _ = await status(submit(channel)(bytes(2 * MIB)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        await port.until_open(0)
        assert port.rejected("no_request") == 1


async def test_a_message_that_would_grow_is_refused(founded: Founded) -> None:
    """Compression is off: 32 MiB of zeros travel as 32 kB."""
    async with serving(founded) as port, port.channel() as channel:
        code, details = await status(submit(channel, compression=grpc.Compression.Gzip)(message(bytes(MIB))))
        assert (code, details) == (grpc.StatusCode.UNIMPLEMENTED, "Compression algorithm 'gzip' is disabled.")
        assert port.servicer.asked == 0


@pytest.mark.parametrize("header_bytes", [METADATA_BYTES_MAX, 4 * METADATA_BYTES_MAX])
async def test_headers_are_bounded(founded: Founded, header_bytes: int) -> None:
    async with serving(founded) as port, port.channel() as channel:
        code, _ = await status(submit(channel, metadata=(("x-more", "y" * header_bytes),))(b""))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert port.servicer.asked == 0
        assert await status(submit(channel)(b"")) == (grpc.StatusCode.OK, "")


async def test_headers_without_a_request_hold_no_slot(founded: Founded) -> None:
    """A request that never follows its headers would otherwise hold one for as long as the connection stands."""
    async with serving(founded) as port, port.channel() as channel:
        silent = channel.stream_unary("/cosilo.v1.SiteService/Submit")()
        code, details = await status(silent)
        assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, f"Submit: no request in {SHORT_S} s")
        await port.until_open(0)
        assert port.rejected("slow_request") == 1


async def test_a_reader_that_does_not_read_is_cut_off(founded: Founded) -> None:
    """The file that it reads is closed, and its place among everybody's calls is free, while the rest of its bytes wait for it."""
    async with serving(founded, {"GetArtifact": MethodLimit(each=1, everybody=1)}) as port, port.channel() as channel:
        stub = site_pb2_grpc.SiteServiceStub(channel)
        slow = stub.GetArtifact(site_pb2.GetArtifactRequest())
        await slow.read()
        await port.until_open(0)
        assert port.servicer.sending == 0
        assert port.rejected("slow_reader") == 1
        code, _ = await status(ended(stub.GetArtifact(site_pb2.GetArtifactRequest(offset=1))))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED  # its own place is not free until it has read or gone
        slow.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while (await status(ended(stub.GetArtifact(site_pb2.GetArtifactRequest(offset=1)))))[0] is not grpc.StatusCode.OK:
                await asyncio.sleep(0.02)


async def ended(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_calls_of_one_caller_are_bounded_and_others_go_on(founded: Founded) -> None:
    namesake = founded.party(Role.SITE, "st-anna")  # another key under the same name: whoever used a second invitation
    async with serving(founded, {"Submit": MethodLimit(each=2)}) as port, port.channel() as channel:
        held = [submit(channel)(message(b"wait")) for _ in range(2)]
        await port.until_open(2)
        code, details = await status(submit(channel)(b""))
        key = peer_from_certificate(port.tls.certificate.read_bytes()).key_digest.hex()[:8]
        wanted = f"Submit: site st-anna (key {key}) has 2 of these open; end one first"
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, wanted)
        assert port.rejected("calls_of_one_caller") == 1
        async with federation_channel(port.address, namesake) as its:
            assert await status(submit(its)(b"")) == (grpc.StatusCode.OK, "")
        for call in held:
            call.cancel()
        await port.until_open(0)
        assert await status(submit(channel)(b"")) == (grpc.StatusCode.OK, "")


async def test_a_caller_that_calls_too_often_is_told_to_wait(founded: Founded) -> None:
    async with serving(founded, {"Submit": MethodLimit(a_minute=3)}) as port, port.channel() as channel:
        assert [(await status(submit(channel)(b"")))[0] for _ in range(3)] == [grpc.StatusCode.OK] * 3
        assert (await status(submit(channel)(b"")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert port.rejected("call_rate") == 1


async def test_what_no_servicer_expected_shows_no_words_of_its_own(founded: Founded) -> None:
    async with serving(founded) as port, port.channel() as channel:
        code, details = await status(submit(channel)(message(b"fail")))
        assert code is grpc.StatusCode.INTERNAL
        assert details == "Submit: the coordinator failed at this call (ZeroDivisionError); its log says why"
        assert port.rejected("internal") == 1


async def test_a_connection_carries_so_many_calls_and_no_more(founded: Founded) -> None:
    limits = {"Submit": MethodLimit(each=1000)}
    async with serving(founded, limits) as port, port.channel() as channel:
        held = [asyncio.ensure_future(status(submit(channel)(message(b"wait")))) for _ in range(STREAMS_PER_CONNECTION_MAX + 8)]
        async with asyncio.timeout(TIMEOUT_S):
            while port.servicer.asked + port.rejected("calls_of_one_caller") < STREAMS_PER_CONNECTION_MAX:
                await asyncio.sleep(0.01)
        assert port.door.tally.open_calls() <= STREAMS_PER_CONNECTION_MAX
        for call in held:
            call.cancel()


# Before the first call: the handshake, and how many may stand there


def hung_up(connection: socket.socket) -> bool:
    connection.settimeout(TIMEOUT_S)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def short_handshake() -> Options:
    """gRPC takes the first of two equal names, so the short time replaces the long one."""
    name = "grpc.server_handshake_timeout_ms"
    return [(option, int(1000 * SHORT_S) if option == name else value) for option, value in server_options()]


async def test_a_connection_that_says_nothing_is_ended(founded: Founded) -> None:
    assert any(name == "grpc.server_handshake_timeout_ms" for name, _ in server_options())
    async with serving(founded, options=short_handshake()) as port:
        host, _, number = port.address.partition(":")
        with socket.create_connection((host, int(number))) as silent, socket.create_connection((host, int(number))) as trickling:
            trickling.send(b"\x16\x03")  # the first bytes of a ClientHello, and no more
            assert await asyncio.to_thread(hung_up, silent)
            assert await asyncio.to_thread(hung_up, trickling)


async def test_a_handshake_without_http2_is_ended(founded: Founded) -> None:
    async with serving(founded, options=short_handshake()) as port:
        host, _, number = port.address.partition(":")
        context = ssl.create_default_context(cafile=str(port.tls.ca))
        context.load_cert_chain(port.tls.certificate, port.tls.key)
        context.set_alpn_protocols(["h2"])

        def shake() -> bool:
            raw = socket.create_connection((host, int(number)), TIMEOUT_S)
            with context.wrap_socket(raw, server_hostname="coordinator.cosilo") as connection:
                return hung_up(connection)

        assert await asyncio.to_thread(shake)


async def test_connections_are_bounded_in_all(founded: Founded) -> None:
    async with serving(founded, options=server_options(connections_max=2)) as port:
        host, _, number = port.address.partition(":")
        connections = [socket.create_connection((host, int(number))) for _ in range(4)]
        try:
            over = await asyncio.to_thread(first_to_end, connections, 2)
            assert len(over) == 2
        finally:
            for connection in connections:
                connection.close()


def first_to_end(connections: list[socket.socket], count: int) -> set[socket.socket]:
    """Waits until so many of them are hung up on; the handshake's own time limit is far away."""
    over: set[socket.socket] = set()
    while len(over) < count:
        ready, _, _ = select.select([c for c in connections if c not in over], [], [], TIMEOUT_S)
        if not ready:
            break
        over.update(ready)
    return over


def test_the_enrolment_port_lets_nobody_stay() -> None:
    options = dict(enrolment_server_options())
    assert options["grpc.max_allowed_incoming_connections"] == ENROLMENT_CONNECTIONS_MAX
    assert options["grpc.max_connection_age_ms"] == 60_000
    assert options["grpc.max_connection_age_grace_ms"] == 20_000


def test_the_ports_end_what_serves_nobody() -> None:
    for options in (dict(server_options()), dict(enrolment_server_options())):
        assert options["grpc.max_connection_idle_ms"] == 300_000
        assert options["grpc.server_handshake_timeout_ms"] == 20_000


async def test_a_flood_is_counted_whole_and_logged_in_part(founded: Founded, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("cosilo_server.services.admission.log.warning", lambda event, **_: logged.append(event))
    async with serving(founded) as port, port.channel() as channel:
        for _ in range(WARNINGS_PER_MINUTE_MAX + 20):
            await status(submit(channel)(b"\xff"))
        assert port.rejected("malformed_message") == WARNINGS_PER_MINUTE_MAX + 20
    assert WARNINGS_PER_MINUTE_MAX <= len(logged) < WARNINGS_PER_MINUTE_MAX + 20
