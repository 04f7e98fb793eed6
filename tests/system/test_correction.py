"""A corrected average under masks: real processes, a coordinator that is killed in the middle of it, and a plain loop's bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cosilo_common.diffusion.correction import correct
from cosilo_common.diffusion.model import build_unet, load_vector, vector_blocks
from cosilo_common.manifest import CorrectionTerms
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.federation.processes import wait_until
from tests.system.reference import plan, recipe_of, reference_round, site_data, trained_weights

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

SEED = 117
TERMS = CorrectionTerms(samples=20, steps=30, learning_rate=1e-3, sampler_steps=5)
THREADS = 2  # of the coordinator's worker: with another number the last bits may differ


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("correction")
    with LocalFederation(root, digits_sites(root, 3, alpha=0.5, least=200, seed=1), typed=False) as federation:
        federation.start()
        yield federation


def test_a_killed_correction_is_made_again_and_is_the_plain_loops(federation: LocalFederation) -> None:
    run = federation.create_run(plan("corrected", SEED, correction=TERMS.model_dump(mode="json")))
    federation.accept_all(run)
    federation.start_rounds(run, 1)
    wait_until(lambda: [entry["phase"] for entry in federation.rounds(run)] == ["opening"], "the round is being opened", 120)
    federation.kill("coordinator")
    federation.restart("coordinator")
    federation.wait_idle(run)
    (entry,) = federation.rounds(run)
    assert (entry["phase"], entry["note"]) == ("closed", "corrected by 30 steps on 20 images that the global model drew")

    recipe, (first, corrected) = recipe_of(SEED), trained_weights(federation, run, recipe_of(SEED))
    average, drawer = build_unet(recipe.architecture), build_unet(recipe.architecture)
    step = reference_round(1, site_data(federation), first, recipe)
    for unet in (average, drawer):
        load_vector(unet, step.weights)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        correct(average, drawer, recipe, TERMS, 1)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(corrected, np.concatenate(list(vector_blocks(average))))
    assert np.abs(corrected - step.weights).max() > 1e-3
