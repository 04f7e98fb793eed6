"""A round's encoding by its run's manifest, and at b = 24 each tensor's clip range by the last public aggregate.

Owns how a round's sections are cut, how clips follow from what the last mean update moved, and the bounds outside which a site refuses
them (docs/protocol.md, Clip ranges). Both sides call this. Must not know rounds, stores or who sent what. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from cosilo_common.encoding import CLIP_MIN, Encoding, Section
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.moments import clip_needed, packed_size
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.weights import TensorTable, Vector

HEADROOM: Final = (
    8.0  # measured on digits (docs/protocol.md): a site's largest change is up to 3.8, once 8.5, times the last mean's largest
)
CLIP_RATIO_MIN: Final = 2.0**-20  # of the manifest's clip: half of b's 24 bits go to sites and weights, so less gains nothing


def round_encoding(manifest: Manifest, kind: RoundKind, peaks: Sequence[float] = ()) -> Encoding:
    """How a round's vectors are encoded.

    A statistics round has no values. b = 32: the whole vector under the manifest's clip, and again for control variates. b = 24: a
    section a tensor, its clip from `peaks`, each tensor's largest change in the run's last closed training round; without any, the
    manifest's. A moments round has one section of its own terms, always at b = 32, and no losses; raises CosiloError where the manifest
    has no such terms.
    """
    if kind is RoundKind.MOMENTS:
        return _moments_encoding(manifest)
    terms, table = manifest.encoding, manifest.shared_table
    if kind is RoundKind.STATISTICS:
        sections: tuple[Section, ...] = ()
    elif terms.bits == 32:
        sections = (Section(table.size, terms.clip),) * (2 if manifest.training.control_variates else 1)
    else:
        sections = sections_of(table, clips_after(peaks, terms.clip) if peaks else (terms.clip,) * len(table.entries))
    return Encoding(
        bits=terms.bits,
        participants=len(manifest.participants),
        cap=terms.cap,
        sections=sections,
        loss_max=terms.loss_max,
        losses=manifest.loss_words,
    )


def _moments_encoding(manifest: Manifest) -> Encoding:
    terms = manifest.evaluation
    if terms is None:
        raise CosiloError("encode moments", f"run {manifest.name} has no [evaluation]", "create a run whose file has that table")
    section = Section(packed_size(terms.features), clip_needed(terms.feature_max))
    return Encoding(32, len(manifest.participants), terms.images_max, (section,), manifest.encoding.loss_max, 0)


def clips_after(peaks: Sequence[float], clip: float, headroom: float = HEADROOM) -> tuple[float, ...]:
    """Clip ranges for the round after a mean update with these peaks, within [least_clip(clip), clip].

    A tensor that did not move at all says nothing of its next move, and gets `clip`: behind a layer that starts at zero nothing moves in
    the first round, and everything in the second.
    """
    least = least_clip(clip)
    return tuple(min(clip, max(least, headroom * peak)) if peak > 0 else clip for peak in peaks)


def least_clip(clip: float) -> float:
    """The least clip range of a tensor, where the manifest's is `clip`."""
    return max(clip * CLIP_RATIO_MIN, CLIP_MIN)


def sections_of(table: TensorTable, clips: Sequence[float]) -> tuple[Section, ...]:
    """One section a tensor, in the table's order."""
    return tuple(Section(size, clip) for size, clip in zip(tensor_sizes(table), clips, strict=True))


def tensor_sizes(table: TensorTable) -> tuple[int, ...]:
    """Elements of each tensor."""
    return tuple(math.prod(shape) for _, shape in table.entries)


class TensorPeaks:
    """The largest absolute value in each tensor of a vector that comes in blocks, in any order."""

    def __init__(self, table: TensorTable) -> None:
        self._ends = np.cumsum(tensor_sizes(table))
        self._peaks = np.zeros(len(self._ends), np.float32)

    def note(self, start: int, block: Vector) -> None:
        """Takes the elements start .. start + n; block: float32 (n,)."""
        if not block.size:
            return
        first, last = np.searchsorted(self._ends, [start, start + block.size - 1], side="right")
        cuts = np.concatenate(([0], self._ends[first:last] - start))  # each tensor's first element within the block
        peaks = self._peaks[first : last + 1]
        np.maximum(peaks, np.maximum.reduceat(np.abs(block), cuts), out=peaks)

    @property
    def peaks(self) -> tuple[float, ...]:
        """One a tensor, in the table's order."""
        return tuple(float(peak) for peak in self._peaks)
