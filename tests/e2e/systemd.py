"""`make e2e-systemd`: both daemons installed by their installers on machines whose PID 1 is systemd, and everything that goes wrong there.

Two machines without any network but their own (see systemd_machines), fed from a wheelhouse; three more sites are plain processes on this
machine, so that sums are masked. Installs, enrols, trains; kills, hangs, stops, reboots; enrols again by a credential; uninstalls.
Everything is built anew; the folder that COSILO_E2E_CACHE names, where it is set, keeps the base image and other people's wheels.
The folder that COSILO_E2E_OLDER names, where it is set, has an older release's wheelhouses, `site` and `coordinator`: the machines begin
with them and are upgraded to what is built. Otherwise they are upgraded to a wheelhouse with the same wheels and another digest.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType

from tests.e2e.checklist import CheckFailed, Checklist, expect, run, wait_for
from tests.e2e.systemd_federation import COMPANIONS, HOSPITAL, Surroundings
from tests.e2e.systemd_machines import IMAGE, Engine, Machine
from tests.e2e.systemd_runbooks import recover, upgrade
from tests.e2e.systemd_wheels import Wheelhouses, base_image, to_install, wheelhouses

ROOT = Path(__file__).resolve().parents[2]
SITE, COORDINATOR = "cosilo-site", "cosilo-coordinator"
EXPOSURE_MAX = 2.5
WATCHDOG_S = 6  # in place of the unit's 60, so that the test does not wait a minute; the daemons read it from the environment
READY_S = 90.0  # after a start on a machine that does other things too
QUICK_STEPS, SLOW_STEPS = 4, 250  # a tenth of a second; and long enough to do something to a site meanwhile
EVERYBODY = sorted((*COMPANIONS, HOSPITAL))
PERSON = (  # what the hospital's person writes into site.toml, as sed has it
    "s/^backoff_max_s = .*/backoff_max_s = 3/",
    "s/^threads = 0/threads = 1/",  # four trainers share this machine's cores
    f"s/^# classes = .*/classes = {[str(digit) for digit in range(10)]}/".replace("'", '"'),  # this site has not every digit
)
OWN_PROCESSES = f"find /proc -maxdepth 1 -name '[0-9]*' -user {SITE} -printf '%f '"


class Stage:
    """Everything that a step of the test needs."""

    def __init__(self, checks: Checklist, wheelhouses: Wheelhouses, site: Machine, coordinator: Machine, around: Surroundings) -> None:
        self.checks = checks
        self.wheelhouses = wheelhouses
        self.site = site
        self.coordinator = coordinator
        self.around = around
        self._trained = 0  # rounds of the slow run, when its newest began
        self.quick = self.slow = ""  # two runs: of rounds that are over at once, and of rounds in which something can happen

    def wait_connected(self, site: str = HOSPITAL, present: bool = True) -> None:
        """Until the coordinator sees the site, or sees that it is gone."""
        what = f"{site} is {'connected' if present else 'gone'}"
        wait_for(lambda: (site in self.around.connected()) is present, what, READY_S)

    def wait_all_connected(self) -> None:
        """Until nobody is missing."""
        wait_for(lambda: self.around.connected() >= set(EVERYBODY), "all sites are connected", READY_S)

    def whole_round(self) -> float:
        """One round with everybody in its sum; returns its seconds."""
        self.wait_all_connected()
        self.around.start_round(self.quick)
        entry = self.around.wait_round(self.quick)
        expect(
            (entry["phase"], sorted(entry["survivors"])) == ("closed", EVERYBODY),
            f"round {entry['round']} is {entry['phase']} with {entry['survivors']}: {entry['reason']}",
        )
        return float(entry["seconds"])

    def slow_round(self) -> str:
        """Begins a round and returns its run when the hospital has begun to train in it."""
        self.wait_all_connected()
        before, self._trained = self._said("round begun"), self._said("trained")
        self.around.start_round(self.slow)
        wait_for(lambda: self._said("round begun") > before, "the hospital trains", READY_S)
        return self.slow

    def expect_training(self) -> None:
        """That the hospital has not finished the training it began; asked right after something was done to it."""
        expect(self._said("trained") == self._trained, "the hospital had finished training: nothing was interrupted")

    def _said(self, what: str) -> int:
        """How often the hospital said so of the slow run since it booted. Of its journal, since that answers at once."""
        pattern = f"^{what} .*round={self.slow[:12]}/"
        return len(self.site.shell(f"journalctl --unit {SITE} --boot --output=cat --grep='{pattern}' || true").splitlines())

    def journals(self) -> str:
        """What everybody said last."""
        site, coordinator = self.site.journal(SITE, "-n", "30"), self.coordinator.journal(COORDINATOR, "-n", "30")
        return f"--- {SITE} ---\n{site}\n--- {COORDINATOR} ---\n{coordinator}\n{self.around.logs()}"


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    return run("systemd: both daemons, installed and mistreated", _test)


def _test(checks: Checklist) -> None:
    with Engine() as engine:
        cache = Path(os.environ.get("COSILO_E2E_CACHE") or engine.root / "built")
        with checks.check("a wheelhouse with hashes for each, and a base image from a Debian mirror"), ThreadPoolExecutor(1) as pool:
            base = pool.submit(base_image, cache, engine.root)
            built = to_install(engine.root, wheelhouses(engine.root, cache))
            engine.docker("import", str(base.result()), IMAGE)
        around: Surroundings | None = None
        try:
            with checks.check("two machines boot; systemd runs as PID 1"):
                coordinator = engine.boot("coordinator", 10, built.first["coordinator"], built.newer["coordinator"])
                site = engine.boot(HOSPITAL, 11, built.first["site"], built.newer["site"])
                for machine in (coordinator, site):
                    machine.wait_booted()
                checks.figure("systemd", site.run("systemctl", "--version").splitlines()[0])
            around = Surroundings(engine.root / "around", coordinator.address)
            stage = Stage(checks, built, site, coordinator, around)
            for step in STEPS:
                try:
                    step(stage)
                except CheckFailed as error:
                    raise CheckFailed(f"{error}\n\n{stage.journals()}") from None
        finally:
            if around is not None:
                with checks.check("the other sites end in order"):
                    around.close()
            with checks.check("nothing of it is left on this machine: containers, network, mounts, groups, files"):
                engine.close()
                left = engine.leftovers()
                expect(not left, f"left: {left}")


# --- the steps, in order ---


def install(stage: Stage) -> None:
    """Both installers, and what they refuse."""
    checks, site, coordinator, around = stage.checks, stage.site, stage.coordinator, stage.around
    with checks.check("an installer refuses another digest, and a wheel that is not the one it says"):
        site.run("mkdir", "-p", "/srv")
        (images := around.root / "images").mkdir()
        count = around.write_images(images)
        site.put(images, "/srv/images")
        installer = ["/wheelhouse/install/install-site", "--data", "/srv/images"]
        expect("has the digest" in site.refused(*installer, "--digest", "0" * 64), "another digest was taken")
        site.shell(
            "mkdir /root/bad && ln -s /wheelhouse/*.whl /root/bad/ && sed '2s/sha256:..../sha256:0000/' /wheelhouse/requirements.txt "
            ">/root/bad/requirements.txt"
        )
        said = site.refused(*installer, "--wheelhouse", "/root/bad")
        expect("DO NOT MATCH THE HASHES" in said and "pip refused" in said, f"a wrong wheel was taken: {said}")
        expect(not site.shell("find /opt/cosilo-site -mindepth 1").strip(), "something of the wrong wheelhouse stayed")
    with checks.check(f"install-site and install-coordinator, offline; {count} images at the site"):
        began_s = time.monotonic()
        coordinator.put(around.founded / "coordinator", "/root/founded")
        digest = stage.wheelhouses.digest("site")
        with ThreadPoolExecutor(2) as pool:
            theirs = pool.submit(coordinator.run, "/wheelhouse/install/install-coordinator", "--founded", "/root/founded")
            said = site.run(*installer, "--digest", digest)
            theirs.result()
        expect("cosilo-site enrol - < INVITATION" in said, f"it does not say what to do next: {said}")
        checks.figure("installing both at once", f"{time.monotonic() - began_s:.0f} s")
    with checks.check("an installer run again changes nothing, and a person's configuration stays"):
        site.run("sed", "-i", "; ".join(PERSON), "/etc/cosilo/site.toml")
        program = "find /opt/cosilo-site -type f -printf '%p %T@ %s\\n'"
        settings = "find /etc/cosilo /etc/systemd/system /usr/local/bin -type f -exec sha256sum {} +"
        tree = f"({program}; {settings}) | sort | sha256sum"
        before = site.shell(tree)
        expect("is there already" in site.run(*installer), "it installed again")
        expect(site.shell(tree) == before, "files changed")
    with checks.check("systemd finds no fault in the units"):
        for machine, unit in ((site, SITE), (coordinator, COORDINATOR)):
            said = machine.shell(f"systemd-analyze verify /etc/systemd/system/{unit}.service 2>&1")
            expect(not said.strip(), said)


def start(stage: Stage) -> None:
    """From installed to a whole masked round."""
    checks, site, coordinator, around = stage.checks, stage.site, stage.coordinator, stage.around
    with checks.check("the coordinator starts: Type=notify, READY=1 when it serves"):
        began_s = time.monotonic()
        coordinator.run("systemctl", "start", COORDINATOR)
        checks.figure("coordinator, start to READY=1", f"{time.monotonic() - began_s:.1f} s")
        expect(coordinator.unit(COORDINATOR, "StatusText")["StatusText"] in ("0 sites connected", ""), "its status says something else")
    with checks.check("a site that has not enrolled says so and tries again; it enrols, is approved, and comes up by itself"):
        expect("failed" in site.refused("systemctl", "start", SITE), "a site without an identity started")
        wait_for(lambda: "enrol first" in site.journal(SITE), "its journal says what to do", READY_S)
        invitation = around.invite(HOSPITAL, approved=False)
        said = site.run(SITE, "enrol", "-", stdin=invitation.read_bytes())
        expect("not a member yet" in said, said)
        around.cosilo("site", "approve", HOSPITAL, "--yes")
        wait_for(lambda: site.active(SITE), "the site is up", READY_S, lambda: site.journal(SITE))
        stage.wait_connected()
        wait_for(lambda: site.unit(SITE, "StatusText")["StatusText"] == "connected", "systemctl status says so", READY_S)
        expect("failed" not in site.run(SITE, "check"), "cosilo-site check finds a fault")
    with checks.check("a masked round of four sites, one of them on the machine"):
        around.start_companions()
        stage.quick, stage.slow = (around.create_run("quick", QUICK_STEPS, seed=11), around.create_run("slow", SLOW_STEPS, seed=12))
        for run in (stage.quick, stage.slow):
            site.run(SITE, "accept", run, "--yes")
        checks.figure("first round, trainers cold", f"{stage.whole_round():.1f} s")


def sandbox(stage: Stage) -> None:
    """What the units' settings come to."""
    checks, site, coordinator = stage.checks, stage.site, stage.coordinator
    for machine, unit in ((site, SITE), (coordinator, COORDINATOR)):
        with checks.check(f"systemd-analyze security {unit} is {EXPOSURE_MAX} or better"):
            said = machine.run("systemd-analyze", "security", unit, "--no-pager").splitlines()[-1]
            found = re.search(r"exposure level for \S+: ([0-9.]+)", said)
            expect(found is not None and float(found[1]) <= EXPOSURE_MAX, said)
            assert found is not None
            checks.figure(f"systemd-analyze security {unit}", found[1])
    with checks.check("inside the site's sandbox: images read-only, the GPU's devices reached, nothing else"):
        _expect_probed(site, _probe(site))
    with checks.check("MemoryDenyWriteExecute stays out for a reason: with it torch's convolutions fail"):
        convolve = "import torch; torch.nn.Conv2d(64, 64, 3)(torch.zeros(16, 64, 32, 32)); print('convolved')"
        try_it = ["systemd-run", "--quiet", "--pipe", "--wait"]
        python = [f"/opt/{SITE}/current/bin/python", "-c", convolve]
        expect("convolved" in site.run(*try_it, *python), "torch does not convolve at all")
        said = site.refused(*try_it, "--property=MemoryDenyWriteExecute=yes", *python)
        expect("could not create a primitive" in said, f"the reason has changed, and with it the unit's comment: {said}")
    with checks.check("journald has fields of its own: rounds, phases, sites, priorities"):
        (closed,) = coordinator.journal(COORDINATOR, "COSILO_PHASE=closed", "--output=json", "-n", "1").splitlines()
        entry = json.loads(closed)
        expect(
            (entry["PRIORITY"], entry["COSILO_ROUND"], entry["SYSLOG_IDENTIFIER"], entry["MESSAGE"].split("  ")[0])
            == ("6", "1", COORDINATOR, "round moved"),
            str(entry),
        )
        trained = json.loads(site.journal(SITE, "COSILO_STEPS=4", "--output=json", "-n", "1"))
        expect(trained["_SYSTEMD_UNIT"] == f"{SITE}.service" and float(trained["COSILO_LOSS"]) > 0, str(trained))


