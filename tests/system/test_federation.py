"""Five real processes: rounds close, the numbers are right, and kill -9 at any of them loses no finished work."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosilo_client.data import load_images, open_source, split_heldout
from cosilo_client.data.config import DataConfig
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.diffusion.presets import preset
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError, wait_until
from tests.federation.summary import summarise

pytestmark = pytest.mark.timeout(600)  # five processes that each load torch: minutes where others share the machine

TAIL_WORDS = 1 + 5 + 1 + 1 + 64  # PROTOCOL.md, Encoding: weight, 4 buckets and the training loss, clip ratio, one, zeros
LATE_S = 30.0  # a warm trainer's tenth takes half a second; a cold start on a machine that others share has taken 17
BATCH = 32
QUICK_STEPS, SLOW_STEPS = 4, 250  # a tenth of a second; and some seconds, in which to kill somebody


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """Four sites that are members and connected, their trainers warm: a cold start is not what these tests time."""
    root = tmp_path_factory.mktemp("federation")
    policy = {"allow_insecure_plain_sum": True}
    with LocalFederation(root, digits_sites(root, 4, alpha=0.5, least=200, seed=1, policy=policy)) as federation:
        federation.start()
        run = create(federation, "warm-up", QUICK_STEPS)
        federation.run_rounds(run, 1, "--statistics")
        yield federation


def create(federation: LocalFederation, name: str, steps: int, **more: Any) -> str:
    """A run of a tiny UNet, accepted by all; each with a seed of its own, for no site trains one model again and again (R8)."""
    run = federation.create_run(
        {
            "name": name,
            "preset": "digits",
            "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
            "training": {"local_epochs": 100, "batch_size": BATCH, "max_steps": steps, "seed": zlib.crc32(name.encode())},
            "deadlines": {"training_s": LATE_S},
            **more,
        }
    )
    federation.accept_all(run)
    return run


def test_rounds_close_and_their_numbers_are_right(federation: LocalFederation) -> None:
    run = create(federation, "numbers", QUICK_STEPS)
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


def test_a_rehearsal_moves_the_bytes_and_nothing_else(federation: LocalFederation) -> None:
    run = create(federation, "drill", QUICK_STEPS)
    trained = images_trained(federation)
    (rehearsal,) = federation.run_rounds(run, 1, "--rehearsal")
    assert (rehearsal["kind"], rehearsal["phase"], len(rehearsal["survivors"])) == ("rehearsal", "closed", 4)
    (checkpoint,) = federation.checkpoints(run)
    assert rehearsal["base"] == checkpoint["weights"]
    assert rehearsal["bytes_down"] == 4 * checkpoint["bytes"]
    assert images_trained(federation) == trained


def test_both_daemons_publish_their_metrics(federation: LocalFederation) -> None:
    run = create(federation, "metrics", QUICK_STEPS)
    closed = federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed")
    (entry,) = federation.run_rounds(run, 1)
    assert federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed") == closed + 1
    assert federation.metric(COORDINATOR, "cosilo_sites_connected") == 4
    assert federation.metric(COORDINATOR, "cosilo_global_loss", run=run[:12]) == entry["losses"]["heldout"]
    assert federation.metric(COORDINATOR, "cosilo_disk_free_bytes") > 0
    for site in federation.sites:
        assert federation.metric(COORDINATOR, "cosilo_transfer_bytes_total", direction="up", site=site) > 0
        assert federation.metric(site, "cosilo_connected") == 1
        assert federation.metric(site, "cosilo_training_loss") > 0
        assert federation.metric(site, "cosilo_images_total") >= QUICK_STEPS * BATCH
    by_site = {name for name, labels, _ in federation.metrics(COORDINATOR) if "site" in labels}
    assert by_site <= {
        "cosilo_site_last_seen_timestamp_seconds",
        "cosilo_transfer_bytes_total",
        "cosilo_transfer_bytes_created",
    }, "the coordinator may know a site's bytes and presence, and nothing else of it"


def test_what_was_trained_is_drawn_and_exported(federation: LocalFederation, tmp_path: Path) -> None:
    run = create(federation, "results", QUICK_STEPS)
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


def test_a_site_killed_in_training_is_left_out_and_takes_part_in_the_next_round(federation: LocalFederation) -> None:
    run = create(federation, "site-killed", SLOW_STEPS)
    victim = sorted(federation.sites)[2]
    federation.start_rounds(run, 1)
    wait_for_training(federation, run, victim)
    federation.kill(victim)
    federation.wait_idle(run)
    (entry,) = federation.rounds(run)
    assert entry["phase"] == "closed"
    assert entry["survivors"] == [site for site in sorted(federation.sites) if site != victim]
    federation.restart(victim)
    entry = federation.run_rounds(run, 1)[-1]
    assert (entry["phase"], len(entry["survivors"])) == ("closed", 4)


def test_a_coordinator_killed_in_a_round_finishes_it_and_no_site_trains_twice(federation: LocalFederation) -> None:
    run = create(federation, "coordinator-killed", SLOW_STEPS)
    before = images_trained(federation)
    federation.start_rounds(run, 1)
    wait_for_training(federation, run, sorted(federation.sites)[0])
    federation.kill(COORDINATOR)
    federation.restart(COORDINATOR)
    federation.wait_idle(run)
    (entry,) = federation.rounds(run)
    assert (entry["round"], entry["phase"], len(entry["survivors"])) == (1, "closed", 4)
    assert images_trained(federation) == {site: seen + images_in_a_round(federation, site) for site, seen in before.items()}


def test_a_site_killed_before_its_upload_rejoins_with_what_it_trained(federation: LocalFederation) -> None:
    run = create(federation, "both-killed", SLOW_STEPS)
    victim = sorted(federation.sites)[1]
    goal = {site: seen + images_in_a_round(federation, site) for site, seen in images_trained(federation).items()}
    federation.start_rounds(run, 1)
    wait_for_training(federation, run, victim)
    federation.kill(COORDINATOR)  # so that nobody can upload
    wait_until(lambda: images_trained(federation) == goal, "every site has trained", 120, poll_s=0.5)
    wait_until(lambda: trained_update(federation, victim), "the update is on disk", 30)
    federation.kill(victim)
    federation.restart(COORDINATOR)
    federation.restart(victim)
    federation.wait_idle(run)
    (entry,) = federation.rounds(run)
    assert (entry["phase"], len(entry["survivors"])) == ("closed", 4)
    assert images_trained(federation) == {**goal, victim: 0}


def test_status_of_a_site_is_told_by_itself(federation: LocalFederation) -> None:
    site = next(iter(federation.sites))
    assert site in federation.site_command(site, "status")


def images_trained(federation: LocalFederation) -> dict[str, float]:
    return {site: federation.metric(site, "cosilo_images_total") for site in federation.sites}


def images_in_a_round(federation: LocalFederation, site: str) -> int:
    """What a site trains on in SLOW_STEPS steps: each epoch's last batch is short."""
    data = DataConfig.model_validate(federation.sites[site].data)
    local = load_images(open_source(data), preset("digits").architecture)
    train = len(split_heldout(local, preset("digits").training.heldout_fraction).train)
    epochs, steps = divmod(SLOW_STEPS, -(-train // BATCH))
    return epochs * train + steps * BATCH


def trained_update(federation: LocalFederation, site: str) -> list[Path]:
    """Files of a trained update that are whole, in a site's state folder."""
    return [path for path in federation.state(site).rglob("*update*") if path.is_file() and not path.name.endswith(".part")]


def wait_for_training(federation: LocalFederation, run: str, site: str) -> None:
    """Returns when a site has trained for a while and is not done."""
    for snapshot in federation.watch(run):
        if snapshot.round is None:
            continue
        assert snapshot.round["phase"] in ("gathering", "training"), snapshot.round
        if any(s["site"] == site and s["activity"] == "training" and s["tenths"] >= 2 for s in snapshot.round["sites"]):
            return
