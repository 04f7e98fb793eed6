"""What a site never forgets: runs accepted, keys pinned, rounds begun, consents signed, models uploaded for.

Owns the tables and their order of writing; holds no secret and decides no rule: the site role asks and judges.
Nothing here is ever deleted, and triggers in the database say so too. Each method is one transaction, on disk when it
returns (`synchronous=FULL`), so that `cosilo-site accept` may write while the daemon runs. Must not know gRPC, clocks
or the round's secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    and_,
    bindparam,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import IntegrityError

from cosilo_common.database import reading
from cosilo_common.errors import CosiloError
from cosilo_common.statements import Statement, ask, ask_one, writing

SCHEMA_VERSION: Final = 2

tables = MetaData()

_runs = Table(
    "accepted_runs",
    tables,
    Column("run", LargeBinary(32), primary_key=True),
    Column("manifest", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("accepted_at", String, nullable=False),  # RFC 3339, for people; nothing is decided by it
    Column("accepted_by", String, nullable=False),  # "person" or "policy"
)
_run_keys = Table(
    "run_participants",
    tables,
    Column("run", LargeBinary(32), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("key", LargeBinary(32), nullable=False),
    ForeignKeyConstraint(["run"], ["accepted_runs.run"]),
)
_pins = Table(
    "pins",
    tables,
    Column("name", String(63), primary_key=True),
    Column("key", LargeBinary(32), nullable=False),
    Column("pinned_at", String, nullable=False),
)
_rounds = Table(
    "rounds",
    tables,
    Column("run", LargeBinary(32), primary_key=True),
    Column("round", Integer, CheckConstraint("round >= 1"), primary_key=True),
    Column("kind", String, nullable=False),
    Column("invited", String, nullable=False),  # names, sorted, one space between
    Column("base_digest", LargeBinary(32), nullable=False),
    Column("encoding_digest", LargeBinary(32), nullable=False),
    Column("state", String, nullable=False),
    Column("phase", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),  # the highest ever adverted; 0 before the first
    Column("upload", LargeBinary),  # the signed statement of this attempt's spool
    Column("outcome", String, nullable=False, server_default=""),
    ForeignKeyConstraint(["run"], ["accepted_runs.run"]),
)
_consents = Table(
    "consents",
    tables,
    Column("run", LargeBinary(32), primary_key=True),
    Column("round", Integer, primary_key=True),  # one a round, over all attempts (R5)
    Column("attempt", Integer, nullable=False),
    Column("survivors", String, nullable=False),
    Column("survives", Boolean, nullable=False),
    Column("message", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
)
_uploads = Table(
    "model_uploads",
    tables,
    Column("base_digest", LargeBinary(32), primary_key=True),
    Column("run", LargeBinary(32), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("cohort", LargeBinary(32), nullable=False),  # digest of the invited names and keys; for moments, of what was measured
    ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.round"]),
)
_permits = Table(
    "model_permits",
    tables,
    Column("base_digest", LargeBinary(32), primary_key=True),
    Column("rounds", Integer, CheckConstraint("rounds >= 1"), nullable=False),
    Column("permitted_at", String, nullable=False),
)
# A person's word that this site leaves an accepted run, or takes part in it again; of each run the newest row counts.
_departures = Table(
    "departures",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("run", LargeBinary(32), nullable=False),
    Column("left", Boolean, nullable=False),
    Column("at", String, nullable=False),  # RFC 3339, for people
    ForeignKeyConstraint(["run"], ["accepted_runs.run"]),
)


def _refusing(verb: str) -> Callable[..., None]:
    """Creates, after a table, the trigger that makes SQLite itself refuse to change or delete its rows."""

    def create_trigger(table: Table, connection: Connection, **_options: object) -> None:
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table.name}_no_{verb.lower()} BEFORE {verb} ON {table.name} "
            f"BEGIN SELECT RAISE(ABORT, 'the ledger keeps {table.name}'); END"
        )

    return create_trigger


for _kept, _verbs in (
    (_runs, ("DELETE", "UPDATE")),
    (_run_keys, ("DELETE", "UPDATE")),
    (_rounds, ("DELETE",)),
    (_consents, ("DELETE", "UPDATE")),
    (_uploads, ("DELETE", "UPDATE")),
    (_departures, ("DELETE", "UPDATE")),
):
    for _verb in _verbs:
        event.listen(_kept, "after_create", _refusing(_verb))


UPGRADES: Final[Mapping[int, Callable[[Connection], None]]] = MappingProxyType({1: _departures.create})
"""By version: what makes the next one, in one transaction. No copy is left beside it: a site's ledger is never put back."""


