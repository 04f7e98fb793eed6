"""The coordinator of a real masked federation is killed in every phase: it finishes the round, nobody trains twice, and no bit differs.

Two runs that are one training: the same seeds, so the same rounds. One is left alone; in the other the coordinator is killed once a round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cosilo_server.rounds.state import Phase
from tests.federation.digits import digits_sites
from tests.federation.faults import fail_at
from tests.federation.local import COORDINATOR, LocalFederation
from tests.system.test_reference import TRAINING, plan

SEED = 81
PHASES = [phase for phase in Phase if phase not in (Phase.CLOSED, Phase.ABANDONED)]
# A site is held for as long as a coordinator takes to start; nobody is to be late in these rounds.
PATIENT = {f"{what}_s": 120.0 for what in ("gather", "training", "sharing", "uploading", "consenting", "revealing")}
IMAGES = TRAINING["max_steps"] * TRAINING["batch_size"]  # of a site in a round: every site has more than that many


class EagerFederation(LocalFederation):
    """Its sites wait a second at most before they look for the coordinator again, however often it has gone away."""

    def enrol(self, site: str) -> None:
        super().enrol(site)
        with self.config(site).open("a", encoding="utf-8") as file:
            file.write("\n[network]\nbackoff_min_s = 0.5\nbackoff_max_s = 1.0\n")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("coordinator-killed")
    with EagerFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1)) as federation:
        federation.start()
        yield federation


@pytest.fixture(scope="module")
def undisturbed(federation: LocalFederation) -> list[dict[str, object]]:
    """The rounds of the run that is left alone."""
    run = federation.create_run(plan("left-alone", seed=SEED, deadlines=PATIENT))
    federation.accept_all(run)
    rounds = federation.run_rounds(run, len(PHASES))
    assert [(entry["phase"], entry["attempt"], entry["survivors"]) for entry in rounds] == [("closed", 1, sorted(federation.sites))] * len(
        PHASES
    )
    return rounds


@pytest.fixture(scope="module")
def run(federation: LocalFederation, undisturbed: list[dict[str, object]]) -> str:
    run = federation.create_run(plan("disturbed", seed=SEED, deadlines=PATIENT))
    federation.accept_all(run)
    return run


@pytest.mark.parametrize("phase", PHASES, ids=[phase.value for phase in PHASES])
def test_a_coordinator_killed_in_a_phase_finishes_the_same_round(
    federation: LocalFederation, undisturbed: list[dict[str, object]], run: str, phase: Phase
) -> None:
    before = images(federation)
    fail_at(federation, run, phase, COORDINATOR)
    federation.wait_idle(run)

    entry = federation.rounds(run)[-1]
    expected = undisturbed[entry["round"] - 1]
    for key in ("phase", "attempt", "invited", "survivors", "base", "checkpoint", "bytes_up"):
        assert entry[key] == expected[key], key
    assert images(federation) == {site: seen + IMAGES for site, seen in before.items()}
    assert {site: trainings(federation, site, run, entry["round"]) for site in federation.sites} == dict.fromkeys(federation.sites, 1)
    resumed = events(federation, COORDINATOR, "round resumed", run, entry["round"])
    assert resumed == [{"phase": phase.value}]


def images(federation: LocalFederation) -> dict[str, float]:
    """Images that each site's daemon has trained on in its life."""
    return {site: federation.metric(site, "cosilo_images_total") for site in federation.sites}


def trainings(federation: LocalFederation, site: str, run: str, number: int) -> int:
    """How often a site's log says that it trained in a round."""
    lines = (json.loads(line) for line in federation.log(site).splitlines() if line.startswith("{"))
    return sum(line["event"] == "trained" and line["round"] == f"{run[:12]}/{number}" for line in lines)


def events(federation: LocalFederation, who: str, event: str, run: str, number: int) -> list[dict[str, object]]:
    """The phases of an event in the coordinator's log."""
    lines = (json.loads(line) for line in federation.log(who).splitlines() if line.startswith("{"))
    return [{"phase": line["phase"]} for line in lines if (line["event"], line.get("run"), line.get("round")) == (event, run, number)]
