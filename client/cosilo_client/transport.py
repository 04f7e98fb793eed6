"""The calls that a site makes over one channel: bytes in chunks, messages, and statuses as two kinds of error.

`Unreachable` may be tried again; `Refused` says why not. Owns gRPC's calls and time limits. Must not know reconnection,
what is owed, or when a call is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final, Self

import grpc
import grpc.aio

from cosilo_client.coordinator import OnBytes, Refused, SignedRun, Unreachable, UploadHeader
from cosilo_client.wire import chunk_from
from cosilo_common.chunk_flow import WriteBehind, frames_from
from cosilo_common.errors import CosiloError
from cosilo_common.identity.proxy import Proxy
from cosilo_common.identity.tls import TlsFiles, federation_channel
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_common.transfer import FileSink, FileSource

VERDICT_BYTES_PER_S: Final = 50_000_000  # the coordinator hashes a resumed upload before it answers; disks read faster
DETAIL_CHARS_MAX: Final = 1000  # of a status, for the log
CLOSE_GRACE_S: Final = 0.5  # calls still running when a channel is given up are cancelled after this

_SERVICE: Final = "/cosilo.v1.SiteService"
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_HEALTH_SERVING: Final = b"\x08\x01"  # HealthCheckResponse(status=SERVING); the health package ships no types to import
_REFUSALS: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)

AttendCall = grpc.aio.StreamStreamCall[site_pb2.AttendRequest, site_pb2.AttendResponse]


class Transport:
    """One channel to the coordinator. timeout_s: for an answer; stall_s: for a transfer to move at all."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, stall_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._stub = site_pb2_grpc.SiteServiceStub(channel)
        # Chunks go and come as bytes; the wire is the same (see cosilo_client.wire).
        self._get: grpc.aio.UnaryStreamMultiCallable[site_pb2.GetArtifactRequest, bytes] = channel.unary_stream(
            f"{_SERVICE}/GetArtifact", request_serializer=site_pb2.GetArtifactRequest.SerializeToString
        )
        self._put: grpc.aio.StreamStreamMultiCallable[bytes, site_pb2.PutUpdateResponse] = channel.stream_stream(
            f"{_SERVICE}/PutUpdate", response_deserializer=site_pb2.PutUpdateResponse.FromString
        )

    @classmethod
    def open(cls, address: str, tls: TlsFiles, *, timeout_s: float, stall_s: float, proxy: Proxy | None = None) -> Self:
        """A new channel, with the certificate files as they are now. Raises CosiloError where they cannot be used."""
        return cls(federation_channel(address, tls, proxy), timeout_s=timeout_s, stall_s=stall_s)

    async def close(self) -> None:
        """Gives the channel up, and every call on it."""
        await self._channel.close(CLOSE_GRACE_S)

    def attend(self) -> AttendCall:
        """Opens the long-lived stream; reads and writes on it raise gRPC's own errors, which `failure` translates."""
        call: AttendCall = self._stub.Attend()
        return call

    async def fetch(self, digest: bytes, sink: FileSink, on_bytes: OnBytes) -> None:
        """Appends to the sink from its offset to its declared size.

        Raises Unreachable, with what arrived kept in the sink; Refused; CosiloError where sizes disagree.
        """
        call = self._get(site_pb2.GetArtifactRequest(digest=digest, offset=sink.offset))
        async with self._ending(call, "fetch weights"), WriteBehind(sink) as writing:
            while True:
                async with asyncio.timeout(self._stall_s):
                    message = await call.read()
                if not isinstance(message, bytes):  # gRPC's end of stream, which the coordinator's books wait for
                    break
                data, total_bytes = chunk_from(message)
                if total_bytes and total_bytes != sink.size:
                    raise CosiloError(
                        "fetch weights",
                        f"{digest.hex()[:12]} has {total_bytes} bytes there and {sink.size} in the assignment",
                        "tell the coordinator's admin",
                    )
                if data:
                    await writing.append(data)
                    on_bytes(sink.offset)
            await writing.settle()
            on_bytes(sink.offset)
            if not sink.complete:
                raise Unreachable("fetch weights", f"the stream ended at {sink.offset} of {sink.size} bytes")

    async def put(self, header: UploadHeader, source: FileSource, on_bytes: OnBytes) -> None:
        """Sends an upload from where the coordinator has it, until the coordinator says that it is stored."""
        call = self._put()
        async with self._ending(call, "upload"):
            opening = site_pb2.PutUpdateHeader(run=header.run, round=header.round, attempt=header.attempt, statement=header.statement)
            await self._write(call, site_pb2.PutUpdateRequest(header=opening).SerializeToString())
            offset = (await self._answer(call, self._timeout_s)).resume_offset
            on_bytes(offset)
            async with aclosing(frames_from(source, offset)) as frames:
                async for message, count in frames:
                    await self._write(call, message)
                    offset += count
                    on_bytes(offset)
            await call.done_writing()
            verdict = await self._answer(call, self._stall_s + source.size / VERDICT_BYTES_PER_S)
            if not verdict.stored:
                raise Unreachable("upload", "the coordinator gave no verdict on the whole upload")
            with suppress(TimeoutError, grpc.aio.AioRpcError):  # stored is stored, whatever comes after it
                async with asyncio.timeout(self._timeout_s):
                    await call.read()

    async def submit(self, message: bytes) -> None:
        """Hands in one signed message; when this returns the coordinator has it on disk."""
        await self._unary("submit", self._stub.Submit(site_pb2.SubmitRequest(message=message), timeout=self._timeout_s))

    async def run(self, run: bytes) -> SignedRun:
        """A run's signed manifest, not verified."""
        answer = await self._unary("fetch run", self._stub.GetRun(site_pb2.GetRunRequest(run=run), timeout=self._timeout_s))
        return SignedRun(answer.manifest, answer.signature, answer.signer)

    async def my_runs(self) -> tuple[bytes, ...]:
        """Digests of the runs that name this site, oldest first."""
        call = self._stub.ListMyRuns(site_pb2.ListMyRunsRequest(), timeout=self._timeout_s)
        return tuple((await self._unary("list runs", call)).runs)

    async def members(self) -> bytes:
        """The newest members list, not verified."""
        return (await self.announced())[0]

    async def announced(self) -> tuple[bytes, bytes]:
        """The newest members list, and the newest trust document (empty where there is none), neither verified."""
        call = self._stub.GetMembers(site_pb2.GetMembersRequest(), timeout=self._timeout_s)
        answer: site_pb2.GetMembersResponse = await self._unary("fetch members", call)
        return answer.members, answer.trust

    async def renew(self, csr: bytes) -> bytes:
        """The next certificate chain (PEM) for a request (PKCS#10, DER), not checked."""
        request = site_pb2.RenewCertificateRequest(csr=csr)
        chain: bytes = (
            await self._unary("renew certificate", self._stub.RenewCertificate(request, timeout=self._timeout_s))
        ).certificate_chain
        return chain

    async def leave(self) -> None:
        """Leaves the federation: when this returns the coordinator has barred this site, and answers no further call."""
        await self._unary("leave", self._stub.Leave(site_pb2.LeaveRequest(), timeout=self._timeout_s))

    async def serving(self) -> bool:
        """What the coordinator's standard health service says of itself."""
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_HEALTH)
        answer = await self._unary("ask for health", check(b"", timeout=self._timeout_s))
        return bool(answer == _HEALTH_SERVING)

    async def _unary(self, operation: str, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise failure(operation, error) from None
        except asyncio.CancelledError:
            raise _cancelled(operation) from None

    async def _write(self, call: Any, message: bytes) -> None:
        async with asyncio.timeout(self._stall_s):
            await call.write(message)

    async def _answer(self, call: Any, timeout_s: float) -> site_pb2.PutUpdateResponse:
        async with asyncio.timeout(timeout_s):
            answer = await call.read()
        if not isinstance(answer, site_pb2.PutUpdateResponse):  # gRPC's end of stream
            raise Unreachable("upload", "the coordinator ended the stream")
        return answer

    @asynccontextmanager
    async def _ending(self, call: Any, operation: str) -> AsyncIterator[None]:
        """Translates what ends a stream, and ends it in any case."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise failure(operation, error) from None
        except asyncio.InvalidStateError:  # written to after the coordinator had ended the call: the status says why
            raise failure_of(operation, await call.code(), await call.details()) from None
        except TimeoutError:
            raise Unreachable(operation, "nothing moved in time", "it goes on at its offset") from None
        except asyncio.CancelledError:
            raise _cancelled(operation) from None
        finally:
            call.cancel()


def failure(operation: str, error: grpc.aio.AioRpcError) -> CosiloError:
    """A gRPC status as `Unreachable` or `Refused`."""
    return failure_of(operation, error.code(), error.details())


def failure_of(operation: str, code: grpc.StatusCode, details: str | None) -> CosiloError:
    """`failure` for a call that ended under a write."""
    text = " ".join((details or "").split())[:DETAIL_CHARS_MAX] or "no reason given"
    if code in _REFUSALS:
        return Refused(operation, f"{code.name}: {text}", code.name)
    return Unreachable(operation, f"{code.name}: {text}", "check the link and the coordinator; it is tried again")


def _cancelled(operation: str) -> BaseException:
    """gRPC raises CancelledError also where the channel was closed under a call: then nobody cancelled the caller."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return asyncio.CancelledError()
    return Unreachable(operation, "the connection was given up")
