"""A round's trace as Chrome trace events, which https://ui.perfetto.dev opens: a process for each party, threads for its lanes.

The format: "Trace Event Format" (Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). Complete events (`X`) of one
thread must nest; spans of one lane that overlap otherwise therefore go to threads of their own. Must not know where spans come from.
"""

from __future__ import annotations

from typing import Any, Final

from cosilo_server.cli.shapes import SpanShape, TraceShape

_LANE_ORDER: Final = ("phase", "opening", "transfer", "says", "owed")
_US_PER_S: Final = 1e6


def trace_events(trace: TraceShape, run_name: str) -> dict[str, Any]:
    """One JSON object. Times are microseconds since the round's start."""
    parties = sorted({span["party"] or "" for span in trace["spans"]})
    events: list[dict[str, Any]] = []
    for pid, party in enumerate(parties, start=1):
        of_party = [span for span in trace["spans"] if (span["party"] or "") == party]
        events.append(_name("process_name", party or "coordinator", pid, 0))
        tid = 0
        for lane in sorted({span["lane"] for span in of_party}, key=_lane_place):
            for spans in disjoint([span for span in of_party if span["lane"] == lane]):
                tid += 1
                events.append(_name("thread_name", lane, pid, tid))
                events.append({"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
                events += [_event(span, pid, tid) for span in spans]
    told = {"run": trace["run"], "name": run_name, "round": trace["round"], "kind": trace["kind"], "phase": trace["phase"]}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**told, "started_unix_s": trace["started_unix_s"]}}


def disjoint(spans: list[SpanShape]) -> list[list[SpanShape]]:
    """The same spans in as few lists as will do, none of which has two at once."""
    tracks: list[list[SpanShape]] = []
    for span in sorted(spans, key=lambda s: s["began_s"]):
        free = next((track for track in tracks if _ticks(track[-1]["began_s"] + track[-1]["seconds"]) <= _ticks(span["began_s"])), None)
        if free is None:
            tracks.append([span])
        else:
            free.append(span)
    return tracks


def _event(span: SpanShape, pid: int, tid: int) -> dict[str, Any]:
    began, ended = _ticks(span["began_s"]), _ticks(span["began_s"] + span["seconds"])
    told = {
        "attempt": span["attempt"],
        "bytes": span["bytes"],
        "pieces": span["pieces"],
        "outcome": span["outcome"] or "",
        "running": span["running"],
    }
    return {"name": span["what"], "cat": span["lane"], "ph": "X", "ts": began, "dur": ended - began, "pid": pid, "tid": tid, "args": told}


def _name(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _ticks(seconds: float) -> int:
    return round(seconds * _US_PER_S)


def _lane_place(lane: str) -> tuple[int, str]:
    return (_LANE_ORDER.index(lane) if lane in _LANE_ORDER else len(_LANE_ORDER), lane)
