"""A federation in its good days, typed from its pages: founded, enrolled, trained, watched, paused, left.

Owns these steps and the stage on which they play. Must not know what is lost or stolen.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.e2e.checklist import Checklist, expect, wait_for
from tests.e2e.runbooks_pages import section_block, stands
from tests.e2e.runbooks_person import Person
from tests.federation.local import COORDINATOR, LocalFederation, SiteSpec
from tests.federation.processes import FederationError
from tests.federation.toml_files import Toml

RUN_PAGE, ENROL, LEAVE, MONITOR = "run-a-federation.md", "enrol-site.md", "leave-or-pause.md", "monitor.md"
BRING_IN, DESCRIBE, REHEARSE, WRONG = "4. Bring in a site", "5. Describe a run", "7. Rehearse, then train", "When something is wrong"
ST_ANNA = "st-anna"
OTHERS = ("northgate", "riverside", "lakeview")
CLASSES = ("AbdomenCT", "CXR", "Hand")
IMAGES_PER_CLASS = 12
CONNECTED_S = 60.0
RUN = "chest-1"
EXAMPLE_RUN = "712e02427091"  # in run-a-federation.md
ANYWHERE = "127.0.0.1:0 --enrolment-address 127.0.0.1:0"
_OURS = "\n[metrics]\nlisten = '127.0.0.1:0'\n[trainer]\ndevice = 'cpu'\nthreads = 1\n[network]\nbackoff_max_s = 3.0\n"


@dataclass
class Stage:
    """Who plays, and with what. root: a folder of its own."""

    checks: Checklist
    root: Path
    federation: LocalFederation
    admin: Person
    coordinator: Person
    sites: dict[str, Person]
    run: str = ""
    members: list[str] = field(default_factory=lambda: [*OTHERS, ST_ANNA])  # whom a round needs

    @property
    def st_anna(self) -> Person:
        """The person at the site that the pages tell of."""
        return self.sites[ST_ANNA]

    def wait_connected(self, names: list[str] | None = None) -> None:
        """Until these sites, or all members, are connected."""
        wanted = set(self.members if names is None else names)

        def connected() -> bool:
            return wanted <= {site["site"] for site in self.federation.cosilo_json("status")["sites"] if site["connected"]}

        wait_for(connected, f"{sorted(wanted)} are connected", CONNECTED_S, lambda: "\n".join(map(str, self.federation.log_files())))

    def answers(self) -> bool:
        """Whether the coordinator answers an admin."""
        try:
            self.federation.cosilo("status")
        except FederationError:
            return False
        return True

    def closes_a_round(self, run: str = RUN) -> list[str]:
        """Asks for a round of the run, which closes. Returns the sites whose updates are in it."""
        entry = self.federation.run_rounds(run, 1)[-1]
        expect(entry["phase"] == "closed", f"{entry}")
        return sorted(entry["survivors"])


def specs(root: Path) -> list[SiteSpec]:
    """The four sites, their images written: a few grey squares in a folder a class."""
    draw = np.random.default_rng(1)
    made = []
    for name in (*OTHERS, ST_ANNA):
        images = root / name / "images"
        for number, label in enumerate(CLASSES):
            (images / label).mkdir(parents=True)
            for count in range(IMAGES_PER_CLASS):
                pixels = draw.integers(60 * number, 60 * number + 80, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(images / label / f"{count}.png")
        data: dict[str, Toml] = {"kind": "folder", "path": str(images), "classes": list(CLASSES)}
        made.append(SiteSpec(name, data))
    return made


def found(stage: Stage) -> None:
    """run-a-federation.md, 2 and 3: founded, the folders dealt out, the coordinator started."""
    checks, admin, federation = stage.checks, stage.admin, stage.federation
    page, heading = RUN_PAGE, "2. Found the federation"
    with checks.check("run-a-federation.md: found the federation, deal out its folders"):
        said = admin.types(page, heading, 0, {"coordinator.example.org:7443": ANYWHERE})
        expect("founded federation chest in chest-study" in said, said)
        shutil.copytree(admin.home / "chest-study" / "ca", stage.root / "safe" / "ca")
        admin.types(page, heading, 1, {"scp -rp": "cp -rp", "coordinator.example.org:": f"{stage.coordinator.home}/"})
        expect(not (admin.home / "chest-study" / "coordinator").exists(), "the coordinator's folder is still at the admin's")
        shutil.rmtree(admin.home / "chest-study" / "ca")
        (federation.folder / "admin").symlink_to(admin.home / "chest-study" / "admin")
        federation.leave_ports_to_the_system()
    with checks.check("run-a-federation.md: start the coordinator; before it is up, `cosilo` ends with 3 and says so"):
        said = admin.types(page, "3. Start the coordinator", 2, code=3)
        stands(RUN_PAGE, "error: reach coordinator", said)
        federation.serve_by(COORDINATOR, stage.coordinator.takes(page, "3. Start the coordinator", 0), stage.coordinator.home)
        federation.start_coordinator()
        metrics = federation.endpoints(COORDINATOR)["metrics"]
        expect("ok" in stage.coordinator.types(page, "3. Start the coordinator", 1, {"127.0.0.1:9464": metrics}), "/readyz is not ok")
        expect("no runs" in (said := admin.types(page, "3. Start the coordinator", 2)) or "chest" in said, said)


def enrol(stage: Stage) -> None:
    """run-a-federation.md 4, and enrol-site.md with what goes wrong in it."""
    checks, admin, site, federation = stage.checks, stage.admin, stage.st_anna, stage.federation
    with checks.check("enrol-site.md and run-a-federation.md: invite, enrol, approve over the telephone, check, serve"):
        for name in OTHERS:
            federation.enrol(name)
            federation.daemon(name).start()
        same = section_block(ENROL, "1. The admin invites")
        expect(f"{admin.takes(RUN_PAGE, BRING_IN, 0)}\n" == same, "the two pages invite by other lines")
        admin.types(ENROL, "1. The admin invites")
        invitation = admin.home / "st-anna.invitation"
        expect(invitation.stat().st_mode & 0o777 == 0o600, "others can read the invitation")
        stands(ENROL, "invited and has not enrolled yet", admin.types(ENROL, "3. The admin approves", code=1))
        text = section_block(RUN_PAGE, BRING_IN, 0, "toml")
        (site.home / "site.toml").write_text(text + _OURS, encoding="utf-8")
        open_copy = site.home / "st-anna.invitation"
        open_copy.write_bytes(invitation.read_bytes())
        open_copy.chmod(0o644)
        expect("chmod 600" in site.types(RUN_PAGE, BRING_IN, 1, code=1), "a copy that others can read was taken")
        open_copy.chmod(0o600)
        site.runs("export COSILO_SITE_CONFIG=$PWD/site.toml")
        stands(ENROL, "does not exist", site.runs("cosilo-site enrol nowhere.invitation", code=1))
        said = site.types(RUN_PAGE, BRING_IN, 1)
        expect("not a member yet" in said and "cosilo site approve st-anna" in said, said)
        fingerprint = re.findall(r"this site's key: (\S+)", said)
        stands(ENROL, "holds the identity of spiffe://...", site.types(ENROL, "2. The site enrols", code=1))
        stands(ENROL, "nobody answered the question", admin.types(RUN_PAGE, BRING_IN, 2, code=1))
        said = admin.types(ENROL, "3. The admin approves", answer="y\n")
        expect(len(fingerprint) == 1 and fingerprint[0] in said and "approved site st-anna" in said, said)
        stands(ENROL, "... the name is a member's or was removed", _twice(stage))
        check, serve = section_block(RUN_PAGE, BRING_IN, 3).splitlines()[1:]
        said = site.types(RUN_PAGE, BRING_IN, 3, {f"\n{serve}": ""})
        expect("ok       data           36 images (AbdomenCT: 12, CXR: 12, Hand: 12)" in said and "failed" not in said, f"{check}: {said}")
        expect(
            "failed" not in site.types(ENROL, "4. The site checks and starts", 0, {**_NO_SYSTEMD, "systemctl status cosilo-site": ""}), said
        )
        federation.serve_by(ST_ANNA, f"env COSILO_SITE_CONFIG=site.toml {site.takes(RUN_PAGE, BRING_IN, 3)}", site.home)
        federation.daemon(ST_ANNA).start()
        for name in stage.members:
            federation.wait_ready(name)
        stage.wait_connected()


_NO_SYSTEMD = {"sudo systemctl start cosilo-site": ""}


def _twice(stage: Stage) -> str:
    """What an invitation of a member's name comes to at the site that is somebody else."""
    return stage.admin.runs("cosilo site invite st-anna --local-demo --out again.invitation", code=1)


