"""`cosilo admin enrol`: a second admin takes up an invitation. Keys are made here, in a folder that only they can read.

Runs again after a failure with the same keys, so that an answer that got lost costs nothing. Must not know the
members list's rules.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import ADMIN_VARIABLE
from cosilo_server.cli.terminal import note, say

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest
    from cosilo_common.identity.invitation import Invitation
    from cosilo_common.identity.keys import TlsKey

STANDARD_INPUT = "-"


def enrol_admin(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The invitation, or - for standard input.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The new admin's folder.", show_default=False)],
) -> None:
    """Enrol as an admin with an invitation's file."""
    from cosilo_common.identity.enrolment import check_answer, make_request
    from cosilo_common.identity.folder import (
        ADMIN_FILE,
        CA_FILE,
        MEMBERS_FILE,
        TLS_CERTIFICATE_FILE,
        Membership,
        membership_toml,
    )
    from cosilo_common.identity.invitation import INVITATION_BYTES_MAX, parse_invitation, read_invitation
    from cosilo_common.identity.keys import fingerprint, public_bytes
    from cosilo_common.identity.names import Role
    from cosilo_common.identity.secret_files import replace_file

    if file == STANDARD_INPUT:
        invitation = parse_invitation(sys.stdin.buffer.read(INVITATION_BYTES_MAX + 1))
    else:
        invitation = read_invitation(Path(file))
    if invitation.role is not Role.ADMIN:
        raise CosiloError(
            "enrol",
            f"the invitation is for {invitation.peer()}, not for an admin",
            f"{invitation.name} runs cosilo-site enrol",
        )
    to = to.expanduser()
    if (to / ADMIN_FILE).exists():
        raise CosiloError("enrol", f"{to} is an admin's folder already", "choose another folder")
    tls_key, signing_key = _keys(to)
    answer = asyncio.run(_ask(invitation, make_request(invitation, tls_key, signing_key)))
    members = check_answer(invitation, tls_key, signing_key, answer, datetime.now(UTC))
    membership = Membership(
        federation=invitation.federation,
        role=Role.ADMIN,
        name=invitation.name,
        address=invitation.address,
        enrolment_address=invitation.enrolment_address,
        anchor=invitation.anchor,
    )
    # admin.toml comes last: with it the folder is one that every command takes.
    replace_file(to / CA_FILE, invitation.ca.encode())
    replace_file(to / TLS_CERTIFICATE_FILE, answer.certificate_chain)
    replace_file(to / MEMBERS_FILE, members.canonical())
    replace_file(to / ADMIN_FILE, membership_toml(membership))
    say(f"enrolled as {invitation.peer()} of {invitation.federation}, with the key")
    say(f"    {fingerprint(public_bytes(signing_key))}")
    if not answer.member:
        note(f"next: read that fingerprint to {invitation.admin} over a telephone")
        note(f"then: {invitation.admin} runs cosilo admin approve {invitation.name}")
    note(f"then: export {ADMIN_VARIABLE}={to.resolve()}")


def _keys(folder: Path) -> tuple[TlsKey, Ed25519PrivateKey]:
    """The folder's two keys, made where they are missing."""
    from cosilo_common.identity.folder import SIGNING_KEY_FILE, TLS_KEY_FILE
    from cosilo_common.identity.keys import (
        load_signing_key,
        load_tls_key,
        make_signing_key,
        make_tls_key,
        save_private_key,
    )
    from cosilo_common.identity.secret_files import SECRET_FOLDER_MODE

    try:
        folder.mkdir(mode=SECRET_FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise CosiloError("enrol", f"{folder}: {error.strerror}", "choose another folder") from None
    if not (folder / TLS_KEY_FILE).exists():
        save_private_key(folder / TLS_KEY_FILE, make_tls_key())
    if not (folder / SIGNING_KEY_FILE).exists():
        save_private_key(folder / SIGNING_KEY_FILE, make_signing_key())
    return load_tls_key(folder / TLS_KEY_FILE), load_signing_key(folder / SIGNING_KEY_FILE)


async def _ask(invitation: Invitation, request: EnrolRequest) -> EnrolAnswer:
    from cosilo_server.cli.connection import ANSWER_TIMEOUT_S, in_words, quiet_grpc

    quiet_grpc()
    import grpc.aio

    from cosilo_common.identity.enrolment import EnrolAnswer
    from cosilo_common.identity.tls import enrolment_channel
    from cosilo_common.rpc.v1 import enrolment_pb2
    from cosilo_common.rpc.v1.enrolment_pb2_grpc import EnrolmentServiceStub

    question = enrolment_pb2.EnrolRequest(
        name=request.name,
        token_public=request.token_public,
        csr=request.csr,
        signing_key=request.signing_key,
        token_signature=request.token_signature,
        signing_signature=request.signing_signature,
    )
    async with enrolment_channel(invitation.enrolment_address, invitation.ca.encode()) as channel:
        try:
            answer = await EnrolmentServiceStub(channel).Enrol(question, timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise in_words(error, "enrol", invitation.enrolment_address) from None
    return EnrolAnswer(certificate_chain=answer.certificate_chain, member=answer.member, members=answer.members)
