"""R9: a site's moments stand in one sum, or in the same again. Real roles and journals, rounds one after another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cosilo_client.contributions import Contribution, check_invited, check_same_sum
from cosilo_client.journal import TrainedUpdate
from cosilo_client.ledger import RoundState
from cosilo_client.run_terms import RunTerms
from cosilo_client.secagg import Start
from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from tests.protocol.parties import BASE, RUN, Coordinator, Opened, Site, close_all, make_terms, names, refused

ALL = names(5)
FOUR = ALL[:4]
KEY = sha256(b"an extractor")
IMAGES = sha256(b"images").hex()
VALUES = 9
ENCODING = Encoding(32, len(ALL), 64, (Section(VALUES, 1.0),), 16.0, 0)


@pytest.fixture
def terms() -> RunTerms:
    return replace(make_terms(ALL, 12), moments=ENCODING, moments_key=KEY)


@pytest.fixture
def sites(tmp_path: Path, terms: RunTerms) -> dict[str, Site]:
    return {name: Site(tmp_path / name, name, terms) for name in ALL}


def moments_start(number: int, invited: Iterable[str] = ALL, base: bytes = BASE) -> Start:
    return Start(number, RoundKind.MOMENTS, tuple(invited), base, ENCODING, ENCODING.digest())


def measure(site: Site, start: Start, data: str = IMAGES) -> None:
    """What the trainer leaves of a moments round."""
    site.begin(start)
    values = np.linspace(-1, 1, VALUES, dtype=np.float32) / (1 + ALL.index(site.name))
    site.journal.files(RUN).update.write_bytes(values.tobytes())
    site.journal.trained(RUN, TrainedUpdate(start.round, 0, 10, (), data=data))


def opened(terms: RunTerms, start: Start, sites: dict[str, Site], drops: dict[str, str] | None = None) -> Opened:
    took_part = {name: sites[name] for name in start.invited}
    for site in took_part.values():
        measure(site, start)
    found = Coordinator(terms, start, took_part, drops or {}).run()
    close_all(took_part)
    return found


def broken(violation: ProtocolViolation) -> None:
    assert violation.rule == Rule.ONE_CONTRIBUTION
    assert f"cosilo-site permit {RUN.hex()[:12]} --base {KEY.hex()[:12]}" in str(violation)


def test_the_same_sum_of_the_same_sites_opens_again(terms: RunTerms, sites: dict[str, Site]) -> None:
    first = opened(terms, moments_start(1), sites, {ALL[4]: "upload"})
    again = opened(terms, moments_start(2, FOUR, sha256(b"a later model")), sites)
    assert first.survivors == again.survivors == FOUR
    assert first.tail.total_weight == 40
    assert np.array_equal(first.words, again.words)


def test_r9_nobody_uploads_into_a_sum_with_one_more_site(terms: RunTerms, sites: dict[str, Site]) -> None:
    """The difference of the two sums would be that site's moments."""
    opened(terms, moments_start(1), sites, {ALL[4]: "upload"})
    start = moments_start(2)
    for site in sites.values():
        measure(site, start)
    coordinator = Coordinator(terms, start, sites, dict.fromkeys(ALL, "upload"))
    with pytest.raises(Exception, match="phase-5"):
        coordinator.run()
    for name in FOUR:
        broken(refused(sites[name].role.mask_chunks))
        assert sites[name].journal.files(RUN).spool(1).exists() is False


def test_r9_a_round_without_one_of_the_earlier_sites_is_not_begun(terms: RunTerms, sites: dict[str, Site]) -> None:
    opened(terms, moments_start(1), sites)
    broken(refused(lambda: sites[ALL[0]].begin(moments_start(2, FOUR))))


def test_r9_no_consent_to_fewer_survivors_than_before(terms: RunTerms, sites: dict[str, Site]) -> None:
    opened(terms, moments_start(1), sites, {ALL[4]: "upload"})
    start = moments_start(2, FOUR)
    took_part = {name: sites[name] for name in FOUR}
    for site in took_part.values():
        measure(site, start)
    with pytest.raises(ProtocolViolation) as caught:
        Coordinator(terms, start, took_part, {FOUR[3]: "upload"}).run()
    broken(caught.value)


def test_r9_other_images_are_not_uploaded(terms: RunTerms, sites: dict[str, Site]) -> None:
    opened(terms, moments_start(1), sites)
    start = moments_start(2)
    for site in sites.values():
        measure(site, start, sha256(b"one image more").hex() if site.name == ALL[0] else IMAGES)
    with pytest.raises(ProtocolViolation, match="its images have changed since round 1") as caught:
        Coordinator(terms, start, sites).run()
    broken(caught.value)


def test_r9_an_upload_without_a_consent_is_the_last_until_a_person_permits_one(terms: RunTerms, sites: dict[str, Site]) -> None:
    """The others may have opened a sum that this site never heard of."""
    start = moments_start(1)
    for site in sites.values():
        measure(site, start)
    with pytest.raises(Exception, match="phase-5"):
        Coordinator(terms, start, sites, dict.fromkeys(ALL, "consent")).run()
    close_all(sites, RoundState.ABANDONED, "fewer than t consents")
    for site in sites.values():
        broken(refused(partial(site.begin, moments_start(2))))
        assert KEY in site.journal.ledger.base_models()  # so that `cosilo-site permit` finds it
        site.journal.ledger.permit_model(KEY, 2, permitted_at="2026-03-02T00:00:00Z")
    assert opened(terms, moments_start(3), sites).survivors == ALL


def test_moments_count_for_the_extractor_and_not_for_the_model(terms: RunTerms, sites: dict[str, Site]) -> None:
    opened(terms, moments_start(1), sites)
    ledger = sites[ALL[0]].journal.ledger
    assert ledger.model_uploads(BASE) == ()
    (upload,) = ledger.model_uploads(KEY)
    assert (upload.run, upload.round, upload.cohort.hex()) == (RUN, 1, IMAGES)


def test_a_restarted_site_remembers(terms: RunTerms, sites: dict[str, Site]) -> None:
    opened(terms, moments_start(1), sites)
    site = sites[ALL[0]]
    site.start = None
    site.restart()
    broken(refused(lambda: site.begin(moments_start(2, FOUR))))


def test_an_encoding_of_another_width_is_refused(terms: RunTerms, sites: dict[str, Site]) -> None:
    other = replace(ENCODING, sections=(Section(VALUES + 1, 1.0),))
    start = Start(1, RoundKind.MOMENTS, ALL, BASE, other, other.digest())
    assert refused(lambda: sites[ALL[0]].begin(start)).rule == Rule.START


def test_another_key_behind_a_name_is_another_site() -> None:
    """Across runs names may be reused: keys decide."""
    earlier = [Contribution(RUN, 1, {"anna": b"a", "beda": b"b"}, b"d")]
    check_invited(earlier, {"anna": b"a", "beda": b"b", "clara": b"c"}, "")
    check_same_sum(earlier, {"anna": b"a", "beda": b"b"}, b"d", "")
    assert refused(lambda: check_invited(earlier, {"anna": b"a", "beda": b"x"}, "")).rule == Rule.ONE_CONTRIBUTION
    assert refused(lambda: check_same_sum(earlier, {"anna": b"a", "beda": b"x"}, b"d", "")).rule == Rule.ONE_CONTRIBUTION
