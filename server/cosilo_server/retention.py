"""Retention: which checkpoints stay, and the collector that deletes what nothing refers to.

Owns the policy and the order of deletion: the database first, then the file. So a kill -9 anywhere leaves files too many, which the next
collection finds, and never a row too many. Must not know protobuf or rounds in progress: their base is the newest checkpoint, which always
stays.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from cosilo_common.errors import CosiloError
from cosilo_server.artifacts import Artifacts
from cosilo_server.config import Retention
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.store import Store

log = structlog.get_logger(__name__)

COLLECT_S: Final = 3600.0  # between collections where no checkpoint was made: names change, downloads end
LINGER_S: Final = 600.0  # a download that was cut may still resume what policy has retired since
HOLD_FILE: Final = "collection.lock"


@dataclass(frozen=True)
class Collected:
    """What a collection did. bytes: on disk afterwards."""

    retired: int
    deleted: int
    deleted_bytes: int
    bytes: int


def kept(rounds: Sequence[int], named: Mapping[int, str], policy: Retention) -> dict[int, str]:
    """Which of these rounds' checkpoints stay, and why, in words. rounds: ascending."""
    reasons: dict[int, str] = {}
    for number in rounds:
        if policy.keep_every and number % policy.keep_every == 0:
            reasons[number] = f"every {policy.keep_every}th"
    for number in rounds[-policy.keep_last :]:
        reasons[number] = f"last {policy.keep_last}"
    if rounds:
        reasons[rounds[-1]] = "newest"
    for number, name in named.items():
        if number in rounds:
            reasons[number] = f"named {name}" if name else "kept by hand"
    return reasons


class Collector:
    """Retires and deletes for one coordinator. hold: a file in its data folder. Blocks on the disk; one call at a time."""

    def __init__(self, store: Store, artifacts: Artifacts, policy: Retention, metrics: CoordinatorMetrics, hold: Path) -> None:
        self._store = store
        self._artifacts = artifacts
        self._policy = policy
        self._metrics = metrics
        self._hold = hold

    def reasons(self, run: bytes) -> dict[int, str]:
        """Why each checkpoint of a run that is still there stays; one that waits for the next collection has none."""
        shelved = self._store.shelf.shelved(run)
        return kept(shelved.rounds, shelved.named, self._policy)

    def collect(self) -> Collected | None:
        """Retires by policy, trims traces and grids, and deletes every artifact that nothing refers to; None while a backup copies."""
        with holding(self._hold, exclusive=True) as held:
            if not held:
                return None
            self._artifacts.claim({digest.hex(): at for digest, at in self._store.shelf.stored().items()})
            retired = sum(self._retire(run.run) for run in self._store.runs())
            return self._sweep(retired)

    def _retire(self, run: bytes) -> int:
        shelf = self._store.shelf
        shelved = shelf.shelved(run)
        stay = kept(shelved.rounds, shelved.named, self._policy)
        going = [number for number in shelved.rounds if number not in stay]
        if going:
            shelf.retire(run, going)
            log.info("checkpoints retired", run=run.hex()[:12], rounds=going)
        shelf.trim(run, traced_rounds=self._policy.traced_rounds, grids=self._policy.grids)
        return len(going)

    def _sweep(self, retired: int) -> Collected:
        found = self._artifacts.digests()  # before the references: what is put and stored in between is not in it
        wanted = {digest.hex() for digest in self._store.shelf.references()}
        deleted = deleted_bytes = left_bytes = 0
        for digest in found:
            size = self._artifacts.size(digest)
            if digest not in wanted and self._artifacts.delete_idle(digest, LINGER_S):
                deleted, deleted_bytes = deleted + 1, deleted_bytes + size
            else:
                left_bytes += size
        self._metrics.artifacts_bytes.set(left_bytes)
        self._metrics.checkpoints_retired.inc(retired)
        self._metrics.artifacts_deleted.inc(deleted)
        if deleted:
            log.info("artifacts deleted", artifacts=deleted, bytes=deleted_bytes, left_bytes=left_bytes)
        return Collected(retired, deleted, deleted_bytes, left_bytes)


@contextmanager
def holding(path: Path, *, exclusive: bool) -> Iterator[bool]:
    """Whether the hold on a data folder's artifacts was had, for the length of the block: the collector's alone, or shared by backups."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CosiloError("hold artifacts", f"{path}: {error.strerror}", "check the folder, its owner and its free space") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_NB | fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
