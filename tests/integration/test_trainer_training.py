"""Local training in this process: bit for bit what a plain loop does, and no different however memory splits it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosilo_client.data import DataConfig
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, Progress, TrainerFailed, TrainJob
from cosilo_client.trainer.training import Batch, DeviceImages, batches, steps_in_round, train
from cosilo_client.trainer.update import write_update
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, tensor_table, vector_blocks
from cosilo_common.diffusion.objective import noise_schedule, per_image_loss
from cosilo_common.diffusion.presets import PRESETS
from cosilo_common.diffusion.specification import Architecture, Schedule, Training
from cosilo_common.weights import write_weights

TINY = Architecture(
    sample_size=8,
    in_channels=1,
    num_classes=10,
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=4,
    norm_num_groups=4,
)
SCHEDULE = Schedule()
ALONE = Workplace(torch.device("cpu"), rank=0, world=1, bf16=False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> DeviceImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (23,), generator=generator)
    return DeviceImages(images, labels, torch.arange(20), torch.arange(20, 23), 255, 0)


@pytest.fixture(scope="module")
def start() -> np.ndarray:
    return np.concatenate([tensor.numpy().ravel() for tensor in initial_state(TINY, 1).values()])


def vector(unet: torch.nn.Module) -> np.ndarray:
    return np.concatenate(list(vector_blocks(unet)))


def trained(start: np.ndarray, data: DeviceImages, training: Training, micro_batch: int | None = None) -> np.ndarray:
    unet = build_unet(TINY)
    load_vector(unet, start)
    train(unet, data, SCHEDULE, training, 99, micro_batch, ALONE, lambda progress: None)
    return vector(unet)


def plain_loop(start: np.ndarray, data: DeviceImages, training: Training, seed: int) -> np.ndarray:
    """One site's round, as `cosilo_common.diffusion.seeding` describes it."""
    unet = build_unet(TINY)
    load_vector(unet, start)
    anchors = [parameter.detach().clone() for parameter in unet.parameters()]
    optimiser_kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimiser]
    optimiser = optimiser_kind(unet.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(seed)
    noiser = noise_schedule(SCHEDULE)
    for _ in range(training.local_epochs):
        order = data.train[torch.randperm(len(data.train), generator=generator)]
        for batch in order.split(training.batch_size) if training.steps_per_epoch is None else order.tensor_split(training.steps_per_epoch):
            timesteps = torch.randint(0, SCHEDULE.train_timesteps, (len(batch),), generator=generator)
            noise = torch.randn((len(batch), 1, 8, 8), generator=generator)
            images = data.images[batch].float() * (2.0 / 255) - 1.0
            if training.horizontal_flip:
                flips = torch.rand(len(batch), generator=generator) < 0.5
                images[flips] = images[flips].flip(-1)
            optimiser.zero_grad()
            loss = per_image_loss(unet, noiser, images, data.labels[batch], timesteps, noise).mean()
            loss.backward()
            for parameter, anchor in zip(unet.parameters(), anchors, strict=True):
                parameter.grad += training.proximal_mu * (parameter.detach() - anchor)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), training.max_grad_norm)
            optimiser.step()
    return vector(unet)


@pytest.mark.parametrize(
    "training",
    [
        Training(local_epochs=2, batch_size=8, learning_rate=1e-3),
        Training(batch_size=7, learning_rate=1e-2, optimiser="adamw", weight_decay=0.1, proximal_mu=0.5, horizontal_flip=True),
        Training(local_epochs=2, steps_per_epoch=6, learning_rate=1e-3),
    ],
    ids=["adam", "adamw-prox-flip", "equal-steps"],
)
def test_training_is_the_documented_loop_bit_for_bit(start: np.ndarray, data: DeviceImages, training: Training) -> None:
    result = trained(start, data, training)
    assert np.array_equal(result, plain_loop(start, data, training, 99))
    assert not np.array_equal(result, start)


def test_dropout_repeats_with_the_seed(data: DeviceImages) -> None:
    dropping = TINY.model_copy(update={"dropout": 0.5})
    results = []
    for _ in range(2):
        unet = build_unet(dropping)
        load_vector(unet, np.concatenate([v.numpy().ravel() for v in initial_state(dropping, 1).values()]))
        train(unet, data, SCHEDULE, Training(batch_size=10), 5, None, ALONE, lambda progress: None)
        results.append(vector(unet))
    assert np.array_equal(*results)


