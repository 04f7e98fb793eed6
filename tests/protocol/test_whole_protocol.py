"""The whole protocol in memory: the opened sum is the exact integer sum of the survivors, or the round is abandoned.

Real site roles over real journals, the coordinator's real half; sites drop, crash and come back at every phase.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosilo_client.journal import TrainedUpdate
from cosilo_client.ledger import RoundState
from cosilo_common.encoding import Encoding
from cosilo_common.secagg.masks import CHUNK_WORDS
from cosilo_common.secagg.messages import RoundKind, Upload, threshold
from tests.protocol.parties import (
    CAP,
    CLIP,
    Abandoned,
    Coordinator,
    Opened,
    Phases,
    Site,
    close_all,
    federation,
    make_start,
    make_terms,
    names,
    open_sum,
    some_update,
)

FAST_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a journal syncs often; the disk's speed is no part of this


def exact_sum(coordinator: Coordinator, survivors: tuple[str, ...]) -> np.ndarray:
    """Python's own integers, word by word, modulo 2^b."""
    bits = coordinator.start.encoding.bits
    total = sum(coordinator.plain[name].astype(object) for name in survivors)
    return np.array([int(word) % (1 << bits) for word in total], dtype=np.uint64)


def check_opened(coordinator: Coordinator, opened: Opened, weights: dict[str, int]) -> None:
    encoding = coordinator.start.encoding
    expected = exact_sum(coordinator, opened.survivors)
    assert np.array_equal(opened.words.astype(np.uint64), expected[: encoding.size])
    assert opened.tail.total_weight == sum(weights[name] for name in opened.survivors)
    assert opened.tail.contributors == len(opened.survivors)


