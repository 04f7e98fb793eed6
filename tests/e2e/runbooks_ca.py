"""A change of the CA, typed from ca.md beside a federation that trains: two roots, then one, and nobody enrols again.

Owns this step; after it the federation is as before, under another root. Must not know why the CA changes.
"""

from __future__ import annotations

import shutil
import socket
import ssl

from tests.e2e.checklist import expect, wait_for
from tests.e2e.runbooks_federation import CONNECTED_S, OTHERS, Stage
from tests.e2e.runbooks_pages import section_block, stands
from tests.federation.local import COORDINATOR

CA, HOW = "ca.md", "How"
ROOT = "root.crt"


def rotate(stage: Stage) -> None:
    """ca.md, How: rotate while one site is away, look who is missing, and retire when nobody is."""
    admin, federation = stage.admin, stage.federation
    safe = stage.root / "safe" / "ca"
    line = {word: _line(word) for word in ("cosilo ca rotate", "cosilo ca status", "cosilo ca retire")}
    away = next(name for name in OTHERS if name in stage.members)
    with stage.checks.check(
        "ca.md: two roots are trusted; who is away is named and not cut off; it comes back and moves; a round of all closes"
    ):
        expect(stage.closes_a_round() == sorted(stage.members), "a round before the change has other sites")
        old = _ca_of(stage, away)
        admin.runs("cosilo site invite too-late --out too-late.invitation")
        federation.daemon(away).stop()
        medium = {"/media/safe/ca ": f"{safe} "}
        said = admin.types(CA, HOW, 0, {**medium, line["cosilo ca retire"]: ""})
        expect("a new root beside the old one" in said and "\nold root " in said, said)
        new = max(safe.glob("[0-9]*"), key=lambda folder: int(folder.name)) / ROOT
        expect((new.parent / "root.key").stat().st_mode & 0o777 == 0o600, f"{new.parent} has no key of its own")
        there = sorted(set(stage.members) - {away})
        wait_for(lambda: _waiting(stage) == [away], f"all but {away} have moved", CONNECTED_S, lambda: str(_waiting(stage)))
        said = admin.types(CA, HOW, 0, {line["cosilo ca rotate"]: "", line["cosilo ca status"]: ""}, code=1)
        stands(CA, "NAME would be cut off", said.replace(away, "NAME"))
        for name in there:
            expect(_ca_of(stage, name) == new.read_text() + old, f"{name} does not trust both roots")
        expect(_shows(stage, old), "the coordinator shows a certificate that a site from before the change cannot verify")
        federation.restart(away)
        stage.wait_connected()
        expect(stage.closes_a_round() == sorted(stage.members), "a round in the overlap has other sites")
        wait_for(lambda: not _waiting(stage), f"{away} has moved", CONNECTED_S, lambda: str(_waiting(stage)))
    with stage.checks.check("ca.md: the old root is retired and counts nowhere; nobody enrolled again; a round of all closes"):
        said = admin.types(CA, HOW, 0, {line["cosilo ca rotate"]: "", line["cosilo ca status"]: ""})
        expect("the old CA is retired" in said, said)
        wait_for(
            lambda: all(_ca_of(stage, name) == new.read_text() for name in stage.members),
            "every site trusts the new root alone",
            CONNECTED_S,
        )
        expect(_shows(stage, new.read_text()) and not _shows(stage, old), "the coordinator's certificate is not the new root's alone")
        stage.wait_connected()
        expect(stage.closes_a_round() == sorted(stage.members), "a round after the change has other sites")
        late = admin.beside(stage.root / "too-late")
        shutil.copyfile(stage.st_anna.home / "site.toml", late.home / "site.toml")
        (late.home / "images").symlink_to(stage.st_anna.home / "images")
        shutil.copy(admin.home / "too-late.invitation", late.home)
        said = late.runs("COSILO_SITE_CONFIG=$PWD/site.toml cosilo-site enrol too-late.invitation", code=3)
        expect("new invitation" in said, said)


def _line(begins: str) -> str:
    return next(line for line in section_block(CA, HOW).splitlines() if line.startswith(begins))


def _ca_of(stage: Stage, name: str) -> str:
    """The roots that a site trusts."""
    return (stage.federation.state(name) / "identity" / "ca.crt").read_text(encoding="ascii")


def _waiting(stage: Stage) -> list[str]:
    """Who still has a certificate of the old CA. An admin moves with any two commands, so also by asking."""
    return list(stage.federation.cosilo_json("ca", "status")["waiting"])


def _shows(stage: Stage, roots: str) -> bool:
    """Whether what the coordinator shows at its port is good for somebody who trusts these roots only."""
    host, port = stage.federation.endpoints(COORDINATOR)["federation"].rsplit(":", 1)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False  # its name is a URI, which Cosilo's own handshake checks
    trusting.minimum_version = ssl.TLSVersion.TLSv1_3  # there this side is done before it is asked for a certificate of its own
    trusting.set_alpn_protocols(["h2"])
    trusting.load_verify_locations(cadata=roots)
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECTED_S) as plain, trusting.wrap_socket(plain):
            return True
    except ssl.SSLCertVerificationError:
        return False
