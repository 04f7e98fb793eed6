"""Masks: exact inverses, one counter for words, nothing shared between chunks or uploads, and words that look random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg.keys import InsecureFakeRandom, Keystream, Secret, generate_secret
from cosilo_common.secagg.masks import (
    CHUNK_WORDS,
    Mask,
    SignedMask,
    Workspace,
    apply_masks,
    chunk_count,
    chunk_words,
    pack24,
    reduce,
    unpack24,
    wire_size,
)
from cosilo_common.secagg.messages import RoundKind
from tests.vectors.play import LOSS_MAX, Play

SEED = generate_secret(InsecureFakeRandom("masks"))


def whole_mask(bits: int, length: int, seed: Secret = SEED) -> np.ndarray:
    out, workspace = np.zeros(length, dtype="<u4"), Workspace()
    for chunk in range(chunk_count(length)):
        Mask(seed, bits).add(chunk, out[chunk * CHUNK_WORDS :][:CHUNK_WORDS], workspace)
    reduce(out, bits)
    return out


@pytest.mark.parametrize("bits", [24, 32])
def test_chunks_are_one_keystream_whose_counter_follows_words(bits: int) -> None:
    length = 3 * CHUNK_WORDS + 1001
    expected = np.frombuffer(Keystream(SEED).token_bytes(4 * length), dtype="<u4") & np.uint32(2**bits - 1)
    np.testing.assert_array_equal(whole_mask(bits, length), expected)


@pytest.mark.parametrize("bits", [24, 32])
def test_masks_do_not_repeat_between_chunks(bits: int) -> None:
    """Attack: mask reuse between chunks at b = 24. No run of 8 words of one chunk occurs anywhere in another."""
    mask = whole_mask(bits, 4 * CHUNK_WORDS)
    runs = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(mask, 8)[::1])
    keys = runs[:, 0].astype(np.uint64) << np.uint64(32) | runs[:, 1].astype(np.uint64)
    _, counts = np.unique(keys, return_counts=True)
    # pairs of 24-bit words collide by chance n^2 / 2^49 = 2000 times in a million; overlapping counters would repeat a quarter of all
    assert counts.max() <= 3
    assert (counts > 1).sum() < 5000
    repeated = {key for key, count in zip(*np.unique(keys, return_counts=True), strict=True) if count > 1}
    full = {runs[at].tobytes() for at in np.flatnonzero(np.isin(keys, list(repeated)))}
    assert len(full) == np.isin(keys, list(repeated)).sum()


@settings(max_examples=20, deadline=None)
@given(
    chunk=st.integers(0, 2**30),
    length=st.integers(0, 70_000),
    bits=st.sampled_from([24, 32]),
    positive=st.booleans(),
)
def test_a_mask_and_its_inverse_leave_nothing(chunk: int, length: int, bits: int, positive: bool) -> None:
    mask, workspace = SignedMask(Mask(SEED, bits), positive), Workspace()
    original = np.arange(length, dtype="<u4") % np.uint32(2**bits - 1)
    words = original.copy()
    apply_masks([mask, mask.inverse()], chunk, words, workspace)
    reduce(words, bits)
    np.testing.assert_array_equal(words, original)


def test_wire_sizes_and_chunk_counts() -> None:
    assert [chunk_count(n) for n in (0, 1, CHUNK_WORDS, CHUNK_WORDS + 1)] == [0, 1, 1, 2]
    assert chunk_words(CHUNK_WORDS + 5, 1) == 5
    with pytest.raises(IndexError):
        chunk_words(CHUNK_WORDS, 1)
    assert (wire_size(10, 24), wire_size(10, 32)) == (30, 40)
    with pytest.raises(ValueError, match="24 or 32"):
        Mask(SEED, 16)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_three_byte_words_go_round(values: list[int]) -> None:
    words = np.array(values, dtype="<u4")
    packed = pack24(words)
    assert packed.tobytes() == b"".join((value % 2**24).to_bytes(3, "little") for value in values)
    assert unpack24(packed).tolist() == [value % 2**24 for value in values]


def test_three_byte_words_reuse_their_buffers() -> None:
    words, packed, out = np.arange(100, dtype="<u4"), np.full(400, 7, np.uint8), np.full(200, 7, dtype="<u4")
    assert pack24(words, packed).base is packed
    assert unpack24(packed[:300], out).tolist() == list(range(100))
    assert (packed[300:] == 7).all()
    assert (out[100:] == 7).all()
    with pytest.raises(ValueError, match="whole number"):
        unpack24(packed[:4])


def uploads_of_zero(bits: int, seed: str) -> np.ndarray:
    encoding = Encoding(bits, 4, 64, (Section(2 * CHUNK_WORDS + 5000, 0.2),), LOSS_MAX, 2)
    play = Play(("a", "b", "c", "d"), f=1, encoding=encoding, seed=seed, kind=RoundKind.REHEARSAL)
    return np.frombuffer(play.wire(play.masked_words("b")), dtype=np.uint8)


@pytest.mark.parametrize("bits", [24, 32])
def test_a_masked_zero_update_passes_as_random_bytes(bits: int) -> None:
    """Chi-square over byte values, and serial correlation at lags from one byte to a chunk: within five standard deviations."""
    data = uploads_of_zero(bits, "zero")
    counts = np.bincount(data, minlength=256)
    chi_square = float(((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    centred = data.astype(np.float64) - data.mean()
    word = bits // 8
    for lag in (1, word, 16, 4 * 2**16, word * CHUNK_WORDS, word * CHUNK_WORDS * 3 // 4):
        correlation = float((centred[:-lag] * centred[lag:]).mean() / centred.var())
        assert abs(correlation) < 5 / math.sqrt(len(data) - lag), lag


@pytest.mark.parametrize("bits", [24, 32])
def test_two_uploads_of_one_update_share_nothing(bits: int) -> None:
    first, second = uploads_of_zero(bits, "one"), uploads_of_zero(bits, "two")
    equal = float((first == second).mean())
    assert abs(equal - 1 / 256) < 5 * math.sqrt(1 / 256 / len(first))
