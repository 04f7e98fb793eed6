"""A checkpoint's loss is found where it was measured, and what was never measured is not invented."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.federation.pictures import draw_losses
from tests.federation.summary import Point, loss_curve, summarise


def entry(number: int, base: str, made: str | None, loss: float, *, kind: str = "train", phase: str = "closed") -> dict[str, Any]:
    """A round as `cosilo round list --json` gives it."""
    return {
        "round": number,
        "kind": kind,
        "phase": phase,
        "base": base,
        "checkpoint": made,
        "seconds": 2.5 * number,
        "bytes_down": 100 * number,
        "bytes_up": 10 * number,
        "losses": {"heldout": loss, "heldout_by_bucket": [loss * 1.5, loss * 0.5]} if phase == "closed" else None,
    }


ROUNDS = [
    entry(1, "w0", "w1", 1.0),
    entry(2, "w1", None, 0.0, phase="abandoned"),
    entry(3, "w1", "w3", 0.5),
    entry(4, "w3", "w3", 0.25, kind="statistics"),
]


def test_each_checkpoint_has_the_loss_of_the_round_that_started_from_it() -> None:
    assert loss_curve(ROUNDS) == [Point(0, 1.0, (1.5, 0.5)), Point(1, 0.5, (0.75, 0.25)), Point(3, 0.25, (0.375, 0.125))]


def test_the_summary_is_exact() -> None:
    assert summarise({"north": 700, "south": 300}, ROUNDS, "cosilo-secagg/1") == {
        "sites": [{"name": "north", "images": 700}, {"name": "south", "images": 300}],
        "rounds": [
            {"round": 0, "global_loss": 1.0, "seconds": 0.0, "bytes_down": 0, "bytes_up": 0},
            {"round": 1, "global_loss": 0.5, "seconds": 2.5, "bytes_down": 100, "bytes_up": 10},
            {"round": 3, "global_loss": 0.25, "seconds": 7.5, "bytes_down": 300, "bytes_up": 30},
        ],
        "aggregation": "cosilo-secagg/1",
        "checkpoint": "w3",
    }


@pytest.mark.parametrize(("rounds", "message"), [([], "no training round closed"), (ROUNDS[:3], "after round 3 were never measured")])
def test_what_was_not_measured_is_said(rounds: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_curve(rounds)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    draw_losses(path, [Point(r, 1.0 / (r + 1), (1.6 / (r + 1), 0.4 / (r + 1))) for r in range(20)], "digits over four sites")
    with Image.open(path) as image:
        assert image.size == (960, 540)
        assert len(image.convert("RGB").getcolors(1 << 16) or ()) > 50
