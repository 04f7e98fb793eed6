"""`cosilo ca`: status, rotate, renew, retire, sign. The CA changes here, at the admin's own machine, and the coordinator follows.

The root's key comes out of its safe for `rotate` and `renew` alone. Every change is a trust document that the admin signs;
each command may be run again after a failure and goes on where it was.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosilo_common.errors import CosiloError
from cosilo_server.cli.commands import AsJson, Seat, command, group
from cosilo_server.cli.shapes import CaPartyShape, CaShape
from cosilo_server.cli.terminal import columns, fields, note, say, say_json, time_words, warn

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    from cosilo_common.identity.keys import TlsKey
    from cosilo_common.identity.trust import Trust, Voucher
    from cosilo_common.rpc.v1.admin_pb2 import GetAuthorityResponse
    from cosilo_server.cli.connection import Coordinator

CaFolder = Annotated[
    Path, typer.Argument(metavar="CA_DIR", help="The ca/ folder that cosilo init made, out of its safe.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Cut off whoever has no certificate of the new CA.")]


def add_to(parent: typer.Typer) -> None:
    """Adds the noun to the tree."""
    verbs = group(parent, "ca", "The federation's CA: how it is replaced without anybody enrolling again.")
    command(verbs, "status", status)
    command(verbs, "rotate", rotate)
    command(verbs, "renew", renew)
    command(verbs, "retire", retire)
    command(verbs, "sign", sign)


def status(seat: Seat, as_json: AsJson = False) -> None:
    """The CA's certificates, and who still has one of a CA that goes."""
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        found = _shape(_authority(coordinator))
    if as_json:
        say_json(found)
        return
    roots = [("root", f"until {time_words(at)}") for at in found["roots_expire_unix_s"][:1]]
    old = [("old root", f"trusted until cosilo ca retire; it ends {time_words(at)}") for at in found["roots_expire_unix_s"][1:]]
    version = f"version {found['version']}" if found["version"] else "none: the CA was never changed"
    fields([*roots, *old, ("intermediate", f"until {time_words(found['intermediate_expires_unix_s'])}"), ("trust document", version)])
    say("")
    columns(
        ("NAME", "ROLE", "CERTIFICATE", "UNTIL"),
        ((p["name"], p["role"], p["certificate"], time_words(p["expires_unix_s"] or 0)) for p in found["parties"]),
    )
    if found["waiting"]:
        note(f"still without a certificate of today's CA: {', '.join(found['waiting'])}")


def rotate(seat: Seat, folder: CaFolder) -> None:
    """Make a new root beside the old one; both are trusted until cosilo ca retire."""
    from cosilo_common.identity.trust import Trust, key_id, pem_of, vouch
    from cosilo_server.authority import sign_intermediate
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        authority = _authority(coordinator, want_csr=True)
        roots = _roots(authority)
        if len(roots) > 1:
            raise CosiloError("rotate CA", "two roots are trusted already", "run cosilo ca retire first")
        old, old_key = _root_of(folder, roots[0])
        federation = coordinator.identity.membership.federation
        number = _version(authority) + 1
        root, root_key = _next_root(folder / str(number), federation, number)
        public, now = _csr_key(coordinator, authority.csr), datetime.now(UTC)
        intermediate = sign_intermediate(federation, public, root, root_key, now, number)
        cross = sign_intermediate(federation, public, old, old_key, now, number)
        issuers = _issuers(authority, key_id(intermediate))
        trust = Trust(version=number, federation=federation, roots=(pem_of(root), pem_of(old)), issuers=issuers)
        _put(coordinator, trust, (vouch(federation, old, old_key, root),), pem_of(intermediate), pem_of(cross))
    say(f"a new root beside the old one: trust document version {number}")
    note(f"put {folder} back into its safe: the new root's key is in {folder / str(number)}")
    note("sites and admins take it up by themselves: watch cosilo ca status, then run cosilo ca retire")


