"""The shell around the round machine: hands it events, persists what it says, then performs its effects.

Owns which rounds are live, when the next one starts, and who is told. Must not know protobuf or grpc. Everything runs on one event loop; the
store and the opening of a sum run in threads. Persist, then speak: watchers are told only after the store has committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import DatabaseError

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, Participant
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import RoundCloser
from cosilo_server.live_run import LiveRun
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.opening import SumOpener
from cosilo_server.rounds.assignments import Assignment, assignment_for
from cosilo_server.rounds.events import (
    Connected,
    Declined,
    Disconnected,
    EndRound,
    Event,
    LeftOut,
    OpenSum,
    Progressed,
    Refuse,
    Resumed,
    Stopped,
    SumOpened,
    SumRefused,
    Tick,
    UploadReceived,
)
from cosilo_server.rounds.machine import step
from cosilo_server.rounds.state import DeclineCode, Phase, Round
from cosilo_server.spool import Spool
from cosilo_server.starting import RoundStarter
from cosilo_server.store import Pause, Store, StoredRun
from cosilo_server.trace import RoundTrace

log = structlog.get_logger(__name__)
Answer = TypeVar("Answer")

TICK_S = 0.5  # deadlines are tens of seconds: half a second late is nothing, and an idle tick costs microseconds
BACKOFF_FIRST_S = 2.0  # after an abandoned round; doubles with each further one
RECHECK_S = 5.0  # after a refusal that is not the sites' doing, such as a full disk
BACKOFF_MAX_S = 300.0  # a federation whose sites come back after a weekend starts within five minutes
_STAND = "they stay asked for, and start by themselves once they can: cosilo run list says why not, cosilo run stop takes them back"


class Conductor:
    """Conducts every run's rounds.

    now: UTC seconds, monotone within the process. `start` resumes what a former process left; `stop` leaves everything resumable.
    """

    def __init__(
        self,
        store: Store,
        spool: Spool,
        closer: RoundCloser,
        metrics: CoordinatorMetrics,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._spool = spool
        self._metrics = metrics
        self._now = now or _steady_clock()
        self.trace = RoundTrace(store.spans, self._now)
        self._starter = RoundStarter(store, spool, self._now)
        self._opener = SumOpener(closer, self.trace, metrics)
        self._runs: dict[bytes, LiveRun] = {}
        self._connected: dict[str, int] = {}
        self._watchers: dict[asyncio.Event, None] = {}  # in the order of their coming, so that a simulation replays
        self._tasks: set[asyncio.Task[None]] = set()
        self._working: set[asyncio.Task[Any]] = set()  # begun for a caller who may be gone
        self._on_round: Callable[[Round], None] = lambda state: None
        self._may_come: Callable[[Participant], bool] = lambda participant: True
        self.ticked_at = time.monotonic()
        self.round_over = asyncio.Event()  # for the collector, which clears it

    # --- life ---

    async def start(self) -> None:
        """Loads every run, resumes rounds in progress, drops spools of rounds that are over, and begins to tick."""
        for stored in await asyncio.to_thread(self._store.runs):
            await self.adopt(stored)
        live = {(r.run.hex(), state.number) for r in self._runs.values() if (state := r.under_way())}
        for run, number in await asyncio.to_thread(self._spool.rounds):
            if (run, number) not in live:
                await asyncio.to_thread(self._spool.discard_round, run, number)
        for record in self._runs.values():
            if state := record.under_way():
                log.info("round resumed", run=record.run.hex(), round=state.number, phase=state.phase)
                await self.handle(record.run, Resumed())
        self._spawn(self._tick_for_ever())

    async def stop(self) -> None:
        """Stops ticking and opening; what is not persisted is begun again by the next process."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._working, return_exceptions=True)
        await asyncio.to_thread(self.trace.flush_all)

    async def adopt(self, stored: StoredRun) -> None:
        """Takes a run from the store under its conduct."""
        newest = await asyncio.to_thread(self._store.newest_round, stored.run)
        self._runs.setdefault(stored.run, LiveRun(stored.run, stored.manifest, newest.state if newest else None, paused=stored.paused))
        self.announce()

    # --- what is asked of it ---

    def manifest(self, run: bytes) -> Manifest | None:
        """A run's manifest."""
        record = self._runs.get(run)
        return record.manifest if record else None

    def round(self, run: bytes) -> Round | None:
        """A run's newest round."""
        record = self._runs.get(run)
        return record.round if record else None

    def note(self, run: bytes) -> str:
        """Why a run does not move, where it does not."""
        record = self._runs.get(run)
        return record.standstill if record else ""

    def runs_of(self, site: str) -> list[bytes]:
        """Runs that name the site as a participant, oldest first."""
        return [r.run for r in self._runs.values() if any(p.name == site for p in r.manifest.participants)]

    def owed(self, site: str) -> tuple[Assignment, ...]:
        """Everything the site owes, one assignment for each of its runs that has had a round."""
        rounds = (r.round for r in self._runs.values() if r.round is not None)
        return tuple(assignment_for(state, site) for state in rounds if site in state.sites)

    def connected(self, site: str) -> bool:
        """Whether the site's stream is open."""
        return self._connected.get(site, 0) > 0

    def connected_sites(self) -> set[str]:
        """Sites whose streams are open."""
        return {name for name, streams in self._connected.items() if streams > 0}

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set at every change; the watcher clears it before it looks."""
        changed = asyncio.Event()
        changed.set()
        self._watchers[changed] = None
        try:
            yield changed
        finally:
            self._watchers.pop(changed, None)

    async def order(self, run: bytes, kind: RoundKind, rounds: int) -> int:
        """Asks for rounds; returns the number of the first.

        Raises CosiloError where the manifest allows no more, or the run is paused; and where there is no room for the first of them now, which is
        asked for all the same.
        """
        record = self._known(run)
        first = record.first_of(kind, rounds)
        await asyncio.to_thread(self._store.add_order, run, kind, rounds)
        record.orders += 1
        record.not_before, record.note = 0.0, ""
        self.announce()
        try:
            await self._whole(self._start_next(record))
        except CosiloError as error:  # the order is stored, and every look of the clock tries it again
            raise CosiloError(error.operation, error.subject, "; ".join(filter(None, (error.hint, _STAND)))) from None
        return first

    async def stop_run(self, run: bytes, abandon: bool) -> None:
        """No further rounds start; the one in progress is abandoned if asked."""
        record = self._known(run)
        await asyncio.to_thread(self._store.set_stopped, run, True)
        record.note, record.paused = "stopped by an admin", None
        if abandon and record.under_way():
            await self.handle(run, Stopped("stopped by an admin"))
        self.announce()

    async def pause_run(self, run: bytes, pause: Pause, abandon: bool) -> None:
        """No round starts until `resume_run`, over restarts too; what was ordered waits.

        The round in progress goes to its end, or is abandoned if asked. Raises CosiloError where the run is stopped.
        """
        record = self._known(run)
        await self._whole(self._pause(record, pause))
        if abandon and record.under_way():
            await self.handle(run, Stopped(pause.words))
        self.announce()

    async def resume_run(self, run: bytes) -> None:
        """Lets a paused run go on at once. Raises CosiloError where it is not paused."""
        record = self._known(run)
        if record.paused is None:
            raise CosiloError("resume run", f"run {record.manifest.name} is not paused", "see cosilo run list")
        await self._whole(self._resume(record))
        self.announce()
        await self._whole(self._start_next(record))

    def note_reached(self, run: bytes, site: str, reached: int) -> None:
        """A site has begun rounds that are not known here, as after a restore: the next one is to be above them. No one site can raise it."""
        record = self._known(run)
        if record.note_reached(site, reached):
            log.warning("sites are ahead: rounds are passed over", run=run.hex()[:12], begun_here=record.begun, next=record.floor + 1)

    async def attend(self, site: str, present: bool) -> None:
        """A site's stream opened or ended; a site counts as connected while it has any."""
        await self._whole(self._attend(site, present))

    async def _attend(self, site: str, present: bool) -> None:
        before = self.connected(site)
        self._connected[site] = max(0, self._connected.get(site, 0) + (1 if present else -1))
        if self.connected(site) == before:
            return
        self._metrics.sites_connected.set(len(self.connected_sites()))
        for record in list(self._runs.values()):
            if record.waits_for(site):
                await self.handle(record.run, Connected(site) if present else Disconnected(site))
        self.announce()

    async def left(self, site: str) -> None:
        """A site left for good: rounds in progress wait for it no longer."""
        for record in list(self._runs.values()):
            if record.waits_for(site):
                await self.handle(record.run, Declined(site, DeclineCode.NOT_ACCEPTED))

    async def handle(self, run: bytes, event: Event, number: int | None = None) -> str:
        """Moves a run's newest round by one event; returns why it was refused, or nothing.

        number: the round that the event is of, where it was checked against a round that may be over by now.
        """
        return await self._whole(self._handle_in_turn(self._known(run), event, number))

    # --- the shell ---

    async def _whole(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Runs work to its end whoever waits for it: a call that is cancelled while the store commits would leave memory behind the store."""
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return await asyncio.shield(task)

    async def _pause(self, record: LiveRun, pause: Pause) -> None:
        async with record.lock:  # a round that is just being started is begun first, and then in progress
            stored = await asyncio.to_thread(self._store.run, record.run)
            if stored is not None and stored.stopped:
                raise CosiloError("pause run", f"run {record.manifest.name} is stopped already", "it has no rounds to pause")
            await asyncio.to_thread(self._store.pause, record.run, pause)
            record.paused = pause

    async def _resume(self, record: LiveRun) -> None:
        async with record.lock:
            await asyncio.to_thread(self._store.resume, record.run)
            record.paused, record.not_before, record.note = None, 0.0, ""  # a round that the pause abandoned calls for no backoff

    async def _handle_in_turn(self, record: LiveRun, event: Event, number: int | None) -> str:
        async with record.lock:
            if record.round is None:
                return "the run has had no round"
            if number is not None and number != record.round.number:
                return f"round {number} is over; this is round {record.round.number}"
            return await self._handle(record, event)

    async def _handle(self, record: LiveRun, event: Event) -> str:
        before = record.round
        assert before is not None
        now = self._now()
        after, effects = step(before, event, now)
        if after is not before:
            if not after.same_in_store(before):
                await self._persist(record, before, after, event)
            record.round = after
            self._metrics.round_moved(record.run, before, after, now)
            self.trace.moved(before, after, event, now)
            if after.phase is not before.phase or after.attempt != before.attempt:
                log.info(
                    "round moved",
                    run=record.run.hex()[:12],
                    round=after.number,
                    kind=after.kind,
                    phase=after.phase,
                    attempt=after.attempt,
                    reason=after.reason or None,
                )
            self.announce()
        refused = ""
        for effect in effects:
            match effect:
                case Refuse(reason):
                    refused = reason
                case LeftOut(site, phase):
                    self._metrics.dropouts.labels(phase=phase).inc()
                    log.warning("site left out", run=record.run.hex()[:12], round=after.number, site=site, phase=phase)
                case OpenSum():
                    self._spawn(self._open(record, after))
                case EndRound():
                    await self._end(record, after)
        if isinstance(event, UploadReceived) and not refused and after.phase is Phase.UPLOADING:  # after the last one the sum is opened
            self._spawn(self._opener.add(after, event.site, lambda: record.round))
        if after.phase is not before.phase:
            await asyncio.to_thread(self.trace.flush, record.run, after.number, over=after.ended)
        return refused

    async def _persist(self, record: LiveRun, before: Round, after: Round, event: Event) -> None:
        with _persisting(after.number):  # where it fails the round stays where it was; whoever sent the event tries again
            if isinstance(event, SumOpened):
                assert record.opened is not None
                outcome, checkpoint = record.opened
                await asyncio.to_thread(self._store.close_round, after, outcome.to_json(), checkpoint)
            else:
                await asyncio.to_thread(self._store.save_round, after, _what(event, before, after), getattr(event, "site", ""))

    async def _open(self, record: LiveRun, state: Round) -> None:
        """Opens the sum; the round closes, or is abandoned with the reason."""
        record.opened, ended = await self._opener.open(record.manifest, state)
        await self._insist(record.run, ended, state.number)

    async def _insist(self, run: bytes, ended: SumOpened | SumRefused, number: int) -> None:
        """Has the end of an opening written down, however long the disk is full: nothing else would ever end that phase."""
        while True:
            try:
                await self.handle(run, ended, number)
                return
            except Exception:
                log.exception("the end of a round is not written down yet", run=run.hex()[:12], round=number)
            await asyncio.sleep(RECHECK_S)

    def on_round(self, told: Callable[[Round], None]) -> None:
        """Called for each round as it has begun and as it has ended; must not block."""
        self._on_round = told

    def on_begin(self, may_come: Callable[[Participant], bool]) -> None:
        """Asked of each participant as a round begins: one that is no member any more is not waited for; must not block."""
        self._may_come = may_come

    async def _end(self, record: LiveRun, state: Round) -> None:
        self._on_round(state)
        record.opened = None
        self._spawn(self._opener.forget(state))
        self.round_over.set()
        await asyncio.to_thread(self._spool.discard_round, record.run.hex(), state.number)
        if state.reason:
            failures = await asyncio.to_thread(self._store.abandoned_since_close, record.run)
            pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(failures - 1, 16))
            record.not_before = self._now() + pause_s
            record.note = f"round {state.number} was abandoned: {state.reason}"
        else:
            self._spawn(self._go_on(record))

    async def _start_next(self, record: LiveRun) -> None:
        """Starts the next round that was asked for, once enough participants are connected."""
        async with record.lock:
            if record.paused is not None or record.under_way() or self._now() < record.not_before:
                return
            given = record.orders
            order = await asyncio.to_thread(self._store.open_order, record.run)
            record.orders_done = given if order is None else -1
            if order is None:
                return
            state = await self._starter.next_round(record, order.kind, self.connected_sites(), self._may_come)
            if state is None:
                return
            with _persisting(state.number):
                await asyncio.to_thread(self._store.begin_round, state)
            self._on_round(state)
            record.round, record.note = state, ""
            self._metrics.round_began(state)
            log.info("round started", run=record.run.hex()[:12], round=state.number, kind=order.kind, phase=state.phase)
        self.announce()

    async def _tick_for_ever(self) -> None:
        while True:
            self.ticked_at = time.monotonic()
            for record in list(self._runs.values()):
                await self._go_on(record)
            await asyncio.sleep(TICK_S)

    async def _go_on(self, record: LiveRun) -> None:
        """Lets a run's deadlines pass, or its next round start. What hinders it is noted, and the next tick tries again."""
        try:
            if state := record.under_way():
                if step(state, Tick(), self._now()) != (state, ()):  # most ticks move nothing
                    await self.handle(record.run, Tick())
            elif record.orders_done != record.orders:
                await self._start_next(record)
        except CosiloError as error:
            if record.note != str(error):
                log.error("run does not move", run=record.run.hex()[:12], reason=str(error))
            record.note = str(error)
            record.not_before = self._now() + RECHECK_S
        except Exception:  # one run's fault must not stop the clock of the others
            log.exception("run does not move", run=record.run.hex()[:12])

    def _known(self, run: bytes) -> LiveRun:
        record = self._runs.get(run)
        if record is None:
            raise CosiloError("find run", f"no run {run.hex()[:12]} is known", "list them with `cosilo run list`")
        return record

    def announce(self) -> None:
        """Has every watcher look again."""
        for changed in self._watchers:
            changed.set()

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # always a coroutine of this class
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("conductor task failed", error=repr(error))


@contextmanager
def _persisting(number: int) -> Iterator[None]:
    """Says of a database that refuses to write what a person can do about it."""
    try:
        yield
    except DatabaseError as error:
        raise CosiloError("persist round", f"round {number}: {error.orig}", "free space on the data folder's disk") from None


def _what(event: Event, before: Round, after: Round) -> str:
    if not isinstance(event, Tick | Progressed):
        return type(event).__name__
    return f"{before.phase} ended" if after.phase != before.phase else "late"


def _steady_clock() -> Callable[[], float]:
    """UTC seconds that never jump within the process: the wall clock once, then the monotonic one."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()
