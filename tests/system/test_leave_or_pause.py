"""docs/operating/leave-or-pause.md, typed: four sites pause a run, pause a site for clinical work, leave a run and the federation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.federation.digits import digits_sites
from tests.federation.faults import trainer_of
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import FederationError, wait_until

pytestmark = pytest.mark.timeout(900)  # five processes that each load torch: minutes where others share the machine

# More than a second of training on an idle core. The person's command comes as soon as the trainer's process is there, which has torch to load first.
LONG_STEPS = 60
SHORT_STEPS = 4
WAIT_S = 120.0  # a cold trainer on a machine that others share has taken 17 s


def test_pause_and_leave_as_people_type_it(tmp_path: Path) -> None:
    with LocalFederation(tmp_path, digits_sites(tmp_path, 4, alpha=0.5, least=200, seed=1), typed=False) as federation:
        federation.start()
        names = sorted(federation.sites)
        busy, leaver = names[0], names[-1]
        run, brief = clinic(federation, "clinic", LONG_STEPS), clinic(federation, "brief", SHORT_STEPS)

        federation.cosilo("run", "pause", run, "--reason", "the scanner moves")
        assert "paused by" in federation.cosilo("run", "list")
        with pytest.raises(FederationError, match="cosilo run resume"):
            federation.start_rounds(run, 1)
        federation.daemon(COORDINATOR).stop()
        federation.restart(COORDINATOR)
        assert federation.cosilo_json("run", "show", run)["state"] == "paused"
        federation.cosilo("run", "resume", run)

        federation.start_rounds(run, 1)
        wait_until(lambda: trainer_of(federation, busy) is not None, f"{busy} trains", WAIT_S, [federation.daemon(busy)])
        said = federation.site_command(busy, "pause", "--for", "2h", "--now", "--reason", "emergency imaging")
        assert "emergency imaging" in said
        wait_until(lambda: trainer_of(federation, busy) is None, f"{busy} gave its device back", 30.0, [federation.daemon(busy)])
        assert "emergency imaging" in federation.site_command(busy, "status")
        federation.wait_idle(run)
        assert federation.rounds(run)[-1]["survivors"] == names[1:]
        assert federation.site_command(busy, "resume") == "resumed\n"
        assert federation.run_rounds(brief, 1)[-1]["survivors"] == names

        assert "What remains" in federation.site_command(leaver, "leave", brief[:12], "--yes")
        assert federation.run_rounds(brief, 1)[-1]["survivors"] == names[:-1]

        with pytest.raises(FederationError, match="stop it first"):
            federation.site_command(leaver, "leave", "--federation", "--yes")
        federation.daemon(leaver).stop()
        said = federation.site_command(leaver, "leave", "--federation", "--yes")
        assert f"cosilo site revoke {leaver}" in said
        assert not list(federation.state(leaver).rglob("*.key"))
        assert f"left: revoke {leaver}" in federation.cosilo("site", "list")
        assert f"left: revoke {leaver}" in federation.cosilo("status")
        federation.cosilo("site", "revoke", leaver, "--yes")
        assert f"left: revoke {leaver}" not in federation.cosilo("site", "list")
        assert federation.run_rounds(brief, 1)[-1]["survivors"] == names[:-1]


def clinic(federation: LocalFederation, name: str, steps: int) -> str:
    """A run of so many steps a round that every site has accepted."""
    run = federation.create_run(
        {
            "name": name,
            "preset": "digits",
            "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
            "training": {"local_epochs": 100, "batch_size": 32, "max_steps": steps},
            "deadlines": {"training_s": 120},
        }
    )
    federation.accept_all(run)
    return run
