"""A site and then the coordinator are stolen, and at last the only admin's key is lost, typed from SECURITY.md in a federation of their own.

Owns the two thefts and the federation in which they happen, which is as good as new after each. Must not know how a federation comes to be,
nor what becomes of one without an admin (runbooks_anew.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.e2e.checklist import CheckFailed, expect, wait_for
from tests.e2e.runbooks_anew import found_anew
from tests.e2e.runbooks_departures import NEXT_RUN, SMALL
from tests.e2e.runbooks_federation import CONNECTED_S, OTHERS, RUN, ST_ANNA, Stage, specs
from tests.e2e.runbooks_pages import section_block, stands
from tests.e2e.runbooks_person import Person
from tests.e2e.runbooks_tls import answered, believed
from tests.federation.local import COORDINATOR, LocalFederation

SECURITY, RECOVER, CA = "SECURITY.md", "recover.md", "ca.md"
STOLEN_SITE, BROKEN_INTO, BACK_UP, A_SITE = "A site's machine or state folder", "The coordinator", "Back up the coordinator", "A site"
ST_ANNA_2 = "st-anna-2"
ASKED = 30  # rounds, of which the run is stopped before they are had
AT_ONCE_S = 10.0  # for an order that a stream brings; its sites may be training on two busy cores
BACKUPS = {"/opt/cosilo-coordinator/current/bin/": "", "/var/backups/cosilo": "backups", "/etc/cosilo/": "coordinator/"}


def stolen(stage: Stage) -> None:
    """SECURITY.md: a site, the coordinator, and what is left where nobody is an admin any more."""
    root = stage.root / "stolen"
    with LocalFederation(root, specs(root), name="chest") as federation:
        try:
            ward = _settled(stage, root, federation)
            _site(ward)
            _coordinator(ward)
            found_anew(ward)
        except CheckFailed as error:
            tails = "\n".join(f"--- {path.name} ---\n{path.read_text(errors='replace')[-1500:]}" for path in federation.log_files())
            raise CheckFailed(f"{error}\n\n{tails}") from None


def _settled(stage: Stage, root: Path, federation: LocalFederation) -> Stage:
    """Four sites that have accepted a run; the CA's root in its safe; everybody at a machine of their own."""
    with stage.checks.check("a federation of four sites for thieves"):
        federation.start()
        shutil.move(federation.folder / "ca", root / "safe" / "ca")
        admin, sites = stage.admin.beside(root / "admin"), {name: stage.admin.beside(root / name) for name in (*OTHERS, ST_ANNA)}
        (admin.home / ".config" / "cosilo").mkdir(parents=True)
        (admin.home / ".config" / "cosilo" / "admin").symlink_to(federation.folder / "admin")
        for name in sites:
            sites[name].runs(f"export COSILO_SITE_CONFIG={federation.config(name)}")
        ward = Stage(stage.checks, root, federation, admin, stage.admin.beside(federation.folder), sites)
        ward.wait_connected()
        federation.accept_all(federation.create_run({"name": RUN, **SMALL}))
    return ward


