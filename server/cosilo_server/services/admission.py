"""What every call meets first, before its first byte is read: how many, how often, how large, how slow.

Owns the bounds on calls, for both gRPC ports, and the answer to whatever no servicer expected. It reads a call's request itself, so that
headers without a body, bytes that are no message, and a reader that does not read cost a slot for a bounded time and a status that says why.
Must not know what a method means, nor who is a member: the gate and the servicers decide that.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import peer_from_certificate
from cosilo_common.identity.tls import MESSAGE_BYTES_MAX
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.services.gate import DETAIL_CHARS_MAX, Context

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_S: Final = 20.0  # a request follows its headers at once; even 32 MiB (a manifest) take that long at 13 Mbit/s only
STALL_S: Final = 120.0  # for one chunk to be taken: 1 MiB in that time is 9 kB a second, and sites themselves give up after 60 s
CALLERS_MAX: Final = 4096  # callers remembered, those without an open call forgotten first: under 2 MiB
CONNECTIONS_PER_CALLER_MAX: Final = 16  # a daemon has one, and one more while it reconnects; the rest is for people's commands
CALLS_PER_CALLER_MAX: Final = 96  # coordinator.toml may allow a site 64 streams; a daemon has one, and a transfer for each of its runs
CALLS_MAX: Final = 4096  # four each for the 1000 sites that a manifest may name; a refused one is told to come again
CALLS_PER_MINUTE_MAX: Final = 1200  # a rehearsal of a tiny model makes ten calls a second; a loop that spins makes thousands
WARNINGS_PER_MINUTE_MAX: Final = 60  # a flood is counted whole and logged in part: the log must not fill the disk
SLOW_READER: Final = "slow_reader"

_KIB: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class MethodLimit:
    """each, everybody: open calls of one caller and of all; a_minute: calls that one caller may begin; request_bytes: of one message."""

    each: int = 16
    everybody: int = 512
    a_minute: float = CALLS_PER_MINUTE_MAX
    request_bytes: int = 64 * _KIB


FEDERATION_LIMITS: Final[Mapping[str, MethodLimit]] = {
    # a message of Attend is a hello, a progress or a decline, of a hundred bytes
    "Attend": MethodLimit(each=64, everybody=2048, request_bytes=4 * _KIB),
    # a transfer holds a chunk and a window of 4 MiB: 256 of them are about a gigabyte at the worst
    "GetArtifact": MethodLimit(each=8, everybody=256, request_bytes=_KIB),
    "PutUpdate": MethodLimit(each=8, everybody=256, request_bytes=(1 << 20) + _KIB),
    "Submit": MethodLimit(each=8, request_bytes=(1 << 19) + _KIB),  # secagg.messages.MESSAGE_BYTES_MAX and its tag
    "RenewCertificate": MethodLimit(each=1, everybody=8, a_minute=6, request_bytes=8 * _KIB),  # due every few weeks, and it signs
    "CreateRun": MethodLimit(each=2, everybody=4, request_bytes=MESSAGE_BYTES_MAX),  # starts a process with torch in it
    "PutMembers": MethodLimit(each=2, everybody=4, request_bytes=MESSAGE_BYTES_MAX),
    "Sample": MethodLimit(each=2, everybody=4, request_bytes=_KIB),  # starts a process with torch in it
    "WatchRun": MethodLimit(each=16, everybody=64, request_bytes=_KIB),  # each asks the store up to four times a second
}
ENROLMENT_LIMITS: Final[Mapping[str, MethodLimit]] = {
    # anybody may call: eight at once take eight of the threads that the rounds need too. How often is enrolment.py's to say.
    "Enrol": MethodLimit(each=2, everybody=8, request_bytes=16 * _KIB),
}


class Refused(Exception):
    """A call that is not let in, or not on: counted under `reason`."""

    def __init__(self, code: grpc.StatusCode, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.reason, self.detail = code, reason, detail


class _Gone(Exception):
    """The caller went away while it was being answered."""


class Bucket:
    """At most `a_minute` a minute, saved up for one minute. Times are seconds of a monotonic clock."""

    __slots__ = ("_a_minute", "_at", "_left")

    def __init__(self, a_minute: float, now: float) -> None:
        self._a_minute = a_minute
        self._left = a_minute
        self._at = now

    def take(self, now: float) -> float:
        """Takes one and returns 0.0; or takes none, and returns the seconds until there is one."""
        self._left = min(self._a_minute, self._left + max(0.0, now - self._at) * self._a_minute / 60)
        self._at = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) * 60 / self._a_minute


@dataclass
class _Caller:
    """One caller's open calls by method and by connection, and how often it calls."""

    open: Counter[str] = field(default_factory=Counter)
    connections: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, Bucket] = field(default_factory=dict)


