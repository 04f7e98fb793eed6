"""A site's folder for the protocol: one ledger, one vault, one lock, and each run's update and spool.

    state.db                 ledger (never deleted) and sealed secrets, `synchronous=FULL`
    journal.lock             held by the one daemon that may sign with this site's key
    incarnation              see cosilo_client.incarnation
    rounds/RUN/              masks.key round.key update update.json spool-ATTEMPT; gone when the round is
    personal/RUN/            layers that stay at this site, if the run has any; gone when the site leaves the run

Owns which file exists when; the site role (cosilo_client.secagg) decides, the trainer and the session read and write
through the paths given here. Must not know gRPC or the clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from sqlalchemy import Engine

from cosilo_client.durable import make_folder, remove_folder, unlink_durably, write_durably
from cosilo_client.incarnation import Incarnation
from cosilo_client.ledger import SCHEMA_VERSION, UPGRADES, Ledger, Phase, RoundEntry, RoundState, tables
from cosilo_client.personal import PersonalLayers
from cosilo_client.vault import Vault
from cosilo_common.database import open_database, prepare_schema
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Randomness, SystemRandomness
from cosilo_common.transfer import is_digest

DATABASE_NAME: Final = "state.db"
ROUNDS_FOLDER: Final = "rounds"
LOCK_NAME: Final = "journal.lock"
LEFT: Final = "this site left the run"


@dataclass(frozen=True)
class TrainedUpdate:
    """What the trainer left for one round.

    offset_bytes: where the little-endian float32 vector starts in the update file; weight: W, 1 or more; losses: one
    for each loss word; has_vector: False in a statistics round, which has facts and no update file. data: digest of the images in hex,
    where the update is their moments (R9).
    """

    round: int
    offset_bytes: int
    weight: int
    losses: tuple[float, ...]
    has_vector: bool = True
    data: str = ""


class RoundFiles:
    """The files of one run's current round. All are private but the spool's bytes, once they are masked and signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def update(self) -> Path:
        """The unmasked update, written by the trainer."""
        return self.folder / "update"

    @property
    def facts(self) -> Path:
        """TrainedUpdate as JSON; written last, so that it vouches for a whole update file."""
        return self.folder / "update.json"

    def spool(self, attempt: int) -> Path:
        """The upload of one attempt, in wire chunks."""
        return self.folder / f"spool-{attempt}"

    def keep_spool(self, attempt: int | None) -> None:
        """Unlinks every spool but one attempt's, and every partial one."""
        if self.folder.is_dir():
            kept = None if attempt is None else self.spool(attempt)
            unlink_durably(*(path for path in self.folder.glob("spool-*") if path != kept))

    def discard_update(self) -> None:
        """Unlinks the unmasked update and what was said of it."""
        unlink_durably(self.facts, self.update)


