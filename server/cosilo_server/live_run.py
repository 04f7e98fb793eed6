"""A run as the conductor has it in memory: what is not in the store, and what may be asked of it.

Must not know the store, the event loop's tasks, or who is told. No I/O, no clock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import RoundOutcome
from cosilo_server.rounds.state import Round
from cosilo_server.store import Pause, StoredCheckpoint


@dataclass
class LiveRun:
    """A run with what is not in the store: its newest round, and why nothing moves."""

    run: bytes
    manifest: Manifest
    round: Round | None = None
    not_before: float = 0.0
    note: str = ""
    paused: Pause | None = None  # no round starts
    opened: tuple[RoundOutcome, StoredCheckpoint | None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    orders: int = 0  # given in this process
    orders_done: int = -1  # how many had been given when none was found open; -1 while one may be
    reached: dict[str, int] = field(default_factory=dict)  # rounds that sites have begun and this store has not: it is a restored one

    @property
    def begun(self) -> int:
        """The newest round that was begun here; 0 before the first."""
        return self.round.number if self.round else 0

    @property
    def floor(self) -> int:
        """The highest round that is over for good: begun here, or at more sites, by their word, than may lie."""
        claims = sorted(self.reached.values(), reverse=True)
        f = self.manifest.f
        return max(self.begun, claims[f] if len(claims) > f else 0)

    @property
    def standstill(self) -> str:
        """Why the run does not move, where it does not."""
        return self.note if self.paused is None else self.paused.words

    def under_way(self) -> Round | None:
        """The round in progress."""
        return None if self.round is None or self.round.ended else self.round

    def waits_for(self, site: str) -> bool:
        """Whether the site takes part in the round in progress."""
        state = self.under_way()
        return state is not None and site in state.sites

    def note_reached(self, site: str, reached: int) -> bool:
        """Takes a site's word that it has begun rounds which are not known here; whether that raised the floor. No one site can raise it."""
        if self.round is None or reached <= self.round.number or site not in self.round.sites:
            return False
        before = self.floor
        self.reached[site] = reached
        return self.floor > before

    def first_of(self, kind: RoundKind, rounds: int) -> int:
        """The number of the first of so many rounds that are asked for now.

        Raises CosiloError where the manifest allows no such rounds, or no more of them, or the run is paused.
        """
        if self.paused is not None:
            raise CosiloError(
                "start rounds",
                f"run {self.manifest.name} is {self.paused.words}",
                f"let it go on: cosilo run resume {self.run.hex()[:12]}",
            )
        if self.floor + rounds > self.manifest.rounds_max:
            raise CosiloError(
                "start rounds",
                f"run {self.manifest.name} allows {self.manifest.rounds_max} rounds and has had {self.floor}; {rounds} more were asked for",
                "ask for fewer, or create a run with a higher rounds_max",
            )
        if kind is RoundKind.MOMENTS and self.manifest.evaluation is None:
            raise CosiloError(
                "start rounds",
                f"run {self.manifest.name} names no extractor, so it has no moments rounds",
                "create a run whose file has an [evaluation] table",
            )
        return self.floor + 1
