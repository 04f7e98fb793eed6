"""`make simulate`: many seeds in a few processes, or one seed told in full. See docs/simulation.md.

    python -m tests.simulation                                  ten minutes
    python -m tests.simulation --rounds 10000                   so many rounds, or exit code 1
    python -m tests.simulation --seed 42                        one history again, every event of it
    python -m tests.simulation --first 0                        seeds that nobody has run before
    python -m tests.simulation --lies                           coordinators that lie
    python -m tests.simulation --mutants                        a broken program, to see that it is found out

Owns the command line, the worker processes and the sums over seeds. Exit code 1 where a rule was broken, or
fewer rounds were simulated than were asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.simulation.mutants import Verdict, try_all
from tests.simulation.scenario import Scenario, scenario_of
from tests.simulation.world import Report, memory, simulate

ROOT = Path(__file__).parents[2]
HASH_SEED = "0"  # sets of names are walked in one order, in every process
SECONDS = 600.0
LIES = 0.1  # share of twisted assignments with --lies, where a seed draws no higher one


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for."""
    asked = _parser().parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *(arguments if arguments is not None else sys.argv[1:])])
    if asked.worker is not None:
        return _work(asked)
    if asked.mutants is not None:
        return _mutants(asked)
    if asked.seed is not None:
        return _one(asked)
    return _many(asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make simulate", description="Simulate federations under faults and check every rule.")
    parser.add_argument("--seed", type=int, help="run this one seed and tell everything that happens in it")
    parser.add_argument("--sites", type=int, default=0, help="with --seed: so many sites instead of the drawn number")
    parser.add_argument("--quiet", action="store_true", help="with --seed: only the result")
    parser.add_argument("--first", type=int, default=1, help="the first seed; 0 takes one by the clock (default: 1)")
    parser.add_argument("--rounds", type=int, help="stop after so many rounds; it is a failure if the time ends before")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"stop after so many seconds (default: {SECONDS:.0f})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--lies", action="store_true", help="every coordinator lies in its assignments")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="put faults into the program, all or these, and see each one caught")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def _scenario(asked: argparse.Namespace, seed: int, sites: int = 0) -> Scenario:
    scenario = scenario_of(seed, sites)
    return replace(scenario, lies=max(scenario.lies, LIES)) if asked.lies else scenario


def _one(asked: argparse.Namespace) -> int:
    began_s = time.process_time()
    report = simulate(_scenario(asked, asked.seed, asked.sites), None if asked.quiet else print)
    print(f"seed {report.seed}: {report.about}")
    _tell(_sums([_plain(report, time.process_time() - began_s)]), 1, 0.0)
    if report.violation is None:
        print(f"trace {report.trace_digest}")
        return 0
    _failed(_plain(report), asked)
    return 1


