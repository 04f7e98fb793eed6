"""FID's Inception-v3, in plain torch, for who has its weights: the network of the published FIDs.

Owns the network's shape. Must not know where its weights file is. Names are those of the converted state dict that the PyTorch
ports of FID use (Conv2d_1a_3x3.conv.weight, ...). It is the TensorFlow network of 2015-12-05, which differs from the paper's: averages
leave out the padding, and the last block's pool takes the largest. Source of the shape: Szegedy et al., arXiv 1512.00567, table 1.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

FEATURES = 2048
SIDE_PIXELS = 299
_BN_EPSILON = 1e-3


class Inception:
    """state: tensors by name, with the 1008 classes of the original. Raises KeyError where one is missing."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._folded = {name.removesuffix(".conv.weight"): _fold(state, name) for name in state if name.endswith(".conv.weight")}
        self._classes = (state["fc.weight"], state["fc.bias"])

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (n, 2048), logits) of images (n, 3, 299, 299), float in [0, 255]."""
        x = self._unit(images / 127.5 - 1.0, "Conv2d_1a_3x3", stride=2, padded=False)
        x = self._unit(x, "Conv2d_2a_3x3", padded=False)
        x = F.max_pool2d(self._unit(x, "Conv2d_2b_3x3"), 3, 2)
        x = self._unit(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self._unit(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._grid35(x, block)
        x = self._to_grid17(x, "Mixed_6a")
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._grid17(x, block)
        x = self._to_grid8(x, "Mixed_7a")
        x = self._grid8(x, "Mixed_7b", _average(x))
        x = self._grid8(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1))
        features = x.mean((2, 3))
        return features, F.linear(features, *self._classes)

    def _grid35(self, x: torch.Tensor, block: str) -> torch.Tensor:
        branches = [
            self._chain(x, block, "branch1x1"),
            self._chain(x, block, "branch5x5_1", "branch5x5_2"),
            self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self._chain(_average(x), block, "branch_pool"),
        ]
        return torch.cat(branches, 1)

    def _to_grid17(self, x: torch.Tensor, block: str) -> torch.Tensor:
        double = self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = [self._halved(x, block, "branch3x3"), self._halved(double, block, "branch3x3dbl_3"), F.max_pool2d(x, 3, 2)]
        return torch.cat(branches, 1)

    def _grid17(self, x: torch.Tensor, block: str) -> torch.Tensor:
        branches = [
            self._chain(x, block, "branch1x1"),
            self._chain(x, block, *(f"branch7x7_{k}" for k in (1, 2, 3))),
            self._chain(x, block, *(f"branch7x7dbl_{k}" for k in (1, 2, 3, 4, 5))),
            self._chain(_average(x), block, "branch_pool"),
        ]
        return torch.cat(branches, 1)

    def _to_grid8(self, x: torch.Tensor, block: str) -> torch.Tensor:
        three = self._chain(x, block, "branch3x3_1")
        seven = self._chain(x, block, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
        return torch.cat([self._halved(three, block, "branch3x3_2"), self._halved(seven, block, "branch7x7x3_4"), F.max_pool2d(x, 3, 2)], 1)

    def _grid8(self, x: torch.Tensor, block: str, pool: torch.Tensor) -> torch.Tensor:
        three = self._chain(x, block, "branch3x3_1")
        double = self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = [
            self._chain(x, block, "branch1x1"),
            *(self._chain(three, block, f"branch3x3_2{side}") for side in "ab"),
            *(self._chain(double, block, f"branch3x3dbl_3{side}") for side in "ab"),
            self._chain(pool, block, "branch_pool"),
        ]
        return torch.cat(branches, 1)

    def _chain(self, x: torch.Tensor, block: str, *units: str) -> torch.Tensor:
        for unit in units:
            x = self._unit(x, f"{block}.{unit}")
        return x

    def _halved(self, x: torch.Tensor, block: str, unit: str) -> torch.Tensor:
        return self._unit(x, f"{block}.{unit}", stride=2, padded=False)

    def _unit(self, x: torch.Tensor, name: str, *, stride: int = 1, padded: bool = True) -> torch.Tensor:
        weight, bias = self._folded[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if padded else (0, 0)
        return F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _fold(state: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with its batch norm behind it."""
    norm = name.removesuffix("conv.weight") + "bn"
    deviation = torch.sqrt(state[f"{norm}.running_var"] + _BN_EPSILON)
    scale = state[f"{norm}.weight"] / deviation if f"{norm}.weight" in state else 1.0 / deviation
    return state[name] * scale[:, None, None, None], state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
