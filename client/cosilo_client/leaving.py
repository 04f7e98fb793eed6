"""Leaving a run, or the federation: the words before, the deed, and what remains afterwards and where.

Owns what is destroyed and what is kept. The ledger is kept whole: what was signed was signed, and a key that comes back must not sign it
again. Must not know the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cosilo_client.auditing import by_person
from cosilo_client.config import SiteConfig
from cosilo_client.coordinator import Refused, Unreachable
from cosilo_client.daemon import ARTIFACTS_FOLDER, ENDPOINTS_FILE, IDENTITY_FOLDER, site_identity
from cosilo_client.durable import remove_folder, shred, unlink_durably
from cosilo_client.errands import tell_of_leaving
from cosilo_client.journal import DATABASE_NAME, ROUNDS_FOLDER, locked_folder, open_ledger
from cosilo_client.ledger import RoundState
from cosilo_client.pause import PAUSE_FILE
from cosilo_client.personal import PERSONAL_FOLDER, PersonalLayers
from cosilo_client.standing import key_fingerprint, matching_run
from cosilo_common.audit import AUDIT_FILE
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Identity
from cosilo_common.manifest import Manifest, parse_manifest

LEFT_FEDERATION: Final = "this site left the federation"
_CONTRIBUTED: Final = "what this site put into sums that were opened is in the model, and in every copy of it: nobody can take it out"


@dataclass(frozen=True)
class LeavingRun:
    """A run that a person may leave. uploads: rounds of it in which this site handed one in."""

    manifest: Manifest
    uploads: int

    @property
    def run(self) -> bytes:
        """SHA-256 of the manifest."""
        return self.manifest.digest()


@dataclass(frozen=True)
class LeftFederation:
    """What came of leaving. problem: why the coordinator does not know, empty where it does; remains: lines for a person."""

    name: str
    federation: str
    fingerprint: str
    problem: str
    unreachable: bool
    remains: tuple[str, ...]


def run_to_leave(config: SiteConfig, prefix: str) -> LeavingRun:
    """The accepted run whose digest begins so. Raises CosiloError where none or several do, or where it is left already."""
    ledger = open_ledger(config.state)
    accepted = {entry.run: entry for entry in ledger.accepted_runs()}
    run = matching_run(prefix, tuple(accepted))
    if at := ledger.left_at(run):
        raise CosiloError(
            "leave run", f"{run.hex()[:12]}: this site left it at {at}", f"to take part again: cosilo-site accept {run.hex()[:12]}"
        )
    return LeavingRun(parse_manifest(accepted[run].manifest), ledger.upload_count(run))


def explain_leaving_run(config: SiteConfig, leaving: LeavingRun) -> str:
    """What leaving this run ends, and what it does not."""
    return "\n".join(
        [
            f"Run {leaving.run.hex()}",
            f'  "{leaving.manifest.name}", of federation {leaving.manifest.federation}',
            "",
            "What ends",
            "  this site's consent: the daemon declines every round of this run, training that runs is stopped, and what it had trained is deleted",
            *(["  the layers of it that stay at this site are deleted"] if leaving.manifest.training.personal else []),
            "  [policy] accepts this run no more by itself; only a person does, with cosilo-site accept",
            "",
            "What does not end",
            "  a round whose upload the coordinator already has: this site still signs for its sum, under masks as before",
            "  the run: it goes on with the other sites while enough are left",
            "",
            "What remains",
            f"  {config.state / DATABASE_NAME}: that the run was accepted, what was signed in it, that it was left",
            f"  {config.state / AUDIT_FILE}: who did what",
            *([f"  in the federation: uploads of {leaving.uploads} rounds; {_CONTRIBUTED}"] if leaving.uploads else []),
        ]
    )


def leave_run(config: SiteConfig, leaving: LeavingRun) -> None:
    """Withdraws the acceptance; a running daemon sees it within seconds."""
    by_person(config, "leave run", run=leaving.run.hex(), name=leaving.manifest.name)
    open_ledger(config.state).leave(leaving.run, at=datetime.now(UTC).isoformat())
    PersonalLayers(config.state).forget(leaving.run)  # killed before this, the daemon's next start does it


def explain_leaving_federation(config: SiteConfig) -> str:
    """What leaving the federation ends, destroys and keeps. Raises CosiloError where this site has not enrolled."""
    identity = site_identity(config.state)
    return "\n".join(
        [
            f"Site {identity.membership.name} of federation {identity.membership.federation}",
            f"  key {key_fingerprint(identity)}",
            "",
            "What happens, in this order",
            "  the coordinator is told: it bars this site's certificate at once and shows its admins that it left",
            "  this site leaves every run; a round in progress goes on without it",
            f"  destroyed: the keys and certificates in {config.state / IDENTITY_FOLDER}, and of an earlier enrolment beside it (identity.old)",
            "  destroyed: the keys and updates of rounds in progress",
            f"  deleted: fetched weights in {config.state / ARTIFACTS_FOLDER}",
            "",
            "What remains",
            *_remains(config),
            "",
            "It cannot be undone: to come back, this site needs a new invitation and gets new keys.",
        ]
    )


def leave_federation(config: SiteConfig) -> LeftFederation:
    """Tells the coordinator, then destroys this site's keys whether it could be told or not.

    Run again after a crash it finishes. Raises CosiloError where the daemon runs, or this site has not enrolled.
    """
    with locked_folder(config.state):
        identity = site_identity(config.state)
        name, federation, fingerprint = identity.membership.name, identity.membership.federation, key_fingerprint(identity)
        by_person(config, "leave federation", federation=federation, name=name, key=fingerprint)
        problem, unreachable = _tell(config, identity)
        _withdraw(config)
        for path in _secrets(config.state):
            shred(path)
        for folder in (
            ROUNDS_FOLDER,
            PERSONAL_FOLDER,
            ARTIFACTS_FOLDER,
            *_identities(config.state),
        ):  # the identity last: without it nothing says that this is half done
            remove_folder(config.state / folder)
        unlink_durably(config.state / PAUSE_FILE, config.state / ENDPOINTS_FILE)
        by_person(config, "left federation", federation=federation, name=name, coordinator_told=not problem)
    return LeftFederation(name, federation, fingerprint, problem, unreachable, tuple(_remains(config)))


def _tell(config: SiteConfig, identity: Identity) -> tuple[str, bool]:
    try:
        tell_of_leaving(config, identity)
    except Unreachable as error:
        return str(error), True
    except Refused as error:
        return str(error), False
    except CosiloError as error:  # its certificate files cannot be used: it can call nobody any more
        return str(error), True
    return "", False


def _withdraw(config: SiteConfig) -> None:
    ledger, at = open_ledger(config.state), datetime.now(UTC).isoformat()
    for accepted in ledger.accepted_runs():
        ledger.leave(accepted.run, at=at)
    for entry in ledger.open_rounds():
        ledger.finish_round(entry.run, entry.round, RoundState.ABANDONED, LEFT_FEDERATION)


def _secrets(state: Path) -> Iterator[Path]:
    """Files whose bytes are overwritten before they are unlinked: keys, and what was trained here and no mask covers."""
    yield from sorted(path for path in (state / PERSONAL_FOLDER).rglob("*") if path.is_file())
    for folder in (state / ROUNDS_FOLDER, *(state / name for name in _identities(state))):
        yield from sorted(path for path in folder.rglob("*") if path.is_file() and (".key" in path.name or path.name.startswith("update")))


def _identities(state: Path) -> tuple[str, ...]:
    """Folders with this site's keys: those of earlier enrolments, moved aside as identity.old or the like, then today's."""
    return (*sorted(path.name for path in state.glob(f"{IDENTITY_FOLDER}.*") if path.is_dir() and not path.is_symlink()), IDENTITY_FOLDER)


def _remains(config: SiteConfig) -> list[str]:
    return [
        f"  {config.state / DATABASE_NAME}: the ledger of what this site accepted and signed; it holds no key that opens anything",
        f"  {config.state / AUDIT_FILE}: who did what here",
        f"  images and labels ({config.data.path or config.data.kind}), and this site's TOML: untouched",
        "  copies of the state folder that were made before: they hold the old keys; destroy them too",
        f"  in the federation: {_CONTRIBUTED}",
    ]
