"""SiteService: what sites call on the federation port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime

import grpc
import structlog

from cosilo_common.audit import Note, no_note
from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Peer, Role
from cosilo_common.protocol_version import PROTOCOL_VERSION, version_gap
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_common.secagg.messages import Signed
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_server.artifacts import Artifacts
from cosilo_server.authority import Authority
from cosilo_server.conductor import Conductor
from cosilo_server.membership import StoredMembers
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import Declined, Progressed
from cosilo_server.services.admission import Bucket
from cosilo_server.services.ca import CaDesk
from cosilo_server.services.downloads import DownloadNotes, base_of, send_artifact
from cosilo_server.services.gate import Context, Gate
from cosilo_server.services.translation import ACTIVITY_FROM_WIRE, DECLINE_FROM_WIRE, assignment_to_wire
from cosilo_server.services.turns import Turns
from cosilo_server.services.uploads import UploadDesk, messages_of
from cosilo_server.store import SiteSeen, Store
from cosilo_server.verification import is_repeat, is_superfluous, verified_event

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 20.0  # a first message follows the stream at once; a stream without one holds a slot for nothing
SOFTWARE_CHARS_MAX = 64
ATTENDING_PER_MINUTE_MAX = 600  # a site speaks at each tenth of its work and every few seconds; whoever says more is read more slowly


class SiteService(site_pb2_grpc.SiteServiceServicer):
    """Every method passes the gate first, and touches only what the caller's certificate allows.

    Add it to a server with `add_to`: the two methods that carry chunks hand them on as bytes (cosilo_common.framing).
    """

    def __init__(
        self,
        gate: Gate,
        conductor: Conductor,
        store: Store,
        artifacts: Artifacts,
        uploads: UploadDesk,
        members: StoredMembers,
        authority: Authority,
        metrics: CoordinatorMetrics,
        streams_per_site: int,
        ca: CaDesk | None = None,
        note: Note = no_note,
    ) -> None:
        self._note = note
        self._downloads = DownloadNotes(note)
        self._turns = Turns()
        self._gate = gate
        self._conductor = conductor
        self._store = store
        self._artifacts = artifacts
        self._uploads = uploads
        self._members = members
        self._authority = authority
        self._metrics = metrics
        self._streams_max = streams_per_site
        self._ca = ca
        self._streams: dict[str, int] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers every method, then the two that carry chunks again: the later registration stands."""
        chunked = {
            "GetArtifact": grpc.unary_stream_rpc_method_handler(
                self.GetArtifact, request_deserializer=site_pb2.GetArtifactRequest.FromString
            ),
            "PutUpdate": grpc.stream_stream_rpc_method_handler(
                self.PutUpdate, response_serializer=site_pb2.PutUpdateResponse.SerializeToString
            ),
        }
        site_pb2_grpc.add_SiteServiceServicer_to_server(self, server)
        server.add_registered_method_handlers(site_pb2.DESCRIPTOR.services_by_name["SiteService"].full_name, chunked)

    async def Attend(
        self, request_iterator: AsyncIterator[site_pb2.AttendRequest], context: Context
    ) -> AsyncIterator[site_pb2.AttendResponse]:
        peer = await self._gate.site(context)
        site = peer.name.name
        if self._streams.get(site, 0) >= self._streams_max:
            await self._gate.abort(
                context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too_many_streams", f"{site} has {self._streams_max} streams open already"
            )
        self._streams[site] = self._streams.get(site, 0) + 1
        try:
            await self._hello(peer, request_iterator, context)
            try:
                await self._conductor.attend(site, True)
                async for response in self._snapshots(peer, request_iterator, context):
                    yield response
            finally:
                log.info("site disconnected", site=site)  # first: a cancelled call does not come back from the next line
                await self._conductor.attend(site, False)
        finally:
            self._streams[site] -= 1

    async def _hello(self, peer: Peer, requests: AsyncIterator[site_pb2.AttendRequest], context: Context) -> None:
        try:
            first = await asyncio.wait_for(anext(aiter(requests)), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            await self._gate.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "no_hello", "the first message of a stream is `hello`")
        if first.WhichOneof("what") != "hello":
            await self._gate.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "no_hello", "the first message of a stream is `hello`")
        hello = first.hello
        if gap := version_gap(hello.protocol_version, PROTOCOL_VERSION):
            log.warning("site not admitted", site=peer.name.name, reason=gap, software=hello.software[:SOFTWARE_CHARS_MAX])
            await self._gate.abort(context, grpc.StatusCode.FAILED_PRECONDITION, "protocol_version", f"hello.protocol_version: {gap}")
        software = hello.software[:SOFTWARE_CHARS_MAX]
        seen = SiteSeen(peer.name.name, time.time(), context.peer(), software, peer.not_after.timestamp())
        await asyncio.to_thread(self._store.saw_site, seen)
        self._metrics.site_last_seen.labels(site=seen.site).set(seen.at)
        log.info("site connected", site=seen.site, peer=context.peer(), software=software)

    async def _snapshots(
        self, peer: Peer, requests: AsyncIterator[site_pb2.AttendRequest], context: Context
    ) -> AsyncIterator[site_pb2.AttendResponse]:
        site = peer.name.name
        reader = asyncio.ensure_future(self._read(site, requests))
        told: object = None
        try:
            async with self._conductor.watch() as changed:
                reader.add_done_callback(lambda _: changed.set())
                while not reader.done():
                    await changed.wait()
                    changed.clear()
                    await self._gate.check_still_member(peer, context)
                    owed = self._conductor.owed(site)
                    version, trust_version = self._members.version(), self._ca.trust_version() if self._ca else 0
                    if (owed, version, trust_version) != told:
                        told = (owed, version, trust_version)
                        yield site_pb2.AttendResponse(
                            owed=[assignment_to_wire(one) for one in owed],
                            members_version=version,
                            protocol_version=PROTOCOL_VERSION,
                            trust_version=trust_version,
                        )
            if (error := reader.exception()) is not None:
                raise error
        finally:
            reader.cancel()

    async def _read(self, site: str, requests: AsyncIterator[site_pb2.AttendRequest]) -> None:
        now = asyncio.get_running_loop().time
        pace = Bucket(ATTENDING_PER_MINUTE_MAX, now())
        async for request in requests:
            while wait_s := pace.take(now()):  # not refused: what is not read waits in the sender's own window
                self._metrics.rejected.labels(reason="attend_rate").inc()
                await asyncio.sleep(wait_s)
            self._metrics.site_last_seen.labels(site=site).set(time.time())
            match request.WhichOneof("what"):
                case "progress":
                    said = request.progress
                    activity = ACTIVITY_FROM_WIRE.get(said.activity)
                    current = self._conductor.round(said.run)
                    if activity is not None and current is not None and current.number == said.round:
                        await self._conductor.handle(said.run, Progressed(site, activity, said.tenths, said.bytes), said.round)
                case "decline":
                    declined = request.decline
                    code = DECLINE_FROM_WIRE.get(declined.code)
                    current = self._conductor.round(declined.run)
                    if code is not None and current is not None and current.number == declined.round:
                        self._conductor.note_reached(declined.run, site, declined.reached)
                        log.warning("site declines", site=site, run=declined.run.hex()[:12], round=declined.round, code=code)
                        await self._conductor.handle(declined.run, Declined(site, code), declined.round)
                case _:
                    self._metrics.rejected.labels(reason="unknown_attend").inc()

    async def GetArtifact(  # type: ignore[override]  # bytes where the stub has messages: `add_to` registers it so
        self, request: site_pb2.GetArtifactRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """GetArtifact, with its responses as bytes."""
        peer = await self._gate.site_or_admin(context)
        digest = request.digest.hex()
        if peer.name.role is Role.SITE:
            await self._may_fetch(peer.name.name, request.digest, context)
        if not await asyncio.to_thread(self._artifacts.has, digest if len(request.digest) == 32 else "0" * 64):
            known = await asyncio.to_thread(self._store.checkpoint_of, request.digest)
            why = "was retired by the retention policy" if known else "is not in the store"
            await self._gate.abort(context, grpc.StatusCode.NOT_FOUND, "unknown_artifact", f"digest {digest[:12]} {why}")
        async for response in send_artifact(
            self._gate, self._conductor, self._store, self._metrics, self._artifacts, self._downloads, self._turns, peer, request, context
        ):
            yield response

    async def _may_fetch(self, site: str, digest: bytes, context: Context) -> None:
        """A site may fetch the weights of its own runs, steps to them, what their adapters stand on, and nothing else."""
        mine = set(self._conductor.runs_of(site))
        if any(digest == base_of(self._conductor, run) for run in mine):
            return
        found = await asyncio.to_thread(self._store.checkpoint_of, digest)
        if not any(c.run in mine and (c.weights == digest or (c.step is not None and c.step.digest == digest)) for c in found):
            await self._gate.abort(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                "not_your_artifact",
                f"digest {digest.hex()[:12]} is not the weights of a run of {site}",
            )

    async def PutUpdate(  # type: ignore[override]  # likewise
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[site_pb2.PutUpdateResponse]:
        """PutUpdate, with its requests as bytes."""
        peer = await self._gate.site(context)
        try:
            async with self._conductor.watch() as changed, messages_of(request_iterator) as messages:
                requests = self._gate.while_member(peer, messages, changed, context)
                async with aclosing(self._uploads.receive(peer.name.name, requests)) as responses:
                    async for response in responses:
                        yield response
        except CosiloError as error:
            await self._gate.refuse(context, error)

    async def Submit(self, request: site_pb2.SubmitRequest, context: Context) -> site_pb2.SubmitResponse:
        peer = await self._gate.site(context)
        try:
            await self._submit(peer.name.name, request.message)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        return site_pb2.SubmitResponse()

    async def RenewCertificate(self, request: site_pb2.RenewCertificateRequest, context: Context) -> site_pb2.RenewCertificateResponse:
        peer = await self._gate.site_or_admin(context)
        try:
            chain = await asyncio.to_thread(self._authority.renew, request.csr, peer, datetime.now(UTC))
        except CosiloError as error:
            await self._gate.refuse(context, error)
        self._note(str(peer.name), "renewed its certificate")
        log.info("certificate renewed", party=str(peer.name))
        return site_pb2.RenewCertificateResponse(certificate_chain=chain)

    async def Leave(self, request: site_pb2.LeaveRequest, context: Context) -> site_pb2.LeaveResponse:
        peer = await self._gate.site(context)
        try:
            await asyncio.to_thread(self._members.leave, peer.name.name)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        self._note(str(peer.name), "left the federation")
        await self._conductor.left(peer.name.name)
        log.warning("site left the federation", site=peer.name.name, next=f"cosilo site revoke {peer.name.name}")
        return site_pb2.LeaveResponse()

    async def _submit(self, site: str, message: bytes) -> None:
        signed = Signed.decode(message)
        if signed.site != site:
            raise ProtocolViolation(Rule.SIGNATURE, f"{site} submitted a message that names {signed.site}")
        manifest, state = self._conductor.manifest(signed.run), self._conductor.round(signed.run)
        if manifest is None or state is None:
            raise CosiloError("submit", f"run {signed.run.hex()[:12]} has no round", "wait for an assignment")
        if is_repeat(state, site, message) or is_superfluous(state, signed):
            return
        event = await asyncio.to_thread(verified_event, manifest, state, signed)
        if refused := await self._conductor.handle(signed.run, event, signed.round):
            raise ProtocolViolation(Rule.ORDER, refused)

    async def GetRun(self, request: site_pb2.GetRunRequest, context: Context) -> site_pb2.GetRunResponse:
        peer = await self._gate.site(context)
        run = await asyncio.to_thread(self._store.run, request.run)
        if run is None or run.run not in self._conductor.runs_of(peer.name.name):
            await self._gate.abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                "unknown_run",
                f"run {request.run.hex()[:12]} does not name {peer.name.name} as a participant",
            )
        return site_pb2.GetRunResponse(manifest=run.manifest.canonical(), signature=run.signature, signer=run.signer)

    async def ListMyRuns(self, request: site_pb2.ListMyRunsRequest, context: Context) -> site_pb2.ListMyRunsResponse:
        peer = await self._gate.site(context)
        return site_pb2.ListMyRunsResponse(runs=self._conductor.runs_of(peer.name.name))

    async def GetMembers(self, request: site_pb2.GetMembersRequest, context: Context) -> site_pb2.GetMembersResponse:
        await self._gate.site(context)
        return site_pb2.GetMembersResponse(members=self._members.data(), trust=self._ca.trust() if self._ca else b"")
