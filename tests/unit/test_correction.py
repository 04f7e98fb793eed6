"""The correction of an average: what it trains on, where it starts, and that the same round gives the same bits."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cosilo_common.diffusion import correction
from cosilo_common.diffusion.correction import correct, correction_seed
from cosilo_common.diffusion.model import build_unet, tensor_table, vector_blocks
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.diffusion.specification import Architecture, Preset
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CorrectionTerms, Manifest, parse_manifest
from cosilo_common.weights import write_weights
from cosilo_server.correction import CorrectionStopped, Corrector
from cosilo_server.worker import ORPHANED, perform
from tests.integration.memory_rounds import manifest_of

TINY = Architecture(sample_size=8, in_channels=1, num_classes=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
ORPHAN = "import time; from cosilo_server import worker; worker.perform = lambda job: time.sleep(60); worker.main()"
TERMS = CorrectionTerms(samples=7, steps=3, learning_rate=1e-3, sampler_steps=2)
SITES = ("anna", "beda", "clara")


@pytest.fixture
def recipe() -> Preset:
    digits = preset("digits")
    training = digits.training.model_copy(update={"batch_size": 4, "seed": 5})
    return digits.model_copy(update={"architecture": TINY, "training": training})


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_unet(TINY)


def bits(module: torch.nn.Module) -> bytes:
    return b"".join(block.tobytes() for block in vector_blocks(module))


class Watch:
    """What `correct` draws, and what each step sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []
        self.steps: list[tuple[bytes, torch.Tensor, torch.Tensor]] = []
        draw, loss = correction.draw_images, correction.per_image_loss

        def drawing(unet: Any, schedule: Any, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
            images = draw(unet, schedule, labels, *rest)
            self.drawn.append((unet, labels, images))
            return images

        def losing(unet: Any, noiser: Any, images: torch.Tensor, labels: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.steps.append((bits(unet), images, labels))
            return loss(unet, noiser, images, labels, *rest)

        monkeypatch.setattr(correction, "draw_images", drawing)
        monkeypatch.setattr(correction, "per_image_loss", losing)


def test_it_starts_from_the_average_and_sees_only_what_the_global_model_drew(recipe: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, averaged, drawer = Watch(monkeypatch), network(1), network(2)
    before, untouched = bits(averaged), bits(drawer)
    correct(averaged, drawer, recipe, TERMS, 1)
    ((drawn_by, labels, images),) = watch.drawn
    assert drawn_by is drawer and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(watch.steps) == 3 and watch.steps[0][0] == before != bits(averaged)
    own = {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    for _, seen, given in watch.steps:
        batch = {(image.numpy().tobytes(), int(label)) for image, label in zip(seen, given, strict=True)}
        assert len(batch) == 4 and batch <= own  # each with the class that it was drawn for
    assert bits(drawer) == untouched


def test_no_steps_change_no_bit_and_draw_nothing(recipe: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, averaged = Watch(monkeypatch), network(1)
    before = bits(averaged)
    correct(averaged, network(2), recipe, TERMS.model_copy(update={"steps": 0}), 1)
    assert (bits(averaged), watch.drawn) == (before, [])


def test_a_round_gives_the_same_bits_twice_and_another_round_others(recipe: Preset) -> None:
    state = torch.random.get_rng_state()

    def made(round_number: int) -> bytes:
        averaged = copy.deepcopy(one)
        correct(averaged, two, recipe, TERMS, round_number)
        return bits(averaged)

    one, two = network(1), network(2)
    state = torch.random.get_rng_state()
    first = made(1)
    torch.manual_seed(99)
    assert made(1) == first != made(2)
    torch.random.set_rng_state(state)
    made(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert correction_seed(1, 5) != correction_seed(2, 5) != correction_seed(2, 6)
    assert correction_seed(1, 5) != site_seed(1, "anna", 5)


def test_a_loss_that_is_not_finite_is_refused(recipe: Preset) -> None:
    averaged = network(1)
    with torch.no_grad():
        next(averaged.parameters()).fill_(float("nan"))
    with pytest.raises(CosiloError, match="not finite at step 1"):
        correct(averaged, network(2), recipe, TERMS, 1)


def run(**changes: object) -> Manifest:
    return manifest_of(SITES, **changes)


def test_a_manifest_without_it_says_nothing_of_it() -> None:
    without, with_it = run(), run(correction={"samples": 8})
    assert b"correction" not in without.canonical() and b"correction" not in without.explicit().canonical()
    assert parse_manifest(with_it.canonical()).correction == CorrectionTerms(samples=8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"personal": ["norms"]}}, "whole model"),
        ({"training": {"control_variates": True}}, "whole model"),
        ({"correction": {"sampler_steps": 1000}, "schedule": {"train_timesteps": 900}}, "train_timesteps"),
        ({"correction": {"rate": 1}}, "rate"),
    ],
)
def test_what_cannot_be_corrected_is_refused(manifest: Manifest, changes: dict[str, Any], said: str) -> None:
    base = manifest.model_dump(mode="json")
    merged = {name: {**base[name], **value} for name, value in changes.items()}
    with pytest.raises(ValidationError, match=said):
        Manifest.model_validate({**base, **merged})


@pytest.mark.parametrize(("every", "steps", "due"), [(1, 1, [1, 2, 3, 4]), (2, 1, [2, 4]), (1, 0, [])])
def test_which_rounds_are_corrected(every: int, steps: int, due: list[int]) -> None:
    terms = CorrectionTerms(every=every, steps=steps)
    assert [number for number in range(1, 5) if terms.due(number)] == due


@pytest.fixture
def manifest(recipe: Preset) -> Manifest:
    return run(**recipe.model_dump(mode="json"), tensors=tensor_table(TINY).to_plain(), correction=TERMS.model_dump(mode="json"))


def weights_file(path: Path, seed: int) -> Path:
    write_weights(path, tensor_table(TINY), vector_blocks(network(seed)))
    return path


def test_the_worker_replaces_the_file_by_the_corrected_average(manifest: Manifest, recipe: Preset, tmp_path: Path) -> None:
    weights, drawer = weights_file(tmp_path / "weights", 1), weights_file(tmp_path / "drawer", 2)
    averaged = network(1)
    correct(averaged, network(2), recipe, TERMS, 4)
    expected = tmp_path / "expected"
    write_weights(expected, tensor_table(TINY), vector_blocks(averaged))
    Corrector(threads=torch.get_num_threads()).correct(manifest, 4, weights, drawer)
    assert weights.read_bytes() == expected.read_bytes()
    assert drawer.read_bytes() == weights_file(tmp_path / "again", 2).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "drawer", "expected", "weights"]


def test_a_correction_that_takes_too_long_leaves_the_average(manifest: Manifest, tmp_path: Path) -> None:
    weights = weights_file(tmp_path / "weights", 1)
    before = weights.read_bytes()
    with pytest.raises(CosiloError, match="longer than 0 s"):
        Corrector(timeout_s=0.01).correct(manifest, 1, weights, weights)
    assert weights.read_bytes() == before and list(tmp_path.iterdir()) == [weights]


def test_a_stop_ends_a_correction_and_lets_none_begin(manifest: Manifest, tmp_path: Path) -> None:
    weights, corrector = weights_file(tmp_path / "weights", 1), Corrector()
    before = weights.read_bytes()
    stopper = threading.Timer(0.2, corrector.stop)  # the worker loads torch for longer; earlier or later, it is stopped
    stopper.start()
    long = manifest.model_copy(update={"correction": CorrectionTerms(samples=10_000, steps=10_000)})
    for _ in range(2):
        with pytest.raises(CorrectionStopped):
            corrector.correct(long, 1, weights, weights)
    stopper.join()
    assert weights.read_bytes() == before and list(tmp_path.iterdir()) == [weights]


def test_a_worker_whose_coordinator_was_killed_ends_by_itself() -> None:
    job = {"task": "correct", "parent": 0}  # as it is for the orphan, the parent is another one
    found = subprocess.run([sys.executable, "-c", ORPHAN], input=json.dumps(job).encode(), timeout=120)
    assert found.returncode == ORPHANED


def test_what_the_worker_refuses_is_said(manifest: Manifest, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    write_weights(
        weights,
        tensor_table(TINY.model_copy(update={"num_classes": 2})),
        vector_blocks(build_unet(TINY.model_copy(update={"num_classes": 2}))),
    )
    job = {
        name: getattr(manifest, name).model_dump(mode="json") for name in ("architecture", "schedule", "training", "sampling", "correction")
    }
    with pytest.raises(CosiloError):
        perform({"task": "correct", **job, "round": 1, "weights": str(weights), "drawer": str(weights), "out": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()
