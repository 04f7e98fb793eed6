"""AdminService: what `cosilo` calls. Whatever needs an admin's signature arrives signed and is only checked and stored here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NoReturn

import grpc
import structlog

from cosilo_common.audit import AuditTrail
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError, printable
from cosilo_common.identity.endorsement import parse_preapproval
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.names import Peer, Role
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2
from cosilo_server.conductor import Conductor
from cosilo_server.enrolment import EnrolmentDesk, OpenInvitation
from cosilo_server.membership import StoredMembers
from cosilo_server.registry import RunRegistry
from cosilo_server.services.ca import CaDesk
from cosilo_server.services.gate import Context, Gate
from cosilo_server.services.summaries import Summaries
from cosilo_server.services.translation import KIND_FROM_WIRE
from cosilo_server.store import Pause, Store

log = structlog.get_logger(__name__)

ROUNDS_PER_ORDER_MAX = 10_000
WATCH_INTERVAL_S = 0.25  # a person reads no faster
PER_CLASS_MAX = 64
ROUND_MAX = (1 << 63) - 1  # SQLite has no larger integer
AUDIT_LINES = 64  # in one message: 8 MiB at the most
NAMES_NOTED = 500  # in one entry: two such lists fit a line of the audit log
PAUSE_REASON_CHARS_MAX = 200  # a line in `cosilo run list`
SHOWN_CHARS = 300  # of words that somebody else chose, in the audit log


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Every method passes the gate as an admin first."""

    def __init__(
        self,
        gate: Gate,
        conductor: Conductor,
        store: Store,
        members: StoredMembers,
        desk: EnrolmentDesk,
        registry: RunRegistry,
        summaries: Summaries,
        ca: CaDesk,
        audit: AuditTrail,
    ) -> None:
        self._audit = audit
        self._gate = gate
        self._conductor = conductor
        self._store = store
        self._members = members
        self._desk = desk
        self._registry = registry
        self._summaries = summaries
        self._ca = ca

    async def PutInvitation(self, request: admin_pb2.PutInvitationRequest, context: Context) -> admin_pb2.PutInvitationResponse:
        peer = await self._gate.admin(context)
        try:
            invitation = OpenInvitation(
                name=request.name,
                role=_role(request.role),
                token_public=request.token_public,
                expires_unix_s=request.expires_unix_s,
                preapproval=parse_preapproval(request.preapproval) if request.preapproval else None,
            )
            asked = {"name": invitation.name, "role": invitation.role.value, "preapproved": invitation.preapproval is not None}
            async with self._audited(peer, "invite", **asked):
                await asyncio.to_thread(self._desk.invite, invitation, datetime.now(UTC))
        except (CosiloError, ValueError) as error:
            await self._refuse(context, "invite", error)
        return admin_pb2.PutInvitationResponse()

    async def ListEnrolments(self, request: admin_pb2.ListEnrolmentsRequest, context: Context) -> admin_pb2.ListEnrolmentsResponse:
        await self._gate.admin(context)
        return admin_pb2.ListEnrolmentsResponse(enrolments=await asyncio.to_thread(self._summaries.enrolments))

    async def PutMembers(self, request: admin_pb2.PutMembersRequest, context: Context) -> admin_pb2.PutMembersResponse:
        peer = await self._gate.admin(context)
        before = self._members.newest()
        try:
            async with self._audited(peer, "members list", digest=sha256(request.members).hex()):
                await asyncio.to_thread(self._members.put, request.members)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        self._note_members(peer, before)
        log.info("members list stored", admin=peer.name.name, version=self._members.newest().version)
        return admin_pb2.PutMembersResponse()

    async def CreateRun(self, request: admin_pb2.CreateRunRequest, context: Context) -> admin_pb2.CreateRunResponse:
        peer = await self._gate.admin(context)
        digest = sha256(request.manifest)
        what = "create run" if self._conductor.manifest(digest) is None else "sign run"
        try:
            async with self._audited(peer, what, run=digest.hex()):
                run = await self._registry.create(request.manifest, request.signature, peer.name.name)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        return admin_pb2.CreateRunResponse(run=run)

    async def ListRuns(self, request: admin_pb2.ListRunsRequest, context: Context) -> admin_pb2.ListRunsResponse:
        await self._gate.admin(context)
        return admin_pb2.ListRunsResponse(runs=await asyncio.to_thread(self._summaries.runs))

    async def StartRounds(self, request: admin_pb2.StartRoundsRequest, context: Context) -> admin_pb2.StartRoundsResponse:
        peer = await self._gate.admin(context)
        kind = KIND_FROM_WIRE.get(request.kind)
        if kind is None:
            await self._gate.abort(context, grpc.StatusCode.INVALID_ARGUMENT, "bad_field", f"kind {request.kind} is not a kind of round")
        if not 1 <= request.rounds <= ROUNDS_PER_ORDER_MAX:
            await self._gate.abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "bad_field", f"rounds {request.rounds} is not from 1 to {ROUNDS_PER_ORDER_MAX}"
            )
        try:
            async with self._audited(peer, "start rounds", run=request.run.hex(), kind=kind.value, rounds=request.rounds):
                first = await self._conductor.order(request.run, kind, request.rounds)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("rounds ordered", admin=peer.name.name, run=request.run.hex()[:12], kind=kind, rounds=request.rounds)
        return admin_pb2.StartRoundsResponse(first_round=first)

    async def StopRun(self, request: admin_pb2.StopRunRequest, context: Context) -> admin_pb2.StopRunResponse:
        peer = await self._gate.admin(context)
        try:
            async with self._audited(peer, "stop run", run=request.run.hex(), abandon=request.abandon):
                await self._conductor.stop_run(request.run, request.abandon)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("run stopped", admin=peer.name.name, run=request.run.hex()[:12], abandon=request.abandon)
        return admin_pb2.StopRunResponse()

    async def PauseRun(self, request: admin_pb2.PauseRunRequest, context: Context) -> admin_pb2.PauseRunResponse:
        peer = await self._gate.admin(context)
        if len(request.reason) > PAUSE_REASON_CHARS_MAX or not request.reason.isprintable():
            await self._gate.abort(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "bad_field",
                f"reason is not one line of at most {PAUSE_REASON_CHARS_MAX} printable characters",
            )
        try:
            async with self._audited(peer, "pause run", run=request.run.hex(), reason=request.reason, abandon=request.abandon):
                await self._conductor.pause_run(request.run, Pause(peer.name.name, request.reason), request.abandon)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("run paused", admin=peer.name.name, run=request.run.hex()[:12], abandon=request.abandon)
        return admin_pb2.PauseRunResponse()

    async def ResumeRun(self, request: admin_pb2.ResumeRunRequest, context: Context) -> admin_pb2.ResumeRunResponse:
        peer = await self._gate.admin(context)
        try:
            async with self._audited(peer, "resume run", run=request.run.hex()):
                await self._conductor.resume_run(request.run)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("run resumed", admin=peer.name.name, run=request.run.hex()[:12])
        return admin_pb2.ResumeRunResponse()

    async def ListRounds(self, request: admin_pb2.ListRoundsRequest, context: Context) -> admin_pb2.ListRoundsResponse:
        await self._gate.admin(context)
        await self._known_run(request.run, context)
        return admin_pb2.ListRoundsResponse(rounds=await asyncio.to_thread(self._summaries.rounds, request.run))

    async def GetRoundTrace(self, request: admin_pb2.GetRoundTraceRequest, context: Context) -> admin_pb2.GetRoundTraceResponse:
        await self._gate.admin(context)
        await self._known_run(request.run, context)
        await self._possible_round(request.round, context)
        found = await asyncio.to_thread(self._summaries.trace, request.run, request.round)
        if found is None:
            await self._unknown_round(request.round, context)
        return found

    async def WatchRun(self, request: admin_pb2.WatchRunRequest, context: Context) -> AsyncIterator[admin_pb2.WatchRunResponse]:
        peer = await self._gate.admin(context)
        await self._known_run(request.run, context)
        told: admin_pb2.WatchRunResponse | None = None
        async with self._conductor.watch() as changed:
            while True:
                await changed.wait()
                changed.clear()
                await self._gate.check_still_member(peer, context)
                snapshot = await asyncio.to_thread(self._summaries.watch, request.run)
                if snapshot != told:
                    told = snapshot
                    yield snapshot
                await asyncio.sleep(WATCH_INTERVAL_S)

    async def ListCheckpoints(self, request: admin_pb2.ListCheckpointsRequest, context: Context) -> admin_pb2.ListCheckpointsResponse:
        await self._gate.admin(context)
        await self._known_run(request.run, context)
        found = await asyncio.to_thread(self._summaries.checkpoints, request.run)
        return admin_pb2.ListCheckpointsResponse(checkpoints=found)

    async def KeepCheckpoint(self, request: admin_pb2.KeepCheckpointRequest, context: Context) -> admin_pb2.KeepCheckpointResponse:
        peer = await self._gate.admin(context)
        await self._known_run(request.run, context)
        await self._possible_round(request.round, context)
        try:
            asked = {"run": request.run.hex(), "round": request.round, "name": printable(request.name)[:SHOWN_CHARS]}
            async with self._audited(peer, "unkeep checkpoint" if request.leave else "keep checkpoint", **asked):
                if request.leave:
                    await asyncio.to_thread(self._store.shelf.unkeep, request.run, request.round)
                else:
                    await asyncio.to_thread(self._store.shelf.keep, request.run, request.round, request.name)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        word = "left to the policy" if request.leave else "kept"
        log.info(f"checkpoint {word}", admin=peer.name.name, run=request.run.hex()[:12], round=request.round, name=request.name)
        return admin_pb2.KeepCheckpointResponse()

    async def Sample(self, request: admin_pb2.SampleRequest, context: Context) -> admin_pb2.SampleResponse:
        peer = await self._gate.admin(context)
        if not 1 <= request.per_class <= PER_CLASS_MAX:
            await self._gate.abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "bad_field", f"per_class {request.per_class} is not from 1 to {PER_CLASS_MAX}"
            )
        await self._possible_round(request.round, context)
        wanted = None if request.newest else request.round
        try:
            async with self._audited(peer, "draw samples", run=request.run.hex(), seed=request.seed):
                drawn = await self._registry.sample(request.run, wanted, request.raw, request.per_class, request.steps, request.seed)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        return admin_pb2.SampleResponse(png_digest=drawn.digest, bytes=drawn.bytes, round=drawn.round)

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.GetStatusResponse:
        await self._gate.admin(context)
        return await asyncio.to_thread(self._summaries.status)

    async def GetManifest(self, request: site_pb2.GetRunRequest, context: Context) -> site_pb2.GetRunResponse:
        await self._gate.admin(context)
        run = await asyncio.to_thread(self._store.run, request.run)
        if run is None:
            await self._unknown_run(request.run, context)
        return site_pb2.GetRunResponse(manifest=run.manifest.canonical(), signature=run.signature, signer=run.signer)

    async def GetMemberList(self, request: site_pb2.GetMembersRequest, context: Context) -> site_pb2.GetMembersResponse:
        await self._gate.admin(context)
        return site_pb2.GetMembersResponse(members=self._members.data(), trust=self._ca.trust())

    async def GetAuthority(self, request: admin_pb2.GetAuthorityRequest, context: Context) -> admin_pb2.GetAuthorityResponse:
        await self._gate.admin(context)
        return await asyncio.to_thread(self._ca.describe, request.want_csr)

    async def PutAuthority(self, request: admin_pb2.PutAuthorityRequest, context: Context) -> admin_pb2.PutAuthorityResponse:
        peer = await self._gate.admin(context)
        try:
            async with self._audited(peer, "change CA", trust=sha256(request.trust).hex()):
                await asyncio.to_thread(self._ca.put, request)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("trust document stored", admin=peer.name.name, version=self._ca.trust_version())
        return admin_pb2.PutAuthorityResponse()

    async def ReadAudit(self, request: admin_pb2.ReadAuditRequest, context: Context) -> AsyncIterator[admin_pb2.ReadAuditResponse]:
        peer = await self._gate.admin(context)
        lines = self._audit.lines()
        while batch := await asyncio.to_thread(lambda: list(islice(lines, AUDIT_LINES))):
            await self._gate.check_still_member(peer, context)
            yield admin_pb2.ReadAuditResponse(lines=batch)

    @asynccontextmanager
    async def _audited(self, peer: Peer, what: str, **asked: Any) -> AsyncIterator[None]:
        """Writes what an admin asks before it is done, and, where it is refused then, that too. Raises CosiloError where it cannot be written."""
        who = str(peer.name)
        await self._audit.write(who, what, **asked)
        try:
            yield
        except CosiloError as error:
            self._audit.note(who, f"{what}: refused", reason=printable(str(error))[:SHOWN_CHARS])
            raise

    def _note_members(self, peer: Peer, before: SignedMembers) -> None:
        after = self._members.newest()
        if after.version == before.version:
            return
        was, now = ({f"{m.role.value} {m.name}" for m in members.everyone()} for members in (before, after))
        added, removed = sorted(now - was), sorted(was - now)
        for at in range(0, max(len(added), len(removed), 1), NAMES_NOTED):  # an entry that is too long would not be written at all
            some = {"added": added[at : at + NAMES_NOTED], "removed": removed[at : at + NAMES_NOTED]}
            self._audit.note(str(peer.name), "members list in force", version=after.version, **some)

    async def _known_run(self, run: bytes, context: Context) -> None:
        if self._conductor.manifest(run) is None:
            await self._unknown_run(run, context)

    async def _possible_round(self, number: int, context: Context) -> None:
        if number > ROUND_MAX:
            await self._unknown_round(number, context)

    async def _unknown_round(self, number: int, context: Context) -> NoReturn:
        await self._gate.abort(
            context, grpc.StatusCode.NOT_FOUND, "unknown_round", f"there is no round {number}; list them with `cosilo round list`"
        )

    async def _unknown_run(self, run: bytes, context: Context) -> NoReturn:
        await self._gate.abort(
            context, grpc.StatusCode.NOT_FOUND, "unknown_run", f"no run {run.hex()[:12]} is known; list them with `cosilo run list`"
        )

    async def _refuse(self, context: Context, operation: str, error: Exception) -> None:
        wrapped = error if isinstance(error, CosiloError) else CosiloError(operation, str(error))
        await self._gate.refuse(context, wrapped)


def _role(text: str) -> Role:
    if text not in (Role.SITE.value, Role.ADMIN.value):
        raise CosiloError("invite", f"role {text[:20]!r} is neither site nor admin")
    return Role(text)
