"""Machines for a test: containers whose PID 1 is systemd, on a network of their own, under a Docker engine of the test's own.

Owns the network and the containers, and that nothing of them is left. Must not know what is installed on them, nor how the engine runs
(docker_engine). The engine forwards nothing, so that the machines reach each other and the host and nothing else. That is the air-gapped case.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Network, ip_address
from pathlib import Path

import psutil

from tests.e2e.checklist import CheckFailed, wait_for
from tests.e2e.docker_engine import DockerEngine, let_cross

MEMORY_BYTES = 8 << 30  # two virtual environments with torch on each of two machines, two wheelhouses, one base image: two thirds of it
MEMORY_SPARE_BYTES = MEMORY_BYTES + (4 << 30)  # what the daemons and everybody else on the machine need
COMMAND_S = 600.0  # installing torch on a busy machine
BOOT_S = 90.0
NETWORK = "cosilo-e2e"
IMAGE = "cosilo-e2e-systemd"
SUBNETS = [IPv4Network(f"10.{second}.77.0/24") for second in range(213, 245)]  # the first that no route of this machine has
_CONTAINER_OPTIONS = [
    # What systemd needs as PID 1, and what hidepid needs where root is not all-powerful (ProtectProc with PrivateUsers).
    *("--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
    *("--cgroupns=host", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--tmpfs", "/run", "--tmpfs", "/tmp:exec"),
    *("--stop-signal", "SIGRTMIN+3"),  # systemd(1): halt
    *("--device-cgroup-rule", "c 195:* rwm"),  # NVIDIA's devices: the engine allows them, so that the unit's own rules are what decides
]


class Engine(DockerEngine):
    """A Docker engine in a temporary folder. Use as a context: it ends with everything that it ran."""

    def __init__(self) -> None:
        spare = psutil.virtual_memory().available > MEMORY_SPARE_BYTES  # a hundred thousand small files come and go faster in memory
        super().__init__("systemd", {}, "--userland-proxy=false", memory_bytes=MEMORY_BYTES if spare else 0)
        self.subnet = _free_subnet()
        self._bridge = f"e2e-{self.root.name[-8:]}"  # at most 15 characters: the name of a network interface
        self._containers: list[str] = []
        self._ids: list[str] = []
        self._forwarding = False

    def begin(self) -> None:
        bridge = f"com.docker.network.bridge.name={self._bridge}"
        self.docker("network", "create", f"--subnet={self.subnet}", "-o", bridge, NETWORK)
        self._forwarding = let_cross("-I", self._bridge)

    def docker(self, *arguments: str, stdin: bytes | None = None, timeout_s: float = COMMAND_S) -> str:
        """`docker ...`; returns its standard output. Raises CheckFailed with both outputs where it fails."""
        done = subprocess.run(
            ["docker", *arguments], env=self.environment, input=stdin or b"", capture_output=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace").rstrip()
            raise CheckFailed(f"docker {' '.join(arguments)}: exit {done.returncode}\n{said}")
        return done.stdout.decode(errors="replace")

    def boot(self, name: str, host: int, wheelhouse: Path, newer: Path) -> Machine:
        """Starts a machine; host: the last number of its address. Wheelhouses are at /wheelhouse and /newer, read-only, as from a stick."""
        address = str(self.subnet[host])
        self._containers.append(name)
        place = ["--name", name, "--hostname", name, "--network", NETWORK, "--ip", address]
        sticks = ["-v", f"{wheelhouse}:/wheelhouse:ro", "-v", f"{newer}:/newer:ro"]
        self.docker("run", "--detach", *place, *_CONTAINER_OPTIONS, *sticks, IMAGE, "/sbin/init")
        return Machine(self, name, address)

    def close(self) -> None:
        """Containers, network, engine, mounts, folder: in this order, and each even where the one before failed. Once is enough."""
        if not self.root.exists():
            return
        self._ids = [text.strip() for name in self._containers if (text := self.quietly("inspect", "-f", "{{.Id}}", name))]
        for name in self._containers:
            self.quietly("rm", "--force", "--volumes", name)
        self.quietly("network", "rm", NETWORK)
        if self._forwarding:
            let_cross("-D", self._bridge)
        self.end()
        _remove_cgroups(self._ids)
        self.remove_folder()

    def leftovers(self) -> list[str]:
        """What `close` should have taken away and did not."""
        places = [self.root, Path("/sys/class/net") / self._bridge]
        places += [group for container in self._ids for group in Path("/sys/fs/cgroup").glob(f"*/docker/{container}")]
        return self.mounts_left() + [str(place) for place in places if place.exists()]


class Machine:
    """One of the machines."""

    def __init__(self, engine: Engine, name: str, address: str) -> None:
        self._engine = engine
        self.name = name
        self.address = address

    def run(self, *command: str, stdin: bytes | None = None, timeout_s: float = COMMAND_S) -> str:
        """A command as root on the machine; returns its standard output, raises CheckFailed where it fails."""
        return self._engine.docker("exec", "--interactive", self.name, *command, stdin=stdin, timeout_s=timeout_s)

    def shell(self, script: str) -> str:
        """The same for a line of shell."""
        return self.run("sh", "-ec", script)

    def refused(self, *command: str) -> str:
        """What a command that must fail says."""
        try:
            said = self.run(*command)
        except CheckFailed as error:
            return str(error)
        raise CheckFailed(f"{self.name}: {' '.join(command)}: went through\n{said}")

    def put(self, source: Path, target: str) -> None:
        """Copies a file or a folder onto the machine."""
        self._engine.docker("cp", str(source), f"{self.name}:{target}")

    def unit(self, unit: str, *properties: str) -> dict[str, str]:
        """`systemctl show`."""
        lines = self.run("systemctl", "show", unit, "--property", ",".join(properties)).splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def main_pid(self, unit: str) -> int:
        """The unit's main process; 0 where it does not run."""
        return int(self.unit(unit, "MainPID")["MainPID"])

    def active(self, unit: str) -> bool:
        """Whether it said READY=1 and still runs."""
        return self.unit(unit, "ActiveState")["ActiveState"] == "active"

    def journal(self, unit: str, *filters: str) -> str:
        """A unit's journal of this boot."""
        return self.run("journalctl", "--unit", unit, "--no-pager", *filters)

    def wait_booted(self) -> None:
        """Returns when systemd says that the machine runs and every unit is well."""
        wait_for(lambda: self._system_state() == "running", f"{self.name} has booted", BOOT_S, lambda: self._failed_units())
        # On a machine systemd does this itself; in a container it leaves it to the engine, and credentials then stay unseen.
        self.run("mount", "--make-rshared", "/")

    def reboot(self) -> None:
        """Halts it as the power button would, and starts it again."""
        self._engine.docker("restart", "--time", "60", self.name)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """A signal to one process."""
        self.shell(f"kill -{number.name[3:]} {pid}")  # the shell's own: a minimal system has no other

    def _system_state(self) -> str:
        try:
            return self.run("sh", "-c", "systemctl is-system-running || true").strip()
        except CheckFailed:  # it boots, or shuts down
            return ""

    def _failed_units(self) -> str:
        return self.run("systemctl", "--failed", "--no-pager")


def _free_subnet() -> IPv4Network:
    taken = [
        ip_address(bytes.fromhex(line.split()[1])[::-1]) for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]
    ]
    return next(subnet for subnet in SUBNETS if not any(route in subnet for route in taken))


def _remove_cgroups(containers: Sequence[str]) -> None:
    """systemd in a container leaves empty groups in the host's tree, which the engine does not know."""
    for container in filter(None, containers):
        for top in Path("/sys/fs/cgroup").glob(f"**/docker/{container}"):
            for folder, _, _ in os.walk(top, topdown=False):
                try:
                    Path(folder).rmdir()
                except OSError:
                    break  # somebody is still in it: theirs to remove
