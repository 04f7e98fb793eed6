"""PutUpdate's receiving half: a signed statement first, then chunks into the spool, then the digest's verdict.

An upload resumes where its bytes on disk end, whoever was restarted in between. It counts only when it is whole, its digest is the signed one,
and the round machine has taken it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from cosilo_common.errors import CosiloError
from cosilo_common.framing import data_of
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Signed
from cosilo_common.secagg.messages import Upload as UploadBody
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_common.transfer import FileSink, Refusal, TransferError, file_digest
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import Progressed, UploadReceived
from cosilo_server.rounds.state import Activity, Phase, Round, Upload
from cosilo_server.spool import Spool
from cosilo_server.store import Store
from cosilo_server.verification import verified_upload

HEADER_TIMEOUT_S = 20.0  # the header follows the call at once
CHUNK_TIMEOUT_S = 120.0  # a stalled upload frees its slot; the site resumes it on another call
PROGRESS_EVERY_CHUNKS = 16


class UploadDesk:
    """Takes uploads for one coordinator."""

    def __init__(self, conductor: Conductor, store: Store, spool: Spool, metrics: CoordinatorMetrics) -> None:
        self._conductor = conductor
        self._store = store
        self._spool = spool
        self._metrics = metrics

    async def receive(self, site: str, requests: AsyncIterator[bytes]) -> AsyncIterator[site_pb2.PutUpdateResponse]:
        """One upload call. Raises CosiloError (ProtocolViolation, TransferError) with what is wrong."""
        iterator = aiter(requests)
        state, signed = await self._open(site, await _next(iterator, HEADER_TIMEOUT_S))
        record = state.sites[site]
        if record.upload is not None and record.upload.statement == signed.encode():
            yield site_pb2.PutUpdateResponse(resume_offset=record.upload.size_bytes)
            yield site_pb2.PutUpdateResponse(stored=True)
            return
        manifest = self._conductor.manifest(state.run)
        assert manifest is not None  # `_open` found it
        body = await asyncio.to_thread(verified_upload, manifest, state, signed)
        if await asyncio.to_thread(self._stands, state, site, body.digest.hex()):  # arrived whole just before a crash
            yield site_pb2.PutUpdateResponse(resume_offset=body.size_bytes)
        else:
            sink = await asyncio.to_thread(self._spool.receive, state.run.hex(), state.number, site, body.size_bytes, body.digest.hex())
            if sink.offset:
                self._metrics.upload_resumed.inc()
            yield site_pb2.PutUpdateResponse(resume_offset=sink.offset)
            await self._fill(sink, iterator, state, site)
        await self._deliver(state, site, signed, body)
        yield site_pb2.PutUpdateResponse(stored=True)

    async def _open(self, site: str, first: bytes) -> tuple[Round, Signed]:
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
        return self._spool.whole(run, number, site) and file_digest(self._spool.path(run, number, site)) == digest

    async def _fill(self, sink: FileSink, requests: AsyncIterator[bytes], state: Round, site: str) -> None:
        began, received, count = time.monotonic(), 0, 0
        try:
            while not sink.complete:
                chunk = data_of(await _next(requests, CHUNK_TIMEOUT_S))
                if chunk is None:
                    raise TransferError(Refusal.BAD_DECLARATION, "upload", "after the header come chunks of data, and nothing else")
                await asyncio.to_thread(sink.append, sink.offset, chunk)
                received += len(chunk)
                count += 1
                current = self._conductor.round(state.run)
                if current is None or (current.number, current.phase) != (state.number, Phase.UPLOADING):
                    raise ProtocolViolation(Rule.ORDER, f"round {state.number} takes no uploads any more")
                if count % PROGRESS_EVERY_CHUNKS == 0:
                    progress = Progressed(site, Activity.UPLOADING, 10 * sink.offset // sink.size, sink.offset)
                    await self._conductor.handle(state.run, progress)
            await asyncio.to_thread(sink.finish)
            self._metrics.transfer_duration.labels(direction="up").observe(time.monotonic() - began)
        finally:
            sink.close()
            self._metrics.transfer_bytes.labels(direction="up", site=site).inc(received)
            await asyncio.to_thread(self._store.add_bytes, state.run, state.number, 0, received)

    async def _deliver(self, state: Round, site: str, signed: Signed, body: UploadBody) -> None:
        upload = Upload(signed.encode(), body.digest, body.size_bytes)
        if refused := await self._conductor.handle(state.run, UploadReceived(site, signed.attempt, upload)):
            await asyncio.to_thread(self._spool.discard, state.run.hex(), state.number, site)
            raise ProtocolViolation(Rule.ORDER, refused)


async def _next(requests: AsyncIterator[bytes], timeout_s: float) -> bytes:
    try:
        return await asyncio.wait_for(anext(requests), timeout_s)
    except StopAsyncIteration:
        raise TransferError(Refusal.INCOMPLETE, "upload", "the stream ended before the upload was whole", "resume it") from None
    except TimeoutError:
        raise TransferError(Refusal.INCOMPLETE, "upload", f"no chunk came for {timeout_s:.0f} s", "resume it") from None
