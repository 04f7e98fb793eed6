"""`make e2e-page`: the status page of a real federation in a real browser, at the width of a desk and of a telephone.

A masked round is held in each of its phases and the page must show it without being loaded again; a site dies and comes back, a grid is
drawn, a round is abandoned, the coordinator goes away and returns. Before that, a page of extremes: hostile words, expired certificates.
After that, the page behind nginx.
Leaves photographs in --out, for a person to look at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from cosilo_server.rounds.state import Phase
from tests.e2e.checklist import Checklist, expect, run, wait_for
from tests.e2e.page_browser import Browser
from tests.e2e.page_extremes import LONG_SITE, Extremes, served
from tests.e2e.page_nginx import behind_nginx
from tests.federation.digits import digits_sites
from tests.federation.faults import HOLDERS, HeldRound
from tests.federation.local import COORDINATOR, LocalFederation

LIVE_S = 30.0  # the page is told within half a second; a browser beside a federation on two cores needs longer
PATIENT = {f"{what}_s": 120.0 for what in ("gather", "training", "sharing", "uploading", "consenting", "revealing")}
PLAN: dict[str, Any] = {
    "name": "watched",
    "preset": "digits",
    "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
    "training": {"local_epochs": 100, "batch_size": 32, "max_steps": 4},
    "deadlines": PATIENT,
}
SCREENS = {"desk": (1280, 900, False), "telephone": (360, 740, True)}
NOW = "#round .steps li.now"
MARKS = {"done": "✓", "now": "►", "todo": "○"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out/page"), help="where the photographs go")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    return run("The status page in Chromium", lambda checks: _test(checks, out))


def _test(checks: Checklist, out: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="cosilo-e2e-"))
    try:
        with Browser(root / "browser") as browser:
            _extremes(checks, browser, out)
            sites = digits_sites(root / "federation", 4, alpha=0.5, least=200, seed=1)
            with LocalFederation(root / "federation", sites, page=True) as federation:
                with checks.check("a federation of four sites, and its page in a browser"):
                    federation.start()
                    browser.screen(1280, 900)
                    browser.open(_address(federation))
                    browser.wait_text("#link", "● live", LIVE_S)
                    browser.wait_text("#glance", "4 of 4", LIVE_S)
                    expect("There is no run yet" in browser.text("#runs"), browser.text())
                _Watched(checks, browser, federation, out).test()
                behind_nginx(checks, federation, root / "nginx")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _extremes(checks: Checklist, browser: Browser, out: Path) -> None:
    with served(Extremes()) as address, checks.check("hostile names are text, the longest fit, every state has a mark and a word"):
        for screen, (width, height, mobile) in SCREENS.items():
            browser.screen(width, height, mobile=mobile, dark=screen == "desk")
            browser.open(f"http://{address}/")
            browser.wait_text("#link", "● live", LIVE_S)
            browser.wait_text("#rounds", "The last 20 rounds", LIVE_S)
            expect(browser.script("return document.images.length") == 3, "an image came out of a name")
            expect(browser.script("return document.scripts.length") == 1, "a script came out of a name")
            expect("<img src=x" in browser.text("#federation"), browser.text("#federation"))
            said = browser.text("#sites") + browser.text("#glance") + browser.text("#round")
            for words in (LONG_SITE, "○ gone", "● connected", "○ never connected", "✗ certificate expired", "✗ 3.1 MB"):
                expect(words in said, f"{words!r} is not on the page:\n{said}")
            _fits(browser, width)
            browser.photograph(out / f"extremes-{screen}.png")
        refused = [line for line in browser.complaints() if "/grids/" not in line]  # its pictures are not there, by design
        expect(not refused, f"the browser complains: {refused}")
        browser.open("about:blank")  # before its server ends, of which it would complain


class _Watched:
    """One page that is never loaded again while everything happens."""

    def __init__(self, checks: Checklist, browser: Browser, federation: LocalFederation, out: Path) -> None:
        self._checks = checks
        self._browser = browser
        self._federation = federation
        self._out = out

    def test(self) -> None:
        """Everything, in order."""
        browser, federation = self._browser, self._federation
        browser.script("window.neverLoadedAgain = true")
        run = federation.create_run(PLAN)
        federation.accept_all(run)
        with self._checks.check("a new run appears by itself"):
            browser.wait_text("#runs", "watched", LIVE_S)
        self._phases(run)
        self._site_gone(run)
        self._rounds_and_grid(run)
        self._abandoned(run)
        with self._checks.check("nothing was loaded again, and the browser never complained"):
            expect(browser.script("return window.neverLoadedAgain === true"), "the page was loaded again")
            expect(not (said := browser.complaints()), f"{said}")
        self._screens(run)
        self._coordinator_gone()
        self._headers()

    def _phases(self, run: str) -> None:
        with HeldRound(self._federation, run, sorted(self._federation.sites)) as held:
            for entry in held.walk():
                phase = Phase(entry["phase"])
                with self._checks.check(f"{phase}: the page shows it while it lasts, each site's part too"):
                    self._browser.wait_text(NOW, phase.value, LIVE_S)
                    marks = {node[0] for node in self._browser.texts("#round .steps li.now")}
                    expect(marks == {MARKS["now"]}, f"{marks}")
                    delivered = len(self._federation.sites) - len(HOLDERS[phase])
                    self._wait_delivered(delivered)
                    self._browser.photograph(self._out / f"phase-{phase.value}.png")
                if phase is Phase.REVEALING:  # what holds OPENING lets go only of a coordinator that is killed
                    break
        with self._checks.check("the round closes on the page"):
            self._browser.wait_text("#round h3", "Round 1: closed", LIVE_S)
            self._browser.wait_text("#rounds", "✓ closed", LIVE_S)
        self._federation.wait_idle(run)

    def _wait_delivered(self, sites: int) -> None:
        def seen() -> bool:
            return self._browser.text("#round .lines").count("delivered") == sites

        wait_for(seen, f"{sites} sites have delivered", LIVE_S, self._round)

    def _round(self) -> str:
        return self._browser.text("#round")

    def _site_gone(self, run: str) -> None:
        site = sorted(self._federation.sites)[0]
        with self._checks.check("a site dies: the page says which and since when; it returns"):
            self._federation.kill(site)
            wait_for(
                lambda: "gone, last seen" in self._browser.text("#sites"),
                "the page misses it",
                LIVE_S,
                lambda: self._browser.text("#sites"),
            )
            self._browser.wait_text("#glance", "3 of 4", LIVE_S)
            self._federation.restart(site)
            self._browser.wait_text("#glance", "4 of 4", LIVE_S)

    def _rounds_and_grid(self, run: str) -> None:
        self._federation.run_rounds(run, 3)
        with self._checks.check("the loss curve has a mark for every round measured"):
            self._browser.wait_text("#round h3", "Round 4: closed", LIVE_S)
            points = "return document.querySelectorAll('#curve circle.heldout').length"
            wait_for(lambda: self._browser.script(points) == 4, "four held-out losses are drawn", LIVE_S)
        with self._checks.check("a grid that is drawn appears, and is a picture"):
            self._federation.cosilo("sample", run, "--per-class", "2", "--steps", "2", "--out", str(self._federation.root / "g.png"))
            loaded = "return [...document.querySelectorAll('#grids img')].filter((one) => one.naturalWidth > 0).length"
            self._browser.script("document.querySelector('#grids').scrollIntoView()")
            wait_for(lambda: self._browser.script(loaded) == 1, "the picture is there", LIVE_S, lambda: self._browser.text("#grids"))

    def _abandoned(self, run: str) -> None:
        with self._checks.check("an abandoned round says where and why"):
            with HeldRound(self._federation, run, sorted(self._federation.sites)) as held:
                held.walk_to(Phase.TRAINING)
                self._federation.cosilo("run", "stop", run, "--abandon")
                self._browser.wait_text("#round", "Abandoned while training", LIVE_S)
            expect("an admin" in self._browser.text("#round .notice"), self._round())
            self._browser.wait_text("#rounds", "✗ abandoned", LIVE_S)

    def _screens(self, run: str) -> None:
        for screen, (width, height, mobile) in SCREENS.items():
            for colourless in (False, True):
                with self._checks.check(f"on a {screen}{' without colours' if colourless else ''}: all of it fits"):
                    self._browser.screen(width, height, mobile=mobile, colourless=colourless)
                    self._browser.open(f"{_address(self._federation)}#{run}")
                    self._browser.wait_text("#rounds", "Rounds", LIVE_S)
                    _fits(self._browser, width)
                    self._browser.photograph(self._out / f"{screen}{'-colourless' if colourless else ''}.png")

    def _coordinator_gone(self) -> None:
        with self._checks.check("the coordinator goes away: the page says so, and finds it again by itself"):
            self._federation.kill(COORDINATOR)
            self._browser.wait_text("#link", "✗ no connection to the coordinator", LIVE_S)
            self._federation.restart(COORDINATOR)
            self._browser.wait_text("#link", "● live", LIVE_S)
            self._browser.wait_text("#glance", "4 of 4", LIVE_S)

    def _headers(self) -> None:
        with self._checks.check("what is served: a policy that forbids scripts from elsewhere, and no address, key or digest of weights"):
            with urllib.request.urlopen(_address(self._federation), timeout=LIVE_S) as answer:
                expect("default-src 'none'" in answer.headers["Content-Security-Policy"], str(answer.headers))
            heard = json.dumps(self._browser.script("return performance.getEntriesByType('resource').map((one) => one.name)"))
            expect(heard.count("http://") == heard.count(_address(self._federation)), f"something was fetched from elsewhere: {heard}")


def _fits(browser: Browser, width: int) -> None:
    wide = browser.script("return document.documentElement.scrollWidth")
    expect(wide <= width, f"{wide} pixels wide on a screen of {width}: a reader would have to scroll sideways")


def _address(federation: LocalFederation) -> str:
    return f"http://{federation.endpoints(COORDINATOR)['page']}"


if __name__ == "__main__":
    sys.exit(main())