class RoundState(StrEnum):
    """Whether a round still runs, as this site sees it."""

    OPEN = "open"
    CLOSED = "closed"
    ABANDONED = "abandoned"


class Phase(IntEnum):
    """How far this site came in a round; a restarted daemon continues from here."""

    BEGUN = 0
    FETCHED = 1
    TRAINED = 2
    SPOOLED = 3
    UPLOADED = 4
    CONSENTED = 5
    REVEALED = 6


# What every step of a round asks and writes, made once: building such a statement takes longer than running it.
_OF_RUN: Final = _rounds.c.run == bindparam("of_run")
_OF_ROUND: Final = and_(_OF_RUN, _rounds.c.round == bindparam("of_round"))
_IS_OPEN: Final = _rounds.c.state == RoundState.OPEN.value
_ACCEPTED: Final = Statement(select(_runs).where(_runs.c.run == bindparam("of_run")))
_ALL_ACCEPTED: Final = Statement(select(_runs).order_by(_runs.c.accepted_at, _runs.c.run))
_KEYS: Final = Statement(select(_run_keys.c.name, _run_keys.c.key).where(_run_keys.c.run == bindparam("of_run")))
_ROUND: Final = Statement(select(_rounds).where(_OF_ROUND))
_LAST_ROUND: Final = Statement(select(_rounds).where(_OF_RUN).order_by(_rounds.c.round.desc()).limit(1))
_CONSENT: Final = Statement(select(_consents).where(_consents.c.run == bindparam("of_run"), _consents.c.round == bindparam("of_round")))
_LEFT: Final = Statement(select(_departures).where(_departures.c.run == bindparam("of_run")).order_by(_departures.c.id.desc()).limit(1))
_UPLOADED_FOR: Final = Statement(select(_uploads).where(_uploads.c.base_digest == bindparam("of_base")))
_PERMITTED_FOR: Final = Statement(select(_permits.c.rounds).where(_permits.c.base_digest == bindparam("of_base")))
_OPEN_ROUNDS: Final = Statement(select(_rounds).where(_IS_OPEN))
_OVERTAKE: Final = Statement(
    update(_rounds).where(_OF_RUN, _IS_OPEN).values(state=RoundState.ABANDONED.value, outcome=bindparam("why_abandoned"))
)
_BEGIN: Final = Statement(
    insert(_rounds), ("run", "round", "kind", "invited", "base_digest", "encoding_digest", "state", "phase", "attempt")
)
_REACH: Final = Statement(
    update(_rounds).where(_OF_ROUND, _IS_OPEN, _rounds.c.phase < bindparam("to_phase")).values(phase=bindparam("to_phase"))
)
_RAISE: Final = Statement(
    update(_rounds).where(_OF_ROUND).values(attempt=bindparam("to_attempt"), upload=None, phase=bindparam("to_phase"))
)
_SPOOLED: Final = Statement(update(_rounds).where(_OF_ROUND).values(upload=bindparam("statement"), phase=bindparam("to_phase")))
_COUNT_UPLOAD: Final = Statement(upsert(_uploads).on_conflict_do_nothing(), ("base_digest", "run", "round", "cohort"))
_FINISH: Final = Statement(update(_rounds).where(_OF_ROUND, _IS_OPEN).values(state=bindparam("to_state"), outcome=bindparam("why_ended")))
_RECORD_CONSENT: Final = Statement(insert(_consents), ("run", "round", "attempt", "survivors", "survives", "message"))
_SET_PHASE: Final = Statement(update(_rounds).where(_OF_ROUND).values(phase=bindparam("to_phase")))


