"""What a manifest says of low-rank adapters (LoRA; Hu et al., arXiv 2106.09685), and whether this machine could train them.

Owns the bounds on those values and the check for peft. Must not know torch or peft itself: both daemons read manifests and load neither.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, StringConstraints, model_validator

from cosilo_common.diffusion.specification import Flag, Plain, Whole
from cosilo_common.errors import CosiloError
from cosilo_common.weights import ELEMENTS_MAX, TensorTable

RANK_MAX: Final = 1024  # published adapters have 1 to 256; above a layer's width a rank adds nothing
TARGETS_MAX: Final = 64  # the largest UNets here have some twenty names of layers
BASE_BYTES_MAX: Final = 4 * ELEMENTS_MAX  # as large as weights can be
_ADAPTER: Final = re.compile(r".+\.lora_([AB])\.weight")
_LENGTH_BYTES: Final = 8  # before a safetensors header
_FLOAT_BYTES: Final = 4

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Target = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=128)]


class Lora(Plain):
    """A frozen base, and an adapter beside each of its layers that are named: W + (alpha / rank) B A, of which only A and B are trained.

    base: SHA-256 of the base's canonical weights file, for the run's architecture. base_bytes: of that file; no site fetches more.
    rank: r, A's rows and B's columns. targets: names of linear layers and convolutions, or how a layer's dotted name ends; each must fit
    one at least. dropout: of what enters an adapter, in training. freeze_a: A stays as it was drawn and only B is trained and summed,
    so that the mean of the sites' adapters is the adapter of their mean (FFA-LoRA; Sun et al., arXiv 2403.12313).
    """

    base: Digest
    base_bytes: Annotated[Whole, Field(ge=1, le=BASE_BYTES_MAX)]
    rank: Annotated[Whole, Field(ge=1, le=RANK_MAX)] = 8
    alpha: Annotated[float, Field(gt=0, le=1e4)] = 8.0
    targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=TARGETS_MAX)] = ("to_q", "to_k", "to_v", "to_out.0")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze_a: Flag = False

    @model_validator(mode="after")
    def _each_target_once(self) -> Self:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets: a name stands twice")
        return self


@dataclass(frozen=True)
class LoraBase:
    """What the adapters of a run stand on. weights: the base's file, whose digest whoever names it here has checked."""

    terms: Lora
    weights: Path


def frozen_names(table: TensorTable, terms: Lora) -> frozenset[str]:
    """Which tensors of a run of adapters nobody trains: each A, under freeze_a. Raises ValueError for a tensor that is no adapter's."""
    sides = {name: _ADAPTER.fullmatch(name) for name, _ in table.entries}
    for name, side in sides.items():
        if side is None:
            raise ValueError(f"tensor {name} is no adapter's, and [lora] trains nothing else")
    return frozenset(name for name, side in sides.items() if terms.freeze_a and side is not None and side[1] == "A")


def file_bytes(table: TensorTable) -> int:
    """Bytes of the canonical weights file of a table."""
    return _LENGTH_BYTES + len(table.header_bytes) + _FLOAT_BYTES * table.size


def require_peft(operation: str, package: str) -> None:
    """Raises CosiloError where peft is not installed. package: the distribution whose extra brings it."""
    if importlib.util.find_spec("peft") is None:
        raise CosiloError(
            operation,
            "the run trains LoRA adapters, and peft is not installed here",
            f"pip install '{package}[lora]' (a wheelhouse without a registry: --extras lora)",
        )
