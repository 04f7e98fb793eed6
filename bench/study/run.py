"""One scenario of the study, end to end: `python -m bench.study.run bench/study/scenarios/NAME.toml` (or make study FILE=...).

Trains every arm with every seed at one image budget, federated ones over real daemons with masks, scores their checkpoints alike, and
writes bench/study/results/NAME/results.json after each cell. Interrupted, it goes on: finished cells are kept, a federation is started
again from its own folder. Owns the order and the words.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.study.assessment import Assessor, Point
from bench.study.centralised import OnCheckpoint, train_centralised
from bench.study.datasets import StudyData, study_data
from bench.study.federated import FederatedCell, traffic
from bench.study.inprocess import InProcessRounds
from bench.study.outcomes import Cell, document, environment, finished_cells, read_json, summary, table, write_json
from bench.study.pictures import draw_curves
from bench.study.scenario import Arm, read_scenario
from cosilo_common.diffusion.specification import Preset
from cosilo_common.errors import CosiloError
from cosilo_common.evaluation.extractors import extractor
from cosilo_common.manifest import CorrectionTerms, ServerOptimiserTerms
from cosilo_server.cli.run_file import RunFile
from tests.federation.processes import FederationError
from tests.federation.toml_files import to_toml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "study" / "results"
DAEMONS, INPROCESS = "daemons", "inprocess"
EXPLORATION = "exploration.json"  # what the engine without a federation gives: never mixed with results, never committed


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when every cell asked for is finished."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a stopped study stops its processes
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)  # as the trainer process does on a CPU: the same seed, the same bits
    try:
        _Study(options).run()
    except (CosiloError, FederationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


class _Study:
    """A scenario, its work folder and what is finished of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.scenario = read_scenario(options.file)
        self._options = options
        self._work: Path = (options.work or ROOT / "bench-out" / "study" / self.scenario.name).resolve()
        self._exploring = options.engine == INPROCESS
        self._results: Path = options.results / self.scenario.name / (EXPLORATION if self._exploring else "results.json")
        self._work.mkdir(parents=True, exist_ok=True)
        plan = self.scenario.evaluation
        self._network = extractor(plan.extractor, weights=options.weights, sha256=options.sha256)
        self._cells = finished_cells(self._results, self.scenario, self._network.digest)

    def run(self) -> None:
        scenario = self.scenario
        known = {arm.name for arm in scenario.arm}
        if strangers := set(self._options.arms or ()) - known:
            raise CosiloError("study", f"no arm is called {', '.join(sorted(strangers))}", f"choose of {', '.join(sorted(known))}")
        network = self._network
        facts: dict[str, Any] = {"extractor": {"name": network.name, "digest": network.digest}}
        for arm in scenario.arm:
            for seed in scenario.seeds_of(arm):
                if self._options.arms and arm.name not in self._options.arms:
                    continue
                if self._options.seeds and seed not in self._options.seeds:
                    continue
                recipe = self._recipe(arm, seed)
                data = self._data(recipe)
                facts["sites"] = {
                    name: {"images": data.sizes[name], "trained_on": data.train_sizes[name], "by_class": data.class_counts[name]}
                    for name in data.sizes
                }
                if str(seed) in self._cells.get(arm.name, {}):
                    print(f"{arm.name}, seed {seed}: finished before", flush=True)
                    continue
                assessor = Assessor(scenario.evaluation, recipe, data, network, self._work / "features")
                self._cells.setdefault(arm.name, {})[str(seed)] = self._cell(arm, seed, recipe, data, assessor)
                self._write(facts)
        self._write(facts)
        if self._exploring:
            print("\nEXPLORATION: one process, no daemons, no masks; not a result")
        print(f"\n{table(scenario, summary(scenario, self._cells), self._cells)}\n\n{self._results}\n{self._work / 'curves.png'}")

    def _cell(self, arm: Arm, seed: int, recipe: Preset, data: StudyData, assessor: Assessor) -> Cell:
        """Trains and scores one arm with one seed."""
        fingerprint = self.scenario.fingerprint(arm, seed)
        folder = self._work / "cells" / f"{arm.name}-{seed}-{self._options.engine}-{fingerprint[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        notes = folder / "points.json"
        earlier = read_json(notes) if arm.mode == "federated" and not self._exploring else None
        points: list[dict[str, Any]] = list((earlier or {}).get("points", []))
        before_s = float((earlier or {}).get("seconds", 0.0))
        began = time.monotonic()
        wanted = self.scenario.budget.points()
        print(f"{arm.name}, seed {seed}: {arm.mode}, {self.scenario.budget.images:,} images" + (", going on" if points else ""), flush=True)

        def on_checkpoint(images: int, round_: int, weights: Any, last: bool) -> None:
            grid = self._work / f"{arm.name}-{seed}.png" if last else None
            scores = assessor.assess(weights, last=last, grid=grid)
            points[:] = [point for point in points if point["images"] < images]  # one that was scored just before a cut is scored again
            points.append(asdict(Point(images, round_, scores)))
            write_json(notes, {"points": points, "seconds": before_s + time.monotonic() - began})
            print(
                f"  {images:>9,} images, round {round_}: FID {scores['fid']:.1f}, KID {scores['kid']:.3f}, precision {scores['precision']:.2f}, "
                f"recall {scores['recall']:.2f}, loss {scores['loss_test']:.4f}",
                flush=True,
            )

        figures = self._train(arm, seed, recipe, data, folder, wanted, on_checkpoint)
        seconds = round(before_s + time.monotonic() - began, 1)
        shutil.rmtree(folder, ignore_errors=True)
        return {
            "fingerprint": fingerprint,
            "mode": arm.mode,
            "engine": self._options.engine if arm.mode == "federated" else "trainer",
            "plan": self.scenario.plan(arm, seed),
            "environment": environment(ROOT),
            "seconds": seconds,
            "points": points,
            **figures,
        }

    def _train(
        self, arm: Arm, seed: int, recipe: Preset, data: StudyData, folder: Path, points: list[int], on_checkpoint: OnCheckpoint
    ) -> dict[str, Any]:
        if arm.mode == "centralised":
            seconds = train_centralised(data.pooled, recipe, self.scenario.budget.images, points, on_checkpoint)
            return {"training_seconds": round(seconds, 1)}
        if self._exploring:
            file = RunFile(self._plan_path(arm, seed))
            terms = ServerOptimiserTerms.model_validate(file.values["server_optimiser"])
            ema_decay, cohort = float(file.values.get("ema_decay", 0.0)), int(file.values.get("cohort", 0))
            correction = CorrectionTerms.model_validate(file.values["correction"]) if "correction" in file.values else None
            raw = self.scenario.evaluation.raw
            rounds = InProcessRounds(recipe, data.sites, terms, ema_decay=ema_decay, cohort=cohort, raw=raw, correction=correction)
            return {"exploration": rounds.train(points, on_checkpoint)}
        cell = FederatedCell(
            folder,
            self.scenario.plan(arm, seed),
            data.sites,
            data.train_sizes,
            recipe.training,
            recipe.architecture,
            raw=self.scenario.evaluation.raw,
        )
        return {"traffic": traffic(cell.train(points, on_checkpoint))}

    def _recipe(self, arm: Arm, seed: int) -> Preset:
        """The cell's run file, read as `cosilo run create` reads it."""
        path = self._plan_path(arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(self.scenario.plan(arm, seed)), encoding="utf-8")
        return RunFile(path).recipe

    def _plan_path(self, arm: Arm, seed: int) -> Path:
        return self._work / "plans" / f"{arm.name}-{seed}.toml"

    def _data(self, recipe: Preset) -> StudyData:
        scenario = self.scenario
        return study_data(
            scenario.data,
            scenario.split,
            recipe.architecture,
            recipe.training.heldout_fraction,
            self._work / "data",
            self._options.data and self._options.data.resolve(),
        )

    def _write(self, facts: dict[str, Any]) -> None:
        for arm, cells in finished_cells(
            self._results, self.scenario, self._network.digest
        ).items():  # another process may have made other cells meanwhile
            self._cells[arm] = {**cells, **self._cells.get(arm, {})}
        write_json(self._results, document(self.scenario, self._cells, facts))
        if self._cells:
            draw_curves(self._work / "curves.png", self._cells, self.scenario.name)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.study.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a scenario, as in bench/study/scenarios/")
    parser.add_argument("--data", type=Path, default=None, help="where the images are, for data.kind = folders")
    parser.add_argument("--arms", nargs="+", default=None, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="only these")
    parser.add_argument("--work", type=Path, default=None, help="state and pictures (default bench-out/study/NAME)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where NAME/results.json is written (default bench/study/results)")
    parser.add_argument("--weights", type=Path, default=None, help="of the extractor, where it is not the default one")
    parser.add_argument("--sha256", default=None, help="of that file")
    parser.add_argument("--engine", choices=[DAEMONS, INPROCESS], default=DAEMONS, help=f"{INPROCESS}: to explore, in {EXPLORATION}")
    parser.add_argument("--threads", type=int, default=1, help="of this process: centralised training and scoring")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
