"""`make e2e-compose`: deploy/compose on a real engine, with images built without an image registry.

Builds base, wheelhouses and images as a site without a registry would; starts the whole federation; trains masked rounds on Fashion-MNIST,
killing one site in the first and cutting another's network in the second; reads the metrics from Prometheus; takes everything down and up
again and trains on. COSILO_E2E_CACHE keeps the base image and the downloaded wheels between runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from tests.e2e.checklist import CheckFailed, Checklist, expect, run, wait_for
from tests.e2e.compose_engine import ComposeEngine

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "deploy" / "compose"
BASE = "python:3.11-slim-bookworm"  # the name that the Dockerfiles ask for
PROMETHEUS = "cosilo-prometheus"
VERSION = "0.1.0"
HALVES = ("site", "coordinator")
SITES = ("lakeview", "northgate", "riverside", "st-anna")
DAEMONS = ("coordinator", *SITES)
IMAGES_IN_ALL = 60_000  # Fashion-MNIST's training part
KILLED, CUT = "st-anna", "riverside"  # one victim a round
BUILD_S = 900.0
UP_S = 240.0  # nine containers, four enrolments and acceptances on two cores
ROUND_S = 300.0
RETURN_S = 120.0
PLAN = """\
name = "fashion"
preset = "fashion-16"

[training]
local_epochs = 1
max_steps = 16

[deadlines]
gather_s = 60
training_s = 45
sharing_s = 30
uploading_s = 30
consenting_s = 30
revealing_s = 30
"""  # deadlines that a cut connection ends with soon; what trains moves every tenth of its steps


class Stage:
    """Everything that a step of the test needs."""

    def __init__(self, checks: Checklist, engine: ComposeEngine, ports: dict[str, int]) -> None:
        self.checks = checks
        self.engine = engine
        self.ports = ports
        self.up_s = 0.0  # monotonic, when `up` was typed
        self._seat = ""

    def admin(self, *arguments: str) -> str:
        """`cosilo ...` in one admin's container that stays, in place of a new one for each command."""
        if not self._seat:
            options = ["--detach", "--no-deps", "-T", "--entrypoint", "sleep"]
            self.engine.compose("run", *options, "admin", "infinity")
            named = ("ps", "--quiet", "--filter", "label=com.docker.compose.service=admin")
            self._seat = wait_for(lambda: self.engine.docker(*named).strip(), "the admin's container runs", RETURN_S)
        return self.engine.docker("exec", self._seat, "cosilo", *arguments, timeout_s=ROUND_S)

    def leave_seat(self) -> None:
        """Ends that container."""
        if self._seat:
            self.engine.docker("rm", "--force", self._seat)
            self._seat = ""

    def rounds(self) -> list[dict[str, Any]]:
        """`cosilo round list`."""
        found: list[dict[str, Any]] = json.loads(self.admin("round", "list", "fashion", "--json"))["rounds"]
        return found

    def connected(self) -> set[str]:
        """Sites whose stream is open."""
        return {site["site"] for site in json.loads(self.admin("status", "--json"))["sites"] if site["connected"]}

    def wait_all_connected(self) -> None:
        """Until nobody is missing."""
        wait_for(lambda: self.connected() == set(SITES), "all four sites are connected", RETURN_S, lambda: f"connected: {self.connected()}")

    def training(self, site: str) -> bool:
        """Whether a site is in the middle of its training in the round in progress."""
        newest = self.rounds()[-1]
        return any(one["site"] == site and one["activity"] == "training" and one["tenths"] < 9 for one in newest["sites"])

    def finish_round(self, number: int, survivors: list[str]) -> dict[str, Any]:
        """Waits for a round's end, and for exactly these sites in its sum."""
        self.admin("run", "watch", "fashion", "--until-idle")
        newest = self.rounds()[-1]
        found = (newest["round"], newest["phase"], sorted(newest["survivors"]))
        expect(found == (number, "closed", survivors), f"round {found} in place of {(number, survivors)}: {newest['reason']}")
        return newest

    def value(self, query: str) -> float | None:
        """An instant query's only value at Prometheus; None where there is none."""
        address = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return float(found[0]["value"][1]) if len(found) == 1 else None

    def wait_value(self, query: str, wanted: float) -> None:
        """Until Prometheus says so."""
        wait_for(
            lambda: self.value(query) == wanted, f"Prometheus says {wanted} to {query}", RETURN_S, lambda: f"it says {self.value(query)}"
        )

    def logs(self) -> str:
        """What everybody said last."""
        return self.engine.compose("logs", "--no-color", "--tail", "12")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compose", default="docker compose", help="the command, as `docker-compose` where there is no plugin")
    parser.add_argument("--sbom", type=Path, default=Path("dist/sbom"), help="the folder for the images' bills of materials")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    return run("Compose: a federation in containers", lambda checks: _test(checks, options.compose.split(), options.sbom))


