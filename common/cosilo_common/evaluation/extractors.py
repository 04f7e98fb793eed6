"""Who turns images into features, by name: `efficientnet-lite0`, `inception`, or a module of the user's own.

Owns names, weights files and their digests, and how integer images become what a network takes. Must not know what features are for. A
figure is worth nothing without its extractor's name and digest: both stand in every result.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file

from cosilo_common.errors import CosiloError
from cosilo_common.evaluation import inception, lite0
from cosilo_common.manifest import EvaluationTerms

LITE0: Final = "efficientnet-lite0"
INCEPTION: Final = "inception"
LITE0_SIDE_PIXELS: Final = 64  # four times 16, twice 32: what the study's sizes are enlarged to; the network itself takes any
LITE0_SHA256: Final = "0c677c314df2a69239bef9609a095a957201d5092462c5ace5d8bf3e0201bbd7"
BATCH: Final = 100  # images at once
WEIGHTS_FOLDER: Final = "COSILO_FEATURES"  # an environment variable: where converted weights are

Pixels = NDArray[np.uint8]
Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Features:
    """vectors: (n, d) float32; logits: (n, classes) float32, or None where the extractor has no classes."""

    vectors: NDArray[np.float32]
    logits: NDArray[np.float32] | None


@dataclass(frozen=True)
class Extractor:
    """A feature network. name: with its input size; digest: of its weights, or of the module's own file; side_pixels: of its input."""

    name: str
    digest: str
    side_pixels: int
    network: Network

    def features(self, images: Pixels) -> Features:
        """Features of images (n, C, H, W) uint8: one plane is repeated, the size fitted bilinearly (with antialiasing when it shrinks)."""
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
            raise CosiloError("extract features", f"images are {images.dtype} {images.shape}", "give uint8 (n, 1 or 3, H, W)")
        parts = [self.network(self._prepare(images[k : k + BATCH])) for k in range(0, len(images), BATCH)]
        classes = [part[1] for part in parts if part[1] is not None]
        return Features(torch.cat([part[0] for part in parts]).numpy(), torch.cat(classes).numpy() if classes else None)

    def _prepare(self, images: Pixels) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).float().expand(-1, 3, -1, -1)
        if x.shape[-2:] == (self.side_pixels, self.side_pixels):
            return x
        return F.interpolate(x, size=(self.side_pixels, self.side_pixels), mode="bilinear", antialias=True)


def extractor(name: str, *, weights: Path | None = None, sha256: str | None = None, side_pixels: int | None = None) -> Extractor:
    """The extractor of that name. side_pixels: of its input, where it is not the network's usual; EfficientNet-lite0 takes others.

    name: "efficientnet-lite0" (weights: its converted file, unless it is at `lite0_path`); "inception" (weights: a safetensors file, with
    its sha256); or "module:callable", which is called without arguments and returns (side_pixels, network): code of whoever runs this,
    never of a run. Raises CosiloError where a file is missing or another one.
    """
    found = _found(name, weights, sha256, side_pixels)
    if side_pixels not in (None, found.side_pixels):
        raise CosiloError("load extractor", f"{found.name} does not take images of {side_pixels} pixels", f"say {found.side_pixels}")
    return found


def _found(name: str, weights: Path | None, sha256: str | None, side_pixels: int | None) -> Extractor:
    if name == LITE0:
        state, side = _load(weights or lite0_path(), sha256 or LITE0_SHA256, "run python tools/convert_efficientnet.py"), side_pixels
        return Extractor(f"{LITE0}@{side or LITE0_SIDE_PIXELS}", sha256 or LITE0_SHA256, side or LITE0_SIDE_PIXELS, lite0.Lite0(state))
    if name == INCEPTION:
        if weights is None or sha256 is None:
            raise CosiloError("load extractor", "inception's weights do not come with Cosilo", "give their path and their SHA-256")
        state = _load(weights, sha256, "convert them with tools/convert_efficientnet.py --checkpoint FILE --sha256 HEX --out FILE")
        return Extractor(f"{INCEPTION}@{inception.SIDE_PIXELS}", sha256, inception.SIDE_PIXELS, inception.Inception(state))
    if ":" in name:
        return _own(name)
    raise CosiloError("load extractor", f"none is called {name!r}", f"choose {LITE0}, {INCEPTION} or module:callable")


def named(terms: EvaluationTerms, weights: Path | None) -> Extractor:
    """The extractor of a run's terms, proved by its digest. Whoever calls this has decided that a module of that name may run here."""
    found = extractor(terms.extractor, weights=weights, sha256=terms.sha256, side_pixels=terms.side_pixels)
    if found.digest != terms.sha256:
        raise CosiloError(
            "load extractor", f"{found.name} has SHA-256 {found.digest}, the run says {terms.sha256}", "use the run's own file"
        )
    return found


def lite0_path() -> Path:
    """Where the converted EfficientNet-lite0 is: $COSILO_FEATURES, or cosilo/features in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(WEIGHTS_FOLDER) or cache / "cosilo" / "features") / "efficientnet-lite0.safetensors"


def _load(path: Path, sha256: str, hint: str) -> dict[str, torch.Tensor]:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CosiloError("load extractor", f"{path}: {error.strerror}", hint) from None
    if found != sha256:
        raise CosiloError("load extractor", f"{path} has SHA-256 {found}, not {sha256}", hint)
    return load_file(path)


def _own(name: str) -> Extractor:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        side_pixels, network = getattr(module, attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise CosiloError("load extractor", f"{name}: {error}", "it must be module:callable and return (side_pixels, network)") from None
    source = Path(module.__file__ or "")
    digest = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
    return Extractor(f"{name}@{side_pixels}", digest, int(side_pixels), network)
