"""A few cells of the chaos matrix, and the numbers of rounds that close without a site; the whole matrix is `make chaos`.

Which sites are in a sum follows from the phase in which one dies. Before its upload it is out of it; after, the others open the sum of all
four without its help (PROTOCOL.md, phases 5 and 6). Either way the checkpoint is one small loop's over the survivors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cosilo_common.diffusion.model import tensor_table
from cosilo_common.weights import open_vector
from cosilo_server.rounds.state import Phase
from tests.federation.faults import fail_at, trainer_of
from tests.federation.local import COORDINATOR
from tests.federation.processes import wait_until
from tests.system.chaos import QUICK, Cell, Chaos, Group, matrix, table
from tests.system.chaos_federation import BreakableFederation
from tests.system.reference import CAP, CLIP, Vector, plan, recipe_of, site_data, train_at_site

# Five processes that each load torch: minutes where others share the machine.
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

SEED = 32
SHORT_S, PATIENT_S = 6.0, 120.0  # a round waits so long for a site that is gone; and for trainers that start
LARGEST = (2**31 - 1) // 4  # PROTOCOL.md, Encoding: Q for four participants, whoever of them is in the sum


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableFederation]:
    with BreakableFederation(tmp_path_factory.mktemp("chaos")) as federation:
        federation.start()
        yield federation


def test_the_matrix_has_every_phase_and_its_cells_have_names_of_their_own() -> None:
    cells = matrix()
    assert len({cell.name for cell in cells}) == len(cells) >= 60
    assert {cell.when for cell in cells} >= {phase for phase in Phase if phase not in (Phase.CLOSED, Phase.ABANDONED)}
    assert {cell.group for cell in cells} == set(Group)
    assert set(QUICK) <= set(cells)


def test_a_fault_in_each_round_changes_no_bit_and_leaves_nothing_behind(federation: BreakableFederation) -> None:
    outcomes = Chaos(federation, SEED).play(QUICK)
    print(table(outcomes))
    assert [outcome.problem for outcome in outcomes] == [""] * len(QUICK), (
        f"replay: make chaos CHAOS_ARGS='--seed {SEED} {only(outcomes[-1].cell)}'"
    )


def only(cell: Cell) -> str:
    return f"--only {cell.name}"


# (the phase, which site by name's order, whether its update is in the sum, the attempt that is opened)
@pytest.mark.parametrize(
    ("phase", "place", "summed", "attempt"), [(Phase.SHARING, 0, False, 2), (Phase.REVEALING, 2, True, 1)], ids=["sharing", "revealing"]
)
def test_a_site_killed_in_a_phase_is_done_without_and_the_numbers_are_exact(
    federation: BreakableFederation, phase: Phase, place: int, summed: bool, attempt: int
) -> None:
    victim = sorted(federation.sites)[place]
    federation.wait_connected()
    deadlines = {"training_s": PATIENT_S, "sharing_s": SHORT_S, "uploading_s": SHORT_S, "consenting_s": PATIENT_S, "revealing_s": PATIENT_S}
    seed = SEED + 1 + place
    run = federation.create_run(plan(f"absent-{phase.value}", seed=seed, deadlines=deadlines))
    federation.accept_all(run)
    dropouts, attempts = counted(federation, "cosilo_secagg_dropouts_total"), counted(federation, "cosilo_secagg_attempts_total")
    fail_at(federation, run, phase, victim)
    assert not federation.daemon(victim).alive
    federation.wait_idle(run)
    (entry,) = federation.rounds(run)
    assert (entry["phase"], entry["reason"], entry["attempt"]) == ("closed", "", attempt)
    assert entry["invited"] == sorted(federation.sites)
    assert entry["survivors"] == [site for site in sorted(federation.sites) if summed or site != victim]
    assert counted(federation, "cosilo_secagg_dropouts_total") - dropouts == Counter({} if summed else {phase.value: 1})
    assert counted(federation, "cosilo_secagg_attempts_total") - attempts == +Counter(opened=1, repeated=attempt - 1)
    check_against_the_loop(federation, entry, seed)
    wait_until(lambda: trainer_of(federation, victim) is None, "the killed daemon's trainer is gone", PATIENT_S)
    federation.restart(victim)
    federation.wait_tidy()


def check_against_the_loop(federation: BreakableFederation, entry: dict[str, Any], seed: int) -> None:
    """The round's checkpoint is one small loop's over its survivors: within the encoding's bound, and bit for bit in its integers."""
    recipe, number = recipe_of(seed), entry["round"]
    weights = tensor_table(recipe.architecture)
    base, checkpoint = (np.array(open_vector(federation.artifact(entry[key]), weights)) for key in ("base", "checkpoint"))
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


def counted(federation: BreakableFederation, name: str) -> Counter[str]:
    """A counter of the coordinator's by its one label."""
    return Counter({next(iter(labels.values())): int(value) for sample, labels, value in federation.metrics(COORDINATOR) if sample == name})