def _mutants(asked: argparse.Namespace) -> int:
    def tell(verdict: Verdict) -> None:
        fate = f"caught by {verdict.rule}" if verdict.rule else "SURVIVES"
        wrong = "" if verdict.caught else f": {verdict.what[-400:]}"
        where = f"{verdict.seeds} seeds ({verdict.mutant.where.__name__}), {verdict.rounds} rounds, in seed {verdict.seed}"
        print(f"{verdict.mutant.name}: {fate} after {where}{wrong}", flush=True)

    verdicts = try_all(asked.mutants, asked.jobs, tell)
    missed = [verdict.mutant.name for verdict in verdicts if not verdict.caught]
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} mutants caught, by {len({v.rule for v in verdicts if v.caught})} rules")
    if missed:
        print(f"error: simulate: not caught: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _work(asked: argparse.Namespace) -> int:
    """One worker: every jobs-th seed, a line of JSON for each, until its standard input closes."""
    seed = asked.first + asked.worker
    os.set_blocking(0, False)
    while not _closed():
        began_s = time.process_time()
        report = simulate(_scenario(asked, seed))
        print(json.dumps(_plain(report, time.process_time() - began_s)), flush=True)
        seed += asked.jobs
    return 0


def _closed() -> bool:
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


def _many(asked: argparse.Namespace) -> int:
    first = asked.first or int(time.time()) * 1000
    began = time.monotonic()
    print(f"simulating from seed {first}, commit {commit()}, {asked.jobs} processes", flush=True)
    disks = TemporaryDirectory(prefix="cosilo-simulations-", dir=memory())
    workers = [_start(asked, first, number, disks.name) for number in range(asked.jobs)]
    reports: list[dict[str, Any]] = []
    failed: dict[str, Any] | None = None
    try:
        while failed is None and (not asked.rounds or _rounds(reports) < asked.rounds) and time.monotonic() - began < asked.seconds:
            report = _next(workers)
            if report is None:
                print("error: simulate: a worker ended by itself; see its words above", file=sys.stderr)
                return 1
            reports.append(report)
            failed = report if report["violation"] else None
            if len(reports) % 20 == 0:
                print(f"{len(reports)} seeds, {_rounds(reports)} rounds, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        disks.cleanup()  # a killed worker leaves its simulation's
    elapsed_s = time.monotonic() - began
    _tell(_sums(reports), len(reports), elapsed_s)
    if failed is not None:
        _failed(failed, asked)
        return 1
    if asked.rounds and _rounds(reports) < asked.rounds:
        print(f"error: simulate: {_rounds(reports)} rounds of {asked.rounds} in {asked.seconds:.0f} s", file=sys.stderr)
        return 1
    return 0


def _start(asked: argparse.Namespace, first: int, number: int, disks: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.simulation", "--worker", str(number), "--first", str(first), "--jobs", str(asked.jobs)]
    command += ["--lies"] * asked.lies
    there = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": disks}
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=there)


def _next(workers: list[subprocess.Popen[bytes]]) -> dict[str, Any] | None:
    """The next line of whichever worker has one; None once one of them has ended."""
    import selectors

    with selectors.DefaultSelector() as waiting:
        for worker in workers:
            assert worker.stdout is not None
            waiting.register(worker.stdout, selectors.EVENT_READ, worker)
        for key, _ in waiting.select():
            line = key.data.stdout.readline()
            return json.loads(line) if line else None
    return None


def _plain(report: Report, cpu_s: float = 0.0) -> dict[str, Any]:
    return {
        "cpu_s": cpu_s,
        "seed": report.seed,
        "about": report.about,
        "simulated_s": report.simulated_s,
        "events": report.events,
        "messages": report.messages,
        "points": report.points,
        "counts": report.counts,
        "faults": report.faults,
        "violation": None if report.violation is None else str(report.violation),
    }


def _sums(reports: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(r[name] for r in reports) for name in ("cpu_s", "simulated_s", "events", "messages", "points")}
    for name in ("counts", "faults"):
        total[name] = sum((Counter(r[name]) for r in reports), Counter())
    return total


def _rounds(reports: list[dict[str, Any]]) -> int:
    return sum(r["counts"].get("rounds closed", 0) + r["counts"].get("rounds abandoned", 0) for r in reports)


def _tell(total: dict[str, Any], seeds: int, elapsed_s: float) -> None:
    counts, faults = total["counts"], total["faults"]
    closed, abandoned = counts["rounds closed"], counts["rounds abandoned"]
    speed = f", {(closed + abandoned) / elapsed_s:.1f} a second" if elapsed_s else ""
    speed += f", {(closed + abandoned) / total['cpu_s']:.1f} a CPU-second"
    print(
        f"{seeds} seeds, {closed + abandoned} rounds ({closed} closed, {abandoned} abandoned){speed}, "
        f"{total['simulated_s'] / 3600:.1f} simulated hours"
    )
    print(
        f"{total['events']} events, {total['messages']} messages, {total['points']} points of death, {counts['sums opened']} sums checked"
    )
    print(f"{sum(faults.values())} faults")
    for name, count in sorted(faults.items(), key=lambda each: (-each[1], each[0])):
        print(f"  {count:8} {name}")


def _failed(report: dict[str, Any], asked: argparse.Namespace) -> None:
    again = f"--seed {report['seed']}" + (f" --sites {asked.sites}" if asked.sites else "") + (" --lies" if asked.lies else "")
    print(f"\nFAILED seed {report['seed']} ({report['about']}), commit {commit()}\n{report['violation']}")
    print(f'again: make simulate SIM_ARGS="{again}"')


def commit() -> str:
    """The commit that is simulated, and whether the tree differs from it."""
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return (found.stdout.strip() or "unknown") + (" with changes" if changed.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
