"""A party's identity folder: its keys, its certificate, what it trusts, and the newest members list it saw.

    tls.key tls.crt ca.crt       for TLS (a site, an admin, the coordinator)
    signing.key                  Ed25519 (a site, an admin)
    members.json                 the newest members list seen, as it travelled
    trust.json                   the newest trust document seen, once the CA was rotated; ca.crt follows it
    federation.json | admin.toml who this is, where the coordinator listens, which admins were trusted at first; an
    admin's is TOML, to edit

Must not know sockets or the clock.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX
from cosilo_common.identity.documents import Address, Document, Name, parse_document
from cosilo_common.identity.keys import load_signing_key
from cosilo_common.identity.members import MEMBERS_BYTES_MAX, Anchor, SignedMembers, read_members
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.secret_files import read_public, replace_file
from cosilo_common.identity.tls import TlsFiles
from cosilo_common.identity.trust import TRUST_BYTES_MAX, SignedTrust, read_trust

TLS_KEY_FILE = "tls.key"
TLS_CERTIFICATE_FILE = "tls.crt"
CA_FILE = "ca.crt"
SIGNING_KEY_FILE = "signing.key"
MEMBERS_FILE = "members.json"
TRUST_FILE = "trust.json"
FEDERATION_FILE = "federation.json"
ADMIN_FILE = "admin.toml"
MEMBERSHIP_BYTES_MAX = 32 * 1024  # 64 admins of 140 bytes and the rest


class Membership(Document):
    """Who a folder's owner is, and in which federation.

    address, enrolment_address: the coordinator's two ports as `host:port`; anchor: the admins trusted when the folder
    was made.
    """

    version: Literal[1] = 1
    federation: Name
    role: Role
    name: Name
    address: Address
    enrolment_address: Address
    anchor: Anchor

    def peer(self) -> PeerName:
        """The owner's full name."""
        return PeerName(self.federation, self.role, self.name)


@dataclass(frozen=True, slots=True)
class Identity:
    """A party as its folder has it. Holds no secret: `signing_key` reads its file when asked."""

    folder: Path
    membership: Membership

    @property
    def peer(self) -> PeerName:
        """The owner's full name."""
        return self.membership.peer()

    @property
    def tls(self) -> TlsFiles:
        """Where its TLS files are."""
        return tls_files(self.folder)

    def signing_key(self) -> Ed25519PrivateKey:
        """Reads its Ed25519 key."""
        return load_signing_key(self.folder / SIGNING_KEY_FILE)

    def members(self) -> SignedMembers:
        """The newest members list it saw, verified again from what was trusted at first."""
        data = read_public(self.folder / MEMBERS_FILE, MEMBERS_BYTES_MAX)
        return read_members(data, self.membership.federation, self.membership.anchor)

    def take_members(self, data: bytes) -> SignedMembers:
        """Verifies a members list that arrived and keeps it where it is newer. Raises CosiloError, and keeps what it
        has, where it may not follow."""
        known = self.members()
        offered = read_members(data, self.membership.federation, self.membership.anchor, known)
        if offered != known:
            replace_file(self.folder / MEMBERS_FILE, offered.canonical())
        return offered

    def trust(self) -> SignedTrust | None:
        """The newest trust document it saw; none where the CA was never rotated. It was verified when it was taken."""
        path = self.folder / TRUST_FILE
        if not path.exists():
            return None
        return parse_document(SignedTrust, read_public(path, TRUST_BYTES_MAX), TRUST_BYTES_MAX, f"read {TRUST_FILE}")

    def take_trust(self, data: bytes) -> SignedTrust | None:
        """Verifies a trust document that arrived (empty: there is none) and keeps it where it is newer, `ca.crt` with it.

        Raises CosiloError, and keeps what it has, where it may not follow, or where one was seen before and none comes.
        """
        known = self.trust()
        if not data:
            if known is not None:
                raise CosiloError(
                    "verify trust document",
                    f"none came, and version {known.version} was seen before",
                    "tell the admin: the coordinator went back",
                )
            return None
        federation = self.membership.federation
        offered = read_trust(data, federation, self.members().admins(), read_public(self.tls.ca, CHAIN_BYTES_MAX), known)
        if offered != known:
            replace_file(self.folder / TRUST_FILE, offered.canonical())
        self.settle_trust()
        return offered

    def settle_trust(self) -> None:
        """Makes `ca.crt` say what trust.json says, also after a crash between the two."""
        trust = self.trust()
        if trust is not None and read_public(self.tls.ca, CHAIN_BYTES_MAX) != trust.trust.ca_pem():
            replace_file(self.tls.ca, trust.trust.ca_pem())


def tls_files(folder: Path) -> TlsFiles:
    """Where a folder's TLS files are."""
    return TlsFiles(ca=folder / CA_FILE, certificate=folder / TLS_CERTIFICATE_FILE, key=folder / TLS_KEY_FILE)


def load_identity(folder: Path) -> Identity:
    """Reads who owns a folder. Raises CosiloError where it is not an identity folder."""
    if (folder / ADMIN_FILE).exists():
        membership = _from_toml(read_public(folder / ADMIN_FILE, MEMBERSHIP_BYTES_MAX))
    elif (folder / FEDERATION_FILE).exists():
        data = read_public(folder / FEDERATION_FILE, MEMBERSHIP_BYTES_MAX)
        membership = parse_document(Membership, data, MEMBERSHIP_BYTES_MAX, f"read {FEDERATION_FILE}", canonical=False)
    else:
        raise CosiloError(
            "read identity",
            f"{folder} is not an identity folder",
            "enrol first, or give the folder that enrolment made",
        )
    return Identity(folder=folder, membership=membership)


def membership_json(membership: Membership) -> bytes:
    """The bytes of federation.json."""
    return json.dumps(membership.model_dump(mode="json"), indent=2).encode("ascii") + b"\n"


def membership_toml(membership: Membership) -> bytes:
    """The bytes of admin.toml. Every value is a number or of a shape that TOML needs no escape for."""
    lines = ["# Who this admin is. The two addresses may be edited; the rest must agree with the certificate."]
    plain: dict[str, Any] = membership.model_dump(mode="json")
    anchor = plain.pop("anchor")
    lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    lines += ["", "[anchor]", f"version = {anchor['version']}", "", "[anchor.admins]"]
    lines += [f"{json.dumps(name)} = {json.dumps(key)}" for name, key in anchor["admins"].items()]
    return "\n".join(lines).encode("ascii") + b"\n"


def _from_toml(data: bytes) -> Membership:
    try:
        plain = json.dumps(tomllib.loads(data.decode("utf-8"))).encode("ascii")
    except (ValueError, TypeError, RecursionError) as error:
        raise CosiloError(f"read {ADMIN_FILE}", f"it is not TOML of plain values ({type(error).__name__})", "correct it by hand") from None
    return parse_document(Membership, plain, MEMBERSHIP_BYTES_MAX, f"read {ADMIN_FILE}", canonical=False)
