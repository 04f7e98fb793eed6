"""Five real processes: rounds close, and the numbers, metrics and pictures are right. What is broken on purpose is test_chaos's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.manifest import PLAIN_AGGREGATION, SECURE_AGGREGATION
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError
from tests.federation.summary import summarise
from tests.system.reference import ROUNDS, check_against_the_loop, plan, site_data

# Five processes that each load torch: minutes where others share the machine.
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_a_trainer_does")]

TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding: weight, 4 buckets and the training loss, clip ratio, one, zeros
BATCH = 32
STEPS = 4  # a tenth of a second


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """Four sites that are members and connected."""
    root = tmp_path_factory.mktemp("federation")
    policy = {"allow_insecure_plain_sum": True, "cohort_min": 1}
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1, policy=policy), typed=False) as federation:
        federation.start()
        yield federation


@pytest.fixture(scope="module")
def run(federation: LocalFederation) -> str:
    """A run of a tiny UNet, accepted by all. The tests that share it add rounds to it, in this file's order or each alone."""
    run = federation.create_run(
        {
            "name": "numbers",
            "preset": "digits",
            "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
            "training": {"local_epochs": 100, "batch_size": BATCH, "max_steps": STEPS},
        }
    )
    federation.accept_all(run)
    return run


def test_rounds_close_and_their_numbers_are_right(federation: LocalFederation, run: str) -> None:
    federation.run_rounds(run, 2)
    rounds = federation.run_rounds(run, 1, "--statistics")
    assert [(r["round"], r["kind"], r["phase"]) for r in rounds] == [
        (1, "train", "closed"),
        (2, "train", "closed"),
        (3, "statistics", "closed"),
    ]
    assert [r["survivors"] for r in rounds] == [sorted(federation.sites)] * 3
    checkpoints = federation.checkpoints(run)
    assert [c["round"] for c in checkpoints] == [0, 1, 2]
    assert [r["base"] for r in rounds] == [c["weights"] for c in checkpoints]
    for checkpoint in checkpoints:
        data = federation.artifact(checkpoint["weights"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == checkpoint["weights"]
        assert len(data) == checkpoint["bytes"]
    (parameters,) = [r["parameters"] for r in federation.cosilo_json("run", "list")["runs"] if r["run"] == run]
    assert [r["bytes_up"] for r in rounds[:2]] == [4 * 4 * (parameters + TAIL_WORDS)] * 2
    assert [r["bytes_down"] for r in rounds[:2]] == [4 * checkpoints[0]["bytes"], 4 * checkpoints[1]["bytes"]]
    images = {name: len(Path(str(spec.data["index_file"])).read_text().splitlines()) for name, spec in federation.sites.items()}
    summary = summarise(images, rounds, "cosilo-secagg/1")
    assert sum(site["images"] for site in summary["sites"]) == 1797
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert summary["rounds"][2]["global_loss"] < summary["rounds"][0]["global_loss"]
    assert summary["checkpoint"] == checkpoints[-1]["weights"]


def test_a_rehearsal_moves_the_bytes_and_nothing_else(federation: LocalFederation, run: str) -> None:
    trained, checkpoints = images_trained(federation), federation.checkpoints(run)
    rehearsal = federation.run_rounds(run, 1, "--rehearsal")[-1]
    assert (rehearsal["kind"], rehearsal["phase"], len(rehearsal["survivors"])) == ("rehearsal", "closed", 4)
    assert federation.checkpoints(run) == checkpoints
    assert rehearsal["base"] == checkpoints[-1]["weights"]
    assert rehearsal["bytes_down"] == 4 * checkpoints[-1]["bytes"]
    assert images_trained(federation) == trained


def test_both_daemons_publish_their_metrics(federation: LocalFederation, run: str) -> None:
    closed = federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed")
    entry = federation.run_rounds(run, 1)[-1]
    assert federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed") == closed + 1
    assert federation.metric(COORDINATOR, "cosilo_sites_connected") == 4
    assert federation.metric(COORDINATOR, "cosilo_global_loss", run=run[:12]) == entry["losses"]["heldout"]
    assert federation.metric(COORDINATOR, "cosilo_disk_free_bytes") > 0
    for site in federation.sites:
        assert federation.metric(COORDINATOR, "cosilo_transfer_bytes_total", direction="up", site=site) > 0
        assert federation.metric(site, "cosilo_connected") == 1
        assert federation.metric(site, "cosilo_training_loss") > 0
        assert federation.metric(site, "cosilo_images_total") >= STEPS * BATCH
    by_site = {name for name, labels, _ in federation.metrics(COORDINATOR) if "site" in labels}
    assert by_site <= {
        "cosilo_site_last_seen_timestamp_seconds",
        "cosilo_transfer_bytes_total",
        "cosilo_transfer_bytes_created",
    }, "the coordinator may know a site's bytes and presence, and nothing else of it"


def test_what_was_trained_is_drawn_and_exported(federation: LocalFederation, run: str, tmp_path: Path) -> None:
    federation.run_rounds(run, 1)
    grid = tmp_path / "grid.png"
    federation.cosilo("sample", run, "--out", str(grid), "--per-class", "2", "--steps", "2")
    with Image.open(grid) as image:
        assert image.size == (2 * 42 + 2, 10 * 42 + 2)  # a row a class, 8 pixels enlarged five times, gaps of two

    folder = tmp_path / "exported"
    federation.cosilo("checkpoint", "export", run, "--to", str(folder))
    drawn = CosiloPipeline.from_pretrained(str(folder))(class_labels=[3], num_inference_steps=2, output_type="np", return_dict=False)
    assert drawn[0].shape[:3] == (1, 8, 8)


def test_a_second_daemon_on_one_journal_is_refused(federation: LocalFederation) -> None:
    site = next(iter(federation.sites))
    with pytest.raises(FederationError, match=r"exit 1\n(.|\n)*error"):
        federation.site_command(site, "serve")
    assert federation.ready(site)


def test_status_of_a_site_is_told_by_itself(federation: LocalFederation) -> None:
    site = next(iter(federation.sites))
    assert site in federation.site_command(site, "status")


# The numbers: real processes give what one small loop in one process gives


@pytest.fixture(scope="module")
def four_site_runs(federation: LocalFederation) -> dict[str, str]:
    """ROUNDS rounds of one plan, once with masks and once without; the runs by aggregation."""
    runs = {}
    for aggregation in (SECURE_AGGREGATION, PLAIN_AGGREGATION):
        run = federation.create_run(plan(f"four-{aggregation.split('/')[0]}", seed=1), plain=aggregation == PLAIN_AGGREGATION)
        federation.accept_all(run)
        rounds = federation.run_rounds(run, ROUNDS)
        assert [(r["phase"], len(r["survivors"])) for r in rounds] == [("closed", 4)] * ROUNDS
        runs[aggregation] = run
    return runs


@pytest.mark.parametrize("aggregation", [SECURE_AGGREGATION, PLAIN_AGGREGATION])
def test_four_sites_equal_the_loop_after_three_rounds(
    federation: LocalFederation, four_site_runs: dict[str, str], aggregation: str
) -> None:
    check_against_the_loop(federation, four_site_runs[aggregation], site_data(federation), seed=1)


def test_masks_change_no_bit_of_a_checkpoint(federation: LocalFederation, four_site_runs: dict[str, str]) -> None:
    masked, plain = (
        [(checkpoint["weights"], checkpoint["ema"]) for checkpoint in federation.checkpoints(four_site_runs[aggregation])]
        for aggregation in (SECURE_AGGREGATION, PLAIN_AGGREGATION)
    )
    assert len(masked) == ROUNDS + 1
    assert masked == plain


def test_one_site_with_fedavg_is_local_training(federation: LocalFederation) -> None:
    first = next(iter(federation.sites))
    run = federation.create_run(plan("alone", seed=2, participants=[first], n_min=1), plain=True)
    federation.accept_all(run, [first])
    assert [r["phase"] for r in federation.run_rounds(run, ROUNDS)] == ["closed"] * ROUNDS
    check_against_the_loop(federation, run, {first: site_data(federation)[first]}, seed=2)


def images_trained(federation: LocalFederation) -> dict[str, float]:
    return {site: federation.metric(site, "cosilo_images_total") for site in federation.sites}
