"""Clip ranges at b = 24 on real updates: what one clip for all tensors loses, and how much headroom a tensor's own clip needs.

    python -m bench.clip_ranges [--sites 4] [--rounds 6] [--alpha 0.5] [--json FILE]

Trains the `digits` preset over sites with skewed labels, in this process and with the sites' own trainer. From the second round on
it encodes the round's updates with one clip, and with clips from the round before for several headrooms, sums the words, and compares
the opened mean with the mean in float64. `ratio` is the largest change of one site in one tensor over the tensor's largest mean change
in the round before: a headroom below it clips something.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cosilo_client.data.config import DataConfig
from cosilo_client.trainer.device import Workplace
from cosilo_client.trainer.jobs import TrainJob
from cosilo_client.trainer.workshop import Workshop
from cosilo_common.clip_ranges import TensorPeaks, clips_after, sections_of
from cosilo_common.diffusion.model import initial_state, tensor_table
from cosilo_common.diffusion.presets import preset
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.encoding import Encoding, Section
from cosilo_common.manifest import EncodingTerms
from cosilo_common.weights import TensorTable, write_weights
from tests.federation.digits import digits_sites

HEADROOMS = (1.0, 2.0, 4.0, 8.0, 16.0)
TERMS = EncodingTerms(bits=24)

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One encoding of one round's updates. error: relative L2 error of the mean; clipped: share of the values."""

    round: int
    bits: int
    clips: str
    error: float
    clipped: float


@dataclass(frozen=True)
class Ratio:
    """One round's ratios of a tensor's largest change at a site to its largest mean change in the round before."""

    round: int
    median: float
    p99: float
    largest: float


class SystemBytes:
    """Rounding bytes from the system's generator."""

    def token_bytes(self, n: int) -> bytes:
        return secrets.token_bytes(n)


def main() -> None:
    parser = argparse.ArgumentParser(description="Clip ranges at b = 24 on real updates.")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the label skew; small is unequal")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, ratios = measure(Path(folder), options.sites, options.rounds, options.alpha)
    for ratio in ratios:
        print(f"round {ratio.round}: ratio median {ratio.median:.2f}, 99 % {ratio.p99:.2f}, largest {ratio.largest:.2f}")
    print(f"{'round':>5} {'b':>2}  {'clips':<14} {'relative L2 error':>17} {'clipped':>9}")
    for row in rows:
        print(f"{row.round:>5} {row.bits:>2}  {row.clips:<14} {row.error:>17.2e} {row.clipped:>9.1e}")
    if options.json:
        document = {"rows": [asdict(row) for row in rows], "ratios": [asdict(ratio) for ratio in ratios]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, sites: int, rounds: int, alpha: float) -> tuple[list[Row], list[Ratio]]:
    """Trains, encodes and compares."""
    recipe = preset("digits")
    table = tensor_table(recipe.architecture)
    specs = digits_sites(folder, sites, alpha=alpha, least=100, seed=1)
    state = initial_state(recipe.architecture, recipe.training.seed)
    weights: Vector = np.concatenate([tensor.flatten().numpy() for tensor in state.values()])
    workshop = Workshop(Workplace(torch.device("cpu"), rank=0, world=1, bf16=False))
    rows: list[Row] = []
    ratios: list[Ratio] = []
    before: tuple[float, ...] = ()
    for number in range(1, rounds + 1):
        base = folder / "weights.safetensors"
        write_weights(base, table, [weights])
        updates, shares = [], []
        for spec in specs:
            job = TrainJob(
                weights=base,
                architecture=recipe.architecture,
                schedule=recipe.schedule,
                training=recipe.training,
                data=DataConfig.model_validate(dict(spec.data)),
                threads=1,
                update=folder / "update",
                seed=site_seed(number, spec.name, recipe.training.seed),
            )
            shares.append(workshop.perform(job, lambda _: None).weight)
            updates.append(np.fromfile(folder / "update", "<f4"))
        mean = np.average(np.array(updates, np.float64), axis=0, weights=shares)
        if before:
            site_peaks = np.max([peaks_of(table, update) for update in updates], axis=0)
            moved = np.array(before) > 0
            ratio = site_peaks[moved] / np.array(before)[moved]
            ratios.append(Ratio(number, *(float(x) for x in (np.median(ratio), np.quantile(ratio, 0.99), ratio.max()))))
            rows += compare(number, table, updates, shares, mean, before)
        before = peaks_of(table, mean.astype(np.float32))
        weights = (weights + mean).astype(np.float32)
    return rows, ratios


def compare(
    number: int, table: TensorTable, updates: Sequence[Vector], shares: Sequence[int], mean: NDArray[np.float64], before: tuple[float, ...]
) -> list[Row]:
    """One round's updates in every encoding."""
    one = (Section(table.size, TERMS.clip),)
    kinds: list[tuple[int, str, tuple[Section, ...]]] = [(32, "one", one), (24, "one", one)]
    for headroom in HEADROOMS:
        kinds.append((24, f"per tensor x{headroom:g}", sections_of(table, clips_after(before, TERMS.clip, headroom))))
    return [Row(number, bits, name, *_round_trip(bits, sections, updates, shares, mean)) for bits, name, sections in kinds]


def peaks_of(table: TensorTable, values: Vector) -> tuple[float, ...]:
    """Each tensor's largest absolute value."""
    peaks = TensorPeaks(table)
    peaks.note(0, values)
    return peaks.peaks


def _round_trip(
    bits: int, sections: tuple[Section, ...], updates: Sequence[Vector], shares: Sequence[int], mean: NDArray[np.float64]
) -> tuple[float, float]:
    """(relative L2 error, share clipped)."""
    encoding = Encoding(bits, len(updates), TERMS.cap, sections, TERMS.loss_max, 0)
    total, words = np.zeros(encoding.size, np.uint32), np.empty(encoding.size, np.uint32)
    clipped = 0
    for update, share in zip(updates, shares, strict=True):
        clipped += encoding.quantise(update, 0, share, words, SystemBytes())
        total += words
    total &= np.uint32((1 << bits) - 1)
    opened = np.empty(encoding.size, np.float32)
    encoding.dequantise(total, 0, sum(shares), opened)
    return float(np.linalg.norm(opened - mean) / np.linalg.norm(mean)), clipped / (encoding.size * len(updates))


if __name__ == "__main__":
    main()
