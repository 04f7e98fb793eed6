"""`make e2e-runbooks`: the operating pages and SECURITY.md, typed line by line into shells beside a real federation.

Types what needs neither Docker nor systemd, in the pages' own words, so that they cannot drift; docs/operating/README.md says which target types the
rest, and this one fails where that table and what it typed differ. COSILO_E2E_KEEP, where it is set, is a folder that stays: with every line typed.
While a step is written: `python -m tests.e2e.runbooks STEP ...` plays these alone, and does not look at the table.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from tests.e2e.checklist import CheckFailed, Checklist, expect, run
from tests.e2e.runbooks_ca import rotate
from tests.e2e.runbooks_departures import again, later, leave
from tests.e2e.runbooks_disk import full_disk, put_away
from tests.e2e.runbooks_federation import OTHERS, ST_ANNA, Stage, enrol, found, pause, specs, take, train, watch
from tests.e2e.runbooks_losses import admins
from tests.e2e.runbooks_pages import PAGES, left_out, sections, who_types
from tests.e2e.runbooks_person import Person, Typed, make_commands
from tests.e2e.runbooks_stolen import stolen
from tests.federation.local import LocalFederation

TARGET = "`e2e-runbooks`"
STEPS = (found, enrol, train, take, watch, pause, rotate, full_disk, later, admins, again, leave, stolen)


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    return run("runbooks: typed as they stand", _test)


def _test(checks: Checklist) -> None:
    kept = os.environ.get("COSILO_E2E_KEEP")
    root = Path(kept or tempfile.mkdtemp(prefix="cosilo-runbooks-"))
    typed: Typed = {}
    steps = tuple(step for step in STEPS if step.__name__ in sys.argv[1:]) or STEPS
    try:
        with checks.check("every section that has a line to type stands in the table, and every row has a section"):
            _expect_complete()
        make_commands(root / "bin")
        with LocalFederation(root, specs(root), name="chest") as federation:

            def person(home: Path) -> Person:
                return Person(home, root / "bin", typed, root / "typed.log")

            sites = {name: person(root / name) for name in (*OTHERS, ST_ANNA)}
            federation.logs.mkdir(parents=True)
            for name in OTHERS:
                sites[name].runs(f"export COSILO_SITE_CONFIG={federation.config(name)}")
            stage = Stage(checks, root, federation, person(root / "admin"), person(federation.folder), sites)
            try:
                for step in steps:
                    step(stage)
            except CheckFailed as error:
                raise CheckFailed(f"{error}\n\n{_tails(federation)}") from None
        if steps != STEPS:
            return
        with checks.check("what was typed is what the table says"):
            told = {section for section, by in who_types().items() if TARGET in by}
            here = typed.keys()
            expect(told == here, f"in the table and not typed: {sorted(told - here)}; typed and not in the table: {sorted(here - told)}")
            missed = {section: lines for section in told if (lines := left_out(*section, typed[section], TARGET))}
            expect(not missed, f"lines that nobody typed, and no row says why: {missed}")
        checks.figure("sections typed", str(len(typed)))
    finally:
        put_away(root)
        if not kept:
            shutil.rmtree(root, ignore_errors=True)


def _expect_complete() -> None:
    pages = ["SECURITY.md", *sorted(path.name for path in PAGES.glob("*.md") if path.name != "README.md")]
    there = {(page, heading) for page in pages for heading in sections(page, with_shell=True)}
    told = who_types()
    expect(there <= told.keys(), f"no row in docs/operating/README.md for {sorted(there - told.keys())}")
    nowhere = sorted((page, heading) for page, heading in told if heading not in sections(page, with_shell=False))
    expect(not nowhere, f"rows of docs/operating/README.md for sections that are not there: {nowhere}")


def _tails(federation: LocalFederation) -> str:
    return "\n".join(f"--- {path.name} ---\n{path.read_text(errors='replace')[-1500:]}" for path in federation.log_files())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
