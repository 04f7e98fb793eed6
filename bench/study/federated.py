"""One arm over a real federation: a coordinator and its sites as processes, mTLS, masks on; checkpoints come through the admin's commands.

Owns the order of events and what is needed to go on after an interruption: the federation's folder and `cell.json` in it. Must not know
scores. Images seen are counted from what rounds say about themselves: who survived, and how many images each has.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.study.centralised import OnCheckpoint
from cosilo_client.data import DataConfig
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.specification import Architecture, Training
from cosilo_common.weights import open_vector
from tests.federation.local import LocalFederation, SiteSpec
from tests.federation.processes import FederationError
from tests.federation.summary import CLOSED, TRAIN
from tests.federation.toml_files import Toml

PATIENCE_S = 6 * 3600.0  # for the rounds between two evaluations; stuck rounds end by their own deadlines long before
WARM_SITES_MAX = 16  # sites whose trainers, some 300 MB each, stay in memory between rounds
FEW_IDLE_S = 5.0  # seconds that a trainer stays where there are more: one that is not in the next cohort makes room for one that is
ABANDONED_MAX = 20  # of one cell: a run that abandons so many rounds will not end, and wants a person


@dataclass(frozen=True)
class RoundFigures:
    """A closed training round. bytes_*: of all sites; heldout: the loss over the sites' held-out images of the weights it started from."""

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    survivors: int
    images: int
    heldout: float | None
    train: float | None
    update_norm: float | None
    clip_ratio: float | None


