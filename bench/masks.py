"""Quantising, masking and opening beside the keystream and its addition alone, and how both grow with threads.

    python -m bench.masks [--d 36000000] [--sites 3 10] [--threads 1 2]

The yardstick makes as many keystreams (AES-256-CTR) over as many words and adds them, slice by slice, and does nothing else: no encoding, no
digest, no file. `mask` is quantising and masking in memory; `spool` the site's whole pass, from the update's file to the synced and hashed
upload; `open` the coordinator's, from the uploads' files to the verified sum, one site dropped; `last` the same where all uploads but one were
summed while they came in (cosilo_server.early_sum), which is what is left to wait for when the last one is there. All are in GB of keystream
a second of the processor, which other work on the machine changes least; `scaling` is seconds by the clock with one thread over seconds with
so many.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from bench.figures import Figure, at_least, table
from cosilo_client.masking import Vector, write_spool
from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg.keys import InsecureFakeRandom, generate_secret
from cosilo_common.secagg.masks import CHUNK_WORDS, Mask, SignedMask, Workspace, apply_masks
from cosilo_server.early_sum import EarlySum
from cosilo_server.secagg import SumOpening

GOAL = 0.7
CAP = 4096
WEIGHT = 3000
LOSSES = (0.5,) * 9
SLICE_BYTES = 1 << 17  # what stays in the second-level cache


def measure(quick: bool = False) -> Iterator[Figure]:
    """Three sites and ten, one thread and two."""
    yield from figures(8_000_000 if quick else 36_000_000, (3, 10), (1, 2))


def figures(d: int, sites: Sequence[int], threads: Sequence[int]) -> Iterator[Figure]:
    """d: values."""
    with tempfile.TemporaryDirectory(prefix="cosilo-bench-") as name:
        folder = Path(name)
        update = folder / "update.f32"
        _write_update(update, d)
        for count in sites:
            encoding = Encoding(32, count, CAP, (Section(d, 1.0),), 16.0, len(LOSSES))
            random = InsecureFakeRandom("bench")
            masks = [SignedMask(Mask(generate_secret(random), 32), index % 2 == 0) for index in range(count)]
            mask, spool = _mask(encoding, masks, update), _spool(encoding, masks, update, folder / "spool")
            with _uploads(encoding, count, update, folder) as (opening, last):
                streams = 2 * (count - 1)
                passes = {"mask": (mask, count), "spool": (spool, count), "open": (opening, streams), "last": (last, streams)}
                for what, (work, streams) in passes.items():
                    yield from _pass(f"masks.{what}.{count}", work, d, streams, threads, None if what == "spool" else GOAL)


def _pass(name: str, work: Callable[[int], object], d: int, streams: int, threads: Sequence[int], goal: float | None) -> Iterator[Figure]:
    """One pass with each number of threads beside as many keystreams, measured before and after."""
    walls_s = {}
    for workers in threads:
        bare = [_timed(_keystreams(d, streams), workers)]
        wall_s, cpu_s = _timed(work, workers)
        bare.append(_timed(_keystreams(d, streams), workers))
        amount, yard_s = 4 * d * streams / 1e9, min(cpu for _, cpu in bare)
        walls_s[workers] = (wall_s, min(wall for wall, _ in bare))
        beside = ("keystream and add, GB/s", amount / yard_s)
        yield Figure(f"{name}.threads.{workers}", amount / cpu_s, "GB/s", *beside, at_least(goal) if goal else None)
    first, *more = threads
    for workers in more:
        grown, bare_grown = (walls_s[first][at] / walls_s[workers][at] for at in (0, 1))
        yield Figure(f"{name}.scaling.{workers}", grown, "times", "keystream and add, times", bare_grown)


def _keystreams(words: int, streams: int) -> Callable[[int], None]:
    """That many keystreams over that many words, added up, the words shared out among the threads."""

    def run(threads: int) -> None:
        def lane(_: int) -> None:
            total = np.zeros(SLICE_BYTES // 4, np.uint32)
            zeros, out = memoryview(bytes(SLICE_BYTES)), bytearray(SLICE_BYTES + 15)
            stream = np.frombuffer(out, np.uint32, SLICE_BYTES // 4)
            ciphers = [Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor() for _ in range(streams)]
            for _ in range(4 * words // threads // SLICE_BYTES):
                for cipher in ciphers:
                    cipher.update_into(zeros, out)
                    np.add(total, stream, out=total)

        _threads(lane, threads)

    return run


def _mask(encoding: Encoding, masks: Sequence[SignedMask], update: Path) -> Callable[[int], None]:
    values = np.memmap(update, np.float32, "r")
    chunks = -(-encoding.size // CHUNK_WORDS)

    def run(threads: int) -> None:
        def lane(number: int) -> None:
            words, workspace = np.empty(CHUNK_WORDS, np.uint32), Workspace()
            for chunk in range(number, chunks, threads):
                block = values[chunk * CHUNK_WORDS : (chunk + 1) * CHUNK_WORDS]
                out = words[: len(block)]
                encoding.quantise(block, chunk * CHUNK_WORDS, WEIGHT, out)
                apply_masks(masks, chunk, out, workspace)

        _threads(lane, threads)

    return run


def _spool(encoding: Encoding, masks: Sequence[SignedMask], update: Path, path: Path) -> Callable[[int], bytes]:
    secret = generate_secret(InsecureFakeRandom("rounding"))

    def run(threads: int) -> bytes:
        digest: bytes = write_spool(path, encoding, masks, Vector(update, 0, WEIGHT, LOSSES), secret, threads).digest
        return digest

    return run


@contextmanager
def _uploads(encoding: Encoding, sites: int, update: Path, folder: Path) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """What opens N - 1 uploads, of which each carries its own mask and that of the dropped site; and the same, all but one summed before."""
    random = InsecureFakeRandom("opening")
    survivors = sites - 1
    masks = [SignedMask(Mask(generate_secret(random), 32), positive=False) for _ in range(2 * survivors)]
    sources, digests, descriptors = {}, {}, []
    for index in range(survivors):
        path = folder / f"upload-{index}"
        digests[f"site-{index}"] = _spool(encoding, [mask.inverse() for mask in masks[index::survivors]], update, path)(2)
        descriptors.append(os.open(path, os.O_RDONLY))
        sources[f"site-{index}"] = _reader(descriptors[-1])

    early = EarlySum(folder / "sum", encoding.length, encoding.bits)
    *before, last = sorted(sources)
    for site in before:
        early.add(site, sources[site], digests[site])

    def run(opening: SumOpening) -> None:
        for _ in opening:
            pass
        assert opening.tail.contributors == survivors

    def all_of_it(threads: int) -> None:
        run(SumOpening(encoding, sources, digests, masks, threads))

    def the_last(threads: int) -> None:
        with early:
            run(SumOpening(encoding, {last: sources[last]}, {last: digests[last]}, masks, threads, early))

    try:
        yield all_of_it, the_last
    finally:
        (folder / "sum").unlink()
        for index, descriptor in enumerate(descriptors):
            os.close(descriptor)
            (folder / f"upload-{index}").unlink()


def _reader(descriptor: int) -> Callable[[int, memoryview], None]:
    def read(offset: int, buffer: memoryview) -> None:
        if os.preadv(descriptor, [buffer], offset) != len(buffer):
            raise EOFError("an upload of the bench is short")

    return read


def _write_update(path: Path, d: int) -> None:
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, d, 1 << 20):
            file.write((generator.standard_normal(min(1 << 20, d - start), dtype=np.float32) * np.float32(0.01)).data)


def _threads(work: Callable[[int], None], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def _timed(work: Callable[[int], object], threads: int) -> tuple[float, float]:
    """(seconds by the clock, seconds of the processor), each the better of two: what it takes, not what else the machine does."""
    taken = []
    for _ in range(2):
        began_s, cpu_s = time.perf_counter(), time.process_time()
        work(threads)
        taken.append((time.perf_counter() - began_s, time.process_time() - cpu_s))
    return min(wall for wall, _ in taken), min(cpu for _, cpu in taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, default=36_000_000)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(table(figures(arguments.d, arguments.sites, arguments.threads)))


if __name__ == "__main__":
    main()
