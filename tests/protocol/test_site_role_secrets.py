"""What a site's role leaves behind: no secret in any file, log or exception (R4, R7)."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cosilo_client import secagg as role_module
from cosilo_client.journal import Journal
from cosilo_client.secagg import SiteRole
from cosilo_common.canonical import sha256
from cosilo_common.secagg.keys import Secret, pair_seed, self_seed
from cosilo_common.secagg.roster import Roster
from tests.protocol.parties import (
    RUN,
    Coordinator,
    Site,
    close_all,
    federation,
    make_start,
    make_terms,
    names,
    some_update,
)
from tests.protocol.site_roles import FOUR, VALUES, A, delivered, sites

__all__ = ["sites"]  # the fixtures


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
    delivered(sites)
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
    delivered(sites)
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