class FederatedCell:
    """folder: of this cell alone; plan: the run file; train_sizes: training images by site."""

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, Toml],
        sites: Mapping[str, DataConfig],
        train_sizes: Mapping[str, int],
        training: Training,
        architecture: Architecture,
        *,
        raw: bool,
    ) -> None:
        self._folder, self._plan, self._sizes, self._training = folder, plan, train_sizes, training
        self._table = tensor_table(architecture)
        self._raw = raw
        self._note = folder / "cell.json"
        trainer: dict[str, Toml] = {"device": "cpu", "threads": 1, **({"idle_s": FEW_IDLE_S} if len(sites) > WARM_SITES_MAX else {})}
        policy: dict[str, Toml] = {"f_min": plan["f"]} if "f" in plan else {}  # each site's consent to what the scenario asks for
        specs = [SiteSpec(name, _data_table(config), policy, trainer=trainer) for name, config in sites.items()]
        self._federation = LocalFederation(folder / "federation", specs, name="study", threads=1)

    def train(self, points: list[int], on_checkpoint: OnCheckpoint) -> list[RoundFigures]:
        """Runs rounds until the last of `points` (images seen), calling back after the round that comes nearest to each.

        Goes on where an interrupted call stopped; points that it had passed are not called again. Returns every closed training round.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._read_note()
        with self._federation as federation:
            run = self._resume(state) if state else self._begin()
            passed = int(state.get("passed", 0)) if state else 0
            seen_round = 0
            for number, point in enumerate(points):
                if number < passed:
                    continue
                self._rounds_until(federation, run, point)
                rounds, last = self._figures(run), number + 1 == len(points)
                if rounds[-1].round > seen_round or last:  # long rounds may pass several points at once
                    seen_round = rounds[-1].round
                    on_checkpoint(sum(entry.images for entry in rounds), seen_round, self._pull(run), last)
                self._write_note(run, number + 1)
            return self._figures(run)

    def _begin(self) -> str:
        shutil.rmtree(self._federation.root, ignore_errors=True)  # cut off before it had a run: nothing in it is worth keeping
        self._federation.start()
        run = self._federation.create_run(self._plan)
        self._federation.accept_all(run)
        self._write_note(run, 0)
        return run

    def _resume(self, state: Mapping[str, Any]) -> str:
        federation = self._federation
        federation.start_coordinator()
        for name in federation.sites:
            federation.daemon(name).start()
        for name in federation.sites:
            federation.wait_ready(name)
        run = str(state["run"])
        federation.wait_idle(run, PATIENCE_S)  # what was asked for before goes on by itself
        return run

    def _rounds_until(self, federation: LocalFederation, run: str, point: int) -> None:
        """As many rounds as bring the images seen nearest to the point."""
        while True:
            rounds = self._figures(run)
            seen = sum(entry.images for entry in rounds)
            usual = seen / len(rounds) if rounds else self._expected()
            wanted = round((point - seen) / usual)
            if wanted < 1 and rounds:
                return
            federation.start_rounds(run, max(1, wanted))
            federation.wait_idle(run, PATIENCE_S)
            abandoned = [entry for entry in federation.rounds(run) if entry["phase"] == "abandoned"]
            if len(abandoned) > ABANDONED_MAX:
                raise FederationError(f"{len(abandoned)} rounds abandoned: {abandoned[-1]['reason']}", federation.log_files())

    def _expected(self) -> float:
        """Images of a round before any was seen: the cohort's share of everybody's."""
        each = [images_in_round(count, self._training) for count in self._sizes.values()]
        cohort = int(str(self._plan.get("cohort", 0))) or len(each)
        return sum(each) * cohort / len(each)

    def _figures(self, run: str) -> list[RoundFigures]:
        closed = [entry for entry in self._federation.rounds(run) if entry["phase"] == CLOSED and entry["kind"] == TRAIN]
        figures = []
        for entry in closed:
            losses = entry["losses"] or {}
            figures.append(
                RoundFigures(
                    round=entry["round"],
                    seconds=round(entry["seconds"], 3),
                    bytes_down=entry["bytes_down"],
                    bytes_up=entry["bytes_up"],
                    survivors=len(entry["survivors"]),
                    images=sum(images_in_round(self._sizes[name], self._training) for name in entry["survivors"]),
                    **{key: losses.get(key) for key in ("heldout", "train", "update_norm", "clip_ratio")},
                )
            )
        return figures

    def _pull(self, run: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        path = self._folder / "checkpoint.safetensors"
        path.unlink(missing_ok=True)
        self._federation.cosilo("checkpoint", "pull", run, "--to", str(path), *(["--raw"] if self._raw else []))
        return np.array(open_vector(path, self._table))

    def _read_note(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._note.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def _write_note(self, run: str, passed: int) -> None:
        temporary = self._note.with_suffix(".part")
        temporary.write_text(json.dumps({"run": run, "passed": passed, "unix_s": time.time()}), encoding="utf-8")
        temporary.replace(self._note)


def images_in_round(count: int, training: Training) -> int:
    """Images that a site with `count` training images sees in a round."""
    if training.steps_per_epoch is None:
        sizes = [training.batch_size] * (count // training.batch_size) + (
            [count % training.batch_size] if count % training.batch_size else []
        )
    else:
        parts = min(count, training.steps_per_epoch)
        sizes = [count // parts + (k < count % parts) for k in range(parts)]
    every = sizes * training.local_epochs
    return sum(every if training.max_steps is None else every[: training.max_steps])


def traffic(rounds: list[RoundFigures]) -> dict[str, Any]:
    """Bytes and seconds of a cell's rounds, as results.json has them."""
    return {
        "rounds": len(rounds),
        "bytes_down_per_round": sum(entry.bytes_down for entry in rounds) // len(rounds),
        "bytes_up_per_round": sum(entry.bytes_up for entry in rounds) // len(rounds),
        "round_seconds_median": float(np.median([entry.seconds for entry in rounds])),
        "by_round": [asdict(entry) for entry in rounds],
    }


def _data_table(config: DataConfig) -> dict[str, Toml]:
    table: dict[str, Toml] = {"kind": config.kind, "path": str(config.path), "split": config.split}
    if config.index_file is not None:
        table["index_file"] = str(config.index_file)
    if config.classes:
        table["classes"] = list(config.classes)
    return table
