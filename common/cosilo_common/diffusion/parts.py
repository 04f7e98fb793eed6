"""The parts of a network by name, so that a run can say which of them stay at the sites.

Owns which tensor belongs to which part. Must not know torch, files or sums. A part is a set of whole tensors, the same at every site
and in every round: so all vectors of a round are equally long, and their masks cancel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

from cosilo_common.diffusion.lora import Lora, frozen_names
from cosilo_common.diffusion.specification import Architecture
from cosilo_common.weights import TensorTable

_CONTROL: Final = "z-control/"
_Belongs = Callable[[str, int], bool]  # a tensor's name, and the network's levels
_UNET2D_NORM: Final = re.compile(r"(^|\.)(norm\d*|group_norm|conv_norm_out)\.")
_UNET2D: Final[Mapping[str, _Belongs]] = MappingProxyType(
    {
        "norms": lambda name, _: _UNET2D_NORM.search(name) is not None,
        "class_embedding": lambda name, _: name.startswith("class_embedding."),
        "time_embedding": lambda name, _: name.startswith("time_embedding."),
        "encoder": lambda name, _: name.startswith(("conv_in.", "down_blocks.")),
        "bottleneck": lambda name, _: name.startswith("mid_block."),
        "decoder": lambda name, _: name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")),
    }
)
# `residual_unet` nests a level in the one above it: the deepest is the bottleneck, what enters the others is the encoder.
_RESIDUAL: Final[Mapping[str, _Belongs]] = MappingProxyType(
    {
        "norms": lambda name, _: False,
        "class_embedding": lambda name, _: name.startswith("classes."),
        "time_embedding": lambda name, _: name.startswith("multiples"),
        "encoder": lambda name, levels: _depth(name) < levels - 1 and ".enter." in f".{name}",
        "bottleneck": lambda name, levels: _depth(name) == levels - 1 and levels > 1,
        "decoder": lambda name, levels: _depth(name) < levels - 1 and ".leave." in f".{name}",
    }
)


def personal_names(table: TensorTable, architecture: Architecture, parts: Sequence[str]) -> frozenset[str]:
    """The tensors of these parts (`specification.Training.personal`). Raises ValueError for a part without any, or where nothing is left."""
    belongs = _RESIDUAL if architecture.network == "residual" else _UNET2D
    levels, found = len(architecture.block_out_channels), set()
    for part in parts:
        of_part = {name for name, _ in table.entries if belongs[part](name, levels)}
        if not of_part:
            raise ValueError(f"personal: this network has no {part}")
        found |= of_part
    if len(found) == len(table.entries):
        raise ValueError("personal: every tensor would stay at the sites, and nothing would be trained together")
    return frozenset(found)


@dataclass(frozen=True)
class Split:
    """A model's vector in two: what is summed, and what stays at each site.

    personal: names of the latter, possibly none. frozen: names of those that nobody trains, in what sites fetch all the same.
    controlled: whether control variates (SCAFFOLD) of the summed tensors travel as well: after the update in a sum, after the model in what
    sites fetch, after the personal tensors in what a site keeps.
    """

    table: TensorTable
    personal: frozenset[str] = frozenset()
    controlled: bool = False
    frozen: frozenset[str] = frozenset()

    @property
    def unsummed(self) -> frozenset[str]:
        """The tensors that no sum has."""
        return self.personal | self.frozen

    @cached_property
    def shared_table(self) -> TensorTable:
        """The summed tensors in the model's own order."""
        return TensorTable(tuple(entry for entry in self.table.entries if entry[0] not in self.unsummed)) if self.unsummed else self.table

    @cached_property
    def personal_table(self) -> TensorTable | None:
        """The tensors that stay, or None."""
        return TensorTable(tuple(entry for entry in self.table.entries if entry[0] in self.personal)) if self.personal else None

    @property
    def control_entries(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The control variates' entries, which sort after every tensor of a model; none where the run has none."""
        return tuple((_CONTROL + name, shape) for name, shape in self.shared_table.entries) if self.controlled else ()

    @cached_property
    def base_table(self) -> TensorTable:
        """What sites fetch: the model, then the control variates."""
        return TensorTable((*self.table.entries, *self.control_entries)) if self.controlled else self.table

    @cached_property
    def kept_table(self) -> TensorTable | None:
        """What a site keeps between rounds: its personal tensors, then its own control variates; None for nothing."""
        personal = self.personal_table.entries if self.personal_table is not None else ()
        return TensorTable((*personal, *self.control_entries)) if personal or self.controlled else None

    @property
    def summed_size(self) -> int:
        """Values of an update in a sum."""
        return self.shared_table.size * (2 if self.controlled else 1)

    @cached_property
    def shared_runs(self) -> tuple[slice, ...]:
        """Where the summed tensors lie in the model's vector: ascending, as few as can be."""
        return self._runs(lambda name: name not in self.unsummed)

    @cached_property
    def personal_runs(self) -> tuple[slice, ...]:
        """Where the tensors that stay lie in the model's vector: ascending, as few as can be."""
        return self._runs(lambda name: name in self.personal)

    @cached_property
    def unsummed_runs(self) -> tuple[slice, ...]:
        """Where the tensors lie that no sum has: ascending, as few as can be."""
        return self._runs(lambda name: name in self.unsummed)

    def _runs(self, among: Callable[[str], bool]) -> tuple[slice, ...]:
        runs: list[slice] = []
        for name, place in self.table.slices().items():
            if not among(name):
                continue
            if runs and runs[-1].stop == place.start:
                runs[-1] = slice(runs[-1].start, place.stop)
            else:
                runs.append(place)
        return tuple(runs)


def split_of(
    table: TensorTable, architecture: Architecture, parts: Sequence[str], controlled: bool = False, lora: Lora | None = None
) -> Split:
    """The split of a model, or of its adapters, by the parts that stay at the sites. Raises ValueError as `personal_names` and
    `frozen_names` do."""
    frozen = frozenset() if lora is None else frozen_names(table, lora)
    split = Split(table, (personal_names(table, architecture, parts) if parts else frozenset()) - frozen, controlled, frozen)
    if len(split.unsummed) == len(table.entries):
        raise ValueError("personal: what is not frozen would stay at the sites, and nothing would be trained together")
    return split


def _depth(name: str) -> int:
    return name.split(".").count("below") if name.startswith(("below.", "enter.", "leave.")) else -1
