"""One simulation, whole: a federation on one event loop, what befalls it, and what must be so when the weather is fair again.

Owns the order of a simulation (chapters of faults and of peace), the supervisors that start killed processes again, and the checks that
need peace: every phase has an exit, everything ordered gets done, nothing is left on any disk. Must not know the rules on messages.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
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
from cosilo_client.ledger import RoundState
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.messages import RoundKind, Signed
from tests.simulation import site as site_module
from tests.simulation import sums as sums_module
from tests.simulation.clock import SimulatedLoop, Stalled
from tests.simulation.coordinator import CoordinatorParty
from tests.simulation.disk import discard_folder, simulated_disks
from tests.simulation.liar import BadPeers, Liar
from tests.simulation.network import Network, Weather
from tests.simulation.process import CURRENT, Process
from tests.simulation.scenario import Scenario, kinds
from tests.simulation.site import SiteParty
from tests.simulation.sums import Sums
from tests.simulation.trainer import Temper
from tests.simulation.watch import Violation, Watch
from tests.simulation.wire import hand_in

CHAOS_S_MAX = 900.0  # a chapter of faults ends after this at the latest
PEACE_S_MAX = 1500.0  # BACKOFF_MAX_S, then each round left, with a site or two that must first be heard of by keepalive
SETTLE_S = 70.0  # after the last round: sites hear of its end, and clean up
LOOK_S = 2.0
DOWNTIME_S = (0.1, 20.0)
AWAY_S = 300.0
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


class World:
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

    # Faults: each says whether it struck

    async def _site_killed(self) -> bool:
        return self._kill(self._any_site(), powerless=False)

    async def _site_powered_off(self) -> bool:
        return self._kill(self._any_site(), powerless=True)

    async def _coordinator_killed(self) -> bool:
        return self._kill(self.coordinator, powerless=False)

    async def _coordinator_powered_off(self) -> bool:
        return self._kill(self.coordinator, powerless=True)

    async def _both_killed(self) -> bool:
        return self._kill(self._any_site(), powerless=self.random.random() < 0.5) and self._kill(self.coordinator, powerless=False)

    async def _site_stopped(self) -> bool:
        party = self._any_site()
        if party.process is None or not party.process.alive:
            return False
        await party.stop()
        return True

    async def _coordinator_stopped(self) -> bool:
        if not self.coordinator.up or self.coordinator.conductor is None:
            return False
        await self.coordinator.stop()
        return True

    async def _site_away(self) -> bool:
        party = self._any_site()
        self.away.add(party.name)
        self.loop.call_later(AWAY_S * self.random.random(), self.away.discard, party.name)
        return self._kill(party, powerless=False)

    async def _link_down(self) -> bool:
        self._cut_off(self._any_site().name)
        return True

    async def _links_down(self) -> bool:
        for name in self.sites:
            if self.random.random() < 0.7:
                self._cut_off(name)
        return True

    async def _link_slow(self) -> bool:
        link = self.network.link(self._any_site().name)
        link.slow_s = 3.0 * self.random.random()
        self.loop.call_later(60 * self.random.random(), setattr, link, "slow_s", 0.0)
        return True

    async def _connection_cut(self) -> bool:
        return self.network.cut_any(self._any_site().name)

    async def _site_unwilling(self) -> bool:
        party = self._any_site()
        party.policy = party.policy.model_copy(update={"hours": ()})
        return False

    async def _sites_disk_full(self) -> bool:
        return self._fill(self._any_site())

    async def _coordinators_disk_full(self) -> bool:
        return self._fill(self.coordinator)

    async def _cached_weights_rotten(self) -> bool:
        folder = self._any_site().root / "artifacts"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not files:
            return False
        file = self.random.choice(files)
        data = bytearray(file.read_bytes())
        if not data:
            return False
        data[self.random.randrange(len(data))] ^= 1 + self.random.randrange(255)
        file.write_bytes(data)
        return True

    async def _rounds_ordered(self) -> bool:
        manifest = self.random.choice(self.scenario.manifests)
        await self._order(manifest.digest(), kinds(self.random), self.random.randint(1, 2))
        return True

    async def _run_stopped(self) -> bool:
        """An admin stops a run, and orders more of it later."""
        conductor, process = self.coordinator.conductor, self.coordinator.process
        if not self.coordinator.up or conductor is None or process is None:
            return False
        run = self.random.choice(self.scenario.manifests).digest()
        await self._asked(process, conductor.stop_run(run, self.random.random() < 0.6))
        return True

    async def _model_permitted(self) -> bool:
        self._person_permits()
        return True

    def _kill(self, party: CoordinatorParty | SiteParty, powerless: bool) -> bool:
        """Now, or at one of its next writes or sends."""
        process = party.process
        if process is None or not process.alive:
            return False
        if powerless:
            self._silent.add(process)
        if self.random.random() < 0.15:
            process.die()
        else:
            process.dies_soon(1 + int(80 * self.random.random() ** 2))
        return True

    def _cut_off(self, name: str) -> None:
        self.network.link_down(name)
        duration_s = self.random.choice((2.0, 15.0, 60.0, 150.0)) * self.random.random()
        self.loop.call_later(duration_s, self.network.link_up, name)

    def _fill(self, party: CoordinatorParty | SiteParty) -> bool:
        if party.disk.full:
            return False
        party.disk.full = True
        self.loop.call_later(25 * self.random.random(), setattr, party.disk, "full", False)
        return True

    def _any_site(self) -> SiteParty:
        return self.random.choice(list(self.sites.values()))

    # People

    async def _order(self, run: bytes, kind: RoundKind, rounds: int) -> None:
        """An admin orders rounds, and tries again until the coordinator says that it has them."""
        while True:
            conductor, process = self.coordinator.conductor, self.coordinator.process
            if self.coordinator.up and conductor is not None and process is not None and process.alive:
                if await self._asked(process, conductor.order(run, kind, rounds)):
                    return
            await asyncio.sleep(LOOK_S)

    async def _asked(self, process: Process, question: Any) -> bool:
        """One call of an admin's, which may lose its connection while it is served; whether it was answered."""
        call = process.start(question, name="admin")
        if self.random.random() < 0.3 and not self.calm:
            self.loop.call_later(self.random.random() * 0.02, call.cancel)
        await asyncio.wait({call})
        if call.cancelled() or not process.alive:
            return False
        error = call.exception()
        if isinstance(error, CosiloError):
            self.trace(f"refused to an admin: {error}")
        elif isinstance(error, OperationalError) and process.disk.full:
            self.faults["calls failed by a full disk"] += 1
        elif error is not None:
            self.watch.fail("handler", f"an admin's call raised {error!r}")
        return error is None

    def _person_permits(self) -> None:
        """At each site where R8 stands against the newest base model, a person looks at it and says yes."""
        store = self.coordinator.store
        if store is None:
            return
        for party in self.sites.values():
            for manifest in party.manifests:
                newest = store.newest_checkpoint(manifest.digest())
                if newest is not None:
                    party.permit(newest.weights)

    # What peace must bring

    def _left_to_do(self) -> dict[str, int]:
        store = self.coordinator.store
        if store is None or not self.coordinator.up:
            return {"coordinator": 1}
        left = {}
        for manifest in self.scenario.manifests:
            order = store.open_order(manifest.digest())
            state = self.coordinator.conductor.round(manifest.digest()) if self.coordinator.conductor else None
            if order is not None or (state is not None and not state.ended):
                left[manifest.name] = order.wanted - order.closed if order is not None else 1
        return left

    def _notes(self) -> str:
        conductor = self.coordinator.conductor
        if conductor is None:
            return "the coordinator is down"
        return "; ".join(conductor.note(m.digest()) or "no note" for m in self.scenario.manifests)

    def _check_nothing_left(self) -> None:
        """No spool, no secret, no unmasked update, no message outlives its round; no descriptor its use (R7)."""
        self._check_coordinator()
        for party in self.sites.values():
            journal = party.journal
            if journal is None or party.process is None:
                self.watch.fail("progress", f"{party.name} is down in peace")
                continue
            open_rounds = {entry.run for entry in journal.ledger.open_rounds()}
            for manifest in party.manifests:
                last = journal.ledger.last_round(manifest.digest())
                real = last is not None and last.round <= self._newest(manifest.digest())  # above it stands only a liar's round
                if last is not None and real and last.state is RoundState.OPEN:
                    self.watch.fail("R7", f"{party.name} still holds round {last.round} open")
            left = [path.name for path in (party.root / "rounds").iterdir() if bytes.fromhex(path.name) not in open_rounds]
            if left:
                self.watch.fail("R7", f"{party.name} keeps files of rounds that are over: {left}")
            with journal._engine.connect() as connection:
                runs = connection.exec_driver_sql("SELECT run FROM sealed_secrets").scalars().all()
            sealed = sum(bytes(run) not in open_rounds for run in runs)  # an open round that is left is a liar's: see above
            if sealed:
                self.watch.fail("R7", f"{party.name} keeps {sealed} sealed secrets of rounds that are over")
            self._check_descriptors(party.process, allowed=("journal.lock",))

    def _newest(self, run: bytes) -> int:
        state = self.coordinator.conductor.round(run) if self.coordinator.conductor else None
        return state.number if state else 0

    def _check_coordinator(self) -> None:
        party = self.coordinator
        assert party.store is not None
        assert party.process is not None
        spools = [str(path.relative_to(party.root)) for path in party.root.glob("spool/*/*")]
        if spools:
            self.watch.fail("leak", f"the coordinator keeps spools of rounds that are over: {spools[:3]}")
        with party.store.engine.connect() as connection:
            messages = connection.exec_driver_sql("SELECT count(*) FROM messages").scalar_one()
        if messages:
            self.watch.fail("leak", f"the store keeps {messages} messages of rounds that are over")
        if list((party.root / "artifacts" / "scratch").iterdir()):
            self.watch.fail("leak", "scratch files are left among the artifacts")
        self._check_descriptors(party.process, allowed=())
        self._check_checkpoints()

    def _check_checkpoints(self) -> None:
        """Every closed training round made one checkpoint, and nothing else did."""
        store = self.coordinator.store
        assert store is not None
        for manifest in self.scenario.manifests:
            run = manifest.digest()
            closed = [r.state for r in store.rounds(run) if r.state.phase == "closed" and r.state.kind is RoundKind.TRAIN]
            made = store.checkpoints(run)
            if [c.round for c in made] != [0, *(state.number for state in closed)]:
                self.watch.fail("counted", f"checkpoints of rounds {[c.round for c in made]}, closed {[s.number for s in closed]}")
            for state, base, checkpoint in zip(closed, made, made[1:], strict=False):
                if (state.base_digest, state.checkpoint) != (base.weights, checkpoint.weights):
                    self.watch.fail("counted", f"round {state.number} did not step from the checkpoint before it")

    def _check_descriptors(self, process: Process, allowed: tuple[str, ...]) -> None:
        left = [name for name in process.files.values() if not name.endswith(allowed or ("/nothing",))]
        if left:
            self.watch.fail("leak", f"{process.name} has {len(left)} files open in peace: {left[:3]}")

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
    root = Path(tempfile.mkdtemp(prefix="cosilo-simulation-", dir=_memory()))
    report = Report(scenario.seed, scenario.describe())
    collecting = gc.isenabled()
    gc.disable()  # what it finalises, and when, must not depend on anything but the seed
    gc.freeze()  # a collection looks at this simulation's objects, not at every module's
    try:
        world = World(scenario, root, tell)
        with _in_place(world):
            asyncio.set_event_loop(world.loop)
            try:
                world.loop.run_until_complete(world.run())
            except Stalled as stalled:
                world.watch.fail("progress", str(stalled))
            finally:
                asyncio.set_event_loop(None)
        _report(report, world)
    finally:
        discard_folder(root)
        gc.unfreeze()
        if collecting:
            gc.enable()
        gc.collect()
    return report


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
        for module, name, value in [*site_module.patches(world.network), *sums_module.patches(world.sums), *world.peers.patches()]:
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


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 1 << 30 else None