def kill(stage: Stage) -> None:
    """SIGKILL in the middle of a training."""
    checks, site, around = stage.checks, stage.site, stage.around
    with checks.check("the site is killed while it trains: systemd starts it again, the round closes, the next one has everybody"):
        before, restarts = site.main_pid(SITE), int(site.unit(SITE, "NRestarts")["NRestarts"])
        run = stage.slow_round()
        killed_s = time.monotonic()
        site.signal(before, signal.SIGKILL)
        stage.expect_training()
        wait_for(lambda: site.active(SITE) and site.main_pid(SITE) not in (0, before), "it is back", READY_S, lambda: site.journal(SITE))
        checks.figure("site, SIGKILL to READY=1 again (RestartSec 5)", f"{time.monotonic() - killed_s:.1f} s")
        expect(int(site.unit(SITE, "NRestarts")["NRestarts"]) == restarts + 1, "systemd does not count one restart")
        entry = around.wait_round(run)
        expect(entry["phase"] == "closed" and set(entry["survivors"]) >= set(COMPANIONS), f"{entry}")
        checks.figure("the killed site's round", f"closed with {len(entry['survivors'])} of 4 in {entry['seconds']:.0f} s")
        stage.whole_round()


def hang(stage: Stage) -> None:
    """SIGSTOP: alive for the kernel, dead for everybody else."""
    checks = stage.checks
    both = ((stage.site, SITE), (stage.coordinator, COORDINATOR))
    with checks.check("both daemons hang: their watchdogs end them, systemd starts them again"):
        for machine, unit in both:
            folder = _watchdog_folder(unit)
            machine.shell(f"mkdir -p {folder}; printf '[Service]\\nWatchdogSec={WATCHDOG_S}\\n' >{folder}/watchdog.conf")
            machine.run("systemctl", "daemon-reload")
            machine.run("systemctl", "restart", unit)
        before = {unit: machine.main_pid(unit) for machine, unit in both}
        time.sleep(2 * WATCHDOG_S)  # a healthy daemon outlives its watchdog's time twice over
        for machine, unit in both:
            expect(machine.main_pid(unit) == before[unit], f"the watchdog ended a healthy daemon\n{machine.journal(unit, '-n', '20')}")
            machine.signal(before[unit], signal.SIGSTOP)
        stopped_s = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            for (_, unit), back_s in zip(both, pool.map(lambda one: _wait_back(*one, before[one[1]]), both), strict=True):
                checks.figure(f"{unit}, SIGSTOP to READY=1 again (WatchdogSec {WATCHDOG_S})", f"{back_s - stopped_s:.1f} s")
        for machine, unit in both:
            wait_for(partial(_said_by, machine, unit, "Watchdog timeout"), "systemd speaks of its watchdog", READY_S)
            machine.shell(f"rm {_watchdog_folder(unit)}/watchdog.conf; systemctl daemon-reload")
    with checks.check("everybody finds each other again, and a round closes with all four"):
        stage.whole_round()


