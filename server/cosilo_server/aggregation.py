"""From the opening of a sum to the next checkpoint, in one pass over files.

Owns the pass that steps weights, EMA and optimiser while the sum is opened chunk by chunk, and the rule that nothing of
it is kept before the opening has verified itself at its end. Memory is a handful of chunks for any model and any number
of sites: everything larger is a file. Must not know who sent what, nor how a sum is opened (cosilo_server.secagg).
Every call blocks: callers on an event loop use a thread.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cosilo_common.clip_ranges import TensorPeaks
from cosilo_common.diffusion.parts import Split
from cosilo_common.encoding import Encoding, OpenedTail, SumRefused, Words
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, ServerOptimiserTerms
from cosilo_common.step import StepHeader, make_step, seal_step
from cosilo_common.transfer import require_free_bytes
from cosilo_common.weights import BLOCK_WORDS, TensorTable, Vector, WeightsWriter, open_vector
from cosilo_server.artifacts import Artifacts
from cosilo_server.optimiser import STEPS_MAX, ServerOptimiser, ema_decay_at, state_table, step_ema

_WORD_BYTES = 4
_STEP = "step the global model"


Amend = Callable[[Path, Path], bool]
"""Given the file of the stepped weights and that of the moving average (without one, the same file again): whether it has rewritten the first."""


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

    weights is what sites fetch; ema and optimiser stay at the coordinator. step: that to the weights from those before, "" for none.
    """

    weights: str
    ema: str
    optimiser: str
    step: str = ""


@dataclass(frozen=True)
class Aggregate:
    """What a closed round gives.

    tail: the verified one; update_norm: Euclidean norm of the mean update, before the server's learning rate; tensor_peaks:
    the largest absolute value of the mean update in each tensor, where b = 24, else none.
    """

    tail: OpenedTail
    checkpoint: Checkpoint
    update_norm: float
    tensor_peaks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Aggregation:
    """One run's way from sums to checkpoints.

    ema_decay: 0 for none (the EMA is then the weights). personal: names of the tensors that stay at the sites: no sum has them, no step
    moves them, and every checkpoint has what the first one had. frozen: of those that nobody trains, likewise.
    controlled: with SCAFFOLD's control variates: weights are then what sites fetch, the model and c, and the model alone stands in the
    EMA's place, as its own average where ema_decay is 0.
    steps: whether weights are rounded to a step that sites may fetch instead (`Manifest.downlink`).
    """

    artifacts: Artifacts
    table: TensorTable
    encoding: Encoding
    optimiser: ServerOptimiserTerms
    ema_decay: float
    personal: frozenset[str] = frozenset()
    controlled: bool = False
    frozen: frozenset[str] = frozenset()
    steps: bool = False

    @property
    def split(self) -> Split:
        """The model's vector in two: what sums step, and what stays."""
        return Split(self.table, self.personal, self.controlled, self.frozen)

    def initial(self, weights: str) -> Checkpoint:
        """The checkpoint before the first round, from the digest of the untrained weights, which are also its EMA."""
        open_vector(self.artifacts.path(weights), self.table)
        optimiser, shared = ServerOptimiser(self.optimiser), self.split.shared_table
        with self.artifacts.scratch() as path:
            with WeightsWriter(path, state_table(shared, optimiser.moments)) as writer:
                writer.append(np.zeros(1, np.float32))
                for value in optimiser.initial_moments:
                    for start in range(0, shared.size, BLOCK_WORDS):
                        writer.append(np.full(min(BLOCK_WORDS, shared.size - start), value, np.float32))
            return Checkpoint(self._fetched(weights), weights, self.artifacts.put_file(path))

    def _fetched(self, weights: str) -> str:
        """What sites fetch first: the untrained weights, with control variates of zero where there are any."""
        split = self.split
        if not split.controlled:
            return weights
        vector = open_vector(self.artifacts.path(weights), self.table)
        with self.artifacts.scratch() as path:
            with WeightsWriter(path, split.base_table) as writer:
                for start in range(0, self.table.size, BLOCK_WORDS):
                    writer.append(np.array(vector[start : start + BLOCK_WORDS]))
                for start in range(0, split.shared_table.size, BLOCK_WORDS):
                    writer.append(np.zeros(min(BLOCK_WORDS, split.shared_table.size - start), np.float32))
            return self.artifacts.put_file(path)

    def train(self, base: Checkpoint, opening: Opening, amend: Amend | None = None) -> Aggregate:
        """Step the model by the mean update. amend: called once the sum is verified, before anything is stored.

        Raises what the opening raises, SumRefused where its tail changed under way, and CosiloError where a weight is
        no longer finite or the disk is full. Then nothing is stored, and the same call may be made again with a fresh
        opening.
        """
        self._require_fit()
        models = 5 if self.controlled or self.steps else 4
        require_free_bytes(self.artifacts.root, _WORD_BYTES * (models * self.table.size + BLOCK_WORDS))
        with ExitStack() as files:
            step = _Step(self, base, opening.provisional_tail(), files)
            for start, words in opening:
                step.block(start, words)
            tail = opening.tail
            if (tail.total_weight, tail.contributors) != (step.total_weight, step.contributors):
                raise SumRefused(_STEP, "the total weight changed while the sum was opened", "start the round again")
            if amend is not None:
                step.amend(amend)
            checkpoint = step.finish()
        return Aggregate(tail, checkpoint, step.norm, step.tensor_peaks)

    def rehearse(self, base: Checkpoint, opening: Opening) -> Aggregate:
        """Check that a rehearsal's sum is exactly zero; the checkpoint stays the same. Raises SumRefused where it is
        not.
        """
        self._require_fit()
        zero = True
        for _, words in opening:
            zero = zero and not words.any()
        if not zero:
            raise SumRefused("close the rehearsal", "its sum is not zero", "find out why before you train")
        return Aggregate(opening.tail, base, 0.0)

    def _require_fit(self) -> None:
        summed = self.split.summed_size
        if self.encoding.size != summed:
            raise CosiloError(_STEP, f"the encoding has {self.encoding.size} values, the model {summed}")


