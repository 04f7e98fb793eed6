"""A run as it goes, told once: which lines to print for which snapshots, and when the watching is over.

Pure: no wire, no screen, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cosilo_server.cli.shapes import RoundShape, RunShape
from cosilo_server.cli.terminal import ExitCode, byte_words, number_words, second_words, short

TOLD_AT_START_MAX = 10  # a screenful of history; `cosilo round list` has the rest
ABANDONED_MAX = 5  # in a row: with the coordinator's backoff about a minute of trying, past which a person should look
CLOSED, ABANDONED = "closed", "abandoned"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run and its newest round, if it has had one."""

    run: RunShape
    round: RoundShape | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the watching ended. reason: empty for a good end."""

    code: ExitCode
    reason: str = ""


class RoundLog:
    """Which rounds have been told.

    fetch(): all rounds of the run, oldest first, asked for where snapshots skipped some. after: rounds up to this
    number are not told.
    """

    def __init__(self, fetch: Callable[[], Iterable[RoundShape]], after: int | None = None) -> None:
        self._fetch = fetch
        self._told = after

    def newly_ended(self, snapshot: Snapshot) -> Iterator[RoundShape]:
        """The rounds that ended since the last snapshot, oldest first, each once over the log's life; at first the
        last few."""
        current = snapshot.round
        if current is None:
            self._told = self._told or 0
            return
        ended = current["round"] if has_ended(current) else current["round"] - 1
        told = max(0, ended - TOLD_AT_START_MAX) if self._told is None else self._told
        if ended <= told:
            self._told = told
            return
        if ended == told + 1 and has_ended(current):
            yield current
        else:
            yield from (entry for entry in self._fetch() if told < entry["round"] <= ended)
        self._told = ended


class Patience:
    """Decides when `--until-idle` and `--wait` are over.

    abandoned_max: rounds abandoned in a row after which nobody should wait for a better end.
    """

    def __init__(self, abandoned_max: int = ABANDONED_MAX) -> None:
        self._abandoned_max = abandoned_max
        self._abandoned_in_a_row = 0
        self._last_ended: RoundShape | None = None

    def saw_end(self, entry: RoundShape) -> None:
        """A round ended."""
        self._abandoned_in_a_row = self._abandoned_in_a_row + 1 if entry["phase"] == ABANDONED else 0
        self._last_ended = entry

    def verdict(self, snapshot: Snapshot) -> Verdict | None:
        """The end, or None to go on watching."""
        run, current = snapshot.run, snapshot.round
        in_progress = current is not None and not has_ended(current)
        last = self._last_ended
        if self._abandoned_in_a_row >= self._abandoned_max and last is not None:
            counted, reason = self._abandoned_in_a_row, last["reason"] or "no reason given"
            return Verdict(ExitCode.FAILED, f"{counted} rounds in a row were abandoned, the last one: {reason}")
        if in_progress or run["state"] not in ("idle", "stopped", "paused"):
            return None
        if run["state"] == "stopped":
            return Verdict(ExitCode.FAILED, f"the run is stopped{': ' + run['note'] if run['note'] else ''}")
        if run["state"] == "paused":
            return Verdict(ExitCode.FAILED, f"the run is {run['note'] or 'paused'}")
        if run["rounds_closed"] < run["rounds_wanted"]:
            return Verdict(ExitCode.FAILED, f"{run['rounds_closed']} of {run['rounds_wanted']} rounds closed")
        if last is not None and last["phase"] == ABANDONED:
            return Verdict(ExitCode.FAILED, f"round {last['round']} was abandoned: {last['reason']}")
        return Verdict(ExitCode.DONE)


def has_ended(entry: RoundShape) -> bool:
    """Closed or abandoned."""
    return entry["phase"] in (CLOSED, ABANDONED)


def ended_line(entry: RoundShape) -> str:
    """One line for a round that ended."""
    title = f"round {entry['round']}" if entry["kind"] == "train" else f"round {entry['round']} ({entry['kind']})"
    if entry["phase"] == ABANDONED:
        return f"{title} abandoned after {second_words(entry['seconds'])}: {entry['reason'] or 'no reason given'}"
    parts = [f"{len(entry['survivors'])} of {len(entry['invited'])} sites", second_words(entry["seconds"])]
    losses = entry["losses"]
    if losses is not None:
        if losses["heldout"] is not None:
            parts.append(f"held-out loss before {number_words(losses['heldout'])}")
        if entry["kind"] == "train" and losses["train"] is not None:
            parts.append(f"training loss {number_words(losses['train'])}")
    parts.append(f"{byte_words(entry['bytes_down'])} down")
    parts.append(f"{byte_words(entry['bytes_up'])} up")
    if entry["kind"] == "train" and entry["checkpoint"]:
        parts.append(f"checkpoint {short(entry['checkpoint'])}")
    if entry["note"]:
        parts.append(entry["note"])
    return f"{title} closed: {', '.join(parts)}"


def phase_line(entry: RoundShape) -> str:
    """Where a round in progress stands, for a log."""
    title = f"round {entry['round']}" if entry["kind"] == "train" else f"round {entry['round']} ({entry['kind']})"
    sites = f", {len(entry['invited'])} sites invited" if entry["invited"] else ""
    attempt = f", attempt {entry['attempt']}" if entry["attempt"] > 1 else ""
    return f"{title}: {entry['phase']}{attempt}{sites}"


def run_line(run: RunShape) -> str:
    """Where a run stands."""
    mode = "" if run["aggregation"].startswith("cosilo-secagg/") else f", {run['aggregation']}"
    note = run["note"].removeprefix(f"{run['state']}: ")
    counted = f"{run['rounds_closed']} of {run['rounds_wanted']} rounds closed"
    return f"{run['name']} {short(run['run'])}: {run['state']}, {counted}{mode}{', ' + note if note else ''}"
