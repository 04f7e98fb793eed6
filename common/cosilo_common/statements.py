"""SQL statements that are made ready once: what a daemon asks at every step of a round, without being built and looked up again each time.

Owns the way from a SQLAlchemy Core statement to its text, and a few idle SQLite connections a database. SQLAlchemy's execution of a statement
costs more than SQLite's own (docs/simulation.md has the profile), so the hot ones go past it: built by it, sent by `sqlite3`. Everything else
stays with `cosilo_common.database.reading` and `Engine.begin`. What fails is raised as SQLAlchemy would: callers know one kind of error.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, Executable, Select, event
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import DBAPIError

IDLE_MAX: Final = 8  # connections kept open a database; as many as threads are likely to be in it at once

_DIALECT: Final = dialect(paramstyle="named")


class Statement:
    """One statement, whose `bindparam`s are its parameters. columns: what an INSERT fills; all of the table's where empty.

    Rows are named tuples of what SQLite holds: bytes, str, int, float or None. A Boolean is 0 or 1.
    """

    def __init__(self, statement: Executable, columns: Sequence[str] = ()) -> None:
        self._statement = statement
        self._columns = list(columns) or None

    @cached_property
    def text(self) -> str:
        """As SQLite is told it, with named parameters."""
        return str(self._compiled)

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """The parameters whose values stand in the statement."""
        return {name: value for name, value in self._compiled.params.items() if not self._compiled.binds[name].required}

    @cached_property
    def row(self) -> Callable[[Sequence[Any]], Any]:
        """Makes a row of what a SELECT gives."""
        assert isinstance(self._statement, Select)
        names = [column.name for column in self._statement.selected_columns]
        kind: Any = namedtuple("Row", names)  # type: ignore[misc]  # its fields are known when it runs
        make: Callable[[Sequence[Any]], Any] = kind._make
        return make

    @cached_property
    def _compiled(self) -> Any:
        return self._statement.compile(dialect=_DIALECT, column_keys=self._columns)  # type: ignore[attr-defined]  # every Executable of Core


class Transaction:
    """A transaction that is open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def run(self, statement: Statement, /, **values: Any) -> int:
        """Carries a statement out; how many rows it changed."""
        return self._connection.execute(statement.text, {**statement.constants, **values}).rowcount

    def run_many(self, statement: Statement, rows: Sequence[Mapping[str, Any]]) -> None:
        """Carries it out for each row."""
        self._connection.executemany(statement.text, [{**statement.constants, **row} for row in rows])

    def ask(self, statement: Statement, /, **values: Any) -> list[Any]:
        """The rows of a SELECT."""
        found = self._connection.execute(statement.text, {**statement.constants, **values}).fetchall()
        return [statement.row(each) for each in found]


def ask(engine: Engine, statement: Statement, /, **values: Any) -> list[Any]:
    """The rows of one SELECT, which is its own snapshot: it waits for no writer. Raises sqlalchemy.exc.DBAPIError."""
    with _connected(engine, statement) as connection:
        found = connection.execute(statement.text, {**statement.constants, **values}).fetchall()
    return [statement.row(each) for each in found]


def ask_one(engine: Engine, statement: Statement, /, **values: Any) -> Any:
    """The first row of one SELECT, or None."""
    found = ask(engine, statement, **values)
    return found[0] if found else None


@contextmanager
def asking(engine: Engine) -> Iterator[Transaction]:
    """Several questions of one snapshot, for which no writer waits; as `cosilo_common.database.reading`. Raises sqlalchemy.exc.DBAPIError."""
    with _connected(engine, None) as connection:
        connection.execute("BEGIN DEFERRED")
        try:
            yield Transaction(connection)
        finally:
            connection.rollback()


@contextmanager
def writing(engine: Engine) -> Iterator[Transaction]:
    """A write transaction, committed at the end of the block and rolled back where it raises; as `Engine.begin`.

    Raises sqlalchemy.exc.DBAPIError. Never within another transaction of the same thread.
    """
    with _connected(engine, None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield Transaction(connection)
            engine.dialect.do_commit(connection)  # type: ignore[arg-type]  # it is the driver's connection, not a proxy of it
        except BaseException:
            if connection.in_transaction:
                connection.rollback()
            raise


class _Idle:
    """Connections of one engine that nobody uses just now."""

    def __init__(self) -> None:
        self.connections: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Closes them."""
        while self.connections:
            self.connections.pop().close()


_IDLE: Final[WeakKeyDictionary[Engine, _Idle]] = WeakKeyDictionary()
_MAKING: Final = threading.Lock()


@contextmanager
def _connected(engine: Engine, statement: Statement | None) -> Iterator[sqlite3.Connection]:
    idle = _IDLE.get(engine) or _idle_of(engine)
    try:
        connection = idle.connections.pop()
    except IndexError:
        connection = _connect(engine)
    try:
        yield connection
    except sqlite3.Error as error:
        text = None if statement is None else statement.text
        raise DBAPIError.instance(text, None, error, sqlite3.Error, hide_parameters=True, dialect=engine.dialect) from error
    finally:
        if len(idle.connections) < IDLE_MAX:
            idle.connections.append(connection)
        else:
            connection.close()


def _idle_of(engine: Engine) -> _Idle:
    with _MAKING:
        idle = _IDLE.get(engine)
        if idle is None:
            idle = _IDLE[engine] = _Idle()
            event.listen(engine, "engine_disposed", lambda _engine: idle.close())
        return idle


def _connect(engine: Engine) -> sqlite3.Connection:
    """A connection with the settings of `open_database`, which the engine's pool forgets."""
    proxy = engine.raw_connection()
    connection = proxy.driver_connection
    proxy.detach()
    assert isinstance(connection, sqlite3.Connection)
    return connection
