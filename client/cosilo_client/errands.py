"""What a command of `cosilo-site` asks of the coordinator: one connection, one question, one answer.

Owns those short conversations. Must not know the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import grpc.aio

from cosilo_client.auditing import by_person
from cosilo_client.config import SiteConfig
from cosilo_client.coordinator import Unreachable
from cosilo_client.daemon import IDENTITY_FOLDER, site_identity
from cosilo_client.durable import make_folder
from cosilo_client.enrolment import Enrolled, enrol
from cosilo_client.joining import Candidate, accept_as_person, verify_candidate
from cosilo_client.journal import open_ledger
from cosilo_client.obstacles import explain, trusted_roots
from cosilo_client.pause import Pause, new_pause, pause_site, resume_site
from cosilo_client.standing import matching_run
from cosilo_client.transport import Transport, failure
from cosilo_common.errors import CosiloError
from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.invitation import INVITATION_BYTES_MAX, parse_invitation, read_invitation
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.tls import enrolment_channel
from cosilo_common.rpc.v1 import enrolment_pb2, enrolment_pb2_grpc

ENROL_TIMEOUT_S: Final = 30.0  # the coordinator signs a certificate and writes it down

Answer = TypeVar("Answer")


def enrol_site(config: SiteConfig, source: Path | BinaryIO) -> Enrolled:
    """Enrols this site into its state folder. source: the invitation's file, or a stream of it. Raises CosiloError."""
    invitation = read_invitation(source) if isinstance(source, Path) else parse_invitation(source.read(INVITATION_BYTES_MAX + 1))

    async def call(request: EnrolRequest) -> EnrolAnswer:
        question = enrolment_pb2.EnrolRequest(
            name=request.name,
            token_public=request.token_public,
            csr=request.csr,
            signing_key=request.signing_key,
            token_signature=request.token_signature,
            signing_signature=request.signing_signature,
        )
        way = config.coordinator.route()
        async with enrolment_channel(invitation.enrolment_address, invitation.ca.encode(), way) as channel:
            stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            try:
                answer = await stub.Enrol(question, timeout=ENROL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                failed, roots = failure("enrol", error), invitation.ca.encode()
                raise await explain(failed, invitation.enrolment_address, invitation.federation, roots, way) from None
        return EnrolAnswer(certificate_chain=answer.certificate_chain, member=answer.member, members=answer.members)

    make_folder(config.state)
    by_person(config, "enrol", federation=invitation.federation, name=invitation.name)
    return asyncio.run(enrol(invitation, config.state / IDENTITY_FOLDER, call, datetime.now(UTC)))


def newest_members(config: SiteConfig) -> tuple[Identity, SignedMembers, str]:
    """The newest members list, verified, and why it is only the last one seen where the coordinator does not answer."""
    identity = site_identity(config.state)
    try:
        data, trust = _ask(config, identity, lambda transport: transport.announced())
    except Unreachable as error:
        return identity, identity.members(), str(error)
    members = identity.take_members(data)
    identity.take_trust(trust)
    return identity, members, ""


def candidate_run(config: SiteConfig, prefix: str) -> tuple[Identity, Candidate]:
    """The one run of this site whose digest begins so, its manifest verified against the newest members list."""
    identity = site_identity(config.state)

    async def fetch(transport: Transport) -> Candidate:
        identity.take_members(await transport.members())
        run = matching_run(prefix, await transport.my_runs())
        candidate = verify_candidate(identity, await transport.run(run))
        if candidate.run != run:
            raise CosiloError("fetch run", f"{run.hex()[:12]}: another manifest came", "tell the coordinator's admin")
        return candidate

    return identity, _ask(config, identity, fetch)


def accept_candidate(config: SiteConfig, identity: Identity, candidate: Candidate) -> None:
    """Writes a person's acceptance into the ledger; a running daemon sees it within seconds."""
    by_person(config, "accept run", run=candidate.run.hex(), name=candidate.manifest.name)
    accept_as_person(identity, open_ledger(config.state), candidate, datetime.now(UTC))


def tell_of_leaving(config: SiteConfig, identity: Identity) -> None:
    """Tells the coordinator that this site leaves the federation. Raises Unreachable, Refused."""
    _ask(config, identity, lambda transport: transport.leave())


def pause_by_person(config: SiteConfig, lasting: str | None, until: str | None, reason: str, at_once: bool) -> Pause:
    """Pauses this site; a running daemon sees it within a second. Raises CosiloError where it has not enrolled."""
    site_identity(config.state)
    pause = new_pause(datetime.now().astimezone(), lasting, until, reason, at_once)
    by_person(config, "pause", until=pause.until, reason=pause.reason, now=pause.now)
    pause_site(config.state, pause)
    return pause


def resume_by_person(config: SiteConfig) -> bool:
    """Ends a pause; False where none stood."""
    site_identity(config.state)
    by_person(config, "resume")
    return resume_site(config.state)


def _ask(config: SiteConfig, identity: Identity, question: Callable[[Transport], Awaitable[Answer]]) -> Answer:
    async def conversation() -> Answer:
        transport = Transport.open(
            identity.membership.address,
            identity.tls,
            timeout_s=config.network.timeout_s,
            stall_s=config.network.stall_s,
            proxy=config.coordinator.route(),
        )
        try:
            return await question(transport)
        except Unreachable as error:
            membership = identity.membership
            raise await explain(
                error, membership.address, membership.federation, trusted_roots(identity.tls), config.coordinator.route()
            ) from None
        finally:
            await transport.close()

    return asyncio.run(conversation())
