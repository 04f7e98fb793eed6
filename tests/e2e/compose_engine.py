"""A Docker engine of a test's own, and `docker compose` on it: images built without any registry, containers on networks of their own.

Owns the engine, its folder and that nothing of it is left. Must not know what the containers do. The engine touches nothing of the host's:
own data and sockets, no iptables chains, no forwarding. Published ports are carried by Docker's own proxy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.e2e.checklist import CheckFailed, wait_for
from tests.federation.processes import Daemon, tail

ENGINE_START_S = 90.0
COMMAND_S = 900.0  # building an image with torch in it on a busy machine
BRIDGE = "cosilo-c"  # COSILO_BRIDGE: with "-fed" or "-mon" at most 15 characters, the name of a network interface
ADDRESS_POOL = "base=10.198.0.0/16,size=24"  # of which the engine takes what no route of this machine has


class ComposeEngine:
    """An engine in a temporary folder, and one compose project. Use as a context: it ends with everything that it ran.

    compose: `docker compose` or `docker-compose`, as words; project: the folder of docker-compose.yml; settings: what its .env would hold.
    """

    def __init__(self, compose: Sequence[str], project: Path, settings: dict[str, str]) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="cosilo-e2e-"))
        self._socket = self.root / "docker.sock"
        # The classic builder: the other is a plugin of its own, which not every machine has.
        builder = {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{self._socket}", **builder, "COSILO_BRIDGE": BRIDGE, **settings}
        self._compose = list(compose)
        self._project = project
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        dockerd = shutil.which("dockerd", path=path)
        if dockerd is None:
            raise CheckFailed("dockerd is not installed: run tests/e2e/prepare compose")
        options = {"data-root": "data", "exec-root": "exec", "pidfile": "docker.pid"}
        command = [dockerd, *(f"--{name}={self.root / folder}" for name, folder in options.items()), f"--host=unix://{self._socket}"]
        command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
        command += [f"--default-address-pool={ADDRESS_POOL}"]
        self._daemon = Daemon("dockerd", command, self.root / "dockerd.log", self.environment)
        self._forwarding: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._daemon.start()
            wait_for(self._answers, "dockerd answers", ENGINE_START_S, lambda: tail(self._daemon.log))
            # Another engine on this machine may have made FORWARD drop what crosses a bridge.
            self._forwarding = [bridge for bridge in (f"{BRIDGE}-fed", f"{BRIDGE}-mon") if _iptables("-I", bridge)]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def settle(self, **settings: str) -> None:
        """More of what .env would hold."""
        self.environment.update(settings)

    def docker(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """`docker ...`; returns its standard output. Raises CheckFailed with both outputs where it fails."""
        return self._run(["docker", *arguments], timeout_s)

    def compose(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """`docker compose ...` in the project's folder; the same."""
        return self._run([*self._compose, *arguments], timeout_s)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        lines = self.docker("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label=com.docker.compose.service={service}").split()
        if len(lines) != 1:
            raise CheckFailed(f"service {service} has {len(lines)} containers")
        return lines[0]

    def close(self) -> None:
        """Containers, networks, volumes, engine, mounts, folder: in this order, and each even where the one before failed."""
        if not self.root.exists():
            return
        if self._daemon.alive:
            containers = self._quietly("ps", "--all", "--quiet").split()
            if containers:
                self._quietly("rm", "--force", "--volumes", *containers)
            self._quietly("network", "prune", "--force")
        for bridge in self._forwarding:
            _iptables("-D", bridge)
        self._daemon.stop()
        for mount in sorted((mount for mount in _mounts() if mount.startswith(f"{self.root}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """What `close` should have taken away and did not."""
        mounts = [mount for mount in _mounts() if mount.startswith(str(self.root))]
        places = [self.root, *(Path("/sys/class/net") / f"{BRIDGE}-{end}" for end in ("fed", "mon"))]
        return mounts + [str(place) for place in places if place.exists()]

    def _run(self, command: list[str], timeout_s: float) -> str:
        done = subprocess.run(
            command,
            cwd=self._project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).rstrip().splitlines()[-40:])
            raise CheckFailed(f"{' '.join(command)}: exit {done.returncode}\n{said}")
        return done.stdout

    def _answers(self) -> bool:
        if not self._daemon.alive:
            raise CheckFailed(f"dockerd ended with {self._daemon.exit_code}\n{tail(self._daemon.log)}")
        return bool(self._quietly("version", "--format", "{{.Server.Version}}"))

    def _quietly(self, *arguments: str) -> str:
        try:
            return self.docker(*arguments)
        except (CheckFailed, subprocess.TimeoutExpired, OSError):
            return ""


def _iptables(action: str, bridge: str) -> bool:
    """Lets packets cross one of the test's bridges, or stops letting them; whether that could be said."""
    program = shutil.which("iptables", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    rule = ["-w", action, "FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"]
    return program is not None and subprocess.run([program, *rule], capture_output=True, check=False).returncode == 0


def _mounts() -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
