"""Whole rounds that train nothing, beside the bytes alone through raw TLS: seconds, processor seconds, peak memory.

    python -m bench.rounds [--model 42|146|507|3400] [--sites 3 10] [--rounds 3] [--modes masked plain] [--bits 24|32]
        [--training] [--json FILE]

Rehearsals over a real federation on this machine: a coordinator and sites as processes, mTLS, every digest and check. A round's seconds are
the coordinator's own, from the first phase to the last. The yardstick moves the same bytes (each site's fetch and upload) through one raw
TLS stream, measured before and after. Memory is the peak of anonymous memory (RssAnon, sampled), as files that are mapped belong to the
page cache.

With --training the rounds train for a moment on a few images, and the run has [downlink]: a rehearsal's fetch is forced and its checkpoint
does not move, so only there do the bytes of a round tell what a run costs. Its seconds have the training in them, and no goal.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.figures import Figure, at_most
from bench.yardsticks import anonymous_bytes, raw_tls_s
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation

# Widths of an 8x8 UNet by the model's size in MB of float32; the larger ones are 36.4, 126.7 and 861 million parameters.
WIDTHS = {1: (16, 32), 42: (128, 256), 146: (240, 480), 507: (448, 896), 3400: (1168, 2336)}
GOALS = {"masked": 3.0, "plain": 2.0}  # times raw TLS
MODELS_MAX, CONSTANT_MB = 2.5, 200.0  # of the coordinator's peak anonymous memory
GROWTH_MAX = 1.1  # of that peak from 3 sites to 10 and 30
SAMPLE_S = 0.02
PATIENCE_S = 1800.0
BITS = 32  # a manifest's own default


@dataclass(frozen=True)
class Row:
    """One federation's rounds. seconds: the median; tls_s: of the same bytes; cpu_s: of all processes, a round; *_peak_mb: 10^6 bytes.

    bits: of the encoding. downlink_bytes, uplink_bytes: of all sites in the last round, as the coordinator counts them.
    """

    mode: str
    sites: int
    model_mb: float
    seconds: float
    tls_s: float
    ratio: float
    cpu_s: float
    coordinator_cpu_s: float
    coordinator_peak_mb: float
    coordinator_base_mb: float
    site_peak_mb: float
    every_s: tuple[float, ...]
    bits: int
    downlink_bytes: int
    uplink_bytes: int

    @property
    def traffic(self) -> float:
        """A round's bytes, both ways, as a part of four bytes a parameter each way and site."""
        return (self.downlink_bytes + self.uplink_bytes) / (2 * self.sites * self.model_mb * 1e6)


def measure(quick: bool = False) -> Iterator[Figure]:
    """Masked and plain, 146 and 507 MB, 3 and 10 sites; memory also with 30 sites of a smaller model."""
    plan = [(42, [3], 1, ["masked"])] if quick else [(146, [3, 10], 3, ["masked", "plain"]), (507, [3, 10], 2, ["masked", "plain"])]
    plan += [] if quick else [(42, [3, 10, 30], 2, ["masked"])]
    for model, sites, rounds, modes in plan:
        first: dict[str, float] = {}
        for count in sites:
            for row in _federation(model, count, rounds, modes, None):
                yield from figures_of(row)
                base = first.setdefault(row.mode, row.coordinator_peak_mb)
                if count != sites[0]:
                    name = f"rounds.{row.mode}.{model}.{count}.memory.growth"
                    yield Figure(name, row.coordinator_peak_mb, "MB", f"with {sites[0]} sites, MB", base, at_most(GROWTH_MAX))


def figures_of(row: Row) -> Iterator[Figure]:
    """A row as figures."""
    name = f"rounds.{row.mode}.{row.model_mb:.0f}.{row.sites}"
    yield Figure(name, row.seconds, "s", "raw TLS, s", row.tls_s, at_most(GOALS[row.mode]))
    yield Figure(f"{name}.cpu", row.cpu_s, "s of the processor, all processes")
    yield Figure(f"{name}.cpu.coordinator", row.coordinator_cpu_s, "s of the processor")
    allowed = MODELS_MAX * row.model_mb + CONSTANT_MB
    yield Figure(f"{name}.memory.coordinator", row.coordinator_peak_mb, "MB", "allowed, MB", allowed, at_most(1.0))
    yield Figure(f"{name}.memory.coordinator.before", row.coordinator_base_mb, "MB")
    yield Figure(f"{name}.memory.site", row.site_peak_mb, "MB")
    whole_mb = row.sites * row.model_mb
    yield Figure(f"{name}.downlink", row.downlink_bytes / 1e6, "MB", "4 bytes a parameter, MB", whole_mb)
    yield Figure(f"{name}.uplink", row.uplink_bytes / 1e6, "MB", "4 bytes a parameter, MB", whole_mb)