class CallTally:
    """Who has how many calls open, and how often they call. limits: by method; what is not named has MethodLimit's defaults."""

    def __init__(
        self, limits: Mapping[str, MethodLimit], clock: Callable[[], float] = time.monotonic, callers_max: int = CALLERS_MAX
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._callers_max = callers_max
        self._callers: OrderedDict[str, _Caller] = OrderedDict()
        self._open: Counter[str] = Counter()

    def limit(self, method: str) -> MethodLimit:
        """Of one method."""
        return self._limits.get(method, MethodLimit())

    def enter(self, caller: str, connection: str, method: str) -> None:
        """Counts a call that begins. Raises Refused, counting nothing, where it would be one too many."""
        known = self._callers.get(caller) or _Caller()
        limit = self.limit(method)
        busy = grpc.StatusCode.RESOURCE_EXHAUSTED
        if self._open.total() >= CALLS_MAX or self._open[method] >= limit.everybody:
            raise Refused(busy, "calls_in_all", f"{method}: the coordinator has as many calls open as it takes; try again")
        if known.open.total() >= CALLS_PER_CALLER_MAX or known.open[method] >= limit.each:
            raise Refused(busy, "calls_of_one_caller", f"{method}: {caller} has {known.open[method]} of these open; end one first")
        if connection not in known.connections and len(known.connections) >= CONNECTIONS_PER_CALLER_MAX:
            raise Refused(busy, "connections_of_one_caller", f"{caller} has {CONNECTIONS_PER_CALLER_MAX} connections open; end one first")
        for kind, a_minute in ((method, limit.a_minute), ("", CALLS_PER_MINUTE_MAX)):
            bucket = known.buckets.setdefault(kind, Bucket(a_minute, self._clock()))
            if wait_s := bucket.take(self._clock()):
                self._remember(caller, known)
                raise Refused(busy, "call_rate", f"{method}: {caller} calls too often; wait {wait_s:.0f} s")
        known.open[method] += 1
        known.connections[connection] += 1
        self._open[method] += 1
        self._remember(caller, known)

    def leave(self, caller: str, connection: str, method: str, *, set_aside: bool = False) -> None:
        """Counts a call that ended. set_aside: it was, and so has left everybody's count before."""
        known = self._callers[caller]
        for counted, key in ((known.open, method), (known.connections, connection)):
            _less(counted, key)
        if not set_aside:
            _less(self._open, method)

    def set_aside(self, method: str) -> None:
        """Frees everybody's slot of a call that is given up but not gone: gRPC's status waits behind the bytes that nobody reads.

        It goes on counting for its caller, who alone is kept out by it.
        """
        _less(self._open, method)

    def open_calls(self) -> int:
        """Calls that are open now."""
        return self._open.total()

    def _remember(self, caller: str, known: _Caller) -> None:
        self._callers[caller] = known
        self._callers.move_to_end(caller)
        if len(self._callers) > self._callers_max:
            idle = next((name for name, other in self._callers.items() if not other.open), None)
            if idle is not None:  # there is one, since CALLS_MAX is not more than CALLERS_MAX
                del self._callers[idle]


class FrontDoor(grpc.aio.ServerInterceptor):
    """Stands before every method of one server: `grpc.aio.server(interceptors=[FrontDoor(...)])`."""

    def __init__(
        self,
        metrics: CoordinatorMetrics,
        limits: Mapping[str, MethodLimit],
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = CallTally(limits, clock)
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s
        self._stall_s = stall_s
        self._clock = clock
        self._warnings = Bucket(WARNINGS_PER_MINUTE_MAX, clock())
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, behind the door; None, as gRPC has it, for a method that is not there."""
        name = handler_call_details.method
        wrapped = self._wrapped.get(name)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is not None:
                wrapped = self._wrapped[name] = self._behind(name.rpartition("/")[2], handler)
        return wrapped

    def _behind(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler as one that streams both ways, whatever it was: the wire is the same, and the request's bytes are read here."""
        shape = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        behaviour = getattr(handler, shape)

        async def call(requests: AsyncIterator[bytes], context: Context) -> None:
            caller, connection, stuck = caller_of(context), context.peer(), False
            try:
                self.tally.enter(caller, connection, method)
            except Refused as refused:
                await self._refuse(context, method, refused)
            try:
                await self._perform(behaviour, handler, method, requests, context)
            except Refused as refused:
                if stuck := refused.reason == SLOW_READER:
                    self.tally.set_aside(method)
                await self._refuse(context, method, refused)
            finally:
                self.tally.leave(caller, connection, method, set_aside=stuck)

        made: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        return made

    async def _perform(self, behaviour: Any, handler: Any, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        decode, size_max = handler.request_deserializer, self.tally.limit(method).request_bytes
        decoded = _decoded(requests, method, decode, size_max)
        request: Any = decoded if handler.request_streaming else await self._only(decoded, method)
        try:
            answer = behaviour(request, context)
            if hasattr(answer, "__aiter__"):
                async with aclosing(answer) as responses:
                    async for response in responses:
                        await self._write(context, method, response)
            else:
                response = await answer
                if not handler.response_streaming:
                    await self._write(context, method, response)
        except _Gone:
            return
        except (Refused, grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except CosiloError as error:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, "refused", str(error)) from None
        except NotImplementedError:  # the generated base class has it for a method that the servicer lacks
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "unimplemented", f"{method}: this coordinator does not have it") from None
        except Exception as error:
            if context.done():  # the caller went away under it: gRPC's own errors say so in several ways
                return
            log.exception("a call failed", method=method)
            detail = f"{method}: the coordinator failed at this call ({type(error).__name__}); its log says why"
            raise Refused(grpc.StatusCode.INTERNAL, "internal", detail) from None

    async def _only(self, requests: AsyncIterator[Any], method: str) -> Any:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await anext(requests)
        except TimeoutError:
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED, "slow_request", f"{method}: no request in {self._request_timeout_s:g} s"
            ) from None
        except StopAsyncIteration:  # none was sent, or one that gRPC found too large and has refused itself
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "no_request", f"{method}: the call has no request") from None

    async def _write(self, context: Context, method: str, response: Any) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(response)
        except TimeoutError:
            detail = f"{method}: nothing was read for {self._stall_s:g} s"
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, SLOW_READER, detail) from None
        except Exception:  # a write fails for one reason, for which gRPC has several errors and no public one
            raise _Gone from None

    async def _refuse(self, context: Context, method: str, refused: Refused) -> NoReturn:
        self._metrics.rejected.labels(reason=refused.reason).inc()
        if not self._warnings.take(self._clock()):
            log.warning("call refused", method=method, peer=context.peer(), reason=refused.reason, detail=refused.detail)
        await context.abort(refused.code, refused.detail[:DETAIL_CHARS_MAX])
        raise AssertionError("abort returned")  # grpc's abort raises; this tells the type checker


