"""From sums to checkpoints: the right numbers, the same bits in any order, and nothing kept of a sum that is wrong."""

import hashlib
import itertools
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.encoding import Encoding, OpenedTail, Section, SumRefused, Words
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import ServerOptimiserTerms
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.weights import BLOCK_WORDS, TensorTable, open_vector, write_weights
from cosilo_server.aggregation import Aggregate, Aggregation, Checkpoint, Opening
from cosilo_server.artifacts import Artifacts
from cosilo_server.optimiser import STEPS_MAX, ServerOptimiser, ema_decay_at, state_table
from cosilo_server.secagg import SumOpening

CLIP = 1.0
CAP = 1000
SMALL = TensorTable.of([("a", (7,)), ("b", (3, 11))])
THREE_CHUNKS = TensorTable.of([("a", (BLOCK_WORDS + 5,)), ("b", (3, BLOCK_WORDS // 2)), ("c", ())])
FEDAVG = ServerOptimiserTerms(kind="fedavg")


class Site:
    """One site's upload of a plain sum: its words in a buffer, read as a spool is."""

    def __init__(self, encoding: Encoding, update: np.ndarray, weight: int, losses: Sequence[float] = (0.5,)) -> None:
        words = np.empty(encoding.length, np.uint32)
        random = np.random.default_rng(weight)
        clipped = encoding.quantise(update.astype(np.float32), 0, weight, words[: encoding.size], Seeded(random))
        words[encoding.size :] = encoding.tail(weight, losses, clipped, Seeded(random))
        self.raw = wire(words, encoding.bits)
        self.digest = hashlib.sha256(self.raw).digest()

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.raw[offset : offset + len(buffer)]


class Seeded:
    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def token_bytes(self, n: int) -> bytes:
        return self._generator.bytes(n)


def wire(words: np.ndarray, bits: int) -> bytes:
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes()


def encoding_of(table: TensorTable, participants: int = 4, bits: int = 32) -> Encoding:
    return Encoding(bits, participants, CAP, (Section(table.size, CLIP),), loss_max=16.0, losses=1)


def opening_of(encoding: Encoding, sites: dict[str, Site], workers: int = 1) -> SumOpening:
    return SumOpening(
        encoding,
        {name: site.read for name, site in sites.items()},
        {name: site.digest for name, site in sites.items()},
        (),
        workers,
    )


def make_run(
    folder: Path, table: TensorTable = SMALL, optimiser: ServerOptimiserTerms = FEDAVG, ema: float = 0.0, bits: int = 32
) -> tuple[Aggregation, Checkpoint, np.ndarray]:
    artifacts = Artifacts(folder / "artifacts")
    weights = np.random.default_rng(0).normal(size=table.size).astype(np.float32)
    with artifacts.scratch() as path:
        write_weights(path, table, [weights])
        digest = artifacts.put_file(path)
    run = Aggregation(artifacts, table, encoding_of(table, bits=bits), optimiser, ema)
    return run, run.initial(digest), weights


def weights_of(run: Aggregation, digest: str) -> np.ndarray:
    return open_vector(run.artifacts.path(digest), run.table)


def updates_of(table: TensorTable, count: int, seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(scale=0.05, size=table.size).clip(-CLIP, CLIP).astype(np.float32) for _ in range(count)]


def test_one_site_with_fedavg_gives_that_sites_weights(tmp_path: Path) -> None:
    run, base, before = make_run(tmp_path, THREE_CHUNKS)
    (update,) = updates_of(run.table, 1)
    trained = before + update
    result = run.train(base, opening_of(run.encoding, {"only": Site(run.encoding, update, CAP)}))
    after = weights_of(run, result.checkpoint.weights)
    bound = run.encoding.error_bound(CLIP, 1, CAP) + 2 * np.spacing(np.abs(trained).max())
    assert float(np.abs(after - trained).max()) <= bound
    assert result.tail.contributors == 1
    assert result.tail.losses == pytest.approx([0.5], abs=1e-6)
    assert result.update_norm == pytest.approx(float(np.linalg.norm(update)), rel=1e-6)


@pytest.mark.parametrize("bits", [32, 24])
def test_four_sites_give_the_weighted_mean(tmp_path: Path, bits: int) -> None:
    run, base, before = make_run(tmp_path, THREE_CHUNKS, bits=bits)
    updates, shares = updates_of(run.table, 4), [1000, 400, 700, 10]
    sites = {f"site-{i}": Site(run.encoding, update, share) for i, (update, share) in enumerate(zip(updates, shares, strict=True))}
    result = run.train(base, opening_of(run.encoding, sites))
    mean = np.average(np.array(updates, np.float64), axis=0, weights=shares)
    after = weights_of(run, result.checkpoint.weights)
    bound = run.encoding.error_bound(CLIP, 4, sum(shares)) + 2 * np.spacing(np.float32(np.abs(before).max() + 1))
    assert float(np.abs(after - (before.astype(np.float64) + mean)).max()) <= bound
    assert result.tail.total_weight == sum(shares)
    assert len(result.tensor_peaks) == {32: 0, 24: len(run.table.entries)}[bits]


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path, SMALL, ServerOptimiserTerms(kind="fedadam"), ema=0.9)
    sites = {f"site-{i}": Site(run.encoding, update, 100 + i) for i, update in enumerate(updates_of(run.table, 4))}
    results = [
        run.train(base, opening_of(run.encoding, dict(order), workers))
        for order in itertools.permutations(sites.items())
        for workers in (1, 2)
    ]
    assert len({(result.checkpoint, result.update_norm) for result in results}) == 1


def reference(terms: ServerOptimiserTerms, means: list[np.ndarray], x: np.ndarray, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """The published formulas in float64, one vector at a time."""
    m, v, ema = np.zeros_like(x), np.full_like(x, terms.tau**2), x.copy()
    for n, d in enumerate(means):
        if terms.kind == "fedavg":
            x = x + terms.learning_rate * d
        elif terms.kind == "fedavgm":
            m = terms.momentum * m + d
            x = x + terms.learning_rate * m
        else:
            m = terms.momentum * m + (1 - terms.momentum) * d
            if terms.kind == "fedadam":
                v = terms.beta2 * v + (1 - terms.beta2) * d**2
            else:
                v = v - (1 - terms.beta2) * d**2 * np.sign(v - d**2)
            x = x + terms.learning_rate * m / (np.sqrt(v) + terms.tau)
        keep = min(decay, (1 + n) / (10 + n))
        ema = keep * ema + (1 - keep) * x
    return x, ema


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_each_optimiser_follows_its_paper_over_rounds(tmp_path: Path, kind: str) -> None:
    terms = ServerOptimiserTerms.model_validate({"kind": kind, "learning_rate": 0.3, "momentum": 0.8, "beta2": 0.95, "tau": 0.01})
    run, checkpoint, before = make_run(tmp_path, THREE_CHUNKS, terms, ema=0.15)
    means = [updates_of(run.table, 1, seed)[0] for seed in range(3)]
    for update in means:
        sites = {name: Site(run.encoding, update, CAP) for name in ("east", "north", "west")}
        checkpoint = run.train(checkpoint, opening_of(run.encoding, sites)).checkpoint
    expected, expected_ema = reference(terms, [mean.astype(np.float64) for mean in means], before.astype(np.float64), 0.15)
    assert float(np.abs(weights_of(run, checkpoint.weights) - expected).max()) < 2e-6
    assert float(np.abs(weights_of(run, checkpoint.ema) - expected_ema).max()) < 2e-6
    moments = ServerOptimiser(terms).moments
    state = open_vector(run.artifacts.path(checkpoint.optimiser), state_table(run.table, moments))
    assert state.size == 1 + len(moments) * run.table.size
    assert float(state[0]) == 3.0


def test_the_first_checkpoint_is_the_untrained_weights_and_a_state_of_no_steps(tmp_path: Path) -> None:
    run, base, before = make_run(tmp_path, optimiser=ServerOptimiserTerms(kind="fedyogi", tau=0.5))
    assert base.ema == base.weights
    state = open_vector(run.artifacts.path(base.optimiser), state_table(SMALL, "mv"))
    d = SMALL.size
    assert state.tolist() == [0.0] + [0.0] * d + [0.25] * d
    assert weights_of(run, base.weights).tolist() == before.tolist()


def test_without_a_decay_the_average_is_the_weights(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path)
    result = run.train(base, opening_of(run.encoding, {"only": Site(run.encoding, updates_of(SMALL, 1)[0], 5)}))
    assert result.checkpoint.ema == result.checkpoint.weights != base.weights


def test_the_decay_of_the_average_warms_up() -> None:
    assert ema_decay_at(0.99, 0) == 0.1
    assert ema_decay_at(0.99, 8) == 0.5
    assert ema_decay_at(0.99, 10_000) == 0.99
    assert ema_decay_at(0.05, 0) == 0.05


def rehearsal_of(encoding: Encoding, spoil: bool = False) -> Site:
    site = Site(encoding, np.zeros(encoding.size, np.float32), 1, (0.0,))
    words = encoding.zero_words()
    words[3] += spoil
    site.raw = wire(words, encoding.bits)
    site.digest = hashlib.sha256(site.raw).digest()
    return site


def test_a_rehearsal_moves_nothing(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path)
    stored = run.artifacts.digests()
    result = run.rehearse(base, opening_of(run.encoding, {name: rehearsal_of(run.encoding) for name in "abc"}))
    assert (result.checkpoint, result.update_norm, result.tail.contributors) == (base, 0.0, 3)
    assert run.artifacts.digests() == stored


def test_a_rehearsal_whose_sum_is_not_zero_is_refused(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path)
    sites = {"a": rehearsal_of(run.encoding), "b": rehearsal_of(run.encoding, spoil=True)}
    with pytest.raises(SumRefused, match="its sum is not zero"):
        run.rehearse(base, opening_of(run.encoding, sites))


def assert_nothing_stored(run: Aggregation, before: list[str]) -> None:
    assert run.artifacts.digests() == before
    assert list((run.artifacts.root / "scratch").iterdir()) == []


def test_an_upload_that_changed_on_disk_leaves_no_checkpoint(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path, THREE_CHUNKS)
    before = run.artifacts.digests()
    site = Site(run.encoding, updates_of(run.table, 1)[0], 5)
    site.digest = bytes(32)
    with pytest.raises(ProtocolViolation):
        run.train(base, opening_of(run.encoding, {"only": site}))
    assert_nothing_stored(run, before)


class Scripted:
    """An opening whose blocks and tails are given."""

    def __init__(self, blocks: Sequence[tuple[int, Words]], provisional: OpenedTail, tail: OpenedTail) -> None:
        self._blocks, self._provisional, self._tail = blocks, provisional, tail

    def provisional_tail(self) -> OpenedTail:
        return self._provisional

    def __iter__(self) -> Iterator[tuple[int, Words]]:
        return iter(self._blocks)

    @property
    def tail(self) -> OpenedTail:
        return self._tail


TAIL = OpenedTail(total_weight=10, losses=(0.0,), clip_ratio=0.0, contributors=1)
WORDS = np.zeros(SMALL.size, np.uint32)


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (Scripted([(0, WORDS[:39])], TAIL, TAIL), "39 of 40 elements"),
        (Scripted([(0, WORDS), (0, WORDS[:1])], TAIL, TAIL), "already written"),
        (Scripted([(0, WORDS)], OpenedTail(11, (0.0,), 0.0, 1), TAIL), "total weight changed"),
    ],
    ids=["a block missing", "a block twice", "another weight at the end"],
)
def test_an_opening_that_contradicts_itself_leaves_no_checkpoint(tmp_path: Path, opening: Opening, reason: str) -> None:
    run, base, _ = make_run(tmp_path)
    before = run.artifacts.digests()
    with pytest.raises(CosiloError, match=reason):
        run.train(base, opening)
    assert_nothing_stored(run, before)


def test_weights_that_overflow_are_refused_by_their_position(tmp_path: Path) -> None:
    plain, first, _ = make_run(tmp_path)
    encoding = Encoding(32, 4, CAP, (Section(SMALL.size, 1e6),), loss_max=16.0, losses=1)
    run = Aggregation(plain.artifacts, SMALL, encoding, ServerOptimiserTerms(kind="fedavgm", learning_rate=100), 0.5)
    with run.artifacts.scratch() as path:
        state = np.zeros(1 + SMALL.size, np.float32)
        state[5] = 1e38  # the momentum of element 4
        write_weights(path, state_table(SMALL, "m"), [state])
        base = Checkpoint(first.weights, first.ema, run.artifacts.put_file(path))
    before = run.artifacts.digests()
    with pytest.raises(CosiloError, match="element 4 is not finite; training diverged"):
        run.train(base, opening_of(encoding, {"only": Site(encoding, np.zeros(SMALL.size), CAP)}))
    assert_nothing_stored(run, before)


def test_a_state_that_counts_no_steps_is_refused(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path)
    with run.artifacts.scratch() as path:
        write_weights(path, state_table(SMALL, ""), [np.array([STEPS_MAX], np.float32)])
        damaged = Checkpoint(base.weights, base.ema, run.artifacts.put_file(path))
    with pytest.raises(CosiloError, match=f"{STEPS_MAX} steps"):
        run.train(damaged, opening_of(run.encoding, {"only": Site(run.encoding, updates_of(SMALL, 1)[0], 5)}))


def test_an_encoding_of_another_model_is_refused(tmp_path: Path) -> None:
    run, base, _ = make_run(tmp_path)
    other = Aggregation(run.artifacts, SMALL, encoding_of(THREE_CHUNKS), FEDAVG, 0.0)
    with pytest.raises(CosiloError, match="values, the model 40"):
        other.train(base, Scripted([(0, WORDS)], TAIL, TAIL))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_same_sum_in_other_blocks_gives_the_same_bits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run, base, _ = make_run(tmp_path_factory.mktemp("blocks"), SMALL, ServerOptimiserTerms(kind="fedyogi"), ema=0.9)
    words = np.frombuffer(data.draw(st.binary(min_size=160, max_size=160)), np.uint32)
    cuts = sorted(data.draw(st.sets(st.integers(1, SMALL.size - 1), max_size=5)))
    edges = [0, *cuts, SMALL.size]
    whole = run.train(base, Scripted([(0, words)], TAIL, TAIL))
    pieces = run.train(base, Scripted([(a, words[a:b]) for a, b in itertools.pairwise(edges)], TAIL, TAIL))
    assert pieces.checkpoint == whole.checkpoint


def peak_bytes(run: Aggregation, base: Checkpoint, sites: int) -> tuple[int, Aggregate]:
    """Anonymous memory of one step over uploads in files, as tracemalloc counts it: mapped files are not in it."""
    folder = run.artifacts.root.parent
    words = np.zeros(run.encoding.length, np.uint32)
    words[run.encoding.size :] = run.encoding.zero_tail()
    raw = words.tobytes()
    (folder / "upload").write_bytes(raw)
    digest = hashlib.sha256(raw).digest()
    del words, raw
    fd = os.open(folder / "upload", os.O_RDONLY)

    def read(offset: int, buffer: memoryview) -> None:
        assert os.preadv(fd, [buffer], offset) == len(buffer)

    names = [f"site-{i:02d}" for i in range(sites)]
    tracemalloc.start()
    try:
        result = run.train(base, SumOpening(run.encoding, dict.fromkeys(names, read), dict.fromkeys(names, digest)))
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()
        os.close(fd)


def test_memory_depends_neither_on_the_model_nor_on_the_number_of_sites(tmp_path: Path) -> None:
    peaks = []
    for chunks, sites in [(8, 2), (8, 24), (24, 2)]:  # 8 and 24 MiB
        table = TensorTable.of([("w", (chunks, BLOCK_WORDS))])
        folder = tmp_path / f"{chunks}-{sites}"
        run, base, _ = make_run(folder, table, ServerOptimiserTerms(kind="fedadam"), ema=0.9)
        run = Aggregation(run.artifacts, table, encoding_of(table, participants=24), run.optimiser, 0.9)
        peak, result = peak_bytes(run, base, sites)
        assert result.tail.contributors == sites
        peaks.append(peak)
    assert max(peaks) - min(peaks) < 1 << 20
    assert max(peaks) < 24 << 20
