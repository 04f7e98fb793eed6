"""How this site stands, read from its own folder: what `cosilo-site status` and `members` say. Asks nobody outside.

Owns the shape of the answers (docs/cli-site.md). Must not know gRPC; the daemon may be running or not.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cosilo_client.config import SiteConfig
from cosilo_client.daemon import ENDPOINTS_FILE, site_identity
from cosilo_client.journal import open_ledger
from cosilo_client.pause import read_pause
from cosilo_client.spending import Spending
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.keys import fingerprint
from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.names import peer_from_certificate
from cosilo_common.identity.secret_files import read_public
from cosilo_common.manifest import parse_manifest

HTTP_TIMEOUT_S: Final = 5.0  # of the daemon on this machine


@dataclass(frozen=True)
class RunStanding:
    """One accepted run. round is the highest that this site began, 0 for none; state and reached are the ledger's."""

    run: str
    name: str
    aggregation: str
    accepted_at: str
    accepted_by: str
    round: int
    state: str
    reached: str
    outcome: str
    left_at: str
    rounds_trained: int
    hours_trained: float


@dataclass(frozen=True)
class Standing:
    """The whole answer of `status`. daemon: running or stopped; connected: null where it cannot be asked; paused: the
    pause by hand that stands, in words."""

    site: str
    federation: str
    coordinator: str
    key_fingerprint: str
    certificate_expires: str
    members_version: int
    daemon: str
    connected: bool | None
    connection: str
    paused: str | None
    runs: tuple[RunStanding, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "runs": [asdict(run) for run in self.runs]}


def standing(config: SiteConfig) -> Standing:
    """Reads how the site stands. Raises CosiloError where it has not enrolled."""
    identity = site_identity(config.state)
    peer = peer_from_certificate(read_public(identity.tls.certificate, CHAIN_BYTES_MAX))
    connected, connection = _ask_daemon(config.state)
    return Standing(
        site=identity.membership.name,
        federation=identity.membership.federation,
        coordinator=identity.membership.address,
        key_fingerprint=key_fingerprint(identity),
        certificate_expires=peer.not_after.isoformat(),
        members_version=identity.members().version,
        daemon="stopped" if connected is None else "running",
        connected=connected,
        connection=connection,
        paused=pause.words if (pause := read_pause(config.state, datetime.now(UTC))) else None,
        runs=_runs(config.state),
    )


def key_fingerprint(identity: Identity) -> str:
    """This site's signing key in the form that is read over a telephone."""
    return fingerprint(identity.signing_key().public_key().public_bytes_raw())


def members_plain(identity: Identity, members: SignedMembers) -> dict[str, Any]:
    """The answer of `members`: who belongs, as the verified list says."""
    return {
        "federation": members.list.federation,
        "version": members.version,
        "signer": members.signer,
        "members": [
            {
                "name": member.name,
                "role": member.role.value,
                "fingerprint": fingerprint(member.key),
                "this_site": member.name == identity.membership.name,
            }
            for member in members.everyone()
        ],
    }


def _runs(state: Path) -> tuple[RunStanding, ...]:
    ledger, spending = open_ledger(state), Spending(state)
    found = []
    for accepted in ledger.accepted_runs():
        manifest, last, spent = parse_manifest(accepted.manifest), ledger.last_round(accepted.run), spending.of(accepted.run)
        found.append(
            RunStanding(
                run=accepted.run.hex(),
                name=manifest.name,
                aggregation=manifest.aggregation,
                accepted_at=accepted.accepted_at,
                accepted_by=accepted.accepted_by,
                round=last.round if last else 0,
                state=last.state.value if last else "",
                reached=last.phase.name.lower() if last else "",
                outcome=last.outcome if last else "",
                left_at=ledger.left_at(accepted.run),
                rounds_trained=spent.rounds,
                hours_trained=round(spent.seconds / 3600, 3),
            )
        )
    return tuple(found)


def _ask_daemon(state: Path) -> tuple[bool | None, str]:
    """What the daemon's own /readyz says: (connected, reason), or (None, why not asked)."""
    try:
        address = json.loads((state / ENDPOINTS_FILE).read_bytes())["metrics"]
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=HTTP_TIMEOUT_S) as answer:
            return True, answer.read(1000).decode(errors="replace").strip()
    except FileNotFoundError:
        return None, "the daemon is not running"
    except urllib.error.HTTPError as error:
        return False, error.read(1000).decode(errors="replace").strip()
    except (OSError, ValueError, KeyError):
        return None, "the daemon does not answer"


def matching_run(prefix: str, runs: tuple[bytes, ...]) -> bytes:
    """The one run whose hex digest begins so. Raises CosiloError where none does, or several do."""
    found = [run for run in runs if run.hex().startswith(prefix.lower())]
    if not prefix or len(found) != 1:
        what = "no run of this site begins so" if not found else f"{len(found)} runs begin so"
        listed = ", ".join(run.hex()[:12] for run in runs[-10:]) or "none"
        raise CosiloError("find run", f"{prefix!r}: {what}", f"the newest runs that name this site: {listed}")
    return found[0]
