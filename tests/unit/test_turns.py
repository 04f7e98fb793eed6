"""Turns of transfers: only so many fast ones at once, and no slow one in the way of another."""

from __future__ import annotations

import asyncio

from cosilo_server.services.turns import SLOW_CHUNK_S, SLOW_CHUNKS, Turns


async def test_no_more_than_so_many_hold_a_turn() -> None:
    turns, at_once, most, done = Turns(2, wait_s=30), 0, 0, 0

    async def transfer() -> None:
        nonlocal at_once, most, done
        async with turns.turn():
            at_once += 1
            most = max(most, at_once)
            for _ in range(5):
                await asyncio.sleep(0)
            at_once -= 1
            done += 1

    await asyncio.gather(*(transfer() for _ in range(9)))
    assert (most, done) == (2, 9)


async def test_a_transfer_whose_line_is_slow_lets_the_next_begin() -> None:
    turns = Turns(1, wait_s=30)
    async with turns.turn() as slow:
        for _ in range(SLOW_CHUNKS - 1):
            slow.waited(2 * SLOW_CHUNK_S)
        slow.waited(SLOW_CHUNK_S / 2)  # one in time: the count begins anew
        waiting = asyncio.create_task(_held(turns))
        await asyncio.sleep(0)
        assert not waiting.done()
        for _ in range(SLOW_CHUNKS):
            slow.waited(2 * SLOW_CHUNK_S)
        await asyncio.wait_for(waiting, 30)
        slow.waited(2 * SLOW_CHUNK_S)  # it has none any more, and gives none back
    async with turns.turn():
        second = asyncio.create_task(_held(turns))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        second.cancel()


async def test_nobody_waits_longer_than_the_patience() -> None:
    turns = Turns(1, wait_s=0.01)
    async with turns.turn():
        await asyncio.wait_for(_held(turns), 30)
    await asyncio.wait_for(_held(turns), 30)  # the one that had none gave none back: there is one, not two


async def _held(turns: Turns) -> None:
    async with turns.turn():
        pass
