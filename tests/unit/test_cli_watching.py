"""What `run watch` tells: each round once, the right end, and no more lines than happened."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cosilo_server.cli.shapes import LossShape, ProgressShape, RoundShape, RunShape
from cosilo_server.cli.terminal import ExitCode
from cosilo_server.cli.watch_view import LiveView, PlainView, activity_words, curve, picture
from cosilo_server.cli.watching import Patience, RoundLog, Snapshot, Verdict, ended_line, phase_line, run_line

LOSSES: LossShape = {
    "heldout": 0.41234,
    "heldout_by_bucket": [0.6, 0.2],
    "train": 0.39,
    "clip_ratio": 0.0,
    "total_weight": 1600,
    "update_norm": 1.25,
}


def run(state: str = "running", closed: int = 0, wanted: int = 3, note: str = "", aggregation: str = "cosilo-secagg/1") -> RunShape:
    return {
        "run": "1a2b3c4d5e6f" + 52 * "0",
        "name": "digits-1",
        "state": state,
        "rounds_closed": closed,
        "rounds_wanted": wanted,
        "aggregation": aggregation,
        "checkpoint": None,
        "parameters": 640_000,
        "participants": ["a", "b", "c", "d"],
        "note": note,
    }


def round_(
    number: int, phase: str = "closed", kind: str = "train", reason: str = "", note: str = "", losses: LossShape | None = None
) -> RoundShape:
    return {
        "round": number,
        "kind": kind,
        "phase": phase,
        "reason": reason,
        "note": note,
        "started_unix_s": 1_772_366_400.0,
        "seconds": 8.2,
        "attempt": 1,
        "invited": ["a", "b", "c", "d"],
        "survivors": ["a", "b", "c"],
        "bytes_down": 10_200_000,
        "bytes_up": 9_800_000,
        "base": "ab" * 32,
        "checkpoint": "cd" * 32,
        "losses": losses,
        "sites": [],
    }


def site(**changes: object) -> ProgressShape:
    plain: ProgressShape = {
        "site": "a",
        "connected": True,
        "activity": "training",
        "tenths": 4,
        "bytes": 0,
        "delivered": False,
        "declined": None,
        "late": False,
    }
    return {**plain, **changes}  # type: ignore[typeddict-item]  # the test names real keys


# --- each round once ---


def told(log: RoundLog, *snapshots: Snapshot) -> list[int]:
    return [entry["round"] for snapshot in snapshots for entry in log.newly_ended(snapshot)]


def nothing() -> list[RoundShape]:
    raise AssertionError("the list of rounds was fetched without need")


def test_rounds_seen_as_they_end_need_no_list() -> None:
    log = RoundLog(nothing)
    assert told(log, Snapshot(run(), None), Snapshot(run(), round_(1, "training"))) == []
    assert told(log, Snapshot(run(), round_(1)), Snapshot(run(), round_(1))) == [1]
    assert told(log, Snapshot(run(), round_(2, "gathering")), Snapshot(run(), round_(2, "abandoned"))) == [2]


def test_rounds_that_snapshots_skipped_are_fetched() -> None:
    log = RoundLog(lambda: [round_(1), round_(2), round_(3), round_(4, "training")])
    assert told(log, Snapshot(run(), round_(1))) == [1]
    assert told(log, Snapshot(run(), round_(4, "training"))) == [2, 3]
    assert told(log, Snapshot(run(), round_(4, "uploading"))) == []


def test_a_long_history_begins_with_the_last_ten() -> None:
    log = RoundLog(lambda: [round_(number) for number in range(1, 51)])
    assert told(log, Snapshot(run(), round_(50))) == list(range(41, 51))


def test_rounds_before_the_ones_asked_for_are_not_told() -> None:
    log = RoundLog(nothing, after=7)
    assert told(log, Snapshot(run(), round_(7)), Snapshot(run(), round_(8, "training")), Snapshot(run(), round_(8))) == [8]


# --- when it is over ---


def test_it_goes_on_while_rounds_are_owed() -> None:
    patience = Patience()
    assert patience.verdict(Snapshot(run("running", 1), round_(2, "training"))) is None
    assert patience.verdict(Snapshot(run("waiting", 1), round_(1))) is None


def test_it_is_done_when_the_rounds_asked_for_are_closed() -> None:
    assert Patience().verdict(Snapshot(run("idle", 3), round_(3))) == Verdict(ExitCode.DONE)


def test_a_run_that_was_asked_for_nothing_is_done() -> None:
    assert Patience().verdict(Snapshot(run("idle", 0, 0), None)) == Verdict(ExitCode.DONE)


def test_a_stopped_run_fails_once_its_round_has_ended() -> None:
    patience = Patience()
    stopped = run("stopped", 1, 1, note="stopped by an admin")
    assert patience.verdict(Snapshot(stopped, round_(2, "training"))) is None
    assert patience.verdict(Snapshot(stopped, round_(2))) == Verdict(ExitCode.FAILED, "the run is stopped: stopped by an admin")


def test_a_paused_run_fails_once_its_round_has_ended() -> None:
    patience = Patience()
    paused = run("paused", 1, note="paused by ada: the scanner moves")
    assert patience.verdict(Snapshot(paused, round_(2, "training"))) is None
    assert patience.verdict(Snapshot(paused, round_(2))) == Verdict(ExitCode.FAILED, "the run is paused by ada: the scanner moves")


def test_idle_with_rounds_missing_fails() -> None:
    assert Patience().verdict(Snapshot(run("idle", 2), round_(2))) == Verdict(ExitCode.FAILED, "2 of 3 rounds closed")


def test_an_abandoned_rehearsal_at_the_end_fails() -> None:
    patience = Patience()
    patience.saw_end(round_(4, "abandoned", "rehearsal", "one site"))
    assert patience.verdict(Snapshot(run("idle", 3), round_(4, "abandoned", "rehearsal"))) == Verdict(
        ExitCode.FAILED, "round 4 was abandoned: one site"
    )


def test_an_abandoned_round_that_is_made_good_is_forgotten() -> None:
    patience = Patience()
    patience.saw_end(round_(1, "abandoned", reason="quorum"))
    patience.saw_end(round_(2))
    assert patience.verdict(Snapshot(run("idle", 3), round_(2))) == Verdict(ExitCode.DONE)


def test_five_abandoned_rounds_in_a_row_are_enough() -> None:
    patience = Patience()
    waiting = Snapshot(run("waiting", 0), round_(5, "abandoned"))
    for number in range(1, 5):
        patience.saw_end(round_(number, "abandoned", reason="quorum"))
    assert patience.verdict(waiting) is None
    patience.saw_end(round_(5, "abandoned", reason="quorum"))
    assert patience.verdict(waiting) == Verdict(ExitCode.FAILED, "5 rounds in a row were abandoned, the last one: quorum")


# --- lines ---


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            round_(3, losses=LOSSES),
            "round 3 closed: 3 of 4 sites, 8.2 s, held-out loss before 0.4123, training loss 0.39, 10.2 MB down, 9.8 MB up, checkpoint cdcdcdcdcdcd",
        ),
        (round_(3), "round 3 closed: 3 of 4 sites, 8.2 s, 10.2 MB down, 9.8 MB up, checkpoint cdcdcdcdcdcd"),
        (
            round_(4, kind="rehearsal", note="the sum was exactly zero"),
            "round 4 (rehearsal) closed: 3 of 4 sites, 8.2 s, 10.2 MB down, 9.8 MB up, the sum was exactly zero",
        ),
        (round_(5, "abandoned", reason="2 of 3 sites"), "round 5 abandoned after 8.2 s: 2 of 3 sites"),
        (round_(5, "abandoned"), "round 5 abandoned after 8.2 s: no reason given"),
    ],
)
def test_a_round_that_ended_is_one_line(entry: RoundShape, line: str) -> None:
    assert ended_line(entry) == line


def test_a_phase_is_one_line() -> None:
    assert phase_line(round_(2, "training")) == "round 2: training, 4 sites invited"
    assert phase_line({**round_(2, "sharing", "rehearsal"), "attempt": 3, "invited": []}) == "round 2 (rehearsal): sharing, attempt 3"


def test_a_run_in_plain_sum_says_so_wherever_it_is_named() -> None:
    assert run_line(run("idle", 3)) == "digits-1 1a2b3c4d5e6f: idle, 3 of 3 rounds closed"
    assert (
        run_line(run("waiting", note="waiting: 2 of 3 sites are connected", aggregation="insecure-plain-sum"))
        == "digits-1 1a2b3c4d5e6f: waiting, 0 of 3 rounds closed, insecure-plain-sum, 2 of 3 sites are connected"
    )


def test_the_plain_view_prints_changes_only(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView() as view:
        for phase in ("training", "training", "uploading"):
            view.show(Snapshot(run(), round_(1, phase)))
        view.tell("round 1 closed")
        view.show(Snapshot(run("idle", 3), round_(1)))
    assert capsys.readouterr().out.splitlines() == [
        "round 1: training, 4 sites invited",
        "round 1: uploading, 4 sites invited",
        "round 1 closed",
        "digits-1 1a2b3c4d5e6f: idle, 3 of 3 rounds closed",
    ]


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (site(), "training 40 %"),
        (site(activity="waiting", tenths=10), "waiting"),
        (site(delivered=True), "delivered"),
        (site(connected=False), "not connected"),
        (site(late=True), "left out: no progress"),
        (site(declined="policy", connected=False), "declined: policy"),
    ],
)
def test_a_site_in_words(progress: ProgressShape, words: str) -> None:
    assert activity_words(progress) == words


def test_the_curve_goes_from_full_to_thin() -> None:
    assert curve([8.0, 5.0, 1.0]) == "█▅▁"
    assert curve([1.0, 1.0]) == "▁▁"
    assert len(curve([float(n) for n in range(100)])) == 40


def test_the_picture_has_a_bar_for_each_site() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    current = {**round_(2, "training"), "sites": [site(), site(site="b", activity="uploading", tenths=5, bytes=1_300_000)]}
    console.print(picture(Snapshot(run(), current), [0.9, 0.4]))  # type: ignore[arg-type]  # a dict of the same shape
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # StringIO
    assert lines[:3] == [
        "digits-1 1a2b3c4d5e6f: running, 0 of 3 rounds closed",
        "held-out loss █▁ 0.9 to 0.4",
        "round 2: training, 4 sites invited, 8.2 s",
    ]
    assert [" ".join(line.replace("━", " ").replace("╸", " ").replace("╺", " ").split()) for line in lines[3:]] == [
        "a training 40 %",
        "b uploading 50 % 1.3 MB",
    ]


def test_the_live_view_keeps_lines_above_the_picture() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=80, force_terminal=True)) as view:
        view.show(Snapshot(run(), round_(1, "training")))
        view.tell("round 1 closed", round_(1, losses=LOSSES))
        view.show(Snapshot(run(), round_(2, "training")))
    said = out.getvalue()
    assert "round 1 closed" in said
    assert "held-out loss" in said
