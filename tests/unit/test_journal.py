"""The site's journal: ledger that is never deleted, vault that forgets, one lock, and what a second process may do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from cosilo_client.journal import Journal, TrainedUpdate, open_ledger
from cosilo_client.ledger import ConsentEntry, Ledger, ModelUpload, Phase, RoundEntry, RoundState
from cosilo_client.vault import Keeps, Vault
from cosilo_common.errors import CosiloError

RUN = bytes(range(32))
OTHER_RUN = bytes(32)
SITE_KEY = bytes([7]) * 32
PARTICIPANTS = {"st-anna": b"a" * 32, "st-bonifaz": b"b" * 32, "st-clara": b"c" * 32}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "site", site_key=SITE_KEY) as opened:
        accept(opened.ledger)
        yield opened


def accept(ledger: Ledger, run: bytes = RUN, participants: dict[str, bytes] = PARTICIPANTS) -> None:
    ledger.accept(run, b"manifest", b"signature", participants, accepted_at="2026-03-01T00:00:00Z", accepted_by="person")


def entry(round_: int = 1, run: bytes = RUN) -> RoundEntry:
    return RoundEntry(run, round_, "train", tuple(PARTICIPANTS), b"m" * 32, b"e" * 32)


# Ledger


def test_an_acceptance_is_kept_and_not_rewritten(journal: Journal) -> None:
    accept(journal.ledger)
    with pytest.raises(CosiloError, match="accepted before with other bytes"):
        accept(journal.ledger, participants={"mallory": b"x" * 32})
    accepted = journal.ledger.accepted(RUN)
    assert accepted is not None
    assert (accepted.manifest, accepted.signature, dict(accepted.participants)) == (b"manifest", b"signature", PARTICIPANTS)
    assert journal.ledger.accepted(OTHER_RUN) is None
    assert [run.run for run in journal.ledger.accepted_runs()] == [RUN]


def test_pins_are_a_person_s_to_change(journal: Journal) -> None:
    journal.ledger.pin("st-anna", b"a" * 32, pinned_at="2026-03-01T00:00:00Z")
    journal.ledger.pin("st-anna", b"z" * 32, pinned_at="2026-03-02T00:00:00Z")
    assert dict(journal.ledger.pins()) == {"st-anna": b"z" * 32}


def test_a_round_is_kept_with_all_that_was_fixed(journal: Journal) -> None:
    journal.begin(entry())
    journal.ledger.reach(RUN, 1, Phase.FETCHED)
    journal.ledger.raise_attempt(RUN, 1, 2)
    found = journal.ledger.round(RUN, 1)
    assert found == RoundEntry(RUN, 1, "train", tuple(PARTICIPANTS), b"m" * 32, b"e" * 32, RoundState.OPEN, Phase.FETCHED, 2, None, "")
    assert journal.ledger.open_rounds() == (found,)
    with pytest.raises(CosiloError, match="2 is not above 2"):
        journal.ledger.raise_attempt(RUN, 1, 2)


def test_a_round_of_a_run_that_was_not_accepted_cannot_be_written(journal: Journal) -> None:
    with pytest.raises(IntegrityError):
        journal.ledger.begin_round(entry(run=OTHER_RUN))


def test_a_finished_round_stays_finished(journal: Journal) -> None:
    journal.begin(entry())
    journal.finish(entry(), RoundState.CLOSED, "")
    journal.finish(entry(), RoundState.ABANDONED, "too late")
    journal.ledger.reach(RUN, 1, Phase.REVEALED)
    found = journal.ledger.round(RUN, 1)
    assert found is not None
    assert (found.state, found.outcome, found.phase) == (RoundState.CLOSED, "", Phase.BEGUN)
    assert journal.ledger.open_rounds() == ()


def test_one_consent_a_round(journal: Journal) -> None:
    """R5: the primary key is (run, round), whatever the attempt."""
    journal.begin(entry())
    consent = ConsentEntry(1, ("st-anna", "st-clara"), True, b"signed")
    journal.ledger.record_consent(RUN, 1, consent)
    with pytest.raises(CosiloError, match="consented already"):
        journal.ledger.record_consent(RUN, 1, ConsentEntry(2, ("st-anna",), False, b"another"))
    assert journal.ledger.consent(RUN, 1) == consent
    assert journal.ledger.consent(RUN, 2) is None


def test_uploads_for_a_model_count_once_a_round(journal: Journal) -> None:
    """R8: over all attempts of a round, across runs; a rehearsal's is not counted."""
    accept(journal.ledger, OTHER_RUN)
    journal.begin(entry())
    journal.begin(entry(run=OTHER_RUN))
    for message in (b"attempt 1", b"attempt 2"):
        journal.ledger.record_upload(entry(), message, key=b"m" * 32, cohort=b"I" * 32, counted=True)
    journal.ledger.record_upload(entry(run=OTHER_RUN), b"rehearsal", key=b"m" * 32, cohort=b"I" * 32, counted=False)
    assert journal.ledger.model_uploads(b"m" * 32) == (ModelUpload(RUN, 1, b"I" * 32),)
    assert journal.ledger.permitted_rounds(b"m" * 32) == 0
    journal.ledger.permit_model(b"m" * 32, 3, permitted_at="2026-03-01T00:00:00Z")
    assert journal.ledger.permitted_rounds(b"m" * 32) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM consents",
        "UPDATE consents SET survivors = 'st-anna'",
        "DELETE FROM model_uploads",
        "UPDATE model_uploads SET round = 9",
        "DELETE FROM rounds",
        "DELETE FROM accepted_runs",
        "UPDATE run_participants SET key = x'00'",
    ],
)
def test_the_database_itself_keeps_the_ledger(journal: Journal, statement: str) -> None:
    journal.begin(entry())
    journal.ledger.record_consent(RUN, 1, ConsentEntry(1, ("st-anna",), True, b"signed"))
    journal.ledger.record_upload(entry(), b"statement", key=b"m" * 32, cohort=b"I" * 32, counted=True)
    with pytest.raises(IntegrityError, match="the ledger keeps"), journal._engine.begin() as connection:
        connection.exec_driver_sql(statement)