def stop(stage: Stage) -> None:
    """systemctl stop, of both, in the middle of a round."""
    checks, site, coordinator, around = stage.checks, stage.site, stage.coordinator, stage.around
    with checks.check("the site is stopped while it trains: it ends in order, the round is told and goes on, nothing is lost"):
        before = json.loads(site.run(SITE, "status", "--json"))
        run = stage.slow_round()
        stopped_s = time.monotonic()
        site.run("systemctl", "stop", SITE)
        checks.figure("site, graceful stop in training", f"{time.monotonic() - stopped_s:.1f} s")
        stage.expect_training()
        ended = site.unit(SITE, "Result", "ExecMainCode", "ExecMainStatus", "ActiveState")
        expect(ended == {"Result": "success", "ExecMainCode": "1", "ExecMainStatus": "0", "ActiveState": "inactive"}, str(ended))
        expect(not site.shell(OWN_PROCESSES).split(), "a process of it is left")
        stage.wait_connected(present=False)
        heard = (COORDINATOR, f"COSILO_SITE={HOSPITAL}", "--output=cat", "-n", "1")
        wait_for(
            lambda: coordinator.journal(*heard).startswith("site disconnected"), "the coordinator's journal says that it went", READY_S
        )
        entry = around.wait_round(run)
        expect((entry["phase"], sorted(entry["survivors"])) == ("closed", sorted(COMPANIONS)), f"{entry}")
        checks.figure("the stopped site's round", f"closed with 3 of 4 in {entry['seconds']:.0f} s")
        site.run("systemctl", "start", SITE)
        after = json.loads(site.run(SITE, "status", "--json"))
        expect([one["run"] for one in after["runs"]] == [one["run"] for one in before["runs"]], f"{before}\n{after}")
        stage.whole_round()
    with checks.check("the coordinator is stopped in a round: it ends in order, resumes the round, and all four are in its sum"):
        run = stage.slow_round()
        coordinator.run("systemctl", "stop", COORDINATOR)
        ended = coordinator.unit(COORDINATOR, "Result", "ExecMainStatus", "ActiveState")
        expect(ended == {"Result": "success", "ExecMainStatus": "0", "ActiveState": "inactive"}, str(ended))
        coordinator.run("systemctl", "start", COORDINATOR)
        wait_for(lambda: "round resumed" in coordinator.journal(COORDINATOR), "it says that it resumed the round", READY_S)
        entry = around.wait_round(run)
        expect((entry["phase"], sorted(entry["survivors"])) == ("closed", EVERYBODY), f"{entry}")


