"""Attacks on bytes at rest and in transfer: spoiled uploads, mask reuse, restored backups (PROTOCOL, "Attacks")."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cosilo_client import incarnation
from cosilo_client.journal import Journal
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.masks import CHUNK_WORDS
from cosilo_common.secagg.messages import MessageType, Reveal, RoundKind, Shares, Signed, Upload, sign
from cosilo_common.secagg.roster import Roster
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_server.secagg import reconstruct, verify_upload
from tests.protocol.parties import (
    RUN,
    Coordinator,
    Site,
    federation,
    make_start,
    make_terms,
    names,
    open_sum,
    public_bytes,
    signing_key,
    unpack,
)

FOUR = names(4)
A = FOUR[0]


# Uploads


class Round:
    """A closed-book round whose spools a test may spoil before they are opened."""

    def __init__(self, folder: Path, values: int, bits: int) -> None:
        terms = make_terms(FOUR, values, bits=bits)
        self.start = make_start(terms)
        self.sites = federation(folder, terms, self.start)
        coordinator = Coordinator(terms, self.start, self.sites)
        adverts = [site.role.advert(1) for site in self.sites.values()]
        shares = [site.role.roster(adverts) for site in self.sites.values()]
        for site in self.sites.values():
            assert site.role.deliver(shares) is None
        self.statements: dict[str, Signed] = {name: site.role.mask_chunks() for name, site in self.sites.items()}
        consents = [site.role.consent(FOUR) for site in self.sites.values()]
        reveals = {name: Reveal.decode(site.role.reveal(consents).body) for name, site in self.sites.items()}
        self.roster = Roster.open(coordinator.round_terms(1), adverts)
        bodies = {message.site: Shares.decode(message.body) for message in shares}
        self.keys = reconstruct(self.roster, FOUR, bodies, reveals)
        self.spools = {name: site.spool_bytes() for name, site in self.sites.items()}

    def open(self, spools: dict[str, bytes]) -> object:
        digests = {name: Upload.decode(message.body).digest for name, message in self.statements.items()}
        return open_sum(self.start.encoding, spools, digests, self.keys.masks)

    def close(self) -> None:
        for site in self.sites.values():
            site.close()


@pytest.fixture(scope="module", params=[32, 24])
def spooled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    made = Round(tmp_path_factory.mktemp("spoiled"), 2 * CHUNK_WORDS + 500, request.param)
    yield made
    made.close()


def chunk_bytes(round_: Round) -> int:
    return CHUNK_WORDS * round_.start.encoding.bits // 8


def flip_low_bit(data: bytes, round_: Round) -> bytes:
    """One bit of one value: no zero of the tail sees it."""
    spoiled = bytearray(data)
    spoiled[8] ^= 1
    return bytes(spoiled)


def repeat_chunk(data: bytes, round_: Round) -> bytes:
    size = chunk_bytes(round_)
    return data[:size] + data[:size] + data[2 * size :]


def reorder_chunks(data: bytes, round_: Round) -> bytes:
    size = chunk_bytes(round_)
    return data[size : 2 * size] + data[:size] + data[2 * size :]


@pytest.mark.parametrize("spoil", [flip_low_bit, repeat_chunk, reorder_chunks])
def test_spoiled_chunks_do_not_open(spooled: Round, spoil: Callable[[bytes, Round], bytes]) -> None:
    """phase-6: the signed digest decides, also where the 64 zeros are zero."""
    spools = {**spooled.spools, A: spoil(spooled.spools[A], spooled)}
    with pytest.raises(ProtocolViolation) as caught:
        spooled.open(spools)
    assert caught.value.rule == "phase-6"
    assert A in caught.value.detail
    spooled.open(spooled.spools)


def test_a_truncated_upload_is_not_whole(spooled: Round) -> None:
    """phase-4: the statement's length follows from the encoding; a shorter file never opens."""
    statement = spooled.statements[A]
    assert verify_upload(statement, spooled.roster).size_bytes == len(spooled.spools[A])
    short = Upload(Upload.decode(statement.body).digest, len(spooled.spools[A]) - 1)
    lying = sign(signing_key(A), MessageType.UPLOAD, RUN, 1, 1, A, short)
    with pytest.raises(ProtocolViolation) as caught:
        verify_upload(lying, spooled.roster)
    assert caught.value.rule == "phase-4"
    with pytest.raises(ValueError, match="memoryview"):
        spooled.open({**spooled.spools, A: spooled.spools[A][:-1]})


