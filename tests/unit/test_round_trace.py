"""The trace of a round: what is noted, how much of it may be, and the sums and lines that people read."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.secagg.messages import RoundKind
from cosilo_server.cli.perfetto import disjoint, trace_events
from cosilo_server.cli.shapes import SpanShape, TraceShape
from cosilo_server.cli.timeline import LINE_CHARS, SITES_SHOWN, busy_s, lines, overlap_s, phases_of
from cosilo_server.rounds.events import AdvertReceived, Declined, Event, Progressed, Tick
from cosilo_server.rounds.machine import begin, step
from cosilo_server.rounds.state import Activity, Deadlines, DeclineCode, Round, Terms
from cosilo_server.spans import Span
from cosilo_server.store import Store
from cosilo_server.trace import FETCH, SPANS_PER_LANE, UPLOAD, RoundTrace

RUN = bytes(32)
SITES = ("east", "north", "south")


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Any:
    opened = Store(tmp_path / "state.db", clock)
    yield opened
    opened.close()


@pytest.fixture
def trace(store: Store, clock: Clock) -> RoundTrace:
    return RoundTrace(store.spans, clock)


def begun(number: int = 1) -> Round:
    """A plain round of three sites, in training."""
    terms = Terms(SITES, False, 2, 0, 0, Deadlines(60, 60, 60, 60, 60, 60))
    state, _ = begin(
        run=RUN,
        number=number,
        kind=RoundKind.TRAIN,
        terms=terms,
        base_digest=bytes(32),
        base_bytes=100,
        encoding=b"",
        seed=bytes(32),
        connected=set(SITES),
        now=100.0,
        gone=[],
    )
    assert state.phase == "training"
    return state


def told(trace: RoundTrace, state: Round, event: Event, now: float) -> Round:
    after, _ = step(state, event, now)
    if after is not state:
        trace.moved(state, after, event, now)
    return after


def test_a_phase_is_traced_with_what_each_site_owed_in_it(trace: RoundTrace, store: Store, clock: Clock) -> None:
    state = begun()
    state = told(trace, state, Progressed("east", Activity.TRAINING, 1, 0), 101.0)
    state = told(trace, state, AdvertReceived("east", 1, b"a"), 103.0)
    state = told(trace, state, Declined("south", DeclineCode.DATA), 104.0)
    state = told(trace, state, AdvertReceived("north", 1, b"b"), 109.0)
    assert state.phase == "uploading"
    trace.flush(RUN, 1, over=False)
    assert store.spans.of(RUN, 1, 100) == [
        Span("east", "owed", "advert", 1, 100.0, 103.0),
        Span("east", "says", "training", 1, 101.0, 103.0),
        Span("south", "owed", "advert", 1, 100.0, 104.0, outcome="declined"),
        Span("north", "owed", "advert", 1, 100.0, 109.0),
        Span("", "phase", "training", 1, 100.0, 109.0),
    ]


def test_a_site_that_is_late_is_named(trace: RoundTrace) -> None:
    state = begun()
    for site in ("east", "north"):
        state = told(trace, state, AdvertReceived(site, 1, site.encode()), 101.0)
    state = told(trace, state, Tick(), 161.0)
    assert state.phase == "uploading"
    owed = {span.party: (span.ended_at, span.outcome) for span in trace.spans(RUN, 1) if span.lane == "owed"}
    assert owed == {"east": (101.0, ""), "north": (101.0, ""), "south": (161.0, "late")}


def test_transfers_are_told_while_they_go_on_and_once_when_they_have_ended(trace: RoundTrace, clock: Clock) -> None:
    fetch = trace.begin(begun(), "east", FETCH)
    fetch.bytes = 10
    assert trace.spans(RUN, 1) == [Span("east", "transfer", "fetch", 1, 100.0, 0.0, 10)]
    clock.s, fetch.bytes = 105.0, 70
    trace.end(fetch)
    trace.end(fetch, "cut")  # the first word stands
    whole = [Span("east", "transfer", "fetch", 1, 100.0, 105.0, 70)]
    assert trace.spans(RUN, 1) == whole
    trace.flush(RUN, 1, over=False)
    trace.flush(RUN, 1, over=True)
    assert trace.spans(RUN, 1) == whole


def test_what_goes_on_at_the_end_of_a_round_is_written_as_unfinished_and_nothing_follows(trace: RoundTrace, clock: Clock) -> None:
    upload = trace.begin(begun(), "east", UPLOAD)
    clock.s = 103.0
    trace.flush(RUN, 1, over=True)
    trace.end(upload, "cut")
    assert trace.spans(RUN, 1) == [Span("east", "transfer", "upload", 1, 100.0, 103.0, outcome="unfinished")]


def test_one_site_cannot_fill_the_database(trace: RoundTrace, store: Store, clock: Clock) -> None:
    state = begun()
    for turn in range(1000):
        clock.s = 100.0 + turn
        fetch = trace.begin(state, "east", FETCH)
        fetch.bytes = 3
        trace.end(fetch, "cut")
        if turn % 100 == 0:
            trace.flush(RUN, 1, over=False)  # as at each phase
    trace.flush(RUN, 1, over=True)
    found = store.spans.of(RUN, 1, 5000)
    assert len(found) == SPANS_PER_LANE + 1
    assert found[-1] == Span("east", "transfer", "further ones", 1, 132.0, 1099.0, 3 * 968, 968)
    assert sum(span.bytes for span in found) == 3000


# --- the sums ---


def shape(party: str | None, lane: str, what: str, began_s: float, ended_s: float, **more: Any) -> SpanShape:
    plain = {"attempt": 1, "running": False, "bytes": 0, "pieces": 1, "outcome": None}
    return {"party": party, "lane": lane, "what": what, "began_s": began_s, "seconds": ended_s - began_s, **plain, **more}  # type: ignore[typeddict-item]  # a test's values


def whole(spans: list[SpanShape], seconds: float) -> TraceShape:
    return {
        "run": RUN.hex(),
        "round": 7,
        "kind": "train",
        "phase": "closed",
        "reason": "",
        "started_unix_s": 1000.0,
        "seconds": seconds,
        "phases": phases_of(spans),
        "spans": spans,
        "left_out": 0,
    }


SLOW = [
    shape(None, "phase", "training", 0, 8),
    shape(None, "phase", "uploading", 8, 16),
    shape("east", "transfer", "fetch", 0, 1, bytes=10_200_000),
    shape("east", "says", "fetching", 0, 1),
    shape("east", "says", "training", 1, 4),
    shape("east", "owed", "advert", 0, 4),
    shape("north", "owed", "advert", 0, 8),
    shape("east", "transfer", "upload", 8, 10, bytes=5_000_000, outcome="cut"),
    shape("east", "transfer", "upload", 12, 16, bytes=5_000_000),
    shape("east", "owed", "upload", 8, 16),
    shape("north", "owed", "upload", 8, 9, outcome="declined"),
    shape(None, "opening", "sum and write", 16, 20),
]


def test_each_phase_names_whom_it_waited_for_alone() -> None:
    assert [(p["phase"], p["last_site"], p["alone_s"]) for p in phases_of(SLOW)] == [("training", "north", 4.0), ("uploading", "east", 7.0)]


def test_the_timeline_as_it_is_read() -> None:
    assert list(lines(whole(SLOW, 20.0), "digits-1")) == [
        "round 7 of digits-1: train, closed, 20.0 s",
        "",
        "PHASE               FROM         TOOK  WAITED LAST FOR",
        "training           0.0 s        8.0 s  north, 4.0 s alone",
        "uploading          8.0 s        8.0 s  east, 7.0 s alone",
        "",
        "                 0                             20.0 s",
        "coordinator",
        "  training      |###############                     |   8.0 s",
        "  uploading     |              ###############       |   8.0 s",
        "  sum and write |                            ########|   4.0 s",
        "east",
        "  fetch         |##                                  |   1.0 s 10.2 MB",
        "  training      | #######                            |   3.0 s",
        "  upload        |              ####   ########       |   6.0 s 10.0 MB x2 cut",
        "north",
        "  advert        |###############                     |   8.0 s",
        "  upload        |              ###                   |   1.0 s declined",
    ]


def test_the_timeline_is_bounded_whatever_a_site_is_called_and_however_many_there_are() -> None:
    spans = [shape(None, "phase", "training", 0, 90_000)]
    for n in range(40):
        name = f"{n:02d}-" + 60 * "x"
        spans += [shape(name, "owed", "advert", 0, n, outcome="declined"), shape(name, "transfer", "fetch", 0, n, bytes=10**12, pieces=99)]
    shown = list(lines({**whole(spans, 90_000.0), "reason": "r" * 300}, "n" * 100))
    assert max(map(len, shown)) == LINE_CHARS
    assert sum(line.startswith(("3", "2")) for line in shown) == SITES_SHOWN
    assert shown[-1] == "and 28 sites that it waited for less long; --json has them all"


def test_a_round_without_spans_says_so() -> None:
    assert list(lines(whole([], 1.0), "x"))[-1] == "its trace is forgotten, or it was not traced"


def test_a_span_that_goes_on_ends_in_an_arrow() -> None:
    running = shape("east", "transfer", "upload", 0, 10, running=True)
    assert list(lines(whole([running], 10.0), "x"))[-1] == "  upload        |" + 35 * "#" + ">|  10.0 s"


times = st.integers(0, 1000).map(lambda ms: ms / 1000)
some_spans = st.lists(st.tuples(times, times), max_size=12).map(
    lambda pairs: [shape("east", "transfer", "fetch", min(p), max(p)) for p in pairs]
)


@given(some_spans, some_spans)
def test_busy_and_overlap_count_each_moment_once(one: list[SpanShape], other: list[SpanShape]) -> None:
    def moments(spans: list[SpanShape]) -> set[int]:
        return {ms for s in spans for ms in range(round(1000 * s["began_s"]), round(1000 * (s["began_s"] + s["seconds"])))}

    assert busy_s(one) == pytest.approx(len(moments(one)) / 1000)
    assert overlap_s(one, other) == pytest.approx(len(moments(one) & moments(other)) / 1000, abs=1e-9)


@given(some_spans)
def test_perfetto_gets_every_span_once_and_none_that_cross_in_a_thread(spans: list[SpanShape]) -> None:
    events = [e for e in trace_events(whole(spans, 1.0), "digits-1")["traceEvents"] if e["ph"] == "X"]
    assert sorted((e["ts"], e["dur"]) for e in events) == sorted(
        (round(1e6 * s["began_s"]), e) for s, e in zip(spans, _durations(spans), strict=True)
    )
    by_thread: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        by_thread.setdefault(event["tid"], []).append(event)
    for thread in by_thread.values():
        ordered = sorted(thread, key=lambda e: (e["ts"], e["ts"] + e["dur"]))
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(ordered))
    assert sum(map(len, disjoint(spans))) == len(spans)


def _durations(spans: list[SpanShape]) -> list[int]:
    return [round(1e6 * (s["began_s"] + s["seconds"])) - round(1e6 * s["began_s"]) for s in spans]


def test_perfetto_names_parties_as_processes_and_lanes_as_threads() -> None:
    document = trace_events(whole(SLOW, 20.0), "digits-1")
    named = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M" and "name" in e["args"]}
    assert [named["process_name", pid, 0] for pid in (1, 2, 3)] == ["coordinator", "east", "north"]
    assert [named["thread_name", 2, tid] for tid in (1, 2, 3)] == ["transfer", "says", "owed"]
    assert document["otherData"]["round"] == 7
    cut = next(e for e in document["traceEvents"] if e["ph"] == "X" and e["args"]["outcome"] == "cut")
    assert (cut["name"], cut["ts"], cut["dur"], cut["args"]["bytes"]) == ("upload", 8_000_000, 2_000_000, 5_000_000)


def test_a_round_s_spans_are_told_up_to_a_number(store: Store, trace: RoundTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosilo_server.trace.SPANS_TOLD", 3)
    store.spans.add(RUN, 1, [Span("east", "owed", "advert", 1, 1.0, n + 2.0) for n in range(9)])
    assert [span.ended_at for span in trace.spans(RUN, 1)] == [2.0, 3.0, 4.0, 5.0]  # one more, so that the caller knows
    assert (store.spans.count(RUN, 1), store.spans.count(RUN, 2)) == (9, 0)


def test_a_full_disk_costs_the_trace_and_nothing_else(trace: RoundTrace, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    def full(*_: object) -> None:
        raise OperationalError("insert", None, Exception("database or disk is full"))

    monkeypatch.setattr(store.spans, "add", full)
    trace.end(trace.begin(begun(), "east", FETCH))
    trace.flush(RUN, 1, over=True)
    assert trace.spans(RUN, 1) == []


def test_a_round_that_is_over_is_not_opened_again(trace: RoundTrace) -> None:
    later = begun(2)
    trace.begin(later, "east", FETCH)
    late = trace.begin(replace(later, number=1), "north", FETCH)
    trace.end(late)
    assert trace.spans(RUN, 1) == []
    assert len(trace.spans(RUN, 2)) == 1
