"""A run's manifest as an admin may believe it: fetched, its signature checked against the verified members list, and said in a few words."""

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


def terms_in_words(manifest: Manifest) -> list[tuple[str, str]]:
    """What the sites agreed to, in a few lines."""
    architecture, training, server = manifest.architecture, manifest.training, manifest.server_optimiser
    ema = f", moving average {manifest.ema_decay:g}" if manifest.ema_decay else ""
    return [
        ("a round needs", f"{manifest.least_invited} sites (n_min {manifest.n_min}, f {manifest.f})"),
        ("rounds at most", str(manifest.rounds_max)),
        ("images", f"{architecture.sample_size} pixels a side, {architecture.num_classes} classes"),
        ("training", f"{training.local_epochs} epochs of batches of {training.batch_size}, at {training.learning_rate:g}"),
        ("server", f"{server.kind} at {server.learning_rate:g}{ema}"),
    ]
