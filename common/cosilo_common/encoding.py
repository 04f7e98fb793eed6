"""A float32 vector as integers modulo 2^b and back (docs/protocol.md, Encoding).

Owns the quantiser, the tail words, and the description of both that every advert names by digest. Must not know keys,
masks, files or who sent what. Each element goes through float64 in blocks that stay in a core's cache.

One vector is the update's values, section by section, then the tail: raw W; each loss; the clip ratio; raw 1; 64 zeros.
"""

from __future__ import annotations

import math
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cosilo_common.canonical import MalformedBytes, lp, parse_u64, sha256, u64, unlp
from cosilo_common.errors import CosiloError

Words = NDArray[np.uint32]
Values = NDArray[np.float32]

ZERO_WORDS: Final = 64  # a wrong opening leaves all of them zero with probability 2^-1536 at b = 24
TAIL_WORDS_FIXED: Final = 3 + ZERO_WORDS  # W, the clip ratio, 1, zeros; the losses come on top
BLOCK_WORDS: Final = 1 << 16  # 512 KiB of float64: measured fastest (whole-array temporaries are 2.5 times slower)
SECTIONS_MAX: Final = 100_000  # tensors of the largest model that a manifest describes
LENGTH_MAX: Final = 1 << 34  # 64 GiB on the wire; keeps every counter and offset far from overflow
PARTICIPANTS_MAX: Final = 1000  # as in a manifest
LOSSES_MAX: Final = 1024  # far more buckets than any schedule is divided into
CLIP_MIN: Final = 1e-12  # below it, float32 differences of weights are noise, and Q / c leaves the range of exact doubles
CLIP_MAX: Final = 1e6

_LABEL: Final = b"cosilo-encoding/1"
_WORD: Final = np.dtype("<u4")
_UNIFORM_STEP: Final = 2.0**-32


class SumRefused(CosiloError):
    """An opened sum that cannot be what the survivors sent. Nothing of it may be used."""


class ByteSource(Protocol):
    """Where stochastic rounding takes its bytes from: a cryptographic generator."""

    def token_bytes(self, n: int) -> bytes: ...


@dataclass(frozen=True)
class Section:
    """Consecutive values with one clip range. size: values; clip: c, the largest absolute value that is kept."""

    size: int
    clip: float


@dataclass(frozen=True)
class OpenedTail:
    """What the tail of an opened sum says.

    total_weight: sum of W. losses: weighted means. clip_ratio: mean over sites of the share of clipped values.
    contributors: sites.
    """

    total_weight: int
    losses: tuple[float, ...]
    clip_ratio: float
    contributors: int


