"""`make e2e-proxy`: a site whose one way out is a real HTTP proxy (tinyproxy), as in a hospital.

The coordinator's name is known to the proxy alone, by an /etc/hosts in a mount namespace of the proxy's own, so that a direct
connection cannot be. The site enrols and trains through it; the proxy refuses, asks for a password, and is killed in the middle
of a transfer; and the password is looked for wherever it must not be. Needs root (mount namespaces).
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.checklist import CheckFailed, Checklist, expect, run, wait_for
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LOOPBACK, LocalFederation
from tests.federation.processes import Daemon, FederationError
from tests.federation.toml_files import to_toml

NAME = "coordinator.hospital.test"  # .test is nobody's (RFC 6761)
USER, PASSWORD = "st-anna", "thePasswordOfTheProxy"  # tinyproxy takes letters and digits; others are in tests/integration/test_obstacles.py
ROUND_S = 300.0
RUNNING_S, STOPPED_S = 0.002, 0.06  # the proxy is held to a thirtieth of its speed, so that a transfer has a middle
PLAN: dict[str, Any] = {
    "name": "behind",
    "preset": "digits",
    "architecture": {"block_out_channels": [96, 192], "norm_num_groups": 4},
    "training": {"local_epochs": 1, "batch_size": 8, "max_steps": 1},
}


class Tinyproxy:
    """A real tinyproxy on a loopback port, restarted with other rules at will. ports: to which it lets CONNECT through."""

    def __init__(self, root: Path, address: str) -> None:
        root.mkdir()
        self._root, self.address = root, address
        (root / "hosts").write_text(f"127.0.0.1 localhost\n127.0.0.1 {NAME}\n", encoding="ascii")
        mount = 'mount --make-rprivate / && mount --bind "$1" /etc/hosts && exec "$2" -d -c "$3"'
        command = [_program("unshare"), "--mount", "sh", "-c", mount, "sh", str(root / "hosts"), _program("tinyproxy"), str(root / "conf")]
        self.daemon = Daemon("tinyproxy", command, root / "tinyproxy.log", {"PATH": os.environ["PATH"]})

    def start(self, ports: list[str]) -> None:
        """Starts it, or starts it anew, with these ports allowed."""
        self.daemon.stop()
        lines = [
            f"Port {self.address.rpartition(':')[2]}",
            "Listen 127.0.0.1",
            "Timeout 600",
            "Allow 127.0.0.1",
            f"BasicAuth {USER} {PASSWORD}",
            *(f"ConnectPort {port}" for port in ports),
        ]
        (self._root / "conf").write_text("\n".join(lines) + "\n", encoding="ascii")
        self.daemon.start()
        wait_for(self._listens, "tinyproxy listens", 20, lambda: self.daemon.log.read_text(encoding="utf-8"))

    def connections(self) -> int:
        """How many CONNECTs it has established, by its own log."""
        return self.daemon.log.read_text(encoding="utf-8").count(f'Established connection to host "{NAME}"')

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """For the length of a block it runs a few milliseconds at a time."""
        ended = threading.Event()

        def pulse() -> None:
            while not ended.is_set():
                os.kill(self.daemon.pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(self.daemon.pid, signal.SIGCONT)
                time.sleep(RUNNING_S)

        beating = threading.Thread(target=pulse)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()

    def _listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0


def main() -> int:
    """Runs the whole test; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    return run("A site behind a proxy", _test)


def _test(checklist: Checklist) -> None:
    root = Path(tempfile.mkdtemp(prefix="cosilo-proxy-"))
    sites = digits_sites(root / "f", 3, alpha=1.0, least=60, seed=3)
    federation = LocalFederation(root / "f", sites)
    proxy = Tinyproxy(root / "proxy", f"127.0.0.1:{_free_port()}")
    try:
        _through(checklist, federation, proxy, root)
    except BaseException:
        print(f"left for a look: {root}", file=sys.stderr)
        raise
    else:
        shutil.rmtree(root)
    finally:
        federation.stop()
        proxy.daemon.stop()


