"""PutUpdate's receiving half: a signed statement first, then chunks into the spool, then the digest's verdict.

An upload resumes where its bytes on disk end, whoever was restarted in between. It counts only when it is whole, its digest is the signed one,
and the round machine has taken it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

from google.protobuf.message import DecodeError

from cosilo_common.chunk_flow import WriteBehind
from cosilo_common.errors import CosiloError
from cosilo_common.framing import data_of
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Signed
from cosilo_common.secagg.messages import Upload as UploadBody
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_common.threads import opened_in_thread
from cosilo_common.transfer import CHUNK_BYTES, FileSink, Refusal, TransferError, file_digest, sync_folder
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import Progressed, UploadReceived
from cosilo_server.rounds.state import Activity, Phase, Round, Upload
from cosilo_server.services.turns import Turn, Turns
from cosilo_server.spool import Spool
from cosilo_server.store import Store
from cosilo_server.trace import DIGEST, UPLOAD
from cosilo_server.verification import verified_upload

HEADER_TIMEOUT_S = 20.0  # the header follows the call at once
STALL_S = 120.0  # an upload that does not advance by STALL_BYTES in that time frees its slot; the site resumes it on another call
STALL_BYTES = 256 << 10  # 2 kB a second: the slowest line anybody has, and far more than a byte a minute
SMALL_CHUNKS_MAX = 1024  # beyond those that the size asks for: each chunk costs a write and a thread's attention, however small it is
PROGRESS_EVERY_CHUNKS = 16


class UploadDesk:
    """Takes uploads for one coordinator."""

    def __init__(self, conductor: Conductor, store: Store, spool: Spool, metrics: CoordinatorMetrics, stall_s: float = STALL_S) -> None:
        self._conductor = conductor
        self._store = store
        self._spool = spool
        self._metrics = metrics
        self._stall_s = stall_s
        self._receiving: set[tuple[bytes, str]] = set()
        self._turns = Turns()

    async def receive(self, site: str, requests: AsyncIterator[bytes]) -> AsyncGenerator[site_pb2.PutUpdateResponse]:
        """One upload call. Raises CosiloError (ProtocolViolation, TransferError) with what is wrong.

        One at a time for a site in a run: each statement that it signs would otherwise have a file of its own, and the last to end would
        take the place of one that the round counts on already.
        """
        iterator = aiter(requests)
        first = await _next(iterator, HEADER_TIMEOUT_S, HEADER_TIMEOUT_S)
        run = self._open(site, first)[0].run
        if (run, site) in self._receiving:
            raise TransferError(Refusal.BUSY, "upload", f"another upload of {site} is under way", "end that one first")
        self._receiving.add((run, site))
        try:
            async with aclosing(self._receive(site, first, iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._receiving.discard((run, site))

    async def _receive(self, site: str, first: bytes, iterator: AsyncIterator[bytes]) -> AsyncGenerator[site_pb2.PutUpdateResponse]:
        state, signed = self._open(site, first)
        record = state.sites[site]
        if record.upload is not None and signed.attempt == state.attempt:
            if record.upload.statement != signed.encode():
                raise ProtocolViolation(
                    Rule.ONE_MASKING, f"{site} has uploaded in attempt {state.attempt} already, under another statement"
                )
            yield site_pb2.PutUpdateResponse(resume_offset=record.upload.size_bytes)
            yield site_pb2.PutUpdateResponse(stored=True)
            return
        manifest = self._conductor.manifest(state.run)
        assert manifest is not None  # `_open` found it
        body = await asyncio.to_thread(verified_upload, manifest, state, signed)
        if await asyncio.to_thread(self._stands, state, site, body.digest.hex()):  # arrived whole just before a crash
            yield site_pb2.PutUpdateResponse(resume_offset=body.size_bytes)
        else:
            async with self._turns.turn() as turn:  # before the answer: until then the site sends nothing that would lie in memory
                into = (state.run.hex(), state.number, site, body.size_bytes, body.digest.hex())
                async with opened_in_thread(self._spool.receive, *into) as sink:  # which holds a descriptor and a lock
                    if sink.offset:
                        self._metrics.upload_resumed.inc()
                    yield site_pb2.PutUpdateResponse(resume_offset=sink.offset)
                    await self._fill(sink, iterator, state, site, turn)
        await self._deliver(state, site, signed, body)
        yield site_pb2.PutUpdateResponse(stored=True)

    def _open(self, site: str, first: bytes) -> tuple[Round, Signed]:
        try:
            request = site_pb2.PutUpdateRequest.FromString(first)
        except DecodeError:
            raise TransferError(Refusal.BAD_DECLARATION, "upload", "the first message is no PutUpdateRequest") from None
        if request.WhichOneof("what") != "header":
            raise TransferError(Refusal.BAD_DECLARATION, "upload", "the first message is the header")
        header = request.header
        signed = Signed.decode(header.statement)
        if signed.site != site:
            raise ProtocolViolation(Rule.SIGNATURE, f"{site} uploads under a statement that names {signed.site}")
        if (signed.run, signed.round, signed.attempt) != (header.run, header.round, header.attempt):
            raise ProtocolViolation(Rule.MESSAGE, "header.statement is for another run, round or attempt than the header")
        state = self._conductor.round(header.run)
        if state is None or site not in state.sites:
            raise CosiloError("upload", f"run {header.run.hex()[:12]} has no round for {site}", "wait for an assignment")
        return state, signed

    def _stands(self, state: Round, site: str, digest: str) -> bool:
        run, number = state.run.hex(), state.number
        path = self._spool.path(run, number, site)
        if not self._spool.whole(run, number, site) or file_digest(path) != digest:
            return False
        sync_folder(path.parent)  # a crash between its renaming and that: what is acknowledged must outlive the next power cut too
        return True

    async def _fill(self, sink: FileSink, requests: AsyncIterator[bytes], state: Round, site: str, turn: Turn) -> None:
        began, received, count = time.monotonic(), 0, 0
        trace = self._conductor.trace
        upload = trace.begin(state, site, UPLOAD)
        chunks_max = sink.size // CHUNK_BYTES + SMALL_CHUNKS_MAX
        now = asyncio.get_running_loop().time
        due, due_bytes = now() + self._stall_s, STALL_BYTES
        try:
            async with WriteBehind(sink) as writing:
                while writing.offset < sink.size:
                    if received >= due_bytes:
                        due, due_bytes = now() + self._stall_s, received + STALL_BYTES
                    asked = now()
                    chunk = data_of(await _next(requests, max(0.0, due - asked), self._stall_s))
                    turn.waited(now() - asked)
                    if chunk is None:
                        raise TransferError(Refusal.BAD_DECLARATION, "upload", "after the header come chunks of data, and nothing else")
                    await writing.append(chunk)
                    received += len(chunk)
                    upload.bytes = received
                    count += 1
                    if count > chunks_max:
                        raise TransferError(Refusal.OUT_OF_ORDER, "upload", f"{count} chunks: they are too small", "send 1 MiB in each")
                    current = self._conductor.round(state.run)
                    here = (state.number, state.attempt, Phase.UPLOADING)
                    if current is None or (current.number, current.attempt, current.phase) != here:
                        raise ProtocolViolation(Rule.ORDER, f"attempt {state.attempt} of round {state.number} takes no uploads any more")
                    if count % PROGRESS_EVERY_CHUNKS == 0:
                        await self._require_room(sink)
                        progress = Progressed(site, Activity.UPLOADING, 10 * sink.offset // sink.size, sink.offset)
                        await self._conductor.handle(state.run, progress, state.number)
                await writing.settle()
            trace.end(upload)
            upload = trace.begin(state, site, DIGEST)
            await asyncio.to_thread(sink.finish)
            trace.end(upload)
            self._metrics.transfer_duration.labels(direction="up").observe(time.monotonic() - began)
        finally:
            trace.end(upload, "cut")  # unless it has ended well
            self._metrics.transfer_bytes.labels(direction="up", site=site).inc(received)
            await asyncio.to_thread(self._store.add_bytes, state.run, state.number, 0, received)

    async def _require_room(self, sink: FileSink) -> None:
        """Uploads that began side by side each saw the same free space."""
        try:
            await asyncio.to_thread(self._spool.require_room, sink.size - sink.offset)
        except CosiloError as error:
            raise TransferError(Refusal.DISK, "upload", error.subject, error.hint) from None

    async def _deliver(self, state: Round, site: str, signed: Signed, body: UploadBody) -> None:
        upload = Upload(signed.encode(), body.digest, body.size_bytes)
        if refused := await self._conductor.handle(state.run, UploadReceived(site, signed.attempt, upload), state.number):
            await asyncio.to_thread(self._spool.discard, state.run.hex(), state.number, site)
            raise ProtocolViolation(Rule.ORDER, refused)


@asynccontextmanager
async def messages_of(requests: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """A call's messages, let go of at the end: gRPC keeps an ended call's iterator, and in it the last chunk, until other calls come."""
    messages = aiter(requests)
    try:
        yield messages
    finally:
        if isinstance(messages, AsyncGenerator):
            with suppress(RuntimeError):  # a cancelled read has not ended yet: it frees the chunk itself
                await messages.aclose()


async def _next(requests: AsyncIterator[bytes], timeout_s: float, stall_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(requests)
    except StopAsyncIteration:
        raise TransferError(Refusal.INCOMPLETE, "upload", "the stream ended before the upload was whole", "resume it") from None
    except TimeoutError:
        raise TransferError(Refusal.STALLED, "upload", f"less than {STALL_BYTES} bytes came in {stall_s:g} s", "resume it") from None
