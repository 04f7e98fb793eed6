"""`python -m tests.system.soak`: a federation lives through hundreds of rounds, and nothing in it may grow.

A real coordinator and four real sites work off rehearsals with a training round now and then, while two of the sites go and come by seed:
SIGTERM or SIGKILL, away for a moment, started again. Every few rounds each process is measured (anonymous memory, open files, threads), and each
data folder. A process's slope is taken by least squares over the second half, over all of its lives together and each about its own mean, so
that a fresh start is no growth. The exit code is 1 where a slope exceeds its bound. Knows processes and folders; nothing of what is trained.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil

from bench.yardsticks import anonymous_bytes
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_server.cli.commands import Seat
from cosilo_server.cli.connection import connect
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError

SITES: Final = 4
TRAIN_EVERY: Final = 5  # one round in five trains, so that there are checkpoints to retire
CHAOS_ROUNDS: Final = (4, 9)  # rounds between two disturbances: most rounds have everybody, some lack one
AWAY_S: Final = (0.0, 3.0)
STUCK_S: Final = 300.0  # without a closed round: every deadline of the run is far shorter
LOOK_S: Final = 0.25
SETTLED_S: Final = 10.0  # a process that is younger still imports

MIB: Final = 1 << 20
KEEP_LAST: Final = 3
KEEP_EVERY: Final = 100  # of 20 checkpoints in a hundred rounds one stays for good
LONG_LIFE: Final = 4  # a quarter
LIVES_MIN: Final = 4
CACHE_GIB: Final = 1 / 1024  # a site's cache: room for a few of the tiny model's weights, so that its limit is met


@dataclass(frozen=True)
class Bound:
    """What a figure may grow by per 100 rounds, and a growth over the window that is noise whatever its slope."""

    per_100_rounds: float
    noise: float


# Of a process: an allocator's rest, a late import; not what it maps of files, whose share grows when another that maps them ends.
# Of a folder: the site's ledger keeps every round, the coordinator's database a row of it.
BOUNDS: Final[Mapping[str, Bound]] = {
    "anonymous_bytes": Bound(2 * MIB, 6 * MIB),
    "files": Bound(1.0, 3.0),
    "threads": Bound(1.0, 3.0),
    "database_bytes": Bound(1 * MIB, MIB // 4),
    "log_bytes": Bound(1 * MIB, 5 * MIB),  # SQLite's write-ahead log ends at a thousand pages, which is 4 MiB, and begins again
    "folder_bytes": Bound(1 * MIB, 2 * MIB),
}


@dataclass(frozen=True)
class Sample:
    """One figure at one time. life: of which process, "" for a folder; at_round: rounds closed by then."""

    who: str
    what: str
    life: str
    at_round: int
    value: float


@dataclass(frozen=True)
class Growth:
    """A figure's slope in the second half. ok: within its bound."""

    who: str
    what: str
    last: float
    per_100_rounds: float
    ok: bool


@dataclass
class Soak:
    """What was seen. round_s: seconds from one closed round to the next."""

    samples: list[Sample] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    disturbed: int = 0


def slope(groups: Iterable[list[tuple[float, float]]]) -> float:
    """Least squares over several groups of (x, y) with one slope and a level of each group's own; 0 where nothing is left to fit."""
    upper = lower = 0.0
    for points in groups:
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        upper += sum((x - mean_x) * (y - mean_y) for x, y in points)
        lower += sum((x - mean_x) ** 2 for x, _ in points)
    return upper / lower if lower else 0.0


def growths(samples: Iterable[Sample], rounds: int) -> list[Growth]:
    """Every figure's slope over the second half of the rounds, against its bound."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample.at_round >= rounds / 2:
            found[sample.who, sample.what][sample.life].append((sample.at_round, sample.value))
    result = []
    for (who, what), lives in sorted(found.items()):
        lives = _comparable(lives)
        if not lives:
            continue
        a_round, bound = slope(lives.values()), BOUNDS[what]
        window = max(points[-1][0] - points[0][0] for points in lives.values())
        ok = 100 * a_round <= bound.per_100_rounds or a_round * window <= bound.noise
        result.append(Growth(who, what, list(lives.values())[-1][-1][1], 100 * a_round, ok))
    return result


def _comparable(lives: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Lives of a quarter of the window or more; where all are shorter, the end of each, as one series: a start that warms up is no growth."""
    points = [point for life in lives.values() for point in life]
    window = max(x for x, _ in points) - min(x for x, _ in points)
    long = {life: seen for life, seen in lives.items() if seen[-1][0] - seen[0][0] >= window / LONG_LIFE}
    if long:
        return long
    ends = [seen[-1] for seen in lives.values()]
    return {"ends": ends} if len(ends) >= LIVES_MIN else {}


