"""The encoding: its bounds, its two roundings, exact sums, its tail, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.encoding import BLOCK_WORDS, Encoding, Section, SumRefused, Values, Words
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import InsecureFakeRandom

RANDOM = InsecureFakeRandom("encoding")


def encoding(bits: int = 32, n: int = 3, cap: int = 100, sections: Sequence[Section] = (Section(10, 1.0),)) -> Encoding:
    return Encoding(bits, n, cap, tuple(sections), loss_max=8.0, losses=2)


def words_of(e: Encoding, values: Sequence[float] | Values, weight: int) -> Words:
    out = np.zeros(len(values), dtype="<u4")
    e.quantise(np.array(values, dtype=np.float32), 0, weight, out, RANDOM)
    return out


def summed(vectors: Sequence[Words], bits: int) -> Words:
    total: Words = (np.sum([vector.astype(np.uint64) for vector in vectors], axis=0) % np.uint64(2**bits)).astype(np.uint32)
    return total


def centred(words: Words, bits: int) -> list[int]:
    return [int(w) - 2**bits if int(w) >= 2 ** (bits - 1) else int(w) for w in words]


def test_numbers_of_the_specification() -> None:
    e = encoding(n=10)
    assert e.modulus_max == 2**31 - 1
    assert e.largest == 214748364
    assert (e.size, e.tail_words, e.length, e.wire_bytes) == (10, 69, 79, 316)
    assert encoding(24, n=10).largest == 838860
    assert encoding(24, n=10).wire_bytes == 237


@pytest.mark.parametrize("n", [3, 4, 5, 8, 16, 50, 100, 1000])
@pytest.mark.parametrize("bits", [24, 32])
def test_the_largest_values_of_all_sites_do_not_wrap(bits: int, n: int) -> None:
    """N = 4, 8, 16 wrap under a headroom of ceil(log2 N) bits."""
    e = encoding(bits, n, cap=100, sections=[Section(4, 0.1)])
    for sign in (1.0, -1.0):
        total = sum(int(word) for word in words_of(e, [sign * 5.0] * 4, 100)[:1]) * n % 2**bits
        out = np.zeros(1, dtype=np.float32)
        e.dequantise(np.array([total], dtype="<u4"), 0, 100 * n, out)
        assert out[0] == pytest.approx(sign * 0.1, rel=1e-6 if bits == 32 else 1e-3)


def test_rounding_is_half_even_and_clamped_at_32_bits() -> None:
    # one site and this clip: v = 2^16 x exactly, so that halves can be written in float32
    e = Encoding(32, 1, 1, (Section(8, (2**31 - 1) / 2**16),), 8.0, 2)
    halves = [n / 2**17 for n in (0, 1, 3, 5, -1, -3)]
    assert centred(words_of(e, [*halves, 1e30, -1e30], 1), 32) == [0, 0, 2, 2, 0, -2, e.largest, -e.largest]


def test_32_bits_are_deterministic_and_need_no_randomness() -> None:
    e, x = encoding(sections=[Section(1000, 0.2)]), np.linspace(-0.3, 0.3, 1000, dtype=np.float32)
    first, second = np.zeros(1000, dtype="<u4"), np.zeros(1000, dtype="<u4")
    assert e.quantise(x, 0, 37, first) == e.quantise(x, 0, 37, second) == 334
    assert first.tobytes() == second.tobytes()


def test_24_bits_need_randomness() -> None:
    with pytest.raises(ValueError, match="stochastically"):
        encoding(24).quantise(np.zeros(10, np.float32), 0, 1, np.zeros(10, dtype="<u4"))


def test_24_bits_round_without_bias() -> None:
    d = 200_000
    e = encoding(24, n=4, cap=10, sections=[Section(d, 1.0)])
    v = 0.3  # between two integers
    x = np.full(d, v / e.largest, dtype=np.float32)
    out = np.zeros(d, dtype="<u4")
    e.quantise(x, 0, 10, out, RANDOM)
    assert set(centred(out, 24)) == {0, 1}
    assert out.mean() == pytest.approx(v, abs=5 * math.sqrt(v * (1 - v) / d))


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, BLOCK_WORDS - 1, BLOCK_WORDS, 2 * BLOCK_WORDS + 4])
def test_values_that_are_not_finite_are_refused(bits: int, bad: float, at: int) -> None:
    d = 2 * BLOCK_WORDS + 5
    e, x = encoding(bits, sections=[Section(d, 1.0)]), np.zeros(d, dtype=np.float32)
    x[at] = bad
    with pytest.raises(CosiloError, match="not finite"):
        e.quantise(x, 0, 1, np.zeros(d, dtype="<u4"), RANDOM)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([24, 32]),
    sites=st.integers(1, 12),
    cap=st.integers(1, 4096),
    seed=st.integers(0, 2**32),
    clip=st.floats(1e-6, 1e3),
    size=st.integers(1, 50),
)
def test_sums_are_exact_and_the_mean_is_within_its_bound(bits: int, sites: int, cap: int, seed: int, clip: float, size: int) -> None:
    generator = np.random.default_rng(seed)
    e = encoding(bits, sites, cap, [Section(size, clip), Section(3, clip / 7)])
    weights = [int(generator.integers(1, cap + 1)) for _ in range(sites)]
    updates = [(generator.standard_normal(e.size) * clip).astype(np.float32) for _ in range(sites)]
    words = [words_of(e, update, weight) for update, weight in zip(updates, weights, strict=True)]
    total = summed(words, bits)
    assert centred(total, bits) == [sum(column) for column in zip(*(centred(w, bits) for w in words), strict=True)]
    mean = np.zeros(e.size, dtype=np.float32)
    e.dequantise(total, 0, sum(weights), mean)
    clips = np.array([clip] * size + [clip / 7] * 3)
    kept = [weight * np.clip(update.astype(np.float64), -clips, clips) for weight, update in zip(weights, updates, strict=True)]
    expected = np.sum(kept, axis=0) / sum(weights)
    for at in range(e.size):
        bound = e.error_bound(float(clips[at]), sites, sum(weights))
        assert abs(float(mean[at]) - expected[at]) <= bound * (1 + 1e-6) + 1e-7 * float(clips[at])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 97))
def test_blocks_that_cut_sections_anywhere_give_the_same_words(sizes: list[int], block: int) -> None:
    e = encoding(sections=[Section(size, 0.1 * (1 + at)) for at, size in enumerate(sizes)])
    x = (np.random.default_rng(1).standard_normal(e.size) * 0.3).astype(np.float32)
    whole, parts, clipped = np.zeros(e.size, dtype="<u4"), np.zeros(e.size, dtype="<u4"), 0
    for start in range(0, e.size, block):
        clipped += e.quantise(x[start : start + block], start, 50, parts[start : start + block])
    assert e.quantise(x, 0, 50, whole) == clipped
    assert parts.tobytes() == whole.tobytes()
    limits = np.concatenate([np.full(section.size, section.clip) for section in e.sections])
    assert clipped == int((np.abs(x).astype(np.float64) > limits).sum())
    mean, again = np.zeros(e.size, np.float32), np.zeros(e.size, np.float32)
    e.dequantise(whole, 0, 50, mean)
    for start in range(0, e.size, block):
        e.dequantise(whole[start : start + block], start, 50, again[start : start + block])
    assert mean.tobytes() == again.tobytes()


def test_precision_on_heavy_tailed_updates() -> None:
    """Relative L2 error of the mean of ten updates: about 3e-7 at b = 32 and 8e-5 at b = 24, with c at the largest value."""
    generator = np.random.default_rng(0)
    updates = [(generator.standard_t(3, 20_000) * 1e-3).astype(np.float32) for _ in range(10)]
    clip = float(max(np.abs(update).max() for update in updates))
    for bits, limit in ((32, 1e-6), (24, 2e-3)):
        e = encoding(bits, 10, 100, [Section(20_000, clip)])
        total = summed([words_of(e, update, 100) for update in updates], bits)
        mean, exact = np.zeros(20_000, np.float32), np.mean([u.astype(np.float64) for u in updates], axis=0)
        e.dequantise(total, 0, 1000, mean)
        assert np.linalg.norm(mean - exact) / np.linalg.norm(exact) < limit
        assert np.std(mean - exact) <= e.error_sd(clip, 10, 1000) * 1.05


# The tail


def opened(e: Encoding, sites: Sequence[tuple[int, Sequence[float], int]]) -> Words:
    return summed([e.tail(weight, losses, clipped, RANDOM) for weight, losses, clipped in sites], e.bits)


@pytest.mark.parametrize("bits", [24, 32])
def test_the_tail_opens_to_weighted_means(bits: int) -> None:
    e = encoding(bits, n=3)
    tail = e.open_tail(opened(e, [(100, (1.0, 99.0), 5), (50, (4.0, -3.0), 0), (50, (2.0, 0.0), 10)]), 3)
    assert (tail.total_weight, tail.contributors) == (200, 3)
    assert tail.losses == pytest.approx((2.0, 4.0), abs=1e-4)  # 99 is clipped to loss_max = 8, -3 to 0
    assert tail.clip_ratio == pytest.approx(0.5, abs=1e-5)


def test_tail_words_of_one_site() -> None:
    words = encoding(n=3).tail(7, (8.0, 0.0), 10, RANDOM)
    q = (2**31 - 1) // 3
    assert words[0] == 7
    assert words[1] in (7 * q // 100, 7 * q // 100 + 1)
    assert words[2:5].tolist() == [0, q, 1]
    assert words[5:].tolist() == [0] * 64


def test_a_rehearsal_is_zero_with_a_weight_of_one() -> None:
    words = encoding().zero_words()
    assert len(words) == encoding().length
    assert not words[:10].any()
    assert words[10:].tolist() == [1, 0, 0, 0, 1] + [0] * 64


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (4, 3, "3 contributors, not 2"),
        (5, 1, "zeros"),
        (68, 2**31, "zeros"),
        (0, 201, "total weight"),
        (0, 1, "total weight"),
        (0, 2**32 - 5, "total weight"),
        (1, 2**32 - 1, "out of range"),
        (3, 2**31 - 1, "out of range"),
    ],
)
def test_a_tail_that_cannot_be_is_refused(at: int, value: int, why: str) -> None:
    e = encoding(n=3)
    words = opened(e, [(100, (1.0, 1.0), 0), (100, (1.0, 1.0), 0)])
    words[at] = value
    with pytest.raises(SumRefused, match=why):
        e.open_tail(words, 2)


def test_a_tail_refuses_what_training_must_not_give() -> None:
    e = encoding()
    for losses in ((1.0,), (1.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(CosiloError, match="loss"):
            e.tail(1, losses, 0, RANDOM)
    for weight in (0, 101, -1):
        with pytest.raises(CosiloError, match="weight"):
            e.tail(weight, (1.0, 1.0), 0, RANDOM)
        with pytest.raises(CosiloError, match="weight"):
            e.quantise(np.zeros(10, np.float32), 0, weight, np.zeros(10, dtype="<u4"))


# The description


def test_the_description_goes_round() -> None:
    e = encoding(24, 7, 99, [Section(3, 0.1), Section(4, 2.5)])
    assert Encoding.parse(e.canonical()) == e
    assert len(e.digest()) == 32
    assert e.digest() != encoding(24, 7, 98, e.sections).digest()


def test_bytes_that_are_no_description_are_refused() -> None:
    good = encoding().canonical()
    for bad in (b"", good[:-1], good + b"\x00", good.replace(b"encoding/1", b"encoding/2"), good[4:]):
        with pytest.raises(CosiloError, match="not an encoding"):
            Encoding.parse(bad)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bits": 16}, "bits must be"),
        ({"participants": 0}, "participants"),
        ({"participants": 1001}, "participants"),
        ({"cap": 0}, "n cap <= M"),
        ({"bits": 24, "participants": 1000, "cap": 8389}, "n cap <= M"),
        ({"loss_max": float("nan")}, "loss_max"),
        ({"loss_max": 0.0}, "loss_max"),
        ({"losses": -1}, "losses"),
        ({"losses": 2000}, "losses"),
        ({"sections": (Section(0, 1.0),)}, "section"),
        ({"sections": (Section(1, 0.0),)}, "section"),
        ({"sections": (Section(1, float("inf")),)}, "section"),
        ({"sections": (Section(1, float("nan")),)}, "section"),
        ({"sections": (Section(1 << 35, 1.0),)}, "at most"),
    ],
)
def test_an_encoding_whose_asserts_do_not_hold_is_refused(change: dict[str, object], why: str) -> None:
    fields: dict[str, object] = {
        "bits": 32,
        "participants": 3,
        "cap": 100,
        "sections": (Section(10, 1.0),),
        "loss_max": 8.0,
        "losses": 2,
    }
    with pytest.raises(CosiloError, match=why):
        Encoding(**{**fields, **change})  # type: ignore[arg-type]  # one field of each case has a wrong value


def test_ranges_outside_the_vector_are_refused() -> None:
    e, ten = encoding(), np.zeros(10, dtype=np.float32)
    for start, count in ((1, 10), (-1, 5)):
        with pytest.raises(ValueError, match="values"):
            e.quantise(ten[:count], start, 1, np.zeros(count, dtype="<u4"))
        with pytest.raises(ValueError, match="values"):
            e.dequantise(np.zeros(count, dtype="<u4"), start, 1, ten[:count])
    with pytest.raises(ValueError, match="tail has"):
        e.open_tail(np.zeros(3, dtype="<u4"), 1)
