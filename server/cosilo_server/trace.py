"""Notes what takes how long in a round while it goes: phases, what each site owes and moves, the steps of opening the sum.

Owns the spans in memory, and how many there may be: no site can fill the database, however often it comes and goes. Must not decide anything: a
round that cannot be traced goes on untraced. Called on the event loop and from the thread that opens a sum; `flush` and `spans` block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import structlog
from sqlalchemy.exc import DatabaseError

from cosilo_server.rounds.events import (
    AdvertReceived,
    ConsentReceived,
    Declined,
    Event,
    Progressed,
    RevealReceived,
    SharesReceived,
    SumOpened,
    Tick,
    UploadReceived,
)
from cosilo_server.rounds.state import Activity, Phase, Round
from cosilo_server.spans import Span, Spans

log = structlog.get_logger(__name__)

COORDINATOR: Final = ""
PHASE: Final = "phase"  # lanes: where the round stood,
OPENING: Final = "opening"  # what the coordinator did to open the sum,
OWED: Final = "owed"  # from the phase's beginning until the site delivered, was late or declined,
SAYS: Final = "says"  # what the site said that it does,
TRANSFER: Final = "transfer"  # bytes between the two, and their check
FETCH: Final = "fetch"
UPLOAD: Final = "upload"
DIGEST: Final = "digest"

SPANS_PER_LANE: Final = 32  # a site's in a round: transfers that resume and attempts again; what comes after is told in one line
SPANS_TOLD: Final = 20_000  # to an admin, 2 MB: 1000 sites with 20 each

_OWED_IN: Final = {
    Phase.TRAINING: "advert",
    Phase.SHARING: "shares",
    Phase.UPLOADING: "upload",
    Phase.CONSENTING: "consent",
    Phase.REVEALING: "reveal",
}
_DELIVERIES: Final = (AdvertReceived, SharesReceived, UploadReceived, ConsentReceived, RevealReceived)
_RESTING: Final = frozenset({Activity.IDLE, Activity.WAITING})


@dataclass
class Underway:
    """A transfer that goes on. bytes: moved so far."""

    site: str
    what: str
    attempt: int
    began_at: float
    bytes: int = 0
    round: _Traced | None = None  # None once it has ended

    def span(self, ended_at: float, outcome: str) -> Span:
        """As a span."""
        return Span(self.site, TRANSFER, self.what, self.attempt, self.began_at, ended_at, self.bytes, 1, outcome)


@dataclass(eq=False)
class _Traced:
    """One round in progress."""

    ended: list[Span] = field(default_factory=list)  # not in the database yet
    underway: list[Underway] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # by party and lane, since this process began
    rest: dict[tuple[str, str], Span] = field(default_factory=dict)  # of those that have too many, in one
    doing: dict[str, tuple[Activity, int, float]] = field(default_factory=dict)  # by site: what, in which attempt, since when

    def add(self, span: Span) -> None:
        lane = (span.party, span.lane)
        self.counts[lane] = self.counts.get(lane, 0) + 1
        if self.counts[lane] <= SPANS_PER_LANE:
            self.ended.append(span)
            return
        rest = self.rest.get(lane)
        if rest is None:
            self.rest[lane] = replace(span, what="further ones", outcome="")
            return
        began, ended = min(rest.began_at, span.began_at), max(rest.ended_at, span.ended_at)
        self.rest[lane] = replace(rest, began_at=began, ended_at=ended, bytes=rest.bytes + span.bytes, pieces=rest.pieces + 1)

    def rests(self, site: str, now: float) -> None:
        """The site does no longer what it did."""
        if (did := self.doing.pop(site, None)) is not None:
            activity, attempt, since = did
            self.add(Span(site, SAYS, activity, attempt, since, now))

    def open(self) -> list[Span]:
        """What goes on, and what would not fit."""
        doing = [Span(site, SAYS, activity, attempt, since, 0.0) for site, (activity, attempt, since) in self.doing.items()]
        return [*(each.span(0.0, "") for each in self.underway), *doing, *self.rest.values()]


class RoundTrace:
    """The traces of one coordinator's rounds. now: UTC seconds that never go back within the process."""

    def __init__(self, spans: Spans, now: Callable[[], float]) -> None:
        self._stored = spans
        self._now = now
        self._rounds: dict[tuple[bytes, int], _Traced] = {}
        self._lock = threading.Lock()  # over memory
        self._writing = threading.Lock()  # over what moves from memory to the database, so that a reader sees each span once

    # --- what is noted ---

    def moved(self, before: Round, after: Round, event: Event, now: float) -> None:
        """An event moved a round, and the store has it."""
        with self._lock:
            traced = self._traced(after)
            site = getattr(event, "site", "")
            if isinstance(event, Progressed):
                self._said(traced, after, event, now)
            elif isinstance(event, _DELIVERIES) and (owed := _OWED_IN.get(before.phase)):
                traced.add(Span(site, OWED, owed, before.attempt, before.phase_since, now))
                traced.rests(site, now)
            elif isinstance(event, Declined) and before.sites[site].declined is None:
                traced.add(
                    Span(site, OWED, _OWED_IN.get(before.phase, before.phase), before.attempt, before.phase_since, now, 0, 1, "declined")
                )
                traced.rests(site, now)
            elif isinstance(event, SumOpened):
                traced.add(Span(COORDINATOR, OPENING, "commit", before.attempt, now, self._now()))
            if isinstance(event, Tick):
                for name in (n for n, s in after.sites.items() if s.late and not before.sites[n].late):
                    traced.add(
                        Span(name, OWED, _OWED_IN.get(before.phase, before.phase), before.attempt, before.phase_since, now, 0, 1, "late")
                    )
                    traced.rests(name, now)
            if after.phase is not before.phase or after.attempt != before.attempt:
                traced.add(Span(COORDINATOR, PHASE, before.phase, before.attempt, before.phase_since, now))

    def begin(self, state: Round, site: str, what: str) -> Underway:
        """A transfer begins; `end` it whatever comes."""
        with self._lock:
            traced = self._traced(state)
            underway = Underway(site, what, state.attempt, self._now(), 0, traced)
            traced.underway.append(underway)
            return underway

    def end(self, underway: Underway, outcome: str = "") -> None:
        """It has ended; again changes nothing. outcome: a word where it did not go well."""
        with self._lock:
            traced, underway.round = underway.round, None
            if traced is not None:
                traced.underway.remove(underway)
                traced.add(underway.span(self._now(), outcome))

    @contextmanager
    def step(self, state: Round, what: str) -> Iterator[None]:
        """The coordinator opens the sum, and this is one step of it."""
        began = self._now()
        try:
            yield
        finally:
            with self._lock:
                self._traced(state).add(Span(COORDINATOR, OPENING, what, state.attempt, began, self._now()))

    # --- what becomes of it ---

    def flush(self, run: bytes, number: int, *, over: bool) -> None:
        """Writes down what has ended; over: the round has, and nothing more of it is noted."""
        key = (run, number)
        with self._writing:
            with self._lock:
                traced = self._rounds.pop(key, None) if over else self._rounds.get(key)
                if traced is None:
                    return
                if over:
                    self._close(traced)
                spans, traced.ended = traced.ended, []
            if spans:
                self._write(run, number, spans)

    def flush_all(self) -> None:
        """Writes down what has ended in every round, before the process does."""
        for run, number in list(self._rounds):
            self.flush(run, number, over=False)

    def spans(self, run: bytes, number: int) -> list[Span]:
        """What is known of a round, with what still goes on in it; at most SPANS_TOLD and one more."""
        with self._writing:
            found = self._stored.of(run, number, SPANS_TOLD + 1)
            with self._lock:
                traced = self._rounds.get((run, number))
                return found if traced is None else [*found, *traced.ended, *traced.open()]

    def _traced(self, state: Round) -> _Traced:
        """The round's notes; of one that is over, notes that nobody will read."""
        key = (state.run, state.number)
        if key in self._rounds:
            return self._rounds[key]
        traced = _Traced()
        if any(run == state.run and number > state.number for run, number in self._rounds):
            return traced
        for old in [k for k in self._rounds if k[0] == state.run]:  # a run has one round in progress
            del self._rounds[old]
        self._rounds[key] = traced
        return traced

    def _said(self, traced: _Traced, after: Round, event: Progressed, now: float) -> None:
        activity = after.sites[event.site].activity
        doing = traced.doing.get(event.site)
        if doing is not None and doing[0] is activity:
            return
        traced.rests(event.site, now)
        if activity not in _RESTING:
            traced.doing[event.site] = (activity, after.attempt, now)

    def _close(self, traced: _Traced) -> None:
        now = self._now()
        for site in list(traced.doing):
            traced.rests(site, now)
        for underway in traced.underway:
            underway.round = None
            traced.add(underway.span(now, "unfinished"))
        traced.underway.clear()
        traced.ended += traced.rest.values()

    def _write(self, run: bytes, number: int, spans: list[Span]) -> None:
        try:
            self._stored.add(run, number, spans)
        except DatabaseError as error:  # a full disk, most likely: the round itself will say so
            log.warning("round not traced", run=run.hex()[:12], round=number, spans=len(spans), reason=str(error.orig))
