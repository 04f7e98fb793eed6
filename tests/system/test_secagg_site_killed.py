"""A site of a real masked federation is killed in each phase: the round closes without it, and its numbers are exact.

Which sites are in the sum follows from the phase. A site that dies before its upload is out of it. One that dies after its upload is in it:
the others open the sum of all four without its help (PROTOCOL.md, phases 5 and 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from cosilo_common.diffusion.model import tensor_table
from cosilo_common.weights import open_vector
from cosilo_server.rounds.state import Phase
from tests.federation.digits import digits_sites
from tests.federation.faults import fail_at, trainer_of
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import wait_until
from tests.system.test_reference import CAP, CLIP, Vector, plan, recipe_of, site_data, train_at_site

# Seconds without progress. A round waits as long for a site that is gone, so they are short; but training_s is long for the runs in which
# a site that was started again has to start its trainer too, and short for the one in which a site is killed while it trains.
SHORT_S, COLD_S = 6.0, 120.0
LARGEST = (2**31 - 1) // 4  # PROTOCOL.md, Encoding: Q for four participants, whoever of them is in the sum


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("site-killed")
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1)) as federation:
        federation.start()
        yield federation


@dataclass(frozen=True)
class Run:
    """A masked run of all four sites. seed: of its training."""

    digest: str
    seed: int


@pytest.fixture(scope="module")
def run(federation: LocalFederation) -> Run:
    """Its training deadline lets a trainer start; every test has rounds of its own in it. One has closed, so that trainers are warm."""
    found = make_run(federation, "site-killed", 32, COLD_S)
    (entry,) = federation.run_rounds(found.digest, 1)
    assert entry["phase"] == "closed"
    return found


def make_run(federation: LocalFederation, name: str, seed: int, training_s: float) -> Run:
    deadlines = {"training_s": training_s, "sharing_s": SHORT_S, "uploading_s": SHORT_S, "consenting_s": COLD_S, "revealing_s": COLD_S}
    digest = federation.create_run(plan(name, seed=seed, deadlines=deadlines))
    federation.accept_all(digest)
    return Run(digest, seed)


@pytest.fixture(autouse=True)
def _as_a_trainer_does() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


# (the phase, which site by name's order, whether its update is in the sum, the attempt that is opened)
CASES = [
    (Phase.SHARING, 0, False, 2),
    (Phase.UPLOADING, 3, False, 1),
    (Phase.CONSENTING, 1, True, 1),
    (Phase.REVEALING, 0, True, 1),
]


@pytest.mark.parametrize(("phase", "place", "summed", "attempt"), CASES, ids=[case[0].value for case in CASES])
def test_a_site_killed_in_a_phase_is_done_without_and_takes_part_in_the_next_round(
    federation: LocalFederation, run: Run, phase: Phase, place: int, summed: bool, attempt: int
) -> None:
    victim = sorted(federation.sites)[place]
    kill_and_check(federation, run, phase, victim, summed, attempt)
    federation.restart(victim)
    entry = federation.run_rounds(run.digest, 1)[-1]
    assert (entry["phase"], entry["attempt"], entry["survivors"]) == ("closed", 1, sorted(federation.sites))
    check_against_the_loop(federation, run, entry)


def test_a_site_killed_while_it_trains_is_done_without_and_takes_part_in_the_next_round(federation: LocalFederation, run: Run) -> None:
    impatient = make_run(federation, "site-killed-training", 31, SHORT_S)
    victim = sorted(federation.sites)[2]
    kill_and_check(federation, impatient, Phase.TRAINING, victim, summed=False, attempt=1)
    federation.restart(victim)
    entry = federation.run_rounds(run.digest, 1)[-1]
    assert (entry["phase"], entry["survivors"]) == ("closed", sorted(federation.sites))
    check_against_the_loop(federation, run, entry)


def kill_and_check(federation: LocalFederation, run: Run, phase: Phase, victim: str, summed: bool, attempt: int) -> None:
    others = [site for site in sorted(federation.sites) if site != victim]
    dropouts, attempts = counted(federation, "cosilo_secagg_dropouts_total"), counted(federation, "cosilo_secagg_attempts_total")
    fail_at(federation, run.digest, phase, victim)
    assert not federation.daemon(victim).alive
    federation.wait_idle(run.digest)
    entry = federation.rounds(run.digest)[-1]
    assert (entry["phase"], entry["reason"], entry["attempt"]) == ("closed", "", attempt)
    assert entry["invited"] == sorted(federation.sites)
    assert entry["survivors"] == (sorted(federation.sites) if summed else others)
    assert counted(federation, "cosilo_secagg_dropouts_total") - dropouts == Counter({} if summed else {phase.value: 1})
    assert counted(federation, "cosilo_secagg_attempts_total") - attempts == +Counter(opened=1, repeated=attempt - 1)
    check_against_the_loop(federation, run, entry)
    wait_until(lambda: trainer_of(federation, victim) is None, "the killed daemon's trainer is gone", COLD_S)


def check_against_the_loop(federation: LocalFederation, run: Run, entry: dict[str, Any]) -> None:
    """The round's checkpoint is one small loop's over its survivors: within the encoding's bound, and bit for bit in its integers."""
    recipe, number = recipe_of(run.seed), entry["round"]
    table = tensor_table(recipe.architecture)
    base, checkpoint = (np.array(open_vector(federation.artifact(entry[key]), table)) for key in ("base", "checkpoint"))
    updates = [train_at_site(number, site, site_data(federation)[site], base, recipe) for site in entry["survivors"]]
    total = sum(weight for weight, _ in updates)
    assert entry["losses"]["total_weight"] == total
    exact = sum((weight / total * update.astype(np.float64) for weight, update in updates), np.zeros(base.size))
    summed = sum((integers(weight, update) for weight, update in updates), np.zeros(base.size, np.int64))
    mean = (summed * (CLIP / LARGEST * CAP / total)).astype(np.float32)
    # Half a unit a survivor, scaled as the mean is; then the mean and the weights are rounded to float32.
    bound = len(updates) * CLIP / LARGEST * CAP / (2 * total) + np.spacing(np.abs(mean)) / 2 + np.spacing(np.abs(checkpoint)) / 2
    assert np.all(np.abs(checkpoint - (base + exact)) <= bound)
    assert np.array_equal(checkpoint, base + mean)
    assert np.abs(checkpoint - base).max() > 1e-4  # it did train


def integers(weight: int, update: Vector) -> np.ndarray[Any, np.dtype[np.int64]]:
    """PROTOCOL.md, Encoding at b = 32."""
    return np.rint(weight / CAP * LARGEST / CLIP * update.astype(np.float64)).astype(np.int64)


def counted(federation: LocalFederation, name: str) -> Counter[str]:
    """A counter of the coordinator's by its one label."""
    return Counter({next(iter(labels.values())): int(value) for sample, labels, value in federation.metrics(COORDINATOR) if sample == name})
