"""A board that says what no federation says in an hour: the longest names, hostile words, expired certificates, a hundred rounds.

Serves the real page over it, in a thread. Must not know a browser.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from cosilo_server.page.app import page_app
from cosilo_server.page.board import GridLine, History, RoundLine, RunLine, Standing
from cosilo_server.page.feed import Feed
from cosilo_server.page.server import PagePort

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>' & \"quoted\""
LONG_SITE = "university-hospital-of-a-town-with-a-very-long-name-and-number-1"[:63]
DAY_S = 86400
PHASES = ["gathering", "training", "sharing", "uploading", "consenting", "revealing", "opening", "closed"]


class Extremes:
    """Stands in for the board. began: UTC seconds."""

    def __init__(self) -> None:
        self._now = time.time()

    def standing(self) -> Standing:
        """Six sites, one of each kind."""
        now = self._now
        sites = [
            (LONG_SITE, True, now, now + 80 * DAY_S),
            ("b", False, now - 3700, now + 20 * DAY_S + 60),
            (HOSTILE, False, None, None),
            ("lakeview", True, now, now + 3 * DAY_S + 60),
            ("northgate", False, now - 9 * DAY_S, now - DAY_S),
            ("riverside", True, now, now + 60 * DAY_S),
        ]
        return {
            "federation": HOSTILE,
            "members_version": 7,
            "disk_free_bytes": 3 << 20,
            "disk_free_bytes_min": 256 << 20,
            "certificate_expires_unix_s": int(now + 6 * DAY_S + 60),
            "sites": [
                {
                    "site": name,
                    "connected": connected,
                    "last_seen_unix_s": seen,
                    "certificate_expires_unix_s": int(ends) if ends else None,
                }
                for name, connected, seen, ends in sites
            ],
            "runs": [
                self._run("ab" * 32, HOSTILE, "running", self._live()),
                self._run("cd" * 32, "failing", "waiting", self._failed(), masked=False),
            ],
            "runs_left_out": 3,
        }

    def history(self, run: str) -> History | None:
        """A hundred rounds."""
        rounds = [
            self._round(
                number,
                "abandoned" if number % 17 == 0 else "closed",
                reason=HOSTILE if number % 17 == 0 else "",
                heldout=None if number % 17 == 0 else 0.2 + math.exp(-number / 20),
                train=None if number % 17 == 0 or number % 10 == 0 else 0.22 + math.exp(-number / 18),
                note="the opened sum of 636657 values is exactly zero" if number == 99 else "",
            )
            for number in range(1, 101)
        ]
        grids: list[GridLine] = [{"round": number, "digest": f"{number:064x}", "drawn_unix_s": self._now} for number in range(1, 4)]
        return {"run": run, "rounds": rounds, "grids": grids}

    def grid(self, digest: str) -> Path | None:
        """None is there."""
        return None

    def _run(self, run: str, name: str, state: str, current: RoundLine, masked: bool = True) -> RunLine:
        return {
            "run": run,
            "name": name,
            "state": state,
            "note": f"round {current['round']} was abandoned: {current['reason']}" if current["reason"] else "",
            "rounds_closed": 94,
            "rounds_wanted": 120,
            "masked": masked,
            "aggregation": "cosilo-secagg/1" if masked else "insecure-plain-sum",
            "parameters": 35746307,
            "participants": [LONG_SITE, "b", "c"],
            "phases": PHASES if masked else ["gathering", "training", "uploading", "opening", "closed"],
            "grids": 3,
            "current": current,
        }

    def _live(self) -> RoundLine:
        sites: list[tuple[str, dict[str, Any]]] = [
            (LONG_SITE, {"activity": "uploading", "tenths": 7, "bytes": 123_456_789}),
            ("b", {"connected": False, "activity": "uploading", "tenths": 3, "bytes": 45_678}),
            (HOSTILE, {"declined": "not accepted"}),
            ("lakeview", {"delivered": True, "activity": "waiting", "tenths": 10, "bytes": 143_000_000}),
            ("northgate", {"late": True}),
            ("riverside", {"activity": "waiting"}),
        ]
        plain = {"connected": True, "activity": "idle", "tenths": 0, "bytes": 0, "delivered": False, "declined": None, "late": False}
        return self._round(101, "uploading", sites=[{"site": name, **plain, **what} for name, what in sites], attempt=2)

    def _failed(self) -> RoundLine:
        return self._round(12, "abandoned", reason=f"1 sites uploaded and 3 are needed {HOSTILE}", failed_in="uploading")

    def _round(self, number: int, phase: str, **changes: Any) -> RoundLine:
        line: RoundLine = {
            "round": number,
            "kind": "statistics" if number % 10 == 0 else "train",
            "phase": phase,
            "failed_in": None,
            "reason": "",
            "note": "",
            "started_unix_s": self._now - 200,
            "seconds": None if phase == "uploading" else 75.5,
            "attempt": 1,
            "invited": 6,
            "survivors": 0 if phase == "abandoned" else 5,
            "bytes_down": 1_234_567_890,
            "bytes_up": 987_654_321,
            "heldout": None,
            "train": None,
            "sites": [],
        }
        return {**line, **changes}  # type: ignore[typeddict-item]  # changes are RoundLine's own


class _Still:
    """Stands in for the conductor: nothing ever moves."""

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[asyncio.Event]:
        yield asyncio.Event()

    def announce(self) -> None:
        """Nobody is told."""


@contextmanager
def served(board: Any) -> Iterator[str]:
    """The page over a board; gives its address, "host:port"."""
    port, loop, over = PagePort("127.0.0.1:0"), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        feed = Feed(_Still(), board.standing)  # type: ignore[arg-type]  # as much of a conductor as the feed needs
        port.serve(page_app(board, feed), feed)
        await over.wait()
        await port.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    try:
        yield port.address
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(20)
        loop.close()
