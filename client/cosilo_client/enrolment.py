"""Enrols this site: makes its keys, asks with an invitation, checks the answer, and writes the identity folder whole or
not at all.

The folder is prepared beside its place as `NAME.pending` and renamed when everything in it is checked. The request is
on the disk before it is sent, so a run after a crash, or after an answer that never came, asks again with the same
keys, which the coordinator answers with the same certificate.
The wire is a callable that is passed in. Must not know grpc or the clock.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import Field

from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import Bytes32, Document, Name, parse_document
from cosilo_common.identity.enrolment import EnrolAnswer, EnrolRequest, check_answer, make_request
from cosilo_common.identity.folder import (
    CA_FILE,
    FEDERATION_FILE,
    MEMBERS_FILE,
    SIGNING_KEY_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
    Identity,
    Membership,
    load_identity,
    membership_json,
)
from cosilo_common.identity.invitation import Invitation
from cosilo_common.identity.keys import (
    fingerprint,
    load_signing_key,
    load_tls_key,
    make_signing_key,
    make_tls_key,
    public_bytes,
    save_private_key,
)
from cosilo_common.identity.names import Role
from cosilo_common.identity.secret_files import SECRET_FOLDER_MODE, read_public, replace_file, sync_folder, write_public

PENDING_FILE = "pending.json"
PENDING_BYTES_MAX = 16 * 1024  # a request of at most 4 KiB of CSR, in hex

CallEnrol = Callable[[EnrolRequest], Awaitable[EnrolAnswer]]


@dataclass(frozen=True, slots=True)
class Enrolled:
    """How an enrolment ended.

    member: already one, or waiting for an admin; key_fingerprint: of this site's signing key, to read to the admin over
    a telephone.
    """

    identity: Identity
    member: bool
    key_fingerprint: str


class _Pending(Document):
    """The request as it was first sent, so that it can be sent again byte for byte."""

    federation: Name
    name: Name
    token_public: Bytes32
    csr: str = Field(max_length=2 * 4096, pattern="^[0-9a-f]*$")
    token_signature: str = Field(pattern="^[0-9a-f]{128}$")
    signing_signature: str = Field(pattern="^[0-9a-f]{128}$")


async def enrol(invitation: Invitation, folder: Path, call: CallEnrol, now: datetime) -> Enrolled:
    """Enrols a site into `folder`, which must not exist yet; its parent must.

    call: the wire, which raises what it raises: run again to go on with the same keys. Raises CosiloError with what to
    do where the invitation is not a site's, the folder is there, another invitation's enrolment is under way in it, or
    the answer is not what was asked for.
    """
    if invitation.role is not Role.SITE:
        raise CosiloError(
            "enrol",
            f"the invitation is for {invitation.peer()}, not for a site",
            "use it with the admin's command, cosilo",
        )
    _check_free(folder)
    pending = folder.with_name(f"{folder.name}.pending")
    request = _resume(pending, invitation) if (pending / PENDING_FILE).exists() else _begin(pending, invitation)
    answer = await call(request)

    tls_key = load_tls_key(pending / TLS_KEY_FILE)
    signing_key = load_signing_key(pending / SIGNING_KEY_FILE)
    members = check_answer(invitation, tls_key, signing_key, answer, now)
    membership = Membership(
        federation=invitation.federation,
        role=invitation.role,
        name=invitation.name,
        address=invitation.address,
        enrolment_address=invitation.enrolment_address,
        anchor=invitation.anchor,
    )
    contents = {
        TLS_CERTIFICATE_FILE: answer.certificate_chain,
        CA_FILE: invitation.ca.encode("ascii"),
        MEMBERS_FILE: members.canonical(),
        FEDERATION_FILE: membership_json(membership),
    }
    _finish(pending, folder, contents)
    return Enrolled(load_identity(folder), answer.member, fingerprint(public_bytes(signing_key)))


def _check_free(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise CosiloError("enrol", f"{folder.parent} is not a folder", "make it first, for the site's daemon alone (mode 0700)")
    if not folder.exists():
        return
    try:
        peer = load_identity(folder).peer
    except CosiloError:
        raise CosiloError("enrol", f"{folder} exists and is not an identity folder", "choose another folder") from None
    raise CosiloError("enrol", f"{folder} holds the identity of {peer.uri()}", "it is enrolled; to enrol anew, move it away first")


def _begin(pending: Path, invitation: Invitation) -> EnrolRequest:
    try:
        if pending.exists():
            shutil.rmtree(pending)  # a run that was killed before it had asked anything: its keys are known to nobody
        pending.mkdir(mode=SECRET_FOLDER_MODE)
    except OSError as error:
        raise CosiloError("enrol", f"{pending}: {error.strerror}", "correct the folder's rights and try again") from None
    tls_key, signing_key = make_tls_key(), make_signing_key()
    save_private_key(pending / TLS_KEY_FILE, tls_key)
    save_private_key(pending / SIGNING_KEY_FILE, signing_key)
    request = make_request(invitation, tls_key, signing_key)
    record = _Pending(
        federation=invitation.federation,
        name=request.name,
        token_public=request.token_public,
        csr=request.csr.hex(),
        token_signature=request.token_signature.hex(),
        signing_signature=request.signing_signature.hex(),
    )
    replace_file(pending / PENDING_FILE, json.dumps(record.model_dump(mode="json"), indent=2).encode("ascii") + b"\n")
    sync_folder(pending.parent)
    return request


def _resume(pending: Path, invitation: Invitation) -> EnrolRequest:
    data = read_public(pending / PENDING_FILE, PENDING_BYTES_MAX)
    record = parse_document(_Pending, data, PENDING_BYTES_MAX, f"read {PENDING_FILE}", canonical=False)
    if record.token_public != invitation.token_public():
        raise CosiloError(
            "enrol",
            f"{pending} holds an enrolment of {record.name} that was begun with another invitation",
            "go on with that invitation, or remove that folder to begin anew",
        )
    return EnrolRequest(
        name=record.name,
        token_public=record.token_public,
        csr=bytes.fromhex(record.csr),
        signing_key=public_bytes(load_signing_key(pending / SIGNING_KEY_FILE)),
        token_signature=bytes.fromhex(record.token_signature),
        signing_signature=bytes.fromhex(record.signing_signature),
    )


def _finish(pending: Path, folder: Path, contents: dict[str, bytes]) -> None:
    try:
        for name, data in contents.items():
            (pending / name).unlink(missing_ok=True)  # of a run that was killed right here
            write_public(pending / name, data)
        sync_folder(pending)
        pending.rename(folder)
        sync_folder(folder.parent)
        (folder / PENDING_FILE).unlink(missing_ok=True)  # only now: until the rename it is what a new run resumes from
    except OSError as error:
        raise CosiloError("enrol", f"{folder}: {error.strerror}", "correct that and run the enrolment again: it goes on") from None
