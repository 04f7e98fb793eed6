"""results.json: what was compared, on what, and what came of it; and the table that a person reads.

Owns the file's form and its arithmetic over seeds. A cell is one arm with one seed; it is stored under the fingerprint of all that it
depends on. Must not know how cells are made.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.study.scenario import Scenario

Cell = dict[str, Any]
Cells = dict[str, dict[str, Cell]]  # by arm and seed

PACKAGES = ("torch", "diffusers", "numpy", "grpcio")


def write_json(path: Path, value: object) -> None:
    """Writes a whole file or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The parsed file, or None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def finished_cells(path: Path, scenario: Scenario, extractor_digest: str) -> Cells:
    """The cells of an earlier results.json that this scenario would make again just so; those of other values are left out, and all of
    them where another extractor scored."""
    old = read_json(path)
    if old is None or old["extractor"]["digest"] != extractor_digest:
        return {}
    cells: Cells = {}
    for arm in scenario.arm:
        for seed in scenario.seeds_of(arm):
            cell = (old["cells"].get(arm.name, {})).get(str(seed))
            if cell is not None and cell["fingerprint"] == scenario.fingerprint(arm, seed):
                cells.setdefault(arm.name, {})[str(seed)] = cell
    return cells


def document(scenario: Scenario, cells: Cells, facts: Mapping[str, Any]) -> dict[str, Any]:
    """results.json. facts: of the data and the extractor."""
    return {
        "scenario": scenario.model_dump(mode="json"),
        "command": f"make study FILE=bench/study/scenarios/{scenario.name}.toml",
        **facts,
        "summary": summary(scenario, cells),
        "cells": {arm.name: dict(sorted(cells[arm.name].items())) for arm in scenario.arm if arm.name in cells},
    }


def summary(scenario: Scenario, cells: Cells) -> dict[str, dict[str, Any]]:
    """For each arm the last point of its seeds: mean and, over two seeds or more, standard deviation; and what became of the gap.

    over_centralised: FID over the centralised arm's; gap_closed: the share of base's distance to centralised that is gone (None for base).
    """
    rows: dict[str, dict[str, Any]] = {}
    for arm in scenario.arm:
        last = [cell["points"][-1] for _, cell in sorted(cells.get(arm.name, {}).items())]
        if last:
            rows[arm.name] = {
                "seeds": len(last),
                "images": round(statistics.mean(point["images"] for point in last)),
                **{
                    name: _spread([point["scores"][name] for point in last])
                    for name in ("fid", "fid_test", "kid", "precision", "recall", "loss_test")
                },
            }
    centralised = next((rows[arm.name]["fid"]["mean"] for arm in scenario.arm if arm.mode == "centralised" and arm.name in rows), None)
    base = rows[scenario.base]["fid"]["mean"] if scenario.base in rows else None
    for name, row in rows.items():
        fid = row["fid"]["mean"]
        row["over_centralised"] = None if centralised is None else round(fid / centralised, 4)
        known = centralised is not None and base is not None and base > centralised and name != scenario.base
        row["gap_closed"] = (
            round((base - fid) / (base - centralised), 4) if known and base is not None and centralised is not None else None
        )
    return rows


def table(scenario: Scenario, rows: Mapping[str, Mapping[str, Any]], cells: Cells) -> str:
    """The summary in columns."""
    head = ("arm", "seeds", "images", "FID", "over central.", "gap closed", "FID test", "KID", "precision", "recall", "MB/round", "s")
    lines = [head]
    for name, row in rows.items():
        some = next(iter(cells[name].values()))
        traffic = some.get("traffic")
        megabytes = "-" if traffic is None else f"{(traffic['bytes_down_per_round'] + traffic['bytes_up_per_round']) / 1e6:.1f}"
        lines.append(
            (
                name,
                str(row["seeds"]),
                f"{row['images']:,}",
                _told(row["fid"], 1),
                "-" if row["over_centralised"] is None else f"{row['over_centralised']:.2f}",
                "-" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
                _told(row["fid_test"], 1),
                _told(row["kid"], 3),
                _told(row["precision"], 2),
                _told(row["recall"], 2),
                megabytes,
                f"{statistics.mean(cell['seconds'] for cell in cells[name].values()):.0f}",
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    body = "\n".join(
        "  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return f"{scenario.name}: {scenario.about}\n{body}"


def environment(root: Path) -> dict[str, Any]:
    """What a figure was made with: versions, the commit and whether the tree differed from it."""
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "tree_changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in PACKAGES},
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": float(f"{statistics.mean(values):.6g}"),
        "deviation": float(f"{statistics.stdev(values):.6g}") if len(values) > 1 else None,
    }


def _told(spread: Mapping[str, float | None], digits: int) -> str:
    deviation = spread["deviation"]
    return f"{spread['mean']:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
