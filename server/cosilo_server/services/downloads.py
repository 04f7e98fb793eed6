"""GetArtifact's sending half: chunks from an offset, counted, and told to the round as the site's progress."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing

import grpc

from cosilo_common.audit import Note
from cosilo_common.chunk_flow import frames_from
from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Peer, Role
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.threads import opened_in_thread
from cosilo_common.transfer import FileSource
from cosilo_server.artifacts import Artifacts
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import Progressed
from cosilo_server.rounds.state import Activity, Round
from cosilo_server.services.gate import Context, Gate
from cosilo_server.services.turns import Turns
from cosilo_server.store import Store
from cosilo_server.trace import FETCH

PROGRESS_EVERY_CHUNKS = 16  # 16 MiB: often enough against a deadline of minutes, seldom enough to cost nothing
NOTED_AGAIN_S = 3600.0  # the same caller's same artifact within that time is no news
NOTED_MAX = 4096  # pairs of those remembered: a few for each of 1000 sites


class DownloadNotes:
    """Notes who downloaded what, once an hour: asking for an artifact's last byte for ever must not fill the audit log's disk.

    clock: seconds, monotonic.
    """

    def __init__(self, note: Note, clock: Callable[[], float] = time.monotonic, remembered: int = NOTED_MAX) -> None:
        self._note = note
        self._clock = clock
        self._remembered = remembered
        self._noted: OrderedDict[tuple[str, str], float] = OrderedDict()

    def downloaded(self, who: str, artifact: str, size_bytes: int) -> None:
        """The last byte went out."""
        now, key = self._clock(), (who, artifact)
        if now - self._noted.get(key, -NOTED_AGAIN_S) < NOTED_AGAIN_S:
            return
        self._noted[key] = now
        self._noted.move_to_end(key)
        if len(self._noted) > self._remembered:
            self._noted.popitem(last=False)
        self._note(who, "downloaded", artifact=artifact, bytes=size_bytes)


async def send_artifact(
    gate: Gate,
    conductor: Conductor,
    store: Store,
    metrics: CoordinatorMetrics,
    artifacts: Artifacts,
    notes: DownloadNotes,
    turns: Turns,
    peer: Peer,
    request: site_pb2.GetArtifactRequest,
    context: Context,
) -> AsyncIterator[bytes]:
    """Chunks of an artifact that the caller may have, from the offset to the end."""
    site = peer.name.name
    now = asyncio.get_running_loop().time
    sent, began = 0, time.monotonic()
    held = AsyncExitStack()
    serving = _round_served(conductor, site, request.digest) if peer.name.role is Role.SITE else None
    fetch = conductor.trace.begin(serving, site, FETCH) if serving is not None else None
    try:
        path = held.enter_context(artifacts.lease(request.digest.hex()))
        source = await held.enter_async_context(opened_in_thread(FileSource, path))
    except BaseException as error:  # also a caller that went while it was opened
        await held.aclose()
        if fetch is not None:
            conductor.trace.end(fetch, "refused" if isinstance(error, CosiloError) else "cut")
        if not isinstance(error, CosiloError):
            raise
        await gate.refuse(context, error)
    try:
        if request.offset > source.size:
            await gate.abort(
                context, grpc.StatusCode.OUT_OF_RANGE, "offset", f"offset {request.offset} is past the artifact's {source.size} bytes"
            )
        yield site_pb2.GetArtifactResponse(total_bytes=source.size).SerializeToString()
        offset, count = request.offset, 0
        async with turns.turn() as turn, aclosing(frames_from(source, offset)) as frames:
            async for message, size in frames:
                await gate.check_still_member(peer, context)  # a removed member gets not one chunk more
                given = now()
                yield message
                turn.waited(now() - given)
                offset += size
                sent += size
                if fetch is not None:
                    fetch.bytes = sent
                count += 1
                if serving is not None and count % PROGRESS_EVERY_CHUNKS == 0:
                    progress = Progressed(site, Activity.FETCHING, 10 * offset // source.size, offset)
                    await conductor.handle(serving.run, progress, serving.number)
        if fetch is not None:
            conductor.trace.end(fetch)
        metrics.transfer_duration.labels(direction="down").observe(time.monotonic() - began)
        await held.aclose()
        notes.downloaded(str(peer.name), request.digest.hex(), source.size)
        artifacts.has_been_read(request.digest.hex())
    finally:
        await held.aclose()
        if peer.name.role is Role.SITE:
            metrics.transfer_bytes.labels(direction="down", site=site).inc(sent)
        if fetch is not None:
            conductor.trace.end(fetch, "cut")  # unless it has ended well
        if serving is not None:
            await asyncio.to_thread(store.add_bytes, serving.run, serving.number, sent, 0)


def base_of(conductor: Conductor, run: bytes) -> bytes | None:
    """The digest of what a run's adapters stand on; None where it trains none."""
    manifest = conductor.manifest(run)
    return None if manifest is None or manifest.lora is None else bytes.fromhex(manifest.lora.base)


def _round_served(conductor: Conductor, site: str, digest: bytes) -> Round | None:
    """The round in progress for which the site is fetching: its weights, the step to them, or what its run's adapters stand on."""
    rounds = [found for run in conductor.runs_of(site) if (found := conductor.round(run)) is not None and not found.ended]
    for state in rounds:
        step = None if state.step is None else state.step.digest
        if digest in (state.base_digest, step, base_of(conductor, state.run)):
            return state
    return None
