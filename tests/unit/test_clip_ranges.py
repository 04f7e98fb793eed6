"""A round's encoding by its manifest, and each tensor's clip by the last public aggregate: numbers, bounds, and what a site believes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_client.due_terms import checked_encoding
from cosilo_common.clip_ranges import HEADROOM, TensorPeaks, clips_after, least_clip, round_encoding, tensor_sizes
from cosilo_common.encoding import CLIP_MIN, Encoding, Section
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.weights import TensorTable
from cosilo_server.closing import RoundOutcome
from tests.integration.memory_rounds import manifest_of

CLIP = 0.5
SIZES = (4, 12)  # of the test manifest's two tensors
LOSSES = 5


def narrow(**changes: object) -> Manifest:
    """Four sites at b = 24."""
    return manifest_of(("anna", "beda", "clara", "dora"), encoding={"bits": 24, "clip": CLIP, "cap": 64}, **changes)


def wide() -> Manifest:
    """The same at b = 32."""
    return manifest_of(("anna", "beda", "clara", "dora"), encoding={"bits": 32, "clip": CLIP, "cap": 64})


def encoded(*sections: tuple[int, float], bits: int = 24, participants: int = 4, cap: int = 64, loss_max: float = 16.0) -> bytes:
    made = Encoding(bits, participants, cap, tuple(Section(size, clip) for size, clip in sections), loss_max, LOSSES)
    return made.canonical()


def test_a_clip_is_the_last_peak_with_headroom_within_its_bounds() -> None:
    peaks = (0.01, CLIP, CLIP / HEADROOM, 1e-30, 0.0)
    assert clips_after(peaks, CLIP) == (HEADROOM * 0.01, CLIP, CLIP, CLIP * 2**-20, CLIP)
    assert HEADROOM == 8


def test_the_least_clip_is_one_that_an_encoding_takes() -> None:
    assert least_clip(1.0) == 2**-20
    assert least_clip(1e-9) == CLIP_MIN
    Encoding(24, 4, 64, (Section(1, least_clip(1e-9)),), 16.0, LOSSES)


@pytest.mark.parametrize("kind", [RoundKind.TRAIN, RoundKind.REHEARSAL])
def test_at_24_bits_every_tensor_has_a_section_from_the_first_round_on(kind: RoundKind) -> None:
    assert round_encoding(narrow(), kind).sections == (Section(4, CLIP), Section(12, CLIP))
    assert round_encoding(narrow(), kind, (0.01, 0.5)).sections == (Section(4, 0.08), Section(12, CLIP))


def test_at_32_bits_there_is_one_section_and_in_a_statistics_round_none() -> None:
    assert round_encoding(wide(), RoundKind.TRAIN, (0.01, 0.5)).sections == (Section(16, CLIP),)
    assert [round_encoding(run, RoundKind.STATISTICS, (0.01, 0.5)).sections for run in (wide(), narrow())] == [(), ()]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.randoms())
def test_peaks_are_each_tensors_own_in_blocks_of_any_size_and_order(sizes: list[int], block: int, order: object) -> None:
    table = TensorTable.of([(f"t{at:02d}", (size,)) for at, size in enumerate(sizes)])
    values = np.random.default_rng(sum(sizes)).normal(size=sum(sizes)).astype(np.float32)
    peaks, starts = TensorPeaks(table), list(range(0, values.size, block))
    order.shuffle(starts)  # type: ignore[attr-defined]  # hypothesis's Random
    for start in starts:
        peaks.note(start, values[start : start + block])
    ends = np.cumsum(sizes)
    assert peaks.peaks == tuple(float(np.abs(part).max()) for part in np.split(values, ends[:-1]))
    assert tensor_sizes(table) == tuple(sizes)


def test_an_outcome_keeps_its_peaks_and_one_of_before_has_none() -> None:
    outcome = RoundOutcome(7, 3, 0.25, 0.5, (0.5,), 0.1, 1.0, "", (0.0, float(np.float32(0.1))))
    assert RoundOutcome.from_json(outcome.to_json()) == outcome
    before = '{"clip_ratio": 0.0, "contributors": 3, "heldout_loss_by_bucket": [], "total_weight": 7}'
    assert RoundOutcome.from_json(before).tensor_peaks == ()


@pytest.mark.parametrize("kind", [RoundKind.TRAIN, RoundKind.REHEARSAL])
@pytest.mark.parametrize("clips", [(CLIP, CLIP), (CLIP * 2**-20, CLIP), (0.25, 0.125)])
def test_a_site_takes_clips_within_the_manifests_bounds(kind: RoundKind, clips: tuple[float, float]) -> None:
    found = checked_encoding(narrow(), kind, encoded((4, clips[0]), (12, clips[1])))
    assert [section.clip for section in found.sections] == list(clips)


@pytest.mark.parametrize(
    "data",
    [
        encoded((4, CLIP), (12, float(np.nextafter(CLIP, 1)))),
        encoded((4, CLIP), (12, float(np.nextafter(CLIP * 2**-20, 0)))),
        encoded((12, CLIP), (4, CLIP)),  # the tensors' order
        encoded((16, CLIP)),
        encoded((4, CLIP), (6, CLIP), (6, CLIP)),
        encoded((4, CLIP)),
        encoded(),
        encoded((4, CLIP), (12, CLIP), bits=32),
        encoded((4, CLIP), (12, CLIP), participants=3),
        encoded((4, CLIP), (12, CLIP), cap=63),
        encoded((4, CLIP), (12, CLIP), loss_max=8.0),
        encoded((4, CLIP), (12, CLIP)) + b"\x00",
        b"",
    ],
)
def test_r3_a_site_takes_no_other_encoding_at_24_bits(data: bytes) -> None:
    for kind in (RoundKind.TRAIN, RoundKind.REHEARSAL):
        with pytest.raises(ProtocolViolation) as refused:
            checked_encoding(narrow(), kind, data)
        assert refused.value.rule == "R3"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (RoundKind.TRAIN, encoded((4, CLIP), (12, CLIP), bits=32)),
        (RoundKind.TRAIN, encoded((16, CLIP / 2), bits=32)),
        (RoundKind.STATISTICS, encoded((16, CLIP), bits=32)),
    ],
)
def test_r3_at_32_bits_the_coordinator_chooses_nothing(kind: RoundKind, data: bytes) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        checked_encoding(wide(), kind, data)
    assert refused.value.rule == "R3"


def test_r3_a_statistics_round_at_24_bits_has_no_values() -> None:
    assert checked_encoding(narrow(), RoundKind.STATISTICS, encoded()).sections == ()
    with pytest.raises(ProtocolViolation) as refused:
        checked_encoding(narrow(), RoundKind.STATISTICS, encoded((4, CLIP), (12, CLIP)))
    assert refused.value.rule == "R3"
