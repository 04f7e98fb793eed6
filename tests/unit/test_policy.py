"""What a site's policy allows, as tables: one refusal a row, and the word for it."""

from __future__ import annotations

from datetime import time

import pytest

from cosilo_client.config import PolicyTable
from cosilo_client.owed import DeclineCode
from cosilo_client.policy import Spent, least_f, refuse_round, refuse_run, refuse_unasked
from cosilo_common.manifest import PLAIN_AGGREGATION, Manifest
from cosilo_common.secagg.messages import RoundKind
from tests.integration.memory_rounds import manifest_of

NOON = time(12, 0)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{i:02d}" for i in range(count))


def policy(**table: object) -> PolicyTable:
    return PolicyTable.model_validate(table)


def run_of(count: int = 4, **changes: object) -> Manifest:
    return manifest_of(names(count), **changes)


def test_r1_the_least_f_is_a_third_and_at_least_one() -> None:
    assert {n: least_f(policy(), n) for n in (3, 4, 6, 9, 10, 50, 100)} == {3: 1, 4: 1, 6: 2, 9: 3, 10: 3, 50: 16, 100: 33}
    assert least_f(policy(f_min=0), 50) == 0


@pytest.mark.parametrize(
    ("table", "count", "changes", "reason"),
    [
        ({}, 4, {"aggregation": PLAIN_AGGREGATION}, "allow_insecure_plain_sum"),
        ({"f_min": 0}, 4, {"aggregation": PLAIN_AGGREGATION}, "allow_insecure_plain_sum"),
        ({}, 6, {"f": 1}, "f_min"),
        ({"f_min": 2}, 4, {"f": 1}, "f_min"),
        ({"cohort_min": 5}, 4, {}, "cohort_min"),
        ({"cohort_min": 4}, 4, {"cohort": 3}, "cohort_min"),
    ],
)
def test_a_run_is_refused_for_what_it_is(table: dict[str, object], count: int, changes: dict[str, object], reason: str) -> None:
    refusal = refuse_run(policy(**table), run_of(count, **changes))
    assert refusal is not None
    assert refusal.code is DeclineCode.POLICY
    assert reason in refusal.reason


@pytest.mark.parametrize(
    ("table", "count", "changes"),
    [
        ({}, 4, {"f": 1}),
        ({}, 6, {"f": 2}),
        ({"f_min": 1}, 6, {"f": 1}),
        ({"allow_insecure_plain_sum": True}, 4, {"aggregation": PLAIN_AGGREGATION, "f": 0}),
        ({"allow_insecure_plain_sum": True, "cohort_min": 1}, 3, {"aggregation": PLAIN_AGGREGATION, "n_min": 1, "cohort": 1}),
    ],
)
def test_a_run_is_allowed_for_what_it_is(table: dict[str, object], count: int, changes: dict[str, object]) -> None:
    assert refuse_run(policy(**table), run_of(count, **changes)) is None


@pytest.mark.parametrize(
    ("table", "kind", "invited", "spent", "now", "reason"),
    [
        ({"cohort_min": 4}, RoundKind.TRAIN, 3, Spent(), NOON, "3 sites are invited"),
        ({"rounds_max": 2}, RoundKind.TRAIN, 4, Spent(2, 10), NOON, "2 rounds are trained"),
        ({"rounds_max": 0}, RoundKind.TRAIN, 4, Spent(), NOON, "0 rounds are trained"),
        ({}, RoundKind.STATISTICS, 4, Spent(statistics=100), NOON, "this site's most is 100"),
        ({"statistics_rounds_max": 0}, RoundKind.STATISTICS, 4, Spent(), NOON, "0 statistics rounds are measured"),
        ({"rounds_max": 3}, RoundKind.STATISTICS, 4, Spent(statistics=3), NOON, "this site's most is 3"),
        ({"hours_max": 1.5}, RoundKind.TRAIN, 4, Spent(1, 5400), NOON, "1.5 hours are trained"),
        ({"hours": ["19:00-07:00"]}, RoundKind.TRAIN, 4, Spent(), NOON, "it is 12:00"),
        ({"hours": ["19:00-07:00"]}, RoundKind.TRAIN, 4, Spent(), time(7, 0), "it is 07:00"),
        ({"hours": ["09:00-11:00", "13:00-17:00"]}, RoundKind.STATISTICS, 4, Spent(), NOON, "it is 12:00"),
    ],
)
def test_a_round_is_refused(table: dict[str, object], kind: RoundKind, invited: int, spent: Spent, now: time, reason: str) -> None:
    refusal = refuse_round(policy(**table), run_of(), kind, invited, spent, now)
    assert refusal is not None
    assert refusal.code is DeclineCode.POLICY
    assert reason in refusal.reason


