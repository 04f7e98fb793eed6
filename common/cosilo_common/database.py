"""SQLite as both daemons open it: one file, write-ahead log, 0600, a schema version that is checked.

Owns the connection's settings and the schema's version; knows no table but its own. SQLAlchemy Core only, no ORM.

Every transaction is `BEGIN IMMEDIATE`: a transaction that reads and then writes never finds, half-way, that another
process wrote first. So transactions must be short, and one thread never opens a second transaction inside a first.
`reading()` takes no write lock.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry

from cosilo_common.errors import CosiloError

BUSY_TIMEOUT_MS: Final = 10_000
"""How long a transaction waits for another's: they take milliseconds, so 10 s means that a process hangs."""

FILE_MODE: Final = 0o600
_BEGIN_OPTION: Final = "cosilo_begin"

_version_metadata = MetaData()
_schema_version = Table("schema_version", _version_metadata, Column("version", Integer, nullable=False))


def open_database(location: Path | str, *, synchronous: Literal["FULL", "NORMAL"]) -> Engine:
    """Opens, or creates with mode 0600, one SQLite database.

    location: a path, or a URL `sqlite:///PATH`. synchronous: FULL where a commit must survive a power cut before
    anything that follows from it is said (PROTOCOL R5); NORMAL where losing the last commits costs only work. The
    file's -wal and -shm take its mode. Raises CosiloError where the folder cannot be written or the file is not a
    database.
    """
    path = _path_of(location)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
        path.chmod(FILE_MODE)
    except OSError as error:
        raise CosiloError("open database", f"{path}: {error.strerror}", "check the folder, its owner and its free space") from error

    # hide_parameters: a failed statement's values (keys, sealed secrets) must not reach an exception's text.
    engine = create_engine(f"sqlite:///{path}", hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})

    @event.listens_for(engine, "connect")
    def _settings(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver opens no transaction of its own; _begin does
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            "secure_delete=ON",  # zeroes deleted rows; the WAL still has them, hence PROTOCOL R7's key file
            "temp_store=MEMORY",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_BEGIN_OPTION, 'IMMEDIATE')}")

    try:
        with reading(engine) as connection:
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
    except DatabaseError as error:
        engine.dispose()
        raise CosiloError("open database", f"{path}: {error.orig}", "put the right file in its place") from error
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read-only transaction over one snapshot, which never waits for a writer nor makes one wait."""
    with engine.connect().execution_options(**{_BEGIN_OPTION: "DEFERRED"}) as connection, connection.begin():
        yield connection


def forget_deleted(engine: Engine) -> None:
    """Empties the write-ahead log, so that no copy of a deleted row is left: `secure_delete` has zeroed it in the file itself.

    For rows whose bytes should not outlive them. Best effort: where another connection is in the way, the next call does it. Not within a
    transaction of this thread.
    """
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    except sqlite3.OperationalError:
        pass  # busy, or the disk is full: what was deleted stays deleted, and its copies go with the next round's
    finally:
        connection.close()


def prepare_schema(
    engine: Engine, tables: MetaData, version: int, upgrades: Mapping[int, Callable[[Connection], None]] | None = None
) -> None:
    """Creates `tables` in an empty database, or checks that the database's schema is `version`.

    version: 1 or more, raised with each change of a table. upgrades: by the version that it starts from, what makes the
    next version of a database, all in one transaction. Raises CosiloError where the database was written by a newer
    Cosilo (its rows may mean what this one cannot know), or by an older one with no such way.
    """
    with engine.begin() as connection:
        _version_metadata.create_all(connection)
        found = connection.execute(select(_schema_version.c.version)).scalar_one_or_none()
        if found is None:
            tables.create_all(connection)
            connection.execute(insert(_schema_version).values(version=version))
            return
        while found < version and found in (upgrades or {}):
            (upgrades or {})[found](connection)
            found += 1
            connection.execute(update(_schema_version).values(version=found))
    if found > version:
        raise CosiloError(
            "open database",
            f"{engine.url.database}: schema version {found}, this Cosilo knows up to {version}",
            "install the Cosilo that wrote it, or a newer one",
        )
    if found < version:
        raise CosiloError(
            "open database",
            f"{engine.url.database}: schema version {found}, this Cosilo needs {version}",
            "see the upgrade notes in CHANGELOG.md",
        )


def _path_of(location: Path | str) -> Path:
    if isinstance(location, Path):
        return location
    if "://" not in location:
        return Path(location)
    try:
        url = make_url(location)
    except ArgumentError as error:
        raise CosiloError("open database", f"{location}: not a database URL", "write sqlite:///PATH") from error
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise CosiloError("open database", f"{url.render_as_string()}: only SQLite files are supported", "write sqlite:///PATH")
    return Path(url.database)
