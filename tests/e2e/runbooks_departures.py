"""A run's end, a site that enrols again and sites that leave, typed from run-a-federation.md, leave-or-pause.md and uninstall.md.

Owns these steps; after `leave` two sites are left and nothing runs. Must not know why anybody goes.
"""

from __future__ import annotations

import re
import shutil
import sqlite3

from tests.e2e.checklist import expect
from tests.e2e.runbooks_federation import LEAVE, RUN, RUN_PAGE, ST_ANNA, Stage
from tests.e2e.runbooks_pages import section_block, stands
from tests.federation.local import COORDINATOR
from tests.federation.toml_files import Toml

LATER, OUT, UNINSTALL = "Later", "Out of the federation", "uninstall.md"
ASKED = 5  # rounds, of which the run is stopped before they are had
NEXT_RUN = "chest-2"
SMALL: dict[str, Toml] = {
    "preset": "digits",
    "ema_decay": 0.5,
    "architecture": {"num_classes": 3},
    "training": {"local_epochs": 1, "max_steps": 2},
}
_NO_SYSTEMD = {"sudo systemctl stop cosilo-site": ""}


def later(stage: Stage) -> None:
    """run-a-federation.md, Later: a run is stopped, looked at, and let go on."""
    admin, site, federation = stage.admin, stage.st_anna, stage.federation
    with stage.checks.check("run-a-federation.md: stop the run, with the round in progress; look at everything; it goes on when asked"):
        stage.closes_a_round()
        first = len(federation.rounds(RUN))
        federation.start_rounds(RUN, ASKED)
        said = admin.types(RUN_PAGE, LATER, 0)
        expect(re.search(r"(?m)^state +stopped", said) and f"\n{ST_ANNA} " in said, said)
        expect(len(federation.rounds(RUN)) < first + ASKED and federation.rounds(RUN)[-1]["phase"] in ("closed", "abandoned"), said)
        expect(stage.closes_a_round() == sorted(stage.members), "it does not go on with everybody")
        said = site.types(RUN_PAGE, LATER, 1)
        expect(f"site          {ST_ANNA} of federation chest" in said and "daemon        running" in said and "this site" in said, said)


def again(stage: Stage) -> None:
    """run-a-federation.md, Later: a site enrols again and is in new runs only."""
    admin, site, federation = stage.admin, stage.st_anna, stage.federation
    with stage.checks.check("run-a-federation.md: a site enrols again; the old run goes on without it, and it is in a new one"):
        others = sorted(set(stage.members) - {ST_ANNA})
        federation.daemon(ST_ANNA).stop()
        admin.types(RUN_PAGE, LATER, 2)
        shutil.copy(admin.home / "st-anna-again.invitation", site.home)
        said = site.types(RUN_PAGE, LATER, 3)
        fingerprint = re.findall(r"this site's key: (\S+)", said)
        said = admin.types(RUN_PAGE, LATER, 4, answer="y\n")
        expect(len(fingerprint) == 1 and fingerprint[0] in said, f"{fingerprint}: {said}")
        federation.restart(ST_ANNA)
        stage.wait_connected()
        expect(stage.closes_a_round() == others, "the old run does not go on with the others alone")
        run = federation.create_run({"name": NEXT_RUN, **SMALL})
        for name in stage.members:
            stage.sites[name].runs(f"cosilo-site accept {run}", answer="y\n")
        expect(stage.closes_a_round(NEXT_RUN) == sorted(stage.members), "it is not in the new run")


