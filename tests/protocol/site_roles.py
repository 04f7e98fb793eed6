"""Four sites at the protocol's level for the tests of a site's role. A fixture, imported by name where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.protocol.parties import (
    Site,
    federation,
    make_start,
    make_terms,
    names,
)

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


def masked_ready(sites: dict[str, Site], attempt: int = 1) -> None:
    adverts = [site.role.advert(attempt) for site in sites.values()]
    shares = [site.role.roster(adverts) for site in sites.values()]
    for site in sites.values():
        assert site.role.deliver(shares) is None