def _less(counted: Counter[str], key: str) -> None:
    counted[key] -= 1
    if not counted[key]:
        del counted[key]


def caller_of(context: Context) -> str:
    """Who calls, for counting: the name in its certificate and its key; where it shows none, its address (see `source_of`)."""
    pems = list(context.auth_context().get("x509_pem_cert") or ())
    return _certified(bytes(pems[0])) if pems else source_of(context.peer())


@lru_cache(maxsize=1024)
def _certified(pem: bytes) -> str:
    """The key too: whoever got hold of a second invitation for a site's name has its name, and must not use up its calls."""
    try:
        peer = peer_from_certificate(pem)
    except CosiloError:  # of this CA, and no party's: all of these are one caller
        return "a certificate without a name"
    return f"{peer.name} (key {peer.key_digest.hex()[:8]})"


def source_of(peer: str) -> str:
    """The address in gRPC's word for a peer (`ipv4:192.0.2.1:50000`), without its port; of IPv6 the /64, which is one subscriber's."""
    bare = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ip_address(bare.partition("%")[0])
    except ValueError:
        return peer.partition(":")[0] or "unknown"
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"


async def _decoded(requests: AsyncIterator[bytes], method: str, decode: Callable[[bytes], Any] | None, size_max: int) -> AsyncIterator[Any]:
    async for raw in requests:
        if len(raw) > size_max:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, "oversize_message", f"{method}: a message of {len(raw)} bytes; at most {size_max}"
            )
        if decode is None:
            yield raw
            continue
        try:
            message = decode(raw)
        except DecodeError:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "malformed_message", f"{method}: the request is not its message") from None
        yield message