def aggregation_of(manifest: Manifest, artifacts: Artifacts, encoding: Encoding) -> Aggregation:
    """A run's way by its manifest."""
    split = manifest.split
    return Aggregation(
        artifacts,
        split.table,
        encoding,
        manifest.server_optimiser,
        manifest.ema_decay,
        split.personal,
        split.controlled,
        split.frozen,
        manifest.downlink is not None,
    )


class _Step:
    """The next checkpoint in the making, one block after the other, in files that nobody sees."""

    def __init__(self, run: Aggregation, base: Checkpoint, tail: OpenedTail, files: ExitStack) -> None:
        self.total_weight, self.contributors = tail.total_weight, tail.contributors
        self._run = run
        self._optimiser = ServerOptimiser(run.optimiser)
        split = run.split
        self._size, self._runs = split.shared_table.size, SharedRuns(split)
        states = state_table(split.shared_table, self._optimiser.moments)
        fetched = open_vector(run.artifacts.path(base.weights), split.base_table)
        self._old_weights, self._old_control = fetched[: run.table.size], fetched[run.table.size :]
        self._joining = self.contributors / run.encoding.participants
        self._old_ema = open_vector(run.artifacts.path(base.ema), run.table)
        self._old_state = open_vector(run.artifacts.path(base.optimiser), states)
        steps = int(self._old_state[0])
        if not 0 <= steps < STEPS_MAX:
            raise CosiloError(_STEP, f"optimiser {base.optimiser}: {steps} steps", "restore it from a backup")
        self._decay = ema_decay_at(run.ema_decay, steps)
        self._base = base.weights
        self._paths = [files.enter_context(run.artifacts.scratch()) for _ in range(3)]
        self._step_path = files.enter_context(run.artifacts.scratch()) if run.steps else None
        self._writers = files.enter_context(ExitStack())
        weights_path, ema_path, state_path = self._paths
        self._weights = self._writers.enter_context(WeightsWriter(weights_path, split.base_table))
        self._ema = self._writers.enter_context(WeightsWriter(ema_path, run.table)) if run.ema_decay or run.controlled else None
        self._state = self._writers.enter_context(WeightsWriter(state_path, states))
        self._state.put(0, np.array([steps + 1], np.float32))
        self._mean = np.empty(BLOCK_WORDS, np.float32)
        self._squares = 0.0
        self._peaks = TensorPeaks(split.shared_table) if run.encoding.bits == 24 else None
        for place in split.unsummed_runs:  # what no sum moves is carried over first, and the steps fill the rest
            for start in range(place.start, place.stop, BLOCK_WORDS):
                stop = min(start + BLOCK_WORDS, place.stop)
                self._weights.put(start, np.array(self._old_weights[start:stop]))
                if self._ema is not None:
                    self._ema.put(start, np.array(self._old_ema[start:stop]))

    @property
    def norm(self) -> float:
        return math.sqrt(self._squares)

    @property
    def tensor_peaks(self) -> tuple[float, ...]:
        return () if self._peaks is None else self._peaks.peaks

    def block(self, start: int, words: Words) -> None:
        """Step the summed elements start .. start + n by the sum's words, uint32 (n,)."""
        stop = start + words.size
        if stop > self._size:  # the update ends within these words, and the control variates' changes begin
            inside = max(0, self._size - start)
            self._control(start + inside, words[inside:])
            words, stop = words[:inside], start + inside
        if not words.size:
            return
        mean = self._mean[: words.size]
        self._run.encoding.dequantise(words, start, self.total_weight, mean)
        self._squares += _sum_of_squares(mean)
        if self._peaks is not None:
            self._peaks.note(start, mean)
        weights = self._runs.take(self._old_weights, start, stop)
        places = [1 + k * self._size for k in range(len(self._optimiser.moments))]
        moments = tuple(np.array(self._old_state[place + start : place + stop]) for place in places)
        with np.errstate(over="ignore", invalid="ignore"):  # the writers refuse what is not finite
            self._optimiser.step(mean, weights, moments)
        self._runs.put(self._weights, start, weights)
        for place, moment in zip(places, moments, strict=True):
            self._state.put(place + start, moment)
        if self._ema is not None:
            average = self._runs.take(self._old_ema, start, stop) if self._run.ema_decay else weights
            if self._run.ema_decay:
                step_ema(average, weights, self._decay)
            self._runs.put(self._ema, start, average)

    def _control(self, start: int, words: Words) -> None:
        """c += |S| / N mean(c_i' - c_i) (arXiv 1910.06378, algorithm 1, line 17), the mean by images as that of the weights is."""
        mean = np.empty(words.size, np.float32)
        self._run.encoding.dequantise(words, start, self.total_weight, mean)
        at = start - self._size
        mean *= np.float32(self._joining)
        mean += self._old_control[at : at + words.size]
        self._weights.put(self._run.table.size + at, mean)

    def amend(self, amend: Amend) -> None:
        """Let the stepped weights be rewritten; the moving average then follows what they became."""
        self._writers.close()
        weights_path, ema_path, _ = self._paths
        if not amend(weights_path, weights_path if self._ema is None else ema_path) or not self._run.ema_decay:
            return
        weights = open_vector(weights_path, self._run.table)
        with WeightsWriter(ema_path, self._run.table) as writer:
            for start in range(0, self._run.table.size, BLOCK_WORDS):
                average = np.array(self._old_ema[start : start + BLOCK_WORDS])
                step_ema(average, weights[start : start + BLOCK_WORDS], self._decay)
                writer.append(average)

    def finish(self) -> Checkpoint:
        """Put the files on disk and into the store; raises CosiloError where a block is missing."""
        self._writers.close()
        weights_path, ema_path, state_path = self._paths
        if self._step_path is not None:  # the moving average has followed the weights as they were: by less than a step's rounding
            make_step(self._run.artifacts.path(self._base), weights_path, self._step_path)
        paths = [weights_path, state_path, *([ema_path] if self._ema is not None else [])]
        with ThreadPoolExecutor(len(paths), thread_name_prefix="checkpoint") as pool:  # digests and fsyncs of three files, side by side
            weights, state, *ema = pool.map(self._run.artifacts.put_file, paths)
        return Checkpoint(weights, ema[0] if ema else weights, state, self._put_step(weights))

    def _put_step(self, weights: str) -> str:
        if self._step_path is None:
            return ""
        seal_step(self._step_path, StepHeader(self._base, weights, self._run.split.base_table.size))
        return self._run.artifacts.put_file(self._step_path)


class SharedRuns:
    """The summed part of a model's vector as if it were one vector: element k of it is where the k-th summed element lies."""

    def __init__(self, split: Split) -> None:
        self._places = split.shared_runs
        self._ends = np.cumsum([place.stop - place.start for place in self._places])

    def take(self, whole: Vector, start: int, stop: int) -> Vector:
        """A copy of the summed elements start .. stop of a model's vector."""
        return np.concatenate([whole[part] for part in self._parts(start, stop)])

    def put(self, writer: WeightsWriter, start: int, block: Vector) -> None:
        """Writes the summed elements start .. start + n to their places."""
        done = 0
        for part in self._parts(start, start + block.size):
            count = part.stop - part.start
            writer.put(part.start, block[done : done + count])
            done += count

    def _parts(self, start: int, stop: int) -> Iterator[slice]:
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            place, end = self._places[index], int(self._ends[index])
            shift = place.stop - end
            yield slice(start + shift, min(stop, end) + shift)
            start, index = end, index + 1


def _sum_of_squares(block: Vector) -> float:
    # Not np.dot: BLAS splits it over threads, which wait for busy cores and make the last bits depend on their number.
    return float(np.square(block, dtype=np.float64).sum())