class Soaked:
    """The federation under measurement."""

    def __init__(self, federation: LocalFederation, run: str, chance: random.Random) -> None:
        self._federation = federation
        self._run = run
        self._chance = chance
        self._goers = sorted(federation.sites)[-2:]
        self._away: tuple[str, float] | None = None
        self.seen = Soak()

    def order(self, rounds: int) -> None:
        """Asks for all the rounds at once: some rehearsals, then one of training, and so on."""
        with connect(Seat(self._federation.folder / "admin")) as coordinator:
            for start in range(0, rounds, TRAIN_EVERY):
                batch = min(TRAIN_EVERY, rounds - start)
                train = int(batch == TRAIN_EVERY)
                for kind, count in ((site_pb2.ROUND_KIND_REHEARSAL, batch - train), (site_pb2.ROUND_KIND_TRAIN, train)):
                    if count:
                        question = admin_pb2.StartRoundsRequest(run=bytes.fromhex(self._run), rounds=count, kind=kind)
                        coordinator.ask("start rounds", coordinator.admin.StartRounds, question)

    def watch(self, rounds: int, every: int) -> None:
        """Until so many have closed: measures, and sends sites away and back. Raises FederationError where nothing closes any more."""
        done, moved_at, next_disturbance = 0, time.monotonic(), self._chance.randint(*CHAOS_ROUNDS)
        while done < rounds:
            closed = self.closed()
            if closed > done:
                now = time.monotonic()
                self.seen.round_s += [(now - moved_at) / (closed - done)] * (closed - done)
                if done // every != closed // every:
                    self.measure(closed)
                    print(self._line(closed), flush=True)
                done, moved_at = closed, now
            if time.monotonic() - moved_at > STUCK_S:
                raise FederationError(f"no round has closed for {STUCK_S:.0f} s after {done}", self._federation.log_files())
            self._bring_back()
            if done >= next_disturbance and self._away is None:
                self._send_away()
                next_disturbance = done + self._chance.randint(*CHAOS_ROUNDS)
            time.sleep(LOOK_S)
        self.measure(done)

    def closed(self) -> int:
        """Rounds that have closed since the coordinator started."""
        return int(self._federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed"))

    def measure(self, at_round: int) -> None:
        """One sample of everything."""
        federation = self._federation
        for who in (COORDINATOR, *federation.sites):
            daemon = federation.daemon(who)
            processes = [(who, psutil.Process(daemon.pid))] if daemon.alive else []
            processes += [(f"{who} {'trainer' if who != COORDINATOR else 'worker'}", child) for child in daemon.offspring()]
            for name, process in processes:
                self._measure_process(name, process, at_round)
            folder = federation.data if who == COORDINATOR else federation.state(who)
            files = [path for path in folder.rglob("*") if path.is_file()]
            sizes = {path: _size(path) for path in files}
            database = sizes.pop(folder / "state.db", 0)
            log = sizes.pop(folder / "state.db-wal", 0)
            self._note(who, "database_bytes", "", at_round, database)
            self._note(who, "log_bytes", "", at_round, log)
            self._note(who, "folder_bytes", "", at_round, sum(sizes.values()))

    def _measure_process(self, name: str, process: psutil.Process, at_round: int) -> None:
        try:
            if time.time() - process.create_time() < SETTLED_S:
                return
            life = f"{process.pid}-{process.create_time()}"
            figures = {"files": process.num_fds(), "threads": process.num_threads(), "anonymous_bytes": anonymous_bytes(process.pid)}
        except (psutil.Error, OSError, RuntimeError):  # gone between being found and being measured
            return
        for what, value in figures.items():
            self._note(name, what, life, at_round, value)

    def _note(self, who: str, what: str, life: str, at_round: int, value: float) -> None:
        self.seen.samples.append(Sample(who, what, life, at_round, value))

    def _send_away(self) -> None:
        site = self._chance.choice(self._goers)
        if self._chance.random() < 0.5:
            self._federation.kill(site)
        self._federation.daemon(site).stop()  # what was killed may have left a trainer
        self._away = site, time.monotonic() + self._chance.uniform(*AWAY_S)
        self.seen.disturbed += 1

    def _bring_back(self) -> None:
        if self._away is not None and time.monotonic() >= self._away[1]:
            self._federation.daemon(self._away[0]).start()
            self._away = None

    def all_back(self) -> None:
        """Returns when whoever is away at the end is back."""
        if self._away is not None:
            site, self._away = self._away[0], None
            self._federation.daemon(site).start()
            self._federation.wait_ready(site)

    def _line(self, closed: int) -> str:
        latest = {(s.who, s.what): s.value for s in self.seen.samples if s.at_round == closed}
        megabytes = {key: value / MIB for key, value in latest.items()}
        recent = sorted(self.seen.round_s[-20:])
        return (
            f"round {closed}: {recent[len(recent) // 2]:.2f} s a round; coordinator {megabytes.get((COORDINATOR, 'anonymous_bytes'), 0):.1f} MiB, "
            f"{latest.get((COORDINATOR, 'files'), 0):.0f} files, database {megabytes[COORDINATOR, 'database_bytes']:.2f} MiB, "
            f"folder {megabytes[COORDINATOR, 'folder_bytes']:.1f} MiB"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed while the folder was read
        return 0


def run_soak(root: Path, rounds: int, every: int, seed: int) -> tuple[Soak, list[Growth]]:
    """A federation under `root` for so many rounds. Raises FederationError where it stops moving or a daemon ends by itself."""
    chance = random.Random(seed)
    sites = [replace(spec, cache={"limit_gib": CACHE_GIB}) for spec in digits_sites(root, SITES, alpha=0.5, least=200, seed=seed)]
    with LocalFederation(root, sites) as federation:
        federation.initialise()
        with federation.config(COORDINATOR).open("a", encoding="utf-8") as config:
            config.write(f"\n[retention]\nkeep_last = {KEEP_LAST}\nkeep_every = {KEEP_EVERY}\n")
        federation.start_coordinator()
        for name in federation.sites:
            federation.enrol(name)
            federation.daemon(name).start()
        for name in federation.sites:
            federation.wait_ready(name)
        run = federation.create_run(_PLAN)
        federation.accept_all(run)
        soaked = Soaked(federation, run, chance)
        soaked.order(rounds)
        with suppress(KeyboardInterrupt):  # what was seen until then is reported
            soaked.watch(rounds, every)
        soaked.all_back()
        federation.check_alive()
    return soaked.seen, growths(soaked.seen.samples, len(soaked.seen.round_s))


_PLAN: Final[dict[str, Any]] = {
    "name": "soak",
    "preset": "digits",
    "rounds_max": 100_000,
    "n_min": 3,
    "f": 1,
    "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
    "training": {"local_epochs": 100, "batch_size": 16, "max_steps": 2},
    "deadlines": {
        "gather_s": 10.0,
        "training_s": 60.0,  # a trainer starts cold after its site was away, and imports torch on a busy machine
        "sharing_s": 6.0,
        "uploading_s": 6.0,
        "consenting_s": 6.0,
        "revealing_s": 6.0,
    },
}


def report(seen: Soak, found: list[Growth]) -> str:
    """For people: one line a figure, then the times."""
    lines = [f"{'WHO':<22} {'FIGURE':<16} {'LAST':>10} {'PER 100 ROUNDS':>15}"]
    for growth in found:
        unit, scale = (" MiB", MIB) if growth.what.endswith("_bytes") else ("", 1)
        verdict = "" if growth.ok else "  GROWS"
        lines.append(
            f"{growth.who:<22} {growth.what:<16} {growth.last / scale:>8.2f}{unit:<4} {growth.per_100_rounds / scale:>+9.3f}{unit:<4}{verdict}"
        )
    times = sorted(seen.round_s)
    lines.append(
        f"{len(times)} rounds closed, {seen.disturbed} times a site was sent away; seconds a round: median {times[len(times) // 2]:.2f}, "
        f"fastest tenth {times[len(times) // 10]:.2f}, slowest tenth {times[-1 - len(times) // 10]:.2f}"
    )
    return "\n".join(lines)


def main() -> int:
    """Exit code 0 where nothing grew, 1 where something did or the federation failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.soak", description="Hundreds of rounds; nothing may grow.")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--every", type=int, default=5, help="rounds between two samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="kept; otherwise a temporary one")
    parser.add_argument("--json", type=Path, help="where the samples are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch) / "soak"
        root.mkdir(parents=True, exist_ok=True)
        try:
            seen, found = run_soak(root, options.rounds, options.every, options.seed)
        except FederationError as error:
            print(f"error: soak, seed {options.seed}: {error}", file=sys.stderr)
            return 1
    print(report(seen, found))
    if options.json:
        document = {"growths": [asdict(growth) for growth in found], "samples": [asdict(s) for s in seen.samples], "round_s": seen.round_s}
        options.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return 0 if all(growth.ok for growth in found) else 1


if __name__ == "__main__":
    sys.exit(main())
