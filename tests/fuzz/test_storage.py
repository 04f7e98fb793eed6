"""Files of a daemon's own that a disk or a person cut or changed: the daemon opens them whole, or says what to do. It never half-opens."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_client.journal import DATABASE_NAME, Journal, TrainedUpdate, open_ledger
from cosilo_client.ledger import RoundEntry
from cosilo_client.vault import Keeps
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.tls import check_tls_files
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from cosilo_server.store import SiteSeen, Store
from tests.fuzz.mutation import EXAMPLES, fuzzed, inputs, some, truncations
from tests.identity_parties import FEDERATION, found

RUN, BASE, SITE_KEY = sha256(b"run"), sha256(b"base"), sha256(b"site key")
PLACES = EXAMPLES or 60  # where a file of some ten kilobytes is cut


def opens_whole_or_refuses(name: str, opening: Callable[[], object]) -> bool:
    """Whether it opened. A refusal has words for what to do."""
    inputs[name] += 1
    try:
        opening()
    except CosiloError as error:
        assert error.hint
        return False
    return True


# The site's journal


def a_site(folder: Path) -> None:
    """A site in the middle of its third round, with a trained update and sealed secrets."""
    with Journal.open(folder, site_key=SITE_KEY) as journal:
        journal.ledger.accept(RUN, b"manifest", b"s" * 64, {"st-anna": SITE_KEY}, accepted_at="2026-01-01T00:00:00Z", accepted_by="person")
        for number in (1, 2, 3):
            journal.begin(RoundEntry(RUN, number, "train", ("st-anna",), BASE, sha256(b"encoding")))
        journal.vault.renew(RUN)
        journal.vault.put(RUN, 3, 1, "b", bytes(32))
        files = journal.files(RUN)
        files.update.write_bytes(bytes(64))
        journal.trained(RUN, TrainedUpdate(3, 0, 5, (0.5, 0.25)))


def look_at_site(folder: Path) -> None:
    with Journal.open(folder, site_key=SITE_KEY, vouched=True) as journal:
        (entry,) = journal.ledger.open_rounds()
        assert (entry.run, entry.round) == (RUN, 3)
        assert [journal.ledger.round(RUN, number) is not None for number in (1, 2, 3)] == [True] * 3
        journal.trained_update(RUN, 3)
        journal.vault.get(RUN, 3, 1, "b")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "state"
    a_site(folder)
    return folder


def with_file(whole: Path, into: Path, name: str, data: bytes) -> Path:
    """A copy of a folder in which one file holds this."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(whole, into)
    (into / name).write_bytes(data)
    return into


def test_the_journal_opens_as_it_was_left(site: Path, tmp_path: Path) -> None:
    look_at_site(with_file(site, tmp_path / "s", "incarnation", (site / "incarnation").read_bytes()))


def test_a_ledger_that_was_cut_is_refused(site: Path, tmp_path: Path) -> None:
    """Wherever it is cut: an empty one has its incarnation beside it, and a shorter one does not pass SQLite's own check."""
    data = (site / DATABASE_NAME).read_bytes()
    for cut in truncations(data, PLACES):
        folder = with_file(site, tmp_path / "s", DATABASE_NAME, cut)
        assert not opens_whole_or_refuses("ledger", lambda folder=folder: look_at_site(folder)), len(cut)


def test_a_ledger_with_changed_bytes_is_refused_or_read(site: Path, tmp_path: Path) -> None:
    data = (site / DATABASE_NAME).read_bytes()

    @fuzzed(30)
    @given(some(data))
    def try_some(changed: bytes) -> None:
        folder = with_file(site, tmp_path / "s", DATABASE_NAME, changed)
        opens_whole_or_refuses("ledger", lambda: list(open_ledger(folder).open_rounds()))

    try_some()


@pytest.mark.parametrize(
    "name", [f"rounds/{RUN.hex()}/{keeps.value}.key" for keeps in Keeps] + [f"rounds/{RUN.hex()}/update.json", "incarnation"]
)
def test_a_site_s_small_file_that_was_cut_is_refused_or_done_without(name: str, site: Path, tmp_path: Path) -> None:
    for cut in truncations((site / name).read_bytes(), EXAMPLES or 24):
        folder = with_file(site, tmp_path / "s", name, cut)
        opens_whole_or_refuses(name.rpartition("/")[2], lambda folder=folder: look_at_site(folder))


def test_any_facts_of_an_update_are_read_or_done_without(site: Path, tmp_path: Path) -> None:
    """update.json is the site's own and written whole; where a disk has changed it, the update is trained again."""
    name = f"rounds/{RUN.hex()}/update.json"
    folder = with_file(site, tmp_path / "s", name, b"")
    valid = (site / name).read_bytes()
    plain = json.loads(valid)
    odd = st.sampled_from([None, -1, 2**70, 1.5, "x", [], {}, [None], ["x"], True])
    with Journal.open(folder, site_key=SITE_KEY, vouched=True) as journal:
        journal.files(RUN).update.write_bytes(bytes(64))

        def look_at(data: bytes) -> None:
            inputs["update.json"] += 1
            (folder / name).write_bytes(data)
            update = journal.trained_update(RUN, 3)
            assert update is None or (update.round, type(update.weight), type(update.losses)) == (3, int, tuple)

        @fuzzed(60)
        @given(
            some(valid)
            | st.sampled_from(sorted(plain)).flatmap(lambda field: odd.map(lambda value: json.dumps({**plain, field: value}).encode()))
        )
        def try_some(data: bytes) -> None:
            look_at(data)

        try_some()


