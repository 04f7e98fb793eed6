"""What the page says, as plain values: the federation, its runs with their newest rounds, a run's history and its grids.

Owns the choice of what is shown to whoever can reach the page, which is less than `cosilo status` tells an admin: no addresses, no software, no
digests of weights. Losses are means over a round's sum; where a sum had one contributor, its loss would be that site's own, and is left out. Must
not know HTTP. Every method may block on the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypedDict

from cosilo_common.errors import CosiloError, printable
from cosilo_common.manifest import SECURE_AGGREGATION
from cosilo_common.transfer import is_digest
from cosilo_server.artifacts import Artifacts
from cosilo_server.cli.shapes import ProgressShape, RoundShape, RunShape, round_shape, status_shape
from cosilo_server.rounds.state import Phase
from cosilo_server.services.summaries import Summaries
from cosilo_server.store import Store

RUNS_MAX: Final = 20  # more than one screen; `cosilo run list` has the rest
HISTORY_ROUNDS_MAX: Final = 500  # what a curve of a screen's width can still show
GRIDS_MAX: Final = 60  # pictures on one page
CONTRIBUTORS_MIN: Final = 2  # of a mean that is shown
_ENDED: Final = (Phase.CLOSED.value, Phase.ABANDONED.value)
_SHARING: Final = (Phase.SHARING, Phase.CONSENTING, Phase.REVEALING)  # phases that only a masked round passes


class SiteLine(TypedDict):
    """One member site."""

    site: str
    connected: bool
    last_seen_unix_s: float | None
    certificate_expires_unix_s: int | None


class RoundLine(TypedDict):
    """One round. seconds: null while it goes, for whoever shows it counts them; failed_in: the phase in which it was abandoned, of the newest."""

    round: int
    kind: str
    phase: str
    failed_in: str | None
    reason: str
    note: str
    started_unix_s: float
    seconds: float | None
    attempt: int
    invited: int
    survivors: int
    bytes_down: int
    bytes_up: int
    heldout: float | None
    train: float | None
    sites: list[ProgressShape]


class RunLine(TypedDict):
    """One run. phases: those that its rounds pass, in order; grids: how many were drawn."""

    run: str
    name: str
    state: str
    note: str
    rounds_closed: int
    rounds_wanted: int
    masked: bool
    aggregation: str
    parameters: int
    participants: list[str]
    phases: list[str]
    grids: int
    current: RoundLine | None


class Standing(TypedDict):
    """The federation as it stands. runs: newest first."""

    federation: str
    members_version: int
    disk_free_bytes: int
    disk_free_bytes_min: int
    certificate_expires_unix_s: int | None
    sites: list[SiteLine]
    runs: list[RunLine]
    runs_left_out: int


class GridLine(TypedDict):
    """One sample grid, drawn from the checkpoint that a round made."""

    round: int
    digest: str
    drawn_unix_s: float


class History(TypedDict):
    """What a run has behind it: its last rounds, oldest first, and its last grids, in the order of their rounds."""

    run: str
    rounds: list[RoundLine]
    grids: list[GridLine]


class Board:
    """Answers the page's questions for one coordinator. free_bytes_min: disk space that is never used."""

    def __init__(self, summaries: Summaries, store: Store, artifacts: Artifacts, free_bytes_min: int) -> None:
        self._summaries = summaries
        self._store = store
        self._artifacts = artifacts
        self._free_bytes_min = free_bytes_min
        self._failed_in: dict[
            str, tuple[int, str]
        ] = {}  # by run, of its newest round: the trace has no index to look it up at every change

    def standing(self) -> Standing:
        """The federation now."""
        status = status_shape(self._summaries.status())
        shown = status["runs"][-RUNS_MAX:][::-1]
        return {
            "federation": status["federation"],
            "members_version": status["members_version"],
            "disk_free_bytes": status["disk_free_bytes"],
            "disk_free_bytes_min": self._free_bytes_min,
            "certificate_expires_unix_s": status["certificate_expires_unix_s"],
            "sites": [
                {
                    "site": site["site"],
                    "connected": site["connected"],
                    "last_seen_unix_s": site["last_seen_unix_s"],
                    "certificate_expires_unix_s": site["certificate_expires_unix_s"],
                }
                for site in status["sites"]
            ],
            "runs": [self._run(run) for run in shown],
            "runs_left_out": len(status["runs"]) - len(shown),
        }

    def history(self, run: str) -> History | None:
        """A run's past, by its digest in hex; None where there is no such run."""
        if not is_digest(run) or self._store.run(bytes.fromhex(run)) is None:
            return None
        rounds = self._summaries.rounds(bytes.fromhex(run), HISTORY_ROUNDS_MAX)
        grids = [grid for grid in self._store.grids(bytes.fromhex(run), GRIDS_MAX) if self._artifacts.has(grid.digest.hex())]
        return {
            "run": run,
            "rounds": [round_line(shape) for shape in map(round_shape, rounds) if shape["phase"] in _ENDED],
            "grids": [
                {"round": grid.round, "digest": grid.digest.hex(), "drawn_unix_s": grid.created_at}
                for grid in sorted(grids, key=lambda grid: (grid.round, grid.created_at))
            ],
        }

    def grid(self, digest: str) -> Path | None:
        """Where a grid's PNG lies; None for everything else among the artifacts, which is nobody's to fetch here."""
        if not is_digest(digest) or not self._store.is_grid(bytes.fromhex(digest)):
            return None
        try:
            return self._artifacts.path(digest)
        except CosiloError:
            return None

    def _run(self, shape: RunShape) -> RunLine:
        run = bytes.fromhex(shape["run"])
        newest = self._summaries.newest_round(run)
        current = round_shape(newest) if newest is not None else None
        masked = shape["aggregation"] == SECURE_AGGREGATION
        return {
            "run": shape["run"],
            "name": shape["name"],
            "state": shape["state"],
            "note": printable(shape["note"]),
            "rounds_closed": shape["rounds_closed"],
            "rounds_wanted": shape["rounds_wanted"],
            "masked": masked,
            "aggregation": shape["aggregation"],
            "parameters": shape["parameters"],
            "participants": shape["participants"],
            "phases": [phase.value for phase in Phase if phase is not Phase.ABANDONED and (masked or phase not in _SHARING)],
            "grids": self._store.grid_count(run),
            "current": None if current is None else self._newest(shape["run"], current),
        }

    def _newest(self, run: str, shape: RoundShape) -> RoundLine:
        if shape["phase"] != Phase.ABANDONED:
            return round_line(shape)
        number, phase = self._failed_in.get(run, (0, ""))
        if number != shape["round"]:
            phase = self._store.last_phase(bytes.fromhex(run), shape["round"])
            self._failed_in[run] = (shape["round"], phase)
        return round_line(shape, phase)


def round_line(shape: RoundShape, failed_in: str = "") -> RoundLine:
    """A round as the page shows it. failed_in: the phase in which it was abandoned, if it was and that is known."""
    ended = shape["phase"] in _ENDED
    losses = shape["losses"] if len(shape["survivors"]) >= CONTRIBUTORS_MIN else None
    return {
        "round": shape["round"],
        "kind": shape["kind"],
        "phase": shape["phase"],
        "failed_in": failed_in or None,
        "reason": printable(shape["reason"]),
        "note": printable(shape["note"]),
        "started_unix_s": shape["started_unix_s"],
        "seconds": shape["seconds"] if ended else None,
        "attempt": shape["attempt"],
        "invited": len(shape["invited"]),
        "survivors": len(shape["survivors"]),
        "bytes_down": shape["bytes_down"],
        "bytes_up": shape["bytes_up"],
        "heldout": losses["heldout"] if losses else None,
        "train": losses["train"] if losses else None,
        "sites": shape["sites"],
    }
