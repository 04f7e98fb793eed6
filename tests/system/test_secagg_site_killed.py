"""A site of a real masked federation is killed in each phase: the round closes without it, and its numbers are exact.

Which sites are in the sum follows from the phase. A site that dies before its upload is out of it. One that dies after its upload is in it:
the others open the sum of all four without its help (PROTOCOL.md, phases 5 and 6).
"""

from __future__ import annotations

from collections.abc import Iterator
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

SEED = 31
# Seconds without progress. A round waits as long for a site that is gone; a cold trainer beside three others takes eight to answer.
DEADLINES = {"training_s": 20.0, "sharing_s": 4.0, "uploading_s": 4.0, "consenting_s": 20.0, "revealing_s": 20.0}
LARGEST = (2**31 - 1) // 4  # PROTOCOL.md, Encoding: Q for four participants, whoever of them is in the sum


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("site-killed")
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1)) as federation:
        federation.start()
        yield federation


@pytest.fixture(scope="module")
def run(federation: LocalFederation) -> str:
    """One masked run of all four; every test below has rounds of its own in it."""
    run = federation.create_run(plan("site-killed", seed=SEED, deadlines=DEADLINES))
    federation.accept_all(run)
    return run


@pytest.fixture(autouse=True)
def _as_a_trainer_does() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


# (the phase, which site by name's order, whether its update is in the sum, the attempt that is opened, where the drop is counted)
CASES = [
    (Phase.TRAINING, 2, False, 1, "training"),
    (Phase.SHARING, 0, False, 2, "sharing"),
    (Phase.UPLOADING, 3, False, 1, "uploading"),
    (Phase.CONSENTING, 1, True, 1, None),
    (Phase.REVEALING, 0, True, 1, None),
]


@pytest.mark.parametrize(("phase", "place", "summed", "attempt", "counted"), CASES, ids=[case[0].value for case in CASES])
def test_a_site_is_killed_and_the_others_close_the_round(
    federation: LocalFederation, run: str, phase: Phase, place: int, summed: bool, attempt: int, counted: str | None
) -> None:
    victim = sorted(federation.sites)[place]
    others = [site for site in sorted(federation.sites) if site != victim]
    before = dropouts(federation)

    fail_at(federation, run, phase, victim)
    assert not federation.daemon(victim).alive
    federation.wait_idle(run)

    entry = federation.rounds(run)[-1]
    assert (entry["phase"], entry["reason"], entry["attempt"]) == ("closed", "", attempt)
    assert entry["invited"] == sorted(federation.sites)
    assert entry["survivors"] == (sorted(federation.sites) if summed else others)
    assert {key: count - before.get(key, 0) for key, count in dropouts(federation).items() if count != before.get(key, 0)} == (
        {} if counted is None else {counted: 1}
    )
    check_against_the_loop(federation, run, entry)
    wait_until(lambda: trainer_of(federation, victim) is None, "the killed daemon's trainer is gone", 30)

    federation.restart(victim)
    entry = federation.run_rounds(run, 1)[-1]
    assert (entry["phase"], entry["attempt"], entry["survivors"]) == ("closed", 1, sorted(federation.sites))
    check_against_the_loop(federation, run, entry)


def check_against_the_loop(federation: LocalFederation, run: str, entry: dict[str, Any]) -> None:
    """The round's checkpoint is one small loop's over its survivors: within the encoding's bound, and bit for bit in its integers."""
    recipe, number = recipe_of(SEED), entry["round"]
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


def dropouts(federation: LocalFederation) -> dict[str, float]:
    """Sites left out, by phase, as the coordinator counts them."""
    return {
        labels["phase"]: value
        for name, labels, value in federation.metrics(COORDINATOR)
        if name == "cosilo_secagg_dropouts_total"
    }
