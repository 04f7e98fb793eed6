"""A federation for the tests of the command line: its admin's folder, a scripted coordinator that serves it, and what the coordinator knows.

Fixtures, imported by name where they are used. What is scripted is cli_coordinator's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import SignedMembers, sign_members
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_server.cli.main import main
from tests.identity_parties import Founded, found
from tests.integration.cli_coordinator import Script, serving

Run = Callable[..., int]
SITES = ["east", "north", "south", "west"]
DIGEST = bytes.fromhex("1a2b3c4d5e6f" + "00" * 26)
SHORT = "1a2b3c4d5e6f"
BASE, MADE = bytes([0xAB]) * 32, bytes([0xCD]) * 32


def summary(**changes: Any) -> admin_pb2.RunSummary:
    plain: dict[str, Any] = {
        "run": DIGEST,
        "name": "digits-1",
        "state": "idle",
        "rounds_closed": 3,
        "rounds_wanted": 3,
        "aggregation": "cosilo-secagg/1",
        "checkpoint": MADE,
        "parameters": 640_000,
        "participants": SITES,
    }
    return admin_pb2.RunSummary(**{**plain, **changes})


def round_summary(number: int, phase: int = site_pb2.ROUND_PHASE_CLOSED, **changes: Any) -> admin_pb2.RoundSummary:
    plain: dict[str, Any] = {
        "round": number,
        "kind": site_pb2.ROUND_KIND_TRAIN,
        "phase": phase,
        "started_unix_s": 1_772_366_400.0,
        "seconds": 8.25,
        "attempt": 1,
        "invited": SITES,
        "survivors": SITES[:3],
        "bytes_down": 10_200_000,
        "bytes_up": 9_800_000,
        "base_digest": BASE,
        "checkpoint_digest": MADE,
    }
    return admin_pb2.RoundSummary(**{**plain, **changes})


LOSSES = {
    "has_losses": True,
    "heldout_loss": 0.5,
    "heldout_loss_by_bucket": [0.75, 0.25],
    "train_loss": 0.375,
    "clip_ratio": 0.0,
    "total_weight": 1600,
    "update_norm": 1.5,
}


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "made")


def with_sites(founded: Founded, names: list[str]) -> tuple[SignedMembers, dict[str, bytes]]:
    """The next members list, with these sites in it, and their keys."""
    keys = {name: public_bytes(make_signing_key()) for name in names}
    draft = founded.members.draft()
    for name, key in keys.items():
        draft = draft.approve(name, Role.SITE, key)
    return sign_members(founded.members, draft, founded.admin.peer.name, founded.admin_key), keys


@pytest.fixture
def own(founded: Founded, tmp_path: Path) -> Founded:
    """A federation of the test's own, for tests that change the members list."""
    return found(tmp_path / "made")


@pytest.fixture
def script(own: Founded) -> Script:
    return Script(members=own.members, runs=[summary()])


@pytest.fixture
def coordinator(own: Founded, script: Script) -> Iterator[str]:
    with serving(own, script) as address:
        yield address


@pytest.fixture
def cosilo(own: Founded, coordinator: str) -> Run:
    def run(*arguments: str) -> int:
        return main(["--admin", str(own.admin.folder), "--address", coordinator, *arguments])

    return run


def snapshot(state: str, closed: int, current: admin_pb2.RoundSummary | None = None, wanted: int = 2) -> admin_pb2.WatchRunResponse:
    return admin_pb2.WatchRunResponse(summary=summary(state=state, rounds_closed=closed, rounds_wanted=wanted), current=current)
