"""Closes a round: opens the survivors' sum, steps the model, and says what the sum tells.

Owns the way from a round in its OPENING phase to an outcome and a checkpoint. Repeatable: until the store commits the result, nothing but
artifacts named by their digests has been written. Blocks; the conductor calls it in a thread.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cosilo_common.allocation import give_back
from cosilo_common.encoding import Encoding, OpenedTail, SumRefused
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.moments import dimension_of, moments_table
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.masks import SignedMask
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.weights import WeightsWriter
from cosilo_server.aggregation import Checkpoint, aggregation_of
from cosilo_server.artifacts import Artifacts
from cosilo_server.correction import Corrector
from cosilo_server.early_sum import EarlySum
from cosilo_server.rounds.state import Round, WeightsStep
from cosilo_server.secagg import SumOpening, reconstruct
from cosilo_server.spool import Spool
from cosilo_server.store import Store, StoredCheckpoint
from cosilo_server.verification import dealt_shares, reveals_of, roster_of

Step = Callable[[str], AbstractContextManager[None]]
"""What a step of the opening, named so, runs within: the trace measures it."""

EARLY_SUM = ".sum"  # beside the uploads; no site has such a name
OPENING_LANES = 3  # on two cores: with two, the one that has two of three uploads is waited for; each takes 4 MiB


def _unmeasured(step: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class RoundOutcome:
    """What a closed round's sum tells: means over all its sites, never one site's.

    heldout_loss: of the weights that the round started from, mean over the timestep buckets; by_bucket: lowest noise first; train_loss: of the
    local training; None where the round's kind has none. update_norm: L2 norm of the mean update. tensor_peaks: the largest absolute value of
    the mean update in each tensor, after a training round at b = 24: the next round's clip ranges follow from it. moments: digest of a
    moments round's artifact (`evaluation.moments.moments_table`), hex. corrected: whether the checkpoint is the corrected average
    (`Manifest.correction`), and so no longer the one that follows from the sum alone.
    """

    total_weight: int
    contributors: int
    clip_ratio: float
    heldout_loss: float | None = None
    heldout_loss_by_bucket: tuple[float, ...] = ()
    train_loss: float | None = None
    update_norm: float | None = None
    note: str = ""
    tensor_peaks: tuple[float, ...] = ()
    moments: str = ""
    corrected: bool = False

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RoundOutcome:
        """The inverse of `to_json`."""
        raw = json.loads(text)
        lists = {name: tuple(raw.get(name, ())) for name in ("heldout_loss_by_bucket", "tensor_peaks")}
        return cls(**{**raw, **lists})


class RoundCloser:
    """Opens sums for one coordinator."""

    def __init__(
        self,
        store: Store,
        artifacts: Artifacts,
        spool: Spool,
        now: Callable[[], float] = time.time,
        corrector: Corrector | None = None,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._spool = spool
        self._now = now
        self._corrector = corrector or Corrector()
        self._early: dict[bytes, tuple[int, int, EarlySum | None]] = {}  # by run: of which round and attempt; None once that is opened
        self._summing = threading.Lock()

    def stop(self) -> None:
        """Ends what takes long in an opening. Nobody must wait for it any more: the next process opens that sum again."""
        self._corrector.stop()

    def sum_early(self, state: Round, site: str) -> None:
        """Adds a whole upload to the sum of those before it, while others are on their way; `open` then has less to do.

        Raises CosiloError and OSError; nothing is lost then but what this saves.
        """
        run, upload, encoding = state.run, state.sites[site].upload, Encoding.parse(state.encoding)
        if upload is None:
            return
        with self._summing:
            if self._early.get(run, (0, 0))[:2] != (state.number, state.attempt):
                path = self._spool.path(run.hex(), state.number, site).parent / EARLY_SUM
                self._early[run] = (state.number, state.attempt, EarlySum(path, encoding.length, encoding.bits))
            early = self._early[run][2]
            if early is not None and not early.broken and site not in early.digests:
                with _Upload(self._spool.path(run.hex(), state.number, site)) as whole:
                    early.add(site, whole.read_into, upload.digest)

    def forget(self, run: bytes, number: int) -> None:
        """Lets go of what `sum_early` holds for a round that is over. To be called while it adds nothing."""
        with self._summing:
            if self._early.get(run, (0, 0))[0] == number:
                del self._early[run]

    def _summed_early(self, state: Round) -> EarlySum | None:
        """What `sum_early` made of these survivors' uploads, once it has ended with the one it is at."""
        with self._summing:
            number, attempt, early = self._early.get(state.run, (0, 0, None))
            self._early[state.run] = (state.number, state.attempt, None)  # whoever comes now comes too late
        fits = early is not None and (number, attempt) == (state.number, state.attempt) and early.digests.keys() <= set(state.survivors)
        return early if fits else None

    def open(self, manifest: Manifest, state: Round, step: Step = _unmeasured) -> tuple[RoundOutcome, StoredCheckpoint | None]:
        """Opens the sum of `state.survivors`. The checkpoint is None where the round's kind moves nothing.

        Raises CosiloError (ProtocolViolation, SumRefused) where the sum must not be used, or the disk is full.
        """
        encoding = Encoding.parse(state.encoding)
        early = self._summed_early(state)
        rest = [name for name in state.survivors if early is None or name not in early.digests]
        with ExitStack() as files:
            sources = {name: files.enter_context(_Upload(self._spool.path(state.run.hex(), state.number, name))).read_into for name in rest}
            digests = {name: upload.digest for name in rest if (upload := state.sites[name].upload) is not None}
            with step("reconstruct"):
                masks = self._masks(manifest, state)
            if early is not None:
                files.enter_context(early)
            opening = SumOpening(encoding, sources, digests, masks, OPENING_LANES, early)
            try:
                with step("sum and write"):
                    return self._apply(manifest, state, encoding, opening)
            finally:
                give_back()  # what uploads and this pass left free: an idle coordinator is as small after a round as before it

    def _masks(self, manifest: Manifest, state: Round) -> tuple[SignedMask, ...]:
        if not manifest.secure:
            return ()
        keys = reconstruct(roster_of(manifest, state), state.survivors, dealt_shares(state), reveals_of(state))
        return keys.masks

    def _apply(
        self, manifest: Manifest, state: Round, encoding: Encoding, opening: SumOpening
    ) -> tuple[RoundOutcome, StoredCheckpoint | None]:
        if state.kind is RoundKind.MOMENTS:
            return self._moments(encoding, opening), None
        if state.kind is RoundKind.STATISTICS:
            for _ in opening:
                pass
            return _outcome(opening.tail, None), None
        base = self._base(state)
        aggregation = aggregation_of(manifest, self._artifacts, encoding)
        if state.kind is RoundKind.REHEARSAL:
            tail = aggregation.rehearse(base, opening).tail
            note = f"the opened sum of {encoding.size} values is exactly zero"
            return RoundOutcome(tail.total_weight, tail.contributors, 0.0, update_norm=0.0, note=note), None
        correction = _Correction(self._corrector, manifest, state.number)
        aggregate = aggregation.train(base, opening, correction if correction.due else None)
        made = aggregate.checkpoint
        stored = StoredCheckpoint(
            run=state.run,
            round=state.number,
            weights=bytes.fromhex(made.weights),
            ema=bytes.fromhex(made.ema) if manifest.ema_decay or manifest.training.control_variates else b"",
            optimiser=bytes.fromhex(made.optimiser),
            bytes=self._artifacts.size(made.weights),
            created_at=self._now(),
            step=WeightsStep(bytes.fromhex(made.step), state.base_digest, self._artifacts.size(made.step)) if made.step else None,
        )
        outcome = replace(_outcome(aggregate.tail, aggregate.update_norm), tensor_peaks=aggregate.tensor_peaks)
        return replace(outcome, corrected=correction.done, note=correction.note), stored

    def _moments(self, encoding: Encoding, opening: SumOpening) -> RoundOutcome:
        """The opened sum as an artifact: what all its sites' images have in common, and no site's own."""
        with self._artifacts.scratch() as path:
            total = opening.provisional_tail().total_weight
            with WeightsWriter(path, moments_table(dimension_of(encoding.size))) as writer:
                writer.append(np.array([total], np.float32))
                for start, words in opening:
                    block = np.empty(len(words), np.float32)
                    encoding.dequantise(words, start, total, block)
                    writer.append(block)
            tail = opening.tail
            if tail.total_weight != total:
                raise SumRefused("open the moments", "the total weight changed while the sum was opened", "start the round again")
            digest = self._artifacts.put_file(path)
        note = f"moments of {total} images"
        if tail.clip_ratio:
            note += "; some exceed what feature_max allows and are clipped: scores against them are not exact"
        return RoundOutcome(total, tail.contributors, tail.clip_ratio, note=note, moments=digest)

    def _base(self, state: Round) -> Checkpoint:
        base = self._store.newest_checkpoint(state.run)
        if base is None or base.weights != state.base_digest:
            raise CosiloError(
                "open the sum", f"round {state.number} did not start from the newest checkpoint", "restore the data folder as a whole"
            )
        ema = base.ema or base.weights
        return Checkpoint(base.weights.hex(), ema.hex(), base.optimiser.hex())


