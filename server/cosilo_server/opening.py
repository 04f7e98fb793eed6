"""A round's sum off the event loop: added to while uploads come, opened once the survivors have revealed, let go when the round is over.

Owns which thread does that, and how many at once: one sum is added to at a time, so that transfers keep their threads. Must not know when a round
is opened or what becomes of it, nor the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import RoundCloser, RoundOutcome
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import SumOpened, SumRefused
from cosilo_server.rounds.state import Phase, Round
from cosilo_server.store import StoredCheckpoint
from cosilo_server.trace import RoundTrace

log = structlog.get_logger(__name__)

Opened = tuple[RoundOutcome, StoredCheckpoint | None]


class SumOpener:
    """Has a closer's blocking calls made in threads. Raises nothing but what cancels it."""

    def __init__(self, closer: RoundCloser, trace: RoundTrace, metrics: CoordinatorMetrics) -> None:
        self._closer = closer
        self._trace = trace
        self._metrics = metrics
        self._adding = asyncio.Lock()

    async def add(self, state: Round, site: str, current: Callable[[], Round | None]) -> None:
        """Adds an upload to the round's sum while others are on their way. current: the run's newest round by then."""
        async with self._adding:
            now = current()
            if now is None or (now.number, now.attempt, now.phase) != (state.number, state.attempt, Phase.UPLOADING):
                return
            try:
                with self._trace.step(state, "sum early"):
                    await asyncio.to_thread(self._closer.sum_early, state, site)
            except (CosiloError, OSError) as error:  # the uploads stand, and the sum is opened from them
                log.warning("no sum before the last upload", run=state.run.hex()[:12], round=state.number, reason=str(error))

    async def open(self, manifest: Manifest, state: Round) -> tuple[Opened | None, SumOpened | SumRefused]:
        """What the sum tells, where it was opened; and the event that ends the phase."""
        began = time.monotonic()
        try:
            opened = await asyncio.to_thread(self._closer.open, manifest, state, partial(self._trace.step, state))
            outcome, checkpoint = opened
            self._metrics.sum_opened(state.run, outcome, time.monotonic() - began)
        except CosiloError as error:
            log.error("sum refused", run=state.run.hex()[:12], round=state.number, reason=str(error))
            return None, SumRefused(str(error))
        except OSError as error:
            return None, SumRefused(f"opening the sum: {error}")
        except Exception as error:  # no site and no deadline ends this phase: a fault of this program must
            log.exception("sum not opened", run=state.run.hex()[:12], round=state.number)
            return None, SumRefused(f"opening the sum failed: {type(error).__name__}")
        terms = manifest.correction
        if state.kind is RoundKind.TRAIN and terms is not None and terms.due(state.number) and not outcome.corrected:
            self._metrics.corrections_failed.inc()
            log.warning("average not corrected", run=state.run.hex()[:12], round=state.number, reason=outcome.note)
        return opened, SumOpened(checkpoint.weights if checkpoint else state.base_digest)

    async def forget(self, state: Round) -> None:
        """Lets go of what is held for a round that is over, once nothing is added to it any more."""
        async with self._adding:
            self._closer.forget(state.run, state.number)
