"""A federation that can be broken: every site behind a relay of its own, everybody started again as systemd would, and what must hold after.

Owns the four sites' links and the evidence: the coordinator's store, the sites' ledgers, logs, processes and spool folders. Must not know which
fault was injected, nor when.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from cosilo_server.rounds.state import Phase
from tests.federation.digits import digits_sites
from tests.federation.faults import SITES, trainer_of
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError, wait_until
from tests.federation.relay import Relay

TIDY_S: Final = 30.0  # after a round ended: sites hear of it and forget, trainers of killed daemons end
BATCH, STEPS = 32, 2
IMAGES: Final = BATCH * STEPS  # that a site trains on in a round: each has more than that many
# Nobody is late in a round that waits for a killed daemon and its cold trainer, on a machine that others share.
PATIENT: Final = {f"{what}_s": 120.0 for what in ("gather", "training", "sharing", "uploading", "consenting", "revealing")}
SMALL: Final = {"block_out_channels": [8, 16], "norm_num_groups": 4}
LARGE: Final = {"block_out_channels": [64, 128], "norm_num_groups": 8}  # some 10 MiB: two windows, and ten chunks


def plan(name: str, seed: int, architecture: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A run file whose rounds are as quick as training can be. seed: another for each pair of runs (R8)."""
    return {
        "name": name,
        "preset": "digits",
        "architecture": architecture,
        "training": {"local_epochs": 1, "batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3, "seed": seed},
        "encoding": {"clip": 1.0, "cap": 1024},
        "deadlines": PATIENT,
        **more,
    }


class BreakableFederation(LocalFederation):
    """Four sites, each behind a relay; they look for the coordinator again within a second."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, digits_sites(root, SITES, alpha=0.5, least=200, seed=1), typed=False)
        self.relays: dict[str, Relay] = {}

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, value, trace)
        for relay in self.relays.values():
            relay.close()

    def enrol(self, site: str) -> None:
        super().enrol(site)
        with self.config(site).open("a", encoding="utf-8") as file:
            file.write("\n[network]\nbackoff_min_s = 0.2\nbackoff_max_s = 1.0\n")
        membership = self.state(site) / "identity" / "federation.json"
        known = json.loads(membership.read_text(encoding="utf-8"))
        self.relays[site] = Relay(known["address"])
        membership.write_text(json.dumps({**known, "address": self.relays[site].address}), encoding="utf-8")

    def bring_back(self, everybody: Sequence[str]) -> None:
        """Starts whoever is down, the coordinator first, all at once as init systems do, and waits until each is ready."""
        down = [who for who in everybody if not self.daemon(who).alive]
        for who in sorted(down, key=lambda who: who != COORDINATOR):
            self.start_again(who)
        for who in down:
            self.wait_ready(who)

    def wait_connected(self) -> None:
        """Returns once the coordinator counts every site."""
        wait_until(lambda: self.metric(COORDINATOR, "cosilo_sites_connected") >= len(self.sites), "every site is connected", TIDY_S * 2)

    # --- evidence ---

    def trained(self, site: str, run: str, number: int) -> int:
        """How often a site's log says that it trained in a round."""
        wanted = f"{run[:12]}/{number}"
        lines = (json.loads(line) for line in self.log(site).splitlines() if line.startswith("{") and wanted in line)
        return sum(line["event"] == "trained" and line["round"] == wanted for line in lines)

    def counted_uploads(self, run: str, number: int) -> Counter[tuple[str, int]]:
        """How often the coordinator's store says that it took an upload, by site and attempt."""
        asked = "SELECT site, attempt FROM events WHERE run = ? AND number = ? AND what = 'UploadReceived'"
        with reading(self.data / "state.db") as database:
            return Counter((str(site), int(attempt)) for site, attempt in database.execute(asked, (bytes.fromhex(run), number)))

    def ledger_round(self, site: str, run: str, number: int) -> tuple[str, int] | None:
        """(state, highest attempt) of a round in a site's ledger."""
        asked = "SELECT state, attempt FROM rounds WHERE run = ? AND round = ?"
        with reading(self.state(site) / "state.db") as database:
            row = database.execute(asked, (bytes.fromhex(run), number)).fetchone()
        return None if row is None else (str(row[0]), int(row[1]))

    def forget_weights(self) -> None:
        """Empties every site's cache, so that each fetches what its next round needs. Between rounds nothing of it is in use."""
        for site in self.sites:
            for artifact in (self.state(site) / "artifacts").iterdir():
                artifact.unlink()

    def wait_told(self, run: str, number: int) -> None:
        """Returns when every site has heard that a round is over: one that was cut off hears it when it is back. Raises FederationError."""

        def all_heard() -> bool:
            return all((self.ledger_round(site, run, number) or ("", 0))[0] not in ("", "open") for site in self.sites)

        wait_until(all_heard, f"every site has heard of the end of round {number}", TIDY_S)

    def consents(self, site: str, run: str, number: int) -> list[tuple[int, list[str]]]:
        """(attempt, survivors) of what a site signed in a round: one or none (R5)."""
        asked = "SELECT attempt, survivors FROM consents WHERE run = ? AND round = ?"
        with reading(self.state(site) / "state.db") as database:
            return [(int(attempt), str(names).split()) for attempt, names in database.execute(asked, (bytes.fromhex(run), number))]

    def images(self) -> dict[str, float]:
        """Images that each site's daemon has trained on in its life."""
        return {site: self.metric(site, "cosilo_images_total") for site in self.sites}

    def left_behind(self) -> list[str]:
        """Processes without a daemon, uploads of rounds that are over, files half received or half made."""
        found = [f"process {child.pid} of a dead {who}" for who in (COORDINATOR, *self.sites) for child in self._orphans(who)]
        found += [str(path) for path in (self.data / "spool").glob("*/*")]
        found += [str(path) for path in (self.data / "artifacts" / "scratch").glob("*")]
        for site in self.sites:
            found += [str(path) for path in (self.state(site) / "rounds").glob("*/*")]
            # Not those of the cache: a fetch that was given up goes on from there one day, and the cache's limit counts it.
            found += [str(path) for path in self.state(site).rglob("*.part") if path.parent.name != "artifacts"]
            found += [str(path) for path in self.state(site).rglob("trainer-*.sock") if trainer_of(self, site) is None]
        return found

    def wait_tidy(self) -> None:
        """Raises FederationError, naming what is left, where a round's end leaves anything for longer than TIDY_S."""
        try:
            wait_until(lambda: not self.left_behind(), "nothing is left behind", TIDY_S, poll_s=0.2)
        except FederationError:
            raise FederationError(f"left behind: {', '.join(self.left_behind())}", self.log_files()) from None

    def _orphans(self, who: str) -> list[psutil.Process]:
        daemon = self.daemon(who)
        return [child for child in daemon.offspring() if not _descends(child, daemon.pid)]


def check_round(
    federation: BreakableFederation, run: str, entry: dict[str, Any], expected: dict[str, Any], retrained: Sequence[str]
) -> None:
    """What must hold of a disturbed round with an equal cohort; raises FederationError with every way in which it does not.

    expected: the same round of the run that was left alone. retrained: sites that may have trained twice, for they or their trainers died
    before what was trained was on the disk.
    """
    number, everybody = entry["round"], sorted(federation.sites)
    wrong = [
        f"{key} is {entry[key]}, undisturbed {expected[key]}"
        for key in ("phase", "invited", "survivors", "base", "checkpoint")
        if entry[key] != expected[key]
    ]
    uploads = federation.counted_uploads(run, number)
    wrong += [f"{site}'s update was counted {n} times in attempt {attempt}" for (site, attempt), n in uploads.items() if n != 1]
    wrong += [
        f"{site}'s update is in the sum and was never taken" for site in entry["survivors"] if (site, entry["attempt"]) not in uploads
    ]
    for site in everybody:
        trained = federation.trained(site, run, number)
        if not 1 <= trained <= 1 + (site in retrained):
            wrong.append(f"{site} trained {trained} times")
        if (there := federation.ledger_round(site, run, number)) != ("closed", entry["attempt"]):
            wrong.append(f"{site}'s ledger says {there} of attempt {entry['attempt']}")
        consented = federation.consents(site, run, number)
        if consented not in ([], [(entry["attempt"], entry["survivors"])]):
            wrong.append(f"{site} consented to {consented}")
    if wrong:
        raise FederationError(f"round {number}: {'; '.join(wrong)}", federation.log_files())


def closed_with_all(federation: BreakableFederation, rounds: Sequence[dict[str, Any]]) -> None:
    """Raises FederationError unless all rounds closed at the first attempt with every site."""
    for entry in rounds:
        if (entry["phase"], entry["attempt"], entry["survivors"]) != (Phase.CLOSED, 1, sorted(federation.sites)):
            raise FederationError(
                f"undisturbed round {entry['round']} is {entry['phase']} with {entry['survivors']}", federation.log_files()
            )


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A database that a daemon has open, for looking only."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        yield database


def _descends(process: psutil.Process, pid: int) -> bool:
    try:
        return any(parent.pid == pid for parent in process.parents())
    except psutil.NoSuchProcess:
        return True  # gone meanwhile
