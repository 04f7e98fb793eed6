"""The database both daemons open: its settings, its mode, its schema's version."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from cosilo_common.database import open_database, prepare_schema, reading
from cosilo_common.errors import CosiloError

tables = MetaData()
things = Table("things", tables, Column("id", Integer, primary_key=True), Column("secret", LargeBinary))


def test_settings_are_those_the_ledger_needs(tmp_path: Path) -> None:
    for synchronous, value in (("FULL", 2), ("NORMAL", 1)):
        engine = open_database(tmp_path / f"{synchronous}.db", synchronous=synchronous)  # type: ignore[arg-type]
        with engine.connect() as connection:
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
            }
        assert found == {
            "journal_mode": "wal",
            "synchronous": value,
            "foreign_keys": 1,
            "busy_timeout": 10_000,
            "secure_delete": 1,
        }


def test_the_file_and_its_log_are_private(tmp_path: Path) -> None:
    (tmp_path / "state.db").touch(mode=0o644)
    engine = open_database(f"sqlite:///{tmp_path / 'state.db'}", synchronous="FULL")
    prepare_schema(engine, tables, 1)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "state.db": 0o600,
        "state.db-wal": 0o600,
        "state.db-shm": 0o600,
    }


def test_a_newer_schema_is_refused_and_says_what_to_install(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "state.db", synchronous="FULL")
    prepare_schema(engine, tables, 2)
    prepare_schema(engine, tables, 2)
    with pytest.raises(CosiloError, match=r"schema version 2, this Cosilo knows up to 1; install the Cosilo that wrote it"):
        prepare_schema(engine, tables, 1)
    with pytest.raises(CosiloError, match=r"schema version 2, this Cosilo needs 3; see the upgrade notes"):
        prepare_schema(engine, tables, 3)


@pytest.mark.parametrize("location", ["postgresql://host/db", "sqlite://", "sqlite:///:memory:", "nonsense://"])
def test_other_databases_are_refused(location: str) -> None:
    with pytest.raises(CosiloError, match="sqlite:///PATH"):
        open_database(location, synchronous="FULL")


def test_what_cannot_be_opened_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match=r"missing/state\.db: No such file"):
        open_database(tmp_path / "missing" / "state.db", synchronous="FULL")
    (tmp_path / "state.db").write_bytes(b"this is no database, whatever its name says" * 50)
    with pytest.raises(CosiloError, match="not a database"):
        open_database(tmp_path / "state.db", synchronous="FULL")


def test_a_failed_statement_does_not_show_its_values(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "state.db", synchronous="FULL")
    prepare_schema(engine, tables, 1)
    with engine.begin() as connection:
        connection.execute(insert(things).values(id=1, secret=b"canary"))
    with pytest.raises(IntegrityError) as caught, engine.begin() as connection:
        connection.execute(insert(things).values(id=1, secret=b"canary"))
    assert "canary" not in str(caught.value)


def test_reading_neither_waits_nor_makes_wait(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "state.db", synchronous="NORMAL")
    prepare_schema(engine, tables, 1)
    with engine.begin() as writer, reading(engine) as reader:
        writer.execute(insert(things).values(id=1))
        assert reader.execute(select(func.count()).select_from(things)).scalar_one() == 0


def test_transactions_that_read_and_then_write_do_not_overlap(tmp_path: Path) -> None:
    """BEGIN IMMEDIATE: two counters that read and add one lose nothing and never fail half-way."""
    engine = open_database(tmp_path / "state.db", synchronous="NORMAL")
    prepare_schema(engine, tables, 1)
    with engine.begin() as connection:
        connection.execute(insert(things).values(id=1, secret=b"\0"))

    def add() -> None:
        for _ in range(50):
            with engine.begin() as connection:
                value = connection.execute(select(things.c.secret)).scalar_one()[0]
                connection.execute(update(things).values(secret=bytes([value + 1])))

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as connection:
        assert connection.execute(select(things.c.secret)).scalar_one() == bytes([150])
