"""`python -m tests.system.chaos --seed N`: one real federation, and every fault at every phase; nothing is lost, doubled or left behind.

A run is trained twice in one federation: once left alone, once with a fault in each round. A cell of the matrix is one such round: what is done
(a SIGKILL, a partition), to whom (the coordinator, a site, its trainer, two at once) and when (held in a phase, in the middle of a transfer, while
a database writes). Whoever dies is started again at once. Every deadline is patient, so the cohort stays whole and each checkpoint must be the
undisturbed one's to the bit. A failure prints its seed and the command that replays its cell. Knows faults and their moments; evidence is
chaos_federation's.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cosilo_common.identity.tls import RECEIVE_WINDOW_BYTES
from cosilo_common.transfer import CHUNK_BYTES
from cosilo_server.rounds.state import Phase
from tests.federation.faults import HOLDERS, HeldRound, cast_for, trainer_of
from tests.federation.local import COORDINATOR
from tests.federation.processes import FederationError, wait_until
from tests.federation.relay import Direction, Fault
from tests.system.chaos_federation import IMAGES, LARGE, PATIENT, SMALL, BreakableFederation, check_round, closed_with_all, plan

STEP_S: Final = 120.0
ROUND_S: Final = 10.0  # a round of a warm federation takes a tenth of it
AWAY_S: Final = 2.0  # a partition: longer than any backoff of these sites
TRANSFER_BYTES_PER_S: Final = 6e6  # ten MiB take a second and a half, in which to act
OVERHEAD: Final = 1.02  # TLS records and HTTP/2 frames
HANDSHAKE_BYTES: Final = 128 << 10  # of one connection, with what is said beside the transfer
RESENT_MAX: Final = CHUNK_BYTES + RECEIVE_WINDOW_BYTES
TRANSFER_CELLS_AT: Final = 9 << 20  # of the model's ten MiB
PATIENT_S: Final = PATIENT["training_s"]
TIGHT_S: Final = 6.0  # without progress; a round waits as long for a site that is gone
SLOW_TIGHT_S: Final = 8.0  # less than the ten seconds that the model takes at 1 MB/s
SLOW_BYTES_PER_S: Final = 1e6
SLOW_DELAY_S: Final = 0.1  # each way


class Who(StrEnum):
    """Who is hit."""

    COORDINATOR = "coordinator"
    SITE = "site"
    TRAINER = "trainer"
    COORDINATOR_AND_SITE = "coordinator+site"
    TWO_SITES = "two-sites"


class Blow(StrEnum):
    """What is done.

    PARTITION: every connection is reset and none can be made for AWAY_S. CUT: one connection is reset at a byte. ABSENT: killed, and started again
    only when the round is over. SLOW: 1 MB/s with a round trip of 200 ms, through a whole round with tight deadlines. STALL: nothing moves any more.
    """

    KILL = "kill"
    PARTITION = "partition"
    CUT = "cut"
    ABSENT = "absent"
    SLOW = "slow"
    STALL = "stall"


class Moment(StrEnum):
    """When, besides the phases."""

    DOWNLOAD = "mid-download"
    UPLOAD = "mid-upload"
    DATABASE = "database-write"


class Group(StrEnum):
    """Cells of one pair of runs; in the last two the cohort shrinks, or deadlines are tight, and there is no twin to compare with."""

    SMALL = "small"
    LARGE = "large"
    ABSENT = "absent"
    LINK = "link"


@dataclass(frozen=True)
class Cell:
    """One fault. copy: which of several at random moments."""

    when: Phase | Moment
    who: Who
    blow: Blow = Blow.KILL
    copy: int = 1

    @property
    def name(self) -> str:
        return f"{self.when.value}/{self.who.value}/{self.blow.value}" + (f"/{self.copy}" if self.copy > 1 else "")

    @property
    def group(self) -> Group:
        """Which runs it is played in."""
        if self.blow is Blow.ABSENT:
            return Group.ABSENT
        if self.blow in (Blow.SLOW, Blow.STALL):
            return Group.LINK
        return Group.LARGE if self.when in (Moment.DOWNLOAD, Moment.UPLOAD) else Group.SMALL


@dataclass
class Outcome:
    """What became of a cell."""

    cell: Cell
    seconds: float
    problem: str = ""
    resent_bytes: int | None = None


def matrix() -> list[Cell]:
    """Every cell, in order."""
    cells = []
    for phase in (Phase.GATHERING, *HOLDERS, Phase.OPENING):
        held = phase is not Phase.OPENING  # a site that dies there has given what the sum needs; the coordinator is what works
        cells += [Cell(phase, Who.COORDINATOR), Cell(phase, Who.COORDINATOR_AND_SITE)]
        cells += [Cell(phase, Who.SITE), Cell(phase, Who.TWO_SITES), Cell(phase, Who.SITE, Blow.PARTITION)] if held else []
        # What holds OPENING is a pipe in an upload's place, which lets go only of a process that dies.
        cells += [Cell(phase, Who.COORDINATOR, Blow.PARTITION)] if held else []
    cells += [Cell(Phase.TRAINING, Who.TRAINER), Cell(Phase.UPLOADING, Who.TRAINER)]
    cells += [Cell(Moment.DATABASE, who, copy=copy) for who in (Who.COORDINATOR, Who.SITE) for copy in (1, 2, 3, 4)]
    for moment in (Moment.DOWNLOAD, Moment.UPLOAD):
        cells += [Cell(moment, Who.SITE, Blow.CUT, copy) for copy in (1, 2, 3)]
        cells += [Cell(moment, Who.SITE), Cell(moment, Who.COORDINATOR), Cell(moment, Who.COORDINATOR_AND_SITE)]
        cells += [Cell(moment, Who.SITE, Blow.PARTITION)]
        cells += [Cell(moment, Who.SITE, Blow.STALL)]
    cells += [Cell(phase, Who.SITE, Blow.ABSENT) for phase in HOLDERS]
    cells += [Cell(Moment.DOWNLOAD, Who.SITE, Blow.SLOW)]  # it is slow in every phase
    return cells


UNTRAINED: Final = (Phase.GATHERING, Phase.TRAINING, Moment.DOWNLOAD, Moment.DATABASE)  # a site that dies then may have to train again
QUICK: Final = tuple(
    Cell(when, who, blow)
    for when, who, blow in (
        (Phase.TRAINING, Who.COORDINATOR, Blow.KILL),
        (Phase.UPLOADING, Who.SITE, Blow.PARTITION),
        (Phase.CONSENTING, Who.COORDINATOR_AND_SITE, Blow.KILL),
        (Phase.OPENING, Who.COORDINATOR, Blow.KILL),
        (Moment.DATABASE, Who.COORDINATOR, Blow.KILL),
    )
)


class Chaos:
    """Pairs of runs in one federation, and one fault after another in the second of each."""

    def __init__(self, federation: BreakableFederation, seed: int, say: Callable[[str], None] = lambda _: None) -> None:
        self._federation = federation
        self._seed = seed
        self._say = say
        self._everybody = (COORDINATOR, *federation.sites)
        self.trainings_before: dict[str, float] = {}

    def play(self, cells: Sequence[Cell], out_of_time: Callable[[], bool] = lambda: False) -> list[Outcome]:
        """Each cell in a round of its own, in this order, small models first. Stops after the first that fails."""
        outcomes: list[Outcome] = []
        for group in Group:
            chosen = [cell for cell in cells if cell.group is group]
            if not chosen:
                continue
            if group in (Group.SMALL, Group.LARGE):
                undisturbed, run = self._pair(f"{group.value}-{self._seed}", LARGE if group is Group.LARGE else SMALL, len(chosen))
            else:
                undisturbed, run = [], ""
            for place, cell in enumerate(chosen):
                if out_of_time():
                    self._say("out of time: the rest of the cells is left out")
                    return outcomes
                began, outcome = time.monotonic(), Outcome(cell, 0.0)
                try:
                    if undisturbed:
                        outcome.resent_bytes = self._one(cell, run, undisturbed[place])
                    else:
                        self._alone(cell)
                except (FederationError, AssertionError) as error:
                    outcome.problem = str(error)
                outcome.seconds = time.monotonic() - began
                outcomes.append(outcome)
                self._say(f"{'FAILED' if outcome.problem else 'ok':<7}{cell.name:<44}{outcome.seconds:6.1f} s")
                if outcome.problem:
                    return outcomes
        return outcomes

    def _pair(self, name: str, architecture: dict[str, Any], rounds: int) -> tuple[list[dict[str, Any]], str]:
        """The rounds of a run that is left alone, and its twin."""
        federation = self._federation
        alone, disturbed = (
            federation.create_run(plan(f"{name}-{kind}", self._seed + 1000 * len(name), architecture)) for kind in ("alone", "disturbed")
        )
        for run in (alone, disturbed):
            federation.accept_all(run)
        undisturbed = federation.run_rounds(alone, rounds)
        closed_with_all(federation, undisturbed)
        return undisturbed, disturbed

    def _one(self, cell: Cell, run: str, expected: dict[str, Any]) -> int | None:
        federation, chance = self._federation, random.Random(f"{self._seed}/{cell.name}")
        sites = sorted(federation.sites)
        first, second = chance.sample(sites, 2)
        victims = {
            Who.COORDINATOR: [COORDINATOR],
            Who.SITE: [first],
            Who.TRAINER: [first],
            Who.COORDINATOR_AND_SITE: [COORDINATOR, first],
            Who.TWO_SITES: [first, second],
        }[cell.who]
        federation.wait_connected()
        images = federation.images()
        carried = {site: dict(relay.carried) for site, relay in federation.relays.items()}
        if isinstance(cell.when, Phase):
            self._hit_in_phase(cell, cell.when, run, victims)
        elif cell.when is Moment.DATABASE:
            self._hit_while_writing(run, victims, chance)
        else:
            self._hit_in_transfer(cell, run, victims, chance)
        federation.bring_back(self._everybody)
        federation.wait_idle(run)
        federation.check_alive()
        entry = federation.rounds(run)[-1]
        federation.wait_told(run, entry["round"])
        died = [who for who in victims if who != COORDINATOR] if cell.blow is Blow.KILL else []
        retrained = died if cell.when in UNTRAINED else []  # later, what was trained is on the disk
        check_round(federation, run, entry, expected, retrained)
        self._check_images(images, died)
        federation.wait_tidy()
        if cell.group is not Group.LARGE:
            return None
        return self._check_resent(cell, first, carried[first], entry)

    def _alone(self, cell: Cell) -> None:
        """A cell without a twin: a run of its own, one warm round of it, then the fault in the next."""
        federation = self._federation
        victim = random.Random(f"{self._seed}/{cell.name}").choice(sorted(federation.sites))
        others = [site for site in sorted(federation.sites) if site != victim]
        absent = cell.blow is Blow.ABSENT
        patient = {"training_s": PATIENT_S} if cell.when is not Phase.TRAINING and absent else {}
        tight = dict.fromkeys(PATIENT, TIGHT_S if absent else SLOW_TIGHT_S) | {
            "consenting_s": PATIENT_S,
            "revealing_s": PATIENT_S,
            **patient,
        }
        federation.wait_connected()
        seed = self._seed + 7919 * (1 + [one.name for one in matrix()].index(cell.name))
        shape = SMALL if absent else LARGE
        warm = federation.create_run(plan(f"warm-{seed}", seed, shape))  # the trainers start under no deadline
        run = federation.create_run(plan(f"alone-{seed}", seed + 1, shape, deadlines=tight))
        for one in (warm, run):
            federation.accept_all(one)
        closed_with_all(federation, federation.run_rounds(warm, 1))
        if absent:
            assert isinstance(cell.when, Phase)
            with HeldRound(federation, run, cast_for(federation.sites, cell.when, victim)) as held:
                held.walk_to(cell.when)
                federation.kill(victim)
        else:
            self._hinder(cell, run, victim)
        federation.wait_idle(run)
        entry = federation.rounds(run)[-1]
        federation.relays[victim].set_fault(Fault.NONE)
        federation.relays[victim].shape(None, 0.0)
        federation.bring_back(self._everybody)
        summed = cell.when in (Phase.CONSENTING, Phase.REVEALING) or cell.blow is Blow.SLOW
        found = (entry["phase"], entry["attempt"], entry["survivors"])
        expected = ("closed", 2 if cell.when is Phase.SHARING else 1, sorted(federation.sites) if summed else others)
        uploads = federation.counted_uploads(run, entry["round"])
        twice = [f"{site}'s update was counted {n} times" for (site, _), n in uploads.items() if n != 1]
        lost = [
            f"{site}'s update is in the sum and was never taken" for site in entry["survivors"] if (site, entry["attempt"]) not in uploads
        ]
        again = [f"{site} trained {n} times" for site in others if (n := federation.trained(site, run, entry["round"])) != 1]
        if found != expected or twice or lost or again:
            raise FederationError(f"{found}, expected {expected}; {'; '.join([*twice, *lost, *again])}", federation.log_files())
        federation.wait_tidy()

    def _hinder(self, cell: Cell, run: str, victim: str) -> None:
        """Makes the victim's link slow for the round, or stalls it in the middle of a transfer."""
        relay = self._federation.relays[victim]
        direction = Direction.DOWN if cell.when is Moment.DOWNLOAD else Direction.UP
        relay.shape(SLOW_BYTES_PER_S, SLOW_DELAY_S)
        goal = relay.carried[direction] + 3 * CHUNK_BYTES
        self._federation.start_rounds(run, 1)
        if cell.blow is Blow.STALL:
            wait_until(
                lambda: relay.carried[direction] >= goal, f"{victim}'s link carried {goal} bytes {direction.value}", STEP_S, poll_s=0.02
            )
            relay.set_fault(Fault.STALL)

    # --- the moments ---

    def _hit_in_phase(self, cell: Cell, phase: Phase, run: str, victims: Sequence[str]) -> None:
        """Holds the round in the phase, strikes, and lets everybody go on."""
        federation = self._federation
        place = next((who for who in victims if who != COORDINATOR), COORDINATOR)
        with HeldRound(federation, run, cast_for(federation.sites, phase, place)) as held:
            held.walk_to(phase)
            if cell.blow is Blow.PARTITION:
                relays = [federation.relays[site] for site in (federation.sites if victims == [COORDINATOR] else victims)]
                for relay in relays:
                    relay.refuse(True)
                held.let_go()
                time.sleep(AWAY_S)  # the length of the fault itself
                for relay in relays:
                    relay.refuse(False)
                return
            for who in victims:
                self._kill(who, trainer=cell.who is Who.TRAINER)
            held.put_back()
            federation.bring_back([who for who in victims if who == COORDINATOR])
        federation.bring_back(self._everybody)

    def _hit_while_writing(self, run: str, victims: Sequence[str], chance: random.Random) -> None:
        """Kills after so many growths of the victim's write-ahead log."""
        (who,) = victims
        folder = self._federation.data if who == COORDINATOR else self._federation.state(who)
        log, seen, left = folder / "state.db-wal", (0, 0), chance.randint(2, 14)
        self._federation.start_rounds(run, 1)
        deadline = time.monotonic() + ROUND_S  # fewer growths were seen than there were: it is then killed after the round
        while left and time.monotonic() < deadline:
            now = (log.stat().st_mtime_ns, log.stat().st_size) if log.exists() else (0, 0)
            left, seen = left - (now != seen), now
            time.sleep(0.002)
        self._federation.kill(who)

    def _hit_in_transfer(self, cell: Cell, run: str, victims: Sequence[str], chance: random.Random) -> None:
        """Strikes once the first site's link has carried so many bytes of a transfer."""
        federation = self._federation
        site = next((who for who in victims if who != COORDINATOR), sorted(federation.sites)[0])
        relay = federation.relays[site]
        direction = Direction.DOWN if cell.when is Moment.DOWNLOAD else Direction.UP
        goal = relay.carried[direction] + chance.randint(CHUNK_BYTES // 4, TRANSFER_CELLS_AT - CHUNK_BYTES)
        federation.forget_weights()  # the twin's, which are the same
        relay.shape(TRANSFER_BYTES_PER_S, 0.0)
        try:
            federation.start_rounds(run, 1)
            wait_until(
                lambda: relay.carried[direction] >= goal, f"{site}'s link carried {goal} bytes {direction.value}", STEP_S, poll_s=0.005
            )
            match cell.blow:
                case Blow.CUT:
                    relay.cut()
                case Blow.PARTITION:
                    relay.refuse(True)
                    time.sleep(AWAY_S)  # the length of the fault itself
                    relay.refuse(False)
                case Blow.KILL:
                    for who in victims:
                        self._kill(who, trainer=False)
        finally:
            relay.shape(None, 0.0)

    def _kill(self, who: str, *, trainer: bool) -> None:
        if not trainer:
            self._federation.kill(who)
        elif (process := trainer_of(self._federation, who)) is not None:
            os.kill(process.pid, 9)

    # --- what must hold besides ---

    def _check_images(self, before: dict[str, float], died: Sequence[str]) -> None:
        """Who lived through the round trained once, and on every image of a round once."""
        after = self._federation.images()
        wrong = {site: after[site] - before[site] for site in before if site not in died and after[site] != before[site] + IMAGES}
        if wrong:
            raise FederationError(f"sites that nobody killed trained on {wrong} images and not {IMAGES}", self._federation.log_files())

    def _check_resent(self, cell: Cell, site: str, before: dict[Direction, int], entry: dict[str, Any]) -> int:
        """Bytes of the struck site's transfer that went over its link twice; at most RESENT_MAX and the handshakes."""
        direction = Direction.DOWN if cell.when is Moment.DOWNLOAD else Direction.UP
        whole = self._federation.artifact(entry["base"]).stat().st_size
        carried = self._federation.relays[site].carried[direction] - before[direction]
        resent = carried - int(OVERHEAD * whole)
        if resent > RESENT_MAX + 4 * HANDSHAKE_BYTES:
            raise FederationError(f"{cell.name}: {carried} bytes went {direction.value} for a model of {whole}")
        return max(0, resent)


def table(outcomes: Sequence[Outcome]) -> str:
    """Injected and survived, by what and when."""
    columns = list(dict.fromkeys(f"{o.cell.who.value} {o.cell.blow.value}" for o in outcomes))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        key = f"{outcome.cell.who.value} {outcome.cell.blow.value}"
        counts[outcome.cell.when.value][f"{key} injected"] += 1
        counts[outcome.cell.when.value][f"{key} survived"] += not outcome.problem
    lines = [f"{'survived/injected':<18}" + "".join(f"{column:>24}" for column in columns)]
    for when, row in counts.items():
        cells = (f"{row[f'{c} survived']}/{row[f'{c} injected']}" if row[f"{c} injected"] else "-" for c in columns)
        lines.append(f"{when:<18}" + "".join(f"{cell:>24}" for cell in cells))
    resent = [o.resent_bytes for o in outcomes if o.resent_bytes is not None]
    if resent:
        mean = sum(resent) / len(resent) / 2**20
        lines.append(f"sent again after a cut: {mean:.2f} MiB in the mean, {max(resent) / 2**20:.2f} at most, of {len(resent)} cuts")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.chaos", description="Breaks a federation at every phase, by seed.")
    parser.add_argument("--seed", type=int, default=1, help="of the order, the victims and the moments")
    parser.add_argument("--minutes", type=float, default=30.0, help="begins no further cell after so long")
    parser.add_argument("--cells", type=int, default=0, help="only so many cells of the matrix, drawn by the seed")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="only this cell, as in training/coordinator/kill; repeatable"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the folder go too
    chance = random.Random(options.seed)
    cells = matrix()
    chance.shuffle(cells)
    if options.only:
        cells = [cell for cell in cells if cell.name in options.only]
        if len(cells) != len(set(options.only)):
            parser.error(f"no such cell; there are {', '.join(cell.name for cell in matrix())}")
    cells = cells[: options.cells] if options.cells else cells
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cosilo-chaos-") as scratch, BreakableFederation(Path(scratch)) as federation:
        print(f"seed {options.seed}: {len(cells)} cells, one coordinator and {len(federation.sites)} sites", flush=True)
        federation.start()
        outcomes = Chaos(federation, options.seed, lambda line: print(line, flush=True)).play(
            cells, lambda: time.monotonic() - began > 60 * options.minutes
        )
        failed = [outcome for outcome in outcomes if outcome.problem]
        print("\n" + table(outcomes))
        print(f"{len(outcomes) - len(failed)} of {len(outcomes)} faults survived in {time.monotonic() - began:.0f} s")
        for outcome in failed:
            print(f"\n{outcome.cell.name}: {outcome.problem}\n")
            print(f"replay: python -m tests.system.chaos --seed {options.seed} --only {outcome.cell.name}")
    return 1 if failed or len(outcomes) < len(cells) else 0


if __name__ == "__main__":
    sys.exit(main())
