"""The site's role over its journal: repeated calls, kills at every durable step, and what is left behind (R4, R5, R7)."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.engine.default import DefaultDialect

from cosilo_client import durable, masking
from cosilo_client import secagg as role_module
from cosilo_client.journal import Journal, TrainedUpdate
from cosilo_client.ledger import Phase, RoundState
from cosilo_client.secagg import SiteRole
from cosilo_common import transfer
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.keys import Secret, pair_seed, self_seed
from cosilo_common.secagg.masks import CHUNK_WORDS
from cosilo_common.secagg.messages import RoundKind, Signed
from cosilo_common.secagg.roster import Roster
from tests.protocol.parties import (
    BASE,
    RUN,
    Coordinator,
    Site,
    close_all,
    federation,
    make_start,
    make_terms,
    names,
    refused,
    some_update,
)
from tests.protocol.test_whole_protocol import FAST_FOLDER, check_opened

VALUES = 50
FOUR = names(4)
A, B, C, D = FOUR


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[dict[str, Site]]:
    terms = make_terms(FOUR, VALUES)
    made = federation(tmp_path, terms, make_start(terms))
    yield made
    for site in made.values():
        site.close()


def repeat_after_restart(sites: Mapping[str, Site], call: Callable[[Site], Signed | None]) -> list[Signed]:
    """Each site's answer, asserted to be the same bytes when asked again and again after a restart."""
    answers = []
    for site in sites.values():
        first = call(site)
        assert call(site) == first
        site.restart()
        again = call(site)
        assert again == first
        if again is not None and first is not None:
            assert again.encode() == first.encode()
            answers.append(again)
    return answers


# Resumption


def test_every_call_repeated_after_a_restart_gives_the_same_bytes(sites: dict[str, Site]) -> None:
    """R4, R5, R6: journaled before it is sent, resent byte for byte."""
    adverts = repeat_after_restart(sites, lambda site: site.role.advert(1))
    shares = repeat_after_restart(sites, lambda site: site.role.roster(adverts))
    repeat_after_restart(sites, lambda site: site.role.deliver(shares))
    repeat_after_restart(sites, lambda site: site.role.mask_chunks())
    spools = {name: site.spool_bytes() for name, site in sites.items()}
    consents = repeat_after_restart(sites, lambda site: site.role.consent(FOUR))
    repeat_after_restart(sites, lambda site: site.role.reveal(consents))
    assert {name: site.spool_bytes() for name, site in sites.items()} == spools
    for site in sites.values():
        site.role.close(RoundState.CLOSED)
        site.role.close(RoundState.CLOSED)
        assert refused(lambda site=site: site.role.advert(1)).rule == "R2"


class Killed(BaseException):
    """The process is gone. Not an Exception: nothing may catch it."""


@contextmanager
def killed_before_step(step: int) -> Iterator[list[str]]:
    """Kills before the `step`-th durable thing (a commit, an fsync) that happens while it is armed. Yields what happened so far."""
    happened: list[str] = []

    def count(name: str) -> None:
        happened.append(name)
        if len(happened) == step:
            raise Killed

    real_commit = DefaultDialect.do_commit

    def on_commit(dialect: DefaultDialect, connection: Any) -> None:
        count("commit")
        real_commit(dialect, connection)

    real_fsync = os.fsync

    def on_fsync(descriptor: int) -> None:
        count("fsync")
        real_fsync(descriptor)

    patch = pytest.MonkeyPatch()
    patch.setattr(DefaultDialect, "do_commit", on_commit)
    patch.setattr(os, "fsync", on_fsync)
    try:
        yield happened
    finally:
        patch.undo()


