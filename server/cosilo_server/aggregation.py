"""From the opening of a sum to the next checkpoint, in one pass over files.

Owns the pass that steps weights, EMA and optimiser while the sum is opened chunk by chunk, and the rule that nothing of
it is kept before the opening has verified itself at its end. Memory is a handful of chunks for any model and any number
of sites: everything larger is a file. Must not know who sent what, nor how a sum is opened (cosilo_server.secagg).
Every call blocks: callers on an event loop use a thread.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cosilo_common.canonical import u64
from cosilo_common.clip_ranges import TensorPeaks
from cosilo_common.encoding import Encoding, OpenedTail, SumRefused, Words
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import ServerOptimiserTerms
from cosilo_common.transfer import require_free_bytes
from cosilo_common.weights import BLOCK_WORDS, TensorTable, Vector, WeightsWriter, open_vector
from cosilo_server.artifacts import Artifacts
from cosilo_server.optimiser import STEPS_MAX, ServerOptimiser, ema_decay_at, state_table, step_ema

_WORD_BYTES = 4
_STEP = "step the global model"


class Opening(Protocol):
    """A sum that is being opened: cosilo_server.secagg.SumOpening.

    Iterating gives (start, words) of the values in order, at most BLOCK_WORDS words at a time, each valid until the
    next, and raises at its end unless the sum is right; only then is `tail` the verified one.
    """

    def provisional_tail(self) -> OpenedTail: ...

    def __iter__(self) -> Iterator[tuple[int, Words]]: ...

    @property
    def tail(self) -> OpenedTail: ...


@dataclass(frozen=True)
class Checkpoint:
    """The global model after a round: the digests of its three artifacts.

    weights is what sites fetch; ema and optimiser stay at the coordinator.
    """

    weights: str
    ema: str
    optimiser: str


@dataclass(frozen=True)
class Aggregate:
    """What a closed round gives.

    tail: the verified one; sum_digest: hex SHA-256 of the opened value words (4 bytes each, little endian), the total
    weight and the count of contributors (8 bytes each, big endian); update_norm: Euclidean norm of the mean update,
    before the server's learning rate; tensor_peaks: the largest absolute value of the mean update in each tensor, where
    b = 24, else none.
    """

    tail: OpenedTail
    sum_digest: str
    checkpoint: Checkpoint
    update_norm: float
    tensor_peaks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Aggregation:
    """One run's way from sums to checkpoints. ema_decay: 0 for none (the EMA is then the weights)."""

    artifacts: Artifacts
    table: TensorTable
    encoding: Encoding
    optimiser: ServerOptimiserTerms
    ema_decay: float

    def initial(self, weights: str) -> Checkpoint:
        """The checkpoint before the first round, from the digest of the untrained weights, which are also its EMA."""
        open_vector(self.artifacts.path(weights), self.table)
        optimiser = ServerOptimiser(self.optimiser)
        with self.artifacts.scratch() as path:
            with WeightsWriter(path, state_table(self.table, optimiser.moments)) as writer:
                writer.append(np.zeros(1, np.float32))
                for value in optimiser.initial_moments:
                    for start in range(0, self.table.size, BLOCK_WORDS):
                        writer.append(np.full(min(BLOCK_WORDS, self.table.size - start), value, np.float32))
            return Checkpoint(weights, weights, self.artifacts.put_file(path))

    def train(self, base: Checkpoint, opening: Opening) -> Aggregate:
        """Step the model by the mean update.

        Raises what the opening raises, SumRefused where its tail changed under way, and CosiloError where a weight is
        no longer finite or the disk is full. Then nothing is stored, and the same call may be made again with a fresh
        opening.
        """
        self._require_fit()
        require_free_bytes(self.artifacts.root, _WORD_BYTES * (4 * self.table.size + BLOCK_WORDS))
        with ExitStack() as files:
            step = _Step(self, base, opening.provisional_tail().total_weight, files)
            hasher = hashlib.sha256()
            for start, words in opening:
                hasher.update(_bytes(words))
                step.block(start, words)
            tail = opening.tail
            if tail.total_weight != step.total_weight:
                raise SumRefused(_STEP, "the total weight changed while the sum was opened", "start the round again")
            checkpoint = step.finish()
        return Aggregate(tail, _sum_digest(hasher, tail), checkpoint, step.norm, step.tensor_peaks)

    def rehearse(self, base: Checkpoint, opening: Opening) -> Aggregate:
        """Check that a rehearsal's sum is exactly zero; the checkpoint stays the same. Raises SumRefused where it is
        not.
        """
        self._require_fit()
        hasher = hashlib.sha256()
        zero = True
        for _, words in opening:
            hasher.update(_bytes(words))
            zero = zero and not words.any()
        if not zero:
            raise SumRefused("close the rehearsal", "its sum is not zero", "find out why before you train")
        return Aggregate(opening.tail, _sum_digest(hasher, opening.tail), base, 0.0)

    def _require_fit(self) -> None:
        if self.encoding.size != self.table.size:
            raise CosiloError(_STEP, f"the encoding has {self.encoding.size} values, the model {self.table.size}")


