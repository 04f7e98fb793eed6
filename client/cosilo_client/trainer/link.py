"""The daemon's end of the trainer: hands it jobs, keeps it warm, halves its batch for memory, survives its death.

Owns when a trainer process starts and stops. Must not know torch, rounds or keys. At most one job runs at a time.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from cosilo_client.trainer.jobs import FailureCode, Job, Progress, Result, TrainerFailed, TrainJob
from cosilo_client.trainer.process import SOCKETS, TrainerConfig, TrainerProcess

__all__ = ["TrainerConfig", "TrainerLink"]

log = logging.getLogger("cosilo.trainer")


class TrainerLink:
    """Runs jobs in the trainer process: `result = await link.run(job, on_progress)`.

    restarts: how often a trainer was started again because memory ran out or the one before had died. Sockets that a killed daemon left in
    the folder are removed: whoever makes a link holds the folder's lock.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        for left in config.folder.glob(SOCKETS):
            left.unlink(missing_ok=True)
        self._one_job = asyncio.Lock()
        self._worker: TrainerProcess | None = None
        self._idle: asyncio.Task[None] | None = None
        self._micro_batches: dict[tuple[object, ...], int] = {}
        self._closed = False
        self._lost = False
        self.restarts = 0

    async def run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        """Do one job; on_progress is called in this task.

        Out of memory restarts the trainer once with half the micro-batch, which is remembered; a trainer that somebody killed starts once
        more as it was. Raises TrainerFailed for
        anything else that goes wrong, the trainer's death included. Cancelling ends the trainer's process: it may be
        deep in a step.
        """
        async with self._one_job:
            await self._stop_idling()
            try:
                return await self._run_or_halve(job, on_progress)
            except BaseException:
                if isinstance(job, TrainJob):
                    job.update.with_name(job.update.name + ".part").unlink(missing_ok=True)
                raise
            finally:
                if self._worker is not None and not self._closed:
                    self._idle = asyncio.create_task(self._stop_when_idle(), name="trainer idle")

    async def close(self) -> None:
        """Stop the trainer, a running job's too; nothing is left running. A job in progress raises TrainerFailed."""
        self._closed = True
        await self._stop_idling()
        await self._stop_worker()

    async def rest(self) -> None:
        """Stop the trainer as soon as no job runs, however long it would stay warm; the next job starts another."""
        async with self._one_job:
            await self._stop_idling()
            await asyncio.shield(self._stop_worker())

    def process_ids(self) -> tuple[int, ...]:
        """The trainer's processes, one a rank; none while it is not running."""
        return self._worker.process_ids() if self._worker is not None and self._worker.alive else ()

    async def _run_or_halve(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        if not isinstance(job, TrainJob):
            return await self._attempt(job, on_progress)
        shape = (job.architecture, job.training.batch_size)
        whole = -(-job.training.batch_size // self._config.processes)
        micro = self._micro_batches.get(shape, job.micro_batch or whole)
        try:
            return await self._attempt(job.model_copy(update={"micro_batch": micro}), on_progress)
        except TrainerFailed as error:
            if error.code is FailureCode.KILLED and not self._closed:
                log.warning("trainer killed; starting it again once")
                return await self._attempt(job.model_copy(update={"micro_batch": micro}), on_progress)
            if error.code is not FailureCode.OUT_OF_MEMORY or micro == 1 or self._closed:
                raise
            log.warning("trainer out of memory with %d images a pass; starting again with %d", micro, micro // 2)
        result = await self._attempt(job.model_copy(update={"micro_batch": micro // 2}), on_progress)
        self._micro_batches[shape] = micro // 2
        return result

    async def _attempt(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        done = False
        try:
            worker = await self._running_worker()
            result = await worker.perform(job, on_progress)
            done = True
            return result
        except TrainerFailed as error:
            # The trainer says so itself and goes on where only the job was at fault.
            done = error.code not in (FailureCode.CRASHED, FailureCode.OUT_OF_MEMORY, FailureCode.KILLED) and self._config.processes == 1
            self._lost = not done
            raise
        finally:
            if not done:
                await asyncio.shield(self._stop_worker())

    async def _running_worker(self) -> TrainerProcess:
        if self._closed:
            raise TrainerFailed(FailureCode.CRASHED, "the trainer's link is closed")
        if self._worker is not None and not self._worker.alive:
            self._lost = True
            await self._stop_worker()
        if self._worker is None:
            self.restarts += self._lost
            self._lost = False
            self._worker = TrainerProcess(self._config)
            await self._worker.start()
        return self._worker

    async def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()

    async def _stop_when_idle(self) -> None:
        await asyncio.sleep(self._config.idle_s)
        log.info("trainer idle for %g s: stopping it", self._config.idle_s)
        await asyncio.shield(self._stop_worker())

    async def _stop_idling(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await idle
