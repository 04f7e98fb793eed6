"""Four real sites under masks, each with norms and class embedding of its own: bit for bit a plain loop, and nothing of them leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.parts import split_of
from cosilo_common.weights import open_vector
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.system.reference import CAP, CLIP, TRAINING, Vector, plan, recipe_of, site_data, train_at_site, trained_weights

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

SEED = 77
PARTS = ("norms", "class_embedding")
TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("personal")
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1)) as federation:
        federation.start()
        yield federation


def test_sites_keep_their_own_and_the_rest_is_the_plain_loops(federation: LocalFederation) -> None:
    run = federation.create_run(plan("personal", SEED, training={**TRAINING, "seed": SEED, "personal": list(PARTS)}))
    federation.accept_all(run)
    federation.run_rounds(run, 1)
    first_site = next(iter(federation.sites))
    federation.kill(first_site)  # what stays at home survives the daemon
    federation.restart(first_site)
    federation.run_rounds(run, 1)

    recipe, sites = recipe_of(SEED), site_data(federation)
    table = tensor_table(recipe.architecture)
    split = split_of(table, recipe.architecture, PARTS)
    assert split.personal_table is not None
    stays, moves = np.zeros(table.size, bool), np.zeros(table.size, bool)
    for runs, mask in ((split.personal_runs, stays), (split.shared_runs, moves)):
        for place in runs:
            mask[place] = True
    checkpoints = trained_weights(federation, run, recipe)
    largest = (2**31 - 1) // len(sites)
    weights = checkpoints[0]
    own: dict[str, Vector] = dict.fromkeys(sites, weights)
    for number in (1, 2):
        summed, total = np.zeros(table.size, np.int64), 0
        for name, data in sites.items():
            begun: Vector = np.where(stays, own[name], weights)
            weight, update = train_at_site(number, name, data, begun, recipe)
            summed += np.rint(weight / CAP * largest / CLIP * update.astype(np.float64)).astype(np.int64)
            total += weight
            values = open_vector(federation.state(name) / "personal" / run / f"{number}.safetensors", split.personal_table)
            np.testing.assert_allclose(values, (begun + update)[stays], rtol=0, atol=2e-7)  # the sum rounds once more than the training did
            own[name] = np.array(weights)
            own[name][stays] = values
        mean = np.where(moves, (summed * (CLIP / largest * CAP / total)).astype(np.float32), np.float32(0))
        weights = weights + mean
        assert np.array_equal(checkpoints[number], weights)
    for name in sites:
        (first, second) = sorted(kept(federation, name, run))
        assert (first.name, second.name, second.stat().st_mode & 0o777) == ("1.safetensors", "2.safetensors", 0o600)
        assert not np.array_equal(*(open_vector(path, split.personal_table) for path in (first, second)))

    words = split.shared_table.size + TAIL_WORDS
    assert [entry["bytes_up"] for entry in federation.rounds(run)] == [len(sites) * 4 * words] * 2


def test_they_are_gone_when_a_site_leaves_the_run(federation: LocalFederation) -> None:
    leaves, stays, *_ = federation.sites
    (run,) = {path.parent.name for path in (federation.state(leaves) / "personal").rglob("*.safetensors")}
    federation.site_command(leaves, "leave", run, "--yes")
    assert not (federation.state(leaves) / "personal" / run).exists()
    assert kept(federation, stays, run)


def kept(federation: LocalFederation, site: str, run: str) -> list[Path]:
    return list((federation.state(site) / "personal" / run).iterdir())
