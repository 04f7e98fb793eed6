"""Rounds whose sum is begun before the last upload is in, through the conductor, the closer and the spool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cosilo_common.encoding import Encoding
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import EARLY_SUM
from cosilo_server.rounds.state import Phase
from tests.integration.conducted_run import SITES, World, world

__all__ = ["world"]

UPDATES = {name: np.linspace(-0.01 * scale, 0.01, 16, dtype=np.float32) for scale, name in enumerate(SITES, 1)}
MEAN = np.mean(list(UPDATES.values()), axis=0)


async def adverted(world: World) -> Encoding:
    encoding = await world.encoding(RoundKind.TRAIN)
    await world.advert()
    return encoding


async def upload(world: World, encoding: Encoding, name: str) -> Path:
    return await world.upload(encoding, name, UPDATES[name])


async def summed(world: World, names: tuple[str, ...]) -> None:
    """Until these uploads are in the early sum."""
    async with asyncio.timeout(20):
        while (early := world.closer._early.get(world.run, (0, 0, None))[2]) is None or set(early.digests) != set(names):
            await asyncio.sleep(0.01)


def expect_mean(world: World, encoding: Encoding) -> None:
    bound = encoding.error_bound(0.5, 3, 3 * 64) + 2 * np.spacing(np.float32(0.05))
    assert np.abs(world.weights() - MEAN).max() <= bound


async def let_go(world: World) -> None:
    """Until nothing is held for a round that is over: no sum in memory, no descriptor of its file."""
    async with asyncio.timeout(20):
        while world.closer._early or any(EARLY_SUM in name for name in opened_files()):
            await asyncio.sleep(0.01)


def opened_files() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            yield str(descriptor.readlink())


async def test_what_is_summed_is_not_read_again(world: World) -> None:
    encoding = await adverted(world)
    paths = [await upload(world, encoding, name) for name in SITES[:2]]
    await summed(world, SITES[:2])
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))  # as a mutant would: whoever reads them again opens another sum
    await upload(world, encoding, SITES[2])
    await world.until(Phase.CLOSED)
    expect_mean(world, encoding)
    await let_go(world)


async def test_a_restart_begins_without_it_and_opens_from_the_uploads(world: World) -> None:
    encoding = await adverted(world)
    paths = [await upload(world, encoding, name) for name in SITES[:2]]
    await summed(world, SITES[:2])
    early = paths[0].parent / EARLY_SUM
    early.write_bytes(bytes(early.stat().st_size))
    await world.restart()
    await upload(world, encoding, SITES[2])
    await world.until(Phase.CLOSED)
    expect_mean(world, encoding)


async def test_a_sum_that_changed_on_the_disk_abandons_the_round(world: World) -> None:
    encoding = await adverted(world)
    paths = [await upload(world, encoding, name) for name in SITES[:2]]
    await summed(world, SITES[:2])
    early = paths[0].parent / EARLY_SUM
    early.write_bytes(bytes(early.stat().st_size))
    await upload(world, encoding, SITES[2])
    with pytest.raises(AssertionError):
        await world.until(Phase.CLOSED)
    assert "changed on the disk" in world.state.reason
    await let_go(world)


async def test_nothing_is_held_for_a_round_that_was_abandoned(world: World) -> None:
    encoding = await adverted(world)
    for name in SITES[:2]:
        await upload(world, encoding, name)
    await summed(world, SITES[:2])
    await world.conductor.stop_run(world.run, abandon=True)
    assert world.state.phase is Phase.ABANDONED
    await let_go(world)


async def test_a_sum_that_cannot_be_made_costs_nothing(world: World) -> None:
    encoding = await adverted(world)
    first = world.spool.path(world.run.hex(), world.state.number, SITES[0])
    (first.parent / EARLY_SUM).mkdir(parents=True)  # in the way
    for name in SITES:
        await upload(world, encoding, name)
    await world.until(Phase.CLOSED)
    expect_mean(world, encoding)


async def test_an_upload_that_comes_to_be_summed_after_the_opening_began_is_left_alone(world: World) -> None:
    encoding = await adverted(world)
    for name in SITES[:2]:
        await upload(world, encoding, name)
    await summed(world, SITES[:2])
    state = replace(world.state, survivors=SITES[:2])
    taken = world.closer._summed_early(state)
    assert taken is not None and set(taken.digests) == set(SITES[:2])
    early = world.spool.path(world.run.hex(), state.number, SITES[0]).parent / EARLY_SUM
    before = early.read_bytes()
    world.closer.sum_early(state, SITES[1])
    assert early.read_bytes() == before
    assert world.closer._summed_early(state) is None
