"""Deals Fashion-MNIST's training images out to the sites of a demo, with label skew: /parts/NAME gets that site's images and no others.

Standard library only. Each class is spread over the sites in Dirichlet(alpha) proportions of its own (Hsu, Qi and Brown, arXiv 1909.06335,
section 3), by a seed: the same parts on every machine. What is there already is left alone. COSILO_DEMO_SEED, COSILO_DEMO_ALPHA change it.
"""

import gzip
import os
import random
import sys
from pathlib import Path

SOURCE = Path("/usr/share/datasets/fashion-mnist")
PARTS = Path("/parts")
SITES = ("northgate", "riverside", "lakeview", "st-anna")
SEED, ALPHA = 7, 1.0
LEAST = 4000  # of 60,000 over four: a site with fewer would hardly count
DRAWS_MAX = 1000
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
HEADER_BYTES = {IMAGES: 16, LABELS: 8}


def deal(labels: bytes, seed: int, alpha: float) -> list[list[int]]:
    """The numbers of each site's images, sorted; every image has exactly one owner."""
    source = random.Random(seed)
    for _ in range(DRAWS_MAX):
        parts: list[list[int]] = [[] for _ in SITES]
        for label in sorted(set(labels)):
            members = [index for index, value in enumerate(labels) if value == label]
            source.shuffle(members)
            shares = [source.gammavariate(alpha, 1.0) for _ in SITES]  # Dirichlet: gammas over their sum
            begin, given = 0, 0.0
            for part, share in zip(parts, shares, strict=True):
                given += share
                end = len(members) if part is parts[-1] else round(given / sum(shares) * len(members))
                part.extend(members[begin:end])
                begin = end
        if min(map(len, parts)) >= LEAST:
            return [sorted(part) for part in parts]
    raise SystemExit(f"error: no deal at alpha {alpha} leaves {LEAST} images at each site; give a larger COSILO_DEMO_ALPHA")


def main() -> int:
    """Writes what is missing."""
    body = {name: gzip.decompress((SOURCE / f"{name}.gz").read_bytes()) for name in HEADER_BYTES}
    labels = body[LABELS][HEADER_BYTES[LABELS] :]
    pixels = memoryview(body[IMAGES])[HEADER_BYTES[IMAGES] :]
    size = len(pixels) // len(labels)
    parts = deal(labels, int(os.environ.get("COSILO_DEMO_SEED", SEED)), float(os.environ.get("COSILO_DEMO_ALPHA", ALPHA)))
    for site, part in zip(SITES, parts, strict=True):
        counts = [sum(labels[index] == label for index in part) for label in range(10)]
        if (PARTS / site / LABELS).exists():
            print(f"{site}: there already", flush=True)
            continue
        count = len(part).to_bytes(4, "big")
        _write(
            PARTS / site / IMAGES, body[IMAGES][:4] + count + body[IMAGES][8:16] + b"".join(pixels[k * size : (k + 1) * size] for k in part)
        )
        _write(PARTS / site / LABELS, body[LABELS][:4] + count + bytes(labels[k] for k in part))
        print(f"{site}: {len(part)} images, by class {counts}", flush=True)
    return 0


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)  # the labels come last, so that half a part is dealt again


if __name__ == "__main__":
    sys.exit(main())