@pytest.mark.parametrize(
    ("table", "kind", "spent", "now"),
    [
        ({}, RoundKind.TRAIN, Spent(99_999, 1e6), NOON),
        ({"rounds_max": 2}, RoundKind.TRAIN, Spent(1, 0), NOON),
        ({}, RoundKind.STATISTICS, Spent(statistics=99), NOON),
        ({"statistics_rounds_max": 0}, RoundKind.TRAIN, Spent(statistics=9), NOON),
        ({"rounds_max": 2, "hours_max": 0.1}, RoundKind.REHEARSAL, Spent(2, 1e6), NOON),
        ({"rounds_max": 2, "hours_max": 0.1}, RoundKind.STATISTICS, Spent(2, 1e6), NOON),
        ({"hours": ["19:00-07:00"]}, RoundKind.TRAIN, Spent(), time(19, 0)),
        ({"hours": ["19:00-07:00"]}, RoundKind.TRAIN, Spent(), time(0, 0)),
        ({"hours": ["19:00-07:00"]}, RoundKind.TRAIN, Spent(), time(6, 59)),
        ({"hours": ["19:00-24:00"]}, RoundKind.TRAIN, Spent(), time(23, 59)),
        ({"hours": ["09:00-11:00", "13:00-17:00"]}, RoundKind.TRAIN, Spent(), time(13, 0)),
    ],
)
def test_a_round_is_allowed(table: dict[str, object], kind: RoundKind, spent: Spent, now: time) -> None:
    assert refuse_round(policy(**table), run_of(), kind, 4, spent, now) is None


def test_nothing_is_accepted_unasked_by_default() -> None:
    run = run_of()
    refusal = refuse_unasked(policy(), run.digest(), run, run.participant_keys())
    assert refusal is not None
    assert refusal.code is DeclineCode.NOT_ACCEPTED
    assert f"cosilo-site accept {run.digest().hex()[:12]}" in refusal.reason


@pytest.mark.parametrize("by", ["name", "digest"])
def test_a_listed_run_is_accepted_unasked_where_every_key_is_pinned(by: str) -> None:
    run = run_of()
    listed = policy(runs=[run.name if by == "name" else run.digest().hex()])
    assert refuse_unasked(listed, run.digest(), run, run.participant_keys()) is None


@pytest.mark.parametrize("change", ["missing", "other"])
def test_a_listed_run_with_a_key_that_is_not_pinned_needs_a_person(change: str) -> None:
    run = run_of()
    pins = run.participant_keys()
    if change == "missing":
        del pins["site-02"]
    else:
        pins["site-02"] = bytes(32)
    refusal = refuse_unasked(policy(runs=[run.name]), run.digest(), run, pins)
    assert refusal is not None
    assert refusal.code is DeclineCode.NOT_ACCEPTED
    assert "site-02 are not pinned" in refusal.reason


def test_a_listed_run_that_the_policy_refuses_is_not_accepted() -> None:
    run = run_of(aggregation=PLAIN_AGGREGATION)
    refusal = refuse_unasked(policy(runs=[run.name]), run.digest(), run, run.participant_keys())
    assert refusal is not None
    assert refusal.code is DeclineCode.POLICY