def _site(stage: Stage) -> None:
    """SECURITY.md, A site's machine or state folder."""
    admin, federation = stage.admin, stage.federation
    with stage.checks.check(
        "SECURITY.md: a site is stolen in the middle of a round: cut off at once, no call answered; the round ended; the others go on"
    ):
        federation.start_rounds(RUN, ASKED)
        wait_for(lambda: federation.rounds(RUN), "a round is in progress", CONNECTED_S)  # its sites start their trainers: seconds
        admin.says(SECURITY, STOLEN_SITE, "cosilo site revoke NAME", {"NAME": ST_ANNA}, answer="y\n")
        stage.members.remove(ST_ANNA)
        wait_for(lambda: not _connected(stage, ST_ANNA), "its stream is cut", AT_ONCE_S)
        admin.says(SECURITY, STOLEN_SITE, "cosilo run stop RUN --abandon", {"RUN": RUN})
        rounds = federation.rounds(RUN)
        expect(len(rounds) < ASKED and rounds[-1]["phase"] == "abandoned", f"{rounds}")
        said = stage.st_anna.runs("cosilo-site check", code=1)
        stands(SECURITY, "was revoked in ...", said)
        expect(f"cosilo site invite {ST_ANNA_2} --out FILE" in said and "site approve" not in said, said)
        tls = federation.state(ST_ANNA) / "identity"
        expect(answered(federation, tls, tls), "its certificate is refused at the handshake already: then this says nothing of calls")
        expect(stage.closes_a_round() == sorted(stage.members), "the others do not go on, or not alone")
        wait_for(lambda: not _round_keys(stage), "the keys of the rounds that ended are gone", AT_ONCE_S, lambda: str(_round_keys(stage)))
    with stage.checks.check("SECURITY.md: the coordinator's backup and the log's head, as on any night"):
        said = admin.says(SECURITY, BROKEN_INTO, "cosilo audit verify --head FILE", {"FILE": "night.head"})
        expect("the chain holds" in said, said)
        make = section_block(RECOVER, BACK_UP).splitlines()[1]
        said = stage.coordinator.types(RECOVER, BACK_UP, 0, {make: "mkdir -m 700 backups", **BACKUPS})
        newest = federation.checkpoints(RUN)[-1]
        expect("it holds keys" in said and f"of round {newest['round']}: " in said and str(newest["weights"]) in said, said)
    with stage.checks.check("SECURITY.md and recover.md: the site that was stolen enrols anew, under a new name"):
        site = admin.beside(stage.root / ST_ANNA_2)
        text = federation.config(ST_ANNA).read_text(encoding="utf-8")
        text = text.replace(str(federation.state(ST_ANNA)), str(federation.state(ST_ANNA_2)))
        federation.state(ST_ANNA_2).mkdir()
        federation.config(ST_ANNA_2).write_text(text, encoding="utf-8")
        site.runs(f"export COSILO_SITE_CONFIG={federation.config(ST_ANNA_2)}")
        revoke = section_block(RECOVER, A_SITE).splitlines()[1]
        admin.types(RECOVER, A_SITE, 0, {revoke: ""})
        shutil.copy(admin.home / "st-anna-2.invitation", site.home)
        said = site.types(RECOVER, A_SITE, 1, {"sudo systemctl start cosilo-site": ""})
        expect(f"cosilo site approve {ST_ANNA_2}" in said, said)
        expect("approved site" in (said := admin.types(RECOVER, A_SITE, 2, answer="y\n")), said)
        stage.sites[ST_ANNA_2] = site
        federation.restart(ST_ANNA_2)
        stage.wait_connected([ST_ANNA_2])
        expect(stage.closes_a_round() == sorted(stage.members), "it is in a run that names its old key")


