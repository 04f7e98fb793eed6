"""Invitations: one file, one secret, and nothing that disagrees with itself."""

from __future__ import annotations

import json
import logging
import stat
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import VERSION_MAX
from cosilo_common.identity.invitation import (
    INVITATION_BYTES_MAX,
    Invitation,
    make_invitation,
    parse_invitation,
    read_invitation,
    write_invitation,
)
from cosilo_common.identity.keys import make_signing_key
from cosilo_common.identity.names import PeerName, Role
from tests.identity_parties import ADMIN, FEDERATION, Founded, found

ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")
EXPIRES = 1_900_000_000


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


def invite(founded: Founded, peer: PeerName = ANNA, local_demo: bool = False, address: str = "h:7443") -> Invitation:
    return make_invitation(
        peer,
        ADMIN,
        founded.admin_key,
        founded.members,
        founded.authority.root_pem,
        address,
        "h:7444",
        EXPIRES,
        local_demo=local_demo,
    )


def altered(invitation: Invitation, change: Callable[[dict[str, Any]], object]) -> bytes:
    document = invitation.model_dump(mode="json")
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize("local_demo", [False, True])
def test_an_invitation_comes_back_from_its_file_which_is_its_owners_alone(founded: Founded, tmp_path: Path, local_demo: bool) -> None:
    invitation = invite(founded, local_demo=local_demo)
    write_invitation(tmp_path / "st-anna.json", invitation)
    assert stat.S_IMODE((tmp_path / "st-anna.json").stat().st_mode) == 0o600
    assert read_invitation(tmp_path / "st-anna.json") == invitation
    assert parse_invitation((tmp_path / "st-anna.json").read_bytes()) == invitation
    assert (invitation.preapproval is not None) is local_demo
    with pytest.raises(CosiloError, match="exists already"):
        write_invitation(tmp_path / "st-anna.json", invitation)


def test_an_invitation_that_others_may_read_is_refused(founded: Founded, tmp_path: Path) -> None:
    write_invitation(tmp_path / "i", invite(founded))
    (tmp_path / "i").chmod(0o644)
    with pytest.raises(CosiloError, match="may be read by others"):
        read_invitation(tmp_path / "i")


def test_every_invitation_has_a_token_of_its_own(founded: Founded) -> None:
    assert invite(founded).token != invite(founded).token


def test_the_token_is_in_no_repr_log_or_exception(founded: Founded, caplog: pytest.LogCaptureFixture) -> None:
    """A canary: the token of a known value, looked for wherever a mistake would print it."""
    canary = bytes.fromhex("ca" * 32)
    invitation = invite(founded).model_copy(update={"token": canary})
    shown = [repr(invitation), str(invitation), f"{invitation!r}", repr([invitation]), repr(vars(type(invitation)))]
    logging.getLogger("test").warning("%s %r", invitation, invitation)
    shown.append(caplog.text)
    spoiled: list[Callable[[dict[str, Any]], object]] = [
        lambda d: d.update(token="ca" * 31 + "c"),
        lambda d: d.update(token="ca" * 31),
        lambda d: d.update(token="CA" * 32),
        lambda d: d.update(token=["ca" * 32]),
        lambda d: d.update({"tokenn": "ca" * 32}),
        lambda d: d.update(name="NO"),
        lambda d: d.update(ca_fingerprint="0000"),
    ]
    for change in spoiled:
        with pytest.raises(CosiloError) as caught:
            parse_invitation(altered(invitation, change))
        shown += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert shown
    for text in shown:
        assert "cacaca" not in text.lower()
        assert "\\xca\\xca" not in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda d: d.pop("ca"), "ca: Field required"),
        (lambda d: d.update(role="coordinator"), "a coordinator is not invited"),
        (lambda d: d.update(role="owner"), "role"),
        (lambda d: d.update(name="../etc"), "name"),
        (lambda d: d.update(address="host"), "address"),
        (lambda d: d.update(address="host:7443/x"), "address"),
        (lambda d: d.update(expires_unix_s=-1), "expires_unix_s"),
        (lambda d: d.update(expires_unix_s=VERSION_MAX + 1), "expires_unix_s"),
        (lambda d: d.update(expires_unix_s=1.5), "expires_unix_s"),
        (lambda d: d.update(ca="junk"), "ca: it is not a certificate in PEM"),
        (lambda d: d.update(ca_fingerprint="0000-0000"), "ca_fingerprint: it is not the CA's"),
        (lambda d: d.update(admin="bea"), "admin_fingerprint: it is not the inviting admin's"),
        (lambda d: d.update(admin_fingerprint="0000-0000"), "admin_fingerprint: it is not the inviting admin's"),
        (lambda d: d["anchor"].update(admins={}), "anchor.admins"),
        (lambda d: d.update(token="00" * 32), "preapproval: it is for another party"),
        (lambda d: d.update(name="st-olav"), "preapproval: it is for another party"),
        (lambda d: d.update(role="admin"), "preapproval: it is for another party"),
        (lambda d: d["preapproval"].update(expires_unix_s=EXPIRES + 1), "preapproval: its signature does not hold"),
        (lambda d: d["preapproval"].update(admin="bea"), "preapproval: its signature does not hold"),
    ],
)
def test_an_invitation_that_was_tampered_with_is_refused_by_its_field(
    founded: Founded, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    with pytest.raises(CosiloError) as caught:
        parse_invitation(altered(invite(founded, local_demo=True), change))
    assert caught.value.operation == "read invitation"
    assert reason in caught.value.subject


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({text: text}).encode()))
def test_bytes_that_are_no_invitation_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CosiloError):
        parse_invitation(data)


def test_an_invitation_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(CosiloError, match=f"{INVITATION_BYTES_MAX + 1} bytes are more than {INVITATION_BYTES_MAX}"):
        parse_invitation(bytes(INVITATION_BYTES_MAX + 1))


def test_only_an_admin_of_the_newest_list_invites(founded: Founded) -> None:
    with pytest.raises(CosiloError, match="ada is not an admin by this key"):
        make_invitation(ANNA, ADMIN, make_signing_key(), founded.members, founded.authority.root_pem, "h:1", "h:2", EXPIRES)


def test_an_admin_is_not_pre_approved(founded: Founded) -> None:
    with pytest.raises(CosiloError, match="admin bea: --local-demo is for sites"):
        invite(founded, PeerName(FEDERATION, Role.ADMIN, "bea"), local_demo=True)


def test_an_address_that_is_none_is_refused(founded: Founded) -> None:
    with pytest.raises(CosiloError, match="invite: 'nowhere' is not an address; write it as HOST:PORT"):
        invite(founded, address="nowhere")
    assert invite(founded, address="[::1]:7443").address == "[::1]:7443"
