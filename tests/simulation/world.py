"""One simulation, whole: a federation on one event loop, what befalls it, and what must be so when the weather is fair again.

Owns the order of a simulation (chapters of faults and of peace) and the supervisors that start killed processes again. What befalls it is
faults.py, what peace must bring peace.py: every phase has an exit, everything ordered gets done, nothing is left on any disk. Must not know the
rules on messages.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import structlog
from sqlalchemy.exc import OperationalError

import cosilo_common.transfer
from cosilo_common.secagg.messages import RoundKind, Signed
from cosilo_server import closing
from cosilo_server.services import turns
from tests.simulation import signatures
from tests.simulation import site as site_module
from tests.simulation import sums as sums_module
from tests.simulation.clock import SimulatedLoop, Stalled
from tests.simulation.coordinator import CoordinatorParty
from tests.simulation.disk import discard_folder, simulated_disks
from tests.simulation.faults import LOOK_S, Faults
from tests.simulation.liar import BadPeers, Liar
from tests.simulation.network import Network, Weather
from tests.simulation.peace import PeaceChecks
from tests.simulation.process import CURRENT, Process
from tests.simulation.scenario import Scenario
from tests.simulation.site import SiteParty
from tests.simulation.sums import Sums
from tests.simulation.trainer import Temper
from tests.simulation.watch import Violation, Watch
from tests.simulation.wire import hand_in

CHAOS_S_MAX = 900.0  # a chapter of faults ends after this at the latest
PEACE_S_MAX = 1500.0  # BACKOFF_MAX_S, then each round left, with a site or two that must first be heard of by keepalive
SETTLE_S = 70.0  # after the last round: sites hear of its end, and clean up
DOWNTIME_S = (0.1, 20.0)
UNEXPECTED = ("failed unexpectedly", "conductor task failed", "session failed unexpectedly")
UNEXPECTED_TRACES = ("run does not move",)  # an error in words is for the disk to cause


@dataclass
class Report:
    """What one simulation did."""

    seed: int
    about: str
    simulated_s: float = 0.0
    events: int = 0
    messages: int = 0
    points: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    trace_digest: str = ""
    violation: Violation | None = None


class World(Faults, PeaceChecks):
    """The federation of one scenario."""

    def __init__(self, scenario: Scenario, root: Path, tell: Callable[[str], None] | None = None) -> None:
        seed = scenario.seed
        self.scenario = scenario
        self.random = Random(f"world/{seed}")
        self.loop = SimulatedLoop(Random(f"loop/{seed}"))
        self.faults: Counter[str] = Counter()
        self.points = 0
        self.calm = False
        self._tell = tell
        self._root = str(root)
        self._trace = hashlib.sha256()
        self.watch = Watch(self.loop.time, self._entry_of, self._permits, self._durable, self.trace)
        self.weather, self.temper = Weather(), Temper()
        self.network = Network(self.loop, Random(f"network/{seed}"), self.weather, self.watch)
        scratch = root / "scratch"
        scratch.mkdir()
        self.watch.sums = self.sums = Sums(scratch, self.watch.fail)
        manifests = list(scenario.manifests)
        self.coordinator = CoordinatorParty(root / "coordinator", self.loop, self.network, self.watch, Random(f"disk/{seed}"))
        self.sites = {
            name: SiteParty(
                name,
                root / name,
                self.loop,
                self.network,
                self.watch,
                self.temper,
                [m for m in manifests if any(p.name == name for p in m.participants)],
                str(seed),
            )
            for name in scenario.sites
        }
        self.liar = Liar(Random(f"liar/{seed}"), scenario.lies) if scenario.lies else None
        self.watch.honest = self.liar is None
        self.peers = BadPeers(Random(f"peers/{seed}"), scenario.misdealt, lambda: not self.calm)
        self.watch.on_upload = self._uploaded
        self.away: set[str] = set()
        self._silent: set[Process] = set()
        self._supervisors: list[asyncio.Task[None]] = []
        self._ordered: dict[tuple[bytes, RoundKind], int] = {}
        self.loop.on_exception = self._unexpected

    # The whole

    async def run(self) -> None:
        """Everything, to the end or to the first broken rule."""
        story = asyncio.ensure_future(self._story())
        broken = asyncio.ensure_future(self.watch.broken.wait())
        await asyncio.wait({story, broken}, return_when=asyncio.FIRST_COMPLETED)
        broken.cancel()
        if self.watch.violation is None:
            await story
        story.cancel()
        await asyncio.gather(story, return_exceptions=True)
        await self._end()

    async def _story(self) -> None:
        self.coordinator.found(list(self.scenario.manifests))
        for party in self.sites.values():
            for manifest in party.manifests:
                party.accept(manifest)
        self._supervise(self.coordinator)
        for party in self.sites.values():
            self._supervise(party)
        for chapter in range(self.scenario.chapters):
            self.trace(f"chapter {chapter + 1}")
            await self._faults()
            await self._peace()
            self.watch.forget_rounds()
            gc.collect()

    async def _faults(self) -> None:
        self.calm = False
        vars(self.weather).update(vars(self.scenario.weather))
        vars(self.temper).update(vars(self.scenario.temper))
        self.network.twister = self.liar
        ends_at = self.loop.time() + CHAOS_S_MAX
        target = self._rounds_ended() + self.scenario.rounds_a_chapter
        for manifest in self.scenario.manifests:
            await self._order(manifest.digest(), RoundKind.TRAIN, self.scenario.rounds_a_chapter)
        while self._rounds_ended() < target and self.loop.time() < ends_at:
            await self._strike()

    async def _strike(self) -> None:
        mischief = self.scenario.mischief
        await asyncio.sleep(mischief.pause_s * self.random.expovariate(1.0) + 0.01)
        if mischief.weights:
            fault = self.random.choices(list(mischief.weights), weights=list(mischief.weights.values()))[0]
            if await getattr(self, "_" + fault.replace(" ", "_").replace("'", ""))():
                self.faults[fault] += 1
                self.trace(f"fault: {fault}")

    async def _peace(self) -> None:
        """No faults any more: whatever was begun must come to an end, and everything that was ordered must be done."""
        self.calm = True
        self.trace("peace")
        self.network.twister = None
        vars(self.weather).update(vars(Weather()))
        vars(self.temper).update(vars(Temper()))
        for party in [self.coordinator, *self.sites.values()]:
            party.disk.full = False
            if party.process is not None:
                party.process.dies_at = 0
        for name in self.sites:
            self.network.link(name).slow_s = 0.0
            self.network.link_up(name)
        self.away.clear()
        for name in self.sites if self.liar is not None else ():
            self.network.cut_any(name)  # what it was told last may be a lie: it hears the truth as it comes back
        left = sum(self._left_to_do().values())
        ends_at = self.loop.time() + PEACE_S_MAX + 60.0 * left
        while any(self._left_to_do().values()):
            await asyncio.sleep(LOOK_S)
            if self.random.random() < 0.2:
                self._person_permits()
            if self.loop.time() > ends_at:
                self.watch.fail("progress", f"{self._left_to_do()} rounds are not done after {PEACE_S_MAX:.0f} s of peace: {self._notes()}")
                return
        await asyncio.sleep(SETTLE_S)
        self._check_nothing_left()

    async def _end(self) -> None:
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        for party in [*self.sites.values(), self.coordinator]:
            if party.process is not None:
                party.process.die()
                await party.bury()

    # Processes

    def _supervise(self, party: CoordinatorParty | SiteParty) -> None:
        supervisor = self.loop.create_task(self._keep_up(party), name="supervisor")
        supervisor.add_done_callback(self._supervisor_done)
        self._supervisors.append(supervisor)

    def _supervisor_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.watch.fail("simulator", "".join(traceback.format_exception(error))[-1500:])

    async def _keep_up(self, party: CoordinatorParty | SiteParty) -> None:
        """Starts a party, and starts it again whenever it is gone: systemd, or a person."""
        while True:
            process = party.boot(self._died)
            self.trace(f"{process.name} starts, incarnation {party.incarnations}")
            await process.dead.wait()
            await party.bury()
            self.points += process.points
            powerless = process in self._silent
            self._silent.discard(process)
            if powerless:
                party.lose_power()
            low, high = DOWNTIME_S
            await asyncio.sleep(low + (high - low) * self.random.random() ** 3)
            while process.name in self.away and not self.calm:
                await asyncio.sleep(LOOK_S)

    def _died(self, process: Process) -> None:
        self.trace(f"{process.name} is gone {process.died_at_point and 'at its point ' + str(process.points)}")
        self.network.died(process, silently=process in self._silent)
        full = isinstance(process.crashed, OSError | OperationalError) and process.disk.full
        if full:
            self.faults["starts failed by a full disk"] += 1
        elif process.crashed is not None:
            self.watch.fail("crashed", "".join(traceback.format_exception(process.crashed))[-1500:])

    # What the watch asks

    def trace(self, line: str) -> None:
        """One line of what happened: the digest of all lines is how two runs of a seed are compared."""
        text = f"{self.loop.time():12.4f} {line}".replace(self._root, "")
        self._trace.update(text.encode())
        if self._tell is not None:
            self._tell(text)

    def trace_digest(self) -> str:
        return self._trace.hexdigest()

    def _entry_of(self, site: str, run: bytes, round_: int) -> Any:
        return self.sites[site].entry(run, round_)

    def _permits(self, site: str, base: bytes) -> int:
        return self.sites[site].permitted(base)

    def _durable(self, run: bytes, round_: int, site: str) -> bool:
        path = self.coordinator.root / "spool" / run.hex() / str(round_) / site
        return not path.exists() or self.coordinator.disk.durable(str(path))

    def _uploaded(self, upload: Signed) -> None:
        conductor, server = self.coordinator.conductor, self.network.server
        if conductor is not None and server is not None:
            complaint = self.peers.accusation(conductor.round(upload.run))
            if complaint is not None:
                hand_in(server, complaint.site, complaint)

    def _rounds_ended(self) -> int:
        return self.watch.counts["rounds closed"] + self.watch.counts["rounds abandoned"]

    def _unexpected(self, context: dict[str, Any]) -> None:
        process = CURRENT.get()
        if process is None or process.alive:
            self.watch.fail("exception", f"{context.get('message')}: {context.get('exception')!r}")


def simulate(scenario: Scenario, tell: Callable[[str], None] | None = None) -> Report:
    """Runs one scenario; `report.violation` says what broke, if anything did."""
    root = Path(tempfile.mkdtemp(prefix="cosilo-simulation-", dir=memory()))
    report = Report(scenario.seed, scenario.describe())
    collecting = gc.isenabled()
    gc.disable()  # what it finalises, and when, must not depend on anything but the seed
    gc.freeze()  # a collection looks at this simulation's objects, not at every module's
    try:
        _live(World(scenario, root, tell), report)
    finally:
        discard_folder(root)
        gc.collect()  # of what this simulation made: the rest stays frozen
        gc.unfreeze()
        if collecting:
            gc.enable()
    return report


def _live(world: World, report: Report) -> None:
    with _in_place(world):
        asyncio.set_event_loop(world.loop)
        try:
            world.loop.run_until_complete(world.run())
        except Stalled as stalled:
            world.watch.fail("progress", str(stalled))
        finally:
            asyncio.set_event_loop(None)
    _report(report, world)


def _report(report: Report, world: World) -> None:
    report.simulated_s = world.loop.time()
    report.events = world.loop.events
    report.messages = world.network.messages
    report.points = world.points
    report.counts = world.watch.counts
    report.counts["sums opened"] = world.sums.opened
    report.faults = world.faults + world.network.faults + world.coordinator.disk.faults
    for party in world.sites.values():
        report.faults += party.disk.faults
    if world.liar is not None:
        report.faults += world.liar.faults
    report.faults += world.peers.faults
    report.trace_digest = world.trace_digest()
    report.violation = world.watch.violation


@contextmanager
def _in_place(world: World) -> Iterator[None]:
    """Puts the simulated wire, disk and oracle where production code looks for them."""
    with ExitStack() as stack:
        stack.enter_context(simulated_disks())
        stack.enter_context(mock.patch.object(cosilo_common.transfer, "CHUNK_BYTES", world.scenario.chunk_bytes))
        # This process's memory is no daemon's.
        kept: list[tuple[Any, str, Any]] = [(each, "give_back", lambda: None) for each in (closing, turns)]
        in_place = [
            *site_module.patches(world.network),
            *sums_module.patches(world.sums),
            *world.peers.patches(),
            *signatures.patches(),
            *kept,
        ]
        for module, name, value in in_place:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(_listening(world))
        yield


@contextmanager
def _listening(world: World) -> Iterator[None]:
    """The log, as far as it tells of faults of the program; and all of it in the trace, where somebody reads it."""
    kept = structlog.get_config()

    def hear(_logger: object, method: str, event: dict[str, Any]) -> str:
        process = CURRENT.get()
        alive = process is None or process.alive
        if alive and (str(event["event"]) in UNEXPECTED or (method == "exception" and str(event["event"]) in UNEXPECTED_TRACES)):
            world.watch.fail("exception", f"{process.name if process else '?'}: {_in_words(event)}")
        if world._tell is not None and process is not None and process.alive:
            world._tell(f"{world.loop.time():12.4f}     {process.name}: {_in_words(event)}")
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.processors.format_exc_info, hear], cache_logger_on_first_use=False)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        structlog.configure(**kept)


def _in_words(event: dict[str, Any]) -> str:
    rest = " ".join(f"{name}={value}" for name, value in event.items() if name != "event")
    return f"{event['event']} {rest}"


def memory() -> str | None:
    """Where a simulation's disks lie: TMPDIR where there is one, else in memory where there is room."""
    if "TMPDIR" in os.environ:
        return None
    return "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 1 << 30 else None
