"""The step from one checkpoint to the next in 24 bits a value: rounded once by the coordinator, applied bit for bit by every site.

Owns the lattice, the file and the one function that both sides step by. Values are taken 2^12 at a time; each group has its own power of two,
2^e, the smallest of which its largest change is at most 2^23 - 1. A change becomes an integer q of them, and the next value is
float32(float64(value) + q 2^e). As q has 24 bits and 2^e is a power of two, the product is exact, whatever a compiler fuses; the sum and the
rounding are IEEE 754's, one each. A change is off by at most 2^(e-1), some 2^-23 of the group's largest change or less; a value of more than
twice that change, before and after, is not off at all, because float32 itself has nothing finer there. Must not know rounds, sums or the
network.

File: magic (16 bytes), SHA-256 of the weights it leads from and of those it makes (32 bytes each), the number of values (8 bytes), then for each
2^16 values their groups' e (int16 each) and their q (3 bytes each, two's complement); all little endian.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from cosilo_common.errors import CosiloError
from cosilo_common.secagg.masks import pack24, unpack24
from cosilo_common.transfer import sync_folder
from cosilo_common.weights import Vector, read_header

Exponents = NDArray[np.int16]
Integers = NDArray[np.int32]

GROUP_VALUES: Final = 1 << 12  # a group's exponent costs 2 bytes beside 12 KiB; one larger change coarsens no more neighbours than these
BLOCK_VALUES: Final = 1 << 16  # float64 in between takes 512 KiB, which stays in a core's cache
LARGEST: Final = (1 << 23) - 1
EXPONENT_MIN: Final = -149  # 2^-149 is float32's smallest value: nothing finer can be asked for
EXPONENT_MAX: Final = 107  # no two float32 differ by 2^129
HEADER_BYTES: Final = 16 + 2 * 32 + 8

_MAGIC: Final = b"cosilo/step/1".ljust(16, b"\x00")
_WORD_BYTES: Final = 4
_MAKE, _APPLY = "make step", "apply step"


@dataclass(frozen=True)
class StepHeader:
    """From which weights to which, lower-case hex SHA-256 of their files, and how many values they have."""

    base: str
    made: str
    values: int

    def encode(self) -> bytes:
        """HEADER_BYTES bytes."""
        return _MAGIC + bytes.fromhex(self.base) + bytes.fromhex(self.made) + self.values.to_bytes(8, "little")

    @classmethod
    def decode(cls, data: bytes) -> StepHeader:
        """The inverse of `encode`; raises CosiloError where it is no step's."""
        if len(data) != HEADER_BYTES or data[:16] != _MAGIC:
            raise CosiloError(_APPLY, "not a step's header")
        return cls(data[16:48].hex(), data[48:80].hex(), int.from_bytes(data[80:], "little"))


