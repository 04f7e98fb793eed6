"""Which run a person means: a whole name or the beginning of a digest, and never a guess between two."""

from __future__ import annotations

import pytest

from cosilo_common.errors import CosiloError
from cosilo_common.rpc.v1.admin_pb2 import RunSummary
from cosilo_server.cli.run_names import choose_run

FIRST = RunSummary(run=bytes.fromhex("abcd01" + "00" * 29), name="digits")
SECOND = RunSummary(run=bytes.fromhex("abcd02" + "00" * 29), name="chest x-ray")
THIRD = RunSummary(run=bytes.fromhex("beef00" + "00" * 29), name="digits")
NAMED_LIKE_A_DIGEST = RunSummary(run=bytes.fromhex("1234" + "00" * 30), name="abcd01")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("chest x-ray", SECOND), ("abcd02", SECOND), ("ABCD02", SECOND), ("beef", THIRD), (FIRST.run.hex(), FIRST)],
)
def test_a_name_or_a_prefix_finds_its_run(wanted: str, found: RunSummary) -> None:
    assert choose_run([FIRST, SECOND, THIRD], wanted) == found


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("digits", "name one by its digest: abcd01000000, beef00000000"),
        ("abcd", "name one by its digest: abcd01000000, abcd02000000"),
    ],
)
def test_two_candidates_are_refused_by_digest(wanted: str, hint: str) -> None:
    with pytest.raises(CosiloError, match="may be 2 runs") as caught:
        choose_run([FIRST, SECOND, THIRD], wanted)
    assert caught.value.hint == hint


def test_a_name_that_looks_like_another_runs_digest_is_refused() -> None:
    with pytest.raises(CosiloError, match="may be 2 runs"):
        choose_run([FIRST, NAMED_LIKE_A_DIGEST], "abcd01")
    assert choose_run([FIRST, NAMED_LIKE_A_DIGEST], FIRST.run.hex()) == FIRST


@pytest.mark.parametrize("wanted", ["abc", "nothing", ""])
def test_an_unknown_run_lists_the_newest(wanted: str) -> None:
    with pytest.raises(CosiloError, match=f"no run is called {wanted!r}") as caught:
        choose_run([FIRST, SECOND], wanted)
    assert caught.value.hint == "there are digits (abcd01000000), chest x-ray (abcd02000000)"


def test_a_federation_without_runs_says_how_to_make_one() -> None:
    with pytest.raises(CosiloError) as caught:
        choose_run([], "digits")
    assert caught.value.hint == "run cosilo run create FILE"