def _test(checks: Checklist, compose: list[str], sbom: Path) -> None:
    cache = Path(os.environ.get("COSILO_E2E_CACHE") or Path.home() / ".cache" / "cosilo-e2e")
    ports = {"page": _free_port(), "prometheus": _free_port()}
    settings = {f"COSILO_{name.upper()}_PORT": str(port) for name, port in ports.items()}
    engine = ComposeEngine(compose, PROJECT, {**settings, "COSILO_PROMETHEUS_IMAGE": PROMETHEUS, "COSILO_DEMO_RUN": ""})
    try:
        (plan := engine.root / "run.toml").write_text(PLAN, encoding="utf-8")
        engine.settle(COSILO_DEMO_RUN=str(plan))
        with engine:
            checks.figure(
                "engine and compose", f"{engine.docker('version', '--format', '{{.Server.Version}}').strip()}, {' '.join(compose)}"
            )
            _build_images(checks, engine, cache)
            stage = Stage(checks, engine, ports)
            for step in STEPS:
                try:
                    step(stage)
                except CheckFailed as error:
                    raise CheckFailed(f"{error}\n\n{stage.logs()}") from None
            _bills_of_materials(checks, engine, sbom)
    finally:
        with checks.check("nothing of it is left on this machine: networks, mounts, files"):
            engine.close()
            expect(not (left := engine.leftovers()), f"left: {left}")


# --- the images ---


def _build_images(checks: Checklist, engine: ComposeEngine, cache: Path) -> None:
    with checks.check("a base image from a Debian mirror, and two wheelhouses with hashes"):
        base = cache / f"base-{hashlib.sha256(b'compose').hexdigest()[:16]}.tar"
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(_shell, [str(ROOT / "deploy/airgap/base-image"), "--out", str(base)])] + [
                pool.submit(_wheelhouse, half, engine.root / half, cache) for half in HALVES
            ]:
                done.result()
        engine.docker("import", str(base), BASE)
    with checks.check("five images, those of the daemons without any network"), ThreadPoolExecutor(2) as pool:
        for built in [
            pool.submit(_build_half, engine, "site"),
            pool.submit(_build_half, engine, "coordinator"),
            # Debian's packages come over this machine's own network: the engine has no other.
            pool.submit(_build, engine, "demo-data", f"cosilo-demo-data:{VERSION}", ROOT, "--network", "host"),
            pool.submit(_build, engine, "prometheus", PROMETHEUS, ROOT / "deploy/docker", "--network", "host"),
        ]:
            built.result()
        for name in (BASE, *(f"cosilo-{kind}:{VERSION}" for kind in (*HALVES, "demo-data"))):
            checks.figure(f"size of {name}", f"{int(engine.docker('image', 'inspect', '-f', '{{.Size}}', name)) / 1e6:.0f} MB")
    with checks.check("the images: a user of their own, a health check, no pip, no data, and only their own half"):
        for half, other in (("site", "cosilo_server"), ("coordinator", "cosilo_client")):
            found = json.loads(engine.docker("image", "inspect", f"cosilo-{half}:{VERSION}"))[0]["Config"]
            expect(found["User"] == "10001:10001" and found["Healthcheck"]["Test"][0] == "CMD", f"{half}: {found}")
            tried = (
                "import importlib.util as u, os, pathlib; "
                f"print([name for name in ('pip', '{other}', 'torch') if u.find_spec(name)], os.getuid(), "
                "pathlib.Path('/usr/share/datasets').exists(), pathlib.Path('/wheels').exists())"
            )
            run_ = ["run", "--rm", "--network", "none", "--entrypoint", "/opt/cosilo/bin/python", f"cosilo-{half}:{VERSION}", "-c", tried]
            said = engine.docker(*run_)
            expect(said.strip() == "['torch'] 10001 False False", f"{half}: {said}")


