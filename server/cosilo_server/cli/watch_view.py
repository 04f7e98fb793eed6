"""What a person sees while a run goes: a live picture with a bar for each site on a terminal, plain lines anywhere
else.

Must not know the wire: it is given snapshots and lines.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cosilo_server.cli.shapes import ProgressShape, RoundShape
from cosilo_server.cli.terminal import byte_words, number_words, say, second_words
from cosilo_server.cli.watching import Snapshot, has_ended, phase_line, run_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAR_CHARS = 20
CURVE_POINTS_MAX = 40  # what fits beside its numbers on 80 columns
CURVE_BLOCKS = "▁▂▃▄▅▆▇█"
REFRESHES_PER_SECOND = 4  # the coordinator sends at most a few snapshots a second


class View(Protocol):
    """Where snapshots and lines go."""

    def show(self, snapshot: Snapshot) -> None: ...

    def tell(self, line: str, entry: RoundShape | None = None) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None: ...


class PlainView:
    """Lines for logs and pipes: one for each change of phase, one for each round that ended."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, snapshot: Snapshot) -> None:
        """Prints where the run stands, if that changed in words."""
        current = snapshot.round
        line = run_line(snapshot.run) if current is None or has_ended(current) else phase_line(current)
        if line != self._last:
            self._last = line
            say(line)

    def tell(self, line: str, entry: RoundShape | None = None) -> None:
        """Prints a line that stays."""
        say(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        return None


class LiveView:
    """The live picture, redrawn in place; lines that stay scroll above it."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._losses: list[float] = []
        self._live = Live(console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)

    def show(self, snapshot: Snapshot) -> None:
        """Redraws."""
        self._live.update(picture(snapshot, self._losses))

    def tell(self, line: str, entry: RoundShape | None = None) -> None:
        """Prints a line above the picture, and adds its loss to the curve."""
        losses = entry["losses"] if entry is not None else None
        if losses is not None and losses["heldout"] is not None:
            self._losses.append(losses["heldout"])
        self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()


def picture(snapshot: Snapshot, losses: list[float]) -> RenderableType:
    """Header, loss curve, and a row with a bar for each site of the round in progress."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(run_line(snapshot.run), style="bold")]
    if losses:
        parts.append(Text(f"held-out loss {curve(losses)} {number_words(losses[0])} to {number_words(losses[-1])}"))
    current = snapshot.round
    if current is not None and not has_ended(current):
        parts.append(Text(f"{phase_line(current)}, {second_words(current['seconds'])}"))
        table = Table.grid(padding=(0, 2))
        for site in current["sites"]:
            bar = ProgressBar(total=10, completed=site["tenths"], width=BAR_CHARS)
            table.add_row(f"  {site['site']}", bar, activity_words(site), byte_words(site["bytes"]) if site["bytes"] else "")
        parts.append(table)
    return Group(*parts)


def activity_words(site: ProgressShape) -> str:
    """What one site does, or why it does nothing."""
    if site["declined"] is not None:
        return f"declined: {site['declined']}"
    if site["late"]:
        return "left out: no progress"
    if not site["connected"]:
        return "not connected"
    if site["delivered"]:
        return "delivered"
    return site["activity"] if site["activity"] in ("idle", "waiting") else f"{site['activity']} {site['tenths'] * 10} %"


def curve(losses: list[float]) -> str:
    """The last losses as blocks: the highest is full, the lowest is the thinnest."""
    shown = losses[-CURVE_POINTS_MAX:]
    low, high = min(shown), max(shown)
    top = len(CURVE_BLOCKS) - 1
    return "".join(CURVE_BLOCKS[round((loss - low) / (high - low) * top) if high > low else 0] for loss in shown)
