"""Does what is owed: holds the newest assignment of each run, works on one piece at a time, and survives every failure.

Level-triggered: `owe` replaces everything that was owed before, and what was being done for an assignment that no
longer stands is cancelled. Owns what becomes of a failure: a decline with a code, another try later, or nothing until
the coordinator says something new. Must not know gRPC, nor what a phase asks.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy.exc import DatabaseError

from cosilo_client.coordinator import Refused, Unreachable
from cosilo_client.duties import Duties, Site, Unwilling, WentBack
from cosilo_client.owed import Activity, Decline, DeclineCode, Owed, Phase, Progress
from cosilo_client.trainer.jobs import FailureCode, TrainerFailed
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.telemetry import get_logger
from cosilo_common.transfer import Refusal as TransferRefusal
from cosilo_common.transfer import TransferError

LOOK_AGAIN_S: Final = 3.0  # an acceptance or an hour of the day arrives without a message; a person waits for it
RETRY_S: Final = 20.0  # after tries enough over a link that stands: the coordinator may be short of something
UNEXPECTED_MAX: Final = 5  # failures of this program in one round before it is left to the others
RUNS_KEPT_MAX: Final = 2000  # twice what one snapshot holds: the coordinator may name as many runs as it likes
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

log = get_logger("cosilo.participation")


class Participation:
    """Every run of this site. Call `owe` from the event loop; `close` ends all work and waits for it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._runs: dict[bytes, RunWork] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def owe(self, snapshot: Sequence[Owed]) -> None:
        """Takes everything that this site owes now; a run that is not in it owes nothing."""
        owed = {one.run: one for one in snapshot}
        for run in owed.keys() - self._runs.keys():
            self._runs[run] = RunWork(self._site, run)
        for run, work in self._runs.items():
            work.owe(owed.get(run))
        self._drop_beyond(owed)

    def _drop_beyond(self, owed: Mapping[bytes, Owed]) -> None:
        """Ends the work of runs that owe nothing any more, the longest known first, where too many are kept."""
        idle = [run for run in self._runs if run not in owed]
        for run in idle[: max(0, len(self._runs) - RUNS_KEPT_MAX)]:
            ending = asyncio.create_task(self._runs.pop(run).close(), name=f"end of run {run.hex()[:12]}")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Cancels what is being done; a call into the journal that has begun is let finish."""
        await asyncio.gather(*(work.close() for work in self._runs.values()), *self._ending)


class RunWork:
    """One run: a loop that does one piece after another for the newest assignment, in a task of its own."""

    def __init__(self, site: Site, run: bytes) -> None:
        self._site = site
        self._duties = Duties(site, run)
        self._owed: Owed | None = None
        self._news = asyncio.Event()
        self._piece: asyncio.Task[float | None] | None = None
        self._given_up: set[tuple[object, ...]] = set()
        self._said: tuple[int, DeclineCode, str] | None = None
        self._unexpected = 0
        self._loop = asyncio.create_task(self._work(), name=f"run {run.hex()[:12]}")

    def owe(self, owed: Owed | None) -> None:
        """Replaces what was owed, and cancels work that it no longer asks for."""
        before, self._owed = self._owed, owed
        if self._piece is not None and piece_of(before) != piece_of(owed):
            self._piece.cancel()
        if owed is not None and (before is None or before.round != owed.round):
            self._given_up.clear()
            self._said, self._unexpected = None, 0
        self._news.set()

    async def close(self) -> None:
        """Ends the loop and the piece in work."""
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            owed = self._owed
            if owed is None:
                continue
            self._piece = asyncio.create_task(self._perform(owed), name=f"{owed.label} {owed.phase.name}")
            try:
                await asyncio.wait({self._piece})
            except asyncio.CancelledError:
                self._piece.cancel()
                await asyncio.wait({self._piece})
                raise
            piece, self._piece = self._piece, None
            if piece.cancelled():
                self._news.set()
            elif (pause_s := piece.result()) is not None:
                await self._wait(pause_s)

    async def _wait(self, pause_s: float) -> None:
        """Waits for news, or looks again after a while."""
        try:
            async with asyncio.timeout(pause_s):
                await self._news.wait()
        except TimeoutError:
            self._news.set()

    async def _perform(self, owed: Owed) -> float | None:
        """Does one piece and decides what follows: seconds until the next look, or None until there is news."""
        if not owed.phase.ended and not self._given_up.isdisjoint(_keys(owed)):
            return None
        try:
            again = await self._duties.perform(owed)
            if owed.phase is Phase.GATHERING and self._said is not None:  # it declined, and is willing now
                self._said = None
                self._site.coordinator.say(Progress(owed.run, owed.round, Activity.FETCHING, 0))
            return 0.0 if again else None
        except Unwilling as unwilling:
            self._decline(owed, unwilling.refusal.code, unwilling.refusal.reason)
            return LOOK_AGAIN_S
        except Refused as error:
            log.warning("the coordinator refused", round=owed.label, phase=owed.phase.name, reason=str(error))
            return None
        except Unreachable as error:
            log.warning("could not be sent", round=owed.label, phase=owed.phase.name, reason=str(error))
            return RETRY_S
        except ProtocolViolation as error:
            reached = error.reached if isinstance(error, WentBack) else 0
            self._give_up(owed, DeclineCode.PROTOCOL, str(error), (owed.round, owed.attempt, owed.phase), reached)
            return None
        except (CosiloError, OSError) as error:
            self._give_up(owed, code_of(error), str(error), (owed.round,))
            return None
        except DatabaseError as error:  # the disk is full, most likely: the journal is as it was, and the same is tried again
            self._decline(owed, DeclineCode.DISK, f"the journal cannot be written: {error.orig}")
            return RETRY_S
        except Exception as error:  # a fault of this program must not end the daemon; its trace is in the log
            log.exception("failed unexpectedly", round=owed.label, phase=owed.phase.name)
            self._unexpected += 1
            if self._unexpected < UNEXPECTED_MAX:
                return RETRY_S
            self._give_up(owed, DeclineCode.TRAINER, type(error).__name__, (owed.round,))
            return None

    def _give_up(self, owed: Owed, code: DeclineCode, reason: str, key: tuple[object, ...], reached: int = 0) -> None:
        self._given_up.add(key)
        self._decline(owed, code, reason, reached)

    def _decline(self, owed: Owed, code: DeclineCode, reason: str, reached: int = 0) -> None:
        if self._said != (owed.round, code, reason):
            self._said = (owed.round, code, reason)
            log.warning("declined", round=owed.label, code=code.name, reason=reason)
        self._site.coordinator.say(Decline(owed.run, owed.round, code, reached))


def piece_of(owed: Owed | None) -> tuple[object, ...]:
    """What must stay the same for work on it to go on. Training serves every attempt of its round."""
    if owed is None:
        return ()
    attempt = 0 if owed.phase is Phase.TRAINING else owed.attempt
    return owed.round, owed.kind, owed.base_digest, owed.phase, owed.invited, attempt


def code_of(error: CosiloError | OSError) -> DeclineCode:
    """The one word about a failure that the coordinator is told."""
    if isinstance(error, TrainerFailed):
        codes = {FailureCode.DATA: DeclineCode.DATA, FailureCode.DISK: DeclineCode.DISK}
        return codes.get(error.code, DeclineCode.TRAINER)
    if isinstance(error, OSError):
        return DeclineCode.DISK if error.errno in _NO_SPACE else DeclineCode.TRAINER
    if isinstance(error, TransferError):
        return DeclineCode.DISK if error.refusal is TransferRefusal.DISK else DeclineCode.PROTOCOL
    if error.operation in ("check free space", "write the upload"):
        return DeclineCode.DISK
    return DeclineCode.PROTOCOL


def _keys(owed: Owed) -> set[tuple[object, ...]]:
    return {(owed.round,), (owed.round, owed.attempt, owed.phase)}
