"""docs/operating's runbooks, typed on a machine word for word, by a person who is not root and has sudo.

Owns how a page's lines are found and who types them. Must not know what they are for: a step says which block of which page it wants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.checklist import expect
from tests.e2e.systemd_machines import Machine

PAGES = Path(__file__).resolve().parents[2] / "docs" / "operating"
PERSON = "person"


def add_person(machine: Machine) -> None:
    """A user who may do everything by sudo and nothing without."""
    machine.shell(f"useradd --create-home {PERSON}; echo '{PERSON} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{PERSON}")


def give_person(machine: Machine, source: Path, name: str) -> None:
    """A file in the person's home, for their eyes only."""
    target = f"/home/{PERSON}/{name}"
    machine.put(source, target)
    machine.shell(f"chown {PERSON}: {target}; chmod 600 {target}")


def block(page: str, comment: str) -> str:
    """The page's one block of shell that begins with that comment, without it. Fails where there is none."""
    found = re.findall(rf"```sh\n# {re.escape(comment)}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)
    expect(len(found) == 1, f"{page} has {len(found)} blocks that begin with '# {comment}'")
    return str(found[0])


def type_block(machine: Machine, page: str, comment: str, named: Mapping[str, str] | None = None) -> str:
    """Types a block as the person, from their home; named: what stands in the page as an example, and what it is here. Returns what it printed."""
    text = block(page, comment)
    for example, here in (named or {}).items():
        expect(example in text, f"{page}: '{example}' does not stand under '# {comment}'")
        text = text.replace(example, here)
    return machine.run("runuser", "-u", PERSON, "--", "sh", "-ec", f"cd\n{text}")
