"""Rounds at b = 24 through the conductor, the closer and the store: what one round's sum moved decides the next one's clips."""

from __future__ import annotations

import numpy as np

from cosilo_common.clip_ranges import HEADROOM
from cosilo_common.secagg.messages import RoundKind
from tests.integration.conducted_run import CAP, CLIP, World, world

__all__ = ["world"]

BIAS, WEIGHT = slice(0, 4), slice(4, 16)


async def test_the_last_aggregate_decides_the_next_clips_also_after_a_restart(world: World) -> None:
    first = await world.encoding(RoundKind.TRAIN)
    assert [section.clip for section in first.sections] == [CLIP, CLIP]
    updates = [np.linspace(-0.01 * scale, 0.01, 16, dtype=np.float32) for scale in (1, 2, 3)]
    for update in updates:
        update[BIAS] = 0
    await world.close(first, updates)
    moved = world.weights()
    peaks = (0.0, float(np.abs(moved[WEIGHT]).max()))
    assert world.outcome().tensor_peaks == peaks
    assert 0.005 < peaks[1] < 0.02

    await world.restart()
    second = await world.encoding(RoundKind.TRAIN)
    assert [section.clip for section in second.sections] == [CLIP, HEADROOM * peaks[1]]  # what did not move may move yet
    await world.close(second, updates)
    mean = np.mean(updates, axis=0)
    error = np.abs(world.weights() - moved - mean)[WEIGHT].max()
    assert error <= second.error_bound(HEADROOM * peaks[1], 3, 3 * CAP) + 2 * np.spacing(np.float32(0.05))
    assert error < first.error_bound(CLIP, 3, 3 * CAP) / 4
    assert world.outcome().clip_ratio == 0


async def test_other_kinds_of_rounds_move_no_clip(world: World) -> None:
    await world.close(await world.encoding(RoundKind.TRAIN), [np.full(16, 0.01, np.float32)] * 3)
    peaks = world.outcome().tensor_peaks
    clips = [HEADROOM * peak for peak in peaks]
    statistics = await world.encoding(RoundKind.STATISTICS)
    assert statistics.sections == ()
    await world.close(statistics, [np.empty(0, np.float32)] * 3)
    assert world.outcome().tensor_peaks == ()
    assert [section.clip for section in (await world.encoding(RoundKind.REHEARSAL)).sections] == clips
