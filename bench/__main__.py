"""`python -m bench`, which `make bench` runs: every bench, each figure beside its yardstick, as a table and as JSON.

    python -m bench [--quick] [--only NAME ...] [--out FOLDER]

Owns the list of benches. A bench is a module with `measure(quick) -> Iterable[Figure]`. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from bench.figures import Figure, table, to_json
from bench.yardsticks import copy_bytes_s

BENCHES = ("machine", "transfer", "masks", "rounds", "startup", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, once each: does it run, and roughly how fast")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{'quick' if arguments.quick else 'bench'}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    figures: list[Figure] = []
    began_s = time.monotonic()
    for name in arguments.only:
        new = list(_bench(name)(arguments.quick))
        print(f"\n{name}\n{table(new)}", flush=True)
        figures += new
        path.write_text(to_json(figures, _machine()), encoding="utf-8")  # after each, so that a later one's failure costs no hour
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"\n{len(figures)} figures in {time.monotonic() - began_s:.0f} s, in {path}; goals missed: {', '.join(missed) or 'none'}")


def _bench(name: str) -> Callable[[bool], Iterable[Figure]]:
    if name == "machine":
        return lambda quick: [Figure("machine.copy", copy_bytes_s() / 1e9, "GB/s")]
    measure: Callable[[bool], Iterable[Figure]] = importlib.import_module(f"bench.{name}").measure
    return measure


def _machine() -> dict[str, object]:
    return {
        "machine": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "load_1_min": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
