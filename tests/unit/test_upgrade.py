"""Databases of an older version: upgraded whole or not at all, with a copy beside them, to what a new one would be."""

from __future__ import annotations

import json
import sqlite3
import stat
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest
from sqlalchemy import Connection

from cosilo_common.database import copy_database, open_database, prepare_schema, schema_version
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import parse_manifest
from cosilo_server import schema
from cosilo_server.rounds.state import Phase
from cosilo_server.snapshot import snapshot
from cosilo_server.store import Store
from tests.unit.test_retention import MANIFEST, RUN

VECTORS = Path(__file__).resolve().parents[1] / "vectors"

# The tables as the first release made them, typed out: what schema.py says today does not count here.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
CREATE TABLE members (version INTEGER NOT NULL, revision INTEGER NOT NULL, list BLOB NOT NULL, at FLOAT NOT NULL, PRIMARY KEY (version, revision));
CREATE TABLE invitations (token_public BLOB NOT NULL, name VARCHAR(63) NOT NULL, role VARCHAR(16) NOT NULL, expires_unix_s INTEGER NOT NULL,
  preapproval BLOB NOT NULL, invited_at FLOAT NOT NULL, PRIMARY KEY (token_public));
CREATE TABLE enrolments (token_public BLOB NOT NULL, name VARCHAR(63) NOT NULL, role VARCHAR(16) NOT NULL, signing_key BLOB NOT NULL,
  tls_key_digest BLOB NOT NULL, certificate_chain BLOB NOT NULL, enrolled_unix_s INTEGER NOT NULL, endorsement BLOB NOT NULL,
  PRIMARY KEY (token_public), FOREIGN KEY(token_public) REFERENCES invitations (token_public));
CREATE TABLE runs (run BLOB NOT NULL, manifest BLOB NOT NULL, signature BLOB NOT NULL, signer VARCHAR(63) NOT NULL, created_at FLOAT NOT NULL,
  stopped INTEGER NOT NULL, PRIMARY KEY (run));
CREATE TABLE orders (id INTEGER NOT NULL, run BLOB NOT NULL, kind VARCHAR(16) NOT NULL, wanted INTEGER NOT NULL, closed INTEGER NOT NULL,
  cancelled INTEGER NOT NULL, ordered_at FLOAT NOT NULL, PRIMARY KEY (id), FOREIGN KEY(run) REFERENCES runs (run));
CREATE TABLE rounds (run BLOB NOT NULL, number INTEGER NOT NULL, kind VARCHAR(16) NOT NULL, started_at FLOAT NOT NULL, state TEXT NOT NULL,
  phase VARCHAR(16) NOT NULL, bytes_down INTEGER NOT NULL, bytes_up INTEGER NOT NULL, outcome TEXT NOT NULL, PRIMARY KEY (run, number),
  FOREIGN KEY(run) REFERENCES runs (run));
CREATE TABLE messages (run BLOB NOT NULL, number INTEGER NOT NULL, digest BLOB NOT NULL, message BLOB NOT NULL, PRIMARY KEY (run, number, digest));
CREATE TABLE events (id INTEGER NOT NULL, run BLOB NOT NULL, number INTEGER NOT NULL, at FLOAT NOT NULL, what VARCHAR(32) NOT NULL,
  site VARCHAR(63) NOT NULL, phase VARCHAR(16) NOT NULL, attempt INTEGER NOT NULL, PRIMARY KEY (id));
CREATE TABLE checkpoints (run BLOB NOT NULL, round INTEGER NOT NULL, weights BLOB NOT NULL, ema BLOB NOT NULL, optimiser BLOB NOT NULL,
  bytes INTEGER NOT NULL, created_at FLOAT NOT NULL, PRIMARY KEY (run, round), FOREIGN KEY(run) REFERENCES runs (run));
CREATE TABLE sites_seen (site VARCHAR(63) NOT NULL, at FLOAT NOT NULL, address VARCHAR(256) NOT NULL, software VARCHAR(64) NOT NULL,
  certificate_expires_at FLOAT NOT NULL, PRIMARY KEY (site));
