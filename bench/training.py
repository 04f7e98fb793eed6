"""A site's trainer beside the plain loop of diffusers' unconditional training example: images a second, and a warm round's start.

    python -m bench.training [--quick] [--threads N ...] [--presets NAME ...]

Owns the comparison. Both train the same UNet on the same PNG bytes' images, taking turns; one thread is timed
in processor seconds, more in seconds. The plain loop, in our own words after examples/unconditional_image_generation of diffusers: a
DataLoader that decodes and normalises each image, AdamW, clipping, EMAModel, the loss read at every step.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.figures import Figure, at_least, at_most, table
from cosilo_client.data import DataConfig
from cosilo_client.trainer.device import take_place
from cosilo_client.trainer.jobs import Progress, TrainJob
from cosilo_client.trainer.training import DeviceImages, train
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.diffusion.model import build_unet, initial_state, tensor_table
from cosilo_common.diffusion.objective import noise_schedule
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.specification import Preset
from cosilo_common.weights import write_weights

BATCH = 64
STEPS = {"fashion-16": 6, "mednist-32": 3, "ddpm-cifar10": 1}  # a turn of some seconds; the large net takes half a minute a step
TURNS = 5  # of which the median counts
SPEED_GOAL = 1.15
WARM_GOAL_S = 1.0
SEED = 11

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Maker = Callable[[], Callable[[], object]]


class Decoded(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What the example's dataset does at every access: decode the PNG, to float, to [-1, 1]."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self._files[index])) as picture:
            pixels = np.array(picture)
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return (torch.from_numpy(np.ascontiguousarray(planes)).float() / 255.0 - 0.5) / 0.5, 0


def measure(quick: bool = False) -> Iterator[Figure]:
    """Small presets only where it is to be quick."""
    names = ("fashion-16",) if quick else tuple(STEPS)
    for threads in (1,) if quick else (1, 2):
        yield from speeds(names, threads, 1 if quick else TURNS)
    yield from warm_start("fashion-16")


def speeds(names: tuple[str, ...], threads: int, turns: int) -> Iterator[Figure]:
    """Images a second of both loops, by preset."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in names:
            recipe = _recipe(name)
            pixels = _pixels(recipe, BATCH * STEPS[name])
            ours, plain = _alternate(partial(_ours, recipe, pixels), partial(_plain, recipe, pixels), turns, threads)
            images = len(pixels)
            yield Figure(
                f"training.{name}.threads-{threads}",
                images / ours,
                "images/s",
                "plain diffusers loop",
                images / plain,
                at_least(SPEED_GOAL),
            )
    finally:
        torch.set_num_threads(before)


def warm_start(name: str) -> Iterator[Figure]:
    """A trainer's second round: from the job to its first optimiser step, that batch's gradients included.

    The measuring of held-out losses, which every round begins with, is left out of the first figure and is the second.
    """
    recipe = _recipe(name)
    with tempfile.TemporaryDirectory(prefix="cosilo-bench-") as folder:
        root = Path(folder)
        job = _job(root, recipe)
        with _MeasuredWorkshop(take_place()) as workshop:
            cold, cold_measure = workshop.first_step_s(job)
            warm, warm_measure = workshop.first_step_s(job)
    yield Figure("training.start.cold", cold - cold_measure, "s")
    yield Figure("training.start.warm", warm - warm_measure, "s", "the goal, s", WARM_GOAL_S, at_most(1.0))
    yield Figure("training.start.warm.heldout", warm_measure, "s")


class _MeasuredWorkshop(Workshop):
    """A workshop that notes when training's first batch is in hand, and how long held-out losses took."""

    def __enter__(self) -> _MeasuredWorkshop:
        self._heldout_s = 0.0
        self._steps_s: list[float] = []
        self._hook = register_optimizer_step_pre_hook(self._stepping)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _stepping(self, *_: object) -> None:
        self._steps_s.append(time.perf_counter())

    def _measure(self, *arguments: Any) -> tuple[float, ...]:
        began_s = time.perf_counter()
        losses = super()._measure(*arguments)
        self._heldout_s = time.perf_counter() - began_s
        return losses

    def first_step_s(self, job: TrainJob) -> tuple[float, float]:
        """(to the first step, the held-out part of it), seconds."""
        self._steps_s.clear()
        began_s = time.perf_counter()
        self.perform(job, _silent)
        return self._steps_s[0] - began_s, self._heldout_s


