"""Phase 0 at a site: have the round's weights and something trained on them, once a round, whatever is killed when.

Owns the way from an assignment to the journal's trained update: space, fetch, job, result. Must not know the masking
protocol beyond that journal, nor gRPC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from cosilo_client.config import EvaluationTable
from cosilo_client.coordinator import Coordinator
from cosilo_client.data import DataConfig
from cosilo_client.journal import Journal, TrainedUpdate
from cosilo_client.ledger import Phase as Reached
from cosilo_client.ledger import RoundState
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Activity, Owed, Progress
from cosilo_client.spending import Spending
from cosilo_client.trainer.jobs import EvaluateJob, FailureCode, Job, MomentsJob, Result, TrainerFailed, TrainJob
from cosilo_client.trainer.jobs import Progress as TrainerProgress
from cosilo_common.diffusion.lora import LoraBase
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.encoding import Encoding
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.telemetry import get_logger
from cosilo_common.threads import in_thread
from cosilo_common.transfer import require_free_bytes

SPACE_MARGIN_BYTES: Final = 64 << 20  # for the ledger, the log and whatever else shares the disk
TENTHS: Final = 10
NO_EXTRACTOR: Final = EvaluationTable()

log = get_logger("cosilo.training")


class Trainer(Protocol):
    """The trainer process, as `TrainerLink` offers it."""

    restarts: int

    async def run(self, job: Job, on_progress: Callable[[TrainerProgress], None]) -> Result:
        """Does one job; raises TrainerFailed."""
        ...


class Training:
    """Trains this site's rounds. name: of the site; threads: of the CPU, 0 for the trainer's choice; evaluation: of moments rounds."""

    def __init__(
        self,
        name: str,
        journal: Journal,
        coordinator: Coordinator,
        trainer: Trainer,
        data: DataConfig,
        threads: int,
        spending: Spending,
        metrics: SiteMetrics,
        evaluation: EvaluationTable = NO_EXTRACTOR,
    ) -> None:
        self._name = name
        self._journal = journal
        self._coordinator = coordinator
        self._trainer = trainer
        self._data = data
        self._threads = threads
        self._spending = spending
        self._metrics = metrics
        self._evaluation = evaluation

    def done(self, owed: Owed) -> bool:
        """Whether the round's update, or what stands for it, is on disk."""
        if owed.kind is RoundKind.REHEARSAL:
            entry = self._journal.ledger.round(owed.run, owed.round)
            return entry is not None and entry.phase >= Reached.FETCHED
        return self._journal.trained_update(owed.run, owed.round) is not None

    async def perform(self, owed: Owed, manifest: Manifest, encoding: Encoding) -> None:
        """Fetches and trains, for a round that is begun in the journal.

        Raises TrainerFailed; CosiloError where the disk lacks room; what fetching raises.
        """
        folder = self._journal.files(owed.run).folder
        require_free_bytes(folder, needed_bytes(owed, manifest, encoding))
        if owed.kind is RoundKind.MOMENTS:
            await self._measure(owed, manifest)
            return
        forced = owed.kind is RoundKind.REHEARSAL
        base = None if forced else await self._base(owed, manifest)  # first: its tenths are those that the round's deadline watches
        weights = await self._coordinator.fetch(owed, forced, self._reporter(owed, Activity.FETCHING, owed.base_bytes))
        await in_thread(self._journal.ledger.reach, owed.run, owed.round, Reached.FETCHED)
        if owed.kind is RoundKind.REHEARSAL:
            return
        result = await self._timed(owed, await self._job(owed, manifest, weights, base))
        losses = (*result.heldout_losses, result.train_loss)
        if len(losses) != manifest.loss_words or not all(map(math.isfinite, losses)):
            raise TrainerFailed(FailureCode.NON_FINITE, f"{owed.label}: its losses cannot be reported", "ask for a lower learning rate")
        update = TrainedUpdate(
            round=owed.round,
            offset_bytes=0,
            weight=min(result.weight, manifest.encoding.cap),
            losses=losses,
            has_vector=owed.kind is RoundKind.TRAIN,
        )
        if owed.kind is RoundKind.TRAIN:  # counted first: killed between the two, the round is trained again and counts once
            await in_thread(self._spending.add, owed.run, owed.round, result.seconds)
        else:
            await in_thread(self._spending.add_statistics, owed.run, owed.round)
        await in_thread(self._journal.trained, owed.run, update)
        self._log_end("trained", owed, result)

    async def _measure(self, owed: Owed, manifest: Manifest) -> None:
        """A moments round: no weights are fetched, since none are used."""
        terms, own = manifest.evaluation, self._evaluation
        assert terms is not None  # due_terms refused the round otherwise
        if own.extractor != terms.extractor:
            raise TrainerFailed(
                FailureCode.DATA,
                f"{owed.label}: the run measures with {terms.extractor}, this site has {own.extractor or 'no extractor'}",
                "if that network may see the images: set extractor and weights in [evaluation], and restart the daemon",
            )
        job = MomentsJob(
            update=self._journal.files(owed.run).update,
            data=self._data,
            architecture=manifest.architecture,
            training=manifest.training,
            threads=self._threads,
            network=own.extractor,
            weights=own.weights,
            terms=terms,
        )
        result = await self._timed(owed, job)
        await in_thread(self._spending.add_statistics, owed.run, owed.round)
        await in_thread(self._journal.trained, owed.run, TrainedUpdate(owed.round, 0, result.weight, (), data=result.data))
        self._log_end("measured", owed, result)

    def _log_end(self, what: str, owed: Owed, result: Result) -> None:
        log.info(
            what,
            round=owed.label,
            images=result.images,
            steps=result.steps,
            seconds=round(result.seconds, 1),
            loss=round(result.train_loss, 5),
            device=result.device,
            skipped=result.skipped,
        )

    async def _timed(self, owed: Owed, job: Job) -> Result:
        """Trains, and notes the time also of what is cut off: the coordinator could call a round off, and on again, for ever."""
        began = time.monotonic()
        try:
            return await self._train(owed, job)
        except BaseException:
            await in_thread(self._spending.add_seconds, owed.run, time.monotonic() - began)
            raise

    async def _train(self, owed: Owed, job: Job) -> Result:
        images = 0

        def note(progress: TrainerProgress) -> None:
            nonlocal images
            self._coordinator.say(Progress(owed.run, owed.round, Activity.TRAINING, progress.tenths))
            if owed.kind is RoundKind.TRAIN:
                self._metrics.trained(progress.loss, progress.images - images, progress.images_per_second)
            images = max(images, progress.images)

        self._coordinator.say(Progress(owed.run, owed.round, Activity.TRAINING, 0))
        before = self._trainer.restarts
        try:
            result = await self._trainer.run(job, note)
        finally:
            self._metrics.trainer_restarted(self._trainer.restarts - before)
        if owed.kind is RoundKind.TRAIN:
            self._metrics.trained(result.train_loss, result.images - images, result.images_per_second)
        self._metrics.gpu_memory(result.gpu_memory_bytes)
        return result

    async def _job(self, owed: Owed, manifest: Manifest, weights: Path, base: LoraBase | None) -> Job:
        common: dict[str, Any] = {
            "weights": weights,
            "architecture": manifest.architecture,
            "schedule": manifest.schedule,
            "training": manifest.training,
            "data": self._data,
            "threads": self._threads,
            "lora": base,
        }
        if manifest.split.kept_table is not None:
            counts = self._summed if manifest.training.control_variates else None
            common["personal"] = await in_thread(self._journal.personal.newest_before, owed.run, owed.round, counts)
        if owed.kind is RoundKind.STATISTICS:
            return EvaluateJob.model_validate(common)
        seed = site_seed(owed.round, self._name, manifest.training.seed)
        if manifest.split.kept_table is not None:
            common["keep_personal"] = await in_thread(self._journal.personal.place, owed.run, owed.round, common["personal"])
        return TrainJob.model_validate(common | {"update": self._journal.files(owed.run).update, "seed": seed})

    async def _base(self, owed: Owed, manifest: Manifest) -> LoraBase | None:
        """What a run's adapters stand on: fetched by the manifest's digest once, then here, and hashed at each asking."""
        terms = manifest.lora
        if terms is None:
            return None
        report = self._reporter(owed, Activity.FETCHING, terms.base_bytes)
        return LoraBase(terms, await self._coordinator.fetch_base(owed.run, bytes.fromhex(terms.base), terms.base_bytes, report))

    def _summed(self, run: bytes, round_: int) -> bool:
        """Whether this site's part of a round is in the sum that was opened: its control variate is then what the others' mean includes."""
        entry, consent = self._journal.ledger.round(run, round_), self._journal.ledger.consent(run, round_)
        return entry is not None and entry.state is RoundState.CLOSED and (consent is None or consent.survives)

    def _reporter(self, owed: Owed, activity: Activity, total_bytes: int) -> Callable[[int], None]:
        return reporter(self._coordinator, owed, activity, total_bytes)


def reporter(coordinator: Coordinator, owed: Owed, activity: Activity, total_bytes: int) -> Callable[[int], None]:
    """Says how far a transfer is; the first word is said at once."""

    def on_bytes(moved: int) -> None:
        tenths = TENTHS * moved // total_bytes if total_bytes else TENTHS
        coordinator.say(Progress(owed.run, owed.round, activity, min(TENTHS, tenths), moved))

    on_bytes(0)
    return on_bytes


def needed_bytes(owed: Owed, manifest: Manifest, encoding: Encoding) -> int:
    """Free bytes that a round takes at most beside its weights: the update, with what of it stays here, and the upload."""
    update = {RoundKind.TRAIN: 4 * manifest.split.base_table.size, RoundKind.MOMENTS: 4 * encoding.size}.get(owed.kind, 0)
    return update + encoding.wire_bytes + SPACE_MARGIN_BYTES
