"""Attacks on what a site must not forget (R5, R8): the ledger deleted, as somebody does who finds a damaged state.db in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosilo_client.journal import Journal
from cosilo_client.ledger import ConsentEntry, RoundEntry
from cosilo_common.errors import CosiloError

RUN = bytes(range(32))
KEY, NEW_KEY = bytes([7]) * 32, bytes([8]) * 32


def accept(journal: Journal) -> None:
    journal.ledger.accept(RUN, b"manifest", b"signature", {"anna": KEY}, accepted_at="2026-03-01T00:00:00Z", accepted_by="person")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site that has consented once."""
    folder = tmp_path / "site"
    with Journal.open(folder, site_key=KEY) as journal:
        accept(journal)
        journal.begin(RoundEntry(RUN, 1, "train", ("anna",), b"m" * 32, b"e" * 32))
        journal.ledger.record_consent(RUN, 1, ConsentEntry(1, ("anna",), True, b"signed"))
    return folder


def lose_the_ledger(folder: Path) -> None:
    for path in folder.glob("state.db*"):
        path.unlink()


@pytest.mark.parametrize("vouched", [False, True])
def test_r5_a_deleted_ledger_does_not_begin_again_under_the_same_key(folder: Path, vouched: bool) -> None:
    """The run would be accepted again, and the same round consented to again, to other survivors."""
    lose_the_ledger(folder)
    for _ in range(2):
        with pytest.raises(CosiloError, match=r"the ledger is gone.*enrol again"):
            Journal.open(folder, site_key=KEY, vouched=vouched)


def test_r5_a_new_key_begins_with_a_new_ledger(folder: Path) -> None:
    """No run has accepted the new key, so nothing that the old one signed can be signed again."""
    lose_the_ledger(folder)
    with Journal.open(folder, site_key=NEW_KEY) as journal:
        assert journal.ledger.accepted_runs() == ()
    with Journal.open(folder, site_key=NEW_KEY):
        pass
    lose_the_ledger(folder)
    with pytest.raises(CosiloError, match="the ledger is gone"):
        Journal.open(folder, site_key=NEW_KEY)


def test_r5_the_lost_ledger_may_be_put_back(folder: Path, tmp_path: Path) -> None:
    """The newest one, that is: its token is the file's."""
    (folder / "state.db").rename(tmp_path / "kept")
    with pytest.raises(CosiloError, match="the ledger is gone"):
        Journal.open(folder, site_key=KEY)
    lose_the_ledger(folder)
    (tmp_path / "kept").rename(folder / "state.db")
    with Journal.open(folder, site_key=KEY) as journal:
        assert journal.ledger.consent(RUN, 1) is not None
