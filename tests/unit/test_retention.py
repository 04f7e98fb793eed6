"""Retention: which checkpoints stay, and that whatever happens to the collector, nothing that the store refers to is missing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, Participant
from cosilo_server import schema
from cosilo_server.artifacts import Artifacts
from cosilo_server.closing import RoundOutcome
from cosilo_server.config import Retention
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.retention import HOLD_FILE, Collector, holding, kept
from cosilo_server.spans import Span
from cosilo_server.store import Store, StoredCheckpoint
from tests.protocol.manifests import a_manifest

POLICY = Retention(keep_last=3, keep_every=5, grids=2, traced_rounds=4)
NAMES = ("st-anna", "st-beda", "st-clara")


def manifest_of(salt: str) -> Manifest:
    return a_manifest(tuple(Participant(name=name, key=sha256((salt + name).encode()).hex()) for name in NAMES))


MANIFEST = manifest_of("")
RUN = MANIFEST.digest()


class Killed(BaseException):
    """Stands for the end of the process."""


class Folder:
    """One data folder, as one process opens it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "state.db")
        self.artifacts = Artifacts(root / "artifacts")
        self.metrics = CoordinatorMetrics()
        self.collector = Collector(self.store, self.artifacts, POLICY, self.metrics, root / HOLD_FILE)

    def checkpoint(self, number: int) -> StoredCheckpoint:
        weights, ema, optimiser = (bytes.fromhex(self.artifacts.put_bytes(f"{kind} {number}".encode())) for kind in ("w", "e", "o"))
        return StoredCheckpoint(RUN, number, weights, ema, optimiser, 10, time.time())

    def fill(self, rounds: int) -> None:
        self.store.add_run(RUN, MANIFEST.canonical(), b"s", "anna", self.checkpoint(0))
        for number in range(1, rounds + 1):
            self.add(number)

    def add(self, number: int) -> None:
        row = {name: value for name, value in vars(self.checkpoint(number)).items() if name != "step"}
        with self.store._engine.begin() as db:
            db.execute(schema.checkpoints.insert().values(row))

    def collected(self, **expected: int) -> None:
        done = self.collector.collect()
        assert done is not None
        assert {name: getattr(done, name) for name in expected} == expected

    def present(self) -> dict[str, list[int]]:
        """Rounds whose artifact of a kind is on disk."""
        return {
            kind: [c.round for c in self.store.checkpoints(RUN) if self.artifacts.has(getattr(c, kind).hex())]
            for kind in ("weights", "ema", "optimiser")
        }


def test_the_policy_says_what_stays_and_why() -> None:
    assert kept(range(13), {7: "", 2: "best"}, POLICY) == {
        0: "every 5th",
        2: "named best",
        5: "every 5th",
        7: "kept by hand",
        10: "last 3",
        11: "last 3",
        12: "newest",
    }
    assert kept([], {}, POLICY) == {}
    assert kept([0], {}, Retention(keep_last=1, keep_every=0)) == {0: "newest"}


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 8), st.integers(0, 8), st.sets(st.integers(0, 60)))
def test_the_newest_and_the_named_always_stay(rounds: set[int], last: int, every: int, named: set[int]) -> None:
    stay = kept(sorted(rounds), dict.fromkeys(named, ""), Retention(keep_last=last, keep_every=every))
    assert max(rounds) in stay
    assert named & rounds <= stay.keys() <= rounds
    assert len(stay) >= min(last, len(rounds))
    assert kept(sorted(stay), dict.fromkeys(named, ""), Retention(keep_last=last, keep_every=every)).keys() == stay.keys()


def test_what_policy_retires_is_deleted_and_optimisers_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(12)
    folder.store.shelf.keep(RUN, 7, "best")
    folder.collected(retired=7, deleted=7 * 2 + 12)
    stay = [0, 5, 7, 10, 11, 12]
    assert folder.present() == {"weights": stay, "ema": stay, "optimiser": [12]}
    assert sorted(folder.store.shelf.retired(RUN)) == [1, 2, 3, 4, 6, 8, 9]
    assert folder.collector.reasons(RUN)[7] == "named best"
    folder.collected(retired=0, deleted=0)


def test_a_name_holds_a_checkpoint_until_it_is_taken_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(4)
    shelf = folder.store.shelf
    shelf.keep(RUN, 1, "first")
    shelf.keep(RUN, 1, "best")  # again with another name: that one
    with pytest.raises(CosiloError, match="the name 'best' is round 1's"):
        shelf.keep(RUN, 2, "best")
    with pytest.raises(CosiloError, match="round 9 made no checkpoint"):
        shelf.keep(RUN, 9, "")
    with pytest.raises(CosiloError, match="not a checkpoint's name"):
        shelf.keep(RUN, 2, "Best of all")
    folder.collected(retired=0)
    shelf.unkeep(RUN, 1)
    with pytest.raises(CosiloError, match="not kept by name"):
        shelf.unkeep(RUN, 1)
    folder.collected(retired=1)
    with pytest.raises(CosiloError, match="retired by policy"):
        shelf.keep(RUN, 1, "")


