"""`cosilo init`, and a second admin who takes up an invitation: folders, modes, certificates, and what is refused."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from cosilo_common.identity.folder import load_identity
from cosilo_common.identity.keys import fingerprint, public_bytes
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.tls import (
    ENROLMENT_REQUEST_BYTES_MAX,
    check_tls_files,
    enrolment_server_credentials,
    server_options,
)
from cosilo_common.rpc.v1 import admin_pb2, enrolment_pb2
from cosilo_common.rpc.v1.enrolment_pb2_grpc import EnrolmentServiceServicer, add_EnrolmentServiceServicer_to_server
from cosilo_server.cli.main import main
from cosilo_server.config import CoordinatorConfig
from cosilo_server.enrolment import EnrolmentDesk, EnrolmentRefused, EnrolRequest, OpenInvitation
from tests.identity_parties import Founded, InvitationsInMemory, MembersInMemory, found
from tests.integration.cli_coordinator import Script, entries, serving


def test_init_makes_three_folders_and_a_config_that_the_coordinator_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "north"
    assert main(["init", str(made), "--federation", "north-star", "--address", "cosilo.example:9443", "--admin-name", "ada"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"founded federation north-star in {made}"
    assert said.err.splitlines() == [
        f"next: cosilo-coordinator serve --config {made}/coordinator/coordinator.toml",
        f"then: export COSILO_ADMIN={made}/admin and cosilo site invite NAME --out NAME.invitation",
    ]
    assert entries(made) == ["admin", "ca", "coordinator"]
    config = CoordinatorConfig.read(made / "coordinator" / "coordinator.toml")
    assert config.federation == "north-star"
    assert config.listen.model_dump() == {
        "federation": "0.0.0.0:9443",
        "enrolment": "0.0.0.0:7444",
        "metrics": "127.0.0.1:9464",
        "page": "127.0.0.1:7480",
        "page_hosts": (),
    }
    assert load_identity(config.paths.identity).peer == PeerName("north-star", Role.COORDINATOR, "coordinator")
    assert config.paths.data == (made / "coordinator" / "data").resolve()
    admin = load_identity(made / "admin")
    assert admin.peer == PeerName("north-star", Role.ADMIN, "ada")
    assert (admin.membership.address, admin.membership.enrolment_address) == ("cosilo.example:9443", "cosilo.example:7444")
    secret = [path for path in made.rglob("*") if path.suffix == ".key"]
    assert len(secret) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["init", str(tmp_path), "--federation", "north-star"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: found federation: {tmp_path} is not empty",
        "hint: give a new or empty folder: keys are never overwritten",
    ]
    assert entries(tmp_path) == ["mine"]


class _Enrolment(EnrolmentServiceServicer):
    """The enrolment port around the coordinator's own desk."""

    def __init__(self, desk: EnrolmentDesk) -> None:
        self._desk = desk

    def Enrol(self, request: Any, context: Any) -> enrolment_pb2.EnrolResponse:
        asked = EnrolRequest(
            name=request.name,
            token_public=request.token_public,
            csr=request.csr,
            signing_key=request.signing_key,
            token_signature=request.token_signature,
            signing_signature=request.signing_signature,
        )
        try:
            answer = self._desk.enrol(asked, "127.0.0.1", datetime.now(UTC))
        except EnrolmentRefused as refused:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, refused.subject)
        return enrolment_pb2.EnrolResponse(certificate_chain=answer.certificate_chain, member=answer.member, members=answer.members)


@contextmanager
def enrolling(founded: Founded, desk: EnrolmentDesk) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=server_options(ENROLMENT_REQUEST_BYTES_MAX))
    add_EnrolmentServiceServicer_to_server(_Enrolment(desk), server)
    port = server.add_secure_port("127.0.0.1:0", enrolment_server_credentials(founded.coordinator.tls))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