class Peaks:
    """The highest anonymous memory of processes by name, while it is watched."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self.base = {name: anonymous_bytes(process.pid) for name, process in processes.items()}
        self.peak = dict(self.base)
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Samples until the context ends."""
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for name, process in self._processes.items():
                self.peak[name] = max(self.peak[name], anonymous_bytes(process.pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=int, choices=sorted(WIDTHS), default=146, help="MB of float32")
    parser.add_argument("--sites", type=int, nargs="+", default=[3])
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up; the median is shown")
    parser.add_argument("--modes", nargs="+", choices=sorted(GOALS), default=["masked", "plain"])
    parser.add_argument("--bits", type=int, choices=(24, 32), default=BITS, help="of the encoding: what an upload takes a value")
    parser.add_argument("--training", action="store_true", help="rounds that train, of a run with [downlink]: what their bytes are")
    parser.add_argument("--folder", type=Path, default=None, help="where the federation lives: some (4 + 2 N) models of disk")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    for sites in arguments.sites:
        for row in _federation(
            arguments.model, sites, arguments.rounds, arguments.modes, arguments.folder, arguments.bits, arguments.training
        ):
            rows.append(row)
            if arguments.json:  # after each: a long run that is cut off has told what it found
                _write(arguments.json, rows)


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "cores": psutil.cpu_count(), "python": platform.python_version()}
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n", encoding="utf-8")


def _federation(
    model: int, sites: int, rounds: int, modes: list[str], folder: Path | None, bits: int = BITS, training: bool = False
) -> Iterator[Row]:
    root = Path(tempfile.mkdtemp(prefix="cosilo-bench-", dir=folder))
    try:
        specs = digits_sites(root, sites, alpha=100.0, least=10, seed=1, policy={"allow_insecure_plain_sum": "plain" in modes})
        with LocalFederation(root, specs) as federation:
            federation.start()
            for mode in modes:
                row = _rounds(federation, mode, model, rounds, bits, training)
                _show(row)
                yield row
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _rounds(federation: LocalFederation, mode: str, model: int, rounds: int, bits: int, training: bool) -> Row:
    deadlines = {f"{what}_s": PATIENCE_S for what in ("gather", "training", "sharing", "uploading", "consenting", "revealing")}
    plan: dict[str, Any] = {
        "name": f"{mode}-{model}",
        "preset": "digits",
        "architecture": {"block_out_channels": list(WIDTHS[model]), "norm_num_groups": 16},
        "encoding": {"bits": bits},
        "deadlines": deadlines,
    }
    if training:
        plan |= {"downlink": {"bits": 24}, "training": {"batch_size": 4, "max_steps": 1}}
    kind = () if training else ("--rehearsal",)
    run = federation.create_run(plan, plain=mode == "plain")
    federation.accept_all(run)
    federation.run_rounds(run, 1, *kind)
    names = [COORDINATOR, *federation.sites]
    processes = {name: psutil.Process(federation.daemon(name).pid) for name in names}
    size = int(federation.cosilo_json("run", "list")["runs"][-1]["parameters"]) * 4
    before_s = raw_tls_s(size, len(federation.sites), len(federation.sites))
    peaks, cpu_before = Peaks(processes), {name: _cpu_s(process) for name, process in processes.items()}
    with peaks.watched():
        found = federation.run_rounds(run, rounds, *kind)[1:]
    cpu = {name: _cpu_s(process) - cpu_before[name] for name, process in processes.items()}
    tls_s = (before_s + raw_tls_s(size, len(federation.sites), len(federation.sites))) / 2
    seconds = [float(entry["seconds"]) for entry in found]
    middle = statistics.median(seconds)
    return Row(
        mode=mode,
        sites=len(federation.sites),
        model_mb=size / 1e6,
        seconds=middle,
        tls_s=tls_s,
        ratio=middle / tls_s,
        cpu_s=sum(cpu.values()) / rounds,
        coordinator_cpu_s=cpu[COORDINATOR] / rounds,
        coordinator_peak_mb=peaks.peak[COORDINATOR] / 1e6,
        coordinator_base_mb=peaks.base[COORDINATOR] / 1e6,
        site_peak_mb=max(peaks.peak[name] for name in federation.sites) / 1e6,
        every_s=tuple(seconds),
        bits=bits,
        downlink_bytes=int(found[-1]["bytes_down"]),
        uplink_bytes=int(found[-1]["bytes_up"]),
    )


def _show(row: Row) -> None:
    print(
        f"{row.mode:6} {row.sites:2} sites {row.model_mb:6.0f} MB: {row.seconds:6.2f} s a round ({', '.join(f'{s:.2f}' for s in row.every_s)}), "
        f"raw TLS {row.tls_s:.2f} s, ratio {row.ratio:.2f} (goal {GOALS[row.mode]:.0f}); processor {row.cpu_s:.1f} s "
        f"({row.coordinator_cpu_s:.1f} s the coordinator's); peak coordinator {row.coordinator_peak_mb:.0f} MB "
        f"(idle {row.coordinator_base_mb:.0f}), site {row.site_peak_mb:.0f} MB; "
        f"{row.bits} bits, downlink bytes {row.downlink_bytes}, uplink bytes {row.uplink_bytes}: {row.traffic:.4f} of 4 bytes a parameter each way",
        flush=True,
    )


def _cpu_s(process: psutil.Process) -> float:
    """Of a process and of what it has started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"{time.monotonic() - began:.0f} s in all")
