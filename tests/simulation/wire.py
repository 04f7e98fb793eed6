"""gRPC in memory: the calls of grpc.aio that both sides use, over the links of `network.py`.

Owns calls and what becomes of a message at either end. The site's own `Transport` runs on `Channel`, the coordinator's own `SiteService` registers
its methods on `Server`, and everything between them is bytes. What gRPC promises is kept (an answer means that the handler returned); what it does
not promise is drawn: how calls overtake one another, whether a request whose caller is gone is still carried out. Must not know what messages mean.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from datetime import UTC, datetime
from typing import Any, Final

import grpc
import grpc.aio
from sqlalchemy.exc import OperationalError

from cosilo_common.errors import CosiloError
from cosilo_common.framing import DATA_FIELD
from cosilo_common.identity.names import Peer, PeerName, Role
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Signed
from tests.simulation.network import Connection, Network, Server
from tests.simulation.process import CURRENT, Process, ProcessDied

CONNECT_S: Final = 20.0  # a SYN into a dead link is given up after this
DOUBLED_S: Final = 90.0  # how much later a doubled request may come
RESETS: Final = 6.0  # calls reset for each message that is lost with its connection
GONE_S: Final = 0.01  # as long as a handler's first threads take, or two: a caller that goes meanwhile leaves one of them at work
SUBMIT: Final = "/cosilo.v1.SiteService/Submit"
PUT: Final = "/cosilo.v1.SiteService/PutUpdate"
CHUNKED: Final = frozenset({PUT, "/cosilo.v1.SiteService/GetArtifact"})
FEDERATION: Final = "simulated"
NOT_AFTER: Final = datetime(2100, 1, 1, tzinfo=UTC)


class Channel:
    """As much of grpc.aio.Channel as the site's Transport uses."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._connection: Connection | None = None
        self._closed = False

    def unary_unary(self, method: str, **how: Any) -> Callable[..., UnaryCall]:
        """A callable for one request and one answer."""
        return lambda request, timeout=None: UnaryCall(self, method, how, request, timeout)

    def unary_stream(self, method: str, **how: Any) -> Callable[..., Call]:
        """A callable for one request and many answers."""

        def start(request: Any) -> Call:
            call = Call(self, method, how)
            call.open(request)
            return call

        return start

    def stream_stream(self, method: str, **how: Any) -> Callable[..., Call]:
        """A callable for a stream each way."""

        def start() -> Call:
            call = Call(self, method, how)
            call.open(None)
            return call

        return start

    async def close(self, _grace_s: float | None = None) -> None:
        """Gives the connection up, and every call on it."""
        self._closed = True
        if self._connection is not None:
            self._connection.break_client("the channel was closed")

    def connection(self) -> Connection:
        """The channel's connection, made anew where the last one broke."""
        if self._connection is None or not self._connection.client_open:
            self._connection = Connection(self._network, self._process)
        return self._connection

    @property
    def network(self) -> Network:
        return self._network


