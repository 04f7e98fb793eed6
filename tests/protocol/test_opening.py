"""The coordinator's half: what it takes, what it refuses and by which rule, and that it opens the sum and nothing else."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg.masks import CHUNK_WORDS
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_server.early_sum import EarlySum
from cosilo_server.secagg import (
    SumOpening,
    reconstruct,
    verify_advert,
    verify_consent,
    verify_reveal,
    verify_shares,
    verify_upload,
)
from tests.vectors.play import LOSS_MAX, Play, exact_sum, reader, small_encoding


def opened_values(play: Play, workers: int = 2, masked: bool = True) -> tuple[np.ndarray, SumOpening]:
    keys = reconstruct(play.roster, play.survivors, play.share_bodies, play.reveals())
    uploads = play.uploads if masked else {name: play.wire(play.plain_words(name)) for name in play.survivors}
    opening = SumOpening(
        play.encoding,
        {name: reader(data) for name, data in uploads.items()},
        {name: sha256(data) for name, data in uploads.items()},
        keys.masks if masked else (),
        workers,
    )
    values = np.zeros(play.encoding.size, dtype=np.uint32)
    for start, words in opening:
        values[start : start + len(words)] = words
    return values, opening


def test_a_whole_attempt_message_by_message() -> None:
    names = ("bank", "clinic", "depot", "east", "farm")
    play = Play(names, f=1, encoding=small_encoding(32, 5), dropped=("depot",))
    for name in names:
        verify_advert(play.adverts[name], play.terms)
        verify_shares(play.shares[name], play.roster)
        play.held(name)  # every recipient can open what every dealer sealed
    for name in play.survivors:
        verify_upload(play.statement(name), play.roster)
        verify_consent(play.consent(name), play.roster, play.survivors)
        verify_reveal(play.reveal(name), play.roster, play.survivors, play.share_bodies)
    assert play.terms.threshold == 4
    values, opening = opened_values(play)
    assert values.tolist() == exact_sum(play)[:300].tolist()
    assert opening.tail.contributors == 4
    assert opening.tail.total_weight == 64 + 32 + 16 + 12
    assert opening.tail.losses[0] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_sum_over_three_chunks_is_exact(bits: int, workers: int) -> None:
    size = 2 * CHUNK_WORDS + 12345
    encoding = Encoding(bits, 4, 100, (Section(CHUNK_WORDS + 7, 0.25), Section(size - CHUNK_WORDS - 7, 0.1)), LOSS_MAX, 2)
    play = Play(("a", "b", "c", "d"), f=1, encoding=encoding, dropped=("b",))
    values, _ = opened_values(play, workers)
    np.testing.assert_array_equal(values, exact_sum(play)[:size])


@pytest.mark.parametrize("bits", [24, 32])
def test_a_tail_that_straddles_two_chunks(bits: int) -> None:
    encoding = Encoding(bits, 3, 100, (Section(CHUNK_WORDS - 10, 0.25),), LOSS_MAX, 2)
    play = Play(("a", "b", "c"), f=1, encoding=encoding)
    values, opening = opened_values(play)
    np.testing.assert_array_equal(values, exact_sum(play)[: encoding.size])
    assert opening.tail == opening.provisional_tail()


@settings(max_examples=25, deadline=None)
@given(
    sites=st.integers(3, 12),
    bits=st.sampled_from([24, 32]),
    size=st.integers(1, 40),
    drops=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**32),
)
def test_any_federation_opens_its_survivors_exact_sum(sites: int, bits: int, size: int, drops: object, seed: int) -> None:
    f = max(1, sites // 3)
    names = tuple(f"site-{index:02}" for index in range(sites))
    threshold = (sites + f) // 2 + 1
    count = drops.randint(0, sites - threshold)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    dropped = tuple(drops.sample(names, count))  # type: ignore[attr-defined]  # the same
    generator = np.random.default_rng(seed)
    weights = {name: int(generator.integers(1, 65)) for name in names}
    play = Play(
        names,
        f=f,
        encoding=small_encoding(bits, sites, size),
        dropped=dropped,
        seed=str(seed),
        weights=weights,
        values=lambda rank, d: (generator.standard_normal(d) * 0.3).astype(np.float32),
    )
    values, opening = opened_values(play)
    assert values.tolist() == exact_sum(play)[:size].tolist()
    assert opening.tail.total_weight == sum(weights[name] for name in play.survivors)


def test_masked_and_plain_open_to_the_same_words() -> None:
    play = Play(("a", "b", "c", "d"), f=1, encoding=small_encoding(32, 4), dropped=("a",))
    masked, first = opened_values(play)
    plain, second = opened_values(play, masked=False)
    assert masked.tolist() == plain.tolist()
    assert first.tail == second.tail


def test_a_rehearsal_opens_to_zero() -> None:
    play = Play(("a", "b", "c"), f=1, encoding=small_encoding(24, 3), kind=RoundKind.REHEARSAL)
    values, opening = opened_values(play)
    assert not values.any()
    assert (opening.tail.total_weight, opening.tail.losses, opening.tail.clip_ratio) == (3, (0.0, 0.0), 0.0)


def test_a_statistics_round_is_its_tail() -> None:
    encoding = Encoding(32, 3, 64, (), LOSS_MAX, 2)
    play = Play(("a", "b", "c"), f=1, encoding=encoding, kind=RoundKind.STATISTICS)
    values, opening = opened_values(play)
    assert len(values) == 0
    assert opening.tail.losses == pytest.approx((0.25, 1.5), abs=1e-5)


def test_too_few_reveals_open_nothing() -> None:
    play = Play(("a", "b", "c", "d"), f=1, encoding=small_encoding(32, 4))
    reveals = dict(list(play.reveals().items())[:2])
    with pytest.raises(ProtocolViolation) as refused:
        reconstruct(play.roster, play.survivors, play.share_bodies, reveals)
    assert refused.value.rule == "phase-6"


def test_a_changed_byte_is_found_by_its_digest_though_the_zeros_are_zero() -> None:
    """Attack: a corrupt chunk that the zeros cannot see."""
    play = Play(("a", "b", "c", "d"), f=1, encoding=small_encoding(32, 4))
    keys = reconstruct(play.roster, play.survivors, play.share_bodies, play.reveals())
    changed = bytearray(play.uploads["b"])
    changed[5] ^= 1
    sources = {name: reader(bytes(changed) if name == "b" else data) for name, data in play.uploads.items()}
    opening = SumOpening(play.encoding, sources, {name: sha256(data) for name, data in play.uploads.items()}, keys.masks)
    with pytest.raises(ProtocolViolation, match="upload of b") as refused:
        list(opening)
    assert refused.value.rule == "phase-6"
    with pytest.raises(RuntimeError, match="not verified"):
        _ = opening.tail


def test_a_sum_of_other_survivors_is_refused() -> None:
    play = Play(("a", "b", "c", "d"), f=1, encoding=small_encoding(32, 4))
    keys = reconstruct(play.roster, play.survivors, play.share_bodies, play.reveals())
    uploads = {name: data for name, data in play.uploads.items() if name != "d"}
    opening = SumOpening(
        play.encoding,
        {name: reader(data) for name, data in uploads.items()},
        {name: sha256(data) for name, data in uploads.items()},
        keys.masks,
    )
    with pytest.raises(ProtocolViolation, match="zeros") as refused:
        list(opening)
    assert refused.value.rule == "phase-6"


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("before", [("a",), ("a", "d"), ("a", "c", "d", "e")])
def test_what_was_summed_early_opens_to_the_same(tmp_path: Path, bits: int, before: tuple[str, ...]) -> None:
    size = CHUNK_WORDS + 12345
    play = Play(("a", "b", "c", "d", "e"), f=1, encoding=Encoding(bits, 5, 100, (Section(size, 0.25),), LOSS_MAX, 2), dropped=("b",))
    keys = reconstruct(play.roster, play.survivors, play.share_bodies, play.reveals())
    early = EarlySum(tmp_path / ".sum", play.encoding.length, bits)
    for name in before:
        early.add(name, reader(play.uploads[name]), sha256(play.uploads[name]))
    rest = {name: data for name, data in play.uploads.items() if name not in before}
    opening = SumOpening(
        play.encoding,
        {name: reader(data) for name, data in rest.items()},
        {name: sha256(data) for name, data in rest.items()},
        keys.masks,
        2,
        early,
    )
    values = np.zeros(size, dtype=np.uint32)
    with early:
        total = opening.provisional_tail().total_weight
        for start, words in opening:
            values[start : start + len(words)] = words
    np.testing.assert_array_equal(values, exact_sum(play)[:size])
    assert (opening.tail.contributors, opening.tail.total_weight) == (4, total)
    with pytest.raises(RuntimeError, match="once"):
        list(opening)


def test_a_site_is_in_the_early_sum_or_beside_it(tmp_path: Path) -> None:
    play = Play(("a", "b", "c"), f=1, encoding=small_encoding(32, 3))
    early = EarlySum(tmp_path / ".sum", play.encoding.length, 32)
    early.add("a", reader(play.uploads["a"]), sha256(play.uploads["a"]))
    sources = {name: reader(data) for name, data in play.uploads.items()}
    with pytest.raises(ValueError, match="not in the early sum"):
        SumOpening(play.encoding, sources, {name: sha256(data) for name, data in play.uploads.items()}, (), 2, early)


def test_a_short_upload_stops_the_opening() -> None:
    play = Play(("a", "b", "c"), f=1, encoding=small_encoding(32, 3))
    uploads = {name: data[:-1] if name == "c" else data for name, data in play.uploads.items()}
    opening = SumOpening(
        play.encoding,
        {name: reader(data) for name, data in uploads.items()},
        {name: sha256(data) for name, data in uploads.items()},
    )
    with pytest.raises(EOFError):
        list(opening)


def test_an_opening_is_iterated_once() -> None:
    play = Play(("a", "b", "c"), f=1, encoding=small_encoding(32, 3))
    _, opening = opened_values(play)
    with pytest.raises(RuntimeError, match="once"):
        list(opening)


def test_no_secret_shows_in_what_the_coordinator_holds() -> None:
    play = Play(("a", "b", "c", "d"), f=1, encoding=small_encoding(32, 4), dropped=("d",))
    reveals = play.reveals()
    keys = reconstruct(play.roster, play.survivors, play.share_bodies, reveals)
    text = repr(keys) + repr(reveals) + repr(play.sites["a"].b) + f"{play.sites['a'].b}"
    for mask in keys.masks:
        assert mask.mask.seed.reveal().hex() not in text
        assert repr(mask.mask.seed.reveal()) not in text
    assert repr(next(iter(reveals["a"].b_shares.values()))) not in text


def test_stopping_early_ends_the_threads_and_verifies_nothing() -> None:
    encoding = Encoding(32, 3, 64, (Section(6 * CHUNK_WORDS, 0.2),), LOSS_MAX, 2)
    play = Play(("a", "b", "c"), f=1, encoding=encoding, kind=RoundKind.REHEARSAL)
    words = play.wire(play.plain_words("a"))
    opening = SumOpening(encoding, {"a": reader(words)}, {"a": sha256(words)})
    chunks = iter(opening)
    next(chunks)
    chunks.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "chunk-lane"]
    with pytest.raises(RuntimeError, match="not verified"):
        _ = opening.tail


def test_control_traffic_of_a_site_stays_small() -> None:
    """What ten sites with one dropped send and receive besides the update itself, in bytes, for names of seven letters."""
    names = tuple(f"site-{index:02}" for index in range(10))
    play = Play(names, f=3, encoding=small_encoding(32, 10), dropped=("site-04",))
    size = {
        "advert": len(play.adverts["site-01"].encode()),
        "shares": len(play.shares["site-01"].encode()),
        "upload": len(play.statement("site-01").encode()),
        "consent": len(play.consent("site-01").encode()),
        "reveal": len(play.reveal("site-01").encode()),
    }
    assert size == {"advert": 306, "shares": 2122, "upload": 201, "consent": 329, "reveal": 780}
    sent = sum(size.values())
    received = 10 * size["advert"] + 10 * size["shares"] + play.terms.threshold * size["consent"]
    assert (sent, received) == (3738, 26583)


def test_an_opening_leaves_no_buffer_behind_even_without_the_collector() -> None:
    """A finished lane once held its buffers in a cycle through a traceback: 4 MB a round until the collector came by."""
    play = Play(("a", "b", "c"), f=1, encoding=small_encoding(32, 3))
    _, warm = opened_values(play)
    assert warm.tail.contributors == 3
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            opened_values(play)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert peak > 4 << 20  # four chunk buffers: this would see them
    assert left < 1 << 20
