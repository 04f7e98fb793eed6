"""What the coordinator must not forget: runs, orders, rounds and checkpoints, in one SQLite database; who belongs to it is `party_store`'s.

Owns queries. Must not know what an event means or when a round moves. Every method is one transaction; all may block on the disk, so the
conductor calls them from its own thread. Persist, then speak: a commit here precedes every message that follows from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, Table, case, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from cosilo_common.database import forget_deleted, open_database, prepare_schema, reading
from cosilo_common.manifest import Manifest, parse_manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.statements import Statement, Transaction, ask, ask_one, asking, writing
from cosilo_server import schema
from cosilo_server.party_store import PartyStore, SiteSeen
from cosilo_server.rounds.record import dump, load
from cosilo_server.rounds.state import ENDED, Deadlines, Round, Terms, WeightsStep
from cosilo_server.shelf import Shelf
from cosilo_server.snapshot import snapshot
from cosilo_server.spans import Spans
from cosilo_server.store_statements import (
    ABANDONED_SINCE_CLOSE,
    ADD_BYTES,
    ADD_CHECKPOINT,
    ADD_EVENT,
    ADD_MESSAGE,
    ADD_STEP,
    BEGIN_ROUND,
    CHECKPOINT_OF,
    CHECKPOINTS,
    CLOSE_ROUND,
    COUNT_CLOSED,
    DROP_MESSAGES,
    LAST_OUTCOME,
    MESSAGES_OF,
    NEWEST_CHECKPOINT,
    NEWEST_ROUNDS,
    NO_LIMIT,
    ONE_ROUND,
    OPEN_ORDER,
    RUN,
    RUNS,
    SAVE_ROUND,
)

__all__ = ["Order", "Pause", "SiteSeen", "Store", "StoredCheckpoint", "StoredGrid", "StoredRound", "StoredRun", "terms_of"]


@dataclass(frozen=True)
class Pause:
    """Who paused a run, and why; reason may be empty."""

    admin: str
    reason: str

    @property
    def words(self) -> str:
        """As people read it."""
        return f"paused by {self.admin}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class StoredRun:
    """One run as stored. run: 32 bytes."""

    run: bytes
    manifest: Manifest
    signature: bytes
    signer: str
    created_at: float
    stopped: bool
    paused: Pause | None = None


@dataclass(frozen=True)
class Order:
    """Rounds that an admin asked for, and how many of them have closed."""

    id: int
    run: bytes
    kind: RoundKind
    wanted: int
    closed: int


@dataclass(frozen=True)
class StoredCheckpoint:
    """The artifacts of the global model after a round; digests are 32 bytes, empty where there is none. step: to the weights, from those before."""

    run: bytes
    round: int
    weights: bytes
    ema: bytes
    optimiser: bytes
    bytes: int
    created_at: float
    step: WeightsStep | None = None


@dataclass(frozen=True)
class StoredGrid:
    """A sample grid that was drawn from a round's checkpoint. digest: of the PNG among the artifacts, 32 bytes."""

    run: bytes
    round: int
    digest: bytes
    created_at: float


@dataclass(frozen=True)
class StoredRound:
    """A round with what the machine does not know. outcome: JSON, empty until the sum is open."""

    state: Round
    bytes_down: int
    bytes_up: int
    outcome: str


def terms_of(manifest: Manifest) -> Terms:
    """What the round machine needs of a manifest."""
    return Terms(
        participants=tuple(p.name for p in manifest.participants),
        secure=manifest.secure,
        n_min=manifest.n_min,
        f=manifest.f,
        cohort=manifest.cohort,
        deadlines=Deadlines(**manifest.deadlines.model_dump()),
    )


