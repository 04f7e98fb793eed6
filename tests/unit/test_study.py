"""The study's arithmetic: scenarios as values, budgets in images, and what a table says of cells."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.study.centralised import at_budget, train_centralised
from bench.study.federated import images_in_round
from bench.study.outcomes import document, finished_cells, summary, table, write_json
from bench.study.scenario import Scenario, read_scenario
from cosilo_client.data import LocalImages
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Architecture, Preset, Training
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable
from cosilo_server.cli.run_file import RunFile
from tests.federation.toml_files import to_toml

SCENARIOS = sorted((Path(__file__).parents[2] / "bench" / "study" / "scenarios").glob("*.toml"))

TOML = """
name = "t"
seeds = [0, 1]
[data]
kind = "fashion-mnist"
[split]
kind = "labels"
[budget]
images = 1000
evaluations = 2
[run]
preset = "fashion-16"
[run.training]
learning_rate = 2e-3
[[arm]]
name = "centralised"
mode = "centralised"
seeds = [0]
[[arm]]
name = "fedavg"
[[arm]]
name = "prox"
[arm.run.training]
proximal_mu = 0.1
[arm.run.server_optimiser]
kind = "fedavgm"
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    path = tmp_path / "t.toml"
    path.write_text(TOML, encoding="utf-8")
    return read_scenario(path)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_committed_scenario_parses_and_each_arm_makes_a_manifest(path: Path, tmp_path: Path) -> None:
    scenario = read_scenario(path)
    assert scenario.name == path.stem
    keys = {f"site-{k}": bytes([k]) * 32 for k in range(scenario.split.sites)}
    table = TensorTable((("weight", (3, 2)),))
    for arm in scenario.arm:
        plan = tmp_path / f"{arm.name}.toml"
        plan.write_text(to_toml(scenario.plan(arm, 0)), encoding="utf-8")
        file = RunFile(plan)
        assert file.recipe.training.seed == 0
        if arm.mode == "federated":
            manifest = file.manifest("chest", keys, table, bytes(16))
            assert manifest.secure
            assert len(manifest.participants) == scenario.split.sites


