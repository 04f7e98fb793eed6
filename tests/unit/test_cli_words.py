"""The terminal voice: columns, numbers, and which stream gets what."""

from __future__ import annotations

import json

import pytest

from cosilo_common.errors import CosiloError
from cosilo_server.cli.terminal import (
    CoordinatorUnreachable,
    ExitCode,
    byte_words,
    columns,
    explain,
    fields,
    number_words,
    say_json,
    second_words,
    short,
    time_words,
)


def test_columns_line_up_and_an_empty_cell_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    columns(("NAME", "NOTE"), [("st-anna", ""), ("b", "two words")])
    assert capsys.readouterr().out == "NAME     NOTE\nst-anna  -\nb        two words\n"


def test_a_list_of_nothing_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    columns(("NAME", "NOTE"), [])
    assert capsys.readouterr().out == "NAME  NOTE\n"


def test_fields_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    fields([("run", "1a2b"), ("digest", "")])
    assert capsys.readouterr().out == "run     1a2b\ndigest  -\n"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_560_000, "2.6 MB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (4_400_000_000, "4.4 GB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert byte_words(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"),
        (-1.0, "0.0 s"),
        (8.24, "8.2 s"),
        (59.96, "1 min 0 s"),
        (252.0, "4 min 12 s"),
        (11_100.0, "3 h 5 min"),
        (1_051_200.0, "12 d 4 h"),
    ],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert second_words(seconds) == words


def test_moments_are_utc_and_zero_is_never() -> None:
    assert time_words(1_772_366_400) == "2026-03-01 12:00:00Z"
    assert time_words(0) == ""


@pytest.mark.parametrize(("value", "words"), [(0.98765, "0.9877"), (12345.0, "1.234e+04"), (0.0, "0"), (None, ""), (float("nan"), "")])
def test_numbers_in_words(value: float | None, words: str) -> None:
    assert number_words(value) == words


def test_a_short_digest_is_its_first_twelve_digits() -> None:
    assert short(bytes(range(32))) == "000102030405"
    assert short("") == ""


def test_an_error_goes_to_stderr_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(CosiloError("enrol", "site st-anna: expired", "renew it")) is ExitCode.FAILED
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: enrol: site st-anna: expired\nhint: renew it\n")


def test_an_error_without_a_hint_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    explain(CosiloError("", "st-anna is not approved"))
    assert capsys.readouterr().err == "error: st-anna is not approved\n"


def test_an_unreachable_coordinator_has_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(CoordinatorUnreachable("reach coordinator", "h:1: refused")) is ExitCode.UNREACHABLE
    assert capsys.readouterr().err == "error: reach coordinator: h:1: refused\n"


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"runs": [], "name": "Sankt Änne"})
    assert json.loads(capsys.readouterr().out) == {"runs": [], "name": "Sankt Änne"}