class Store(PartyStore):
    """The coordinator's database. now: UTC seconds."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._engine = open_database(path, synchronous="FULL")
        prepare_schema(
            self._engine,
            schema.metadata,
            schema.SCHEMA_VERSION,
            schema.UPGRADES,
            lambda found: snapshot(
                path, path.with_name(f"{path.name}.v{found}.bak"), "the database was put back as it was before an upgrade"
            ),
        )
        forget_deleted(self._engine)  # of a round that ended just before a crash
        super().__init__(self._engine, now)
        self.shelf = Shelf(self._engine, now)
        self.spans = Spans(self._engine)
        self._manifests: dict[bytes, Manifest] = {}
        self._messages: dict[bytes, tuple[int, frozenset[bytes]]] = {}

    def close(self) -> None:
        self._engine.dispose()

    # --- runs ---

    def add_run(self, run: bytes, manifest: bytes, signature: bytes, signer: str, first: StoredCheckpoint, base: bytes = b"") -> bool:
        """Stores a run with its untrained checkpoint, and the digest of what its adapters stand on; False where it stands already."""
        with self._engine.begin() as db:
            row = {"run": run, "manifest": manifest, "signature": signature, "signer": signer, "created_at": self._now(), "stopped": 0}
            added = db.execute(insert(schema.runs).values(row).on_conflict_do_nothing()).rowcount == 1
            if added:
                db.execute(insert(schema.checkpoints).values(_checkpoint_row(first)))
            if added and base:
                db.execute(insert(schema.bases).values({"run": run, "digest": base, "created_at": self._now()}))
            return added

    def runs(self) -> list[StoredRun]:
        """All runs, oldest first."""
        with reading(self._engine) as db:
            rows = db.execute(RUNS.order_by(schema.runs.c.created_at, schema.runs.c.run)).mappings().all()
        return [self._run(row) for row in rows]

    def run(self, run: bytes) -> StoredRun | None:
        row = ask_one(self._engine, RUN, of_run=run)
        return None if row is None else self._run(row._asdict())

    def sign_run(self, run: bytes, signature: bytes, signer: str) -> None:
        """Puts an admin's signature of a run's manifest in the place of the one that stood there."""
        with self._engine.begin() as db:
            db.execute(update(schema.runs).where(schema.runs.c.run == run).values(signature=signature, signer=signer))

    def set_stopped(self, run: bytes, stopped: bool) -> None:
        """Stops a run, cancelling what is still ordered, or lets it go on. A stopped run is paused no longer."""
        with self._engine.begin() as db:
            db.execute(update(schema.runs).where(schema.runs.c.run == run).values(stopped=int(stopped)))
            if stopped:
                db.execute(update(schema.orders).where(schema.orders.c.run == run).values(cancelled=1))
                db.execute(delete(schema.paused_runs).where(schema.paused_runs.c.run == run))

    def pause(self, run: bytes, pause: Pause) -> None:
        """Pauses a run; what is ordered stays. Paused again, the newest words stand."""
        row = {"run": run, "admin": pause.admin, "reason": pause.reason, "since": self._now()}
        with self._engine.begin() as db:
            db.execute(insert(schema.paused_runs).values(row).on_conflict_do_update(index_elements=["run"], set_=row))

    def resume(self, run: bytes) -> None:
        """Lets a paused run go on."""
        with self._engine.begin() as db:
            db.execute(delete(schema.paused_runs).where(schema.paused_runs.c.run == run))

    def _run(self, row: Mapping[Any, Any] | RowMapping) -> StoredRun:
        manifest = self._manifests.get(row["run"])
        if manifest is None:
            manifest = self._manifests[row["run"]] = parse_manifest(row["manifest"])
        paused = None if row["pause_admin"] is None else Pause(row["pause_admin"], row["pause_reason"])
        return StoredRun(row["run"], manifest, row["signature"], row["signer"], row["created_at"], bool(row["stopped"]), paused)

    # --- orders ---

    def add_order(self, run: bytes, kind: RoundKind, wanted: int) -> None:
        """Asks for rounds; a stopped run goes on."""
        with self._engine.begin() as db:
            db.execute(update(schema.runs).where(schema.runs.c.run == run).values(stopped=0))
            db.execute(insert(schema.orders).values(run=run, kind=kind, wanted=wanted, closed=0, cancelled=0, ordered_at=self._now()))

    def open_order(self, run: bytes) -> Order | None:
        """The oldest order that still lacks rounds."""
        row = ask_one(self._engine, OPEN_ORDER, of_run=run)
        return None if row is None else Order(row.id, row.run, RoundKind(row.kind), row.wanted, row.closed)

    def wanted(self, run: bytes, kind: RoundKind) -> tuple[int, int]:
        """(rounds asked for, rounds closed) of a kind; of a cancelled order, what had closed by then counts as asked for."""
        o = schema.orders
        asked = case((o.c.cancelled == 0, o.c.wanted), else_=o.c.closed)
        query = select(func.coalesce(func.sum(asked), 0)).where(o.c.run == run, o.c.kind == kind)
        r = schema.rounds
        done = select(func.count()).where(r.c.run == run, r.c.kind == kind, r.c.phase == "closed")
        with reading(self._engine) as db:
            return int(db.execute(query).scalar_one()), int(db.execute(done).scalar_one())

    # --- rounds ---

    def begin_round(self, state: Round) -> None:
        """Stores a new round. Raises sqlalchemy.exc.IntegrityError where the number is taken."""
        document, _ = dump(state)
        with writing(self._engine) as db:
            db.run(
                BEGIN_ROUND,
                run=state.run,
                number=state.number,
                kind=state.kind,
                started_at=state.started_at,
                state=document,
                phase=state.phase,
                bytes_down=0,
                bytes_up=0,
                outcome="",
            )
            self._add_event(db, state, "started", "")

    def save_round(self, state: Round, what: str, site: str = "") -> None:
        """Stores a moved round, the new messages in it, and what moved it. One that ended keeps none: what sites revealed is gone (R7)."""
        document, blobs = dump(state)
        with writing(self._engine) as db:
            if state.phase in ENDED:
                db.run(DROP_MESSAGES, of_run=state.run, of_number=state.number)
            else:
                stored = self._messages_of(state)
                rows = [{"run": state.run, "number": state.number, "digest": d, "message": m} for d, m in blobs.items() if d not in stored]
                db.run_many(ADD_MESSAGE, rows)
            db.run(SAVE_ROUND, of_run=state.run, of_number=state.number, to_state=document, to_phase=state.phase)
            self._add_event(db, state, what, site)
        self._messages[state.run] = (state.number, frozenset(blobs))
        if state.phase in ENDED:
            forget_deleted(self._engine)

    def _messages_of(self, state: Round) -> frozenset[bytes]:
        """Digests of a round's messages that this process has stored: they are many, and one is new at a time."""
        number, digests = self._messages.get(state.run, (0, frozenset()))
        return digests if number == state.number else frozenset()

    def close_round(self, state: Round, outcome: str, checkpoint: StoredCheckpoint | None) -> None:
        """In one transaction: the round closes, its outcome stands, its checkpoint is the newest, and its order has one round less to go."""
        document, _ = dump(state)
        with writing(self._engine) as db:
            db.run(CLOSE_ROUND, of_run=state.run, of_number=state.number, to_state=document, to_phase=state.phase, to_outcome=outcome)
            db.run(DROP_MESSAGES, of_run=state.run, of_number=state.number)
            if checkpoint is not None:
                db.run(ADD_CHECKPOINT, **_checkpoint_row(checkpoint))
            if checkpoint is not None and (step := checkpoint.step) is not None:
                db.run(ADD_STEP, run=checkpoint.run, round=checkpoint.round, digest=step.digest, bytes=step.bytes, base=step.base)
            db.run(COUNT_CLOSED, of_run=state.run, of_kind=state.kind)
            self._add_event(db, state, "closed", "")
        forget_deleted(self._engine)

    def add_bytes(self, run: bytes, number: int, down: int, up: int) -> None:
        """Adds to what a round transferred."""
        with writing(self._engine) as db:
            db.run(ADD_BYTES, of_run=run, of_number=number, down=down, up=up)

    def newest_round(self, run: bytes) -> StoredRound | None:
        """The run's round with the highest number."""
        return next(iter(self._rounds(run, NEWEST_ROUNDS, limit=1)), None)

    def rounds(self, run: bytes, newest: int | None = None) -> list[StoredRound]:
        """A run's rounds, oldest first. newest: no more than so many, the last ones."""
        return self._rounds(run, NEWEST_ROUNDS, limit=NO_LIMIT if newest is None else newest)[::-1]

    def round(self, run: bytes, number: int) -> StoredRound | None:
        """One round of a run."""
        return next(iter(self._rounds(run, ONE_ROUND, of_number=number)), None)

    def last_training_outcome(self, run: bytes) -> str:
        """The outcome of the run's last closed training round, JSON; empty where there is none."""
        row = ask_one(self._engine, LAST_OUTCOME, of_run=run)
        return "" if row is None else str(row.outcome)

    def abandoned_since_close(self, run: bytes) -> int:
        """How many rounds were abandoned since the last that closed."""
        return int(ask_one(self._engine, ABANDONED_SINCE_CLOSE, of_run=run).rounds)

    def last_phase(self, run: bytes, number: int) -> str:
        """The phase in which a round stood last before it ended; empty where it is not known."""
        e = schema.events
        query = select(e.c.phase).where(*_at(e, run, number), e.c.phase.not_in(ENDED)).order_by(e.c.id.desc()).limit(1)
        with reading(self._engine) as db:
            return db.execute(query).scalar_one_or_none() or ""

    def events(self, run: bytes, number: int) -> Sequence[RowMapping]:
        """What moved a round, in order."""
        e = schema.events
        with reading(self._engine) as db:
            return db.execute(select(e).where(*_at(e, run, number)).order_by(e.c.id)).mappings().all()

    def _rounds(self, run: bytes, statement: Statement, **which: int) -> list[StoredRound]:
        stored = self.run(run)
        if stored is None:
            return []
        with asking(self._engine) as db:
            rows = [row._asdict() for row in db.ask(statement, of_run=run, **which)]
            live = [row["number"] for row in rows if row["phase"] not in ENDED]
            found = [each for number in live for each in db.ask(MESSAGES_OF, of_run=run, of_number=number)]
        blobs = {each.digest: each.message for each in found}
        terms = terms_of(stored.manifest)
        return [_stored_round(row, terms, blobs if row["phase"] not in ENDED else _Forgotten()) for row in rows]

    def _add_event(self, db: Transaction, state: Round, what: str, site: str) -> None:
        named = {"run": state.run, "number": state.number, "phase": state.phase, "attempt": state.attempt}
        db.run(ADD_EVENT, **named, at=self._now(), what=what, site=site)

    # --- checkpoints ---

    def checkpoints(self, run: bytes) -> list[StoredCheckpoint]:
        """A run's checkpoints, oldest first."""
        c = schema.checkpoints
        with reading(self._engine) as db:
            rows = db.execute(CHECKPOINTS.where(c.c.run == run).order_by(c.c.round)).mappings().all()
        return [_checkpoint(row) for row in rows]

    def newest_checkpoint(self, run: bytes) -> StoredCheckpoint | None:
        row = ask_one(self._engine, NEWEST_CHECKPOINT, of_run=run)
        return None if row is None else _checkpoint(row._asdict())

    def checkpoint_of(self, weights: bytes) -> list[StoredCheckpoint]:
        """Checkpoints whose weights, ema or optimiser artifact, or the step to which, has this digest."""
        return [_checkpoint(row._asdict()) for row in ask(self._engine, CHECKPOINT_OF, of_digest=weights)]

    # --- grids ---

    def add_grid(self, run: bytes, round_number: int, digest: bytes) -> None:
        """Notes that a grid was drawn from a round's checkpoint; the same one again changes nothing."""
        row = {"run": run, "round": round_number, "digest": digest, "created_at": self._now()}
        with self._engine.begin() as db:
            db.execute(insert(schema.grids).values(row).on_conflict_do_nothing())

    def grids(self, run: bytes, newest: int) -> list[StoredGrid]:
        """The last so many grids that were drawn of a run, newest first."""
        g = schema.grids
        with reading(self._engine) as db:
            rows = db.execute(select(g).where(g.c.run == run).order_by(g.c.created_at.desc()).limit(newest)).mappings().all()
        return [StoredGrid(**row) for row in rows]

    def grid_count(self, run: bytes) -> int:
        """How many grids were drawn of a run."""
        g = schema.grids
        with reading(self._engine) as db:
            return int(db.execute(select(func.count()).select_from(g).where(g.c.run == run)).scalar_one())

    def is_grid(self, digest: bytes) -> bool:
        """Whether an artifact is a grid, and so may be shown where no checkpoint may."""
        g = schema.grids
        with reading(self._engine) as db:
            return db.execute(select(g.c.digest).where(g.c.digest == digest).limit(1)).first() is not None