def _job(root: Path, recipe: Preset) -> TrainJob:
    """A round of one step of one image, over 600 images in an npz."""
    pixels = _pixels(recipe, 600)
    np.savez(root / "images.npz", train_images=pixels.squeeze(), train_labels=np.zeros(len(pixels), np.int64))
    weights = root / "weights.safetensors"
    table_of = tensor_table(recipe.architecture)
    write_weights(weights, table_of, (tensor.numpy().ravel() for tensor in initial_state(recipe.architecture, SEED).values()))
    return TrainJob(
        weights=weights,
        update=root / "update.f32",
        architecture=recipe.architecture,
        schedule=recipe.schedule,
        training=recipe.training.model_copy(update={"max_steps": 1, "batch_size": 1}),
        data=DataConfig(kind="npz", path=root / "images.npz"),
        seed=SEED,
        threads=1,
    )


def _ours(recipe: Preset, pixels: Pixels) -> Callable[[], object]:
    unet = _unet(recipe)
    planes = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    count = len(pixels)
    data = DeviceImages(
        torch.from_numpy(np.ascontiguousarray(planes)), torch.zeros(count, dtype=torch.int64), torch.arange(count), torch.arange(0), 255, 0
    )
    place = take_place()
    return lambda: train(unet, data, recipe.schedule, recipe.training, SEED, None, place, _silent)


def _plain(recipe: Preset, pixels: Pixels) -> Callable[[], object]:
    unet = _unet(recipe)
    loader = torch.utils.data.DataLoader(Decoded([_png(image) for image in pixels]), batch_size=BATCH, shuffle=True)
    noiser = noise_schedule(recipe.schedule)
    ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=recipe.training.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6)

    def loop() -> None:
        unet.train()
        for images, labels in loader:
            noise = torch.randn(images.shape)
            timesteps = torch.randint(0, recipe.schedule.train_timesteps, (len(images),))
            noisy = noiser.add_noise(images, noise, timesteps)
            predicted = unet(noisy, timesteps, class_labels=labels).sample
            target = noise if recipe.schedule.prediction_type == "epsilon" else noiser.get_velocity(images, noise, timesteps)
            loss = torch.nn.functional.mse_loss(predicted.float(), target.float())
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            ema.step(unet.parameters())
            loss.item()

    return loop


def _alternate(make_ours: Maker, make_plain: Maker, turns: int, threads: int) -> tuple[float, float]:
    """Median seconds of a turn of each, after one that warms up."""
    # One thread's processor seconds do not see what else the machine does; two threads' would hide that one waits for the other.
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: tuple[list[float], list[float]] = ([], [])
    loops = (make_ours(), make_plain())
    for turn in range(turns + 1):
        for which, loop in enumerate(loops):
            # Each with torch's settings as it has them: the trainer's determinism is part of what it costs, and is none of the plain loop's.
            if which == 0:
                take_place()
            else:
                torch.use_deterministic_algorithms(False)
            began_s = clock()
            loop()
            if turn:
                taken[which].append(clock() - began_s)
    torch.use_deterministic_algorithms(False)
    return median(taken[0]), median(taken[1])


def _recipe(name: str) -> Preset:
    """The preset with batches of BATCH and one epoch."""
    recipe = preset(name)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": BATCH, "local_epochs": 1})})


def _pixels(recipe: Preset, count: int) -> Pixels:
    """Smooth grey or colour images, (n, S, S) or (n, S, S, C) uint8: a PNG of mere noise would take longer to decode than a real one."""
    size, channels = recipe.architecture.sample_size, recipe.architecture.in_channels
    draw = np.random.default_rng(SEED)
    waves = np.sin(draw.uniform(0.1, 0.6, (count, 1, 1, channels)) * (np.arange(size)[:, None] + np.arange(size))[None, :, :, None])
    pixels: Pixels = (127.5 * (1.0 + waves)).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def _png(image: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _unet(recipe: Preset) -> torch.nn.Module:
    torch.manual_seed(SEED)
    return build_unet(recipe.architecture)


def _silent(_: Progress) -> None:
    """Nobody listens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fashion-16 only, one thread, one turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--presets", nargs="+", choices=list(STEPS), default=list(STEPS))
    arguments = parser.parse_args()
    if arguments.quick:
        print(table(measure(True)))
        return
    figures = [figure for threads in arguments.threads for figure in speeds(tuple(arguments.presets), threads, TURNS)]
    print(table([*figures, *warm_start("fashion-16")]))


if __name__ == "__main__":
    main()