@dataclass(frozen=True)
class Encoding:
    """How values become words. bits: b, 24 or 32. participants: n = |P|. cap: the largest weight W.

    sections: empty in a statistics round, whose vector is its tail. losses: how many. loss_max: each loss is clipped
    to [0, loss_max].
    """

    bits: int
    participants: int
    cap: int
    sections: tuple[Section, ...]
    loss_max: float
    losses: int

    def __post_init__(self) -> None:
        if self.bits not in (24, 32):  # before M is: 2^bits of whatever the coordinator wrote takes all the memory there is
            raise _unfit(f"bits must be 24 or 32, not {self.bits}")
        n, m = self.participants, self.modulus_max
        if not 1 <= n <= PARTICIPANTS_MAX:
            raise _unfit(f"participants must be from 1 to {PARTICIPANTS_MAX}, not {n}")
        q = self.largest
        if q < 1 or n * q > m:
            raise _unfit(f"n Q <= M does not hold: {n} * {q} > {m}")
        if self.cap < 1 or n * self.cap > m:
            raise _unfit(f"n cap <= M does not hold: {n} participants, cap {self.cap}, {self.bits} bits")
        if not (math.isfinite(self.loss_max) and CLIP_MIN <= self.loss_max <= CLIP_MAX):
            raise _unfit(f"loss_max must be from {CLIP_MIN} to {CLIP_MAX}, not {self.loss_max}")
        if not 0 <= self.losses <= LOSSES_MAX:
            raise _unfit(f"losses must be from 0 to {LOSSES_MAX}, not {self.losses}")
        if len(self.sections) > SECTIONS_MAX:
            raise _unfit(f"{len(self.sections)} sections; at most {SECTIONS_MAX}")
        for section in self.sections:
            if section.size < 1 or not (math.isfinite(section.clip) and CLIP_MIN <= section.clip <= CLIP_MAX):
                raise _unfit(f"a section has {section.size} values and clip {section.clip}, not 1e-12 to 1e6")
        if self.length > LENGTH_MAX:
            raise _unfit(f"{self.length} words; at most {LENGTH_MAX}")

    @property
    def modulus_max(self) -> int:
        """M = 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def largest(self) -> int:
        """Q = floor(M / n): the largest integer of one site, so that n of them never wrap."""
        return self.modulus_max // self.participants

    @cached_property
    def size(self) -> int:
        """d: values in the vector, without the tail."""
        return sum(section.size for section in self.sections)

    @property
    def tail_words(self) -> int:
        """Words after the values."""
        return TAIL_WORDS_FIXED + self.losses

    @property
    def length(self) -> int:
        """L: all words of the vector."""
        return self.size + self.tail_words

    @property
    def wire_bytes(self) -> int:
        """Length of an upload: 3 or 4 bytes a word."""
        return self.length * (self.bits // 8)

    def canonical(self) -> bytes:
        """lp(label, b, n, cap, loss_max, losses, lp(size, clip, size, clip, ...)).

        Integers are 8 bytes, reals IEEE 754 binary64, both big endian.
        """
        parts = (part for section in self.sections for part in (u64(section.size), struct.pack(">d", section.clip)))
        return lp(
            _LABEL,
            u64(self.bits),
            u64(self.participants),
            u64(self.cap),
            struct.pack(">d", self.loss_max),
            u64(self.losses),
            lp(*parts),
        )

    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: the encoding digest of every advert (R3)."""
        return sha256(self.canonical())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The inverse of `canonical`.

        Raises CosiloError on other bytes and on an encoding whose asserts do not hold.
        """
        try:
            label, bits, n, cap, loss_max, losses, sections = _exactly(unlp(data, 7), 7)
            if label != _LABEL:
                raise MalformedBytes(f"its label is {label[:40]!r}")
            parts = unlp(sections, 2 * SECTIONS_MAX)
            if len(parts) % 2:
                raise MalformedBytes("a section without a clip")
            return cls(
                bits=parse_u64(bits),
                participants=parse_u64(n),
                cap=parse_u64(cap),
                sections=tuple(Section(parse_u64(size), _parse_real(clip)) for size, clip in zip(parts[::2], parts[1::2], strict=True)),
                loss_max=_parse_real(loss_max),
                losses=parse_u64(losses),
            )
        except MalformedBytes as error:
            raise _unfit(f"not an encoding: {error}") from None

    def quantise(self, block: Values, start: int, weight: int, out: Words, random: ByteSource | None = None) -> int:
        """Values start .. start + len(block) as words in `out`; returns how many were clipped.

        v = (W / cap) clip(x, -c, c) Q / c in float64. b = 32: q = round half even(v). b = 24: q = floor(v + u), u in
        [0, 1) from `random`, 4 bytes a value. q is clamped to [-Q, Q]; word = q mod 2^b. block: float32; out: uint32,
        as long. Raises CosiloError on a value that is not finite, whatever was written by then.
        """
        self._check_weight(weight)
        if len(out) != len(block) or not 0 <= start <= start + len(block) <= self.size:
            raise ValueError(f"values {start} to {start + len(block)} of {self.size}, into {len(out)} words")
        scratch, clipped = _SCRATCH, 0
        for first, last, clip in self._pieces(start, len(block)):
            clipped += self._quantise_piece(block[first:last], clip, weight, out[first:last], scratch, random)
        return clipped

    def tail(self, weight: int, losses: Sequence[float], clipped: int, random: ByteSource) -> Words:
        """The tail words of one site.

        Raw W; floor((W / cap) clip(l, 0, l_max) / l_max Q + u) each; floor(Q clipped / d + u); 1; 64 zeros.
        """
        self._check_weight(weight)
        if len(losses) != self.losses:
            raise CosiloError("encode the tail", f"{len(losses)} losses, not {self.losses}", "report one loss for each bucket")
        if not all(math.isfinite(loss) for loss in losses):
            raise CosiloError("encode the tail", "a loss is not finite", "lower the learning rate, or look at the data")
        if not 0 <= clipped <= self.size:
            raise ValueError(f"{clipped} of {self.size} values clipped")
        q = self.largest
        shares = [weight / self.cap * (min(max(loss, 0.0), self.loss_max) / self.loss_max) for loss in losses]
        shares.append(clipped / self.size if self.size else 0.0)
        rounded = [min(q, math.floor(share * q + _uniform(random))) for share in shares]
        return np.array([weight, *rounded, 1, *([0] * ZERO_WORDS)], dtype=_WORD)

    def zero_tail(self) -> Words:
        """The tail of a rehearsal: W = 1, every loss and the clip ratio 0, 1, 64 zeros.

        With values all zero it is the rehearsal's vector.
        """
        return np.array([1] + [0] * (self.losses + 1) + [1] + [0] * ZERO_WORDS, dtype=_WORD)

    def zero_words(self) -> Words:
        """The whole vector of a rehearsal, before masks: L words."""
        words = np.zeros(self.length, dtype=_WORD)
        words[self.size :] = self.zero_tail()
        return words

    def open_tail(self, words: Words, count: int) -> OpenedTail:
        """Reads the tail of an opened sum.

        count: |U3|. Raises SumRefused unless the zeros are zero and the contributors are `count`.
        """
        if len(words) != self.tail_words:
            raise ValueError(f"a tail has {self.tail_words} words, not {len(words)}")
        total, *rest = (self._centred(int(word)) for word in words)
        losses, (clip_sum, contributors, *zeros) = rest[: self.losses], rest[self.losses :]
        if any(zeros):
            raise _refused("its zeros are not zero: a mask is left in it")
        if contributors != count:
            raise _refused(f"it counts {contributors} contributors, not {count}")
        if not count <= total <= count * self.cap:
            raise _refused("its total weight is out of range")
        if not all(0 <= word <= count * self.largest for word in (*losses, clip_sum)):
            raise _refused("a loss or the clip ratio is out of range")
        return OpenedTail(
            total_weight=total,
            losses=tuple(word * self.loss_max * self.cap / (self.largest * total) for word in losses),
            clip_ratio=clip_sum / (self.largest * count),
            contributors=contributors,
        )

    def dequantise(self, block: Words, start: int, total_weight: int, out: Values) -> None:
        """An opened sum's words from `start` on as the weighted mean: S step cap / sum W in float64, then float32."""
        if len(out) != len(block) or not 0 <= start <= start + len(block) <= self.size:
            raise ValueError(f"values {start} to {start + len(block)} of {self.size}, into {len(out)}")
        if total_weight < 1:
            raise ValueError("the total weight is at least 1")
        for first, last, clip in self._pieces(start, len(block)):
            # the word moved to the top of 32 bits is 2^(32 - b) S as a signed integer, so centring costs one shift
            signed = (block[first:last] << np.uint32(32 - self.bits)).view(np.int32)
            factor = self.step(clip) * self.cap / total_weight / (1 << (32 - self.bits))
            np.multiply(signed, factor, out=out[first:last], dtype=np.float64, casting="same_kind")

    def step(self, clip: float) -> float:
        """c / Q: what one unit stands for at weight cap."""
        return clip / self.largest

    def error_sd(self, clip: float, contributors: int, total_weight: int) -> float:
        """A bound on the standard deviation of the mean's rounding error in one value.

        step cap sqrt(|U3|) / (2 sum W).
        """
        return self.step(clip) * self.cap * math.sqrt(contributors) / (2 * total_weight)

    def error_bound(self, clip: float, contributors: int, total_weight: int) -> float:
        """What the mean's rounding error in one value never exceeds (clipping and float32 aside).

        Half a step a site at b = 32, one at b = 24.
        """
        return self.step(clip) * self.cap * contributors / total_weight * (0.5 if self.bits == 32 else 1.0)

    def _quantise_piece(self, x: Values, clip: float, weight: int, out: Words, scratch: _Scratch, random: ByteSource | None) -> int:
        work = scratch.work[: len(x)]
        low, high = float(x.min()), float(x.max())  # NaN spreads through both, so two comparisons find every value that is not finite
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CosiloError("quantise the update", "a value is not finite", "train again: the update is of no use")
        peak = max(-low, high)
        scale = weight / self.cap * self.largest / clip
        clipped = 0
        np.copyto(work, x)  # then float64 throughout: a ufunc that widens as it goes is slower than the two passes
        if peak > clip:
            clipped = int(np.count_nonzero(work > clip) + np.count_nonzero(work < -clip))
            np.clip(work, -clip, clip, out=work)
        np.multiply(work, scale, out=work)
        if self.bits == 32:
            np.rint(work, out=work)
        else:
            if random is None:
                raise ValueError("b = 24 rounds stochastically: pass a source of random bytes")
            uniform = scratch.uniform[: len(x)]
            np.multiply(np.frombuffer(random.token_bytes(4 * len(x)), dtype=_WORD), _UNIFORM_STEP, out=uniform)
            np.add(work, uniform, out=work)
            np.floor(work, out=work)
        if min(peak, clip) * scale + 1 >= self.largest:  # rounding is monotone: below this no value can pass Q
            np.clip(work, -self.largest, self.largest, out=work)
        np.copyto(out.view(np.int32), work, casting="unsafe")  # |q| <= Q < 2^31: the cast is exact
        if self.bits == 24:
            np.bitwise_and(out, np.uint32(0xFFFFFF), out=out)
        return clipped

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, float]]:
        """(first, last, clip) within a block of `count` values from `start`.

        Pieces of one section and at most BLOCK_WORDS.
        """
        at, end = start, start + count
        index = bisect_right(self._ends, start)
        while at < end:
            last = min(end, self._ends[index], at + BLOCK_WORDS)
            yield at - start, last - start, self.sections[index].clip
            at = last
            if at == self._ends[index]:
                index += 1

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(section.size for section in self.sections))

    def _check_weight(self, weight: int) -> None:
        if not 1 <= weight <= self.cap:
            raise CosiloError("encode the update", f"weight {weight} is not from 1 to {self.cap}", "the run's cap bounds it")

    def _centred(self, word: int) -> int:
        word &= (1 << self.bits) - 1
        return word - (1 << self.bits) if word >> (self.bits - 1) else word


class _Scratch(threading.local):
    """Each thread's blocks, kept between calls.

    Fresh ones would cost a page fault every 4 KiB, more than the arithmetic.
    """

    def __init__(self) -> None:
        self.work: NDArray[np.float64] = np.empty(BLOCK_WORDS, np.float64)
        self.uniform: NDArray[np.float64] = np.empty(BLOCK_WORDS, np.float64)


_SCRATCH: Final = _Scratch()


def _uniform(random: ByteSource) -> float:
    return int.from_bytes(random.token_bytes(4), "little") * _UNIFORM_STEP


def _parse_real(data: bytes) -> float:
    if len(data) != 8:
        raise MalformedBytes(f"a real has 8 bytes, not {len(data)}")
    value: float = struct.unpack(">d", data)[0]
    return value


def _exactly(fields: list[bytes], count: int) -> list[bytes]:
    if len(fields) != count:
        raise MalformedBytes(f"{len(fields)} fields, not {count}")
    return fields


def _unfit(why: str) -> CosiloError:
    return CosiloError("read the encoding", why, "create the run again with an encoding that fits")


def _refused(why: str) -> SumRefused:
    return SumRefused("open the sum", why, "the round is abandoned; the next one starts afresh")