def test_half_the_micro_batch_is_the_same_step(start: np.ndarray, data: DeviceImages) -> None:
    # Plain gradients: Adam's first steps would turn rounding into whole learning rates.
    training = Training(batch_size=20, max_grad_norm=0.0, max_steps=1)
    unet = build_unet(TINY)
    gradients = []
    for micro_batch in (None, 10, 3):
        load_vector(unet, start)
        train(unet, data, SCHEDULE, training, 99, micro_batch, ALONE, lambda progress: None)
        gradients.append(torch.cat([parameter.grad.ravel() for parameter in unet.parameters()]))
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 1e-5


def test_the_proximal_term_holds_weights_back(start: np.ndarray, data: DeviceImages) -> None:
    free, held = (
        np.linalg.norm(trained(start, data, Training(local_epochs=4, batch_size=5, learning_rate=1e-3, proximal_mu=mu)) - start)
        for mu in (0.0, 100.0)
    )
    assert held < free / 2


@pytest.mark.parametrize(("epochs", "batch", "limit", "steps"), [(1, 20, None, 1), (3, 8, None, 9), (3, 8, 4, 4), (1, 64, 100, 1)])
def test_steps_of_a_round(start: np.ndarray, data: DeviceImages, epochs: int, batch: int, limit: int | None, steps: int) -> None:
    training = Training(local_epochs=epochs, batch_size=batch, max_steps=limit)
    seen: list[Progress] = []
    unet = build_unet(TINY)
    load_vector(unet, start)
    outcome = train(unet, data, SCHEDULE, training, 1, None, ALONE, seen.append)
    assert steps_in_round(20, training) == outcome.steps == steps
    assert [progress.tenths for progress in seen] == sorted({10 * done // steps for done in range(1, steps + 1)} - {0})
    assert seen[-1].images == outcome.images


@pytest.mark.parametrize(("images", "sizes"), [(20, [4, 4, 3, 3, 3, 3]), (6, [1] * 6), (4, [1] * 4)])
def test_a_pass_is_cut_into_equal_steps(data: DeviceImages, images: int, sizes: list[int]) -> None:
    training = Training(local_epochs=2, steps_per_epoch=6)
    cut = list(batches(replace(data, train=torch.arange(images)), SCHEDULE, training, torch.Generator().manual_seed(3), 3))
    assert [len(batch.indices) for batch in cut] == 2 * sizes
    assert steps_in_round(images, training) == len(cut)
    for epoch in (cut[: len(sizes)], cut[len(sizes) :]):
        assert sorted(torch.cat([batch.indices for batch in epoch]).tolist()) == list(range(images))


def test_equal_steps_of_uneven_sites_are_together_the_pooled_step(start: np.ndarray, data: DeviceImages) -> None:
    """The sites' first gradients, weighted by images as the round weighs updates, are that of one batch of all their images."""
    training = Training(steps_per_epoch=2)
    parts = [replace(data, train=torch.arange(20)[a:b]) for a, b in ((0, 14), (14, 20))]
    noiser, gradients, drawn = noise_schedule(SCHEDULE), [], []
    for seed, part in enumerate(parts):
        first = next(batches(part, SCHEDULE, training, torch.Generator().manual_seed(seed), seed))
        drawn.append(first)
        gradients.append(first_gradient(start, noiser, data, [first]))
    weighted = sum(len(part.train) / 20 * gradient for part, gradient in zip(parts, gradients, strict=True))
    pooled = first_gradient(start, noiser, data, drawn)
    assert [len(batch.indices) for batch in drawn] == [7, 3]
    assert float((weighted - pooled).norm() / pooled.norm()) < 1e-5


def first_gradient(start: np.ndarray, noiser: object, data: DeviceImages, drawn: list[Batch]) -> torch.Tensor:
    """The gradient at the start, as a vector, of the mean loss over batches put together."""
    unet = build_unet(TINY)
    load_vector(unet, start)
    indices = torch.cat([batch.indices for batch in drawn])
    timesteps, noise = (torch.cat([getattr(batch.draw, what) for batch in drawn]) for what in ("timesteps", "noise"))
    images = data.images[indices].float() * (2.0 / 255) - 1.0
    per_image_loss(unet, noiser, images, data.labels[indices], timesteps, noise).mean().backward()
    return torch.cat([parameter.grad.ravel() for parameter in unet.parameters()])


def test_a_round_that_diverges_is_refused(start: np.ndarray, data: DeviceImages) -> None:
    with pytest.raises(TrainerFailed, match="the training loss is not finite") as caught:
        trained(np.full_like(start, np.nan), data, Training(batch_size=10))
    assert caught.value.code is FailureCode.NON_FINITE


# --- the update's file ------------------------------------------------------------------------------------------------


def test_an_update_is_the_difference_in_little_endian_floats(tmp_path: Path) -> None:
    base = np.array([1, 2, 3], np.float32)
    write_update(tmp_path / "update", [np.array([1.5, 2], np.float32), np.array([0], np.float32)], base)
    assert (tmp_path / "update").read_bytes() == np.array([0.5, 0, -3], "<f4").tobytes()
    assert (tmp_path / "update").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("blocks", "code"),
    [([[1.0, np.nan]], FailureCode.NON_FINITE), ([[np.inf, 1.0]], FailureCode.NON_FINITE), ([[1.0]], FailureCode.DATA)],
)
def test_an_unfit_update_leaves_no_file(tmp_path: Path, blocks: list[list[float]], code: FailureCode) -> None:
    with pytest.raises(TrainerFailed) as caught:
        write_update(tmp_path / "update", [np.array(b, np.float32) for b in blocks], np.zeros(2, np.float32))
    assert caught.value.code is code
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "update.part").symlink_to("/dev/full")
    with pytest.raises(TrainerFailed, match="No space left on device; free 400000 bytes") as caught:
        write_update(tmp_path / "update", [np.ones(100_000, np.float32)], np.zeros(100_000, np.float32))
    assert caught.value.code is FailureCode.DISK
    assert list(tmp_path.iterdir()) == []