"""
REVEALED = b"what a site revealed"
STATE = {
    "phase": "revealing",
    "phase_since": 5.0,
    "attempt": 1,
    "base_digest": "11" * 32,
    "base_bytes": 64,
    "encoding": "",
    "seed": "22" * 32,
    "invited": ["st-anna"],
    "roster": ["st-anna"],
    "survivors": ["st-anna"],
    "checkpoint": "",
    "reason": "",
    "ended_at": 0.0,
    "sites": {
        "st-anna": {
            **dict.fromkeys(("advert", "shares", "consent"), None),
            "reveal": "33" * 32,
            "upload": None,
            "complaints": [],
            "declined": None,
            "late": False,
        }
    },
}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A database of version 1, in which a run has had a checkpoint and its second round is in progress."""
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
        db.execute("INSERT INTO runs VALUES (?, ?, 'sig', 'anna', 1.0, 0)", (RUN, MANIFEST.canonical()))
        db.execute("INSERT INTO checkpoints VALUES (?, 0, ?, '', ?, 64, 2.0)", (RUN, b"w" * 32, b"o" * 32))
        closed = STATE | {"phase": "closed", "ended_at": 4.0}
        for number, state in ((1, closed), (2, STATE)):
            row = (RUN, number, json.dumps(state), state["phase"])
            db.execute("INSERT INTO rounds VALUES (?, ?, 'train', 3.0, ?, ?, 0, 0, '')", row)
        db.execute("INSERT INTO messages VALUES (?, 2, ?, ?)", (RUN, b"\x33" * 32, REVEALED))
        db.commit()
    return path


