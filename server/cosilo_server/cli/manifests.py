"""A run's manifest as an admin may believe it: fetched, and its signature checked against the verified members list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosilo_common.errors import CosiloError
from cosilo_server.cli.members import fetch_members
from cosilo_server.cli.terminal import short

if TYPE_CHECKING:
    from cosilo_common.manifest import Manifest
    from cosilo_server.cli.connection import Coordinator


def fetch_manifest(coordinator: Coordinator, run: bytes) -> tuple[Manifest, str]:
    """The manifest of a run (SHA-256, 32 bytes) and the admin who signed it.

    Raises CosiloError where the bytes are of another run, or are not signed by an admin of the newest members list.
    """
    from cosilo_common.canonical import sha256
    from cosilo_common.manifest import verify_manifest
    from cosilo_common.rpc.v1 import site_pb2

    answer = coordinator.ask("fetch manifest", coordinator.admin.GetManifest, site_pb2.GetRunRequest(run=run))
    if sha256(answer.manifest) != run:
        raise CosiloError(
            "verify manifest",
            f"the coordinator answered with another run than {short(run)}",
            "do not trust this coordinator",
        )
    admins = fetch_members(coordinator).admins()
    return verify_manifest(answer.manifest, answer.signature, admins, coordinator.identity.peer.federation)
