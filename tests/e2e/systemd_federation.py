"""The people and the other organisations around two machines under test: an admin, and three sites that are plain processes here.

Owns what they type and their folders. Must not know systemd or containers: the coordinator is an address.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.federation.digits import digit_labels
from tests.federation.processes import Daemon, run_command
from tests.federation.splitting import dirichlet_label_skew
from tests.federation.toml_files import Toml, to_toml

HOSPITAL = "hospital"
COMPANIONS = ("northgate", "riverside", "lakeview")
ROUNDS_TIMEOUT_S = 240.0
_MODEL: dict[str, Toml] = {"block_out_channels": [8, 16], "norm_num_groups": 4}  # a tiny UNet: the machines are what is tested


class Surroundings:
    """An admin's seat, and sites on this machine. root: a folder of its own. Stop it by `close`."""

    def __init__(self, root: Path, coordinator: str) -> None:
        self.root = root
        self.founded = root / "federation"
        self._log = root / "commands.log"
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self._daemons: list[Daemon] = []
        self._split = dict(zip((*COMPANIONS, HOSPITAL), dirichlet_label_skew(digit_labels(), 4, alpha=0.5, least=200, seed=1), strict=True))
        run_command(
            [_script("cosilo"), "init", str(self.founded), "--federation", "e2e", "--address", f"{coordinator}:7443"],
            self._log,
            self._environment,
        )

    def cosilo(self, *arguments: str, timeout_s: float = ROUNDS_TIMEOUT_S) -> str:
        """`cosilo ...` as the admin."""
        admin = ["--admin", str(self.founded / "admin")]
        return run_command([_script("cosilo"), *admin, *arguments], self._log, self._environment, timeout_s)

    def cosilo_json(self, *arguments: str) -> dict[str, Any]:
        """The same with `--json`, parsed."""
        answer: dict[str, Any] = json.loads(self.cosilo(*arguments, "--json"))
        return answer

    def invite(self, site: str, *, approved: bool) -> Path:
        """An invitation's file."""
        path = self.root / f"{site}.invitation"
        self.cosilo("site", "invite", site, "--out", str(path), *(["--local-demo"] if approved else []))
        return path

    def write_images(self, folder: Path) -> int:
        """The hospital's digits as folder/CLASS/NUMBER.png, which its daemon reads; returns how many."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        for index in self._split[HOSPITAL]:
            path = folder / str(digits.target[index]) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * (255 / 16)).round().astype(np.uint8)).save(path)
        return len(self._split[HOSPITAL])

    def start_companions(self) -> None:
        """Enrols the three other sites and starts them."""
        for name in COMPANIONS:
            folder = self.root / name
            (folder / "state").mkdir(parents=True)
            indices = folder / "images.txt"
            indices.write_text("".join(f"{index}\n" for index in self._split[name]), encoding="ascii")
            tables: Mapping[str, Toml] = {
                "state": str(folder / "state"),
                "metrics": {"listen": "127.0.0.1:0"},
                "data": {"kind": "digits", "index_file": str(indices)},
                "trainer": {"device": "cpu", "threads": 1},
                "network": {"backoff_max_s": 3.0},
            }
            (folder / "site.toml").write_text(to_toml(tables), encoding="utf-8")
            self._site(name, "enrol", str(self.invite(name, approved=True)))
            command = [_script("cosilo-site"), "--config", str(folder / "site.toml"), "serve"]
            daemon = Daemon(name, command, self.root / f"{name}.log", self._environment)
            self._daemons.append(daemon)
            daemon.start()

    def create_run(self, name: str, steps: int, seed: int) -> str:
        """A run of all four, accepted by the companions; steps: of training a round."""
        plan: dict[str, Toml] = {
            "name": name,
            "preset": "digits",
            "architecture": _MODEL,
            "training": {"local_epochs": 100, "batch_size": 32, "max_steps": steps, "seed": seed},
            "deadlines": {"training_s": 30.0},
        }
        path = self.root / f"{name}.toml"
        path.write_text(to_toml(plan), encoding="utf-8")
        run = str(self.cosilo_json("run", "create", str(path))["run"])
        for companion in COMPANIONS:
            self._site(companion, "accept", run, "--yes")
        return run

    def start_round(self, run: str) -> None:
        """Asks for one round."""
        self.cosilo("round", "start", run)

    def wait_round(self, run: str) -> dict[str, Any]:
        """Waits until nothing is in progress or wanted; returns the newest round."""
        self.cosilo("run", "watch", run, "--until-idle")
        newest: dict[str, Any] = self.cosilo_json("round", "list", run)["rounds"][-1]
        return newest

    def connected(self) -> set[str]:
        """Sites whose stream is open, as `cosilo status` has it."""
        return {site["site"] for site in self.cosilo_json("status")["sites"] if site["connected"]}

    def logs(self) -> str:
        """What the companions said last."""
        return "\n".join(f"--- {daemon.name} ---\n{daemon.log.read_text(errors='replace')[-2000:]}" for daemon in self._daemons)

    def close(self) -> None:
        """Ends the companions."""
        for daemon in self._daemons:
            daemon.stop()

    def _site(self, name: str, *arguments: str) -> str:
        command = [_script("cosilo-site"), "--config", str(self.root / name / "site.toml"), *arguments]
        return run_command(command, self._log, self._environment)


def _script(name: str) -> str:
    """A command of this environment's own, whatever PATH says."""
    return str(Path(sys.executable).parent / name)
