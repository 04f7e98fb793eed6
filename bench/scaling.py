"""What a round costs as it grows: fitted to measured rehearsals, checked at one that was left out, and carried to sizes nobody measured.

    python -m bench.scaling FILE ... [--check masked:507:10]

FILE: JSON of `python -m bench.rounds --json`. The model (docs/scaling.md) counts processor seconds, which other work on a machine disturbs
least, and bytes, which are known exactly; seconds by the clock follow from them and from the lines:

    coordinator's processor  = a_c N + k_c N B                (B: GB of an upload; N: sites)
    one site's processor     = a_s + k_s B + m B N            (m: one mask over one GB)
    masked opening with D drops adds (N - D) D masks of B to the coordinator's

Must not know how a round is run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_MIN = 3  # of a mode: as many as a site's processor has terms
GIGABIT = 0.125  # GB/s
INTERPRETER_GB_S = 0.32 + 0.61  # a GB down and up: Python's and libc's share of the profiles in bench/README.md, which one lock serialises
TLS_OVERHEAD = 1.02  # TLS records, HTTP/2 frames; measured in tests/integration/test_transfer_resume.py


@dataclass(frozen=True)
class Costs:
    """One mode's coefficients. *_start_s: processor seconds a site and round; *_gb_s: a GB; mask_gb_s: one mask over a GB."""

    mode: str
    coordinator_start_s: float
    coordinator_gb_s: float
    site_start_s: float
    site_gb_s: float
    mask_gb_s: float
    idle_s: float  # seconds by the clock that no core is busy with: phases hand over
    cores_busy: float  # of the machine that was measured, while bytes moved

    def coordinator_cpu_s(self, gigabytes: float, sites: int, drops: int = 0) -> float:
        """Processor seconds of the coordinator."""
        masks = self.mask_gb_s * gigabytes * (sites - drops) * drops
        return self.coordinator_start_s * sites + self.coordinator_gb_s * gigabytes * sites + masks

    def site_cpu_s(self, gigabytes: float, sites: int) -> float:
        """Processor seconds of one site."""
        return self.site_start_s + self.site_gb_s * gigabytes + self.mask_gb_s * gigabytes * sites

    def one_machine_s(self, gigabytes: float, sites: int) -> float:
        """Seconds by the clock where everybody shares the measured machine."""
        return self.idle_s + (self.coordinator_cpu_s(gigabytes, sites) + sites * self.site_cpu_s(gigabytes, sites)) / self.cores_busy


@dataclass(frozen=True)
class Place:
    """Where a federation runs. *_gbit: each way; *_cores: that its daemon may use."""

    coordinator_cores: int
    coordinator_gbit: float
    site_cores: int
    site_gbit: float


def round_s(costs: Costs, gigabytes: float, sites: int, drops: int, place: Place) -> dict[str, float]:
    """Seconds of a round without its training, and what each bound alone would take: a round waits for the slowest of them."""
    moved = 2 * gigabytes * TLS_OVERHEAD
    bounds = {
        "site's line": moved / (place.site_gbit * GIGABIT),
        "coordinator's line": sites * moved / (place.coordinator_gbit * GIGABIT),
        "coordinator's interpreter": sites * gigabytes * INTERPRETER_GB_S,
        "coordinator's processor": costs.coordinator_cpu_s(gigabytes, sites, drops) / place.coordinator_cores,
        "site's processor": costs.site_cpu_s(gigabytes, sites) / place.site_cores,
    }
    return {"round": costs.idle_s + max(bounds.values()), **bounds}


def fit(rows: Iterable[dict[str, Any]], mode: str) -> Costs:
    """Least squares over the rows of one mode, each weighted by its own size: a relative error counts the same in all."""
    taken = [row for row in rows if row["mode"] == mode]
    size = np.array([row["model_mb"] / 1000 for row in taken])
    sites = np.array([float(row["sites"]) for row in taken])
    coordinator = np.array([row["coordinator_cpu_s"] for row in taken])
    site = (np.array([row["cpu_s"] for row in taken]) - coordinator) / sites
    first = _solve(np.column_stack([sites, sites * size]), coordinator)
    masked = [np.ones_like(size), size] + ([size * sites] if mode == "masked" else [])
    second = _solve(np.column_stack(masked), site)
    wall, cpu = np.array([row["seconds"] for row in taken]), np.array([row["cpu_s"] for row in taken])
    idle_s, per_cpu = _solve(np.column_stack([np.ones_like(wall), cpu]), wall)
    mask = float(second[2]) if mode == "masked" else 0.0
    return Costs(mode, float(first[0]), float(first[1]), float(second[0]), float(second[1]), mask, float(idle_s), 1 / float(per_cpu))


