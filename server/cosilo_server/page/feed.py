"""What the page shows live: one look at the board for everybody who watches, whenever something moved.

Owns when the board is looked at, and who has seen what. While nobody watches, nothing is looked at. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from cosilo_server.conductor import Conductor
from cosilo_server.page.board import Standing

log = structlog.get_logger(__name__)

INTERVAL_S: Final = 0.5  # between looks: a person reads no faster, and each look is a few queries
LOOK_S: Final = 5.0  # the disk and the clock move without anybody saying so
HEARTBEAT_S: Final = 15.0  # proxies close streams that say nothing for a minute


class Feed:
    """The board's standing as JSON, for any number of watchers. standing: may block; it is called in a thread, one call at a time."""

    def __init__(self, conductor: Conductor, standing: Callable[[], Standing]) -> None:
        self._conductor = conductor
        self._standing = standing
        self._watchers = 0
        self._somebody = asyncio.Event()
        self._told = asyncio.Condition()
        self._version = 0
        self._last: Standing | None = None
        self._closed = False

    async def run_for_ever(self) -> None:
        """Looks at every change while somebody watches."""
        async with self._conductor.watch() as changed:
            while True:
                await self._somebody.wait()
                changed.clear()
                try:
                    await self._look()
                except Exception:  # a look that fails, on a full disk say, must not end all later ones
                    log.exception("the page could not look")
                await asyncio.sleep(INTERVAL_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await changed.wait()

    async def close(self) -> None:
        """Ends every watcher's stream."""
        self._closed = True
        async with self._told:
            self._told.notify_all()

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[str | None]]:
        """For one watcher: JSON texts, the first as soon as there is one; None where nothing happened for a heartbeat's time."""
        self._watchers += 1
        if self._watchers == 1:
            self._last = None  # it is as old as the last watcher
            self._somebody.set()
            self._conductor.announce()
        try:
            yield self._texts()
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._somebody.clear()

    async def _look(self) -> None:
        found = await asyncio.to_thread(self._standing)
        if found == self._last:
            return
        async with self._told:
            self._version, self._last = self._version + 1, found
            self._told.notify_all()

    async def _texts(self) -> AsyncIterator[str | None]:
        seen = 0
        while not self._closed:
            seen, standing = await self._later_than(seen)
            yield None if standing is None else json.dumps({"now_unix_s": time.time(), **standing})

    async def _later_than(self, seen: int) -> tuple[int, Standing | None]:
        try:
            async with asyncio.timeout(HEARTBEAT_S), self._told:
                while not self._closed and (self._last is None or self._version == seen):
                    await self._told.wait()
                return self._version, self._last
        except TimeoutError:
            return seen, None