def round_with_one_kill(folder: Path, step: int) -> bool:
    """A whole round of three in which site-01 is killed before its `step`-th durable step, then asked again. False: it took fewer."""
    terms = make_terms(names(3), VALUES, bits=24)
    start = make_start(terms)
    updates = {name: some_update(VALUES, i) for i, name in enumerate(names(3))}
    sites = federation(folder, terms, start, updates)
    taken, killed = 0, False

    def fragile(call: Callable[[Site], Signed | None]) -> Callable[[Site], Signed | None]:
        def attempt(site: Site) -> Signed | None:
            nonlocal taken, killed
            if site.name != A or killed:
                return call(site)
            try:
                with killed_before_step(step - taken) as happened:
                    answer = call(site)
            except Killed:
                killed = True
                site.restart()
                return call(site)
            taken += len(happened)
            return answer

        return attempt

    class Fragile(Coordinator):
        def ask(self, phase, asked, call):  # type: ignore[no-untyped-def]  # as its base
            return super().ask(phase, asked, fragile(call))

    coordinator = Fragile(terms, start, sites)
    check_opened(coordinator, coordinator.run(), {name: weight for name, (_, weight) in updates.items()})
    fragile(lambda site: site.role.close(RoundState.CLOSED, round=1))(sites[A])  # type: ignore[arg-type,return-value]
    entry = sites[A].journal.ledger.round(RUN, 1)
    assert entry is not None
    assert entry.state is RoundState.CLOSED
    assert not list((sites[A].folder / "rounds").iterdir())
    assert sites[A].journal.vault.get(RUN, 1, 1, "held") is None
    for site in sites.values():
        site.close()
    return killed


def test_killed_before_any_durable_step_the_round_still_opens_exactly() -> None:
    """Crashes: every commit and every fsync of a whole round, one kill at a time, at 24 bits, where rounding is random."""
    step = 1
    while True:
        with tempfile.TemporaryDirectory(dir=FAST_FOLDER) as folder:
            if not round_with_one_kill(Path(folder), step):
                break
        step += 1
    assert step > 30  # a round takes some 35 durable steps; far fewer would mean that nothing was killed


def masked_ready(sites: dict[str, Site], attempt: int = 1) -> None:
    adverts = [site.role.advert(attempt) for site in sites.values()]
    shares = [site.role.roster(adverts) for site in sites.values()]
    for site in sites.values():
        assert site.role.deliver(shares) is None


