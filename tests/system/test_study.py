"""The study's runner over real daemons: a cell from its scenario to results.json, cut off in the middle and gone on with."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.study import run
from bench.study.assessment import Assessor
from tests.federation.local import LocalFederation

SITES = {"site-a": 30, "site-b": 40, "site-c": 50, "holdout": 20}
TRAINED = 0.9 * (30 + 40 + 50)  # a tenth of each site's is held out
SCENARIO = """
name = "tiny"
[data]
kind = "folders"
test_images = 20
[split]
kind = "folders"
[budget]
images = 216
evaluations = 2
[evaluation]
extractor = "EXTRACTOR"
samples = 20
steps = 2
[run]
preset = "digits"
[run.architecture]
num_classes = 2
block_out_channels = [8, 16]
norm_num_groups = 4
[run.training]
local_epochs = 1
batch_size = 16
[[arm]]
name = "centralised"
mode = "centralised"
[[arm]]
name = "fedavg"
"""


def pixels() -> tuple[int, object]:
    """The extractor: an image's 8x8 pixels."""
    return 8, lambda images: (images[:, 0].flatten(1) / 255.0, None)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    for site, count in SITES.items():
        for label in ("bright", "dark"):
            (tmp_path / "images" / site / label).mkdir(parents=True)
        for number in range(count):
            values = random.integers(0, 100, (8, 8), dtype=np.uint8) + (150 if number % 2 else 0)
            Image.fromarray(values.astype(np.uint8)).save(
                tmp_path / "images" / site / ("bright" if number % 2 else "dark") / f"{number}.png"
            )
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(SCENARIO.replace("EXTRACTOR", f"{__name__}:pixels"), encoding="utf-8")
    places = {"--data": "images", "--work": "work", "--results": "results"}
    return [str(scenario), *(word for key, name in places.items() for word in (key, str(tmp_path / name)))]


@pytest.mark.timeout(900)  # a federation started twice, eight times the commands; a minute on an idle machine
def test_a_scenario_that_is_cut_off_goes_on_in_the_same_run_and_ends_in_results(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assess, calls = Assessor.assess, 0

    def cut_off(self: Assessor, *values: Any, **more: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 4:  # two of the centralised arm, then the second of the federated one: its round is closed, not yet scored
            raise KeyboardInterrupt
        return assess(self, *values, **more)

    monkeypatch.setattr(Assessor, "assess", cut_off)
    monkeypatch.setattr("bench.study.federated.LocalFederation", partial(LocalFederation, typed=False))
    assert run.main(arguments) == 130
    before = json.loads((tmp_path / "results" / "tiny" / "results.json").read_text())
    assert list(before["cells"]) == ["centralised"]
    assert run.main(arguments) == 0
    after = json.loads((tmp_path / "results" / "tiny" / "results.json").read_text())
    assert after["cells"]["centralised"] == before["cells"]["centralised"]
    cell = after["cells"]["fedavg"]["0"]
    assert [point["images"] for point in cell["points"]] == [TRAINED, 2 * TRAINED]
    assert cell["traffic"]["rounds"] == 2  # gone on with, not begun again
    assert all(entry["survivors"] == 3 and entry["bytes_up"] > 0 for entry in cell["traffic"]["by_round"])
    assert [entry["label"] for entry in cell["points"][-1]["scores"]["by_class"]] == [0, 1]
    assert after["sites"]["site-c"] == {"images": 50, "trained_on": 45, "by_class": [25, 25]}
    assert after["summary"]["centralised"]["over_centralised"] == 1.0
    assert (tmp_path / "work" / "fedavg-0.png").is_file()
    assert (tmp_path / "work" / "curves.png").is_file()
    assert not list((tmp_path / "work" / "cells").iterdir())
    assert calls == 5
    assert run.main(arguments) == 0
    assert calls == 5  # nothing is left to do
    assert "fedavg, seed 0: finished before" in capsys.readouterr().out

    assert run.main([*arguments, "--engine", "inprocess", "--arms", "fedavg"]) == 0
    explored = json.loads((tmp_path / "results" / "tiny" / "exploration.json").read_text())["cells"]["fedavg"]["0"]
    assert explored["engine"] == "inprocess"
    for there, here in zip(cell["points"], explored["points"], strict=True):
        assert here["images"] == there["images"]
        # The same training and the same seeds; the daemons' sum is rounded in 1 of 2^31 units a site.
        assert here["scores"]["loss_test"] == pytest.approx(there["scores"]["loss_test"], rel=1e-4)


def test_data_that_is_missing_is_named_with_what_to_do(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments[arguments.index("--data") + 1] += "-none"
    assert run.main(arguments) == 1
    assert "give --data FOLDER" in capsys.readouterr().err
