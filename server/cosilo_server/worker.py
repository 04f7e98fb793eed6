"""Torch work beside the coordinator, as a process of its own: initial weights, sample grids, and corrections of an average.

Reads one JSON job from standard input, writes files where the job says, exits 0; a refusal is one JSON line on standard error and exit 1.
Must not know sites, stores or sockets.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from cosilo_common.diffusion.adapters import adapter_table, initial_adapters, whole_unet
from cosilo_common.diffusion.correction import correct
from cosilo_common.diffusion.grid import grid_png
from cosilo_common.diffusion.lora import Lora, LoraBase
from cosilo_common.diffusion.model import initial_state, tensor_table, vector_blocks
from cosilo_common.diffusion.sampling import draw_images, to_uint8
from cosilo_common.diffusion.specification import Architecture, Preset, Sampling, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import CorrectionTerms
from cosilo_common.weights import TensorTable, write_weights
from cosilo_server.warm_start import copy_weights

ORPHAN_CHECK_S = 1.0
ORPHANED = 3  # an exit code that nobody is left to read
JOB_BYTES_MAX = 32 << 20  # a manifest's tensor table at its largest


def main() -> int:
    """Does the one job."""
    job = json.loads(sys.stdin.buffer.read(JOB_BYTES_MAX))
    if "parent" in job:
        threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    torch.set_num_threads(int(job.get("threads", 1)))
    try:
        perform(job)
    except CosiloError as error:
        print(json.dumps({"operation": error.operation, "subject": error.subject, "hint": error.hint}), file=sys.stderr)
        return 1
    return 0


def perform(job: dict[str, Any]) -> None:
    """One task, here. Raises CosiloError where it is refused."""
    {"initial": _initial, "base": _base, "sample": _sample, "correct": _correct}[job["task"]](job)


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone: a coordinator that was killed begins the same work again."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(ORPHANED)


def _initial(job: dict[str, Any]) -> None:
    """First weights, from a file or untrained from the run's seed, checked against the manifest's tensor table."""
    architecture = Architecture.model_validate(job["architecture"])
    declared = TensorTable(tuple((name, tuple(shape)) for name, shape in job["tensors"]))
    lora = Lora.model_validate(job["lora"]) if job["lora"] else None
    table = tensor_table(architecture) if lora is None else adapter_table(architecture, lora)
    if table != declared:
        raise CosiloError(
            "make initial weights",
            "the manifest's tensors are not those of its architecture here",
            "create the run with the same releases of diffusers and peft as the coordinator's",
        )
    if job["source"]:
        copy_weights(Path(job["source"]), table, Path(job["out"]))
        return
    state = initial_state(architecture, job["seed"]) if lora is None else initial_adapters(architecture, lora, job["seed"])
    write_weights(Path(job["out"]), table, (tensor.flatten().numpy() for tensor in state.values()))


def _base(job: dict[str, Any]) -> None:
    """What a run's adapters stand on: a file, checked against the architecture's tensors and written again byte for byte."""
    copy_weights(Path(job["source"]), tensor_table(Architecture.model_validate(job["architecture"])), Path(job["out"]))


def _sample(job: dict[str, Any]) -> None:
    """A class-conditional grid: a row a class."""
    architecture = Architecture.model_validate(job["architecture"])
    schedule = Schedule.model_validate(job["schedule"])
    sampling = Sampling.model_validate(job["sampling"])
    base = LoraBase(Lora.model_validate(job["lora"]), Path(job["base"])) if job["lora"] else None
    unet = whole_unet(architecture, Path(job["weights"]), base)
    per_class = job["per_class"]
    labels = torch.arange(architecture.num_classes).repeat_interleave(per_class)
    images = draw_images(unet, schedule, labels, sampling, torch.Generator().manual_seed(job["seed"]))
    grid_png(Path(job["out"]), to_uint8(images), per_class)


def _correct(job: dict[str, Any]) -> None:
    """A round's average, trained on images that the global model draws."""
    torch.use_deterministic_algorithms(True)  # a sum that is opened again after a crash must give the same checkpoint
    recipe = Preset.model_validate({name: job[name] for name in ("architecture", "schedule", "training", "sampling")})
    averaged, drawer = (whole_unet(recipe.architecture, Path(job[name])) for name in ("weights", "drawer"))
    correct(averaged, drawer, recipe, CorrectionTerms.model_validate(job["correction"]), job["round"])
    write_weights(Path(job["out"]), tensor_table(recipe.architecture), vector_blocks(averaged))


if __name__ == "__main__":
    sys.exit(main())
