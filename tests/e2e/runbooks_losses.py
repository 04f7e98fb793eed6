"""An admin's key that is lost and one that is stolen, typed from SECURITY.md in a federation that has trained.

Owns this step; after it the federation has one admin again, another. Must not know how the federation came to be.
"""

from __future__ import annotations

import re

from tests.e2e.checklist import expect
from tests.e2e.runbooks_federation import RUN_PAGE, Stage
from tests.e2e.runbooks_pages import stands
from tests.e2e.runbooks_person import Person

SECURITY, LOST_KEY, STOLEN_KEY = "SECURITY.md", "When an admin's key is lost", "An admin's key"


def admins(stage: Stage) -> None:
    """A second admin; the first loses the key and comes back under another name; the second's is stolen."""
    admin, other = stage.admin, _newcomer(stage, "other")
    with stage.checks.check("run-a-federation.md: a second admin, as its table says"):
        named = {"NAME": "second", "FILE": f"{stage.root}/second.invitation"}
        admin.says(RUN_PAGE, "Later", "cosilo admin invite NAME --out FILE", named)
        said = other.says(RUN_PAGE, "Later", "cosilo admin enrol FILE --to DIR", {"FILE": named["FILE"], "DIR": "~/.config/cosilo/admin"})
        expect("cosilo admin approve second" in said, said)
        admin.says(RUN_PAGE, "Later", "cosilo admin approve NAME", {"NAME": "second"}, answer="y\n")
        expect("second" in other.runs("cosilo members"), "the second admin is not one")
    with stage.checks.check("SECURITY.md: an admin's key is lost; another revokes it, and the person comes back as NAME-2"):
        named = {"NAME-2": "admin-2", "NAME": "admin"}
        person = _newcomer(stage, "admin-again")
        other.types(SECURITY, LOST_KEY, 0, named, answer="y\n", part="the other admin")
        refused = admin.runs("cosilo status", code=1)
        stands(SECURITY, "was revoked in ...", refused)
        (person.home / "admin-2.invitation").write_bytes((other.home / "admin-2.invitation").read_bytes())
        (person.home / "admin-2.invitation").chmod(0o600)
        said = person.types(SECURITY, LOST_KEY, 0, {"NAME-2": "admin-2"}, part="the person, on their machine")
        expect("cosilo admin approve admin-2" in said, said)
        said = other.types(
            SECURITY, LOST_KEY, 0, {"NAME-2": "admin-2"}, answer="y\n", part="the other admin, once both have read the same fingerprint"
        )
        expect("approved admin admin-2" in said, said)
        expect("chest-1" in person.runs("cosilo run list"), "the run of the old key is not there")
        expect("is not signed by an admin" in person.runs("cosilo run show chest-1", code=1), "a run that nobody vouches for is shown")
        said = person.says(SECURITY, LOST_KEY, "cosilo run sign RUN", {"RUN": "chest-1"}, answer="y\n")
        expect("signed chest-1" in said, said)
        expect("signed by       admin-2" in person.runs("cosilo run show chest-1"), "the new signature is not what counts")
        stage.admin = person
        seat = stage.federation.folder / "admin"
        seat.unlink()
        seat.symlink_to(person.home / ".config" / "cosilo" / "admin")
        expect(stage.closes_a_round() == sorted(stage.members), "a round after it has other sites")
    with stage.checks.check("SECURITY.md: an admin's key is stolen; another revokes it, and looks at what there is"):
        admin = stage.admin
        admin.says(SECURITY, STOLEN_KEY, "cosilo admin revoke NAME", {"NAME": "second"}, answer="y\n")
        said = admin.says(SECURITY, STOLEN_KEY, "cosilo members")
        expect("admin-2" in said and not re.search(r"(?m)^second\b", said), said)
        expect("chest-1" in admin.says(SECURITY, STOLEN_KEY, "cosilo run list"), "the run is not listed")
        expect("admin-2" in stage.st_anna.says(SECURITY, STOLEN_KEY, "cosilo-site members"), "the site has another list")
        expect("chest-1" in stage.st_anna.says(SECURITY, STOLEN_KEY, "cosilo-site status"), "the site does not say what it accepted")
        other.runs("cosilo run list", code=1)


def _newcomer(stage: Stage, name: str) -> Person:
    return stage.admin.beside(stage.root / name)