def train(stage: Stage) -> None:
    """run-a-federation.md, 5 to 7."""
    checks, admin = stage.checks, stage.admin
    with checks.check("run-a-federation.md: describe a run, every site accepts"):
        text = section_block(RUN_PAGE, DESCRIBE, 0, "toml")
        expect('"mednist-32"' in text, "the page's run has another preset")
        (admin.home / "run.toml").write_text(
            text.replace('"mednist-32"', '"digits"').replace("local_epochs = 1", "local_epochs = 1\nmax_steps = 2"), encoding="utf-8"
        )
        said = admin.types(RUN_PAGE, DESCRIBE, 0)
        expect("participants   lakeview, northgate, riverside, st-anna" in said and "a round needs  3 sites" in said, said)
        stage.run = re.findall(r"(?m)^run\s+([0-9a-f]{12})$", said)[0]
        here = {EXAMPLE_RUN: stage.run}
        said = stage.st_anna.types(RUN_PAGE, "6. Every site accepts", 0, here, answer="y\n")
        expect("chest-1" in said, said)
        for name in OTHERS:
            stage.sites[name].types(RUN_PAGE, "6. Every site accepts", 1, here, answer="y\n")
    with checks.check("run-a-federation.md: rehearse, train, statistics, list"):
        said = admin.types(RUN_PAGE, REHEARSE, 0)
        expect(re.search(r"round 1 \(rehearsal\) closed: 4 of 4 sites.* is exactly zero", said), said)
        said = admin.types(RUN_PAGE, REHEARSE, 1)
        rows = re.findall(r"(?m)^(\d)\s+(rehearsal|train|statistics)\s+closed\s+4/4", said)
        expect(rows[-4:] == [("1", "rehearsal"), ("2", "train"), ("3", "train"), ("4", "statistics")], said)


