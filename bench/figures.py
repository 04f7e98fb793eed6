"""What every bench gives: figures, each beside the yardstick that was measured in the same run.

Owns the one shape of a figure, its table and its JSON. Must not know what is measured. A bench is a module with
`measure(quick: bool) -> Iterable[Figure]`; `bench.__main__` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """What a ratio is to reach. at_least: larger is better; otherwise `value` is the most that it may be."""

    value: float
    at_least: bool

    def met(self, ratio: float) -> bool:
        """Whether the ratio reaches it."""
        return ratio >= self.value if self.at_least else ratio <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """One measured value beside its yardstick. name: dotted, as `transfer.down.1`; ratio: value to yardstick_value; goal: of the ratio."""

    name: str
    value: float
    unit: str
    yardstick: str = ""
    yardstick_value: float | None = None
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """value / yardstick_value; None where there is no yardstick."""
        return self.value / self.yardstick_value if self.yardstick_value else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        return None if self.goal is None or self.ratio is None else self.goal.met(self.ratio)

    def as_json(self) -> dict[str, Any]:
        """A plain object, with the ratio, the goal in words and whether it is met."""
        return {**asdict(self), "goal": str(self.goal) if self.goal else None, "ratio": self.ratio, "met": self.met}


def at_least(value: float) -> Goal:
    """The ratio is to be this much or more."""
    return Goal(value, True)


def at_most(value: float) -> Goal:
    """The ratio is to be this much or less."""
    return Goal(value, False)


def table(figures: Iterable[Figure]) -> str:
    """One line a figure: value, yardstick, ratio, goal, and `missed` where it is missed."""
    rows = [("figure", "value", "yardstick", "ratio", "goal", "")]
    for figure in figures:
        beside = f"{figure.yardstick_value:.4g} {figure.yardstick}" if figure.yardstick_value is not None else figure.yardstick
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        verdict = {None: "", True: "met", False: "missed"}[figure.met]
        rows.append((figure.name, f"{figure.value:.4g} {figure.unit}", beside, ratio, str(figure.goal or ""), verdict))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def to_json(figures: Iterable[Figure], machine: dict[str, Any]) -> str:
    """The run as one JSON object: `machine`, `figures`."""
    return json.dumps({"machine": machine, "figures": [figure.as_json() for figure in figures]}, indent=2) + "\n"
