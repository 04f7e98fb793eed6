"""Four sites at the protocol's level, and how far a test brings them. A fixture, imported by name where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cosilo_common.secagg.messages import Signed, sign
from cosilo_common.secagg.roster import Roster
from tests.protocol.parties import Coordinator, Site, federation, make_start, make_terms, names, signing_key

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


class Killed(BaseException):
    """The process is gone. Not an Exception: nothing may catch it."""


def adverts_of(sites: dict[str, Site], attempt: int = 1) -> list[Signed]:
    return [site.role.advert(attempt) for site in sites.values()]


def shared(sites: dict[str, Site], attempt: int = 1) -> list[Signed]:
    adverts = adverts_of(sites, attempt)
    return [site.role.roster(adverts) for site in sites.values()]


def delivered(sites: dict[str, Site], attempt: int = 1) -> None:
    shares = shared(sites, attempt)
    for site in sites.values():
        assert site.role.deliver(shares) is None


def uploaded(sites: dict[str, Site], attempt: int = 1) -> None:
    delivered(sites, attempt)
    for site in sites.values():
        site.role.mask_chunks()


def roster_of(sites: dict[str, Site], attempt: int = 1) -> Roster:
    start = sites[A].start
    assert start is not None
    coordinator = Coordinator(sites[A].terms, start, sites)
    return Roster.open(coordinator.round_terms(attempt), adverts_of(sites, attempt))


def forged(site: str, message: Signed, **changes: object) -> Signed:
    """The same message with changed fields, under a colluding site's true key."""
    changed = replace(message, **changes)  # type: ignore[arg-type]  # a test's table of fields
    return sign(signing_key(site), changed.type, changed.run, changed.round, changed.attempt, changed.site, changed.body)
