"""Whether a run whose checkpoints are rounded to steps ends where the same run without does: losses and weights after equal rounds.

    python -m bench.downlink [--rounds 4] [--sites 3] [--json FILE]

Two runs of one seed over a real federation on this machine, at b = 32, where the same updates give the same sum bit for bit: one whole, one with
[downlink]. What differs between them is what the rounding of checkpoints did, and what training made of that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosilo_common.weights import open_vector, read_header
from tests.federation.digits import digits_sites
from tests.federation.local import LocalFederation

WIDTHS = (16, 32)  # 0.16 million parameters, which a CPU trains in seconds
SEED = 11
ROUNDS = 4  # with the untrained one five checkpoints, which a coordinator keeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="cosilo-downlink-"))
    try:
        with LocalFederation(root, digits_sites(root, arguments.sites, alpha=1.0, least=100, seed=1)) as federation:
            federation.start()
            whole = _run(federation, arguments.rounds, {})
            steps = _run(federation, arguments.rounds, {"downlink": {"bits": 24}})
    finally:
        shutil.rmtree(root, ignore_errors=True)
    moved = np.linalg.norm(whole["weights"][-1] - whole["first"])
    rows = []
    for number in range(arguments.rounds):
        off = np.abs(steps["weights"][number] - whole["weights"][number])
        rows.append(
            {
                "round": number + 1,
                "loss_whole": whole["losses"][number],
                "loss_steps": steps["losses"][number],
                "weights_that_differ": float((off > 0).mean()),
                "largest_difference": float(off.max()),
                "difference_beside_what_the_run_moved": float(np.linalg.norm(off) / moved),
                "bytes_down_whole": whole["bytes_down"][number],
                "bytes_down_steps": steps["bytes_down"][number],
            }
        )
        print(", ".join(f"{name} {value:.6g}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _run(federation: LocalFederation, rounds: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A run to its end: its weights after each round, its losses, and what the sites fetched."""
    plan: dict[str, Any] = {
        "name": "steps" if changes else "whole",
        "preset": "digits",
        "architecture": {"block_out_channels": list(WIDTHS), "norm_num_groups": 16},
        "training": {"local_epochs": 1, "batch_size": 32, "seed": SEED},
        **changes,
    }
    run = federation.create_run(plan)
    federation.accept_all(run)
    found = federation.run_rounds(run, rounds)
    paths = [federation.data / "artifacts" / entry["weights"] for entry in federation.checkpoints(run)]
    first, *weights = [_vector(path) for path in paths]
    losses, down = [entry["losses"]["heldout"] for entry in found], [entry["bytes_down"] for entry in found]
    return {"first": first, "weights": weights, "losses": losses, "bytes_down": down}


def _vector(path: Path) -> NDArray[np.float64]:
    return np.array(open_vector(path, read_header(path).table), np.float64)


if __name__ == "__main__":
    main()
