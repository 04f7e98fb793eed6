"""One site's local training: epochs of batches, one optimiser, FedProx's pull, gradient accumulation.

Owns the loop. Must not know files, sockets or rounds. Its random numbers are `cosilo_common.diffusion.seeding`'s
convention, and a plain loop that follows it gets the same bits on a CPU: gradients of the mean loss, plus mu (w -
w_global), clipped by their global norm in the module's parameter order, then the optimiser's step.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from cosilo_client.trainer.control import ControlVariates
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.jobs import FailureCode, Progress, TrainerFailed
from cosilo_common.diffusion.objective import (
    Draw,
    anchor_pull,
    anchored_loss,
    draw_noise,
    loss_weights,
    noise_schedule,
    per_image_loss,
    sobol_sequence,
    to_model_range,
)
from cosilo_common.diffusion.specification import Schedule, Training

PROGRESS_S_MAX = 10.0  # deadlines watch progress, so a slow tenth must still show that it lives


@dataclass(frozen=True)
class DeviceImages:
    """A site's images near the device: (n, C, S, S) uint8 or int16 (the bits of uint16), labels (n,), two parts."""

    images: torch.Tensor
    labels: torch.Tensor
    train: torch.Tensor
    heldout: torch.Tensor
    full_scale: int
    skipped: int


@dataclass(frozen=True)
class Trained:
    """What a round's training came to; images: drawn in all epochs."""

    mean_loss: float
    steps: int
    images: int
    seconds: float


@dataclass(frozen=True)
class Batch:
    """One optimiser step's images by index into DeviceImages, and their random numbers."""

    indices: torch.Tensor
    draw: Draw


def train(
    module: torch.nn.Module,
    data: DeviceImages,
    schedule: Schedule,
    training: Training,
    seed: int,
    micro_batch: int | None,
    place: Workplace,
    report: Callable[[Progress], None],
    control: ControlVariates | None = None,
) -> Trained:
    """Train the module in place for one round.

    module: the UNet or its DistributedDataParallel wrapper, holding the round's global weights. micro_batch: most
    images a pass on this rank. Raises TrainerFailed where the loss stops being finite, and whatever torch raises when
    memory runs out.
    """
    torch.manual_seed(seed + place.rank)  # dropout only; everything else comes from the generator below
    generator = torch.Generator().manual_seed(seed)
    noiser = noise_schedule(schedule)
    weights = loss_weights(noiser, training)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]  # all, but for those under adapters
    anchors = [parameter.detach().clone() for parameter in parameters] if training.proximal_mu else []
    teacher = _Teacher.of(module, schedule, training)
    optimiser = build_optimiser(parameters, training)
    meter = _Meter(steps_in_round(len(data.train), training), place, report)
    module.train()
    for batch in batches(data, schedule, training, generator, seed):
        optimiser.zero_grad(set_to_none=True)
        size = len(batch.indices)
        for share, last in _micro_batches(size, micro_batch, place):
            with _gradients_stay(module, last):
                with place.autocast():
                    losses = _losses(module, noiser, data, batch, share, place, teacher)
                if weights is not None and len(share):
                    losses = losses * weights[batch.draw.timesteps[share]].to(losses.device)
                # The mean over the whole batch; DDP averages over ranks, hence the factor.
                loss = losses.sum() * (place.world / size)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            meter.add(losses.detach().sum(), len(share))
        if control is not None:
            control.correct()
        for parameter, anchor in zip(parameters, anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=training.proximal_mu)
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimiser.step()
        meter.step(size)
    return meter.finish()


def batches(data: DeviceImages, schedule: Schedule, training: Training, generator: torch.Generator, seed: int) -> Iterator[Batch]:
    """The round's batches, drawn as `seeding` says."""
    sequence = sobol_sequence(seed) if training.timesteps == "sobol" else None
    done = 0
    for _ in range(training.local_epochs):
        order = data.train[torch.randperm(len(data.train), generator=generator)]
        for indices in _cut(order, training):
            if training.max_steps is not None and done == training.max_steps:
                return
            shape = (len(indices), *data.images.shape[1:])
            yield Batch(indices, draw_noise(shape, schedule.train_timesteps, training.horizontal_flip, generator, sequence))
            done += 1