def _through(checklist: Checklist, federation: LocalFederation, proxy: Tinyproxy, root: Path) -> None:
    behind, *direct = federation.sites
    federation.initialise()
    federation.start_coordinator()
    endpoints = federation.endpoints(COORDINATOR)
    federation_port, enrolment_port = (endpoints[port].rpartition(":")[2] for port in ("federation", "enrolment"))
    for name in direct:
        federation.enrol(name)
        federation.daemon(name).start()
    credentials = root / "proxy.credentials"
    credentials.write_text(f"{USER}:{PASSWORD}\n", encoding="ascii")
    credentials.chmod(0o600)
    invitation = _invite(federation, behind, federation_port, enrolment_port, endpoints["federation"])
    way = {"proxy": f"http://{proxy.address}"}

    with checklist.check("without the proxy there is no way: the coordinator's name is nobody's here"):
        _configure(federation, behind, {})
        expect("UNAVAILABLE" in _refusal(federation, behind, "enrol", invitation), "a direct connection was not refused")
    with checklist.check("a proxy that is not there is named"):
        _configure(federation, behind, way)
        said = _refusal(federation, behind, "enrol", invitation)
        expect(f"the proxy {proxy.address} does not lead to {NAME}:{enrolment_port}" in said, said)
    with checklist.check("407: the proxy wants a password, and the error says where to put it"):
        proxy.start([federation_port, enrolment_port])
        said = _refusal(federation, behind, "enrol", invitation)
        expect(f"the proxy {proxy.address} wants a name and a password" in said and "proxy_credentials" in said, said)
    with checklist.check("403: the proxy does not allow the port, and the error says whom to ask for what"):
        way["proxy_credentials"] = str(credentials)
        _configure(federation, behind, way)
        proxy.start(["443"])
        said = _refusal(federation, behind, "enrol", invitation)
        expect(f"does not allow a connection to {NAME}:{enrolment_port} (403)" in said and "allow CONNECT" in said, said)
    with checklist.check("the site enrols through the proxy, and is checked through it"):
        proxy.start([federation_port, enrolment_port])
        federation.site_command(behind, "enrol", invitation)
        said = federation.site_command(behind, "check")
        expect(f"{NAME}:{federation_port} over mutual TLS, serving" in said, said)
    with checklist.check("after enrolling, one port is enough"):
        proxy.start([federation_port])
        federation.daemon(behind).start()
        for name in federation.sites:
            federation.wait_ready(name)
    run_digest = federation.create_run(PLAN)
    federation.accept_all(run_digest)
    with checklist.check("a masked round in which the proxy is killed while weights come through it, and the fetch goes on"):
        before = proxy.connections()
        with proxy.held_back():
            federation.start_rounds(run_digest, 1)
            partial = wait_for(lambda: _partial(federation, behind), "weights are coming", ROUND_S, lambda: federation.log(behind)[-2000:])
        kept = partial.stat().st_size
        proxy.daemon.kill()
        proxy.start([federation_port])
        federation.wait_idle(run_digest, ROUND_S)
        (closed,) = federation.rounds(run_digest)
        expect(closed["phase"] == "closed" and behind in closed["survivors"], f"round: {closed}")
        expect(proxy.connections() > before, "the site did not come through the proxy")
        size = federation.artifact(closed["base"]).stat().st_size
        expect(0 < kept < size, f"the proxy was killed at byte {kept} of {size}, in the middle of nothing")
        checklist.figure("killed at", f"{kept / size:.0%} of {size / 2**20:.1f} MiB")
        down = federation.metric(COORDINATOR, "cosilo_transfer_bytes_total", direction="down", site=behind)
        checklist.figure("weights sent to it", f"{down / size:.2f} times their size")
    with checklist.check("the password is in no log, no report and no command line"):
        secrets = {PASSWORD, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        logs = [*federation.log_files(), federation.logs / "commands.log"]
        commands = [Path(f"/proc/{federation.daemon(behind).pid}/{file}") for file in ("cmdline", "environ")]
        for path in [*logs, *commands, federation.config(behind)]:
            text = path.read_text(encoding="utf-8", errors="replace")
            expect(not any(secret in text for secret in secrets), f"the proxy's password stands in {path}")


def _invite(federation: LocalFederation, site: str, port: str, enrolment_port: str, reached: str) -> str:
    """An invitation that says where the coordinator is by the name that only the proxy knows."""
    admin = federation.folder / "admin" / "admin.toml"
    text = admin.read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        key = line.partition(" = ")[0]
        lines.append(
            {"address": f'address = "{NAME}:{port}"', "enrolment_address": f'enrolment_address = "{NAME}:{enrolment_port}"'}.get(key, line)
        )
    admin.write_text("\n".join(lines) + "\n", encoding="utf-8")
    invitation = federation.root / site / "invitation"
    federation.cosilo("site", "invite", site, "--address", reached, "--out", str(invitation), "--local-demo")
    admin.write_text(text, encoding="utf-8")
    return str(invitation)


def _configure(federation: LocalFederation, site: str, way: dict[str, str]) -> None:
    spec = federation.sites[site]
    tables: dict[str, Any] = {
        "state": str(federation.state(site)),
        "metrics": {"listen": LOOPBACK},
        "data": dict(spec.data),
        "trainer": dict(spec.trainer),
        "policy": dict(spec.policy),
        "network": {"backoff_max_s": 2.0},
        **({"coordinator": dict(way)} if way else {}),
    }
    federation.config(site).parent.mkdir(parents=True, exist_ok=True)
    federation.config(site).write_text(to_toml(tables), encoding="utf-8")


def _refusal(federation: LocalFederation, site: str, *arguments: str) -> str:
    """What a command says that must fail."""
    try:
        said = federation.site_command(site, *arguments)
    except FederationError as error:
        return str(error)
    raise CheckFailed(f"cosilo-site {' '.join(arguments)} went well:\n{said}")


def _partial(federation: LocalFederation, site: str) -> Path | None:
    """The file into which weights are coming, once something of them is there."""
    found = [path for path in (federation.state(site) / "artifacts").glob("*") if "part" in path.name and path.stat().st_size]
    return found[0] if found else None


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CheckFailed(f"{name} is not installed: run tests/e2e/prepare proxy")
    return found


def _free_port() -> int:
    """A port that is free now: tinyproxy does not tell which it took where it is given 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
