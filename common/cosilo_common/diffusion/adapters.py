"""LoRA adapters in a UNet, made by peft: their tensors, their first values, and the whole model that they and their base are.

Owns how `lora.Lora` becomes peft's configuration and how its layers are named in a tensor table. Must not know runs, rounds or the network.
peft is an extra, loaded by the first call that needs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import save_file

from cosilo_common.diffusion.lora import Lora, LoraBase, require_peft
from cosilo_common.diffusion.model import build_unet, load_vector, ordered_parameters, tensor_table
from cosilo_common.diffusion.residual_unet import ResidualUNet
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable, open_vector

LAYERS_SHOWN: Final = 12  # names of layers in a refusal: a UNet has some ten different ones
_PACKAGE: Final = "cosilo-common"
_PEFT_PREFIX: Final = "base_model.model."  # what peft's own files have before each name


def adapter_table(architecture: Architecture, terms: Lora) -> TensorTable:
    """Names (sorted) and shapes of the adapters' tensors: LAYER.lora_A.weight and LAYER.lora_B.weight. On the meta device: no memory.

    Raises CosiloError for a target that is no linear layer's and no convolution's name.
    """
    with torch.device("meta"):
        unet = build_unet(architecture)
        adapt(unet, terms)
    return TensorTable.of((name, parameter.shape) for name, parameter in ordered_parameters(unet))


def initial_adapters(architecture: Architecture, terms: Lora, seed: int) -> dict[str, torch.Tensor]:
    """First adapters by name, sorted: each A drawn by peft from the seed, each B zero, so that the model is its base (arXiv 2106.09685, 4.1).

    The same seed gives the same bits on the same torch and peft. Leaves the global generator alone.
    """
    with torch.random.fork_rng(devices=[]):
        unet = build_unet(architecture)
        torch.manual_seed(seed)
        adapt(unet, terms)
    return {name: parameter.detach() for name, parameter in ordered_parameters(unet)}


def adapt(unet: torch.nn.Module, terms: Lora) -> None:
    """Puts an adapter beside each target of a network, in place, and freezes all else; `ordered_parameters` then gives the adapters' alone.

    Raises CosiloError as `adapter_table` does.
    """
    peft = _peft()
    _check_targets(unet, terms)
    peft.inject_adapter_in_model(_configuration(terms), unet)
    for name, parameter in ordered_parameters(unet):
        parameter.requires_grad_(not (terms.freeze_a and name.endswith(".lora_A.weight")))


def adapted_unet(architecture: Architecture, base: LoraBase) -> UNet2DModel | ResidualUNet:
    """The base with adapters whose values are not set yet. Raises CosiloError where the base's file is another architecture's."""
    unet = build_unet(architecture)
    load_vector(unet, open_vector(base.weights, tensor_table(architecture)))
    adapt(unet, base.terms)
    return unet


def whole_unet(architecture: Architecture, weights: Path, base: LoraBase | None = None) -> UNet2DModel | ResidualUNet:
    """The model that a weights or ema file is: itself, or, over a base, the base with each adapter added to its layer: W + (alpha / r) B A."""
    if base is None:
        unet = build_unet(architecture)
        load_vector(unet, open_vector(weights, tensor_table(architecture)))
        return unet
    adapted = adapted_unet(architecture, base)
    load_vector(adapted, open_vector(weights, adapter_table(architecture, base.terms)))
    return merged(adapted, architecture)


def merged(adapted: torch.nn.Module, architecture: Architecture) -> UNet2DModel | ResidualUNet:
    """A plain network that computes what the adapted one does; that one is left merged, and of no more use."""
    _peft()
    from peft.tuners.lora import LoraLayer

    for layer in [module for module in adapted.modules() if isinstance(module, LoraLayer)]:
        layer.merge()
    state = {name.replace(".base_layer.", "."): value for name, value in adapted.state_dict().items() if ".lora_" not in name}
    with torch.random.fork_rng(devices=[]):
        unet = build_unet(architecture)
    unet.load_state_dict(state)
    return unet


def save_adapter(folder: Path, architecture: Architecture, weights: Path, terms: Lora) -> None:
    """Writes adapters alone in peft's form: `peft.PeftModel.from_pretrained(base, folder)` reads it."""
    _peft()
    table = adapter_table(architecture, terms)
    vector, shapes = open_vector(weights, table), dict(table.entries)
    tensors = {_PEFT_PREFIX + name: torch.tensor(vector[place]).view(shapes[name]) for name, place in table.slices().items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    configuration = _configuration(terms).to_dict()
    configuration["target_modules"] = sorted(terms.targets)  # peft holds a set, of no order
    (folder / "adapter_config.json").write_text(json.dumps(configuration, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _configuration(terms: Lora) -> Any:
    """peft's words for a run's. Nothing that is not the paper's: no bias, no rank-stabilised scale."""
    return _peft().LoraConfig(
        r=terms.rank,
        lora_alpha=terms.alpha,
        target_modules=list(terms.targets),
        lora_dropout=terms.dropout,
        bias="none",
        inference_mode=False,
    )


def _check_targets(unet: torch.nn.Module, terms: Lora) -> None:
    """peft passes over a target that fits nothing where another one fits; here that is an error, as is a layer that it could not adapt."""
    layers = dict(unet.named_modules())
    able = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}
    for target in terms.targets:
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found or not able.issuperset(found):
            what = "no layer of this network is called" if not found else "adapters stand beside linear layers and convolutions, not beside"
            names = sorted({_last(name) for name in able})[:LAYERS_SHOWN]
            raise CosiloError("adapt model", f"lora.targets: {what} {target!r}", f"choose among {', '.join(names)}")


def _last(name: str) -> str:
    """The end of a layer's name by which a person would name it: with its list's name where it is a number in one."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _peft() -> Any:
    require_peft("adapt model", _PACKAGE)
    import peft

    return peft