class _Forgotten(dict[bytes, bytes]):
    """Stands in for the messages of an ended round, which are dropped."""

    def __missing__(self, key: bytes) -> bytes:
        return b""


def _stored_round(row: Mapping[str, Any], terms: Terms, blobs: dict[bytes, bytes]) -> StoredRound:
    state = load(
        row["state"],
        blobs,
        run=row["run"],
        number=row["number"],
        kind=RoundKind(row["kind"]),
        terms=terms,
        started_at=row["started_at"],
    )
    return StoredRound(state, row["bytes_down"], row["bytes_up"], row["outcome"])


def _at(table: Table, run: bytes, number: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return table.c.run == run, table.c.number == number


def _checkpoint(row: Mapping[Any, Any] | RowMapping) -> StoredCheckpoint:
    names = ("run", "round", "weights", "ema", "optimiser", "bytes", "created_at")
    step = None if row["step_digest"] is None else WeightsStep(row["step_digest"], row["step_base"], row["step_bytes"])
    return StoredCheckpoint(**{name: row[name] for name in names}, step=step)


def _checkpoint_row(checkpoint: StoredCheckpoint) -> dict[str, object]:
    return {
        "run": checkpoint.run,
        "round": checkpoint.round,
        "weights": checkpoint.weights,
        "ema": checkpoint.ema,
        "optimiser": checkpoint.optimiser,
        "bytes": checkpoint.bytes,
        "created_at": checkpoint.created_at,
    }
