"""SCAFFOLD with four real sites under masks: c stays the mean of what the sites keep, over rounds, a kill and a drop of the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cosilo_client.data import load_images, open_source, split_heldout
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.parts import Split
from cosilo_common.weights import open_vector
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation
from tests.system.reference import plan, recipe_of, site_data

pytestmark = pytest.mark.timeout(600)

SEED = 78
TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding
TRAINING = {"steps_per_epoch": 4, "optimiser": "sgd", "learning_rate": 0.05, "seed": SEED, "control_variates": True}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    root = tmp_path_factory.mktemp("control")
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1)) as federation:
        federation.start()
        yield federation


def test_c_is_the_mean_of_what_the_sites_keep(federation: LocalFederation, tmp_path: Path) -> None:
    run = federation.create_run(plan("control", SEED, training=TRAINING))
    federation.accept_all(run)
    federation.run_rounds(run, 1)
    first_site = next(iter(federation.sites))
    federation.kill(first_site)
    federation.restart(first_site)
    federation.run_rounds(run, 1)

    recipe, sites = recipe_of(SEED), site_data(federation)
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
        kept = [
            open_vector(federation.state(name) / "personal" / run / f"{number}.safetensors", split.kept_table).astype(np.float64)
            for name in sites
        ]
        np.testing.assert_allclose(fetched[size:], np.average(kept, axis=0, weights=shares), rtol=0, atol=1e-6)
        assert max(float(np.abs(own - fetched[size:]).max()) for own in kept) > 1e-3  # they do differ
    assert [entry["bytes_up"] for entry in federation.rounds(run)] == [4 * 4 * (2 * size + TAIL_WORDS)] * 2

    folder = tmp_path / "pipeline"
    federation.cosilo("checkpoint", "export", run, "--to", str(folder))
    assert (folder / "model_index.json").is_file()