def test_a_second_admin_enrols_is_approved_and_may_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded = found(tmp_path / "made")
    script = Script(members=founded.members)
    desk = EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members))
    invitation, bob = tmp_path / "bob.invitation", tmp_path / "bob"
    ada = ["--admin", str(founded.admin.folder)]
    with serving(founded, script) as address, enrolling(founded, desk) as enrolment_address:
        point_to(founded, address, enrolment_address)
        assert main([*ada, "admin", "invite", "bob", "--out", str(invitation)]) == 0
        put = script.heard[-1]
        desk.invite(OpenInvitation(put.name, Role(put.role), put.token_public, put.expires_unix_s, None), datetime.now(UTC))
        capsys.readouterr()

        assert main(["admin", "enrol", str(invitation), "--to", str(bob)]) == 0
        said = capsys.readouterr()
        own = load_identity(bob)
        key = public_bytes(own.signing_key())
        assert said.out.splitlines() == ["enrolled as admin bob of north-star, with the key", f"    {fingerprint(key)}"]
        assert said.err.splitlines() == [
            "next: read that fingerprint to ada over a telephone",
            "then: ada runs cosilo admin approve bob",
            f"then: export COSILO_ADMIN={bob}",
        ]
        assert check_tls_files(own.tls, datetime.now(UTC)).name == PeerName("north-star", Role.ADMIN, "bob")
        assert stat.S_IMODE(bob.stat().st_mode) == 0o700

        script.enrolments = [admin_pb2.Enrolment(name="bob", role="admin", state="enrolled", signing_key=key)]
        assert main([*ada, "admin", "approve", "bob", "--yes"]) == 0
        site_key = bytes(range(32))
        script.enrolments = [admin_pb2.Enrolment(name="north", role="site", state="enrolled", signing_key=site_key)]
        assert main(["--admin", str(bob), "site", "approve", "north", "--yes"]) == 0
        assert (script.members.version, script.members.signer) == (3, "bob")
        capsys.readouterr()
        assert main([*ada, "admin", "list"]) == 0
        assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
            ["NAME", "STATE"],
            ["ada", "member"],
            ["bob", "member"],
        ]


def test_enrolling_again_after_a_failure_uses_the_same_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded = found(tmp_path / "made")
    script = Script(members=founded.members)
    invitation, bob = tmp_path / "bob.invitation", tmp_path / "bob"
    desk = EnrolmentDesk(founded.authority, InvitationsInMemory(), MembersInMemory(founded.members))
    enrol = ["admin", "enrol", str(invitation), "--to", str(bob)]
    with serving(founded, script) as address, enrolling(founded, desk) as enrolment_address:
        point_to(founded, address, enrolment_address)
        assert main(["--admin", str(founded.admin.folder), "admin", "invite", "bob", "--out", str(invitation)]) == 0
        put = script.heard[-1]
        assert main(enrol) == 1  # the desk does not know the invitation yet
        assert capsys.readouterr().err.splitlines()[-2].startswith("error: enrol: permission denied: there is no such invitation here")
        assert entries(bob) == ["signing.key", "tls.key"]
        keys = {path.name: path.read_bytes() for path in bob.iterdir()}
        desk.invite(OpenInvitation(put.name, Role(put.role), put.token_public, put.expires_unix_s, None), datetime.now(UTC))
        assert main(enrol) == 0
        assert {name: (bob / name).read_bytes() for name in keys} == keys
        assert main(enrol) == 1
        assert f"{bob} is an admin's folder already" in capsys.readouterr().err


def test_an_admin_cannot_enrol_with_a_sites_invitation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded = found(tmp_path / "made")
    invitation = tmp_path / "north.invitation"
    with serving(founded, Script(members=founded.members)) as address:
        ada = ["--admin", str(founded.admin.folder), "--address", address]
        assert main([*ada, "site", "invite", "north", "--out", str(invitation)]) == 0
    capsys.readouterr()
    assert main(["admin", "enrol", str(invitation), "--to", str(tmp_path / "bob")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: enrol: the invitation is for site north, not for an admin",
        "hint: north runs cosilo-site enrol",
    ]
    assert not (tmp_path / "bob").exists()


def test_an_address_that_nobody_can_dial_goes_into_no_invitation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded = found(tmp_path / "made")
    with serving(founded, Script(members=founded.members)) as address:
        point_to(founded, address, "127.0.0.1:0")
        assert main(["--admin", str(founded.admin.folder), "site", "invite", "north", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: invite: the admin's folder says that the coordinator listens at 127.0.0.1:0",
        "hint: correct it in admin.toml",
    ]


def point_to(founded: Founded, address: str, enrolment_address: str) -> None:
    """Edits the two addresses of admin.toml, as a person would."""
    path = founded.admin.folder / "admin.toml"
    text = path.read_text().replace("127.0.0.1:7443", address).replace("127.0.0.1:7444", enrolment_address)
    path.write_text(text)
