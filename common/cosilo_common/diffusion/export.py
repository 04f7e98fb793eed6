"""Turns a weights file into a folder that diffusers loads: class-conditional, or one class for stock pipelines.

Owns the export; must not know runs, checkpoints' history or the network. Nothing is written half: the folder appears
whole or not at all.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

from cosilo_common.diffusion.adapters import save_adapter, whole_unet
from cosilo_common.diffusion.lora import LoraBase
from cosilo_common.diffusion.model import build_unet
from cosilo_common.diffusion.pipeline import CosiloPipeline
from cosilo_common.diffusion.sampling import sampling_scheduler
from cosilo_common.diffusion.specification import Architecture, Schedule
from cosilo_common.errors import CosiloError

ADAPTER_FOLDER = "adapter"  # in an exported folder; diffusers passes over it


def export_pipeline(
    weights: Path,
    architecture: Architecture,
    schedule: Schedule,
    to: Path,
    class_index: int | None = None,
    card: Callable[[Path], str] | None = None,
    base: LoraBase | None = None,
) -> None:
    """Write a diffusers folder from a checkpoint's weights or ema file.

    class_index: None writes a folder for CosiloPipeline; a class writes one that stock diffusers.DDIMPipeline samples
    that class from. to: a folder that does not exist yet, or is empty. card: gives its README.md, from the folder. base: of a
    run of adapters: these are added to it, and stand besides in ADAPTER_FOLDER alone, in peft's form. Raises CosiloError for a
    wrong class, unfit weights or a folder in use.
    """
    if class_index is not None and not 0 <= class_index < architecture.num_classes:
        raise CosiloError("export", f"class {class_index} does not exist", f"choose from 0 to {architecture.num_classes - 1}")
    if class_index is not None and architecture.network != "unet2d":
        raise CosiloError(
            "export", f"stock pipelines cannot hold network = {architecture.network!r}", "export without --class, for CosiloPipeline"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CosiloError("export", f"{to} exists and is not an empty folder", "choose another folder")
    unet = whole_unet(architecture, weights, base)
    unet.eval()
    scheduler = sampling_scheduler(schedule, "ddim")
    pipeline = (
        CosiloPipeline(unet, scheduler) if class_index is None else DDIMPipeline(fold_class(unet, architecture, class_index), scheduler)
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as scratch:
        made = Path(scratch, "pipeline")
        pipeline.save_pretrained(str(made), safe_serialization=True)
        if base is not None:
            save_adapter(made / ADAPTER_FOLDER, architecture, weights, base.terms)
        if card is not None:
            (made / "README.md").write_text(card(made), encoding="utf-8")
        if to.exists():
            to.rmdir()
        shutil.move(made, to)


def fold_class(unet: UNet2DModel, architecture: Architecture, class_index: int) -> UNet2DModel:
    """An unconditional UNet that equals `unet` at one class.

    UNet2DModel adds the class vector to the time embedding's output, so adding it to that embedding's last bias is the
    same function; stock pipelines call the UNet without labels.
    """
    state = unet.state_dict()
    vector = state.pop("class_embedding.weight")[class_index]
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + vector
    with torch.random.fork_rng(devices=[]):
        folded = build_unet(architecture, conditional=False)
    folded.load_state_dict(state)
    return folded.eval()
