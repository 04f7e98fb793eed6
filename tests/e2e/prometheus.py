"""`make e2e-prometheus`: the shipped configuration, rules and dashboard against a real Prometheus that scrapes a real federation.

promtool reads what is shipped and runs the rules' own tests; then four sites and a coordinator run two masked rounds, and Prometheus
scrapes all five with the shipped configuration (only addresses, intervals and the alerts' waiting times are replaced). Every query of the
dashboard must bring data; a site is killed, and its alert fires.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tests.e2e.checklist import CheckFailed, Checklist, expect, run, wait_for
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import Daemon, tail

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "cosilo.json"
SCRAPE_S = 1  # in place of 15, so that two short rounds leave more than one sample each
PENDING_S = 5  # in place of minutes and hours, which promtool's tests hold the alerts to
START_S = 60.0
SCRAPED_S = 60.0
ROUNDS = 2
PLAN: dict[str, Any] = {
    "name": "figures",
    "preset": "digits",
    "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
    "training": {"local_epochs": 100, "batch_size": 32, "max_steps": 4},
}
# What Grafana would fill in. Every "All" is ".*"; the rate interval is at least four scrapes (Grafana's documentation, $__rate_interval).
VARIABLES = {"$__rate_interval": "1m", "$coordinator": ".*", "$site": ".*", "$run": ".*", "$datasource": "cosilo-prometheus"}
# Metrics of prometheus_client itself, and the moment at which a counter was made: no figures of ours.
NOT_OURS = re.compile(r"^(?!cosilo_)|_created$")


class Prometheus:
    """A real server on a loopback port. root: its own folder."""

    def __init__(self, root: Path, targets: Mapping[str, list[str]]) -> None:
        root.mkdir()
        self._address = f"127.0.0.1:{_free_port()}"
        text = (SHIPPED / "prometheus.yml").read_text(encoding="utf-8")
        for job, addresses in targets.items():
            text, found = re.subn(
                rf"(job_name: {job}\b.*\n\s+static_configs:\n\s+- targets: )\[.*\]", rf"\g<1>{json.dumps(addresses)}", text
            )
            expect(found == 1, f"prometheus.yml has {found} jobs named {job}")
        text = re.sub(r"(?m)^  (scrape_interval|evaluation_interval): .*$", rf"  \1: {SCRAPE_S}s", text)
        (root / "prometheus.yml").write_text(text, encoding="utf-8")
        rules = (SHIPPED / "cosilo.rules.yml").read_text(encoding="utf-8")
        (root / "cosilo.rules.yml").write_text(re.sub(r"(?m)^( +for): .*$", rf"\1: {PENDING_S}s", rules), encoding="utf-8")
        options = {"config.file": root / "prometheus.yml", "storage.tsdb.path": root / "data", "web.listen-address": self._address}
        command = [_program("prometheus"), *(f"--{name}={value}" for name, value in options.items()), "--log.level=warn"]
        self.daemon = Daemon("prometheus", command, root / "prometheus.log", {"GOMAXPROCS": "1"})

    def ask(self, path: str, **parameters: object) -> Any:
        """The `data` of an answer of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://{self._address}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise CheckFailed(f"{path} {parameters}: {error.read().decode(errors='replace')}") from None

    def answers(self) -> bool:
        """Whether it serves yet."""
        if not self.daemon.alive:
            raise CheckFailed(f"prometheus ended with {self.daemon.exit_code}\n{tail(self.daemon.log)}")
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def value(self, query: str) -> float:
        """An instant query's only value; NaN where there is none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if len(found) == 1 else math.nan

    def metric_names(self) -> set[str]:
        """Every metric that it has."""
        return set(self.ask("label/__name__/values"))


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    return run("Prometheus and Grafana: rules, alerts, dashboard", _test)


def _test(checks: Checklist) -> None:
    _shipped_files(checks)
    root = Path(tempfile.mkdtemp(prefix="cosilo-e2e-"))
    try:
        with LocalFederation(root / "federation", digits_sites(root / "federation", 4, alpha=0.5, least=200, seed=1)) as federation:
            with checks.check("a federation of four sites"):
                federation.start()
                who = [COORDINATOR, *federation.sites]
                addresses = {name: federation.endpoints(name)["metrics"] for name in who}
            sites = [addresses[name] for name in federation.sites]
            prometheus = Prometheus(root / "prometheus", {"cosilo-coordinator": [addresses[COORDINATOR]], "cosilo-site": sites})
            try:
                _live(checks, federation, prometheus, sites)
            finally:
                prometheus.daemon.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _shipped_files(checks: Checklist) -> None:
    with checks.check("promtool check config, check rules"):
        _promtool("check", "config", str(SHIPPED / "prometheus.yml"))
        said = _promtool("check", "rules", str(SHIPPED / "cosilo.rules.yml"))
        checks.figure("rules", next(line for line in said.splitlines() if "rules found" in line).strip())
    with checks.check("promtool test rules: every alert fires when it must, and not before"):
        files = sorted(str(path) for path in (SHIPPED / "tests").glob("*.test.yml"))
        _promtool("test", "rules", *files)
        rules = (SHIPPED / "cosilo.rules.yml").read_text(encoding="utf-8")
        tests = "".join(Path(path).read_text(encoding="utf-8") for path in files)
        alerts = re.findall(r"- alert: (\w+)", rules)
        fired = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n\s+- exp_labels", tests))
        untested = [alert for alert in alerts if alert not in fired]
        expect(not untested, f"no test sees these fire: {untested}")
        checks.figure("alerts, each seen to fire and not to fire", str(len(alerts)))


def _live(checks: Checklist, federation: LocalFederation, prometheus: Prometheus, sites: list[str]) -> None:
    with checks.check(f"Prometheus scrapes all five daemons while {ROUNDS} masked rounds close"):
        prometheus.daemon.start()
        wait_for(prometheus.answers, "prometheus answers", START_S, lambda: tail(prometheus.daemon.log))
        run_ = federation.create_run(PLAN)
        federation.accept_all(run_)
        # Two samples of every counter before it counts: `increase` sees no first one.
        wait_for(lambda: prometheus.value("min(count_over_time(up[5m]))") >= 2, "everybody was scraped twice", SCRAPED_S)
        began_s = time.monotonic()
        rounds = federation.run_rounds(run_, ROUNDS)
        expect([entry["phase"] for entry in rounds] == ["closed"] * ROUNDS, str(rounds))
        checks.figure(f"seconds of {ROUNDS} rounds", f"{time.monotonic() - began_s:.0f}")
        wait_for(lambda: prometheus.value('sum(cosilo_rounds_total{outcome="closed"})') == ROUNDS, "it has seen them close", SCRAPED_S)
        expect(prometheus.value("count(up == 1)") == 1 + len(sites), "somebody is not scraped")
        expect(prometheus.value("sum(cosilo_sites_connected)") == len(sites), "the sites connected are not those started")
        loss = rounds[-1]["losses"]["heldout"]
        expect(prometheus.value(f'cosilo_global_loss{{run="{run_[:12]}"}}') == loss, f"the loss is not {loss}")
    with checks.check("every rule is evaluated without an error, and no alert fires in a healthy federation"):
        groups = wait_for(lambda: _evaluated(prometheus), "all rules were evaluated", SCRAPED_S)
        wrong = [(rule["name"], rule["lastError"]) for group in groups for rule in group["rules"] if rule["health"] != "ok"]
        expect(not wrong, f"rules with errors: {wrong}")
        firing = [alert["labels"] for alert in prometheus.ask("alerts")["alerts"]]
        expect(not firing, f"alerts in a healthy federation: {firing}")
    with checks.check("every query of the dashboard, and every list of its variables, brings data"):
        federation.run_rounds(run_, 1)  # every series has been scraped by now, so that this round shows in its rate
        asked = list(_queries())

        def empty() -> list[str]:
            return [f"{where}: {query}" for where, query in asked if not _brings_data(prometheus, query)]

        wait_for(lambda: not empty(), "every query brings data", SCRAPED_S, lambda: "no data from\n" + "\n".join(empty()))
        checks.figure("dashboard queries, all with data", str(len(asked)))
        for metric, label in _variables():
            values = prometheus.ask(f"label/{label}/values", **{"match[]": metric})
            expect(values, f"label_values({metric}, {label}) is empty")
    with checks.check("every metric that the daemons export is on the dashboard or in a rule, and none is there that they do not export"):
        exported = {_family(name) for name in prometheus.metric_names() if not NOT_OURS.search(name)}
        text = DASHBOARD.read_text(encoding="utf-8") + (SHIPPED / "cosilo.rules.yml").read_text(encoding="utf-8")
        used = {_family(name) for name in re.findall(r"\bcosilo_[a-z_]+", re.sub(r"\$?cosilo_[a-z]+\.", "", text))}
        # Nothing was refused in these two rounds: the two counters that begin with the first refusal are not there yet.
        used -= {"cosilo_secagg_refusals", "cosilo_rejected_messages"} - exported
        expect(used == exported, f"shown but not exported: {sorted(used - exported)}; exported but not shown: {sorted(exported - used)}")
        checks.figure("metrics exported and shown", str(len(exported)))
    with checks.check("a site is killed: its alert fires, nobody else's does, and the coordinator counts one connection less"):
        victim = next(iter(federation.sites))
        federation.kill(victim)
        instance = federation_address(sites, federation, victim)
        killed_s = time.monotonic()
        fired = wait_for(lambda: _firing(prometheus), "an alert fires", SCRAPED_S)
        checks.figure(
            f"seconds from SIGKILL to CosiloSiteDown firing (scrape {SCRAPE_S} s, for {PENDING_S} s)", f"{time.monotonic() - killed_s:.0f}"
        )
        expect(fired == [("CosiloSiteDown", instance)], f"these fire: {fired}")
        wait_for(lambda: prometheus.value("sum(cosilo_sites_connected)") == len(sites) - 1, "one connection less", SCRAPED_S)


def _firing(prometheus: Prometheus) -> list[tuple[str, str]]:
    alerts = [alert["labels"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"]
    return [(labels["alertname"], labels.get("instance", "")) for labels in alerts]


def federation_address(addresses: list[str], federation: LocalFederation, site: str) -> str:
    """Where a site's metrics were, in the order in which the sites were started."""
    return addresses[list(federation.sites).index(site)]


def _evaluated(prometheus: Prometheus) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = prometheus.ask("rules")["groups"]
    return groups if groups and all(rule["health"] != "unknown" for group in groups for rule in group["rules"]) else []


def _queries() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            expect("$" not in query, f"{panel['title']}: a variable that the test does not know: {query}")
            yield panel["title"], query


def _variables() -> Iterator[tuple[str, str]]:
    for variable in json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            if found is None:
                raise CheckFailed(f"the variable {variable['name']} is not label_values: {variable['definition']}")
            yield found[1], found[2]


def _brings_data(prometheus: Prometheus, query: str) -> bool:
    """Whether a panel would show something: a finite value anywhere in the last minutes."""
    now_s = time.time()
    found = prometheus.ask("query_range", query=query, start=now_s - 300, end=now_s, step=SCRAPE_S)["result"]
    return any(math.isfinite(float(value)) for series in found for _, value in series["values"])


def _family(name: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


def _promtool(*arguments: str) -> str:
    done = subprocess.run([_program("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False)
    expect(done.returncode == 0, f"promtool {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CheckFailed(f"{name} is not installed: run tests/e2e/prepare prometheus")
    return found


def _free_port() -> int:
    """A port that is free now: Prometheus does not tell which it took where it is given 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
