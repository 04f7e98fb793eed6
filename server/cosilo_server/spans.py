"""What took how long in each round: the rows behind `cosilo round trace`.

Owns those rows of the coordinator's database. A trace is for people: it is never replayed, and a round goes on without it. How many rows a round
may have is trace.py's to bound. Every method is one transaction and may block on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine, bindparam, func, select
from sqlalchemy.dialects.sqlite import insert

from cosilo_common.statements import Statement, ask, ask_one, writing
from cosilo_server import schema

_COLUMNS: Final = ("run", "number", "party", "lane", "what", "attempt", "began_at", "ended_at", "bytes", "pieces", "outcome")
_ADD: Final = Statement(insert(schema.spans), _COLUMNS)
_OF_ROUND: Final = Statement(
    select(schema.spans)
    .where(schema.spans.c.run == bindparam("of_run"), schema.spans.c.number == bindparam("of_number"))
    .order_by(schema.spans.c.id)
    .limit(bindparam("most"))
)
_COUNT: Final = Statement(
    select(func.count().label("spans"))
    .select_from(schema.spans)
    .where(schema.spans.c.run == bindparam("of_run"), schema.spans.c.number == bindparam("of_number"))
)


@dataclass(frozen=True)
class Span:
    """A party was busy with something, from began_at to ended_at, UTC seconds; ended_at is 0 while it is.

    party: a site's name, or "" for the coordinator. lane: one of trace.py's; what: the thing itself. bytes: moved. pieces: how many of the kind
    this one stands for. outcome: "" where it went well, else why not, in a word.
    """

    party: str
    lane: str
    what: str
    attempt: int
    began_at: float
    ended_at: float
    bytes: int = 0
    pieces: int = 1
    outcome: str = ""


class Spans:
    """The spans of one coordinator's rounds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, run: bytes, number: int, spans: Sequence[Span]) -> None:
        """Adds to what is known of a round."""
        with writing(self._engine) as db:
            db.run_many(_ADD, [{"run": run, "number": number, **vars(span)} for span in spans])

    def count(self, run: bytes, number: int) -> int:
        """How many spans of a round there are."""
        return int(ask_one(self._engine, _COUNT, of_run=run, of_number=number).spans)

    def of(self, run: bytes, number: int, most: int) -> list[Span]:
        """The first so many spans of a round, in the order in which they were written."""
        names = Span.__dataclass_fields__
        return [
            Span(**{name: getattr(row, name) for name in names})
            for row in ask(self._engine, _OF_ROUND, of_run=run, of_number=number, most=most)
        ]
