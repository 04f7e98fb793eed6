"""A federation whose only admin's key is lost, typed from SECURITY.md: what goes on, what is kept, and the new one that trains on from it.

Owns this step; after it the old federation is stopped. Must not know how the key came to be lost.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.e2e.checklist import expect, wait_for
from tests.e2e.runbooks_departures import NEXT_RUN, SMALL
from tests.e2e.runbooks_federation import ANYWHERE, OTHERS, Stage, specs
from tests.e2e.runbooks_losses import LOST_KEY, SECURITY
from tests.e2e.runbooks_pages import spoken
from tests.federation.local import COORDINATOR, LocalFederation

ASKED = 2  # rounds, which are had without an admin
ROUNDS_S = 120.0


def found_anew(stage: Stage) -> None:
    """SECURITY.md, When an admin's key is lost: there is no other admin."""
    old = stage.federation
    with stage.checks.check("SECURITY.md: the only admin's key is lost: what was asked for is had, and nobody can ask for more"):
        before = _closed(old)
        last = len(old.rounds(NEXT_RUN)) + ASKED
        old.start_rounds(NEXT_RUN, ASKED)
        shutil.rmtree(old.folder / "admin")
        for command in ("cosilo site list", f"cosilo round start {NEXT_RUN}"):
            stage.admin.runs(command, code=1)
        wait_for(lambda: _closed(old) == before + ASKED, f"{ASKED} rounds more have closed", ROUNDS_S, lambda: f"{_closed(old)}")
    with stage.checks.check("SECURITY.md: what there is is kept: the backup names the newest weights of each run"):
        backup = "cosilo-coordinator backup"
        kept = f"{backup} last --config coordinator/coordinator.toml"
        said = stage.coordinator.says(SECURITY, LOST_KEY, backup, {backup: kept})
        newest = {int(number): Path(name) for number, name in re.findall(r"newest weights, of round (\d+): (\S+)", said)}
        expect(last in newest and len(newest[last].name) == 64, f"no weights of round {last}: {said}")
        weights = stage.coordinator.home / newest[last]
    old.stop()
    root = stage.root / "anew"
    with LocalFederation(root, specs(root)[: len(OTHERS)], name="chest-again") as anew:
        with stage.checks.check("SECURITY.md: a new federation; every site enrols with a new state folder"):
            admin = stage.admin.beside(root / "admin")
            anew.logs.mkdir(parents=True)
            init = f"cosilo init {anew.folder} --federation chest-again --address {ANYWHERE}"
            admin.says(SECURITY, LOST_KEY, "cosilo init", {"cosilo init": init})
            anew.leave_ports_to_the_system()
            anew.start_coordinator()
            for name in OTHERS:
                anew.enrol(name)
                anew.daemon(name).start()
            for name in OTHERS:
                anew.wait_ready(name)
        with stage.checks.check("SECURITY.md: a new run begins from the old one's newest checkpoint, and a round closes"):
            (anew.data / "warm").mkdir()
            shutil.copyfile(weights, anew.data / "warm" / f"{weights.name}.safetensors")
            table = spoken(SECURITY, LOST_KEY, "[warm_start]").strip("[]")
            run = anew.create_run({"name": "chest-3", **SMALL, table: {"sha256": weights.name}})
            anew.accept_all(run)
            entry = anew.run_rounds(run, 1)[-1]
            expect((entry["phase"], sorted(entry["survivors"])) == ("closed", sorted(OTHERS)), f"{entry}")
            expect(anew.checkpoints(run)[0]["weights"] == weights.name, "it did not begin from the old one's checkpoint")


def _closed(federation: LocalFederation) -> int:
    return int(federation.metric(COORDINATOR, "cosilo_rounds_total", outcome="closed"))