def take(stage: Stage) -> None:
    """run-a-federation.md, 8."""
    admin = stage.admin
    with stage.checks.check("run-a-federation.md: a grid, a checkpoint, a model that diffusers loads"):
        admin.types(RUN_PAGE, "8. Take the result", 0)
        home = admin.home
        for result in ("grid.png", "chest-1-model/README.md", "chest-1-cxr/model_index.json"):
            expect((home / result).exists(), f"there is no {result} but {sorted(path.name for path in home.iterdir())}")


def watch(stage: Stage) -> None:
    """monitor.md: at a glance, and a round's trace."""
    with stage.checks.check("monitor.md: at a glance, and where a slow round went"):
        site, metrics = stage.st_anna, stage.federation.endpoints(ST_ANNA)["metrics"]
        text = section_block(MONITOR, "At a glance")
        not_here = {line: "" for line in text.splitlines() if line.startswith(("systemctl", "cosilo status"))}
        said = site.types(MONITOR, "At a glance", 0, {**not_here, "127.0.0.1:9465": metrics})
        expect("the event loop turned" in said and "\nconnected" in said and "chest-1" in said, said)
        ours = {line: "" for line in text.splitlines() if not line.startswith("cosilo status")}
        expect("st-anna" in stage.admin.types(MONITOR, "At a glance", 0, ours), "status does not name the site")
        said = stage.admin.types(MONITOR, "Where did a slow round go?", 0, {"chest-1 7": "chest-1 2"})
        expect("round 2 of chest-1: train, closed" in said and "sum and write" in said, said)
        expect((stage.admin.home / "round-7.json").exists(), "there is no trace for Perfetto")


def pause(stage: Stage) -> None:
    """leave-or-pause.md: a run, a site, out of a run."""
    admin, site = stage.admin, stage.st_anna
    with stage.checks.check("leave-or-pause.md: a run is paused and resumed; a start meanwhile is refused"):
        heading = "A run"
        first, second, resume = section_block(LEAVE, heading).splitlines()
        admin.types(LEAVE, heading, 0, {f"\n{second}": "", f"\n{resume}": ""})
        expect(re.search(r"chest-1 .*paused.*the scanner moves", said := admin.runs("cosilo run list")), f"{first}: {said}")
        said = admin.runs("cosilo round start chest-1", code=1)
        expect("is paused by admin" in said and "cosilo run resume" in said, said)
        admin.types(LEAVE, heading)
        expect("paused" not in admin.runs("cosilo run list"), "it is still paused")
    with stage.checks.check("leave-or-pause.md: a site gives its GPU to the clinic, and goes on"):
        text = section_block(LEAVE, "A site, for clinical work")
        resume, status = text.splitlines()[-2:]
        said = site.types(LEAVE, "A site, for clinical work", 0, {f"\n{resume}": "", "17:30": "23:59"})
        expect("paused" in said, said)
        expect("paused" not in site.types(LEAVE, "A site, for clinical work", 0).split("\n" + status)[-1].splitlines()[-1], said)
    with stage.checks.check("leave-or-pause.md: out of a run, and in again by accepting"):
        said = site.types(LEAVE, "Out of a run", 0, {"4f2a": stage.run[:4]}, answer="y\n")
        expect("left" in said, said)
        said = site.runs(f"cosilo-site leave {stage.run[:4]}", answer="y\n", code=1)
        stands(LEAVE, "this site left it at ...", said)
        site.runs(f"cosilo-site accept {stage.run}", answer="y\n")
