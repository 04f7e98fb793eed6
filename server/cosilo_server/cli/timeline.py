"""A round's trace as a timeline that people read: which phase took how long, whom it waited for, and what each site did when.

Owns the sums over spans and the lines, 80 columns of plain characters. Must not know where spans come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from cosilo_common.errors import one_line
from cosilo_server.cli.shapes import PhaseShape, SpanShape, TraceShape, kind_word, phase_word, span_shape
from cosilo_server.cli.terminal import byte_words, second_words

if TYPE_CHECKING:
    from cosilo_server.cli.connection import Coordinator

LINE_CHARS: Final = 80
BAR_CHARS: Final = 36
SITES_SHOWN: Final = 12  # three screens; those that the round waited for longest, and --json has the rest
_LABEL_CHARS: Final = 14
_OWED_IN: Final = {"training": "advert", "sharing": "shares", "uploading": "upload", "consenting": "consent", "revealing": "reveal"}
_SHOWN_LANES: Final = (
    "phase",
    "opening",
    "transfer",
    "says",
)  # in this order; what is owed is told by the phases' table, unless a site did nothing else
_TOLD_BY_TRANSFERS: Final = {
    "fetching": "fetch",
    "uploading": "upload",
}  # what the coordinator measured itself is not told by the site's word too


def fetch_trace(coordinator: Coordinator, run: bytes, number: int) -> TraceShape:
    """A round's trace, over the wire."""
    from cosilo_common.rpc.v1 import admin_pb2

    answer = coordinator.ask("trace round", coordinator.admin.GetRoundTrace, admin_pb2.GetRoundTraceRequest(run=run, round=number))
    summary = answer.summary
    spans = [span_shape(span, summary.started_unix_s, answer.now_unix_s) for span in answer.spans]
    spans.sort(key=lambda span: span["began_s"])
    return {
        "run": run.hex(),
        "round": summary.round,
        "kind": kind_word(summary.kind),
        "phase": phase_word(summary.phase),
        "reason": summary.reason,
        "started_unix_s": summary.started_unix_s,
        "seconds": summary.seconds,
        "phases": phases_of(spans),
        "spans": spans,
        "left_out": answer.left_out,
    }


def phases_of(spans: Sequence[SpanShape]) -> list[PhaseShape]:
    """The phases in their order, each with the site whose word came last, and for how long it was the only one that was waited for."""
    found: list[PhaseShape] = []
    for phase in (span for span in spans if span["lane"] == "phase"):
        owed = [s for s in spans if s["lane"] == "owed" and s["attempt"] == phase["attempt"] and s["what"] == _OWED_IN.get(phase["what"])]
        by_end = sorted(owed, key=_end)
        alone_s = _end(by_end[-1]) - (_end(by_end[-2]) if len(by_end) > 1 else phase["began_s"]) if by_end else None
        found.append(
            {
                "phase": phase["what"],
                "attempt": phase["attempt"],
                "began_s": phase["began_s"],
                "seconds": phase["seconds"],
                "last_site": by_end[-1]["party"] if by_end else None,
                "alone_s": alone_s,
            }
        )
    return found


def busy_s(spans: Iterable[SpanShape]) -> float:
    """For how many seconds at least one of the spans went on."""
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda s: s["began_s"]):
        total += max(0.0, _end(span) - max(until, span["began_s"]))
        until = max(until, _end(span))
    return total


def overlap_s(one: Sequence[SpanShape], other: Sequence[SpanShape]) -> float:
    """For how many seconds both went on at once."""
    return max(0.0, busy_s(one) + busy_s(other) - busy_s([*one, *other]))