class _Correction:
    """What becomes of a round's correction. One that fails costs the round nothing but itself: the average stands, and the note says why."""

    def __init__(self, corrector: Corrector, manifest: Manifest, round_number: int) -> None:
        self._corrector, self._manifest, self._round = corrector, manifest, round_number
        self.due = manifest.correction is not None and manifest.correction.due(round_number)
        self.done, self.note = False, ""

    def __call__(self, weights: Path, average: Path) -> bool:
        terms = self._manifest.correction
        assert terms is not None
        try:
            self._corrector.correct(self._manifest, self._round, weights, average)
        except (CosiloError, OSError) as error:
            self.note = f"not corrected, the plain average stands: {error}"
            return False
        self.done, self.note = True, f"corrected by {terms.steps} steps on {terms.samples} images that the global model drew"
        return True


class _Upload:
    """One site's whole upload, read at offsets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> _Upload:
        self._fd = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from the offset; raises CosiloError where the file is shorter."""
        filled = os.preadv(self._fd, [buffer], offset)
        while filled < len(buffer):
            more = os.preadv(self._fd, [buffer[filled:]], offset + filled)
            if more == 0:
                raise CosiloError("open the sum", f"the upload of {self._path.name} ends early on disk")
            filled += more


def _outcome(tail: OpenedTail, update_norm: float | None) -> RoundOutcome:
    *by_bucket, train_loss = tail.losses
    return RoundOutcome(
        total_weight=tail.total_weight,
        contributors=tail.contributors,
        clip_ratio=tail.clip_ratio,
        heldout_loss=sum(by_bucket) / len(by_bucket),
        heldout_loss_by_bucket=tuple(by_bucket),
        train_loss=train_loss if update_norm is not None else None,
        update_norm=update_norm,
    )


def untrained_checkpoint(run: bytes, checkpoint: Checkpoint, size_bytes: int, has_ema: bool, now: float) -> StoredCheckpoint:
    """Round 0 of a run."""
    return StoredCheckpoint(
        run=run,
        round=0,
        weights=bytes.fromhex(checkpoint.weights),
        ema=bytes.fromhex(checkpoint.ema) if has_ema else b"",
        optimiser=bytes.fromhex(checkpoint.optimiser),
        bytes=size_bytes,
        created_at=now,
    )
