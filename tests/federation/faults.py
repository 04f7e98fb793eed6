"""Faults at a chosen phase of a masked round: who is killed, and when, without a sleep that hopes.

A phase lasts until enough sites have delivered what it asks. So a phase is held by stopping (SIGSTOP) sites that still owe it, and a round
is walked from phase to phase: whoever shall hold the next one is stopped once it has delivered, then whoever holds this one goes on.
Owns that walk, for four sites of which one may drop (f = 1, t = 3). Must not know what is trained or what is asserted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import psutil

from cosilo_server.cli.commands import Seat
from cosilo_server.cli.connection import connect
from cosilo_server.cli.follow import fetch_rounds
from cosilo_server.cli.shapes import RoundShape
from cosilo_server.cli.terminal import CoordinatorUnreachable
from cosilo_server.rounds.state import Phase
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError, wait_until

Found = TypeVar("Found")

SITES: Final = 4
STEP_TIMEOUT_S: Final = 120.0  # cold trainers of four sites on two busy cores; a step of warm ones takes a tenth of a second
TRAINER_MODULE: Final = "cosilo_client.trainer.worker"

# Which of the four are stopped so that a phase lasts: who is new in a line has delivered what the phase before asks. Three consents end
# CONSENTING, so two hold it; and of the three that hold REVEALING, one has not consented.
HOLDERS: Final[dict[Phase, tuple[int, ...]]] = {
    Phase.TRAINING: (0,),  # its trainer is stopped, the daemon is not
    Phase.SHARING: (1,),
    Phase.UPLOADING: (0,),
    Phase.CONSENTING: (1, 2),
    Phase.REVEALING: (0, 2, 3),
}


def fail_at(federation: LocalFederation, run: str, phase: Phase, who: str, sites: Collection[str] = ()) -> None:
    """Asks for one more round of a run, kills `who` (SIGKILL) in `phase`, and lets the others go on.

    who: a site, which is killed while it owes what the phase asks, from TRAINING to REVEALING; or the coordinator, from GATHERING to
    OPENING, which is started again before anybody goes on. sites: the run's four, by default all of the federation's, connected.
    """
    with HeldRound(federation, run, cast_for(sites or federation.sites, phase, who)) as held:
        held.walk_to(phase)
        federation.kill(who)
        if who == COORDINATOR:
            held.put_back()
            federation.restart(COORDINATOR)


class HeldRound:
    """One round, asked for and walked to a phase in which it stays until this context ends.

    cast: the run's four sites, in the order of HOLDERS' places. Leaving the context lets every site go on.
    """

    def __init__(self, federation: LocalFederation, run: str, cast: Collection[str]) -> None:
        self._federation = federation
        self._run = run
        self._cast = tuple(cast)
        if len(self._cast) != SITES:
            raise FederationError(f"a round is held with {SITES} sites, not {len(self._cast)}")
        self._held: dict[str, psutil.Process] = {}
        self._stack = ExitStack()
        self._hidden: tuple[Path, Path] | None = None
        self.number = 0

    def __enter__(self) -> Self:
        self._coordinator = self._stack.enter_context(connect(Seat(self._federation.folder / "admin")))
        self._stack.callback(self.let_go)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def walk_to(self, phase: Phase) -> RoundShape:
        """Asks for a round and brings it to `phase`; returns it as it then stands."""
        if phase is Phase.GATHERING:
            return self._gather()
        return next(entry for entry in self.walk() if entry["phase"] == phase)

    def walk(self) -> Iterator[RoundShape]:
        """Asks for a round and goes through its phases from TRAINING to OPENING, resting in each for as long as the loop's body takes."""
        self._count_rounds()
        self._within(self._all_connected, "every site is connected")
        self._hold_training()
        before: tuple[int, ...] = ()
        for phase, holders in HOLDERS.items():
            if phase is not Phase.TRAINING:
                for place in holders:
                    if place not in before:
                        self._stop(self._cast[place])
                for place in before:
                    if place not in holders:
                        self._go_on(self._cast[place])
            before = holders
            yield self._wait(phase, [site for place, site in enumerate(self._cast) if place not in holders])
        self._hide_upload()
        for site in self._cast:
            self._go_on(site)
        yield self._wait(Phase.OPENING, ())

    def let_go(self) -> None:
        """Lets whoever is stopped and still lives go on, and puts back what was hidden."""
        for name in list(self._held):
            self._go_on(name)
        self.put_back()

    def put_back(self) -> None:
        """Puts the upload that holds OPENING back in its place."""
        if self._hidden is not None:
            path, aside = self._hidden
            aside.replace(path)
            self._hidden = None

    # --- one step ---

    def _count_rounds(self) -> None:
        self.number = len(fetch_rounds(self._coordinator, bytes.fromhex(self._run))) + 1

    def _gather(self) -> RoundShape:
        """A round that waits for a site: stopped, and so not back after the coordinator was."""
        self._count_rounds()
        self._stop(self._cast[0])
        self._federation.kill(COORDINATOR)
        self._federation.restart(COORDINATOR)
        self._federation.start_rounds(self._run, 1)
        return self._wait(Phase.GATHERING, ())

    def _hold_training(self) -> None:
        """Starts the round with the first site's trainer stopped: before it has work where it is warm, else as soon as it is there."""
        site = self._cast[0]
        warm = trainer_of(self._federation, site)
        if warm is not None:
            self._hold(site, warm)
        self._federation.start_rounds(self._run, 1)
        if warm is None:
            self._hold(site, self._within(lambda: trainer_of(self._federation, site), f"{site} has a trainer"))
        self._within(lambda: self._activity(site) == "training", f"{site} trains")

    def _hide_upload(self) -> None:
        """Puts a pipe that nobody writes in the place of an upload: the coordinator waits for it while it opens the sum."""
        path = self._federation.data / "spool" / self._run / str(self.number) / self._cast[0]
        aside = self._federation.root / f"hidden-{self._cast[0]}"
        path.replace(aside)
        os.mkfifo(path)
        self._hidden = (path, aside)

    def _stop(self, site: str) -> None:
        self._hold(site, psutil.Process(self._federation.daemon(site).pid))

    def _hold(self, site: str, process: psutil.Process) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        self._held[site] = process

    def _go_on(self, site: str) -> None:
        process = self._held.pop(site, None)
        if process is not None and process.is_running():
            os.kill(process.pid, signal.SIGCONT)

    # --- what the coordinator says ---

    def _wait(self, phase: Phase, delivered: Collection[str]) -> RoundShape:
        """Returns the round once it is in the phase and these sites have given what it asks."""

        def there() -> RoundShape | None:
            entry = self._entry()
            if entry is None or entry["phase"] != phase:
                _refuse_end(entry, phase)
                return None
            done = {site["site"] for site in entry["sites"] if site["delivered"]}
            return entry if done >= set(delivered) else None

        what = f"round {self.number} is {phase} and {', '.join(delivered) or 'nobody'} has delivered"
        return self._within(there, what)

    def _within(self, condition: Callable[[], Found | None], what: str) -> Found:
        """`wait_until`, with everybody's log where it is in vain."""
        try:
            found = wait_until(condition, what, STEP_TIMEOUT_S)
        except FederationError as error:
            raise FederationError(error.what, self._federation.log_files()) from None
        assert found is not None  # what `wait_until` returns is truthy
        return found

    def _entry(self) -> RoundShape | None:
        try:
            rounds = fetch_rounds(self._coordinator, bytes.fromhex(self._run))
        except CoordinatorUnreachable:
            return None
        return rounds[self.number - 1] if len(rounds) >= self.number else None

    def _activity(self, site: str) -> str:
        entry = self._entry()
        return "" if entry is None else next((s["activity"] for s in entry["sites"] if s["site"] == site), "")

    def _all_connected(self) -> bool:
        return self._federation.metric(COORDINATOR, "cosilo_sites_connected") >= len(self._federation.sites)


def trainer_of(federation: LocalFederation, site: str) -> psutil.Process | None:
    """A site's trainer process, where it has one now."""
    return next((child for child in federation.daemon(site).offspring() if TRAINER_MODULE in _command_line(child)), None)


def cast_for(sites: Collection[str], phase: Phase, who: str) -> list[str]:
    """The sites, with `who` (where it is a site) in a place that holds the phase."""
    others = sorted(set(sites) - {who})
    place = HOLDERS.get(phase, (0,))[0]
    return others if who == COORDINATOR else [*others[:place], who, *others[place:]]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _refuse_end(entry: RoundShape | None, wanted: Phase) -> None:
    if entry is not None and entry["phase"] in (Phase.CLOSED, Phase.ABANDONED):
        raise FederationError(f"round {entry['round']} is {entry['phase']} ({entry['reason']}) and should have been {wanted}")
