"""A whole federation on one machine: the coordinator and its sites as real processes, through the commands that people type.

Owns the folders, the configuration files and the processes of one federation. Must not know what is trained, nor look into any
process: it types commands, reads what the daemons publish (endpoints.json, metrics, health), and kills. Usage:

    with LocalFederation(folder, [SiteSpec("site-a", {"kind": "digits", "index_file": "..."}), ...]) as federation:
        federation.start()
        run = federation.create_run({"name": "digits", "preset": "digits"})
        federation.accept_all(run)
        federation.run_rounds(run, 3)
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from cosilo_common.errors import CosiloError
from cosilo_common.manifest import PLAIN_AGGREGATION
from cosilo_server.cli.commands import Seat
from cosilo_server.cli.connection import connect
from cosilo_server.cli.follow import snapshots
from cosilo_server.cli.watching import Snapshot
from cosilo_server.enrolment import ATTEMPTS_MAX, ATTEMPTS_WINDOW_S
from tests.federation.calling import call_command
from tests.federation.processes import Daemon, FederationError, run_command, wait_until
from tests.federation.toml_files import Toml, to_toml

COORDINATOR = "coordinator"
START_TIMEOUT_S = 60.0  # four sites that import their libraries at once on two busy cores take about ten
IDLE_TIMEOUT_S = 600.0  # rounds asked for in a test or demo; a stuck round is abandoned by its own deadlines before
HTTP_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1:0"  # the daemon takes a free port and says which in endpoints.json


@dataclass(frozen=True)
class SiteSpec:
    """One site to be: its name, and the tables of its TOML."""

    name: str
    data: Mapping[str, Toml]
    policy: Mapping[str, Toml] = field(default_factory=dict)
    cache: Mapping[str, Toml] = field(default_factory=dict)
    trainer: Mapping[str, Toml] = field(default_factory=lambda: {"device": "cpu", "threads": 1})
    evaluation: Mapping[str, Toml] = field(default_factory=dict)


class LocalFederation:
    """The processes and folders of one federation.

    root: an empty or absent folder of its own; sites: in the order in which they are enrolled; local_demo: invitations are
    pre-approved, so that nobody runs `site approve`; page: the coordinator serves its status page; typed: each command is a
    process, as a person's is, and else a call in this one (`calling`). Raises FederationError, with the tails of the logs,
    where a step fails.
    """

    def __init__(
        self,
        root: Path,
        sites: Sequence[SiteSpec],
        *,
        name: str = "local",
        threads: int = 1,
        local_demo: bool = True,
        page: bool = False,
        typed: bool = True,
    ) -> None:
        self.root = root
        self.name = name
        self.sites = {spec.name: spec for spec in sites}
        self.folder = root / "federation"  # what `cosilo init` makes
        self.logs = root / "logs"
        self._local_demo = local_demo
        self._page = page
        self._typed = typed
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._daemons: dict[str, Daemon] = {}
        atexit.register(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # --- a federation's life ---

    def start(self) -> None:
        """Everything up to sites that are members and connected."""
        self.initialise()
        self.start_coordinator()
        for count, name in enumerate(self.sites):
            if count and count % ATTEMPTS_MAX == 0:
                time.sleep(ATTEMPTS_WINDOW_S)  # all of them come from one address, which the coordinator lets try so often
            self.enrol(name)
            self.daemon(name).start()
        for name in self.sites:
            self.wait_ready(name)

    def initialise(self) -> None:
        """`cosilo init`, with every port left to the system."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.cosilo("init", str(self.folder), "--federation", self.name, "--address", LOOPBACK, "--enrolment-address", LOOPBACK)
        self.leave_ports_to_the_system()

    def leave_ports_to_the_system(self) -> None:
        """In coordinator.toml, whoever made it."""
        ports = ("federation", "enrolment", "metrics", *(["page"] if self._page else []))
        self._write_ports(dict.fromkeys(ports, LOOPBACK))

    def start_coordinator(self) -> None:
        """Starts it; the ports it got the first time are then its own for good, so that a restart is found where it was."""
        self._start_and_wait(COORDINATOR)
        endpoints = self.endpoints(COORDINATOR)
        self._write_ports(endpoints)
        admin = self.folder / "admin" / "admin.toml"
        addresses = {"address": endpoints["federation"], "enrolment_address": endpoints["enrolment"]}
        text = admin.read_text(encoding="utf-8")
        for key, address in addresses.items():
            text = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{address}"', text)
        admin.write_text(text, encoding="utf-8")

    def enrol(self, site: str) -> None:
        """Invites a site, enrols it and, unless the invitation was pre-approved, approves it."""
        spec = self.sites[site]
        self.state(site).mkdir(parents=True, exist_ok=True)
        tables: dict[str, Toml] = {
            "state": str(self.state(site)),
            "metrics": {"listen": LOOPBACK},
            "data": dict(spec.data),
            "trainer": dict(spec.trainer),
            "policy": dict(spec.policy),
            "cache": dict(spec.cache),
            "evaluation": dict(spec.evaluation),
        }
        self.config(site).write_text(to_toml(tables), encoding="utf-8")
        invitation = self.root / site / "invitation"
        self.cosilo("site", "invite", site, "--out", str(invitation), *(["--local-demo"] if self._local_demo else []))
        self.site_command(site, "enrol", str(invitation))
        if not self._local_demo:
            self.cosilo("site", "approve", site, "--yes")

    def daemon(self, who: str) -> Daemon:
        """The process of a site, or of the coordinator; made at first use, started by nobody yet."""
        if who not in self._daemons:
            program = "cosilo-coordinator" if who == COORDINATOR else "cosilo-site"
            config = ["--config", str(self.config(who))]
            command = [_script(program), "serve", *config] if who == COORDINATOR else [_script(program), *config, "serve"]
            self._daemons[who] = Daemon(who, command, self.logs / f"{who}.log", self._environment)
        return self._daemons[who]

    def serve_by(self, who: str, line: str, folder: Path) -> None:
        """Takes a person's own line of shell, typed in a folder, for the command of a daemon that nobody has started."""
        command = ["/bin/sh", "-c", f'cd "$0" && exec {line}', str(folder)]
        self._daemons[who] = Daemon(who, command, self.logs / f"{who}.log", {**self._environment, "PATH": _path_with_commands()})

    def kill(self, who: str) -> None:
        """SIGKILL, as a power cut would be."""
        self.daemon(who).kill()

    def check_alive(self) -> None:
        """Raises FederationError if a daemon that was started has ended, though nobody stopped it here."""
        for who, daemon in self._daemons.items():
            if daemon.exit_code is not None:
                raise FederationError(f"{who} ended with {daemon.exit_code}", [daemon.log])

    def restart(self, who: str) -> None:
        """Starts again what was killed or stopped, and waits until it is ready."""
        self._start_and_wait(who)

    def start_again(self, who: str) -> None:
        """`restart` without the waiting."""
        self._endpoints_file(who).unlink(missing_ok=True)
        self.daemon(who).start()

    def stop(self) -> None:
        """Ends every process, sites first, so that they do not spend their last seconds looking for the coordinator."""
        for who in sorted(self._daemons, key=lambda who: who == COORDINATOR):
            self._daemons[who].stop()
        atexit.unregister(self.stop)

    # --- what an admin and the people at the sites type ---

    def cosilo(self, *arguments: str, timeout_s: float | None = None) -> str:
        """`cosilo ...` as this federation's admin; returns its standard output. timeout_s: it is a process then, and ends by itself or not."""
        admin = [] if arguments[0] == "init" else ["--admin", str(self.folder / "admin")]
        return self._command("cosilo", [*admin, *arguments], timeout_s)

    def cosilo_json(self, *arguments: str) -> dict[str, Any]:
        """The same with `--json`, parsed."""
        answer = json.loads(self.cosilo(*arguments, "--json"))
        if not isinstance(answer, dict):
            raise FederationError(f"cosilo {' '.join(arguments)} --json: not an object")
        return answer

    def site_command(self, site: str, *arguments: str) -> str:
        """`cosilo-site ...` at a site; returns its standard output."""
        return self._command("cosilo-site", ["--config", str(self.config(site)), *arguments])

    def create_run(self, plan: Mapping[str, Toml], *, plain: bool = False) -> str:
        """`cosilo run create` from a plan (see run.example.toml); returns the run's digest in hex. plain: without masks."""
        path = self.root / f"{plan['name']}.toml"
        path.write_text(to_toml({**plan, "aggregation": PLAIN_AGGREGATION} if plain else plan), encoding="utf-8")
        created = self.cosilo_json("run", "create", str(path), *(["--insecure-plain-sum"] if plain else []))
        return str(created["run"])

    def accept_all(self, run: str, sites: Iterable[str] | None = None) -> None:
        """`cosilo-site accept` at these sites, or at every one."""
        for site in self.sites if sites is None else sites:
            self.site_command(site, "accept", run, "--yes")

    def start_rounds(self, run: str, rounds: int, *options: str) -> None:
        """`cosilo round start`."""
        self.cosilo("round", "start", run, "--rounds", str(rounds), *options)

    def wait_idle(self, run: str, timeout_s: float = IDLE_TIMEOUT_S) -> None:
        """Returns when no round of the run is in progress or wanted."""
        try:
            self.cosilo("run", "watch", run, "--until-idle", timeout_s=timeout_s)
        except FederationError as error:
            raise FederationError(error.what, self.log_files()) from None

    def watch(self, run: str) -> Iterator[Snapshot]:
        """What `cosilo run watch` draws from: snapshots for ever, also through a restart of the coordinator.

        Raises FederationError where the coordinator stays away.
        """
        try:
            with connect(Seat(self.folder / "admin")) as coordinator:
                yield from snapshots(coordinator, bytes.fromhex(run))
        except CosiloError as error:
            raise FederationError(str(error), self.log_files()) from None

    def run_rounds(self, run: str, rounds: int, *options: str) -> list[dict[str, Any]]:
        """Starts rounds, waits for them, and returns all the run's rounds so far."""
        self.start_rounds(run, rounds, *options)
        self.wait_idle(run)
        return self.rounds(run)

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """`cosilo round list --json`, oldest first."""
        return list(self.cosilo_json("round", "list", run)["rounds"])

    def checkpoints(self, run: str) -> list[dict[str, Any]]:
        """`cosilo checkpoint list --json`, oldest first."""
        return list(self.cosilo_json("checkpoint", "list", run)["checkpoints"])

    # --- what the daemons leave and publish ---

    def state(self, site: str) -> Path:
        """A site's state folder."""
        return self.root / site / "state"

    def config(self, who: str) -> Path:
        """The TOML of a site or of the coordinator."""
        return self.folder / COORDINATOR / "coordinator.toml" if who == COORDINATOR else self.root / who / "site.toml"

    @property
    def data(self) -> Path:
        """The coordinator's data folder."""
        return self.folder / COORDINATOR / "data"

    def artifact(self, digest: str) -> Path:
        """A file in the coordinator's store; its name is its SHA-256 in hex."""
        return self.data / "artifacts" / digest

    def endpoints(self, who: str) -> dict[str, str]:
        """host:port by purpose, as the running daemon took them."""
        return dict(json.loads(self._endpoints_file(who).read_text(encoding="utf-8")))

    def metric(self, who: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 where there is none."""
        return sum(value for sample, found, value in self.metrics(who) if sample == name and labels.items() <= found.items())

    def metrics(self, who: str) -> list[tuple[str, dict[str, str], float]]:
        """Every sample at /metrics now: (name, labels, value)."""
        families = text_string_to_metric_families(self._get(who, "/metrics")[1])
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def ready(self, who: str) -> bool:
        """Whether /readyz says so."""
        return self._endpoints_file(who).exists() and self._get(who, "/readyz")[0] == 200

    def wait_ready(self, who: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when a started daemon is ready; raises with its log where it dies first."""
        wait_until(lambda: self.ready(who), f"{who} is ready", timeout_s, [self.daemon(who)])

    def log(self, who: str) -> str:
        """Everything a daemon has said."""
        return (self.logs / f"{who}.log").read_text(encoding="utf-8", errors="replace")

    def log_files(self) -> list[Path]:
        """The daemons' logs, the coordinator's first."""
        return [daemon.log for _, daemon in sorted(self._daemons.items(), key=lambda item: item[0] != COORDINATOR)]

    # --- below the surface ---

    def _command(self, program: str, arguments: Sequence[str], timeout_s: float | None = None) -> str:
        log = self.logs / "commands.log"
        if timeout_s is None and not self._typed:
            return call_command(program, arguments, log)
        return run_command([_script(program), *arguments], log, self._environment, timeout_s or IDLE_TIMEOUT_S)

    def _start_and_wait(self, who: str) -> None:
        self._endpoints_file(who).unlink(missing_ok=True)  # an earlier process's: its port may be anybody's now
        self.daemon(who).start()
        self.wait_ready(who)

    def _endpoints_file(self, who: str) -> Path:
        return (self.data if who == COORDINATOR else self.state(who)) / "endpoints.json"

    def _get(self, who: str, path: str) -> tuple[int, str]:
        """(status, body); status 0 where nobody answers yet."""
        try:
            with urllib.request.urlopen(f"http://{self.endpoints(who)['metrics']}{path}", timeout=HTTP_TIMEOUT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError:
            return 0, ""

    def _write_ports(self, listen: Mapping[str, str]) -> None:
        """Replaces addresses in coordinator.toml's [listen] table and leaves the rest as `cosilo init` wrote it."""
        path = self.config(COORDINATOR)
        text = re.sub(r"(?m)^\[listen\]\n(?:(?!\[).*\n?)*", "", path.read_text(encoding="utf-8"))
        path.write_text(text.rstrip("\n") + "\n\n" + to_toml({"listen": dict(listen)}), encoding="utf-8")


def _path_with_commands() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


def _script(name: str) -> str:
    """A command of this environment's own, whatever PATH says."""
    return str(Path(sys.executable).parent / name)