def _solve(design: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative least squares of relative errors: a cost below zero is noise, so its column is left out."""
    kept = list(range(design.shape[1]))
    while True:
        part = design[:, kept] / values[:, None]
        found = np.linalg.lstsq(part, np.ones(len(values)), rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            whole = np.zeros(design.shape[1])
            whole[kept] = np.maximum(found, 0)
            return whole
        kept.pop(int(np.argmin(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", default="masked:507:10", help="mode:MB:sites, which the fit does not see")
    arguments = parser.parse_args()
    rows = [row for file in arguments.files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    mode, megabytes, sites = arguments.check.split(":")
    left_out = [row for row in rows if (row["mode"], round(row["model_mb"]), row["sites"]) == (mode, int(megabytes), int(sites))]
    costs = {each: fit([row for row in rows if row not in left_out], each) for each in sorted({row["mode"] for row in rows})}
    costs = {each: found for each, found in costs.items() if sum(row["mode"] == each for row in rows) >= ROWS_MIN or each == mode}
    for each in costs.values():
        print(_words(each))
    for row in left_out:
        print(_checked(costs[mode], row))
    print(_table(costs["masked"]))


def _words(costs: Costs) -> str:
    return (
        f"{costs.mode}: coordinator {costs.coordinator_start_s:.3f} s a site + {costs.coordinator_gb_s:.2f} s a GB and site; site "
        f"{costs.site_start_s:.3f} s + {costs.site_gb_s:.2f} s a GB + {costs.mask_gb_s:.3f} s a GB and mask; "
        f"idle {costs.idle_s:.2f} s, {costs.cores_busy:.2f} cores busy"
    )


def _checked(costs: Costs, row: dict[str, Any]) -> str:
    size, sites = row["model_mb"] / 1000, row["sites"]
    pairs = {
        "coordinator's processor": (costs.coordinator_cpu_s(size, sites), row["coordinator_cpu_s"]),
        "a site's processor": (costs.site_cpu_s(size, sites), (row["cpu_s"] - row["coordinator_cpu_s"]) / sites),
        "seconds by the clock": (costs.one_machine_s(size, sites), row["seconds"]),
    }
    said = "; ".join(f"{what} {told:.2f} s, measured {seen:.2f} ({told / seen - 1:+.0%})" for what, (told, seen) in pairs.items())
    return f"left out, {row['mode']} {row['model_mb']:.0f} MB {sites} sites: {said}"


PLACES: Sequence[tuple[str, Place]] = (
    ("4 cores, 1 Gbit/s; sites 2 cores, 100 Mbit/s", Place(4, 1.0, 2, 0.1)),
    ("16 cores, 10 Gbit/s; sites 4 cores, 1 Gbit/s", Place(16, 10.0, 4, 1.0)),
    ("32 cores, 25 Gbit/s; sites 8 cores, 10 Gbit/s", Place(32, 25.0, 8, 10.0)),
)


def _table(costs: Costs) -> str:
    lines = ["| parameters | sites | drops | coordinator; sites | seconds | bound by | through the coordinator |", "|" + " --- |" * 7]
    for parameters, sites, drops in ((36e6, 10, 0), (126.7e6, 30, 1), (860e6, 3, 0), (860e6, 30, 1), (860e6, 100, 0), (860e6, 100, 10)):
        size = 4 * parameters / 1e9
        for name, place in PLACES:
            found = round_s(costs, size, sites, drops, place)
            whole = found.pop("round")
            bound = max(found, key=lambda what: found[what])
            lines.append(
                f"| {parameters / 1e6:.0f} million | {sites} | {drops} | {name} | {whole:,.0f} | {bound} | {2 * sites * size:,.0f} GB |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
