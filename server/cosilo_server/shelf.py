"""Which checkpoints stand on the shelf: named by an admin, retired by policy, and what all of them refer to.

Owns those rows of the coordinator's database. Decides nothing: the policy is retention.py's. A row of a checkpoint is never deleted, so that
`cosilo checkpoint list` can say what became of it. Every method is one transaction and may block on the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from cosilo_common.database import reading
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.messages import RoundKind
from cosilo_server import schema

_NAME = re.compile(r"[a-z0-9._-]{0,64}")


@dataclass(frozen=True)
class Shelved:
    """A run's checkpoints as the policy sees them: rounds on the shelf, oldest first, and the names that admins gave."""

    run: bytes
    rounds: tuple[int, ...]
    named: Mapping[int, str]


class Shelf:
    """The shelf of one coordinator. now: UTC seconds."""

    def __init__(self, engine: Engine, now: Callable[[], float]) -> None:
        self._engine = engine
        self._now = now

    def keep(self, run: bytes, round_number: int, name: str) -> None:
        """Keeps a checkpoint whatever the policy says, under a name or "". Again with another name: that one. Raises CosiloError where it is
        not on the shelf, or another has the name."""
        c, k, r = schema.checkpoints.c, schema.kept_checkpoints, schema.retired_checkpoints.c
        if not _NAME.fullmatch(name):
            raise CosiloError("keep checkpoint", f"{name[:80]!r} is not a checkpoint's name", "use at most 64 of a to z, 0 to 9, . _ and -")
        row = {"run": run, "round": round_number, "name": name, "kept_at": self._now()}
        with self._engine.begin() as db:
            if db.execute(select(c.round).where(c.run == run, c.round == round_number)).first() is None:
                raise CosiloError("keep checkpoint", f"round {round_number} made no checkpoint", "list them with `cosilo checkpoint list`")
            if db.execute(select(r.at).where(r.run == run, r.round == round_number)).first() is not None:
                raise CosiloError("keep checkpoint", f"that of round {round_number} was retired by policy", "keep one that is still there")
            taken = select(k.c.round).where(k.c.run == run, k.c.name == name, k.c.round != round_number)
            if name and (other := db.execute(taken).scalar_one_or_none()) is not None:
                raise CosiloError("keep checkpoint", f"the name {name!r} is round {other}'s", "choose another, or unkeep that one first")
            db.execute(insert(k).values(row).on_conflict_do_update(index_elements=["run", "round"], set_={"name": name}))

    def unkeep(self, run: bytes, round_number: int) -> None:
        """Leaves a checkpoint to the policy again. Raises CosiloError where nobody kept it."""
        k = schema.kept_checkpoints
        with self._engine.begin() as db:
            if db.execute(delete(k).where(k.c.run == run, k.c.round == round_number)).rowcount == 0:
                raise CosiloError("unkeep checkpoint", f"that of round {round_number} was not kept by name", "see cosilo checkpoint list")

    def shelved(self, run: bytes) -> Shelved:
        """What stands there of a run."""
        c, k = schema.checkpoints.c, schema.kept_checkpoints.c
        with reading(self._engine) as db:
            rounds = db.execute(select(c.round).where(c.run == run, _standing()).order_by(c.round)).scalars().all()
            named = {row.round: row.name for row in db.execute(select(k.round, k.name).where(k.run == run))}
        return Shelved(run, tuple(rounds), MappingProxyType(named))

    def retired(self, run: bytes) -> Mapping[int, float]:
        """When the policy retired which round's checkpoint of a run, UTC seconds."""
        r = schema.retired_checkpoints.c
        with reading(self._engine) as db:
            return MappingProxyType({row.round: row.at for row in db.execute(select(r.round, r.at).where(r.run == run))})

    def retire(self, run: bytes, rounds: Collection[int]) -> None:
        """Takes checkpoints off the shelf; their files may go once this has returned, not before. One that an admin named in the meantime
        stays."""
        k = schema.kept_checkpoints.c
        with self._engine.begin() as db:
            named = set(db.execute(select(k.round).where(k.run == run)).scalars())
            rows = [{"run": run, "round": number, "at": self._now()} for number in sorted(set(rounds) - named)]
            if rows:
                db.execute(insert(schema.retired_checkpoints).on_conflict_do_nothing(), rows)

    def references(self) -> frozenset[bytes]:
        """Digests of every artifact that must be there: weights and moving averages on the shelf, the newest optimisers and steps, grids,
        what adapters stand on, and every moments round's sum: sites give it once.

        Optimisers and steps go first: the next round needs the newest one, and nobody can ask for an older.
        """
        c = schema.checkpoints.c
        newest = select(c.run, func.max(c.round).label("newest")).group_by(c.run).subquery()
        with reading(self._engine) as db:
            shelved = db.execute(select(c.weights, c.ema).where(_standing())).all()
            optimisers = db.execute(select(c.optimiser).join(newest, (c.run == newest.c.run) & (c.round == newest.c.newest))).scalars()
            s = schema.steps.c
            steps = db.execute(select(s.digest).join(newest, (s.run == newest.c.run) & (s.round == newest.c.newest))).scalars()
            grids = db.execute(select(schema.grids.c.digest)).scalars()
            bases = db.execute(select(schema.bases.c.digest)).scalars()
            moments = _moments(db)
            digests = [*(digest for pair in shelved for digest in pair), *optimisers, *steps, *grids, *bases, *moments]
            return frozenset(digest for digest in digests if digest)

    def stored(self) -> Mapping[bytes, float]:
        """Digests of every artifact that was ever stored, the retired too, and when last, UTC seconds."""
        c, g, b = schema.checkpoints.c, schema.grids.c, schema.bases.c
        found: dict[bytes, float] = {}
        with reading(self._engine) as db:
            rows = db.execute(select(c.weights, c.ema, c.optimiser, c.created_at)).all()
            made = (schema.steps.c.run == c.run) & (schema.steps.c.round == c.round)
            steps = db.execute(select(schema.steps.c.digest, c.created_at).join(schema.checkpoints, made)).all()
            grids = db.execute(select(g.digest, g.created_at)).all()
            bases = db.execute(select(b.digest, b.created_at)).all()
            moments = _moments(db)
        lasting = (*moments, self._now())  # a moments artifact never goes: any time that is past will do
        for *digests, at in [*rows, *steps, *grids, *bases, lasting]:
            for digest in digests:
                found[digest] = max(at, found.get(digest, at))
        return MappingProxyType(found)

    def trim(self, run: bytes, *, traced_rounds: int, grids: int) -> None:
        """Forgets the traces of all but the newest rounds, and all but the newest grids, of a run."""
        g, r = schema.grids.c, schema.rounds.c
        with self._engine.begin() as db:
            last = db.execute(select(func.max(r.number)).where(r.run == run)).scalar_one()
            if last is not None:
                for table in (schema.events, schema.spans):
                    db.execute(delete(table).where(table.c.run == run, table.c.number <= last - traced_rounds))
            oldest = select(g.created_at).where(g.run == run).order_by(g.created_at.desc()).offset(grids - 1).limit(1)
            if (since := db.execute(oldest).scalar_one_or_none()) is not None:
                db.execute(delete(schema.grids).where(g.run == run, g.created_at < since))


def _moments(db: Connection) -> list[bytes]:
    """Artifacts of moments rounds. They are few: R9 sees to that."""
    r = schema.rounds.c
    outcomes = db.execute(select(r.outcome).where(r.kind == RoundKind.MOMENTS, r.outcome != "")).scalars()
    return [bytes.fromhex(json.loads(outcome)["moments"]) for outcome in outcomes]


def _standing() -> ColumnElement[bool]:
    c, r = schema.checkpoints.c, schema.retired_checkpoints.c
    return ~select(r.round).where(r.run == c.run, r.round == c.round).exists()
