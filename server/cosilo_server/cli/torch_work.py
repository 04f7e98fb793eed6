"""The two things an admin's machine does with torch: naming a model's tensors, and writing a folder that diffusers
loads.

The only module of the command line from which torch is reached, and only from inside these functions: it takes
seconds to load, and no other command waits for it. Must not know the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cosilo_common.diffusion.specification import Architecture, Schedule
from cosilo_common.weights import TensorTable


def tensor_table(architecture: Architecture) -> TensorTable:
    """Names and shapes of the model's tensors; takes no memory, whatever the model's size."""
    from cosilo_common.diffusion import model

    return model.tensor_table(architecture)


def export_folder(
    weights: Path, architecture: Architecture, schedule: Schedule, to: Path, class_index: int | None, card: Callable[[Path], str]
) -> None:
    """Writes a diffusers folder from a weights or ema file, whole or not at all; class_index: for stock pipelines,
    one class only; card: gives its README.md, from the folder."""
    from cosilo_common.diffusion.export import export_pipeline

    export_pipeline(weights, architecture, schedule, to, class_index, card)
