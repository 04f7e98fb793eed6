"""What a training came to, as plain values: summary.json, and the curve behind loss.png.

Owns the arithmetic from `cosilo round list --json` to those values. Must not know processes, files or pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

CLOSED = "closed"
TRAIN = "train"


class SiteSummary(TypedDict):
    """One site, by the demo's own splitter: no coordinator is told how many images a site has."""

    name: str
    images: int


class RoundSummary(TypedDict):
    """One checkpoint. round 0: the untrained model. global_loss: held-out loss of the weights after the round."""

    round: int
    global_loss: float
    seconds: float
    bytes_down: int
    bytes_up: int


class Summary(TypedDict):
    """summary.json. checkpoint: SHA-256 of the last weights, hex."""

    sites: list[SiteSummary]
    rounds: list[RoundSummary]
    aggregation: str
    checkpoint: str


@dataclass(frozen=True)
class Point:
    """A checkpoint on the loss curve. by_bucket: the same loss by timestep bucket, lowest noise first."""

    round: int
    loss: float
    by_bucket: tuple[float, ...]


def loss_curve(rounds: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The held-out loss of every checkpoint, the untrained one first.

    rounds: as `cosilo round list --json` gives them. A round reports the loss of the weights it STARTED from, so a checkpoint's
    loss stands in a later round (the last one's in a statistics round), found by the digest of the weights. Raises ValueError
    where no round trained, or where a checkpoint was never measured.
    """
    closed = [entry for entry in rounds if entry["phase"] == CLOSED]
    trained = [entry for entry in closed if entry["kind"] == TRAIN]
    if not trained:
        raise ValueError("no training round closed")
    measured = {entry["base"]: entry["losses"] for entry in reversed(closed) if entry["losses"] is not None}
    checkpoints = [(0, trained[0]["base"]), *((entry["round"], entry["checkpoint"]) for entry in trained)]
    missing = [number for number, digest in checkpoints if digest not in measured or measured[digest]["heldout"] is None]
    if missing:
        raise ValueError(f"the weights after round {missing[0]} were never measured: run a statistics round")
    return [Point(number, measured[digest]["heldout"], tuple(measured[digest]["heldout_by_bucket"])) for number, digest in checkpoints]


def summarise(sites: Mapping[str, int], rounds: Sequence[Mapping[str, Any]], aggregation: str) -> Summary:
    """summary.json's content. sites: images by name; rounds: as `cosilo round list --json` gives them."""
    trained = {entry["round"]: entry for entry in rounds if entry["phase"] == CLOSED and entry["kind"] == TRAIN}
    entries: list[RoundSummary] = []
    for point in loss_curve(rounds):
        entry = trained.get(point.round)
        entries.append(
            {
                "round": point.round,
                "global_loss": point.loss,
                "seconds": 0.0 if entry is None else entry["seconds"],
                "bytes_down": 0 if entry is None else entry["bytes_down"],
                "bytes_up": 0 if entry is None else entry["bytes_up"],
            }
        )
    return {
        "sites": [{"name": name, "images": images} for name, images in sites.items()],
        "rounds": entries,
        "aggregation": aggregation,
        "checkpoint": trained[max(trained)]["checkpoint"],
    }