@given(
    n=st.integers(3, 12),
    bits=st.sampled_from([32, 24]),
    seed=st.integers(0, 2**32 - 1),
    drop_share=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    crash_share=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_sum_is_exact_or_the_round_is_abandoned(n: int, bits: int, seed: int, drop_share: float, crash_share: float) -> None:
    draw = np.random.default_rng(seed)
    terms = make_terms(names(n), 40, bits=bits)
    start = make_start(terms)
    updates = {name: some_update(40, seed + i) for i, name in enumerate(names(n))}
    drops = {name: str(draw.choice(Phases)) for name in names(n) if draw.random() < drop_share}

    def crash(site: Site, phase: str) -> None:
        if draw.random() < crash_share:
            site.restart()

    with tempfile.TemporaryDirectory(dir=FAST_FOLDER) as folder:
        sites = federation(Path(folder), terms, start, updates)
        coordinator = Coordinator(terms, start, sites, drops, crash)
        quorum = max(threshold(n, terms.f), 3)
        try:
            opened = coordinator.run()
        except Abandoned as abandoned:
            # every phase's survivors are those who drop later; one of the phases must have fallen short of the quorum
            answering = {phase: n - sum(Phases.index(d) <= i for d in drops.values()) for i, phase in enumerate(Phases)}
            short = {"phase-2": "shares", "phase-5": "consent", "phase-6": "reveal"}[abandoned.reason]
            assert answering[short] < quorum
            close_all(sites, RoundState.ABANDONED, abandoned.reason)
        else:
            assert len(opened.survivors) >= quorum
            assert not any(drops.get(name) in ("advert", "shares", "upload") for name in opened.survivors)
            check_opened(coordinator, opened, {name: weight for name, (_, weight) in updates.items()})
            close_all(sites)
        for site in sites.values():
            assert not list((site.folder / "rounds").iterdir())
            site.close()


@pytest.mark.parametrize("bits", [32, 24])
@pytest.mark.parametrize("dropped", [0, 1])
def test_vectors_over_three_chunks_open_exactly(tmp_path: Path, bits: int, dropped: int) -> None:
    values = 2 * CHUNK_WORDS + 12_345
    terms = make_terms(names(4), values, bits=bits)
    start = make_start(terms)
    updates = {name: some_update(values, i) for i, name in enumerate(names(4))}
    sites = federation(tmp_path, terms, start, updates)
    coordinator = Coordinator(terms, start, sites, {"site-02": "upload"} if dropped else {})
    opened = coordinator.run()
    assert len(opened.survivors) == 4 - dropped
    bits_mask = np.uint32((1 << bits) - 1)
    total = np.zeros(values, dtype=np.uint32)
    for name in opened.survivors:
        np.add(total, coordinator.plain[name][:values], out=total)
    assert np.array_equal(opened.words, total & bits_mask)
    for site in sites.values():
        site.close()


def test_the_integers_are_the_encoding_s_formula_at_32_bits(tmp_path: Path) -> None:
    """Encoding: q = round half even((W / cap) clip(x) Q / c), worked out here once more without the library."""
    terms = make_terms(names(3), 5)
    start = make_start(terms)
    x = np.array([0.0, 0.25, -0.75, 3.0, -3.0], dtype=np.float32)
    sites = federation(tmp_path, terms, start, dict.fromkeys(names(3), (x, 48)))
    coordinator = Coordinator(terms, start, sites)
    coordinator.run()
    largest = (2**31 - 1) // 3
    q = [round(48 / CAP * max(-CLIP, min(CLIP, float(value))) * largest / CLIP) for value in x]
    assert coordinator.plain["site-01"][:5].tolist() == [value % 2**32 for value in q]
    for site in sites.values():
        site.close()


def test_a_plain_sum_gives_the_same_words_as_a_secure_one(tmp_path: Path) -> None:
    """insecure-plain-sum: the same role, the same integers, no masks; both modes open to the same values bit for bit."""
    opened = {}
    for secure in (True, False):
        terms = make_terms(names(4), 200, secure=secure)
        start = make_start(terms)
        sites = federation(tmp_path / str(secure), terms, start)
        if secure:
            opened[secure] = Coordinator(terms, start, sites).run()
        else:
            adverts = {name: site.role.advert(1) for name, site in sites.items()}
            statements = {name: site.role.mask_chunks() for name, site in sites.items()}
            assert all(len(advert.body) < 120 for advert in adverts.values())  # no keys in it
            digests = {name: Upload.decode(message.body).digest for name, message in statements.items()}
            opened[secure] = open_sum(start.encoding, {n: s.spool_bytes() for n, s in sites.items()}, digests)
        close_all(sites)
        for site in sites.values():
            site.close()
    assert np.array_equal(opened[True].words, opened[False].words)
    assert opened[True].tail.total_weight == opened[False].tail.total_weight


def test_a_rehearsal_sums_to_zero(tmp_path: Path) -> None:
    terms = make_terms(names(4), 300)
    start = make_start(terms, kind=RoundKind.REHEARSAL)
    sites = federation(tmp_path, terms, start)
    opened = Coordinator(terms, start, sites, {"site-03": "upload"}).run()
    assert not opened.words.any()
    assert opened.tail == type(opened.tail)(total_weight=3, losses=(0.0, 0.0), clip_ratio=0.0, contributors=3)
    for site in sites.values():
        site.close()


def test_a_statistics_round_is_its_tail(tmp_path: Path) -> None:
    terms = make_terms(names(3), 300)
    start = make_start(terms, kind=RoundKind.STATISTICS)
    encoding: Encoding = start.encoding
    assert encoding.size == 0
    sites = federation(tmp_path, terms, start)
    for weight, site in enumerate(sites.values(), 10):
        site.journal.trained(terms.run, TrainedUpdate(1, 0, weight, (4.0, 8.0), has_vector=False))
    opened = Coordinator(terms, start, sites).run()
    assert opened.tail.total_weight == 33
    assert opened.tail.losses == pytest.approx((4.0, 8.0), rel=1e-6)
    for site in sites.values():
        site.close()
