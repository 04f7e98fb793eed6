"""The sum of a round's whole uploads, made while others are still on their way.

Owns one file of words beside the uploads, which upload is in it, and how a change of it on the disk is found. What is in it lives in memory
alone: a process that starts again begins without it, and opens the sum from the uploads, which all stay until the round is over. Must not know
masks, nor when a round is opened. Every call blocks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from cosilo_common.errors import CosiloError
from cosilo_common.secagg.masks import CHUNK_WORDS, WORD, Words, chunk_count, chunk_words, unpack24, wire_size

ReadUpload = Callable[[int, memoryview], None]
"""Fills the buffer with an upload's bytes from this offset on; raises when there are fewer."""


class EarlySum:
    """Uploads of `length` words of `bits` bits each, added up modulo 2^32 in a file of four bytes a word, in O(chunk) memory.

    path: of the file, which is made with the first upload. A sum that failed to take one is broken, and is not to be used.
    """

    def __init__(self, path: Path, length: int, bits: int) -> None:
        self._path, self._length, self._bits = path, length, bits
        self._checks: list[int] = []  # CRC-32 of each chunk, as it was written: the disk is not believed
        self._digests: dict[str, bytes] = {}
        self._broken = False
        self._fd = -1  # while it is read
        self._raw = np.empty(wire_size(CHUNK_WORDS, bits), dtype=np.uint8)
        self._words, self._unpacked = np.empty(CHUNK_WORDS, dtype=WORD), np.empty(CHUNK_WORDS, dtype=WORD)

    @property
    def broken(self) -> bool:
        """Whether an upload failed to be added."""
        return self._broken

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Of the uploads that are in it, by site; none where it is broken."""
        return {} if self._broken else dict(self._digests)

    def add(self, site: str, read: ReadUpload, digest: bytes) -> None:
        """Adds one upload. digest: SHA-256, as it was signed.

        Raises CosiloError where the bytes are others, OSError where the disk is full; the sum is broken then, and the uploads are not.
        """
        if self._broken or site in self._digests:
            raise ValueError(f"{site}: the sum is broken, or has it")
        self._broken = True  # until all of it is in
        hashed, first = sha256(), not self._digests
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if first else 0)
        fd = os.open(self._path, flags, 0o600)
        try:
            for chunk in range(chunk_count(self._length)):
                count = chunk_words(self._length, chunk)
                raw = self._raw[: wire_size(count, self._bits)]
                read(wire_size(chunk * CHUNK_WORDS, self._bits), raw.data)
                hashed.update(raw.data)
                words = raw.view(WORD) if self._bits == 32 else unpack24(raw, self._unpacked)
                total = self._words[:count]
                if first:
                    total[:] = words
                    self._checks.append(0)
                else:
                    self._load(fd, chunk, total)
                    np.add(total, words, out=total)
                _write(fd, total.data.cast("B"), 4 * CHUNK_WORDS * chunk)
                self._checks[chunk] = zlib.crc32(total.data)
            if hashed.digest() != digest:
                raise CosiloError("add up uploads", f"the upload of {site} is not the one it signed: it changed on the disk")
        except BaseException:
            self._path.unlink(missing_ok=True)  # its room is wanted
            raise
        finally:
            os.close(fd)
        self._digests[site] = digest
        self._broken = False

    def __enter__(self) -> EarlySum:
        """Opens the sum for `load`, until the `with` block ends. Raises OSError where the file is gone."""
        self._fd = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def load(self, chunk: int, out: Words) -> None:
        """Fills `out` with a chunk of the sum, not reduced, within a `with` block. Raises CosiloError where the file is not as it was written."""
        self._load(self._fd, chunk, out)

    def _load(self, fd: int, chunk: int, out: Words) -> None:
        got = os.preadv(fd, [out.data.cast("B")], 4 * CHUNK_WORDS * chunk)
        if got != out.nbytes or zlib.crc32(out.data) != self._checks[chunk]:
            raise CosiloError("add up uploads", f"{self._path.name}: chunk {chunk} is not what was written: it changed on the disk")


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
