"""How long people and rounds wait for processes to start: `cosilo --help`, each daemon to ready, the first byte of a round.

    python -m bench.startup

The yardstick of a process is a bare interpreter that imports grpc, which both daemons need; of a round's first byte, one call that asks the
coordinator for the list of runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import Figure, table
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import wait_until

REPEAT = 3
PATIENCE_S = 60.0


def measure(quick: bool = False) -> Iterator[Figure]:
    """Each the best of a few."""
    repeat = 1 if quick else REPEAT
    bare_s = _best(lambda: _run(sys.executable, "-c", "import grpc.aio"), repeat)
    yard = ("an interpreter that imports grpc, s", bare_s)
    cosilo = str(Path(sys.executable).with_name("cosilo"))
    yield Figure("startup.cosilo-help", _best(lambda: _run(cosilo, "--help"), repeat), "s", *yard)
    with tempfile.TemporaryDirectory(prefix="cosilo-bench-") as folder:
        root = Path(folder)
        with LocalFederation(root, digits_sites(root, 1, alpha=100.0, least=10, seed=1)) as federation:
            federation.start()
            site = next(iter(federation.sites))
            yield Figure("startup.site-ready", _best(lambda: _restart(federation, site), repeat), "s", *yard)
            yield Figure("startup.coordinator-ready", _best(lambda: _restart(federation, COORDINATOR), repeat), "s", *yard)
            federation.wait_ready(site)
            run = federation.create_run({"name": "startup", "preset": "digits", "n_min": 1})
            federation.accept_all(run)
            call_s = _best(lambda: float(bool(federation.cosilo_json("run", "list"))), 1)
            federation.run_rounds(run, 1, "--rehearsal")
            yield Figure(
                "startup.first-byte-of-a-round",
                _first_byte_s(federation, run, site),
                "s",
                "`cosilo run list`, s",
                call_s,
            )


def _first_byte_s(federation: LocalFederation, run: str, site: str) -> float:
    """From `cosilo round start` being typed to the site's cache having a byte of the weights."""
    cache = federation.state(site) / "artifacts"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}

    def came() -> bool:
        return any(path.is_file() and before.get(path) != path.stat().st_mtime_ns for path in cache.rglob("*"))

    began_s = time.perf_counter()
    federation.start_rounds(run, 1, "--rehearsal")
    wait_until(came, "the round's first byte is there", PATIENCE_S, poll_s=0.002)
    taken_s = time.perf_counter() - began_s
    federation.wait_idle(run)
    return taken_s


def _restart(federation: LocalFederation, who: str) -> None:
    federation.daemon(who).stop()
    federation.restart(who)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _best(work: Callable[[], object], repeat: int) -> float:
    taken = []
    for _ in range(repeat):
        began_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(table(measure()))


if __name__ == "__main__":
    main()
