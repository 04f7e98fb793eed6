"""What stays at four real sites, under masks, through a kill of a daemon: layers of their own, and SCAFFOLD's control variates.

Personal layers: bit for bit a plain loop, and nothing of them leaves. Control variates: c stays the mean of what the sites keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cosilo_client.data import load_images, open_source, split_heldout
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.parts import Split, split_of
from cosilo_common.weights import open_vector
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.system.reference import CAP, CLIP, TRAINING, Vector, plan, recipe_of, site_data, train_at_site, trained_weights

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding
SEED = 77
PARTS = ("norms", "class_embedding")
CONTROL_SEED = 78
CONTROLLED = {"steps_per_epoch": 4, "optimiser": "sgd", "learning_rate": 0.05, "seed": CONTROL_SEED, "control_variates": True}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("kept")
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1), typed=False) as federation:
        federation.start()
        yield federation


@pytest.fixture(scope="module")
def personal(federation: LocalFederation) -> str:
    """Two rounds of a run whose sites keep layers of their own."""
    run = federation.create_run(plan("personal", SEED, training={**TRAINING, "seed": SEED, "personal": list(PARTS)}))
    play(federation, run)
    return run


def play(federation: LocalFederation, run: str) -> None:
    """A round, a site's daemon killed, a round."""
    federation.accept_all(run)
    federation.run_rounds(run, 1)
    first_site = next(iter(federation.sites))
    federation.kill(first_site)  # what stays at home survives the daemon
    federation.restart(first_site)
    federation.run_rounds(run, 1)


def test_sites_keep_their_own_and_the_rest_is_the_plain_loops(federation: LocalFederation, personal: str) -> None:
    run, recipe, sites = personal, recipe_of(SEED), site_data(federation)
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


def test_they_are_gone_when_a_site_leaves_the_run(federation: LocalFederation, personal: str) -> None:
    leaves, stays, *_ = federation.sites
    assert kept(federation, leaves, personal)
    federation.site_command(leaves, "leave", personal, "--yes")
    assert not (federation.state(leaves) / "personal" / personal).exists()
    assert kept(federation, stays, personal)


def kept(federation: LocalFederation, site: str, run: str) -> list[Path]:
    return list((federation.state(site) / "personal" / run).iterdir())


def test_c_is_the_mean_of_what_the_sites_keep(federation: LocalFederation, tmp_path: Path) -> None:
    run = federation.create_run(plan("control", CONTROL_SEED, training=CONTROLLED))
    play(federation, run)

    recipe, sites = recipe_of(CONTROL_SEED), site_data(federation)
    split = Split(tensor_table(recipe.architecture), controlled=True)
    assert split.kept_table is not None
    size = split.table.size
    shares = []
    for data in sites.values():
        local = load_images(open_source(data), recipe.architecture)
        shares.append(len(split_heldout(local, recipe.training.heldout_fraction).train))
    for number, checkpoint in enumerate(federation.checkpoints(run)):
        fetched = np.array(open_vector(federation.artifact(checkpoint["weights"]), split.base_table))
        model = np.array(open_vector(federation.artifact(checkpoint["ema"]), split.table))
        assert np.array_equal(fetched[:size], model)
        if number == 0:
            assert not fetched[size:].any()
            continue
        own = [
            open_vector(federation.state(name) / "personal" / run / f"{number}.safetensors", split.kept_table).astype(np.float64)
            for name in sites
        ]
        np.testing.assert_allclose(fetched[size:], np.average(own, axis=0, weights=shares), rtol=0, atol=1e-6)
        assert max(float(np.abs(one - fetched[size:]).max()) for one in own) > 1e-3  # they do differ
    assert [entry["bytes_up"] for entry in federation.rounds(run)] == [4 * 4 * (2 * size + TAIL_WORDS)] * 2

    folder = tmp_path / "pipeline"
    federation.cosilo("checkpoint", "export", run, "--to", str(folder))
    assert (folder / "model_index.json").is_file()
