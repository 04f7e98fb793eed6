"""A Docker engine of a test's own, and `docker compose` on it: images built without any registry, containers on networks of their own.

Owns the project, its containers and networks, and that nothing of them is left. Must not know what the containers do, nor how the engine runs
(docker_engine). Published ports are carried by Docker's own proxy.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.checklist import CheckFailed
from tests.e2e.docker_engine import DockerEngine, let_cross

COMMAND_S = 900.0  # building an image with torch in it on a busy machine
BRIDGE = "cosilo-c"  # COSILO_BRIDGE: with "-fed" or "-mon" at most 15 characters, the name of a network interface
ADDRESS_POOL = "base=10.198.0.0/16,size=24"  # of which the engine takes what no route of this machine has


class ComposeEngine(DockerEngine):
    """An engine in a temporary folder, and one compose project. Use as a context: it ends with everything that it ran.

    compose: `docker compose` or `docker-compose`, as words; project: the folder of docker-compose.yml; settings: what its .env would hold.
    """

    def __init__(self, compose: Sequence[str], project: Path, settings: dict[str, str]) -> None:
        # The classic builder: the other is a plugin of its own, which not every machine has.
        builder = {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
        super().__init__("compose", {**builder, "COSILO_BRIDGE": BRIDGE, **settings}, f"--default-address-pool={ADDRESS_POOL}")
        self._compose = list(compose)
        self._project = project
        self._forwarding: list[str] = []

    def begin(self) -> None:
        self._forwarding = [bridge for bridge in (f"{BRIDGE}-fed", f"{BRIDGE}-mon") if let_cross("-I", bridge)]

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
            containers = self.quietly("ps", "--all", "--quiet").split()
            if containers:
                self.quietly("rm", "--force", "--volumes", *containers)
            self.quietly("network", "prune", "--force")
        for bridge in self._forwarding:
            let_cross("-D", bridge)
        self.end()
        self.remove_folder()

    def leftovers(self) -> list[str]:
        """What `close` should have taken away and did not."""
        places = [self.root, *(Path("/sys/class/net") / f"{BRIDGE}-{end}" for end in ("fed", "mon"))]
        return self.mounts_left() + [str(place) for place in places if place.exists()]

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
