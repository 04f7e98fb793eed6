"""The UNet itself: built from an Architecture, and seen as one float32 vector in the tensor table's order.

Owns how an Architecture becomes diffusers' UNet2DModel, or `residual_unet`'s network, and how its parameters map to that vector. Must not know files,
rounds or training.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from cosilo_common.diffusion.residual_unet import ResidualUNet
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.errors import CosiloError
from cosilo_common.weights import TensorTable

_ADAPTER_NAME = ".default."  # by which peft calls an adapter that nobody named; no layer of a network here is called so


def build_unet(architecture: Architecture, *, conditional: bool = True) -> UNet2DModel | ResidualUNet:
    """The UNet, randomly initialised from torch's global generator, float32, on the default device.

    conditional: False leaves the class embedding out, for export to stock pipelines. Everything the Architecture does
    not name keeps diffusers' default. Raises CosiloError if the model has state that is not a float32 parameter: such
    state would not be federated.
    """
    if architecture.network == "residual":
        residual = ResidualUNet(
            sample_size=architecture.sample_size,
            in_channels=architecture.in_channels,
            num_class_embeds=architecture.num_classes,
            block_out_channels=architecture.block_out_channels,
            layers_per_block=architecture.layers_per_block,
            dropout=architecture.dropout,
        )
        refuse_unfederated_state(residual)
        return residual
    unet = UNet2DModel(
        sample_size=architecture.sample_size,
        in_channels=architecture.in_channels,
        out_channels=architecture.in_channels,
        block_out_channels=architecture.block_out_channels,
        layers_per_block=architecture.layers_per_block,
        down_block_types=architecture.down_block_types,
        up_block_types=architecture.up_block_types,
        add_attention=architecture.mid_attention,
        attention_head_dim=architecture.attention_head_dim,
        norm_num_groups=architecture.norm_num_groups,
        dropout=architecture.dropout,
        num_class_embeds=architecture.num_classes if conditional else None,
    )
    refuse_unfederated_state(unet)
    return unet


def refuse_unfederated_state(module: torch.nn.Module) -> None:
    """Raise CosiloError for buffers, or parameters that are not float32: only float32 parameters are averaged."""
    odd = [f"buffer {name}" for name, _ in module.named_buffers()]
    odd += [f"{name} ({p.dtype})" for name, p in module.named_parameters() if p.dtype != torch.float32]
    if odd:
        raise CosiloError("build model", f"state that cannot be federated: {', '.join(odd[:3])}", "use another diffusers release")


def tensor_table(architecture: Architecture) -> TensorTable:
    """Names (sorted) and shapes of the UNet's tensors.

    Built on the meta device: no memory, whatever the model's size.
    """
    with torch.device("meta"):
        unet = build_unet(architecture)
    return TensorTable.of((name, parameter.shape) for name, parameter in unet.named_parameters())


def initial_state(architecture: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Fresh float32 weights by name, sorted.

    The same seed gives the same bits on the same torch. Leaves the global generator alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(architecture)
    return {name: parameter.detach() for name, parameter in ordered_parameters(unet)}


def ordered_parameters(unet: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters in the tensor table's order: sorted by name. Of a network with adapters (`adapters.adapt`), the adapters' alone."""
    every = list(unet.named_parameters())
    adapters = [(name.replace(_ADAPTER_NAME, "."), parameter) for name, parameter in every if _ADAPTER_NAME in name]
    return sorted(adapters or every)


def load_vector(unet: torch.nn.Module, vector: npt.NDArray[np.float32]) -> None:
    """Copy one float32 vector (d,), in the table's order, into the parameters on whatever device they are."""
    parameters = ordered_parameters(unet)
    size = sum(parameter.numel() for _, parameter in parameters)
    if vector.shape != (size,):
        raise CosiloError("load weights", f"{vector.size} values for a model of {size}", "check that the weights belong to this run")
    offset = 0
    with torch.no_grad():
        for _, parameter in parameters:
            block = vector[offset : offset + parameter.numel()]
            # A copy of one tensor: memory-mapped weights are read-only, which torch cannot express.
            parameter.copy_(torch.from_numpy(np.array(block, dtype=np.float32)).view(parameter.shape))
            offset += parameter.numel()


def vector_blocks(unet: torch.nn.Module) -> Iterator[npt.NDArray[np.float32]]:
    """The parameters as flat float32 arrays in the table's order, one tensor at a time."""
    for _, parameter in ordered_parameters(unet):
        yield parameter.detach().to("cpu", torch.float32).contiguous().view(-1).numpy()