def reboot(stage: Stage) -> None:
    """Both machines, at once."""
    with stage.checks.check("both machines reboot: both daemons come back by themselves, and a round closes with all four"):
        began_s = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Machine.reboot, (stage.site, stage.coordinator)))
        for machine in (stage.site, stage.coordinator):
            machine.wait_booted()
        stage.wait_all_connected()
        stage.checks.figure("both machines, reboot to all connected", f"{time.monotonic() - began_s:.1f} s")
        stage.whole_round()


def enrol_by_credential(stage: Stage) -> None:
    """A new disk in the same machine: unattended enrolment."""
    site = stage.site
    with stage.checks.check("a site enrols by itself from a systemd credential"):
        site.run("systemctl", "stop", SITE)
        site.shell("rm -rf /var/lib/cosilo-site/*")
        site.put(stage.around.invite("hospital-3", approved=True), "/root/third.invitation")
        site.run("/wheelhouse/install/install-site", "--invitation", "/root/third.invitation")
        expect(site.shell("stat -c '%a %U' /etc/cosilo/site.invitation").strip() == "600 root", "others may read the invitation")
        site.run("systemctl", "start", SITE)
        stage.wait_connected("hospital-3")
        site.run("systemctl", "restart", SITE)  # the second start does not enrol again
        expect(site.active(SITE), "it does not start twice")


