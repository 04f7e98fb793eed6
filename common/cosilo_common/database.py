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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

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
FOUND_CHARS_MAX: Final = 200  # of what SQLite says of a damaged file
WHERE_DAMAGED: Final = "where the disk or a copy damaged it, see docs/operating/recover.md"
_HEADER_BYTES: Final = 100
_BEGIN_OPTION: Final = "cosilo_begin"

_version_metadata = MetaData()
_schema_version = Table("schema_version", _version_metadata, Column("version", Integer, nullable=False))


def open_database(location: Path | str, *, synchronous: Literal["FULL", "NORMAL"]) -> Engine:
    """Opens, or creates with mode 0600, one SQLite database.

    location: a path, or a URL `sqlite:///PATH`. synchronous: FULL where a commit must survive a power cut before
    anything that follows from it is said (PROTOCOL R5); NORMAL where losing the last commits costs only work. The
    file's -wal and -shm take its mode. Raises CosiloError where the folder cannot be written, or the file is not a
    database, or not a whole one: SQLite itself opens one that was cut, and fails at the first row that is gone.
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
        _check_length(path)
        with reading(engine) as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if found != "ok":
            raise CosiloError("open database", f"{path} is damaged: {str(found)[:FOUND_CHARS_MAX]}", WHERE_DAMAGED)
    except UnicodeDecodeError:  # within SQLite's own words about the damage, or a table's name
        engine.dispose()
        raise CosiloError("open database", f"{path} is damaged: it holds text that is none", WHERE_DAMAGED) from None
    except (DatabaseError, CosiloError) as error:
        engine.dispose()
        if isinstance(error, CosiloError):
            raise
        raise CosiloError("open database", f"{path}: {error.orig}", f"put the right file in its place; {WHERE_DAMAGED}") from error
    return engine


def _check_length(path: Path) -> None:
    """Refuses a file that ends within a page: SQLite would take the rest for zeros. With a write-ahead log beside it, the log may hold that page."""
    wal, size = path.with_name(f"{path.name}-wal"), path.stat().st_size
    if size == 0 or (wal.exists() and wal.stat().st_size):
        return
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) == _HEADER_BYTES and not header.startswith(b"SQLite format 3\0"):
        return  # SQLite says itself what that is
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 1 << 16 if page_bytes == 1 else page_bytes  # as the format writes it: https://www.sqlite.org/fileformat.html
    if len(header) < _HEADER_BYTES or page_bytes == 0 or size % page_bytes:
        raise CosiloError("open database", f"{path} is damaged: {size} bytes are not whole pages", WHERE_DAMAGED)


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


def copy_database(source: Path, to: Path) -> None:
    """Copies a database that others may be writing to, as one moment had it, to a file of mode 0600; what was there is replaced whole.

    A copy by `cp` may tear, and lacks what stands in the write-ahead log. Raises CosiloError.
    """
    part = to.with_name(f"{to.name}.part")
    try:
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE))
        with closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as here, closing(sqlite3.connect(part)) as there:
            here.backup(there)
            there.execute("PRAGMA journal_mode=DELETE")  # one file: what opens it next chooses its own
        sync_file(part)
        part.replace(to)
        sync_file(to.parent)
    except (sqlite3.Error, OSError) as error:
        part.unlink(missing_ok=True)
        raise CosiloError("copy database", f"{source} to {to}: {error}", "check the folder, its owner and its free space") from None


def sync_file(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def schema_version(engine: Engine) -> int | None:
    """The version of a database's schema; None where it has none yet."""
    with reading(engine) as connection:
        known = connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema_version'").first()
        return None if known is None else connection.exec_driver_sql("SELECT version FROM schema_version").scalar_one_or_none()


def prepare_schema(
    engine: Engine,
    tables: MetaData,
    version: int,
    upgrades: Mapping[int, Callable[[Connection], None]] | None = None,
    before_upgrade: Callable[[int], None] = lambda found: None,
) -> None:
    """Creates `tables` in an empty database, or checks that the database's schema is `version`.

    version: 1 or more, raised with each change of a table. upgrades: by the version that it starts from, what makes the
    next version of a database, all in one transaction: a kill in the middle leaves the older one whole. before_upgrade:
    called first, with the version that was found. Raises CosiloError where the database was written by a newer
    Cosilo (its rows may mean what this one cannot know), or by an older one with no such way.
    """
    older = schema_version(engine)
    if older == version:
        return
    if older is not None and older < version and older in (upgrades or {}):
        before_upgrade(older)
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