# Lock


def test_a_second_daemon_is_refused_and_told_which_process_holds_the_journal(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(CosiloError, match=rf"another daemon \(pid {os.getpid()}\) holds it.*kill {os.getpid()}"):
        Journal.open(tmp_path / "site", site_key=SITE_KEY)


def test_the_lock_holds_between_processes_and_goes_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cosilo_client.journal import Journal\n"
        "journal = Journal.open(Path(sys.argv[1]), site_key=bytes([7]) * 32)\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(CosiloError, match=f"pid {holder.pid}"):
        Journal.open(tmp_path / "site", site_key=SITE_KEY)
    holder.kill()
    holder.communicate()
    Journal.open(tmp_path / "site", site_key=SITE_KEY).close()


def test_the_accept_command_writes_while_the_daemon_runs(journal: Journal, tmp_path: Path) -> None:
    accept(open_ledger(tmp_path / "site"), OTHER_RUN)
    assert journal.ledger.accepted(OTHER_RUN) is not None


def test_a_journal_that_cannot_be_opened_frees_its_lock(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "state.db").write_bytes(b"no database" * 100)
    for _ in range(2):
        with pytest.raises(CosiloError, match="not a database"):
            Journal.open(tmp_path / "site", site_key=SITE_KEY)


# Vault


def test_secrets_come_back_and_are_forgotten(journal: Journal) -> None:
    """R7, R4: mask keys alone first, then everything; another run's are untouched."""
    vault = journal.vault
    for run in (RUN, OTHER_RUN):
        vault.renew(run)
        vault.put_all(run, 1, 1, {"mask key": b"s", "held": b"shares"}, keeps={"mask key": Keeps.MASKS})
    assert vault.get(RUN, 1, 1, "mask key") == b"s"
    assert vault.get(RUN, 1, 2, "mask key") is None
    vault.destroy_masks(RUN)
    assert vault.get(RUN, 1, 1, "mask key") is None
    assert vault.get(RUN, 1, 1, "held") == b"shares"
    vault.forget(RUN)
    assert vault.get(RUN, 1, 1, "held") is None
    assert vault.get(OTHER_RUN, 1, 1, "mask key") == b"s"
    assert not vault.key_path(RUN, Keeps.ROUND).exists()


def test_several_secrets_are_there_together_or_not_at_all(journal: Journal) -> None:
    journal.vault.renew(RUN)
    journal.vault.put(RUN, 1, 1, "b", b"there")
    with pytest.raises(IntegrityError):
        journal.vault.put_all(RUN, 1, 1, {"a": b"new", "b": b"again"})
    assert journal.vault.get(RUN, 1, 1, "a") is None


@pytest.mark.parametrize("change", ["round = 2", "attempt = 2", "name = 'other'", "keeps = 'masks'", "box = zeroblob(40)"])
def test_a_sealed_row_opens_only_where_it_was_put(journal: Journal, change: str) -> None:
    vault: Vault = journal.vault
    vault.renew(RUN)
    vault.put(RUN, 1, 1, "held", b"shares")
    with journal._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE sealed_secrets SET {change}")
    round_ = 2 if "round" in change else 1
    attempt = 2 if "attempt" in change else 1
    with pytest.raises(CosiloError, match="abandon the round"):
        vault.get(RUN, round_, attempt, "other" if "name" in change else "held")


def test_renewed_keys_do_not_open_what_was_sealed_before(journal: Journal, tmp_path: Path) -> None:
    """R7: an old attempt's rows, still in the log or in a copy of the database, are noise under the new key."""
    vault = journal.vault
    vault.renew(RUN)
    vault.put(RUN, 1, 1, "held", b"shares")
    with journal._engine.connect() as connection:
        old = connection.exec_driver_sql("SELECT * FROM sealed_secrets").one()
    vault.renew(RUN)
    with journal._engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO sealed_secrets VALUES (?, ?, ?, ?, ?, ?)", tuple(old))
    with pytest.raises(CosiloError, match="is not theirs"):
        vault.get(RUN, 1, 1, "held")
    vault.key_path(RUN, Keeps.ROUND).unlink()
    with pytest.raises(CosiloError, match=r"round\.key of run 000102030405 is gone"):
        vault.get(RUN, 1, 1, "held")


# Files


def test_a_later_round_clears_the_earlier_one_s_files(journal: Journal) -> None:
    journal.begin(entry(1))
    files = journal.files(RUN)
    files.update.write_bytes(b"values")
    journal.trained(RUN, TrainedUpdate(1, 0, 5, (0.5,)))
    files.spool(1).write_bytes(b"masked")
    assert journal.trained_update(RUN, 1) == TrainedUpdate(1, 0, 5, (0.5,))
    journal.begin(entry(2))
    assert list(files.folder.iterdir()) == []
    first = journal.ledger.round(RUN, 1)
    assert first is not None
    assert first.state is RoundState.ABANDONED


def test_an_update_that_comes_after_its_round_is_refused(journal: Journal) -> None:
    """R8: an update never outlives its round."""
    journal.begin(entry(1))
    journal.begin(entry(2))
    journal.files(RUN).update.write_bytes(b"values")
    with pytest.raises(CosiloError, match="round 1 is not open"):
        journal.trained(RUN, TrainedUpdate(1, 0, 5, (0.5,)))
    assert not journal.files(RUN).facts.exists()


def test_folders_of_rounds_that_are_over_go_at_the_next_start(tmp_path: Path) -> None:
    """R7: killed between the ledger's word and the unlinking."""
    with Journal.open(tmp_path / "site", site_key=SITE_KEY) as journal:
        accept(journal.ledger)
        journal.begin(entry())
        journal.vault.renew(RUN)
        journal.vault.put(RUN, 1, 1, "held", b"shares")
        journal.ledger.finish_round(RUN, 1, RoundState.CLOSED, "")
    with Journal.open(tmp_path / "site", site_key=SITE_KEY) as journal:
        assert list((tmp_path / "site" / "rounds").iterdir()) == []
        assert journal.vault.get(RUN, 1, 1, "held") is None


def test_a_new_incarnation_survives_ordinary_restarts(tmp_path: Path) -> None:
    for _ in range(3):
        with Journal.open(tmp_path / "site", site_key=SITE_KEY) as journal:
            journal.advance()
