"""AdminService: what `cosilo` calls. Whatever needs an admin's signature arrives signed and is only checked and stored here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import NoReturn

import grpc
import structlog

from cosilo_common.errors import CosiloError
from cosilo_common.identity.endorsement import parse_preapproval
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2
from cosilo_server.conductor import Conductor
from cosilo_server.enrolment import EnrolmentDesk, OpenInvitation
from cosilo_server.membership import StoredMembers
from cosilo_server.registry import RunRegistry
from cosilo_server.services.gate import Context, Gate
from cosilo_server.services.summaries import Summaries
from cosilo_server.services.translation import KIND_FROM_WIRE
from cosilo_server.store import Store

log = structlog.get_logger(__name__)

ROUNDS_PER_ORDER_MAX = 10_000
WATCH_INTERVAL_S = 0.25  # a person reads no faster
PER_CLASS_MAX = 64


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
    ) -> None:
        self._gate = gate
        self._conductor = conductor
        self._store = store
        self._members = members
        self._desk = desk
        self._registry = registry
        self._summaries = summaries

    async def PutInvitation(self, request: admin_pb2.PutInvitationRequest, context: Context) -> admin_pb2.PutInvitationResponse:
        await self._gate.admin(context)
        try:
            invitation = OpenInvitation(
                name=request.name,
                role=_role(request.role),
                token_public=request.token_public,
                expires_unix_s=request.expires_unix_s,
                preapproval=parse_preapproval(request.preapproval) if request.preapproval else None,
            )
            await asyncio.to_thread(self._desk.invite, invitation, datetime.now(UTC))
        except (CosiloError, ValueError) as error:
            await self._refuse(context, "invite", error)
        return admin_pb2.PutInvitationResponse()

    async def ListEnrolments(self, request: admin_pb2.ListEnrolmentsRequest, context: Context) -> admin_pb2.ListEnrolmentsResponse:
        await self._gate.admin(context)
        return admin_pb2.ListEnrolmentsResponse(enrolments=await asyncio.to_thread(self._summaries.enrolments))

    async def PutMembers(self, request: admin_pb2.PutMembersRequest, context: Context) -> admin_pb2.PutMembersResponse:
        peer = await self._gate.admin(context)
        try:
            await asyncio.to_thread(self._members.put, request.members)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("members list stored", admin=peer.name.name, version=self._members.newest().version)
        return admin_pb2.PutMembersResponse()

    async def CreateRun(self, request: admin_pb2.CreateRunRequest, context: Context) -> admin_pb2.CreateRunResponse:
        peer = await self._gate.admin(context)
        try:
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
            first = await self._conductor.order(request.run, kind, request.rounds)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("rounds ordered", admin=peer.name.name, run=request.run.hex()[:12], kind=kind, rounds=request.rounds)
        return admin_pb2.StartRoundsResponse(first_round=first)

    async def StopRun(self, request: admin_pb2.StopRunRequest, context: Context) -> admin_pb2.StopRunResponse:
        peer = await self._gate.admin(context)
        try:
            await self._conductor.stop_run(request.run, request.abandon)
        except CosiloError as error:
            await self._gate.refuse(context, error)
        log.info("run stopped", admin=peer.name.name, run=request.run.hex()[:12], abandon=request.abandon)
        return admin_pb2.StopRunResponse()

    async def ListRounds(self, request: admin_pb2.ListRoundsRequest, context: Context) -> admin_pb2.ListRoundsResponse:
        await self._gate.admin(context)
        await self._known_run(request.run, context)
        return admin_pb2.ListRoundsResponse(rounds=await asyncio.to_thread(self._summaries.rounds, request.run))

    async def WatchRun(self, request: admin_pb2.WatchRunRequest, context: Context) -> AsyncIterator[admin_pb2.WatchRunResponse]:
        await self._gate.admin(context)
        await self._known_run(request.run, context)
        told: admin_pb2.WatchRunResponse | None = None
        async with self._conductor.watch() as changed:
            while True:
                await changed.wait()
                changed.clear()
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

    async def Sample(self, request: admin_pb2.SampleRequest, context: Context) -> admin_pb2.SampleResponse:
        await self._gate.admin(context)
        if not 1 <= request.per_class <= PER_CLASS_MAX:
            await self._gate.abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "bad_field", f"per_class {request.per_class} is not from 1 to {PER_CLASS_MAX}"
            )
        wanted = None if request.newest else request.round
        try:
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
        return site_pb2.GetMembersResponse(members=self._members.data())

    async def _known_run(self, run: bytes, context: Context) -> None:
        if self._conductor.manifest(run) is None:
            await self._unknown_run(run, context)

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