def _coordinator(stage: Stage) -> None:
    """SECURITY.md, The coordinator: in its order, with one site that is away until it is cut off."""
    admin, federation = stage.admin, stage.federation
    machine, thief = federation.folder / COORDINATOR, stage.root / "thief"
    safe = stage.root / "safe" / "ca"
    with stage.checks.check("SECURITY.md: the coordinator is stolen; the sites stop; restored on a new machine; its list put back"):
        admin.runs("cosilo audit verify --head newest.head")
        members = admin.runs("cosilo members")
        for name in (*stage.members, ST_ANNA_2):
            federation.daemon(name).stop()
        federation.daemon(COORDINATOR).stop()
        machine.rename(thief)
        machine.mkdir()
        (night,) = (stage.coordinator.home / "backups").iterdir()
        today = {"2026-11-23": night.name}
        text = section_block(RECOVER, BROKEN_INTO)
        chown = next(line for line in text.splitlines() if "chown" in line)
        stage.coordinator.types(
            RECOVER, BROKEN_INTO, 0, {chown: "", **today, "/var/backups/cosilo": "backups", "/etc/cosilo/": "coordinator/"}
        )
        start = "sudo systemctl start cosilo-coordinator"
        said = stage.coordinator.types(RECOVER, BROKEN_INTO, 2, {**BACKUPS, **today, start: ""})
        expect("chest: restored as it was at" in said and "cosilo members --put-back" in said, said)
        federation.restart(COORDINATOR)
        admin.says(SECURITY, BROKEN_INTO, "cosilo members --put-back")
        expect(admin.runs("cosilo members") == members, "the list is not the one from before")
    with stage.checks.check("SECURITY.md: another CA, the sites start and move to it, the old root goes by force, who is away is cut off"):
        old = (thief / "ca.crt").read_text(encoding="ascii")
        admin.says(SECURITY, BROKEN_INTO, "cosilo ca rotate CA_DIR", {"CA_DIR": str(safe)})
        for name in stage.members:
            federation.start_again(name)
        stage.wait_connected()
        # an admin moves with any two commands; a revoked site's name is no member's, so nobody waits for it
        wait_for(lambda: _waiting(stage) == [ST_ANNA_2], f"all but {ST_ANNA_2} have moved", CONNECTED_S, lambda: str(_waiting(stage)))
        expect(ST_ANNA_2 in (said := admin.says(SECURITY, BROKEN_INTO, "cosilo ca status")), said)
        said = admin.says(SECURITY, BROKEN_INTO, "cosilo ca retire --force")
        expect(f"cut off, until they enrol again with new invitations: {ST_ANNA_2}\n" in said, said)
        new = max(safe.glob("[0-9]*"), key=lambda folder: int(folder.name)) / "root.crt"
        trusted = new.read_text(encoding="ascii")
        wait_for(lambda: all(_ca_of(stage, name) == trusted for name in stage.members), "the sites trust the new root alone", CONNECTED_S)
        stage.wait_connected()
        expect(believed(thief, old) and not believed(thief, trusted), "the thief can still play the coordinator")
        for name in (*stage.members, ST_ANNA_2, ST_ANNA):
            holds = answered(federation, federation.state(name) / "identity", new.parent, "root.crt")
            expect(holds == (name in stage.members), f"{name}'s certificate is {'' if holds else 'not '}answered")
        expect(not _connected(stage, ST_ANNA), "the site that was stolen first is there again")
    with stage.checks.check(
        "SECURITY.md: the log is compared with a head from before the backup and one from after; fingerprints; a round"
    ):
        said = admin.says(SECURITY, BROKEN_INTO, "cosilo audit verify --head FILE", {"FILE": "night.head"})
        expect("the chain holds" in said, said)
        said = admin.runs("cosilo audit verify --head newest.head", code=1)
        cut, anew = "its end was cut off", "the log was written anew up to there"
        stands(SECURITY, cut if cut in said else anew, said)
        listed = admin.says(SECURITY, BROKEN_INTO, "cosilo members")
        told = stage.sites[OTHERS[0]].says(SECURITY, BROKEN_INTO, "cosilo-site members")
        prints = re.compile(r"(?m)^(\S+) +(?:site|admin) +((?:[0-9a-f]{4}-){7}[0-9a-f]{4})")
        expect(len(prints.findall(listed)) == 5 and prints.findall(listed) == prints.findall(told), f"{listed}\n{told}")
        known = len(federation.rounds(RUN))
        admin.says(SECURITY, BROKEN_INTO, "cosilo round start RUN", {"RUN": RUN})
        federation.wait_idle(RUN)
        ahead, closed = federation.rounds(RUN)[known:]
        expect((ahead["phase"], closed["phase"]) == ("abandoned", "closed"), f"{ahead}\n{closed}")
        expect(sorted(closed["survivors"]) == sorted(stage.members), f"{closed}")
    with stage.checks.check("SECURITY.md: who was cut off is told so, enrols again, and is in a new run"):
        _come_back(stage, stage.sites[ST_ANNA_2])


def _come_back(stage: Stage, site: Person) -> None:
    admin, federation = stage.admin, stage.federation
    federation.start_again(ST_ANNA_2)
    words = "shows a coordinator's certificate of a CA that this site does not trust"
    wait_for(lambda: words in federation.log(ST_ANNA_2), "it says why it does not connect", CONNECTED_S, lambda: federation.log(ST_ANNA_2))
    stands(CA, words, federation.log(ST_ANNA_2))
    federation.daemon(ST_ANNA_2).stop()
    identity = federation.state(ST_ANNA_2) / "identity"
    identity.rename(identity.with_name("identity.old"))
    admin.runs(f"cosilo site invite {ST_ANNA_2} --out again.invitation")
    shutil.copy(admin.home / "again.invitation", site.home)
    site.runs("cosilo-site enrol again.invitation")
    admin.runs(f"cosilo site approve {ST_ANNA_2} --readmit", answer="y\n")
    federation.restart(ST_ANNA_2)
    stage.members.append(ST_ANNA_2)
    stage.wait_connected()
    run = federation.create_run({"name": NEXT_RUN, **SMALL})
    federation.accept_all(run, stage.members)
    expect(stage.closes_a_round(NEXT_RUN) == sorted(stage.members), "it is not in the new run")


def _round_keys(stage: Stage) -> list[Path]:
    """What the sites that go on still have of any round."""
    return [path for name in stage.members for path in (stage.federation.state(name) / "rounds").rglob("*") if path.is_file()]


def _connected(stage: Stage, name: str) -> bool:
    return any(site["connected"] for site in stage.federation.cosilo_json("status")["sites"] if site["site"] == name)


def _waiting(stage: Stage) -> list[str]:
    """Who still has a certificate of the old CA only."""
    return list(stage.federation.cosilo_json("ca", "status")["waiting"])


def _ca_of(stage: Stage, name: str) -> str:
    """The roots that a site trusts."""
    return (stage.federation.state(name) / "identity" / "ca.crt").read_text(encoding="ascii")