@dataclass(frozen=True)
class AcceptedRun:
    """A run a person or the policy accepted. participants: Ed25519 public keys (32 bytes) by name, pinned by that."""

    run: bytes
    manifest: bytes
    signature: bytes
    participants: Mapping[str, bytes]
    accepted_at: str
    accepted_by: str


@dataclass(frozen=True)
class RoundEntry:
    """A round this site began. attempt: the highest adverted, 0 before the first; upload: signed, of its spool."""

    run: bytes
    round: int
    kind: str
    invited: tuple[str, ...]
    base_digest: bytes
    encoding_digest: bytes
    state: RoundState = RoundState.OPEN
    phase: Phase = Phase.BEGUN
    attempt: int = 0
    upload: bytes | None = None
    outcome: str = ""


@dataclass(frozen=True)
class ConsentEntry:
    """The one consent of a round: its signed message, byte for byte. survives: whether this site is a survivor."""

    attempt: int
    survivors: tuple[str, ...]
    survives: bool
    message: bytes


@dataclass(frozen=True)
class ModelUpload:
    """One round in which this site signed an upload trained from a base model (R8), or of moments (R9). cohort: 32 bytes."""

    run: bytes
    round: int
    cohort: bytes


class Ledger:
    """The never-deleted half of a site's state.db."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # Runs and pins

    def accept(
        self,
        run: bytes,
        manifest: bytes,
        signature: bytes,
        participants: Mapping[str, bytes],
        *,
        accepted_at: str,
        accepted_by: str,
    ) -> None:
        """Accepts a run and pins its participants' keys; again with the same bytes changes nothing.

        Raises CosiloError where the run was accepted with other participants: an acceptance is not rewritten.
        """
        with self._engine.begin() as connection:
            row = connection.execute(select(_runs).where(_runs.c.run == run)).one_or_none()
            if row is not None:
                pinned = connection.execute(select(_run_keys.c.name, _run_keys.c.key).where(_run_keys.c.run == run)).all()
                known = _accepted_run(row, pinned)
                if known.manifest != manifest or dict(known.participants) != dict(participants):
                    raise CosiloError("accept run", f"{run.hex()[:12]}: accepted before with other bytes", "create a new run")
                return
            connection.execute(
                insert(_runs).values(run=run, manifest=manifest, signature=signature, accepted_at=accepted_at, accepted_by=accepted_by)
            )
            connection.execute(
                insert(_run_keys),
                [{"run": run, "name": name, "key": key} for name, key in sorted(participants.items())],
            )

    def accepted(self, run: bytes) -> AcceptedRun | None:
        """The acceptance of a run, or None."""
        row = ask_one(self._engine, _ACCEPTED, of_run=run)
        return None if row is None else _accepted_run(row, ask(self._engine, _KEYS, of_run=run))

    def accepted_runs(self) -> tuple[AcceptedRun, ...]:
        """Every accepted run, oldest first."""
        rows = ask(self._engine, _ALL_ACCEPTED)
        return tuple(_accepted_run(row, ask(self._engine, _KEYS, of_run=row.run)) for row in rows)

    def leave(self, run: bytes, *, at: str) -> None:
        """Withdraws an acceptance, which stays written: what was signed under it was signed. Left twice changes nothing."""
        self._depart(run, left=True, at=at)

    def rejoin(self, run: bytes, *, at: str) -> None:
        """Takes part again in a run that was left; in one that was not, changes nothing."""
        self._depart(run, left=False, at=at)

    def left_at(self, run: bytes) -> str:
        """When this site left a run; empty where it did not, or takes part again."""
        row = ask_one(self._engine, _LEFT, of_run=run)
        return row.at if row is not None and row.left else ""

    def _depart(self, run: bytes, *, left: bool, at: str) -> None:
        with self._engine.begin() as connection:
            newest = select(_departures.c.left).where(_departures.c.run == run).order_by(_departures.c.id.desc()).limit(1)
            if bool(connection.execute(newest).scalar_one_or_none()) is not left:
                connection.execute(insert(_departures).values(run=run, left=left, at=at))

    def pin(self, name: str, key: bytes, *, pinned_at: str) -> None:
        """Pins a site's key for automatic acceptance; a person's new pin replaces the old one."""
        with self._engine.begin() as connection:
            statement = upsert(_pins).values(name=name, key=key, pinned_at=pinned_at)
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"key": key, "pinned_at": pinned_at}))

    def pins(self) -> Mapping[str, bytes]:
        """Pinned Ed25519 keys by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(_pins.c.name, _pins.c.key)).all()
            return MappingProxyType({name: bytes(key) for name, key in rows})

    # Rounds

    def last_round(self, run: bytes) -> RoundEntry | None:
        """The highest round of a run that this site began, or None."""
        row = ask_one(self._engine, _LAST_ROUND, of_run=run)
        return None if row is None else _round_entry(row)

    def round(self, run: bytes, round_: int) -> RoundEntry | None:
        """One round, or None if this site never began it."""
        row = ask_one(self._engine, _ROUND, of_run=run, of_round=round_)
        return None if row is None else _round_entry(row)

    def open_rounds(self) -> tuple[RoundEntry, ...]:
        """Every round that is neither closed nor abandoned; a restarted daemon continues or abandons them."""
        return tuple(_round_entry(row) for row in ask(self._engine, _OPEN_ROUNDS))

    def begin_round(self, entry: RoundEntry) -> None:
        """Fixes a round's terms at its first Start (R1); abandons the run's earlier round if it is still open."""
        with writing(self._engine) as transaction:
            transaction.run(_OVERTAKE, of_run=entry.run, why_abandoned=f"round {entry.round} began")
            transaction.run(
                _BEGIN,
                run=entry.run,
                round=entry.round,
                kind=entry.kind,
                invited=" ".join(entry.invited),
                base_digest=entry.base_digest,
                encoding_digest=entry.encoding_digest,
                state=RoundState.OPEN.value,
                phase=int(Phase.BEGUN),
                attempt=0,
            )

    def reach(self, run: bytes, round_: int, phase: Phase) -> None:
        """Records that an open round came at least as far as `phase`; it never goes back here."""
        with writing(self._engine) as transaction:
            transaction.run(_REACH, of_run=run, of_round=round_, to_phase=int(phase))

    def raise_attempt(self, run: bytes, round_: int, attempt: int) -> None:
        """Moves to a higher attempt: the earlier one's upload no longer counts, the trained update still does (R4)."""
        with writing(self._engine) as transaction:
            [row] = transaction.ask(_ROUND, of_run=run, of_round=round_)
            entry = _round_entry(row)
            if attempt <= entry.attempt:
                raise CosiloError("raise attempt", f"round {round_}: {attempt} is not above {entry.attempt}")
            transaction.run(_RAISE, of_run=run, of_round=round_, to_attempt=attempt, to_phase=int(min(entry.phase, Phase.TRAINED)))

    def record_upload(self, entry: RoundEntry, message: bytes, *, key: bytes, cohort: bytes, counted: bool) -> None:
        """Writes a whole spool's signed statement and, if `counted`, one more round for its key (R4).

        key, cohort: the base model and the digest of the invited (R8); of moments the extractor and the digest of what was measured (R9).
        """
        with writing(self._engine) as transaction:
            reached = int(max(entry.phase, Phase.SPOOLED))
            transaction.run(_SPOOLED, of_run=entry.run, of_round=entry.round, statement=message, to_phase=reached)
            if counted:
                transaction.run(_COUNT_UPLOAD, base_digest=key, run=entry.run, round=entry.round, cohort=cohort)

    def finish_round(self, run: bytes, round_: int, state: RoundState, outcome: str) -> None:
        """Closes or abandons an open round, once; `outcome` is the reason, for people."""
        with writing(self._engine) as transaction:
            transaction.run(_FINISH, of_run=run, of_round=round_, to_state=state.value, why_ended=outcome)

    # Consents (R5)

    def record_consent(self, run: bytes, round_: int, consent: ConsentEntry) -> None:
        """Writes the round's one consent. Raises CosiloError if there is one already."""
        try:
            with writing(self._engine) as transaction:
                transaction.run(
                    _RECORD_CONSENT,
                    run=run,
                    round=round_,
                    attempt=consent.attempt,
                    survivors=" ".join(consent.survivors),
                    survives=consent.survives,
                    message=consent.message,
                )
                transaction.run(_SET_PHASE, of_run=run, of_round=round_, to_phase=int(Phase.CONSENTED))
        except IntegrityError:
            raise CosiloError("consent", f"round {round_}: this site has consented already") from None

    def consent(self, run: bytes, round_: int) -> ConsentEntry | None:
        """The round's one consent, or None."""
        row = ask_one(self._engine, _CONSENT, of_run=run, of_round=round_)
        return None if row is None else ConsentEntry(row.attempt, tuple(row.survivors.split()), bool(row.survives), row.message)

    # Rounds for a base model (R8)

    def model_uploads(self, base_digest: bytes) -> tuple[ModelUpload, ...]:
        """The rounds, across all runs, in which this site signed an upload trained from a base model."""
        return tuple(ModelUpload(row.run, row.round, row.cohort) for row in ask(self._engine, _UPLOADED_FOR, of_base=base_digest))

    def upload_count(self, run: bytes) -> int:
        """In how many rounds of a run this site signed an upload that is not a rehearsal's."""
        with reading(self._engine) as connection:
            return int(connection.execute(select(func.count()).select_from(_uploads).where(_uploads.c.run == run)).scalar_one())

    def base_models(self) -> tuple[bytes, ...]:
        """Every base model, across all runs, that this site began a round from, and every extractor that it uploaded for; in no order."""
        begun, uploaded = select(_rounds.c.base_digest), select(_uploads.c.base_digest)
        with reading(self._engine) as connection:
            return tuple(bytes(digest) for digest in connection.execute(begun.union(uploaded)).scalars())

    def permit_model(self, base_digest: bytes, rounds: int, *, permitted_at: str) -> None:
        """A person at the site allows `rounds` rounds in all for one base model, with any cohort."""
        with self._engine.begin() as connection:
            statement = upsert(_permits).values(base_digest=base_digest, rounds=rounds, permitted_at=permitted_at)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["base_digest"], set_={"rounds": rounds, "permitted_at": permitted_at})
            )

    def permitted_rounds(self, base_digest: bytes) -> int:
        """What a person allowed for a base model; 0 where nobody was asked."""
        row = ask_one(self._engine, _PERMITTED_FOR, of_base=base_digest)
        return 0 if row is None else row.rounds


def _accepted_run(row: Any, keys: Iterable[Any]) -> AcceptedRun:
    return AcceptedRun(
        run=row.run,
        manifest=row.manifest,
        signature=row.signature,
        participants=MappingProxyType(dict(keys)),
        accepted_at=row.accepted_at,
        accepted_by=row.accepted_by,
    )


def _round_entry(row: Any) -> RoundEntry:
    return RoundEntry(
        run=row.run,
        round=row.round,
        kind=row.kind,
        invited=tuple(row.invited.split()),
        base_digest=row.base_digest,
        encoding_digest=row.encoding_digest,
        state=RoundState(row.state),
        phase=Phase(row.phase),
        attempt=row.attempt,
        upload=row.upload,
        outcome=row.outcome,
    )