def _build_half(engine: ComposeEngine, half: str) -> None:
    _build(engine, "wheels", f"cosilo-build-{half}", engine.root / half)
    shutil.rmtree(engine.root / half)
    arguments = ["--network", "none", "--build-arg", f"BUILD_BASE=cosilo-build-{half}"]
    _build(engine, half, f"cosilo-{half}:{VERSION}", ROOT, *arguments)


def _build(engine: ComposeEngine, dockerfile: str, image: str, context: Path, *arguments: str) -> None:
    engine.docker("build", "--quiet", "-f", str(ROOT / f"deploy/docker/{dockerfile}.Dockerfile"), "-t", image, *arguments, str(context))


def _wheelhouse(half: str, out: Path, cache: Path) -> None:
    """Other people's wheels come from the cache where constraints.txt is the same."""
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()[:16]
    known = cache / f"compose-wheels-{sys.version_info.major}.{sys.version_info.minor}-{digest}-{half}"
    offline = ["--", "--no-index", "--find-links", str(known)] if known.exists() else []
    command = [str(ROOT / "deploy/airgap/wheelhouse"), "--for", half, "--out", str(out), "--python", sys.executable]
    _shell([*command, *offline])
    if not known.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = known.with_name(f"{known.name}.part")  # its name has dots of its own
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for wheel in out.glob("*.whl"):
            if not wheel.name.startswith("cosilo"):
                shutil.copy(wheel, unfinished)
        unfinished.rename(known)


# --- the steps, in order ---