def step_bytes(values: int) -> int:
    """Length of the step of a model with so many values."""
    return HEADER_BYTES + 3 * values + 2 * sum(-(-count // GROUP_VALUES) for _, count in _blocks(values))


def expected_step(base: Path, base_digest: str, made: str, made_bytes: int, length_bytes: int) -> StepHeader:
    """What the header of a step from a weights file must say. Raises CosiloError where its length, or that of what it makes, cannot be right:
    no fetch fills a disk."""
    header = read_header(base)
    if (made_bytes, length_bytes) != (header.file_bytes, step_bytes(header.table.size)):
        subject = f"{length_bytes} bytes to make {made_bytes} are no step from {header.table.size} values"
        raise CosiloError(_APPLY, subject, "tell the coordinator's admin")
    return StepHeader(base_digest, made, header.table.size)


def rounded(before: Vector, after: Vector) -> tuple[Exponents, Integers]:
    """The change from `before` to `after`, float32 (n,), on the lattice: each group's e, and q of every value. Both must be finite."""
    change = after.astype(np.float64)
    change -= before
    peaks = np.maximum.reduceat(np.abs(change), np.arange(0, len(change), GROUP_VALUES))
    fractions, powers = np.frexp(peaks)
    exponents = powers - 23 + (np.rint(np.ldexp(fractions, 23)) > LARGEST)
    exponents = np.where(peaks == 0, EXPONENT_MIN, np.maximum(exponents, EXPONENT_MIN))
    _scale(change, -exponents)
    return exponents.astype(np.int16), np.rint(change, out=change).astype(np.int32)


def stepped(before: Vector, exponents: Exponents, integers: Integers) -> Vector:
    """The values after a step: what both sides call. Raises CosiloError where an exponent is none of a step's."""
    if len(exponents) and not EXPONENT_MIN <= int(exponents.min()) <= int(exponents.max()) <= EXPONENT_MAX:
        raise CosiloError(_APPLY, f"an exponent is not from {EXPONENT_MIN} to {EXPONENT_MAX}")
    after = integers.astype(np.float64)
    _scale(after, exponents.astype(np.int32))
    after += before
    with np.errstate(over="ignore"):  # the coordinator refuses what is not finite, and a site whatever has another digest
        return after.astype(np.float32)


def make_step(base: Path, after: Path, step: Path) -> None:
    """Writes the step from one weights file to another of the same table, and makes the second what the step leads to, in place.

    The header's `made` stays zeros until `seal_step`. Raises CosiloError where a value would not be finite, OSError where the disk is full.
    """
    header = read_header(base)
    if read_header(after) != header:
        raise CosiloError(_MAKE, f"{after.name} has other tensors than the weights before it")
    with base.open("rb") as old, after.open("r+b") as new, step.open("wb") as out:
        old.seek(header.data_start)
        out.write(bytes(HEADER_BYTES))
        for start, count in _blocks(header.table.size):
            place = header.data_start + _WORD_BYTES * start
            new.seek(place)
            before, target = _read(old, count, "<f4"), _read(new, count, "<f4")
            if not (np.isfinite(before).all() and np.isfinite(target).all()):
                raise CosiloError(_MAKE, f"a value from element {start} on is not finite", "training diverged: lower the learning rate")
            exponents, integers = rounded(before, target)
            made = stepped(before, exponents, integers)
            if not np.isfinite(made).all():
                raise CosiloError(_MAKE, f"a value from element {start} on is not finite", "training diverged: lower the learning rate")
            new.seek(place)
            new.write(made.data)
            out.write(exponents.data)
            out.write(pack24(integers.view(np.uint32)).data)


def seal_step(step: Path, header: StepHeader) -> None:
    """Writes a step's header: what it leads to is known when that file is whole."""
    with step.open("r+b") as file:
        file.write(header.encode())


def apply_step(base: Path, step: Path, made: Path, expected: StepHeader) -> None:
    """Writes the weights that a step leads to, whole and on disk, or raises and leaves nothing.

    expected: what the round says of the step; the file made has the digest `expected.made`. Memory is a block, for any model. Raises
    CosiloError where the step is another, ends early or late, or makes anything else: the base may have rotted.
    """
    try:
        _apply(base, step, made, expected)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _apply(base: Path, step: Path, made: Path, expected: StepHeader) -> None:
    header = read_header(base)
    digest = hashlib.sha256()
    with base.open("rb") as old, step.open("rb") as steps, _private(made) as out:
        found = StepHeader.decode(steps.read(HEADER_BYTES))
        if found != expected or found.values != header.table.size:
            raise CosiloError(_APPLY, f"{step.name} is not the step that the round names")
        _put(old.read(header.data_start), digest, out)
        for _, count in _blocks(header.table.size):
            exponents = _read(steps, -(-count // GROUP_VALUES), "<i2")
            integers = _signed(unpack24(_read(steps, 3 * count, "u1")))
            _put(stepped(_read(old, count, "<f4"), exponents, integers).data, digest, out)
        if steps.read(1):
            raise CosiloError(_APPLY, f"{step.name} goes on behind its last value")
        if digest.hexdigest() != expected.made:
            raise CosiloError(
                _APPLY, f"it makes {digest.hexdigest()[:12]}, not {expected.made[:12]}", "the base may have rotted on the disk"
            )
        out.flush()
        os.fsync(out.fileno())
    sync_folder(made.parent)


def _blocks(values: int) -> Iterator[tuple[int, int]]:
    for start in range(0, values, BLOCK_VALUES):
        yield start, min(BLOCK_VALUES, values - start)


def _scale(values: NDArray[np.float64], exponents: NDArray[np.int32]) -> None:
    """Multiplies each group by its power of two, in place; exact, as float64 has room for every such product."""
    powers = np.ldexp(1.0, exponents)
    whole = len(values) // GROUP_VALUES
    groups = values[: whole * GROUP_VALUES].reshape(whole, GROUP_VALUES)
    groups *= powers[:whole, None]
    if whole < len(powers):
        values[whole * GROUP_VALUES :] *= powers[whole]


def _signed(words: NDArray[np.uint32]) -> Integers:
    """Three bytes of two's complement, as they were packed, to integers; the words are used up."""
    words <<= np.uint32(8)
    integers: Integers = words.view(np.int32)
    integers >>= 8
    return integers


def _read(file: BinaryIO, count: int, dtype: str) -> NDArray[Any]:
    found = np.empty(count, dtype)
    if file.readinto(found.data.cast("B")) != found.nbytes:  # type: ignore[attr-defined]  # every file that `open` gives has it
        raise CosiloError(_APPLY, f"{Path(file.name).name} ends early")
    return found


def _put(data: bytes | memoryview, digest: hashlib._Hash, out: BinaryIO) -> None:
    digest.update(data)
    out.write(data)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