def test_a_stranger_s_file_among_the_rounds_is_left_alone(site: Path, tmp_path: Path) -> None:
    folder = with_file(site, tmp_path / "s", "incarnation", (site / "incarnation").read_bytes())
    (folder / "rounds" / "lost+found").mkdir()
    (folder / "rounds" / ".nfs0001").write_bytes(b"")
    look_at_site(folder)
    assert (folder / "rounds" / ".nfs0001").exists()


# The coordinator's store


@pytest.fixture(scope="module")
def coordinator_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coordinator") / "state.db"
    store = Store(path)
    for number in range(20):
        store.saw_site(SiteSeen(f"st-{number}", 1.0, "ipv4:192.0.2.1:5", "cosilo-site 1", 2.0))
    store.add_invitation({"token_public": bytes(32), "name": "st-anna", "role": "site", "expires_unix_s": 5, "preapproval": b""})
    store.close()
    return path


def look_at_store(path: Path) -> None:
    store = Store(path)
    try:
        assert len(store.invitations()) == 1
    finally:
        store.close()


def test_a_coordinator_s_database_that_was_cut_is_refused(coordinator_database: Path, tmp_path: Path) -> None:
    data = coordinator_database.read_bytes()
    for cut in truncations(data, PLACES):
        if not cut:
            continue  # a new federation's: test_an_empty_database_beside_artifacts_is_refused
        path = tmp_path / "state.db"
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(cut)
        assert not opens_whole_or_refuses("state.db", lambda path=path: look_at_store(path)), len(cut)


def test_a_torn_write_ahead_log_costs_its_last_commits_and_nothing_else(coordinator_database: Path, tmp_path: Path) -> None:
    """SQLite checks each frame: a log cut anywhere gives the database as of some commit."""
    live = tmp_path / "live.db"
    shutil.copy(coordinator_database, live)
    with closing(sqlite3.connect(live)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        for number in range(5):
            connection.execute("UPDATE sites_seen SET at = ?", (float(number),))
            connection.commit()
        main, wal = live.read_bytes(), live.with_name("live.db-wal").read_bytes()
    path = tmp_path / "state.db"
    for cut in truncations(wal, PLACES):
        for end in ("", "-wal", "-shm"):
            path.with_name(f"state.db{end}").unlink(missing_ok=True)
        path.write_bytes(main)
        path.with_name("state.db-wal").write_bytes(cut)
        assert opens_whole_or_refuses("state.db-wal", lambda: look_at_store(path)), len(cut)


# The identity's files


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    federation = found(tmp_path_factory.mktemp("identity") / "f")
    return federation.admin.folder


def look_at_identity(folder: Path) -> None:
    identity = load_identity(folder)
    check_tls_files(identity.tls, datetime.now(UTC))
    identity.signing_key()
    identity.members()
    identity.trust()


def test_every_file_of_an_identity_is_whole_or_refused(identity: Path, tmp_path: Path) -> None:
    look_at_identity(identity)
    names = sorted(path.name for path in identity.iterdir() if path.is_file())
    assert "signing.key" in names
    for name in names:
        for cut in truncations((identity / name).read_bytes(), 25):
            folder = with_file(identity, tmp_path / "i", name, cut)
            opens_whole_or_refuses(name, lambda folder=folder: look_at_identity(folder))


@pytest.mark.parametrize("name", ["signing.key", "tls.key", "members.json"])
def test_any_bytes_in_an_identity_are_whole_or_refused(name: str, identity: Path, tmp_path: Path) -> None:
    folder = with_file(identity, tmp_path / "i", name, (identity / name).read_bytes())

    @fuzzed()
    @given(some((identity / name).read_bytes()))
    def try_some(data: bytes) -> None:
        (folder / name).write_bytes(data)
        opens_whole_or_refuses(name, lambda: look_at_identity(folder))

    try_some()


def test_an_empty_database_beside_artifacts_is_refused(tmp_path: Path) -> None:
    """It would open as a new federation's, and forget every run, member and certificate."""
    founded = found(tmp_path / "f")
    data = tmp_path / "data"
    data.mkdir()
    paths = Paths(identity=founded.coordinator.folder, data=data)
    listen = Listen(federation="127.0.0.1:0", enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
    config = CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths)
    Coordinator(config)._store.close()
    Coordinator(config)._store.close()  # nothing lost where there was nothing
    (data / "artifacts" / ("ab" * 32)).write_bytes(b"weights")
    Coordinator(config)._store.close()
    for lost in (lambda path: path.write_bytes(b""), Path.unlink):
        lost(data / "state.db")
        for end in ("-wal", "-shm"):
            (data / f"state.db{end}").unlink(missing_ok=True)
        with pytest.raises(CosiloError, match="put the newest backup back"):
            Coordinator(config)
        (data / "state.db").touch()
