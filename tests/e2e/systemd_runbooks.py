"""docs/operating's runbooks, typed on a machine word for word, by a person who is not root and has sudo.

Owns who types a page's lines there, the step that upgrades and goes back, and the step that loses a coordinator and a site and has
them back.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.checklist import expect
from tests.e2e.runbooks_pages import filled
from tests.e2e.systemd_federation import COMPANIONS, HOSPITAL
from tests.e2e.systemd_machines import Machine

if TYPE_CHECKING:
    from tests.e2e.systemd import Stage

UPGRADE = "upgrade.md"
PERSON = "person"
SITE, COORDINATOR = "cosilo-site", "cosilo-coordinator"


def add_person(machine: Machine) -> None:
    """A user who may do everything by sudo and nothing without."""
    machine.shell(f"useradd --create-home {PERSON}; echo '{PERSON} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{PERSON}")


def give_person(machine: Machine, source: Path, name: str) -> None:
    """A file in the person's home, for their eyes only."""
    target = f"/home/{PERSON}/{name}"
    machine.put(source, target)
    machine.shell(f"chown {PERSON}: {target}; chmod 600 {target}")


def type_admin(stage: Stage, page: str, comment: str, named: Mapping[str, str]) -> str:
    """Types a block of `cosilo` commands as the admin. Returns what they printed."""
    said = ""
    for line in filled(page, comment, named).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        expect(program == "cosilo", f"{page}: an admin types cosilo, not {program}")
        said += stage.around.cosilo(*arguments)
    return said


def type_block(machine: Machine, page: str, comment: str, named: Mapping[str, str] | None = None) -> str:
    """Types a block as the person, from their home; named: what stands in the page as an example, and what it is here. Returns what it printed."""
    return machine.run("runuser", "-u", PERSON, "--", "sh", "-ec", f"cd\n{filled(page, comment, named or {})}")


def upgrade(stage: Stage) -> None:
    """upgrade.md in its order, and back to the program from before."""
    checks, site, coordinator = stage.checks, stage.site, stage.coordinator
    for machine, wheels in ((site, "site-wheels"), (coordinator, "coordinator-wheels")):
        add_person(machine)
        machine.shell(f"ln -s /newer /home/{PERSON}/{wheels}")
    digests = {kind: stage.wheelhouses.digest(kind, newer=True) for kind in ("site", "coordinator")}
    with checks.check("an upgrade in upgrade.md's order: backup, coordinator, site, a look, a rehearsal"):
        expect("it holds keys" in type_block(coordinator, "recover.md", "coordinator, while it serves"), "there is no backup")
        before = {machine.name: machine.main_pid(unit) for machine, unit in ((site, SITE), (coordinator, COORDINATOR))}
        said = type_block(coordinator, UPGRADE, "coordinator, with the new wheelhouse", {"DIGEST": digests["coordinator"]})
        expect(f"restarted {COORDINATOR}" in said and said.rstrip().endswith("ok"), said)
        stage.whole_round()  # the newer coordinator, the older sites
        said = type_block(site, UPGRADE, "site, with the new wheelhouse", {"DIGEST": digests["site"]})
        expect(f"restarted {SITE}" in said and "failed" not in said, said)
        after = {machine.name: machine.main_pid(unit) for machine, unit in ((site, SITE), (coordinator, COORDINATOR))}
        expect(not set(before.items()) & set(after.items()), f"a daemon was not restarted: {before} {after}")
        stage.wait_all_connected()
        said = type_admin(stage, UPGRADE, "admin, after an upgrade", {"RUN": stage.quick})
        expect(all(name in said for name in (*COMPANIONS, HOSPITAL)), said)
        entry = stage.around.wait_round(stage.quick)
        expect((entry["kind"], entry["phase"], len(entry["survivors"])) == ("rehearsal", "closed", 4), f"{entry}")
        coordinator.shell("rm -r /var/backups/cosilo")  # a backup never replaces another, and `recover` makes one of the same day
    with checks.check("back to the program from before, and on to the newer again without installing it"):
        older = stage.wheelhouses.digest("coordinator")[:16]
        type_block(coordinator, UPGRADE, "coordinator, the program from before", {"OLDER": older})
        expect(
            coordinator.shell("readlink -f /opt/cosilo-coordinator/current").strip().endswith(older), "it is not the program from before"
        )
        stage.whole_round()
        said = type_block(coordinator, UPGRADE, "coordinator, with the new wheelhouse", {"DIGEST": digests["coordinator"]})
        expect("is there already" in said and f"restarted {COORDINATOR}" in said, said)
        stage.whole_round()


def recover(stage: Stage) -> None:
    """recover.md, and upgrade.md's database from before, by their own words."""
    checks, site, coordinator, around = stage.checks, stage.site, stage.coordinator, stage.around
    today = {"2026-11-23": coordinator.shell("date +%F").strip()}
    with checks.check("a backup while it serves; the machine is lost; restored on a new one; the members list is put back; rounds go on"):
        expect("it holds keys" in type_block(coordinator, "recover.md", "coordinator, while it serves"), "there is no backup")
        stage.whole_round()  # of which the backup does not know
        coordinator.run("systemctl", "stop", COORDINATOR)
        coordinator.shell(f"rm -r /var/lib/{COORDINATOR}/* /etc/cosilo/coordinator.toml")
        type_block(coordinator, "recover.md", "coordinator, a new machine", today)
        type_block(coordinator, "recover.md", "coordinator, on either", today)
        around.cosilo("members", "--put-back")
        stage.wait_all_connected()
        around.start_round(stage.quick)
        entry = around.wait_round(stage.quick)
        before = around.cosilo_json("round", "list", stage.quick)["rounds"][-2]
        expect(
            (before["phase"], entry["phase"], sorted(entry["survivors"])) == ("abandoned", "closed", sorted((*COMPANIONS, HOSPITAL))),
            f"the sites had begun a round that the backup does not know: {before}\n{entry}",
        )
    with checks.check("back to the database from before an upgrade"):
        coordinator.shell(
            f"systemctl stop {COORDINATOR}; cd /var/lib/{COORDINATOR}/data; cp -p state.db state.db.v2.bak; systemctl start {COORDINATOR}"
        )
        type_block(coordinator, UPGRADE, "coordinator, with the older Cosilo installed")
        stage.whole_round()
    with checks.check("a restore on the same machine, of a folder that is moved away"):
        type_block(coordinator, "recover.md", "coordinator, the same machine")
        type_block(coordinator, "recover.md", "coordinator, on either", today)
        around.cosilo("members", "--put-back")
        stage.wait_all_connected()
    with checks.check("a site that lost its folder enrols anew, under another name"):
        around.cosilo("site", "revoke", HOSPITAL, "--yes")
        site.run("systemctl", "stop", SITE)
        site.shell(f"rm -r /var/lib/{SITE}/*")
        give_person(site, around.invite("hospital-2", approved=False), "st-anna-2.invitation")
        said = type_block(site, "recover.md", "site, a new machine")
        expect("not a member yet" in said, said)
        around.cosilo("site", "approve", "hospital-2", "--yes")
        stage.wait_connected("hospital-2")