class _Step:
    """The next checkpoint in the making, one block after the other, in files that nobody sees."""

    def __init__(self, run: Aggregation, base: Checkpoint, total_weight: int, files: ExitStack) -> None:
        self.total_weight = total_weight
        self._run = run
        self._optimiser = ServerOptimiser(run.optimiser)
        states = state_table(run.table, self._optimiser.moments)
        self._old_weights = open_vector(run.artifacts.path(base.weights), run.table)
        self._old_ema = open_vector(run.artifacts.path(base.ema), run.table)
        self._old_state = open_vector(run.artifacts.path(base.optimiser), states)
        steps = int(self._old_state[0])
        if not 0 <= steps < STEPS_MAX:
            raise CosiloError(_STEP, f"optimiser {base.optimiser}: {steps} steps", "restore it from a backup")
        self._decay = ema_decay_at(run.ema_decay, steps)
        self._paths = [files.enter_context(run.artifacts.scratch()) for _ in range(3)]
        self._writers = files.enter_context(ExitStack())
        weights_path, ema_path, state_path = self._paths
        self._weights = self._writers.enter_context(WeightsWriter(weights_path, run.table))
        self._ema = self._writers.enter_context(WeightsWriter(ema_path, run.table)) if run.ema_decay else None
        self._state = self._writers.enter_context(WeightsWriter(state_path, states))
        self._state.put(0, np.array([steps + 1], np.float32))
        self._mean = np.empty(BLOCK_WORDS, np.float32)
        self._squares = 0.0
        self._peaks = TensorPeaks(run.table) if run.encoding.bits == 24 else None

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares)

    @property
    def tensor_peaks(self) -> tuple[float, ...]:
        return () if self._peaks is None else self._peaks.peaks

    def block(self, start: int, words: Words) -> None:
        """Step the elements start .. start + n by the sum's words, uint32 (n,)."""
        stop = start + words.size
        mean = self._mean[: words.size]
        self._run.encoding.dequantise(words, start, self.total_weight, mean)
        self._squares += _sum_of_squares(mean)
        if self._peaks is not None:
            self._peaks.note(start, mean)
        weights = np.array(self._old_weights[start:stop])
        places = [1 + k * self._run.table.size for k in range(len(self._optimiser.moments))]
        moments = tuple(np.array(self._old_state[place + start : place + stop]) for place in places)
        with np.errstate(over="ignore", invalid="ignore"):  # the writers refuse what is not finite
            self._optimiser.step(mean, weights, moments)
        self._weights.put(start, weights)
        for place, moment in zip(places, moments, strict=True):
            self._state.put(place + start, moment)
        if self._ema is not None:
            average = np.array(self._old_ema[start:stop])
            step_ema(average, weights, self._decay)
            self._ema.put(start, average)

    def finish(self) -> Checkpoint:
        """Put the files on disk and into the store; raises CosiloError where a block is missing."""
        self._writers.close()
        weights_path, ema_path, state_path = self._paths
        put = self._run.artifacts.put_file
        weights = put(weights_path)
        return Checkpoint(weights, put(ema_path) if self._ema is not None else weights, put(state_path))


def _sum_digest(hasher: "hashlib._Hash", tail: OpenedTail) -> str:
    hasher.update(u64(tail.total_weight) + u64(tail.contributors))
    return hasher.hexdigest()


def _bytes(words: Words) -> memoryview:
    return np.ascontiguousarray(words, dtype="<u4").data.cast("B")


def _sum_of_squares(block: Vector) -> float:
    # Not np.dot: BLAS splits it over threads, which wait for busy cores and make the last bits depend on their number.
    return float(np.square(block, dtype=np.float64).sum())
