"""The loss curve as a picture.

Owns how it looks. Must not know where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.federation.summary import Point

INK, BLUE, GREY = "#1f2328", "#0b5cad", "#9aa4ae"
SIZE_INCHES = (8.0, 4.5)
DOTS_PER_INCH = 120  # 960 x 540: sharp on a screen, small in a README


def draw_losses(path: Path, curve: Sequence[Point], title: str) -> None:
    """Writes a PNG: the held-out loss of each checkpoint, and below it thin lines by noise level.

    curve: at least one point, round 0 first. The loss axis is logarithmic: a diffusion model gains by factors.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    rounds = [point.round for point in curve]
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    buckets = len(curve[0].by_bucket)
    for bucket in range(buckets):
        values = [point.by_bucket[bucket] for point in curve]
        axes.plot(rounds, values, color=GREY, linewidth=1)
        axes.annotate(
            _bucket_name(bucket, buckets), (rounds[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=GREY, fontsize=8
        )
    losses = [point.loss for point in curve]
    axes.plot(rounds, losses, color=BLUE, linewidth=2.5, marker="o", markersize=4)
    for index, side in ((0, "left"), (-1, "right")):
        axes.annotate(
            f"{losses[index]:.3f}", (rounds[index], losses[index]), (0, 9), textcoords="offset points", ha=side, color=BLUE, weight="bold"
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.02 * max(1, rounds[-1]), 1.02 * max(1, rounds[-1]))
    axes.set_xlabel("round (0: untrained)")
    axes.set_ylabel("held-out loss over all sites")
    axes.set_title(title, loc="left", color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
    pyplot.close(figure)


def _bucket_name(bucket: int, buckets: int) -> str:
    if bucket == 0:
        return "least noise"
    return "most noise" if bucket == buckets - 1 else ""