def uninstall(stage: Stage) -> None:
    """Away with it, in two steps."""
    site, coordinator = stage.site, stage.coordinator
    with stage.checks.check("uninstalling leaves the keys; purging leaves nothing"):
        installer = "/wheelhouse/install/install-site"
        site.run(installer, "--uninstall")
        expect("hospital-3" in site.shell("cat /var/lib/cosilo-site/identity/federation.json"), "the keys went with the program")
        site.run(installer, "--uninstall", "--purge")
        coordinator.run("/wheelhouse/install/install-coordinator", "--uninstall", "--purge")
        for machine in (site, coordinator):
            left = machine.shell("find / -xdev -path /proc -prune -o -iname '*cosilo*' -print; getent passwd | grep cosilo || true").split()
            ours = [path for path in left if not path.startswith(("/wheelhouse", "/srv/", "/root/", "/var/lib/systemd/", "/var/backups/"))]
            expect(not ours, f"left on {machine.name}: {ours}")


STEPS: tuple[Callable[[Stage], None], ...] = (
    install,
    start,
    sandbox,
    kill,
    hang,
    stop,
    reboot,
    upgrade,
    recover,
    enrol_by_credential,
    uninstall,
)


# --- below ---


def _watchdog_folder(unit: str) -> str:
    return f"/run/systemd/system/{unit}.service.d"