def steps_in_round(images: int, training: Training) -> int:
    """Optimiser steps that a site with that many training images takes."""
    an_epoch = -(-images // training.batch_size) if training.steps_per_epoch is None else min(images, training.steps_per_epoch)
    steps = training.local_epochs * an_epoch
    return steps if training.max_steps is None else min(steps, training.max_steps)


def _cut(order: torch.Tensor, training: Training) -> tuple[torch.Tensor, ...]:
    """An epoch's batches: of batch_size, the last one smaller; or steps_per_epoch of them, whose sizes differ by one at most."""
    if training.steps_per_epoch is None:
        return torch.split(order, training.batch_size)
    return torch.tensor_split(order, min(len(order), training.steps_per_epoch))


def build_optimiser(parameters: list[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Adam or AdamW with torch's betas and epsilon, or SGD without momentum, fresh for each round. Fused: one pass over each tensor."""
    kind: type[torch.optim.SGD] | type[torch.optim.Adam]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[training.optimiser]
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


@dataclass(frozen=True)
class _Teacher:
    """The model that the round began with, and how strongly predictions at each timestep are held to its own."""

    model: torch.nn.Module
    pull: torch.Tensor

    @classmethod
    def of(cls, module: torch.nn.Module, schedule: Schedule, training: Training) -> "_Teacher | None":
        pull = anchor_pull(schedule, training)
        if pull is None:
            return None
        began = module.module if isinstance(module, DistributedDataParallel) else module
        return cls(copy.deepcopy(began).eval().requires_grad_(False), pull)


def _losses(
    module: torch.nn.Module,
    noiser: object,
    data: DeviceImages,
    batch: Batch,
    share: torch.Tensor,
    place: Workplace,
    teacher: _Teacher | None = None,
) -> torch.Tensor:
    """Losses of this rank's part of a batch: (b,).

    Share: positions in the batch; an empty one gives zeros that still take part in DDP.
    """
    idle = not len(share)
    if idle:
        share = torch.zeros(1, dtype=torch.int64)
    chosen = batch.indices[share].to(data.images.device)
    images = to_model_range(_to_device(data.images[chosen], place), data.full_scale)
    if batch.draw.flips is not None:
        flips = batch.draw.flips[share].to(place.device)
        images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    images = images.contiguous(memory_format=place.memory_format())
    timesteps, noise = _to_device(batch.draw.timesteps[share], place), _to_device(batch.draw.noise[share], place)
    labels = _to_device(data.labels[chosen], place)
    if teacher is None:
        losses = per_image_loss(module, noiser, images, labels, timesteps, noise)
    else:
        pull = _to_device(teacher.pull[batch.draw.timesteps[share]], place)
        losses = anchored_loss(module, teacher.model, noiser, images, labels, timesteps, noise, pull)
    return losses * 0.0 if idle else losses


def _to_device(tensor: torch.Tensor, place: Workplace) -> torch.Tensor:
    """The tensor on the device; copies from the host are pinned, so that the host need not wait for them."""
    if place.cuda and tensor.device.type == "cpu":
        return tensor.pin_memory().to(place.device, non_blocking=True)
    return tensor


def _micro_batches(size: int, micro_batch: int | None, place: Workplace) -> Iterator[tuple[torch.Tensor, bool]]:
    """This rank's positions in a batch, in passes of at most micro_batch, and whether each is the last.

    Every rank has as many passes.
    """
    share = torch.arange(place.rank, size, place.world)
    largest = -(-size // place.world)
    width = min(micro_batch or largest, largest)
    for start in range(0, largest, width):
        yield share[start : start + width], start + width >= largest


def _gradients_stay(module: torch.nn.Module, last: bool) -> AbstractContextManager[object]:
    """Ranks exchange gradients once a step, in its last pass."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


class _Meter:
    """This rank's losses, read from the device at each tenth or PROGRESS_S_MAX only: no step waits for it."""

    def __init__(self, steps: int, place: Workplace, report: Callable[[Progress], None]) -> None:
        self._steps, self._place, self._report = steps, place, report
        self._sum = torch.zeros((), dtype=torch.float64, device=place.device)
        self._sum_seen = 0.0
        self._own = self._own_seen = self._images = self._done = self._tenths = 0
        self._began = self._reported = time.monotonic()

    def add(self, loss_sum: torch.Tensor, images: int) -> None:
        self._sum += loss_sum
        self._own += images

    def step(self, images: int) -> None:
        self._images += images
        self._done += 1
        tenths = 10 * self._done // self._steps
        now = time.monotonic()
        if tenths > self._tenths or now - self._reported > PROGRESS_S_MAX:
            self._tenths, self._reported = tenths, now
            self._tell(now)

    def finish(self) -> Trained:
        seconds = time.monotonic() - self._began
        mean_loss = float(self._place.total(self._sum)) / self._images
        return Trained(mean_loss, self._done, self._images, seconds)

    def _tell(self, now: float) -> None:
        total = float(self._sum)
        if not math.isfinite(total):
            raise TrainerFailed(
                FailureCode.NON_FINITE,
                f"the training loss is not finite after {self._done} steps",
                "ask the run's admin for a lower learning rate",
            )
        # A rank can be without images for a while where batches are smaller than the number of ranks.
        loss = (total - self._sum_seen) / max(1, self._own - self._own_seen)
        self._sum_seen, self._own_seen = total, self._own
        speed = self._images / max(now - self._began, 1e-9)
        self._report(Progress(tenths=self._tenths, images=self._images, images_per_second=speed, loss=loss))