def test_what_is_on_its_way_into_the_store_stays_and_what_a_crash_left_goes(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(1)
    pending = folder.checkpoint(2)  # written, not committed
    folder.collected(deleted=1)  # the optimiser of round 0
    assert folder.artifacts.has(pending.weights.hex())
    after_crash = Folder(tmp_path)
    after_crash.collected(deleted=3)
    assert not after_crash.artifacts.has(pending.weights.hex())


def test_bytes_that_are_put_again_while_they_are_retired_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(3)
    folder.collected(retired=0)
    folder.add(4)
    again = folder.artifacts.put_bytes(b"w 1")  # round 1's bytes are made a second time, for a checkpoint that is not committed yet
    folder.collected(retired=1)
    assert folder.artifacts.has(again)


def test_what_is_being_downloaded_stays_and_may_be_resumed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.fill(4)
    digest = folder.store.checkpoints(RUN)[1].weights.hex()
    with folder.artifacts.lease(digest) as path:
        folder.collected(retired=1)
        assert path.read_bytes() == b"w 1"
    folder.collected(deleted=0)  # it ended just now, perhaps by a cut
    monkeypatch.setattr("cosilo_server.retention.LINGER_S", 0.0)
    folder.collected(deleted=1)
    with pytest.raises(CosiloError, match="not in the store"), folder.artifacts.lease(digest):
        pass


def test_what_was_downloaded_whole_is_not_waited_for(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(4)
    digest = folder.store.checkpoints(RUN)[1].weights.hex()
    with folder.artifacts.lease(digest):
        pass
    folder.artifacts.has_been_read(digest)
    folder.collected(retired=1)
    assert not folder.artifacts.has(digest)


@pytest.mark.parametrize("step", range(20))
def test_a_kill_at_any_step_leaves_nothing_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    folder = Folder(tmp_path)
    folder.fill(8)
    folder = Folder(tmp_path)  # a new process: nothing is on its way
    steps = iter(range(step + 1))

    def dying(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(steps, None) == step:
                raise Killed
            return call(*args, **kwargs)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(folder.artifacts, "delete", dying(folder.artifacts.delete))
        patched.setattr(folder.store.shelf, "retire", dying(folder.store.shelf.retire))
        try:
            folder.collector.collect()
        except Killed:
            pass
    after = Folder(tmp_path)
    assert all(after.artifacts.has(digest.hex()) for digest in after.store.shelf.references())
    after.collected()
    assert {bytes.fromhex(digest) for digest in after.artifacts.digests()} == after.store.shelf.references()
    assert after.present() == {"weights": [0, 5, 6, 7, 8], "ema": [0, 5, 6, 7, 8], "optimiser": [8]}


def test_grids_and_traces_are_trimmed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(1)
    clock = iter(range(100))
    now = time.time()
    folder.store._now = lambda: now + 100 + next(clock)
    for n in range(4):
        folder.store.add_grid(RUN, 1, bytes.fromhex(folder.artifacts.put_bytes(f"grid {n}".encode())))
    with folder.store._engine.begin() as db:
        for number in range(1, 8):
            round_ = {"run": RUN, "number": number, "kind": "train", "started_at": 0.0, "state": "{}", "phase": "closed"}
            db.execute(schema.rounds.insert().values(round_))
            db.execute(schema.events.insert().values(run=RUN, number=number, at=0.0, what="closed", phase="closed", attempt=1))
    for number in range(1, 8):
        folder.store.spans.add(RUN, number, [Span("", "phase", "training", 1, 1.0, 2.0)])
    folder.collected()
    assert [grid.created_at for grid in folder.store.grids(RUN, 10)] == [now + 103, now + 102]
    assert [bool(folder.store.events(RUN, number)) for number in range(1, 8)] == [False] * 3 + [True] * 4
    assert [bool(folder.store.spans.of(RUN, number, 1)) for number in range(1, 8)] == [False] * 3 + [True] * 4
    assert Folder(tmp_path).collector.collect() is not None
    assert len(folder.artifacts.digests()) == 2 + 5  # grids; two checkpoints, of which one has no optimiser any more


def test_a_sum_of_moments_is_never_collected(tmp_path: Path) -> None:
    """Sites give it once for an extractor (R9): there is no second."""
    folder = Folder(tmp_path)
    folder.fill(1)
    moments = folder.artifacts.put_bytes(b"moments")
    outcome = RoundOutcome(100, 3, 0.0, moments=moments).to_json()
    row = {"run": RUN, "number": 1, "kind": "moments", "started_at": 0.0, "state": "{}", "phase": "closed", "outcome": outcome}
    with folder.store._engine.begin() as db:
        db.execute(schema.rounds.insert().values(row))
        db.execute(schema.rounds.insert().values({**row, "number": 2, "phase": "abandoned", "outcome": ""}))
    assert folder.artifacts.has(moments)
    for number in range(2, 12):
        folder.add(number)
    assert folder.collector.collect() is not None
    assert folder.artifacts.has(moments)
    assert bytes.fromhex(moments) in folder.store.shelf.references()  # so that backups take it along


def test_a_backup_holds_the_collector_off(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(8)
    with holding(tmp_path / HOLD_FILE, exclusive=False) as held:
        assert held
        assert folder.collector.collect() is None
    folder.collected(retired=4)


def test_it_is_measured(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(8)
    done = folder.collector.collect()
    assert done is not None
    value = folder.metrics.registry.get_sample_value
    assert value("cosilo_checkpoints_retired_total") == 4
    assert value("cosilo_artifacts_deleted_total") == done.deleted
    assert value("cosilo_artifacts_bytes") == done.bytes == sum(map(folder.artifacts.size, folder.artifacts.digests()))


def test_bytes_of_one_digest_in_two_runs_stay_while_either_needs_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.fill(4)
    other = manifest_of("other")
    shared = folder.store.checkpoints(RUN)[1]
    first = StoredCheckpoint(other.digest(), 0, shared.weights, b"", shared.optimiser, 10, 0.0)
    assert other.digest() != RUN
    folder.store.add_run(other.digest(), other.canonical(), b"s", "anna", first)
    folder.collected(retired=1)
    assert folder.artifacts.has(shared.weights.hex())
    assert not folder.artifacts.has(shared.ema.hex())
    assert folder.artifacts.has(shared.optimiser.hex())