class Call:
    """One call, seen from both sides. last_up, last_down: when the newest message each way arrives."""

    def __init__(self, channel: Channel, method: str, how: dict[str, Any]) -> None:
        self.network = channel.network
        self.connection = channel.connection()
        self.method = method
        self.last_up = self.last_down = 0.0
        self._serialise = how.get("request_serializer") or (lambda data: data)
        self._parse = how.get("response_deserializer") or (lambda data: data)
        self._answers: deque[bytes] = deque()
        self._requests: deque[bytes] = deque()
        self._requests_end = False
        self._answered = asyncio.Event()
        self._requested = asyncio.Event()
        self._status: tuple[grpc.StatusCode, str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._dawdles = False  # it is of a site that keeps no time: what it has begun to send comes, late or not
        self.network.calls += 1
        self.number = self.network.calls
        self.connection.calls[self] = None

    # The site's side

    def open(self, request: Any) -> None:
        """Begins the call. request: the one request, or None where a stream follows."""
        data = None if request is None else self._serialise(request)
        if data is not None:
            self._leaves(data)
        self.connection.transmit(self, True, lambda: self._begin(data))
        if not self.connection.client_open:
            self.ended(grpc.StatusCode.UNAVAILABLE, "the channel is closed")
        self.network.loop.call_later(CONNECT_S, self._not_connected)

    async def write(self, message: Any) -> None:
        """Sends one message. Raises asyncio.InvalidStateError once the call has ended, as grpc.aio does."""
        if self._status is not None:
            raise asyncio.InvalidStateError("the call has ended")
        data = self._serialise(message)
        self._leaves(data)
        if self.method == PUT and data[:1] == DATA_FIELD and not self._dawdles:
            weather = self.network.weather
            self._dawdles = self.network.drawn(weather.dawdled, "uploads dawdled")
            if self._dawdles:
                self.last_up = self.network.loop.time() + self.network.random.uniform(*weather.dawdle_s)
        data = self._on_the_way(data)
        self.connection.transmit(self, True, lambda: self._request(data))
        await asyncio.sleep(0)

    async def done_writing(self) -> None:
        """Ends the stream of requests."""
        self.connection.transmit(self, True, self._end_requests)
        await asyncio.sleep(0)

    async def read(self) -> Any:
        """The next answer, or grpc.aio.EOF. Raises AioRpcError where the call failed."""
        while not self._answers and self._status is None:
            self._answered.clear()
            await self._answered.wait()
        if self._answers:
            return self._parse(self._answers.popleft())
        assert self._status is not None
        code, details = self._status
        if code is grpc.StatusCode.OK:
            return grpc.aio.EOF
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    def cancel(self) -> None:
        """Gives the call up."""
        if self._status is None:
            self.ended(grpc.StatusCode.CANCELLED, "the site gave up")
            if not self._dawdles:
                self.connection.transmit(self, True, self.cancel_handler)

    async def code(self) -> grpc.StatusCode:
        """How the call ended."""
        return (await self._end())[0]

    async def details(self) -> str:
        """How the call ended, in words."""
        return (await self._end())[1]

    async def _end(self) -> tuple[grpc.StatusCode, str]:
        while self._status is None:
            self._answered.clear()
            await self._answered.wait()
        return self._status

    def ended(self, code: grpc.StatusCode, details: str) -> None:
        """The call has ended for the site."""
        if self._status is None:
            self._status = (code, details)
        self._answered.set()
        if self._task is None or self._task.done():
            self.connection.calls.pop(self, None)

    def _leaves(self, data: bytes) -> None:
        """Bytes go out, past the points at which the site may die."""
        process, network = self.connection.client, self.network
        process.point(f"before a send of {self.method}")
        network.observer.site_sends(process.name, self.method, self.number, data)
        if network.drawn(network.weather.cut, "messages lost with their connection"):
            network.cut(self.connection)
        network.loop.call_soon(self._after_sending)

    def _on_the_way(self, data: bytes) -> bytes:
        """What becomes of a chunk's bytes."""
        if self.method in CHUNKED and data[:1] == DATA_FIELD and self.network.drawn(self.network.weather.corrupted, "chunks corrupted"):
            return data[:-1] + bytes([data[-1] ^ 0x10])
        return data

    def _after_sending(self) -> None:
        try:
            self.connection.client.point(f"after a send of {self.method}")
        except ProcessDied:
            pass

    def _not_connected(self) -> None:
        if self.connection.serving is None and self._status is None:
            self.connection.break_client("failed to connect")

    # The coordinator's side

    def _begin(self, data: bytes | None) -> None:
        server = self.network.server
        if server is None or (self.connection.serving is not None and self.connection.serving is not server.process):
            self.connection.server_open = False
            self.connection.transmit(self, False, lambda: self.connection.break_client("connection refused"))
            return
        self.connection.serving = server.process
        if data is not None:
            self._request(data)
            self._end_requests()
        self._task = server.process.start(self._serve(server.methods[self.method], server.process), name=f"serve {self.method}")
        self.connection.calls[self] = None  # the site may have given it up already; the connection's end must still end what runs for it
        self._task.add_done_callback(lambda _: self.connection.calls.pop(self, None) if self._status is not None else None)
        if self.method == SUBMIT and self.network.drawn(RESETS * self.network.weather.cut, "calls reset while they are served"):
            self.network.loop.call_later(GONE_S * self.network.random.random(), self._reset)

    def _reset(self) -> None:
        self.cancel_handler()
        self.connection.transmit(self, False, lambda: self.ended(grpc.StatusCode.UNAVAILABLE, "the stream was reset"))

    def _request(self, data: bytes) -> None:
        self._requests.append(data)
        self._requested.set()

    def _end_requests(self) -> None:
        self._requests_end = True
        self._requested.set()

    def cancel_handler(self) -> None:
        """The caller is gone: grpc.aio cancels what runs for it."""
        if self._task is not None and not self._task.done():
            self.network.faults["handlers cancelled"] += self._task.cancel()

    async def _serve(self, handler: Any, process: Process) -> None:
        context = Context(self.connection.client.name)
        try:
            if handler.response_streaming:
                method = handler.stream_stream if handler.request_streaming else handler.unary_stream
                asked = self._iterate(handler) if handler.request_streaming else await self._one(handler)
                async for answer in method(asked, context):
                    self._answer(handler, process, answer)
            else:
                self._answer(handler, process, await handler.unary_unary(await self._one(handler), context))
            self._finish(process, grpc.StatusCode.OK, "")
        except grpc.aio.AbortError:
            self._finish(process, context.code, context.details)
        except (ProcessDied, asyncio.CancelledError):
            raise
        except Exception as error:
            if isinstance(error, OperationalError | CosiloError) and process.disk.full:
                self.network.faults["calls failed by a full disk"] += 1
                return self._finish(process, grpc.StatusCode.UNKNOWN, "the store cannot be written")
            self.network.observer.fail("handler", f"{self.method} raised {error!r}")
            self._finish(process, grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}")

    async def _one(self, handler: Any) -> Any:
        return await anext(self._iterate(handler))

    async def _iterate(self, handler: Any) -> AsyncIterator[Any]:
        parse = handler.request_deserializer or (lambda data: data)
        while True:
            while not self._requests and not self._requests_end:
                self._requested.clear()
                await self._requested.wait()
            if not self._requests:
                return
            yield parse(self._requests.popleft())

    def _answer(self, handler: Any, process: Process, answer: Any) -> None:
        data = answer if handler.response_serializer is None else handler.response_serializer(answer)
        if self.network.twister is not None:
            data = self.network.twister.twist(self.connection.client.name, self.method, data)
        process.point(f"before an answer to {self.method}")
        self.network.observer.coordinator_sends(self.connection.client.name, self.method, self.number, data, False)
        if self.network.drawn(self.network.weather.cut, "answers lost with their connection"):
            self.network.cut(self.connection)
        arrives = self._on_the_way(data)
        self.connection.transmit(self, False, lambda: self._answer_arrives(arrives))
        process.point(f"after an answer to {self.method}")

    def _answer_arrives(self, data: bytes) -> None:
        self._answers.append(data)
        self._answered.set()

    def _finish(self, process: Process, code: grpc.StatusCode, details: str) -> None:
        if process.alive:
            ok = code is grpc.StatusCode.OK
            self.network.observer.coordinator_sends(self.connection.client.name, self.method, self.number, b"", ok)
            self.connection.transmit(self, False, lambda: self.ended(code, details))


class UnaryCall(Call):
    """A call with one answer: awaited."""

    def __init__(self, channel: Channel, method: str, how: dict[str, Any], request: Any, timeout_s: float | None) -> None:
        super().__init__(channel, method, how)
        self._timeout_s = timeout_s
        network = self.network
        if network.drawn(network.weather.vanished, "requests vanished"):
            self._leaves(self._serialise(request))
            return  # a middlebox swallowed it
        self.open(request)
        if method == SUBMIT and network.drawn(network.weather.doubled, "requests doubled"):
            again = Doubled(channel, method, how, request)
            network.loop.call_later(DOUBLED_S * network.random.random() ** 3, again.come)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._answer_in_time().__await__()

    async def _answer_in_time(self) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self.read()
                await self._end()
        except TimeoutError:
            self.cancel()
            raise _failed(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        except asyncio.CancelledError:
            self.cancel()
            raise
        code, details = await self._end()
        if code is not grpc.StatusCode.OK:
            raise _failed(code, details)
        return answer


class Doubled:
    """A copy of a request that comes again, whatever has become of its caller; nobody waits for the answer."""

    def __init__(self, channel: Channel, method: str, how: dict[str, Any], request: Any) -> None:
        self._channel = channel
        self._method = method
        self._site = CURRENT.get()
        self._data = how["request_serializer"](request)

    def come(self) -> None:
        """It arrives at whatever coordinator is there now."""
        server = self._channel.network.server
        if server is None:
            return
        handler, site = server.methods[self._method], self._site
        assert site is not None

        async def carry_out() -> None:
            try:
                await handler.unary_unary(handler.request_deserializer(self._data), Context(site.name))
            except grpc.aio.AbortError:
                pass

        server.process.start(carry_out(), name=f"again {self._method}")


def hand_in(server: Server, site: str, message: Signed) -> None:
    """A message of a site that keeps no rule: it comes over a connection of its own, and nobody waits for the answer."""
    handler = server.methods[SUBMIT]

    async def carry_out() -> None:
        try:
            await handler.unary_unary(site_pb2.SubmitRequest(message=message.encode()), Context(site))
        except grpc.aio.AbortError:
            pass

    server.process.start(carry_out(), name=f"unruly {SUBMIT}")


class Context:
    """A servicer's context: who calls, and how the call is refused."""

    def __init__(self, site: str) -> None:
        self.caller = Peer(PeerName(FEDERATION, Role.SITE, site), 1, NOT_AFTER)
        self.code = grpc.StatusCode.OK
        self.details = ""

    def peer(self) -> str:
        """The caller's address."""
        return f"simulated:{self.caller.name.name}"

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        """Ends the call with a status."""
        self.code, self.details = code, details
        raise grpc.aio.AbortError


def _failed(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