def shape(path: Path) -> dict[str, object]:
    """Every table: columns with types, nullability, defaults and places in the key; foreign keys; indexes."""
    with closing(sqlite3.connect(path)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return {
            name: (
                db.execute(f"PRAGMA table_info({name})").fetchall(),
                sorted(row[2:] for row in db.execute(f"PRAGMA foreign_key_list({name})")),
                sorted(row[1:] for row in db.execute(f"PRAGMA index_list({name})")),
            )
            for name in names
        }


def test_an_upgraded_database_is_what_a_new_one_is_and_has_its_rows(older: Path, tmp_path: Path) -> None:
    store = Store(older)
    assert [run.run for run in store.runs()] == [RUN]
    assert [(c.round, c.weights) for c in store.checkpoints(RUN)] == [(0, b"w" * 32)]
    newest = store.newest_round(RUN)
    assert newest is not None
    assert (newest.state.number, newest.state.phase, newest.state.sites["st-anna"].reveal) == (2, Phase.REVEALING, REVEALED)
    store.shelf.keep(RUN, 0, "first")
    store.add_grid(RUN, 0, b"g" * 32)
    store.close()
    Store(tmp_path / "new.db").close()
    found, expected = shape(older), shape(tmp_path / "new.db")
    assert found.keys() == expected.keys()
    for table in expected:
        assert found[table] == expected[table], table
    Store(older).close()  # a second time changes nothing


def test_a_copy_from_before_is_left_beside_it_without_what_sites_revealed(older: Path, tmp_path: Path) -> None:
    Store(older).close()
    copy = tmp_path / "state.db.v1.bak"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert REVEALED not in copy.read_bytes()
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT version FROM schema_version").fetchall() == [(1,)]
        rounds = db.execute("SELECT number, phase, state FROM rounds ORDER BY number").fetchall()
        assert db.execute("SELECT count(*) FROM messages").fetchall() == [(0,)]
    assert [(number, phase) for number, phase, _ in rounds] == [(1, "closed"), (2, "abandoned")]
    assert json.loads(rounds[1][2])["reason"] == "the database was put back as it was before an upgrade"
    assert "grids" not in shape(copy)
    copy.rename(older)  # what the older Cosilo would do with it; this one upgrades it again
    store = Store(older)
    newest = store.newest_round(RUN)
    assert newest is not None
    assert newest.state.phase is Phase.ABANDONED
    assert sorted(path.name for path in tmp_path.iterdir() if "wal" not in path.name and "shm" not in path.name) == [
        "state.db",
        "state.db.v1.bak",
    ]


def test_a_kill_in_the_middle_leaves_the_older_one_whole(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shape(older)
    real = schema.UPGRADES[1]

    class Killed(BaseException):
        pass

    def dying(db: Connection) -> None:
        real(db)
        raise Killed

    monkeypatch.setattr(schema, "UPGRADES", {1: dying})
    with pytest.raises(Killed):
        Store(older)
    assert shape(older) == before
    monkeypatch.undo()
    store = Store(older)
    assert schema_version(store._engine) == schema.SCHEMA_VERSION


def test_a_newer_database_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE schema_version SET version = 99")
        db.commit()
    before = shape(path)
    with pytest.raises(CosiloError, match=rf"schema version 99, this Cosilo knows up to {schema.SCHEMA_VERSION}; install the Cosilo"):
        Store(path)
    assert shape(path) == before
    assert not list(tmp_path.glob("*.bak"))


def test_without_room_for_the_copy_nothing_is_upgraded(older: Path, tmp_path: Path) -> None:
    (tmp_path / "state.db.v1.bak").mkdir()
    (tmp_path / "state.db.v1.bak" / "in the way").touch()
    before = shape(older)
    with pytest.raises(CosiloError, match="copy database"):
        Store(older)
    assert shape(older) == before


def test_a_database_is_copied_while_it_is_written_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    with store._engine.begin() as db:
        db.execute(schema.members.insert().values(version=1, revision=0, list=b"uncommitted", at=1.0))
        copy_database(tmp_path / "state.db", tmp_path / "during.db")
    copy_database(tmp_path / "state.db", tmp_path / "after.db")  # what cp would miss: it stands in the write-ahead log
    found = []
    for name in ("during.db", "after.db"):
        with closing(sqlite3.connect(tmp_path / name)) as copied:
            found.append(copied.execute("SELECT list FROM members").fetchall())
    assert found == [[], [(b"uncommitted",)]]
    with pytest.raises(CosiloError, match="copy database"):
        snapshot(tmp_path / "nothing.db", tmp_path / "copy.db", "a test")
    assert not list(tmp_path.glob("copy*"))


def test_upgrades_follow_one_another(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "state.db", synchronous="FULL")
    prepare_schema(engine, schema.metadata, 1)
    seen: list[int] = []
    upgrades = {n: (lambda db, n=n: seen.append(n)) for n in (1, 2, 3)}
    prepare_schema(engine, schema.metadata, 4, upgrades, lambda found: seen.append(-found))
    assert seen == [-1, 1, 2, 3]
    assert schema_version(engine) == 4


def test_a_run_of_the_first_release_is_read_as_it_was_signed_and_does_what_it_did() -> None:
    data = (VECTORS / "manifest-first-release.json").read_bytes()
    manifest = parse_manifest(data)
    assert manifest.canonical() == data
    assert manifest.digest().hex() == sha256(data).hexdigest() == "3ecf0f1f9797a3a940b0045579a92c28fe639453e47542e9e8993dc0b974cd7e"
    training, later = (
        manifest.training,
        ("steps_per_epoch", "loss_weighting", "min_snr_gamma", "timesteps", "personal", "anchor_mu", "anchor_from"),
    )
    assert [getattr(training, name) for name in later] == [None, "uniform", 5.0, "uniform", (), 0.0, 0.0]
    assert (training.control_variates, manifest.architecture.network) == (False, "unet2d")
    assert (manifest.card.license, manifest.card.name_participants, manifest.evaluation, manifest.warm_start) == ("", False, None, None)


def test_a_new_run_says_every_value_so_that_no_release_reads_it_otherwise() -> None:
    said = json.loads(parse_manifest((VECTORS / "manifest-first-release.json").read_bytes()).explicit().canonical())
    assert (said["training"]["control_variates"], said["architecture"]["network"], said["card"]) == (
        False,
        "unet2d",
        {"license": "", "name_participants": False},
    )