def _said_by(machine: Machine, unit: str, words: str) -> bool:
    return words in machine.journal(unit)


def _wait_back(machine: Machine, unit: str, before: int) -> float:
    """Returns, on the monotonic clock, when the unit runs again as another process."""

    def back() -> bool:
        return machine.main_pid(unit) not in (0, before) and machine.active(unit)

    wait_for(back, f"{unit} is back", READY_S, lambda: machine.journal(unit, "-n", "30"))
    return time.monotonic()


def _probe(site: Machine) -> dict[str, object]:
    """Runs the probe as a unit of its own, which is the site's own in everything but its command."""
    site.put(Path(__file__).with_name("systemd_probe.py"), "/opt/systemd_probe.py")
    # The driver's numbers, without a driver: a device that may be opened answers ENXIO, one that may not EPERM.
    site.shell(
        "for node in 'nvidiactl 255' 'nvidia0 0' 'other 77'; do mknod -m 666 /dev/${node% *} c 195 ${node#* }; done; mkdir -p /home/somebody"
    )
    unit = site.run("cat", f"/etc/systemd/system/{SITE}.service")
    command = f"ExecStart=/opt/{SITE}/current/bin/python /opt/systemd_probe.py /var/lib/{SITE} /srv/images"
    unit = re.sub(r"(?m)^ExecStart=.*$", command, unit)
    unit = re.sub(r"(?m)^Type=.*$", "Type=oneshot", unit)
    unit = re.sub(r"(?m)^(WatchdogSec|Restart|RestartSec|NotifyAccess)=.*$", "", unit)
    unit = unit.replace(f"RuntimeDirectory={SITE}", f"RuntimeDirectory={SITE}-probe")
    site.run("sh", "-ec", f"cat >/run/systemd/system/{SITE}-probe.service", stdin=unit.encode())
    site.shell(f"cp -r /etc/systemd/system/{SITE}.service.d /run/systemd/system/{SITE}-probe.service.d; systemctl daemon-reload")
    site.run("systemctl", "start", f"{SITE}-probe")
    answer: dict[str, object] = json.loads(site.journal(f"{SITE}-probe", "--output=cat", "--grep=capabilities"))
    site.shell(f"rm -rf /run/systemd/system/{SITE}-probe.service*; rm /dev/nvidiactl /dev/nvidia0 /dev/other; systemctl daemon-reload")
    return answer


def _expect_probed(site: Machine, found: dict[str, object]) -> None:
    user = int(site.run("id", "-u", SITE))
    seen = found.pop("processes seen")
    assert isinstance(seen, list)
    daemons = set(map(int, site.shell(OWN_PROCESSES).split()))
    expect(set(seen) <= daemons, f"it sees processes of others: {seen}")
    expected = {
        "user": user,
        "capabilities": "0000000000000000",
        "read an image": "done",
        "write beside it": "EROFS",
        "overwrite it": "EROFS",
        "write its state": "done",
        "write /etc": "EROFS",
        "write its configuration": "EACCES",  # systemd leaves a ConfigurationDirectory writable; the folder is root's
        "write the program": "EROFS",
        "entries of /home": 0,
        "open the GPU's control device": "ENXIO",
        "open the GPU": "ENXIO",
        "open another device": "EPERM",
        "open a raw socket": "EAFNOSUPPORT",
        "open a TCP socket": "done",
        "make a user namespace": "EPERM",
    }
    wrong = {name: (found.get(name), value) for name, value in expected.items() if found.get(name) != value}
    expect(not wrong, f"in the sandbox (found, expected): {wrong}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
