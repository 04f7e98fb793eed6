"""The study's curves as a picture: FID by images seen, a line an arm, a band over its seeds.

Owns how it looks. Must not know where the numbers come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.study.outcomes import Cells

SIZE_INCHES = (8.0, 4.5)
DOTS_PER_INCH = 120
PANELS = (("fid", "FID to the training images"), ("loss_test", "loss on test images"))


def draw_curves(path: Path, cells: Cells, title: str) -> None:
    """Writes a PNG with a panel for the FID and one for the test loss; both axes of values are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(PANELS), figsize=(SIZE_INCHES[0] * 1.5, SIZE_INCHES[1]), dpi=DOTS_PER_INCH, layout="constrained"
    )
    for axes, (key, label) in zip(panels, PANELS, strict=True):
        for name, seeds in cells.items():
            curves = [cell["points"] for cell in seeds.values()]
            seen = [sum(point["images"] for point in column) / len(column) for column in zip(*curves, strict=False)]
            values = [[point["scores"][key] for point in column] for column in zip(*curves, strict=False)]
            (line,) = axes.plot(seen, [sum(column) / len(column) for column in values], marker="o", markersize=3, label=name)
            if len(curves) > 1:
                axes.fill_between(
                    seen, [min(column) for column in values], [max(column) for column in values], alpha=0.2, color=line.get_color()
                )
        _finish(axes, label)
    panels[0].set_title(title, loc="left")
    panels[0].legend()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def _finish(axes: Any, label: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("images seen in training")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
