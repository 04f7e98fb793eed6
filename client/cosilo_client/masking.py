"""Phase 4 at a site: quantise, mask and write the upload, chunk by chunk (docs/protocol.md, Masked upload).

Owns the pass from the trainer's float32 file to the spool file, in O(chunk) memory and with two threads. Must not
know keys' origin, the ledger, or when a spool may leave: the site role decides that.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cosilo_client.durable import PRIVATE_FILE
from cosilo_common.encoding import Encoding
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Keystream, Secret
from cosilo_common.secagg.masks import (
    CHUNK_BLOCKS,
    CHUNK_WORDS,
    WORD,
    SignedMask,
    Words,
    Workspace,
    apply_masks,
    chunk_count,
    chunk_words,
    pack24,
    reduce,
)
from cosilo_common.secagg.messages import Upload
from cosilo_common.transfer import sync_folder

WORKERS: Final = 2  # a third thread gains nothing: one hashes and writes in order while two fill chunks
_TAIL_BLOCK: Final = 1 << 64  # the tail's rounding bytes come from a part of the keystream that no chunk reaches
_FLOAT: Final = np.dtype("<f4")


@dataclass(frozen=True)
class Vector:
    """The values of an update and the facts of its tail.

    path: None where there is no file to read; offset_bytes: where its little-endian float32 values start. zero: the
    rehearsal's vector, every value 0 and W = 1, whatever the rest says.
    """

    path: Path | None
    offset_bytes: int
    weight: int
    losses: tuple[float, ...]
    zero: bool = False


REHEARSAL: Final = Vector(None, 0, 1, (), zero=True)


def write_spool(
    path: Path,
    encoding: Encoding,
    masks: Sequence[SignedMask],
    vector: Vector,
    rounding: Secret,
    workers: int = WORKERS,
) -> Upload:
    """Writes one whole upload, synced under its own name when this returns, and says its SHA-256 and length.

    masks: empty for a plain sum. rounding: seed of all stochastic rounding, so that the same seed, masks and vector
    give the same bytes. A failure leaves no file. Raises CosiloError on a value that is not finite, a short update
    file, or a full disk.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    try:
        digest, size = hashlib.sha256(), 0
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
        with os.fdopen(descriptor, "wb", buffering=0) as file, _source(vector) as source:
            for chunk in _Masking(encoding, masks, vector, source, rounding).chunks(workers):
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
                size += len(chunk)
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CosiloError("write the upload", f"{path}: {error.strerror}", f"{encoding.wire_bytes} bytes are needed in all") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Upload(digest.digest(), size)


class _Buffers:
    """What one chunk in work needs: about 3 MiB."""

    def __init__(self) -> None:
        self.values = np.empty(CHUNK_WORDS, dtype=_FLOAT)
        self.words: Words = np.empty(CHUNK_WORDS, dtype=WORD)
        self.packed: NDArray[np.uint8] = np.empty(3 * CHUNK_WORDS, dtype=np.uint8)
        self.workspace = Workspace()


class _Masking:
    def __init__(self, encoding: Encoding, masks: Sequence[SignedMask], vector: Vector, source: int, rounding: Secret) -> None:
        self._encoding = encoding
        self._masks = masks
        self._vector = vector
        self._source = source
        self._rounding = rounding

    def chunks(self, workers: int) -> Iterator[memoryview]:
        """The upload in wire chunks; each view is valid until the next is taken."""
        encoding = self._encoding
        whole = encoding.size // CHUNK_WORDS  # chunks of values alone; the tail needs the clip count of all values
        ring = [_Buffers() for _ in range(workers + 2)]  # one a worker, one waiting, one being written
        pending: deque[Future[tuple[memoryview, int]]] = deque()
        clipped = 0
        with ThreadPoolExecutor(workers, thread_name_prefix="masking") as pool:
            try:
                for chunk in range(whole):
                    if len(pending) == len(ring) - 1:
                        view, more = pending.popleft().result()
                        yield view
                        clipped += more
                    pending.append(pool.submit(self._values_chunk, chunk, ring[chunk % len(ring)]))
                while pending:
                    view, more = pending.popleft().result()
                    yield view
                    clipped += more
            finally:
                for future in pending:
                    future.cancel()
        yield from self._last_chunks(whole, clipped, ring[0])

    def _values_chunk(self, chunk: int, buffers: _Buffers) -> tuple[memoryview, int]:
        clipped = self._quantise(chunk, CHUNK_WORDS, buffers)
        return self._mask(chunk, CHUNK_WORDS, buffers), clipped

    def _last_chunks(self, first: int, clipped: int, buffers: _Buffers) -> Iterator[memoryview]:
        """The chunk in which the values end and the tail begins, and the one the tail may run on into."""
        encoding, vector = self._encoding, self._vector
        values = encoding.size - first * CHUNK_WORDS
        clipped += self._quantise(first, values, buffers)
        if vector.zero:
            tail = encoding.zero_tail()
        else:
            tail = encoding.tail(vector.weight, vector.losses, clipped, Keystream(self._rounding, _TAIL_BLOCK))
        for chunk in range(first, chunk_count(encoding.length)):
            count = chunk_words(encoding.length, chunk)
            taken = count - values
            buffers.words[values:count] = tail[:taken]
            yield self._mask(chunk, count, buffers)
            tail, values = tail[taken:], 0

    def _quantise(self, chunk: int, count: int, buffers: _Buffers) -> int:
        words = buffers.words[:count]
        if count == 0 or self._vector.zero:
            words.fill(0)
            return 0
        values = buffers.values[:count]
        start = chunk * CHUNK_WORDS
        _read_all(self._source, values.data.cast("B"), self._vector.offset_bytes + start * _FLOAT.itemsize)
        random = Keystream(self._rounding, chunk * CHUNK_BLOCKS)  # four bytes a value: chunks never overlap
        return self._encoding.quantise(values, start, self._vector.weight, words, random)

    def _mask(self, chunk: int, count: int, buffers: _Buffers) -> memoryview:
        words = buffers.words[:count]
        apply_masks(self._masks, chunk, words, buffers.workspace)
        if self._encoding.bits == 32:
            return words.data.cast("B")
        reduce(words, self._encoding.bits)
        return pack24(words, buffers.packed).data.cast("B")


@contextmanager
def _source(vector: Vector) -> Iterator[int]:
    if vector.path is None:
        yield -1
        return
    descriptor = os.open(vector.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, out: memoryview, offset: int) -> None:
    at = 0
    while at < len(out):
        count = os.preadv(descriptor, [out[at:]], offset + at)
        if count == 0:
            raise CosiloError("mask the update", f"its file ends before byte {offset + len(out)}", "train again")
        at += count


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