def start(stage: Stage) -> None:
    """`up`, until every site has enrolled, is connected and has accepted the run."""
    checks, engine = stage.checks, stage.engine
    with checks.check("docker compose up: founded, dealt out, enrolled, connected, accepted, healthy"):
        stage.up_s = time.monotonic()
        engine.compose("up", "-d", "--no-build", timeout_s=UP_S)
        wait_for(lambda: _exited_well(engine, "welcome"), "the run is there", UP_S, stage.logs)
        wait_for(lambda: all(_accepted(engine, site) for site in SITES), "every site has accepted it", UP_S, stage.logs)
        wait_for(lambda: all(_health(engine, name) == "healthy" for name in DAEMONS), "everybody is healthy", UP_S, stage.logs)
        checks.figure("up to everybody enrolled, accepted and healthy", f"{time.monotonic() - stage.up_s:.0f} s")
    with checks.check("every image has one owner, and a site sees its own part only"):
        counts = {site: int.from_bytes(bytes.fromhex(_in(engine, site, _COUNT).strip()), "big") for site in SITES}
        expect(sum(counts.values()) == IMAGES_IN_ALL and min(counts.values()) >= 4000, f"{counts}")
        expect("Read-only file system" in _refused(engine, CUT, "touch /data/new"), "a site writes to its images")
        checks.figure("images by site", ", ".join(f"{site} {count}" for site, count in counts.items()))
    with checks.check("containers: not root, no capability, no new privileges, and nothing of the image can be written"):
        for name in DAEMONS:
            found = json.loads(engine.docker("inspect", engine.container(name)))[0]["HostConfig"]
            hardened = (found["ReadonlyRootfs"], found["CapDrop"], found["SecurityOpt"], found["Privileged"])
            expect(hardened == (True, ["ALL"], ["no-new-privileges:true"], False), f"{name}: {hardened}")
            status = _in(engine, name, "id -u; grep -h -E '^(CapEff|NoNewPrivs):' /proc/self/status").split()
            expect(status == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1"], f"{name}: {status}")
            expect("Read-only file system" in _refused(engine, name, "touch /opt/cosilo/new"), f"{name} writes to its program")
    with checks.check("the status page is on loopback, and so is Prometheus; nothing else is published"):
        with urllib.request.urlopen(f"http://127.0.0.1:{stage.ports['page']}/", timeout=10) as answer:
            expect(answer.status == 200 and b"<title>" in answer.read(), "no page")
        published = sorted(line for line in engine.docker("ps", "--format", "{{.Ports}}").splitlines() if "->" in line)
        expect(len(published) == 2 and all(line.count("->") == line.count("127.0.0.1:") == 1 for line in published), f"{published}")


def rounds(stage: Stage) -> None:
    """Two masked rounds, one victim each."""
    checks, engine = stage.checks, stage.engine
    with checks.check("round 1: a site is killed while it trains; three others close it"):
        engine.compose("run", "--rm", "-T", "admin", "round", "start", "fashion")  # as the documentation has it
        wait_for(lambda: stage.training(KILLED), f"{KILLED} trains", ROUND_S, stage.logs)
        engine.docker("kill", engine.container(KILLED))
        entry = stage.finish_round(1, [site for site in SITES if site != KILLED])
        checks.figure("up to the first round closed, a site killed on the way", f"{time.monotonic() - stage.up_s:.0f} s")
        checks.figure("round 1 alone", f"{entry['seconds']:.0f} s")
    with checks.check("it comes back, with its identity and its acceptance"):
        engine.docker("start", engine.container(KILLED))
        stage.wait_all_connected()
    with checks.check("round 2: another is cut off the network while it trains; three others close it"):
        stage.admin("round", "start", "fashion")
        wait_for(lambda: stage.training(CUT), f"{CUT} trains", ROUND_S, stage.logs)
        network = engine.docker("network", "ls", "--quiet", "--filter", "label=com.docker.compose.network=federation").strip()
        engine.docker("network", "disconnect", network, engine.container(CUT))
        entry = stage.finish_round(2, [site for site in SITES if site != CUT])
        checks.figure("round 2", f"{entry['seconds']:.0f} s, {CUT} cut off while training")
    with checks.check("Prometheus, on a network of its own, still sees the site that is cut off, and that it is"):
        stage.wait_value(f'up{{instance="{CUT}:9465"}}', 1)
        stage.wait_value(f'cosilo_connected{{instance="{CUT}:9465"}}', 0)
        stage.wait_value("cosilo_sites_connected", 3)
    with checks.check("it is plugged in again, and comes back by itself"):
        engine.docker("network", "connect", network, engine.container(CUT))
        stage.wait_all_connected()


def metrics(stage: Stage) -> None:
    """What Prometheus has."""
    with stage.checks.check("Prometheus: five daemons up, two rounds closed, two dropouts, the global loss; Cosilo's rules are loaded"):
        stage.wait_value("count(up == 1)", 5)
        stage.wait_value('sum(cosilo_rounds_total{outcome="closed"})', 2)
        stage.wait_value("sum(cosilo_secagg_dropouts_total)", 2)
        stage.wait_value("cosilo_sites_connected", 4)
        expect((loss := stage.value("cosilo_global_loss")) is not None and 0 < loss < 10, f"the global loss is {loss}")
        with urllib.request.urlopen(f"http://127.0.0.1:{stage.ports['prometheus']}/api/v1/rules", timeout=10) as answer:
            groups = json.load(answer)["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        expect(rules and all(rule["health"] == "ok" for rule in rules), f"{[rule['name'] for rule in rules if rule['health'] != 'ok']}")
        stage.checks.figure("rules evaluated by Prometheus", str(len(rules)))


def again(stage: Stage) -> None:
    """Down and up again."""
    checks, engine = stage.checks, stage.engine
    with checks.check("down and up again: nobody enrols or accepts anew, and the run goes on with round 3 and everybody in it"):
        before = stage.rounds()[-1]["checkpoint"]
        stage.leave_seat()
        engine.compose("down", timeout_s=UP_S)
        expect(not engine.docker("ps", "--all", "--quiet").strip(), "containers are left")
        began_s = time.monotonic()
        engine.compose("up", "-d", "--no-build", timeout_s=UP_S)
        stage.wait_all_connected()
        checks.figure("up again to everybody connected", f"{time.monotonic() - began_s:.0f} s")
        expect(stage.rounds()[-1]["checkpoint"] == before, "the newest checkpoint is another")
        stage.admin("round", "start", "fashion")
        entry = stage.finish_round(3, list(SITES))
        checks.figure("round 3, four sites, nobody harmed", f"{entry['seconds']:.0f} s")
        said = engine.compose("logs", "--no-color", *SITES)
        expect("enrolled as" not in said, "a site enrolled again")
    with checks.check("every daemon is healthy, and stops within its grace"):
        wait_for(lambda: all(_health(engine, name) == "healthy" for name in DAEMONS), "everybody is healthy", RETURN_S, stage.logs)
        stage.leave_seat()
        engine.compose("stop", timeout_s=UP_S)
        codes = {name: engine.docker("inspect", "-f", "{{.State.ExitCode}}", engine.container(name)).strip() for name in DAEMONS}
        expect(set(codes.values()) <= {"0", "143"}, f"exit codes: {codes}")
    with checks.check("down --volumes: neither containers nor named volumes stay, and with them neither keys nor checkpoints"):
        named = ["volume", "ls", "--quiet", "--filter", "label=com.docker.compose.project"]
        expect(engine.docker(*named).strip() != "", "there were no volumes")
        engine.compose("down", "--volumes", timeout_s=UP_S)
        left = engine.docker("ps", "--all", "--quiet").split() + engine.docker(*named).split()
        expect(not left, f"left: {left}")


STEPS: tuple[Callable[[Stage], None], ...] = (start, rounds, metrics, again)

_COUNT = "od -A n -t x1 -j 4 -N 4 /data/train-labels-idx1-ubyte | tr -d ' '"


def _bills_of_materials(checks: Checklist, engine: ComposeEngine, out: Path) -> None:
    with checks.check("a software bill of materials for each image"):
        for half in HALVES:
            name = f"cosilo-{half}-image"
            command = [sys.executable, "-m", "tools.sbom_image", f"cosilo-{half}:{VERSION}"]
            said = _shell([*command, "--name", name, "--out", str(out / f"{name}.cdx.json")], engine)
            checks.figure(f"bill of materials of cosilo-{half}", said.strip().splitlines()[-1])


def _in(engine: ComposeEngine, service: str, script: str) -> str:
    return engine.docker("exec", engine.container(service), "sh", "-ec", script)


def _refused(engine: ComposeEngine, service: str, script: str) -> str:
    try:
        said = _in(engine, service, script)
    except CheckFailed as error:
        return str(error)
    raise CheckFailed(f"{service}: {script}: went through\n{said}")


def _exited_well(engine: ComposeEngine, service: str) -> bool:
    return engine.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", engine.container(service)).split() == ["exited", "0"]


def _accepted(engine: ComposeEngine, site: str) -> bool:
    try:
        return _in(engine, site, "test -e /var/lib/cosilo/accepted") == ""
    except CheckFailed:
        return False


def _health(engine: ComposeEngine, service: str) -> str:
    return engine.docker("inspect", "-f", "{{.State.Health.Status}}", engine.container(service)).strip()


def _shell(command: list[str], engine: ComposeEngine | None = None) -> str:
    environment = engine.environment if engine else None
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_S, check=False
    )
    expect(done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
