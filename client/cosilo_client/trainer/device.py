"""Which device trains, with which precision, beside which other ranks.

Owns the choice and what follows from it (autocast, memory format, fused optimiser). Must not know data, losses or
rounds.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed
import torch.utils.deterministic

# What torch's CPU allocator and NVIDIA's libraries say in a RuntimeError of no type of its own.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "_ALLOC_FAILED")


@dataclass(frozen=True)
class Workplace:
    """One rank's place: its device, and how many ranks share the site's batch."""

    device: torch.device
    rank: int
    world: int
    bf16: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 autocast where the device gains from it: CUDA with bf16 units.

        On CPUs without AMX it is several times slower.
        """
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def memory_format(self) -> torch.memory_format:
        """channels_last suits tensor cores; on a CPU it is within noise."""
        return torch.channels_last if self.cuda else torch.contiguous_format

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on the CPU."""
        if self.world > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()


def take_place() -> Workplace:
    """This process's place: CUDA if there is one, else the CPU; joins the other ranks if torchrun started several."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # The same images and seed give the same update bits; on CUDA that would cost more than it is worth.
        torch.use_deterministic_algorithms(True)
        # That mode would also fill every new tensor with NaN to show reads of what nobody wrote: no bit of a result
        # depends on it, and it costs a small UNet some 4 % of its speed.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property, made when it is imported
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Workplace(device, rank, world, bf16=cuda and torch.cuda.is_bf16_supported())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU (a plain RuntimeError)."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)
