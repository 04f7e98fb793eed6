"""Turns at full speed: how many transfers the coordinator moves at once, so that its memory is the same for 3 sites and for 30.

Owns the queue of transfers that have not begun. Must not know what is transferred. A stream costs memory only while it is faster than the
coordinator (its window, 4 MiB, is full), so only such streams take turns: one that waits for its line gives its turn back, and nobody waits
for one longer than TURN_WAIT_S. A slow site never holds up another, and thirty fast ones take no more memory than TURNS_MAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from cosilo_common.allocation import give_back

TURNS_MAX: Final = 3  # saturate two cores; each costs up to a window and three chunks
TURN_WAIT_S: Final = 12.0  # below a site's patience for an answer, 20 s
SLOW_CHUNK_S: Final = 0.1  # 10 MB/s: a line below it is what limits the stream
TIDY_S: Final = 0.25  # some milliseconds each: not after every small file
SLOW_CHUNKS: Final = 8  # one after the other: a busy machine pauses now and then


class Turns:
    """The turns of one direction. count: how many at once; wait_s: for a turn, then it goes on without one."""

    def __init__(self, count: int = TURNS_MAX, wait_s: float = TURN_WAIT_S) -> None:
        self._free = asyncio.Semaphore(count)
        self._wait_s = wait_s
        self._tidied = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Waits for a turn and holds it to the end of the block, or until the transfer proves slow."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            yield Turn(None)
            return
        turn = Turn(self._free)
        try:
            yield turn
        finally:
            turn.give_back()
            self._tidy()

    def _tidy(self) -> None:
        """Gives back what the chunks of a transfer left free between smaller things; without it the heap grows with every thirty uploads."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._tidied >= TIDY_S:
            self._tidied = loop.time()
            loop.run_in_executor(None, give_back)


class Turn:
    """One transfer's turn."""

    def __init__(self, free: asyncio.Semaphore | None) -> None:
        self._free = free
        self._slow = 0

    def waited(self, seconds: float) -> None:
        """Notes how long the other side kept a chunk waiting; gives the turn back where it is the line that is slow."""
        self._slow = self._slow + 1 if seconds > SLOW_CHUNK_S else 0
        if self._slow >= SLOW_CHUNKS:
            self.give_back()

    def give_back(self) -> None:
        """Lets the next transfer begin."""
        if self._free is not None:
            self._free.release()
            self._free = None
