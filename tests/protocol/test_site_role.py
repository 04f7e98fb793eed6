"""The site's role over its journal: repeated calls, kills at every durable step, attempts and rounds (R4, R5)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.engine.default import DefaultDialect

from cosilo_client import secagg as role_module
from cosilo_client.ledger import Phase, RoundState
from cosilo_client.secagg import SiteRole
from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.messages import RoundKind, Signed
from tests.protocol.parties import (
    RUN,
    Coordinator,
    Site,
    federation,
    make_start,
    make_terms,
    names,
    refused,
    some_update,
)
from tests.protocol.site_roles import FOUR, VALUES, A, B, C, D, Killed, delivered, sites
from tests.protocol.test_whole_protocol import FAST_FOLDER, check_opened

__all__ = ["sites"]  # the fixtures


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


def test_a_spool_without_its_statement_is_discarded_and_made_again(sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: killed between the spool's fsync and the statement's commit. No byte has left; the same keys give the same bytes."""
    delivered(sites)
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
    delivered(sites)
    site = sites[A]
    site.journal.vault.destroy_masks = lambda _run: (_ for _ in ()).throw(Killed())  # type: ignore[method-assign]  # a kill at just this call
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
    delivered(sites)
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
    delivered(sites)
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
    delivered(sites)
    plain = sites[A].plain_words()
    sites[A].role.mask_chunks()
    spool = sites[A].spool_bytes()
    delivered(sites, attempt=2)
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
    delivered(sites)
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
