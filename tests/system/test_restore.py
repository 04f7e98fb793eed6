"""Real processes: a coordinator is restored from a backup that its sites have left behind, and the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, LocalFederation, _script
from tests.federation.processes import FederationError, run_command, wait_until

pytestmark = pytest.mark.timeout(600)

PLAN = {
    "name": "restored",
    "preset": "digits",
    "n_min": 3,
    "f": 1,
    "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
    "training": {"local_epochs": 100, "batch_size": 16, "max_steps": 2},
    "deadlines": {"gather_s": 60.0, "training_s": 300.0},  # cold trainers on a machine that others share
}


def coordinator_command(federation: LocalFederation, *arguments: str) -> str:
    command = [_script("cosilo-coordinator"), *arguments, "--config", str(federation.config(COORDINATOR))]
    return run_command(command, federation.logs / "commands.log", federation._environment)


def seen_version(federation: LocalFederation, site: str) -> int:
    """Of the members list that a site's folder holds."""
    return int(json.loads((federation.state(site) / "identity" / "members.json").read_text())["list"]["version"])


def test_a_run_goes_on_after_its_coordinator_was_restored(tmp_path: Path) -> None:
    specs = digits_sites(tmp_path, 5, alpha=0.5, least=200, seed=3)
    sites, spare = sorted(spec.name for spec in specs[:4]), specs[4].name
    with LocalFederation(tmp_path, specs, local_demo=False, typed=False) as federation:
        federation.initialise()
        federation.start_coordinator()
        for name in federation.sites:
            federation.enrol(name)  # the spare one is a member and never runs
        for name in sites:
            federation.daemon(name).start()
        for name in sites:
            federation.wait_ready(name)
        run = federation.create_run({**PLAN, "participants": list(sites)})
        federation.accept_all(run, sites)
        federation.run_rounds(run, 2)

        backup = tmp_path / "backup"
        assert "backup of local" in coordinator_command(federation, "backup", str(backup))  # while it serves
        after_backup = federation.run_rounds(run, 2)
        version = int(federation.cosilo_json("members")["version"])
        federation.cosilo("site", "revoke", spare, "--yes")  # the backup does not know of this either
        for site in sites:
            wait_until(lambda site=site: seen_version(federation, site) == version + 1, f"{site} has the new list", 30.0)

        federation.daemon(COORDINATOR).stop()
        with pytest.raises(FederationError, match="is not empty"):
            coordinator_command(federation, "restore", str(backup))
        shutil.move(federation.data, tmp_path / "lost")
        assert "restored as it was at" in coordinator_command(federation, "restore", str(backup))
        federation.restart(COORDINATOR)
        with pytest.raises(FederationError, match=f"version {version}: version {version + 1} was seen before"):
            federation.cosilo("members")
        federation.cosilo("members", "--put-back")
        assert int(federation.cosilo_json("members")["version"]) == version + 1
        assert spare not in {member["name"] for member in federation.cosilo_json("members")["members"]}
        for site in sites:
            federation.wait_ready(site)

        before = federation.checkpoints(run)
        assert [c["round"] for c in before] == [0, 1, 2]
        rounds = federation.run_rounds(run, 2)
        ended = [(r["round"], r["phase"]) for r in rounds]
        assert ended == [(1, "closed"), (2, "closed"), (3, "abandoned"), (5, "closed"), (6, "closed")]
        assert "declined: protocol" in rounds[2]["reason"]
        assert rounds[3]["base"] == before[-1]["weights"]
        assert rounds[3]["base"] == after_backup[2]["base"]  # trained from a second time: R8 counts, and allows two
        assert [c["round"] for c in federation.checkpoints(run)] == [0, 1, 2, 5, 6]
        assert all(r["survivors"] == sites for r in rounds[3:])
        assert "the coordinator went back" in federation.log(sites[0])
        assert json.loads((backup / "backup.json").read_text())["federation"] == "local"
        federation.check_alive()
