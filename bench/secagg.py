"""Secure aggregation at one model size: seconds and peak memory of a site's masking and of the coordinator's opening.

    python bench/secagg.py [--d 36000000] [--n 3 10 50] [--bits 32] [--drop 1] [--json FILE]

The site half quantises and masks one update for N sites into a spool file, synced, as the daemon does. The coordinator
half opens the sum of N - drop such files; the mean of its first chunk must be the known one. Memory is the process's
anonymous peak beyond its start, sampled from /proc; update and spools are files. Masks that cancel are left out of the
coordinator's files, which the opening cannot tell: so N = 50 takes minutes, not hours, to prepare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cosilo_client.masking import Vector, write_spool
from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg.keys import InsecureFakeRandom, generate_secret
from cosilo_common.secagg.masks import CHUNK_WORDS, Mask, SignedMask
from cosilo_server.secagg import SumOpening

CAP = 4096
LOSSES = 9
LOSS_VALUES = (0.5,) * LOSSES
WEIGHT = 3000
SAMPLE_INTERVAL_S = 0.002  # a chunk takes longer
GOALS = {("site", 10): 1.5, ("coordinator", 10): 2.0}  # seconds, issue "Secure aggregation", on two cores
MEMORY_GOAL_MB = 64.0


def _anonymous_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError("this system does not tell a process's anonymous memory")


START_KB = _anonymous_kb()  # with everything imported and nothing measured yet


@dataclass(frozen=True)
class Row:
    """One measurement.

    wall_s, cpu_s: seconds; peak_mb: anonymous memory beyond the start, 10^6 bytes; upload_mb: one site's bytes.
    """

    half: str
    sites: int
    dropped: int
    bits: int
    values: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    upload_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=36_000_000, help="values in the update")
    parser.add_argument("--n", type=int, nargs="+", default=[3, 10], help="sites; the coordinator half only above 12")
    parser.add_argument("--bits", type=int, default=32, choices=(24, 32))
    parser.add_argument("--drop", type=int, default=1, help="sites dropped after sharing, in the coordinator half")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--folder", type=Path, default=None, help="where the spools go: (N + 1) * 4 * d bytes for the largest N")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for sites in arguments.n:
            encoding = Encoding(arguments.bits, sites, CAP, (Section(arguments.d, 1.0),), 16.0, LOSSES)
            if sites <= 12:
                rows.append(_median(partial(_site, encoding, sites, arguments, Path(folder)), arguments.repeat))
            rows.append(_coordinator(encoding, sites, arguments, Path(folder)))
    _print(rows)
    if arguments.json:
        machine = {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "workers": arguments.workers,
        }
        arguments.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _site(encoding: Encoding, sites: int, arguments: argparse.Namespace, folder: Path) -> Row:
    update = folder / "update.f32"
    if not update.exists() or update.stat().st_size != 4 * encoding.size:
        _write_update(update, encoding.size)
    random = InsecureFakeRandom("site")
    masks = [SignedMask(Mask(generate_secret(random), encoding.bits), positive=index % 2 == 0) for index in range(sites)]
    spool = folder / "spool"
    with _measured() as measured:
        write_spool(spool, encoding, masks, Vector(update, 0, WEIGHT, LOSS_VALUES), generate_secret(random), arguments.workers)
    spool.unlink()
    return Row("site", sites, 0, encoding.bits, encoding.size, *measured(), encoding.wire_bytes / 1e6)


def _coordinator(encoding: Encoding, sites: int, arguments: argparse.Namespace, folder: Path) -> Row:
    random = InsecureFakeRandom("coordinator")
    survivors, dropped = sites - arguments.drop, arguments.drop
    masks = [SignedMask(Mask(generate_secret(random), encoding.bits), positive=False) for _ in range(survivors * (1 + dropped))]
    sources, digests, update = {}, {}, folder / "update.f32"
    for index in range(survivors):
        # each file carries the masks that stay in the sum: its own, and one for each dropped site
        mine = [mask.inverse() for mask in masks[index::survivors]]
        path = folder / f"upload-{index}"
        _write_constant(update, encoding.size, np.float32(0.001 * (index + 1)))
        vector = Vector(update, 0, WEIGHT, LOSS_VALUES)
        statement = write_spool(path, encoding, mine, vector, generate_secret(random), arguments.workers)
        sources[f"site-{index:03}"], digests[f"site-{index:03}"] = _reader(path), statement.digest
    update.unlink()

    def run() -> Row:
        with _measured() as measured:
            opening = SumOpening(encoding, sources, digests, masks, arguments.workers)
            opening.provisional_tail()
            out, mean = np.empty(CHUNK_WORDS, dtype=np.float32), 0.001 * (survivors + 1) / 2
            for start, words in opening:
                if start == 0:
                    encoding.dequantise(words, 0, WEIGHT * survivors, out[: len(words)])
                    assert np.abs(out[: len(words)] - mean).max() <= encoding.error_bound(1.0, survivors, WEIGHT * survivors) + 1e-8
        assert opening.tail.contributors == survivors
        return Row("coordinator", sites, dropped, encoding.bits, encoding.size, *measured(), encoding.wire_bytes / 1e6)

    row = _median(run, arguments.repeat)
    for path in folder.glob("upload-*"):
        path.unlink()
    return row


def _reader(path: Path) -> Callable[[int, memoryview], None]:
    descriptor = os.open(path, os.O_RDONLY)

    def read(offset: int, buffer: memoryview) -> None:
        if os.preadv(descriptor, [buffer], offset) != len(buffer):
            raise EOFError(path.name)

    return read


def _write_update(path: Path, size: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            block = generator.standard_normal(min(1 << 20, size - start)) * 0.01
            file.write(block.astype(np.float32).data)


def _write_constant(path: Path, size: int, value: np.float32) -> None:
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(np.full(min(1 << 20, size - start), value, dtype=np.float32).data)


@contextmanager
def _measured() -> Iterator[Callable[[], tuple[float, float, float]]]:
    """Yields a function to call after the block: (wall seconds, CPU seconds, peak MB of anonymous memory)."""
    peak_kb, stop = [_anonymous_kb()], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_INTERVAL_S):
            peak_kb.append(max(peak_kb.pop(), _anonymous_kb()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result: list[float] = []
    yield lambda: (result[0], result[1], result[2])
    result += [time.perf_counter() - wall, time.process_time() - cpu]
    stop.set()
    sampler.join()
    result.append((max(peak_kb[0], _anonymous_kb()) - START_KB) * 1024 / 1e6)


def _median(run: Callable[[], Row], repeat: int) -> Row:
    rows = sorted((run() for _ in range(repeat)), key=lambda row: row.wall_s)
    return rows[len(rows) // 2]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _print(rows: list[Row]) -> None:
    print(f"{'half':<12}{'N':>4}{'drop':>6}{'b':>4}{'values':>13}{'wall s':>9}{'CPU s':>8}{'peak MB':>9}{'upload MB':>11}  goal")
    for row in rows:
        goal = GOALS.get((row.half, row.sites))
        verdict = f"< {goal} s, < {MEMORY_GOAL_MB:.0f} MB" if goal else f"< {MEMORY_GOAL_MB:.0f} MB"
        met = row.peak_mb < MEMORY_GOAL_MB and (goal is None or row.wall_s < goal)
        print(
            f"{row.half:<12}{row.sites:>4}{row.dropped:>6}{row.bits:>4}{row.values:>13,}{row.wall_s:>9.2f}{row.cpu_s:>8.2f}"
            f"{row.peak_mb:>9.1f}{row.upload_mb:>11.1f}  {verdict}: {'met' if met else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
