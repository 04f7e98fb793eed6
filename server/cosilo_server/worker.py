"""Torch work beside the coordinator, as a process of its own: initial weights, and sample grids.

Reads one JSON job from standard input, writes files where the job says, exits 0; a refusal is one JSON line on standard error and exit 1.
Must not know sites, stores or sockets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cosilo_common.diffusion.grid import grid_png
from cosilo_common.diffusion.model import build_unet, initial_state, load_vector, tensor_table
from cosilo_common.diffusion.sampling import draw_images, to_uint8
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable, open_vector, write_weights
from cosilo_server.warm_start import copy_weights

JOB_BYTES_MAX = 32 << 20  # a manifest's tensor table at its largest


def main() -> int:
    """Does the one job."""
    job = json.loads(sys.stdin.buffer.read(JOB_BYTES_MAX))
    torch.set_num_threads(int(job.get("threads", 1)))
    try:
        {"initial": _initial, "sample": _sample}[job["task"]](job)
    except CosiloError as error:
        print(json.dumps({"operation": error.operation, "subject": error.subject, "hint": error.hint}), file=sys.stderr)
        return 1
    return 0


def _initial(job: dict[str, Any]) -> None:
    """First weights, from a file or untrained from the run's seed, checked against the manifest's tensor table."""
    architecture = Architecture.model_validate(job["architecture"])
    declared = TensorTable(tuple((name, tuple(shape)) for name, shape in job["tensors"]))
    table = tensor_table(architecture)
    if table != declared:
        raise CosiloError(
            "make initial weights",
            "the manifest's tensors are not those of its architecture here",
            "create the run with the same diffusers release as the coordinator's",
        )
    if job["source"]:
        copy_weights(Path(job["source"]), table, Path(job["out"]))
        return
    state = initial_state(architecture, job["seed"])
    write_weights(Path(job["out"]), table, (tensor.flatten().numpy() for tensor in state.values()))


def _sample(job: dict[str, Any]) -> None:
    """A class-conditional grid: a row a class."""
    architecture = Architecture.model_validate(job["architecture"])
    schedule = Schedule.model_validate(job["schedule"])
    sampling = Sampling.model_validate(job["sampling"])
    unet = build_unet(architecture)
    load_vector(unet, open_vector(Path(job["weights"]), tensor_table(architecture)))
    per_class = job["per_class"]
    labels = torch.arange(architecture.num_classes).repeat_interleave(per_class)
    images = draw_images(unet, schedule, labels, sampling, torch.Generator().manual_seed(job["seed"]))
    grid_png(Path(job["out"]), to_uint8(images), per_class)


if __name__ == "__main__":
    sys.exit(main())
