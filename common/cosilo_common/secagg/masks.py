"""Masks: words of an AES-256-CTR keystream, added to and removed from vectors chunk by chunk.

Owns PRG(seed), its counter, and the three-byte wire form of b = 24. Must not know whose seed it is or what the words
mean.

**The counter follows words, never packed bytes.** Word w is keystream bytes 4w to 4w + 3, little endian, its low b
bits, for either b; chunk k holds words k * 2^18 onward, so its counter starts at k * 2^16. Were it to follow the 3-byte
form, masks of neighbouring chunks would overlap, and sums would still open correctly. Because 2^24 divides 2^32, sums
of whole 32-bit words are right modulo 2^24 as they stand: callers reduce once, at the end (`reduce`, `pack24`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from cosilo_common.secagg.keys import BLOCK_BYTES, Secret

Words = NDArray[np.uint32]

CHUNK_WORDS: Final = 2**18  # 1 MiB of words: the transfer's chunk, and small enough to stay in a core's cache
CHUNK_BLOCKS: Final = CHUNK_WORDS * 4 // BLOCK_BYTES
WORD: Final = np.dtype("<u4")
BITS: Final = (24, 32)

_SLICE_WORDS: Final = 2**15  # 128 KiB of keystream at a time: with the vector's slice it stays in the second-level cache
_ZEROS: Final = memoryview(bytes(_SLICE_WORDS * 4))


def chunk_count(length: int) -> int:
    """How many chunks a vector of `length` words has."""
    return -(-length // CHUNK_WORDS)


def chunk_words(length: int, chunk: int) -> int:
    """How many words chunk `chunk` of a vector of `length` words holds: CHUNK_WORDS, fewer in the last."""
    if not 0 <= chunk < chunk_count(length):
        raise IndexError(f"chunk {chunk} of a vector of {length} words")
    return min(CHUNK_WORDS, length - chunk * CHUNK_WORDS)


class Workspace:
    """A reused keystream buffer, 128 KiB. One for each thread."""

    def __init__(self) -> None:
        # update_into wants room for one block less a byte beyond its input (pyca/cryptography,
        # CipherContext.update_into)
        self.raw = bytearray(_SLICE_WORDS * 4 + BLOCK_BYTES - 1)
        self.words: Words = np.frombuffer(self.raw, dtype=WORD, count=_SLICE_WORDS)


@dataclass(frozen=True)
class Mask:
    """PRG(seed) as words modulo 2^bits. bits: 24 or 32."""

    seed: Secret
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def add(self, chunk: int, out: Words, workspace: Workspace) -> None:
        """Adds the first len(out) words of a chunk to `out`, in place, modulo 2^32 (b = 24: reduce at the end)."""
        self._apply(np.add, chunk, out, workspace)

    def subtract(self, chunk: int, out: Words, workspace: Workspace) -> None:
        """Takes the first len(out) words of a chunk from `out`, in place, modulo 2^32 (b = 24: reduce at the end)."""
        self._apply(np.subtract, chunk, out, workspace)

    def words(self, chunk: int, count: int) -> Words:
        """The first `count` words of a chunk, reduced modulo 2^bits. For vectors and tests."""
        out = np.zeros(count, dtype=WORD)
        self.add(chunk, out, Workspace())
        reduce(out, self.bits)
        return out

    def _apply(self, operation: np.ufunc, chunk: int, out: Words, workspace: Workspace) -> None:
        if chunk < 0 or len(out) > CHUNK_WORDS:
            raise ValueError(f"chunk {chunk} with {len(out)} words: a chunk holds at most {CHUNK_WORDS}")
        counter = (chunk * CHUNK_BLOCKS).to_bytes(BLOCK_BYTES, "big")
        encryptor = Cipher(algorithms.AES256(self.seed.reveal()), modes.CTR(counter)).encryptor()
        for start in range(0, len(out), _SLICE_WORDS):
            part = out[start : start + _SLICE_WORDS]
            encryptor.update_into(_ZEROS[: 4 * len(part)], workspace.raw)
            operation(part, workspace.words[: len(part)], out=part)


@dataclass(frozen=True)
class SignedMask:
    """A mask with the sign under which a sum takes it. positive: add it; otherwise take it away."""

    mask: Mask
    positive: bool

    def apply(self, chunk: int, out: Words, workspace: Workspace) -> None:
        """Adds or takes away the first len(out) words of a chunk, in place."""
        (self.mask.add if self.positive else self.mask.subtract)(chunk, out, workspace)

    def inverse(self) -> SignedMask:
        """The same mask with the other sign."""
        return SignedMask(self.mask, not self.positive)


def apply_masks(masks: Iterable[SignedMask], chunk: int, out: Words, workspace: Workspace) -> None:
    """Applies every mask to one chunk, in place. An empty iterable is the plain sum."""
    for mask in masks:
        mask.apply(chunk, out, workspace)


def reduce(words: Words, bits: int) -> None:
    """Reduces words modulo 2^bits, in place."""
    if check_bits(bits) != 32:
        np.bitwise_and(words, np.uint32((1 << bits) - 1), out=words)


def check_bits(bits: int) -> int:
    """Returns bits if it is 24 or 32."""
    if bits not in BITS:
        raise ValueError(f"b is 24 or 32, not {bits}")
    return bits


def wire_size(words: int, bits: int) -> int:
    """Bytes of a vector on the wire: 3 or 4 a word."""
    return words * (check_bits(bits) // 8)


def pack24(words: Words, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The low 24 bits of each word in 3 bytes, little endian.

    out: at least 3 * len(words) bytes; returns the part that was filled.
    """
    size = 3 * len(words)
    packed = np.empty(size, dtype=np.uint8) if out is None else out[:size]
    raw = np.ascontiguousarray(words).view(np.uint8)
    for byte in range(3):
        packed[byte::3] = raw[byte::4]
    return packed


def unpack24(packed: NDArray[np.uint8], out: Words | None = None) -> Words:
    """The inverse of `pack24`. Raises ValueError when the bytes are no multiple of 3."""
    count, rest = divmod(len(packed), 3)
    if rest:
        raise ValueError(f"{len(packed)} bytes are no whole number of 3-byte words")
    words: Words = np.empty(count, dtype=WORD) if out is None else out[:count]
    if count:
        # every word but the last is read as four bytes, three apart; the fourth belongs to the next word and is masked
        # off
        read: Words = np.ndarray((count - 1,), dtype=WORD, buffer=packed, strides=(3,))
        np.bitwise_and(read, np.uint32(0xFFFFFF), out=words[:-1])
        words[-1] = int.from_bytes(packed[-3:].tobytes(), "little")
    return words