def renew(seat: Seat, folder: CaFolder) -> None:
    """Make a new intermediate under today's root; members renew under it by themselves."""
    from cosilo_common.identity.trust import Trust, key_id, pem_of
    from cosilo_server.authority import sign_intermediate
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        authority = _authority(coordinator, want_csr=True)
        roots = _roots(authority)
        if len(roots) > 1:
            raise CosiloError("renew CA", "two roots are trusted", "run cosilo ca retire first")
        root, root_key = _root_of(folder, roots[0])
        federation, number = coordinator.identity.membership.federation, _version(authority) + 1
        intermediate = sign_intermediate(federation, _csr_key(coordinator, authority.csr), root, root_key, datetime.now(UTC), number)
        issuers = _issuers(authority, key_id(intermediate))
        trust = Trust(version=number, federation=federation, roots=(pem_of(root),), issuers=issuers)
        _put(coordinator, trust, _vouchers(coordinator), pem_of(intermediate), "")
    say(f"a new intermediate: trust document version {number}")
    note("members renew under it by themselves: watch cosilo ca status, then run cosilo ca retire")


def retire(seat: Seat, force: Force = False) -> None:
    """End an overlap: what is of the old CA counts no longer."""
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        found = _authority(coordinator)
        trust = _trust(found)
        if trust is None or (len(trust.roots), len(trust.issuers)) == (1, 1):
            raise CosiloError("retire CA", "no old CA is trusted", "nothing is left to do")
        waiting = _shape(found)["waiting"]
        if waiting and not force:
            raise CosiloError(
                "retire CA",
                f"{', '.join(waiting)} would be cut off: no certificate of the new CA was seen from them",
                "wait until they connect (an admin: with cosilo members), or add --force; they would then enrol again",
            )
        following = trust.model_copy(update={"version": trust.version + 1, "roots": trust.roots[:1], "issuers": trust.issuers[:1]})
        _put(coordinator, following, _vouchers(coordinator), "", "")
    say(f"the old CA is retired: trust document version {following.version}")
    if waiting:
        warn(f"cut off, until they enrol again with new invitations: {', '.join(waiting)}")
    note("invitations from before the change that nobody used open nothing any more: make them again")


def sign(seat: Seat) -> None:
    """Sign the trust document as it stands, in place of an admin who left."""
    from cosilo_server.cli.connection import connect

    with connect(seat) as coordinator:
        trust = _trust(_authority(coordinator))
        if trust is None:
            raise CosiloError("sign trust document", "the CA was never changed, so there is none", "nothing is left to do")
        following = trust.model_copy(update={"version": trust.version + 1})
        _put(coordinator, following, _vouchers(coordinator), "", "")
    say(f"signed trust document version {following.version}")


def _authority(coordinator: Coordinator, want_csr: bool = False) -> GetAuthorityResponse:
    """What the coordinator says of the CA; the trust document in it is verified and kept, or our own stands in its place."""
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.members import fetch_members

    fetch_members(coordinator)
    answer = coordinator.ask("look at CA", coordinator.admin.GetAuthority, admin_pb2.GetAuthorityRequest(want_csr=want_csr))
    known = coordinator.identity.trust()
    if known is not None and (not answer.trust or _trust_version(answer.trust) < known.version):
        answer.trust, answer.roots = known.canonical(), known.trust.ca_pem()  # the coordinator was put back: it gets ours, and the next
    else:
        coordinator.identity.take_trust(answer.trust)
    return answer


def _trust_version(data: bytes) -> int:
    from cosilo_common.identity.documents import parse_document
    from cosilo_common.identity.trust import TRUST_BYTES_MAX, SignedTrust

    return parse_document(SignedTrust, data, TRUST_BYTES_MAX, "read trust document").version


def _put(coordinator: Coordinator, trust: Trust, vouchers: tuple[Voucher, ...], intermediate: str, cross: str) -> None:
    """Signs a document, has it put in force, and follows it: the admin's own folder, and the admin's own certificate."""
    from cosilo_common.identity.trust import sign_trust
    from cosilo_common.rpc.v1 import admin_pb2
    from cosilo_server.cli.connection import follow_ca

    identity = coordinator.identity
    signed = sign_trust(trust, vouchers, identity.peer.name, identity.signing_key(), identity.members().admins())
    data = signed.canonical()
    request = admin_pb2.PutAuthorityRequest(trust=data, intermediate=intermediate.encode(), cross=cross.encode())
    coordinator.ask("change CA", coordinator.admin.PutAuthority, request)
    identity.take_trust(data)
    follow_ca(coordinator)


def _trust(authority: GetAuthorityResponse) -> Trust | None:
    from cosilo_common.identity.documents import parse_document
    from cosilo_common.identity.trust import TRUST_BYTES_MAX, SignedTrust

    if not authority.trust:
        return None
    return parse_document(SignedTrust, authority.trust, TRUST_BYTES_MAX, "read trust document").trust