def leave(stage: Stage) -> None:
    """leave-or-pause.md, Out of the federation: with the coordinator there, back again, and without it. uninstall.md: before the program goes."""
    admin, site, federation = stage.admin, stage.st_anna, stage.federation
    others = sorted(set(stage.members) - {ST_ANNA})
    with stage.checks.check("leave-or-pause.md: a site leaves the federation: barred at once, its keys gone, what remains is named"):
        said = site.types(LEAVE, OUT, 0, _NO_SYSTEMD, answer="y\n", code=1)
        stands(LEAVE, "another daemon (pid N) holds it", re.sub(r"pid \d+", "pid N", said))
        federation.daemon(ST_ANNA).stop()
        said = site.types(LEAVE, OUT, 0, _NO_SYSTEMD, answer="y\n")
        expect("this site's keys are destroyed" in said and f"cosilo site revoke {ST_ANNA}" in said, said)
        state = federation.state(ST_ANNA)
        _expect_keyless(stage, ST_ANNA)
        for name in ("state.db", "audit.log"):
            expect((state / name).exists() and f"{state / name}: " in said, f"{name} was to remain, and to be named:\n{said}")
        expect((site.home / "site.toml").exists() and any((site.home / "images").rglob("*.png")), "its images or its site.toml are gone")
        expect("copies of the state folder" in said and "nobody can take it out" in said, said)
        with sqlite3.connect(f"file:{state / 'state.db'}?mode=ro", uri=True) as ledger:
            left = {bytes(run).hex() for run, gone in ledger.execute('SELECT run, "left" FROM departures ORDER BY id') if gone}
        expect({run["run"] for run in federation.cosilo_json("run", "list")["runs"]} <= left, f"its ledger has left {left} only")
        for command in ("cosilo site list", "cosilo status"):
            stands(LEAVE, "left: revoke NAME", admin.runs(command).replace(ST_ANNA, "NAME"))
        expect(stage.closes_a_round(NEXT_RUN) == others, "the others do not go on")
    with stage.checks.check("leave-or-pause.md: an admin makes it final; a new invitation and --readmit bring it back"):
        admin.types(LEAVE, OUT, 1, answer="y\n")
        expect(ST_ANNA not in stage.sites[others[0]].runs("cosilo-site members"), "it is still a member")
        stage.members.remove(ST_ANNA)
        admin.runs(f"cosilo site invite {ST_ANNA} --out back.invitation")
        shutil.copy(admin.home / "back.invitation", site.home)
        site.runs("cosilo-site enrol back.invitation")
        admin.says(LEAVE, OUT, "cosilo site approve NAME --readmit", {"NAME": ST_ANNA}, answer="y\n")
        federation.restart(ST_ANNA)
        stage.wait_connected([ST_ANNA])
    with stage.checks.check("uninstall.md: a site leaves before its program goes"):
        name = others[0]
        federation.daemon(name).stop()
        stop, command, installer = section_block(UNINSTALL, "A site").splitlines()
        said = stage.sites[name].types(UNINSTALL, "A site", 0, {stop: "", installer: ""}, answer="y\n")
        expect(f"cosilo site revoke {name}" in said, f"{command}: {said}")
        _expect_keyless(stage, name)
        admin.says(UNINSTALL, "A site", "cosilo site revoke THIS-SITE", {"THIS-SITE": name}, answer="y\n")
        expect(name not in admin.runs("cosilo members"), "it is still a member")
        stage.members.remove(name)
    with stage.checks.check("leave-or-pause.md: leaving while nobody answers ends with 3, and says what to tell an admin"):
        federation.daemon(COORDINATOR).stop()
        federation.daemon(ST_ANNA).stop()
        said = site.types(LEAVE, OUT, 0, _NO_SYSTEMD, answer="y\n", code=3)
        expect("by telephone" in said and f"please run: cosilo site revoke {ST_ANNA}" in said, said)
        _expect_keyless(stage, ST_ANNA)


def _expect_keyless(stage: Stage, name: str) -> None:
    """That a site's state folder has no key, no certificate and no weights any more."""
    state = stage.federation.state(name)
    there = [str(path.relative_to(state)) for path in state.rglob("*") if ".key" in path.name or path.suffix in (".crt", ".safetensors")]
    expect(
        not there and not (state / "identity").exists() and not (state / "artifacts").exists(), f"{name} still has {there or 'its folders'}"
    )