def test_masks_are_not_reused_between_chunks_at_24_bits(tmp_path: Path) -> None:
    """phase-4: the counter follows words. An upload of zeros is all mask: no pair of neighbouring words comes twice in it."""
    terms = make_terms(FOUR, 2 * CHUNK_WORDS + 5_000, bits=24)
    start = make_start(terms, kind=RoundKind.REHEARSAL)
    sites = federation(tmp_path, terms, start)
    adverts = [site.role.advert(1) for site in sites.values()]
    shares = [site.role.roster(adverts) for site in sites.values()]
    sites[A].role.deliver(shares)
    sites[A].role.mask_chunks()
    words = unpack(sites[A].spool_bytes(), 24)[: start.encoding.size].astype(np.uint64)
    triples = words[:-2] | (words[1:-1] << np.uint64(24)) | ((words[2:] & np.uint64(0xFFFF)) << np.uint64(48))
    assert len(np.unique(triples)) == len(triples)  # by chance two of 5e5 64-bit values agree once in 1e8
    for site in sites.values():
        site.close()


# A backup restored


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    terms = make_terms(FOUR, 10)
    made = federation(tmp_path / "federation", terms, make_start(terms))
    yield made[A]
    for one in made.values():
        one.close()


def reopen(folder: Path, key: str = A, *, vouched: bool = False) -> Journal:
    return Journal.open(folder, site_key=public_bytes(signing_key(key)), vouched=vouched)


def test_a_restored_folder_is_refused(site: Site, tmp_path: Path) -> None:
    """R5: the whole folder copied away and back, as a backup does, with times and modes kept."""
    site.journal.close()
    shutil.copytree(site.folder, tmp_path / "backup")
    lives_on(site)
    shutil.rmtree(site.folder)
    shutil.copytree(tmp_path / "backup", site.folder)
    with pytest.raises(CosiloError, match=r"restored from a backup.*enrol again"):
        reopen(site.folder)
    site.journal = reopen(site.folder, "a new key")


def test_a_restored_database_is_refused(site: Site, tmp_path: Path) -> None:
    """R5: only state.db put back."""
    site.journal.close()
    shutil.copy2(site.folder / "state.db", tmp_path / "state.db")
    lives_on(site)
    for name in ("state.db-wal", "state.db-shm"):
        (site.folder / name).unlink(missing_ok=True)
    shutil.copy2(tmp_path / "state.db", site.folder / "state.db")
    with pytest.raises(CosiloError, match="restored from a backup"):
        reopen(site.folder)
    site.journal = reopen(site.folder, "a new key")


def test_a_folder_overwritten_in_place_is_refused(site: Site, tmp_path: Path) -> None:
    """R5: every file's bytes and times are those of the backup, and its inode the old one; its change time is not."""
    site.journal.close()
    shutil.copytree(site.folder, tmp_path / "backup")
    lives_on(site)
    for path in (tmp_path / "backup").rglob("*"):
        if path.is_file():
            target = site.folder / path.relative_to(tmp_path / "backup")
            target.write_bytes(path.read_bytes())
            status = path.stat()
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CosiloError, match="restored from a backup"):
        reopen(site.folder)
    site.journal = reopen(site.folder, "a new key")


def test_a_copy_of_the_folder_is_refused(site: Site, tmp_path: Path) -> None:
    """R5: two folders with one key would consent twice; the original goes on."""
    site.journal.close()
    shutil.copytree(site.folder, tmp_path / "copy")
    with pytest.raises(CosiloError, match="copied"):
        reopen(tmp_path / "copy")
    site.journal = reopen(site.folder)


def test_a_person_may_vouch_for_a_moved_folder(site: Site, tmp_path: Path) -> None:
    site.journal.close()
    shutil.copytree(site.folder, tmp_path / "moved")
    reopen(tmp_path / "moved", vouched=True).close()
    site.journal = reopen(tmp_path / "moved")


def test_a_new_key_abandons_what_the_old_one_began(site: Site) -> None:
    """R5: the ledger stays; rounds begun under the old key end, and the run refuses the new key."""
    site.role.advert(1)
    site.journal.close()
    site.journal = reopen(site.folder, "a new key")
    entry = site.journal.ledger.round(RUN, 1)
    assert entry is not None
    assert (entry.state, entry.outcome) == ("abandoned", "this site's key changed")
    assert site.journal.vault.get(RUN, 1, 1, "advert") is None
    assert not list((site.folder / "rounds").iterdir())


def test_killed_while_the_incarnation_changes_is_no_alarm(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the file and the ledger's note of it, and before the file."""
    write = incarnation.write_durably
    for after in (False, True):

        def killed(path: Path, data: bytes, after: bool = after) -> None:
            if after:
                write(path, data)
            raise KeyboardInterrupt

        monkeypatch.setattr(incarnation, "write_durably", killed)
        with pytest.raises(KeyboardInterrupt):
            site.journal.advance()
        monkeypatch.setattr(incarnation, "write_durably", write)
        site.restart()


def lives_on(site: Site) -> None:
    """The site lives on after its backup was taken: it opens, and consents or uploads."""
    time.sleep(0.02)  # change times have the grain of the kernel's tick
    site.journal = reopen(site.folder)
    site.journal.advance()
    site.journal.close()
    time.sleep(0.02)
