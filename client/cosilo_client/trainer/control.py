"""SCAFFOLD's correction of a site's gradients (Karimireddy et al., arXiv 1910.06378, algorithm 1), and what it leaves for the next round.

Owns c, c_i and the mean of a round's gradients. Must not know files, optimisers or rounds. Every gradient g becomes g - c_i + c; the next
c_i is the mean of the g along the site's own path. Under plain SGD that is the paper's option II, c_i - c + (x - y_i) / (K lr), for the
steps then add up to K lr times the mean of g - c_i + c; under Adam, whose steps are no multiple of gradients, it is still a mean
gradient, where option II would not be one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cosilo_common.diffusion.model import ordered_parameters
from cosilo_common.weights import TensorTable, Vector


class ControlVariates:
    """One round's: over the tensors of `table` (the summed ones), in its order. server, own: c and c_i, float32 (d,)."""

    def __init__(self, unet: torch.nn.Module, table: TensorTable, server: Vector, own: Vector) -> None:
        slices = table.slices()
        self._parameters = [(parameter, slices[name]) for name, parameter in ordered_parameters(unet) if name in slices]
        self._corrections = [
            torch.from_numpy(np.array(server[place] - own[place])).view(parameter.shape).to(parameter.device)
            for parameter, place in self._parameters
        ]
        self._sums = [torch.zeros_like(correction) for correction in self._corrections]
        self._steps = 0

    def correct(self) -> None:
        """Notes a step's gradients and corrects them in place."""
        self._steps += 1
        for (parameter, _), correction, total in zip(self._parameters, self._corrections, self._sums, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad += correction

    def own_next(self) -> Iterator[Vector]:
        """The next c_i, a block a tensor. After one step at least."""
        for total in self._sums:
            block: Vector = (total / self._steps).to("cpu").contiguous().view(-1).numpy()
            yield block
