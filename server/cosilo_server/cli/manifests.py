"""A run's manifest as an admin may believe it: fetched, and its signature checked against the verified members list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosilo_common.errors import CosiloError
from cosilo_server.cli.members import fetch_members
from cosilo_server.cli.terminal import short

if TYPE_CHECKING:
    from cosilo_common.manifest import Manifest
    from cosilo_common.rpc.v1.site_pb2 import GetRunResponse
    from cosilo_server.cli.connection import Coordinator


@dataclass(frozen=True)
class SignedManifest:
    """A manifest whose signature holds. signer: an admin in that version of the members list; signature: Ed25519, 64 bytes."""

    manifest: Manifest
    signer: str
    signature: bytes
    members_version: int


def fetch_manifest(coordinator: Coordinator, run: bytes) -> tuple[Manifest, str]:
    """The manifest of a run (SHA-256, 32 bytes) and the admin who signed it. Raises as `fetch_signed_manifest`."""
    signed = fetch_signed_manifest(coordinator, run)
    return signed.manifest, signed.signer


def fetch_signed_manifest(coordinator: Coordinator, run: bytes) -> SignedManifest:
    """The manifest of a run (SHA-256, 32 bytes), with who signed it and how.

    Raises CosiloError where the bytes are of another run, or are not signed by an admin of the newest members list.
    """
    from cosilo_common.manifest import verify_manifest

    answer = fetch_unsigned(coordinator, run)
    members = fetch_members(coordinator)
    manifest, signer = verify_manifest(answer.manifest, answer.signature, members.admins(), coordinator.identity.peer.federation)
    return SignedManifest(manifest, signer, answer.signature, members.version)


def fetch_unsigned(coordinator: Coordinator, run: bytes) -> GetRunResponse:
    """What the coordinator has of a run: its manifest, by the digest, and a signature that nobody has looked at. Raises CosiloError."""
    from cosilo_common.canonical import sha256
    from cosilo_common.rpc.v1 import site_pb2

    answer = coordinator.ask("fetch manifest", coordinator.admin.GetManifest, site_pb2.GetRunRequest(run=run))
    if sha256(answer.manifest) != run:
        raise CosiloError(
            "verify manifest",
            f"the coordinator answered with another run than {short(run)}",
            "do not trust this coordinator",
        )
    return answer
