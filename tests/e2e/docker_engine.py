"""A Docker engine of a test's own: started in a temporary folder, ended with all that it mounted.

Owns the process, its folder and its answers. Must not know what runs on it. The engine touches nothing of the host's: its own data and sockets,
no iptables chains, no forwarding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.e2e.checklist import CheckFailed, wait_for
from tests.federation.processes import Daemon, tail

ENGINE_START_S = 90.0
MEMORY_MOUNT = "cosilo-e2e"


class DockerEngine(ABC):
    """An engine in a temporary folder. Use as a context: it ends with everything that it ran.

    target: what tests/e2e/prepare installs it for; settings: of the environment that dockerd and its clients run in; options: of dockerd's
    own; memory_bytes: of a tmpfs that the folder is, 0 for the disk. Raises CheckFailed where dockerd is not installed.
    """

    def __init__(self, target: str, settings: Mapping[str, str], *options: str, memory_bytes: int = 0) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="cosilo-e2e-"))
        if memory_bytes:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={memory_bytes},mode=0711", MEMORY_MOUNT, str(self.root)], check=False)
        socket = self.root / "docker.sock"
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{socket}", **settings}
        dockerd = shutil.which("dockerd", path=_path())
        if dockerd is None:
            raise CheckFailed(f"dockerd is not installed: run tests/e2e/prepare {target}")
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "docker.pid"}
        command = [dockerd, *(f"--{name}={self.root / place}" for name, place in places.items()), f"--host=unix://{socket}"]
        command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", *options]
        self._daemon = Daemon("dockerd", command, self.root / "dockerd.log", self.environment)

    def __enter__(self) -> Self:
        try:
            self._daemon.start()
            wait_for(self._answers, "dockerd answers", ENGINE_START_S, lambda: tail(self._daemon.log))
            self.begin()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def begin(self) -> None:
        """What there must be before anything runs on the engine that has just answered."""

    @abstractmethod
    def docker(self, *arguments: str) -> str:
        """`docker ...`; returns its standard output. Raises CheckFailed with both outputs where it fails."""

    @abstractmethod
    def close(self) -> None:
        """Ends what ran on the engine, then the engine (`end`); each step even where the one before failed."""

    def quietly(self, *arguments: str) -> str:
        """`docker`; empty where it fails."""
        try:
            return self.docker(*arguments)
        except (CheckFailed, subprocess.TimeoutExpired, OSError):
            return ""

    def end(self) -> None:
        """The engine, and what it left mounted below its folder."""
        self._daemon.stop()
        for mount in sorted((mount for mount in _mounts() if mount.startswith(f"{self.root}/")), reverse=True):
            _unmount(mount)

    def remove_folder(self) -> None:
        if self.root.is_mount():
            _unmount(str(self.root))
        shutil.rmtree(self.root, ignore_errors=True)

    def mounts_left(self) -> list[str]:
        """Of the engine's folder and below it."""
        return [mount for mount in _mounts() if mount == str(self.root) or mount.startswith(f"{self.root}/")]

    def _answers(self) -> bool:
        if not self._daemon.alive:
            raise CheckFailed(f"dockerd ended with {self._daemon.exit_code}\n{tail(self._daemon.log)}")
        return bool(self.quietly("version", "--format", "{{.Server.Version}}"))


def let_cross(action: str, bridge: str) -> bool:
    """Lets packets cross a bridge of the test's own ("-I"), or stops letting them ("-D"); whether that could be said.

    Another engine on this machine may have made FORWARD drop what crosses a bridge.
    """
    program = shutil.which("iptables", path=_path())
    rule = ["-w", action, "FORWARD", "-i", bridge, "-o", bridge, "-j", "ACCEPT"]
    return program is not None and subprocess.run([program, *rule], capture_output=True, check=False).returncode == 0


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _mounts() -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]


def _unmount(mount: str) -> None:
    subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