# --- a whole job ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainJob]:
    folder = tmp_path_factory.mktemp("job")
    digits = PRESETS["digits"]
    (folder / "mine").write_text("\n".join(map(str, range(300))))
    states = initial_state(digits.architecture, 0)
    write_weights(
        folder / "global.safetensors",
        tensor_table(digits.architecture),
        [tensor.numpy().ravel() for tensor in states.values()],
    )

    def make(**training: Any) -> TrainJob:
        return TrainJob(
            weights=folder / "global.safetensors",
            update=folder / "update",
            architecture=digits.architecture,
            schedule=digits.schedule,
            training=digits.training.model_copy(update=training),
            data=DataConfig(kind="digits", index_file=folder / "mine"),
            seed=1,
            threads=1,
        )

    return make


def test_training_on_digits_lowers_the_heldout_loss(make_job: Callable[..., TrainJob]) -> None:
    workshop = Workshop(ALONE)
    job = make_job(local_epochs=3, batch_size=32)
    result = workshop.perform(job, lambda progress: None)
    assert (result.weight, result.steps, result.images, result.skipped) == (270, 27, 810, 0)
    assert len(result.heldout_losses) == 4
    table = tensor_table(job.architecture)
    base = np.memmap(job.weights, "<f4", "r", offset=job.weights.stat().st_size - 4 * table.size)
    after = job.weights.with_name("after.safetensors")
    write_weights(after, table, [base + np.fromfile(job.update, "<f4")])
    fields = job.model_dump(exclude={"kind", "weights", "update", "keep_personal", "seed", "micro_batch"})
    evaluated = workshop.perform(EvaluateJob(weights=after, **fields), lambda progress: None)
    assert (evaluated.weight, evaluated.steps) == (270, 0)
    assert sum(evaluated.heldout_losses) < 0.6 * sum(result.heldout_losses)


def test_a_class_that_the_model_lacks_is_refused(make_job: Callable[..., TrainJob]) -> None:
    job = make_job()
    few = job.model_copy(update={"architecture": job.architecture.model_copy(update={"num_classes": 9})})
    with pytest.raises(Exception, match=r"10 classes .* for a model of 9"):
        Workshop(ALONE).perform(few, lambda progress: None)