class Journal:
    """The one journal of a site's daemon. Open it with `Journal.open`; closing it frees the lock."""

    def __init__(self, folder: Path, engine: Engine, lock: int, randomness: Randomness) -> None:
        self._engine = engine
        self._lock = lock
        self._rounds = folder / ROUNDS_FOLDER
        self._incarnation = Incarnation(engine, folder / "incarnation", randomness)
        self.writing = threading.RLock()
        """Held where one thread checks the ledger and then writes: a site may be in rounds of several runs at once."""
        self.ledger = Ledger(engine)
        self.vault = Vault(engine, self._rounds, randomness)
        self.personal = PersonalLayers(folder)

    @classmethod
    def open(cls, folder: Path, *, site_key: bytes, randomness: Randomness | None = None, vouched: bool = False) -> Self:
        """Locks and opens a site's journal, and finishes what a crash interrupted.

        site_key: the Ed25519 public key that this site signs with (32 bytes); a new one starts a new incarnation and
        abandons rounds begun under the old. vouched: a person says that this folder is no restored backup. Raises
        CosiloError where another daemon holds the journal (naming its pid), where the folder was restored from a
        backup, or where its schema is newer.
        """
        make_folder(folder)
        lock = _take_lock(folder / LOCK_NAME)
        try:
            engine = _open_state(folder)
            journal = cls(folder, engine, lock, randomness or SystemRandomness())
            make_folder(journal._rounds)
            if journal._incarnation.claim(site_key, vouched=vouched):
                for entry in journal.ledger.open_rounds():
                    journal.finish(entry, RoundState.ABANDONED, "this site's key changed")
            journal._recover()
        except BaseException:
            os.close(lock)
            raise
        return journal

    def close(self) -> None:
        """Closes the database and frees the lock."""
        self._engine.dispose()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def files(self, run: bytes) -> RoundFiles:
        """The files of a run's current round."""
        return RoundFiles(self._rounds / run.hex())

    def begin(self, entry: RoundEntry) -> None:
        """Fixes a new round in the ledger (R1), then forgets the run's earlier one (R7)."""
        self.advance()
        self.ledger.begin_round(entry)
        self._forget(entry.run)
        make_folder(self.files(entry.run).folder)

    def finish(self, entry: RoundEntry, state: RoundState, outcome: str) -> None:
        """Closes or abandons a round: the ledger's word, then its keys, then its files (R7).

        Killed between, the next `open` finishes: files of a run without an open round are forgotten.
        """
        self.ledger.finish_round(entry.run, entry.round, state, outcome)
        self._forget(entry.run)

    def leaves(self, entry: RoundEntry) -> bool:
        """Whether this site has left the run while nothing of this round had gone out: then nothing does."""
        return entry.phase < Phase.UPLOADED and bool(self.ledger.left_at(entry.run))

    def advance(self) -> None:
        """Outdates every backup of this folder; see cosilo_client.incarnation."""
        with self.writing:
            self._incarnation.advance()

    def trained(self, run: bytes, update: TrainedUpdate) -> None:
        """Notes that an open round's update file is whole: it is synced, and not trained again after a restart.

        Raises CosiloError where the round ended, or was overtaken, while the trainer was at it.
        """
        files, entry = self.files(run), self.ledger.round(run, update.round)
        if entry is None or entry.state is not RoundState.OPEN:
            raise CosiloError("keep update", f"round {update.round} is not open at this site", "throw the update away")
        if update.has_vector:
            with files.update.open("rb") as file:
                os.fsync(file.fileno())
            files.update.chmod(0o600)
        write_durably(files.facts, json.dumps(asdict(update)).encode())
        self.ledger.reach(run, update.round, Phase.TRAINED)

    def trained_update(self, run: bytes, round_: int) -> TrainedUpdate | None:
        """What was trained for this round, or None if nothing is (or no longer is) there."""
        files = self.files(run)
        if not files.facts.exists():
            return None
        update = _facts(files.facts.read_bytes())
        if update is None:
            return None  # a disk changed it: what it said of the update is lost, so that is trained again
        whole = files.update.exists() or not update.has_vector
        return update if whole and update.round == round_ else None

    def _forget(self, run: bytes) -> None:
        self.vault.forget(run)
        remove_folder(self.files(run).folder)

    def _recover(self) -> None:
        """Brings files to what the ledger says: each step is one that a crash can have cut off after its commit."""
        open_runs = {entry.run: entry for entry in self.ledger.open_rounds()}
        for folder in self._rounds.iterdir():
            if not is_digest(folder.name):
                continue  # lost+found, or what a file system leaves beside an open file: not ours
            run = bytes.fromhex(folder.name)
            if run not in open_runs:
                self._forget(run)
        for run in self.personal.runs():
            if self.ledger.left_at(run):
                self.personal.forget(run)
        for entry in open_runs.values():
            if self.leaves(entry):
                self.finish(entry, RoundState.ABANDONED, LEFT)
                continue
            make_folder(self.files(entry.run).folder)
            if entry.attempt == 0:
                self.vault.forget(entry.run)  # sealed before the first advert: the last round's
            if self.trained_update(entry.run, entry.round) is None:
                self.files(entry.run).discard_update()  # half written, or the last round's
            self.reconcile(entry)

    def reconcile(self, entry: RoundEntry) -> None:
        """Deletes what an open round needs no longer.

        Spools of other attempts and unsigned ones; mask keys once the spool is signed or the site has consented; the
        unmasked update once it has consented, and its spool if it is no survivor.
        """
        files = self.files(entry.run)
        consent = self.ledger.consent(entry.run, entry.round)
        leaves = entry.upload is not None and (consent is None or consent.survives)
        files.keep_spool(entry.attempt if leaves else None)
        if entry.upload is not None or consent is not None:
            self.vault.destroy_masks(entry.run)
        if consent is not None:
            files.discard_update()


def _facts(data: bytes) -> TrainedUpdate | None:
    try:
        facts = json.loads(data)
        losses = tuple(float(loss) for loss in facts.pop("losses"))
        measured = bytes.fromhex(facts.pop("data", "")).hex()
        update = TrainedUpdate(**facts, losses=losses, data=measured)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # whatever does not fit where it is read
        return None
    numbers = (update.round, update.offset_bytes, update.weight)
    sound = all(type(number) is int for number in numbers) and type(update.has_vector) is bool
    return update if sound and update.round >= 1 and update.offset_bytes >= 0 and update.weight >= 1 else None


def open_ledger(folder: Path) -> Ledger:
    """The ledger alone, for `cosilo-site accept`, `status` and `audit`: no lock, so the daemon may run."""
    make_folder(folder)
    return Ledger(_open_state(folder))


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the daemon's lock and opens nothing. Raises CosiloError where a daemon runs, naming its pid."""
    lock = _take_lock(folder / LOCK_NAME)
    try:
        yield
    finally:
        os.close(lock)


def _open_state(folder: Path) -> Engine:
    engine = open_database(folder / DATABASE_NAME, synchronous="FULL")
    prepare_schema(engine, tables, SCHEMA_VERSION, UPGRADES)
    return engine


def _take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise CosiloError(
            "open journal",
            f"{path.parent}: another daemon (pid {holder}) holds it; two would sign with one key",
            f"stop it first: kill {holder}",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