def lines(trace: TraceShape, run_name: str) -> Iterator[str]:
    """The timeline, line by line."""
    spans, whole_s = trace["spans"], max([trace["seconds"], *map(_end, trace["spans"])])
    yield _cut(f"round {trace['round']} of {run_name}: {trace['kind']}, {trace['phase']}, {second_words(trace['seconds'])}")
    if trace["reason"]:
        yield _cut(f"reason: {trace['reason']}")
    if not spans:
        yield "its trace is forgotten, or it was not traced"
        return
    yield ""
    yield from _phase_table(trace["phases"], {(s["party"], s["what"], s["attempt"]): s for s in spans if s["lane"] == "owed"})
    yield ""
    end = second_words(whole_s)
    yield " " * (_LABEL_CHARS + 3) + "0" + end.rjust(BAR_CHARS - 1)
    shown, left_out = _parties(spans)
    for party in shown:
        yield _cut(party or "coordinator")
        of_party = [s for s in spans if s["party"] == party]
        for label, row in list(_rows(of_party, _SHOWN_LANES)) or _rows(of_party, ("owed",)):
            yield _row(label, row, whole_s)
    if left_out:
        yield f"and {left_out} sites that it waited for less long; --json has them all"
    if trace["left_out"]:
        yield f"and {trace['left_out']} spans more than the coordinator tells"


def _phase_table(phases: Sequence[PhaseShape], owed: dict[tuple[str | None, str, int], SpanShape]) -> Iterator[str]:
    yield f"{'PHASE':<12}{'FROM':>12}{'TOOK':>13}  WAITED LAST FOR"
    for phase in phases:
        last, waited = phase["last_site"], ""
        if last is not None and phase["alone_s"] is not None:
            span = owed[(last, _OWED_IN[phase["phase"]], phase["attempt"])]
            why = f" ({span['outcome']})" if span["outcome"] else ""
            waited = f"{last}{why}, {second_words(phase['alone_s'])} alone"
        name = phase["phase"] + (f" {phase['attempt']}" if phase["attempt"] > 1 else "")
        yield _cut(f"{name:<12}{second_words(phase['began_s']):>12}{second_words(phase['seconds']):>13}  {waited or '-'}")


def _parties(spans: Sequence[SpanShape]) -> tuple[list[str | None], int]:
    """The coordinator, then the sites that kept the round waiting longest; and how many others there are."""
    owed: dict[str, float] = {}
    for span in spans:
        if span["party"] is not None:
            owed[span["party"]] = owed.get(span["party"], 0.0) + (span["seconds"] if span["lane"] == "owed" else 0.0)
    sites = sorted(owed, key=lambda name: (-owed[name], name))
    return [None, *sites[:SITES_SHOWN]], max(0, len(sites) - SITES_SHOWN)


def _rows(spans: Sequence[SpanShape], lanes: Sequence[str]) -> Iterator[tuple[str, list[SpanShape]]]:
    """A party's spans by what they are, in the order of their beginning."""
    moved = {span["what"] for span in spans if span["lane"] == "transfer"}
    rows: dict[tuple[int, str], list[SpanShape]] = {}
    for span in spans:
        if span["lane"] in lanes and _TOLD_BY_TRANSFERS.get(span["what"]) not in moved:
            place = lanes.index(span["lane"]) if span["party"] is None else 0
            rows.setdefault((place, span["what"]), []).append(span)
    for (_, label), row in sorted(rows.items(), key=lambda item: (item[0][0], item[1][0]["began_s"])):
        yield label, row


def _row(label: str, spans: Sequence[SpanShape], whole_s: float) -> str:
    bar = [" "] * BAR_CHARS
    for span in spans:
        first = min(int(BAR_CHARS * span["began_s"] / whole_s), BAR_CHARS - 1) if whole_s else 0
        after = min(int(BAR_CHARS * _end(span) / whole_s + 0.999), BAR_CHARS) if whole_s else 1
        for place in range(first, max(after, first + 1)):
            bar[place] = "#"
        if span["running"]:
            bar[max(after, first + 1) - 1] = ">"
    count, moved = sum(span["pieces"] for span in spans), sum(span["bytes"] for span in spans)
    words = [second_words(busy_s(spans)).rjust(8)]
    words += [byte_words(moved)] if moved else []
    words += [f"x{count}"] if count > 1 else []
    words += sorted({span["outcome"] for span in spans if span["outcome"]})
    return _cut(f"  {label:<{_LABEL_CHARS}.{_LABEL_CHARS}}|{''.join(bar)}|{' '.join(words)}")


def _end(span: SpanShape) -> float:
    return span["began_s"] + span["seconds"]


def _cut(line: str) -> str:
    line = one_line(line)
    return line if len(line) <= LINE_CHARS else line[: LINE_CHARS - 3] + "..."