def test_a_spool_without_its_statement_is_discarded_and_made_again(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: killed between the spool's fsync and the statement's commit. No byte has left; the same keys give the same bytes."""
    masked_ready(sites)
    site = sites[A]
    with monkeypatch.context() as patch:
        patch.setattr(site.journal.ledger, "record_upload", lambda *_a, **_k: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            site.role.mask_chunks()
    unsigned = site.spool_bytes()
    assert site.journal.vault.key_path(RUN, role_module.Keeps.MASKS).exists()
    site.restart()
    assert not site.journal.files(RUN).spool(1).exists()
    site.role.mask_chunks()
    assert site.spool_bytes() == unsigned
    assert not site.journal.vault.key_path(RUN, role_module.Keeps.MASKS).exists()


def test_mask_keys_outlive_an_unsafe_spool_and_no_safe_one(sites: dict[str, Site]) -> None:
    """R4: killed after the statement's commit; the mask keys go at the restart, the shares stay."""
    masked_ready(sites)
    site = sites[A]
    site.journal.vault.destroy_masks = lambda _run: (_ for _ in ()).throw(Killed())  # type: ignore[method-assign]
    with pytest.raises(Killed):
        site.role.mask_chunks()
    signed = site.spool_bytes()
    site.restart()
    assert site.journal.vault.get(RUN, 1, 1, "mask key") is None
    assert site.journal.vault.get(RUN, 1, 1, "held") is not None
    site.role.mask_chunks()
    assert site.spool_bytes() == signed


def test_power_lost_between_consent_and_send(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: the ledger has the consent; the same one is sent later, no other; and the unmasked update is gone by then."""
    masked_ready(sites)
    for site in sites.values():
        site.role.mask_chunks()
    site = sites[A]
    with monkeypatch.context() as patch:
        patch.setattr(site.journal, "reconcile", lambda _entry: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            site.role.consent(FOUR)
    committed = site.journal.ledger.consent(RUN, 1)
    assert committed is not None
    assert site.journal.files(RUN).update.exists()
    site.restart()
    assert not site.journal.files(RUN).update.exists()
    assert refused(lambda: site.role.consent((A, B, C))).rule == "R5"
    assert site.role.consent(FOUR).encode() == committed.message


def test_no_consent_leaves_when_its_commit_fails(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: the signature is returned only after the ledger's commit."""
    masked_ready(sites)
    site = sites[D]

    def full(_dialect: DefaultDialect, _connection: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(DefaultDialect, "do_commit", full)
        with pytest.raises(OSError, match="disk full"):
            site.role.consent((A, B, C))
    assert site.journal.ledger.consent(RUN, 1) is None
    assert site.role.consent((A, B, C)).site == D


# Attempts and rounds


def test_a_later_attempt_has_other_keys_and_the_same_update(sites: dict[str, Site]) -> None:
    """R4: fresh keys mask the same integers; nothing of the first attempt is left."""
    first = sites[A].role.advert(1)
    masked_ready(sites)
    plain = sites[A].plain_words()
    sites[A].role.mask_chunks()
    spool = sites[A].spool_bytes()
    masked_ready(sites, attempt=2)
    assert sites[A].role.advert(2).body != first.body
    assert not sites[A].journal.files(RUN).spool(1).exists()
    assert np.array_equal(sites[A].plain_words(2)[:VALUES], plain[:VALUES])
    sites[A].role.mask_chunks()
    assert sites[A].spool_bytes(2) != spool
    for name in ("advert", "roster", "held", "mask key"):
        assert sites[A].journal.vault.get(RUN, 1, 1, name) is None


def test_an_update_never_outlives_its_round(sites: dict[str, Site]) -> None:
    """R8: abandoned, or overtaken by a later round, the site trains again."""
    site = sites[A]
    site.role.close(RoundState.ABANDONED, "a test")
    assert not site.journal.files(RUN).update.exists()
    site.begin(make_start(site.terms, 2))
    with pytest.raises(CosiloError, match="nothing is trained"):
        site.role.advert(1)
    site.train(*some_update(VALUES, 9))
    site.role.advert(1)
    site.begin(make_start(site.terms, 3))
    assert site.journal.trained_update(RUN, 3) is None
    assert site.journal.vault.get(RUN, 2, 1, "mask key") is None
    entry = site.journal.ledger.round(RUN, 2)
    assert entry is not None
    assert (entry.state, entry.outcome) == (RoundState.ABANDONED, "round 3 began")


def test_killed_while_a_later_round_begins_leaves_nothing_of_the_earlier(sites: dict[str, Site]) -> None:
    """R7: at each durable step of `begin`."""
    site = sites[A]
    for step in range(1, 30):
        site.role.advert(1)
        assert site.start is not None
        site.start = make_start(site.terms, site.start.round + 1)
        try:
            with killed_before_step(step):
                site.role.begin(site.start)
        except Killed:
            site.restart()
        else:
            break
        assert site.journal.trained_update(RUN, site.start.round) is None
        assert not site.journal.files(RUN).update.exists()
        assert site.journal.vault.get(RUN, site.start.round - 1, 1, "mask key") is None
        site.train(*some_update(VALUES, step))
    else:
        pytest.fail("begin never came to its end")


def test_phases_are_kept_for_a_restarted_daemon(sites: dict[str, Site]) -> None:
    site = sites[A]

    def phase() -> Phase:
        entry = site.journal.ledger.round(RUN, 1)
        assert entry is not None
        return entry.phase

    assert phase() is Phase.TRAINED
    site.journal.ledger.reach(RUN, 1, Phase.FETCHED)  # never back
    masked_ready(sites)
    assert phase() is Phase.TRAINED
    for other in sites.values():
        other.role.mask_chunks()
    assert phase() is Phase.SPOOLED
    site.role.uploaded()
    assert phase() is Phase.UPLOADED
    consents = [other.role.consent(FOUR) for other in sites.values()]
    assert phase() is Phase.CONSENTED
    site.role.reveal(consents)
    assert phase() is Phase.REVEALED


def test_two_runs_at_once_do_not_touch_each_other(sites: dict[str, Site]) -> None:
    site = sites[A]
    other = replace(site.terms, run=sha256(b"a second manifest"))
    site.journal.ledger.accept(
        other.run, b"a second manifest", b"", other.participants, accepted_at="2026-03-02T00:00:00Z", accepted_by="person"
    )
    role = SiteRole(other, A, site.key, site.journal, site.random)
    role.begin(make_start(other, kind=RoundKind.REHEARSAL))
    first, second = site.role.advert(1), role.advert(1)
    role.close(RoundState.CLOSED)
    assert site.role.advert(1) == first
    assert second.run == other.run


# What is left behind


def files_holding(folder: Path, needle: bytes) -> list[str]:
    """Every file under a folder, the WAL too, in which these bytes stand."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def shares_held(site: Site) -> list[bytes]:
    entry = site.journal.ledger.round(RUN, 1)
    assert entry is not None
    return [share for pair in site.role._held(entry).values() for share in (pair.b, pair.s)]


def seeds_of(site: Site, roster: Roster) -> list[bytes]:
    """Every mask seed of a site, worked out from its keys while they are there."""
    get = site.journal.vault.get
    b, s = get(RUN, 1, 1, "self secret"), get(RUN, 1, 1, "mask key")
    assert b is not None
    assert s is not None
    pairs = [
        pair_seed(roster.ctx, site.name, Secret(s), peer, roster.bodies[peer].mask_key) for peer in roster.members if peer != site.name
    ]
    return [seed.reveal() for seed in (self_seed(roster.ctx, site.name, Secret(b)), *pairs)]


def test_nothing_secret_is_left_in_any_file(sites: dict[str, Site]) -> None:
    """R7, R4: searched for in every byte of the folder, WAL included, before, after the upload, after consent, after close."""
    site = sites[A]
    masked_ready(sites)
    start = site.start
    assert start is not None
    roster = Roster.open(Coordinator(site.terms, start, sites).round_terms(1), [other.role.advert(1) for other in sites.values()])
    given = [data for data in site.random.given if len(data) >= 32]
    assert len(given) > 10  # keys, b, seeds, both key files, and every coefficient's draw
    shares, seeds = shares_held(site), seeds_of(site, roster)
    values = some_update(VALUES, 0)[0].tobytes()
    update = [values[at : at + 16] for at in range(0, len(values) - 16, 16)]
    words = site.plain_words()[:VALUES].tobytes()
    masks_key = site.journal.vault.key_path(RUN, role_module.Keeps.MASKS).read_bytes()

    # The search works: the key file and the update are there now; the sealed secrets are nowhere in the clear.
    assert files_holding(site.folder, masks_key) == [f"rounds/{RUN.hex()}/masks.key"]
    assert files_holding(site.folder, update[0]) == [f"rounds/{RUN.hex()}/update"]
    for secret in (*shares, *seeds):
        assert files_holding(site.folder, secret) == []

    site.role.mask_chunks()
    assert files_holding(site.folder, masks_key) == []
    for other in list(sites.values())[1:]:
        other.role.mask_chunks()
    consents = [other.role.consent(FOUR) for other in sites.values()]
    for part in update:
        assert files_holding(site.folder, part) == []
    site.role.reveal(consents)
    close_all(sites)

    assert (site.folder / "state.db-wal").stat().st_size > 0
    for secret in (*given, *shares, *seeds, *update, words[:16], words[-16:]):
        assert files_holding(site.folder, secret) == []
    assert sorted(path.name for path in site.folder.iterdir()) == [
        "incarnation",
        "journal.lock",
        "rounds",
        "state.db",
        "state.db-shm",
        "state.db-wal",
    ]


def test_every_file_is_private(sites: dict[str, Site]) -> None:
    masked_ready(sites)
    sites[A].role.mask_chunks()
    for path in sites[A].folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


CANARY = sha256(b"canary")


class CanaryRandom:
    """Every secret is the canary."""

    def __init__(self) -> None:
        self.count = 0

    def token_bytes(self, n: int) -> bytes:
        self.count += 1
        if n == 32 and self.count % 2:  # keys differ from one another, and hold the canary's bytes all the same
            return bytes([self.count & 0xFF]) + CANARY[1:]
        return (self.count.to_bytes(4, "big") + CANARY * 2)[:n]


def test_a_canary_reaches_no_log_exception_or_repr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    terms = make_terms(names(3), VALUES)
    start = make_start(terms)
    sites = federation(tmp_path, terms, start)
    site = sites[A]
    random = CanaryRandom()
    site.journal.close()
    site.journal = Journal.open(site.folder, site_key=site.key.public_key().public_bytes_raw(), randomness=random)
    site.role = SiteRole(terms, A, site.key, site.journal, random)
    said = [repr(site.role.begin(start))]
    adverts = [other.role.advert(1) for other in sites.values()]
    shares = [other.role.roster(adverts) for other in sites.values()]
    site.role.deliver(shares)
    vault = site.journal.vault

    def failing(call: Callable[[], object]) -> None:
        with pytest.raises(Exception) as caught:
            call()
        error: BaseException | None = caught.value
        while error is not None:
            said.append(f"{error!r} {error} {error.__notes__ if hasattr(error, '__notes__') else ''}")
            error = error.__cause__ or error.__context__

    failing(lambda: vault.put(RUN, 1, 1, "mask key", CANARY))  # the row is there already: an error of SQLite with its values
    failing(lambda: site.role.roster(adverts[:2]))
    failing(lambda: site.role.deliver(shares[:2]))
    failing(lambda: site.role.advert(0))
    vault.key_path(RUN, role_module.Keeps.MASKS).write_bytes(CANARY)
    failing(site.role.mask_chunks)  # the wrong key
    vault.key_path(RUN, role_module.Keeps.MASKS).write_bytes(CANARY[:31])
    failing(site.role.mask_chunks)  # no key
    said += [repr(thing) for thing in (site.role, site.journal, vault, site.role._roster(site.role._entry()))]
    said += [repr(site.role._held(site.role._entry())), caplog.text]
    text = "\n".join(said)
    for form in (CANARY[4:12].hex(), repr(CANARY[4:12])[2:-1], str(int.from_bytes(CANARY[4:12], "big"))):
        assert form not in text
    for other in sites.values():
        other.close()


# The masked bytes


def test_a_masked_upload_of_zeros_looks_random(tmp_path: Path) -> None:
    """Chi-square of the bytes and serial correlation of the words, of a rehearsal's upload; two attempts share nothing."""
    terms = make_terms(names(3), CHUNK_WORDS)
    start = make_start(terms, kind=RoundKind.REHEARSAL)
    sites = federation(tmp_path, terms, start)
    uploads = []
    for attempt in (1, 2):
        masked_ready(sites, attempt)
        sites[A].role.mask_chunks()
        uploads.append(np.frombuffer(sites[A].spool_bytes(attempt), dtype=np.uint8))
    for data in uploads:
        counts = np.bincount(data, minlength=256)
        expected = len(data) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 150 < chi_square < 380  # 255 degrees of freedom: mean 255, sd 22.6; five sd either side
        words = data.view("<u4").astype(np.float64)
        assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 5 / np.sqrt(len(words))
    first, second = (data.view("<u4") for data in uploads)
    assert (first == second).sum() < 5  # by chance 6e-5 of the words
    for site in sites.values():
        site.close()


def test_masking_takes_memory_for_chunks_not_for_the_vector(tmp_path: Path) -> None:
    terms = make_terms(names(3), 16 * CHUNK_WORDS + 17)
    start = make_start(terms)
    values = np.zeros(terms.values, dtype=np.float32)
    sites = federation(tmp_path, terms, start, dict.fromkeys(names(3), (values, 1)))
    masked_ready(sites)
    tracemalloc.start()
    try:
        sites[A].role.mask_chunks()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 << 20  # four chunks in work at 3 MiB, and two threads' scratch; the vector alone has 16 MiB
    for site in sites.values():
        site.close()


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("bits", [32, 24])
@pytest.mark.parametrize("extra", [0, 1, CHUNK_WORDS - 30])
def test_workers_and_chunk_ends_do_not_change_the_bytes(tmp_path: Path, workers: int, bits: int, extra: int) -> None:
    """The tail may begin a chunk, end one, or run on into the next."""
    terms = make_terms(names(3), CHUNK_WORDS + extra, bits=bits)
    encoding = make_start(terms).encoding
    path = tmp_path / "values"
    values = some_update(terms.values, 5)[0]
    values.tofile(path)
    vector = masking.Vector(path, 0, 7, (1.0, 2.0))
    seed = Secret(sha256(b"rounding"))
    first = masking.write_spool(tmp_path / "one", encoding, (), vector, seed, workers=1)
    again = masking.write_spool(tmp_path / "more", encoding, (), vector, seed, workers=workers)
    assert again == first
    assert (tmp_path / "more").read_bytes() == (tmp_path / "one").read_bytes()
    assert first.size_bytes == encoding.wire_bytes
    assert first.digest == sha256((tmp_path / "one").read_bytes())


@pytest.mark.parametrize("spoil", ["nan", "short", "weight"])
def test_an_update_that_cannot_be_masked_leaves_no_spool(sites: dict[str, Site], spoil: str) -> None:
    """A NaN, a file cut short, a weight above the cap; trained again, the same attempt goes on."""
    masked_ready(sites)
    site = sites[A]
    values, weight = some_update(VALUES, 0)
    if spoil == "nan":
        values[-1] = np.nan
    site.train(values[:-1] if spoil == "short" else values, 65 if spoil == "weight" else weight)
    with pytest.raises(CosiloError):
        site.role.mask_chunks()
    assert not list(site.journal.files(RUN).folder.glob("spool*"))
    assert site.journal.ledger.model_uploads(BASE) == ()
    site.train(*some_update(VALUES, 0))
    site.role.mask_chunks()


def test_a_full_disk_is_said_with_the_bytes_needed(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    masked_ready(sites)

    def full(_descriptor: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(masking.os, "write", full)
        with pytest.raises(CosiloError, match="No space left on device; 476 bytes are needed"):
            sites[A].role.mask_chunks()
    assert not list(sites[A].journal.files(RUN).folder.glob("spool*"))


def test_a_trained_update_is_found_again(sites: dict[str, Site]) -> None:
    site = sites[A]
    facts = json.loads(site.journal.files(RUN).facts.read_text())
    assert facts["round"] == 1
    site.restart()
    assert site.journal.trained_update(RUN, 1) == TrainedUpdate(1, 16, some_update(VALUES, 0)[1], (1.0, 2.0))
    assert site.journal.trained_update(RUN, 2) is None


def test_a_half_written_update_is_thrown_away_at_the_next_start(sites: dict[str, Site]) -> None:
    site = sites[A]
    site.begin(make_start(site.terms, 2))
    site.journal.files(RUN).update.write_bytes(b"half")
    site.restart()
    assert not site.journal.files(RUN).update.exists()


def test_durable_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    durable.write_durably(path, b"one")
    durable.write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert transfer.partials(path) == [] or list(tmp_path.iterdir()) == [path]
    durable.shred(path)
    durable.shred(path)
    assert list(tmp_path.iterdir()) == []