def _vouchers(coordinator: Coordinator) -> tuple[Voucher, ...]:
    known = coordinator.identity.trust()
    return () if known is None else known.vouchers


def _version(authority: GetAuthorityResponse) -> int:
    trust = _trust(authority)
    return 0 if trust is None else trust.version


def _roots(authority: GetAuthorityResponse) -> list[x509.Certificate]:
    from cosilo_common.identity.certificates import read_chain

    return read_chain(authority.roots)


def _issuers(authority: GetAuthorityResponse, newest: str) -> tuple[str, ...]:
    """The newest intermediate first, then those that count until they are retired."""
    from cosilo_common.identity.certificates import read_chain
    from cosilo_common.identity.trust import ISSUERS_MAX, key_id

    trust = _trust(authority)
    before = trust.issuers if trust is not None else (key_id(read_chain(authority.intermediate)[0]),)
    if len(before) == ISSUERS_MAX:
        raise CosiloError("change CA", f"{ISSUERS_MAX} intermediates count already", "run cosilo ca retire first")
    return (newest, *before)


def _csr_key(coordinator: Coordinator, csr: bytes) -> ec.EllipticCurvePublicKey:
    from cosilo_common.identity.certificates import read_csr
    from cosilo_common.identity.names import coordinator_name

    return read_csr(csr, coordinator_name(coordinator.identity.membership.federation))


def _root_of(folder: Path, wanted: x509.Certificate) -> tuple[x509.Certificate, TlsKey]:
    """The root that is trusted now, in a ca/ folder: beside it, or in the folder of its rotation."""
    from cosilo_common.identity.trust import root_digest
    from cosilo_server.authority import ROOT_CERTIFICATE_FILE, load_root

    for place in [folder, *sorted(path for path in folder.glob("[0-9]*") if path.is_dir())]:
        if (place / ROOT_CERTIFICATE_FILE).exists():
            root, key = load_root(place)
            if root_digest(root) == root_digest(wanted):
                return root, key
    raise CosiloError("open CA", f"{folder} has not the root that the federation trusts", "give the ca/ folder that cosilo init made")


def _next_root(place: Path, federation: str, number: int) -> tuple[x509.Certificate, TlsKey]:
    """The new root's folder, made unless an earlier try made it."""
    from cosilo_common.identity.keys import load_tls_key, make_tls_key, save_private_key
    from cosilo_common.identity.secret_files import SECRET_FOLDER_MODE, replace_file
    from cosilo_common.identity.trust import pem_of
    from cosilo_server.authority import ROOT_CERTIFICATE_FILE, ROOT_KEY_FILE, load_root, make_root

    place.mkdir(mode=SECRET_FOLDER_MODE, exist_ok=True)
    if not (place / ROOT_KEY_FILE).exists():
        save_private_key(place / ROOT_KEY_FILE, make_tls_key())
    if not (place / ROOT_CERTIFICATE_FILE).exists():
        made = make_root(federation, load_tls_key(place / ROOT_KEY_FILE), datetime.now(UTC), number)
        replace_file(place / ROOT_CERTIFICATE_FILE, pem_of(made).encode())
    return load_root(place)


def _shape(authority: GetAuthorityResponse) -> CaShape:
    from cosilo_common.identity.certificates import read_chain

    trust = _trust(authority)
    newest = trust.issuers[0] if trust is not None else ""
    parties: list[CaPartyShape] = []
    for party in authority.parties:
        word = "unseen" if not party.issuer else "old" if newest and party.issuer != newest else "current"
        parties.append({"name": party.name, "role": party.role, "certificate": word, "expires_unix_s": party.expires_unix_s or None})
    return {
        "version": _version(authority),
        "overlap": trust is not None and (len(trust.roots) > 1 or len(trust.issuers) > 1),
        "roots_expire_unix_s": [_ends(root) for root in _roots(authority)],
        "intermediate_expires_unix_s": _ends(read_chain(authority.intermediate)[0]),
        "parties": parties,
        "waiting": [party["name"] for party in parties if newest and party["certificate"] != "current"],
    }


def _ends(certificate: x509.Certificate) -> int:
    return int(certificate.not_valid_after_utc.timestamp())