def test_an_arm_overrides_single_values_and_the_seed_is_the_trainings(scenario: Scenario) -> None:
    prox = scenario.arm[2]
    assert scenario.plan(prox, 7) == {
        "name": "t-prox-7",
        "preset": "fashion-16",
        "training": {"learning_rate": 2e-3, "proximal_mu": 0.1, "seed": 7},
        "server_optimiser": {"kind": "fedavgm"},
    }
    assert scenario.seeds_of(scenario.arm[0]) == (0,)
    assert scenario.seeds_of(prox) == (0, 1)
    assert scenario.budget.points() == [500, 1000]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("evaluations = 2", "evaluations = 3", "evaluations must divide 10"),
        ('kind = "labels"', 'kind = "folders"', "go together"),
        ('name = "prox"', 'name = "fedavg"', "a name stands twice"),
        ("images = 1000", "images = 1000\nepochs = 3", "epochs"),
        ('name = "t"', 'name = "t', "t.toml"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(TOML.replace(old, new), encoding="utf-8")
    with pytest.raises(CosiloError, match=told):
        read_scenario(path)


def test_a_fingerprint_changes_with_what_a_cell_depends_on_and_with_nothing_else(scenario: Scenario) -> None:
    arm = scenario.arm[1]
    same = scenario.model_copy(update={"about": "other words", "seeds": (5,), "arm": (arm,)})
    other = scenario.model_copy(update={"evaluation": scenario.evaluation.model_copy(update={"samples": 100})})
    assert same.fingerprint(arm, 0) == scenario.fingerprint(arm, 0)
    assert (
        len(
            {
                scenario.fingerprint(arm, 0),
                scenario.fingerprint(arm, 1),
                other.fingerprint(arm, 0),
                scenario.fingerprint(scenario.arm[2], 0),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("count", "values", "images"),
    [
        (100, {}, 100),
        (100, {"local_epochs": 3}, 300),
        (100, {"max_steps": 2, "batch_size": 32}, 64),
        (100, {"max_steps": 5, "batch_size": 32, "local_epochs": 2}, 100 + 32),
        (100, {"steps_per_epoch": 7, "max_steps": 3}, 15 + 15 + 14),
        (3, {"steps_per_epoch": 7}, 3),
    ],
)
def test_images_that_a_site_sees_in_a_round(count: int, values: dict[str, Any], images: int) -> None:
    assert images_in_round(count, Training.model_validate(values)) == images


@pytest.mark.parametrize("budget", [1000, 1080, 5000, 64, 1])
def test_the_centralised_arm_sees_the_budget_to_within_a_batch(budget: int) -> None:
    training = at_budget(Training(batch_size=64), 540, budget)
    assert budget <= images_in_round(540, training) < budget + 64


def test_pooled_training_is_one_training_whose_checkpoints_lie_at_the_points() -> None:
    tiny = Architecture(sample_size=8, in_channels=1, num_classes=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    recipe = Preset(**{**dict(preset("digits")), "architecture": tiny, "training": Training(batch_size=10, heldout_fraction=0.1)})
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    pooled = LocalImages(images, np.arange(50) % 2, 255, 0)

    def checkpoints(points: list[int]) -> list[tuple[int, bool, np.ndarray]]:
        seen: list[tuple[int, bool, np.ndarray]] = []
        train_centralised(pooled, recipe, 90, points, lambda count, _, weights, last: seen.append((count, last, weights)))
        return seen

    half, whole = checkpoints([45, 90])
    assert (half[0], half[1], whole[0], whole[1]) == (45, False, 90, True)
    assert np.abs(whole[2] - half[2]).max() > 0
    (alone,) = checkpoints([90])
    assert np.array_equal(alone[2], whole[2])  # looking on the way changes nothing: neither the optimiser nor what is drawn


def cell(scenario: Scenario, arm: int, seed: int, fid: float) -> dict[str, Any]:
    scores = {"fid": fid, "fid_test": fid + 1, "kid": 0.5, "precision": 0.5, "recall": 0.25, "loss_test": 0.125}
    point = {"images": 1000, "round": 2, "scores": scores}
    return {"fingerprint": scenario.fingerprint(scenario.arm[arm], seed), "seconds": 3.0, "points": [point]}


def test_a_summary_tells_the_spread_the_ratio_and_the_share_of_the_gap_that_is_closed(scenario: Scenario) -> None:
    cells = {
        "centralised": {"0": cell(scenario, 0, 0, 100.0)},
        "fedavg": {"0": cell(scenario, 1, 0, 290.0), "1": cell(scenario, 1, 1, 310.0)},
        "prox": {"0": cell(scenario, 2, 0, 150.0)},
    }
    rows = summary(scenario, cells)
    assert rows["fedavg"]["fid"] == {"mean": 300.0, "deviation": pytest.approx(14.1421)}
    assert rows["prox"]["fid"] == {"mean": 150.0, "deviation": None}
    assert [rows[name]["over_centralised"] for name in cells] == [1.0, 3.0, 1.5]
    assert [rows[name]["gap_closed"] for name in cells] == [1.0, None, 0.75]
    assert "300.0 ± 14.1" in table(scenario, rows, cells)


def test_finished_cells_are_those_of_the_same_values(scenario: Scenario, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert finished_cells(path, scenario, "d") == {}
    cells = {"fedavg": {"0": cell(scenario, 1, 0, 290.0)}}
    write_json(path, document(scenario, cells, {"extractor": {"name": "n", "digest": "d"}}))
    assert finished_cells(path, scenario, "d") == cells
    assert finished_cells(path, scenario, "e") == {}
    changed = scenario.model_copy(update={"run": {"preset": "digits"}})
    assert finished_cells(path, changed, "d") == {}
