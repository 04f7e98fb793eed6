"""Statements made ready once answer, fail and roll back as SQLAlchemy's own execution does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Engine, Integer, LargeBinary, MetaData, String, Table, bindparam, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from cosilo_common.database import open_database, reading
from cosilo_common.statements import IDLE_MAX, Statement, ask, ask_one, writing

TABLES = MetaData()
THINGS = Table(
    "things",
    TABLES,
    Column("name", String, primary_key=True),
    Column("size", Integer, nullable=False),
    Column("data", LargeBinary),
)
ADD = Statement(insert(THINGS), ("name", "size", "data"))
GROW = Statement(
    update(THINGS).where(THINGS.c.name == bindparam("of_name"), THINGS.c.size < 100).values(size=THINGS.c.size + bindparam("by"))
)
LARGEST = Statement(select(THINGS.c.name, THINGS.c.data).order_by(THINGS.c.size.desc()).limit(1))
NAMED = Statement(select(THINGS).where(THINGS.c.name == bindparam("of_name")))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(tmp_path / "things.db", synchronous="FULL")
    TABLES.create_all(engine)
    yield engine
    engine.dispose()


def test_what_is_written_is_read_by_both_ways(engine: Engine) -> None:
    with writing(engine) as db:
        db.run(ADD, name="a", size=1, data=b"\x00\xff")
        db.run_many(ADD, [{"name": "b", "size": 99, "data": None}, {"name": "c", "size": 100, "data": b""}])
        assert db.ask(NAMED, of_name="a") == [("a", 1, b"\x00\xff")]
        assert db.run(GROW, of_name="b", by=5) == 1
        assert db.run(GROW, of_name="c", by=5) == 0
    assert ask_one(engine, LARGEST) == ("b", None)
    assert ask_one(engine, NAMED, of_name="c").size == 100
    assert ask_one(engine, NAMED, of_name="d") is None
    with reading(engine) as connection:
        assert connection.execute(select(THINGS.c.size).order_by(THINGS.c.name)).scalars().all() == [1, 104, 100]


def test_a_block_that_raises_writes_nothing(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="no"), writing(engine) as db:
        db.run(ADD, name="a", size=1, data=None)
        raise RuntimeError("no")
    assert ask(engine, NAMED, of_name="a") == []
    with writing(engine) as db:  # and leaves no transaction behind
        db.run(ADD, name="a", size=2, data=None)
    assert ask(engine, NAMED, of_name="a") == [("a", 2, None)]


def test_failures_are_sqlalchemy_s_and_show_no_values(engine: Engine) -> None:
    with writing(engine) as db:
        db.run(ADD, name="a", size=1, data=None)
    with pytest.raises(IntegrityError) as refused, writing(engine) as db:
        db.run(ADD, name="a", size=1, data=b"secret")
    assert "secret" not in str(refused.value)
    TABLES.drop_all(engine)
    with pytest.raises(OperationalError, match="no such table"):
        ask(engine, NAMED, of_name="a")


def test_a_reader_sees_the_last_commit_and_waits_for_no_writer(engine: Engine) -> None:
    with writing(engine) as db:
        db.run(ADD, name="a", size=1, data=None)
        assert ask(engine, NAMED, of_name="a") == []
    assert ask_one(engine, NAMED, of_name="a").size == 1


def test_writers_in_threads_take_turns_and_few_connections_stay(engine: Engine) -> None:
    with writing(engine) as db:
        db.run(ADD, name="a", size=0, data=None)
    errors: list[DBAPIError] = []

    def grow() -> None:
        try:
            with writing(engine) as db:
                db.run(GROW, of_name="a", by=1)
        except DBAPIError as error:
            errors.append(error)

    threads = [threading.Thread(target=grow) for _ in range(2 * IDLE_MAX)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ask_one(engine, NAMED, of_name="a").size == 2 * IDLE_MAX
