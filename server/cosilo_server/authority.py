"""The federation's certificate authority: `cosilo init`, and the certificates that enrolment issues.

A root (ECDSA P-256, to take offline) signs one intermediate, which stays with the coordinator and signs leaves. A leaf
says who it is for in one URI SAN; what a site or an admin may do with it is TLS client authentication and nothing else.
Who is a *member* is not decided here: admins sign that. Must not know sockets, the store, or the clock (`now` is passed
in).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import (
    CHAIN_BYTES_MAX,
    COORDINATOR_DNS_NAME,
    certified_key,
    read_chain,
    read_csr,
    subject_of,
)
from cosilo_common.identity.documents import check_address
from cosilo_common.identity.folder import (
    ADMIN_FILE,
    CA_FILE,
    FEDERATION_FILE,
    MEMBERS_FILE,
    SIGNING_KEY_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
    Membership,
    load_identity,
    membership_json,
    membership_toml,
)
from cosilo_common.identity.keys import (
    TlsKey,
    load_tls_key,
    make_signing_key,
    make_tls_key,
    save_private_key,
    tls_public_bytes,
)
from cosilo_common.identity.members import found_members
from cosilo_common.identity.names import Peer, PeerName, Role, coordinator_name
from cosilo_common.identity.secret_files import SECRET_FOLDER_MODE, read_public, sync_folder, write_public

ROOT_LIFE = timedelta(days=20 * 365)  # outlives every study; changing it means enrolling everybody again
INTERMEDIATE_LIFE = timedelta(days=5 * 365)  # the root comes out of its safe once in that time
LEAF_LIFE = timedelta(days=90)  # a stolen certificate dies by itself within a quarter
LEAF_LIFE_MIN = timedelta(minutes=5)
LEAF_LIFE_MAX = timedelta(days=825)  # two years and a quarter, what browsers allowed last; longer is no life but a birthmark
BACKDATING = timedelta(hours=1)  # sites' clocks may be behind the coordinator's by this much

CA_FOLDER = "ca"
COORDINATOR_FOLDER = "coordinator"
ADMIN_FOLDER = "admin"
ROOT_KEY_FILE = "root.key"
ROOT_CERTIFICATE_FILE = "root.crt"
INTERMEDIATE_KEY_FILE = "intermediate.key"
INTERMEDIATE_CERTIFICATE_FILE = "intermediate.crt"
CROSS_CERTIFICATE_FILE = "intermediate.cross.crt"  # in an overlap: the intermediate's key, signed over by the root that goes
NEXT_KEY_FILE = "intermediate.next.key"  # the key that the coordinator made for its next intermediate
_UNFINISHED_FOLDER = ".unfinished"

_CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)
_SERVER = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True, slots=True)
class Founding:
    """What `cosilo init` is told: the federation's name, the first admin's, the coordinator's two addresses, and how
    long a leaf lives."""

    federation: str
    admin: str
    address: str
    enrolment_address: str
    leaf_life: timedelta = LEAF_LIFE


@dataclass(frozen=True, slots=True, repr=False)
class _Issuer:
    """What signs leaves. cross: the same key and name certified by the root that goes, in an overlap."""

    certificate: x509.Certificate
    key: TlsKey
    cross: x509.Certificate | None


class Authority:
    """Issues leaves under the intermediate. Its key stays inside.

    cross: in an overlap of two roots, the intermediate's key certified by the old one. It goes to those who may not know
    the new root yet: with the coordinator's own certificate, and to whoever enrols.
    """

    def __init__(
        self,
        federation: str,
        intermediate: x509.Certificate,
        key: TlsKey,
        root_pem: bytes,
        leaf_life: timedelta = LEAF_LIFE,
        cross: x509.Certificate | None = None,
    ) -> None:
        if not LEAF_LIFE_MIN <= leaf_life <= LEAF_LIFE_MAX:
            raise CosiloError("open authority", f"a certificate's life of {leaf_life} is not from {LEAF_LIFE_MIN} to {LEAF_LIFE_MAX}")
        if certified_key(intermediate) != tls_public_bytes(key):
            raise CosiloError(
                "open authority",
                f"{INTERMEDIATE_KEY_FILE} is not the key of {INTERMEDIATE_CERTIFICATE_FILE}",
                "restore the pair",
            )
        self.federation = federation
        self.root_pem = root_pem
        self.leaf_life = leaf_life
        self._issuer = _Issuer(intermediate, key, cross)

    @property
    def intermediate(self) -> x509.Certificate:
        """The certificate that leaves are issued under."""
        return self._issuer.certificate

    @classmethod
    def load(cls, folder: Path, leaf_life: timedelta = LEAF_LIFE) -> Authority:
        """Opens the authority in the coordinator's folder. Raises CosiloError where a file is missing, readable by
        others, or of another pair."""
        federation = load_identity(folder).membership.federation
        issuer = _load_issuer(folder)
        return cls(federation, issuer.certificate, issuer.key, read_public(folder / CA_FILE, CHAIN_BYTES_MAX), leaf_life, issuer.cross)

    def reload(self, folder: Path) -> None:
        """Takes what the folder has now, after a rotation; calls in flight end with what they began with."""
        self._issuer, self.root_pem = _load_issuer(folder), read_public(folder / CA_FILE, CHAIN_BYTES_MAX)

    def issue_site_certificate(self, csr: bytes, name: str, now: datetime) -> bytes:
        """A chain (PEM: leaf, intermediate) for a site's request (PKCS#10, DER). Raises CosiloError as `read_csr`
        does."""
        return self._issue_requested(csr, PeerName(self.federation, Role.SITE, name), now)

    def issue_admin_certificate(self, csr: bytes, name: str, now: datetime) -> bytes:
        """A chain (PEM: leaf, intermediate) for an admin's request (PKCS#10, DER). Raises CosiloError as `read_csr`
        does."""
        return self._issue_requested(csr, PeerName(self.federation, Role.ADMIN, name), now)

    def renew(self, csr: bytes, peer: Peer, now: datetime) -> bytes:
        """The next chain for a site or an admin, by its present certificate: the same name and the same key.

        Raises CosiloError as `read_csr` does, and for another key: whoever held a certificate for a moment would have one for ever.
        """
        key = read_csr(csr, peer.name)
        if sha256(tls_public_bytes(key)) != peer.key_digest:
            raise CosiloError(
                "renew certificate", f"{peer.name}: it asks for another key", "to change keys, enrol again with an invitation"
            )
        return self._issue(key, peer.name, now, crossed=False)

    def issue_coordinator_certificate(self, key: ec.EllipticCurvePublicKey, now: datetime) -> bytes:
        """A chain (PEM: leaf, intermediate) for the coordinator's own key: the one leaf with a DNS name and server
        authentication."""
        return self._issue(key, coordinator_name(self.federation), now)

    def __repr__(self) -> str:
        return f"Authority({self.federation!r})"

    def _issue_requested(self, csr: bytes, name: PeerName, now: datetime) -> bytes:
        return self._issue(read_csr(csr, name), name, now)

    def _issue(self, key: ec.EllipticCurvePublicKey, name: PeerName, now: datetime, crossed: bool = True) -> bytes:
        issuer = self._issuer  # once: a rotation may replace it meanwhile
        above = issuer.cross if crossed and issuer.cross is not None else issuer.certificate
        ends = min(now + self.leaf_life, above.not_valid_after_utc)
        if ends <= now:
            day = f"{above.not_valid_after_utc:%Y-%m-%d}"
            raise CosiloError("issue certificate", f"the intermediate expired {day}", "have an admin run cosilo ca renew")
        coordinator = name.role is Role.COORDINATOR
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(name.uri())]
        if coordinator:
            names.append(x509.DNSName(COORDINATOR_DNS_NAME))
        builder = _certificate(subject_of(name), key, now - BACKDATING, ends)
        builder = builder.issuer_name(above.subject)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(_SERVER if coordinator else _CLIENT), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(_issuer_key(above), critical=False)
        leaf = builder.sign(issuer.key, hashes.SHA256())
        return leaf.public_bytes(Encoding.PEM) + above.public_bytes(Encoding.PEM)


def found_federation(directory: Path, founding: Founding, now: datetime) -> None:
    """Does the work of `cosilo init`: makes `ca/`, `coordinator/` and `admin/` in a new or empty folder.

    `ca/` is to be taken offline, `coordinator/` goes to the coordinator's machine, `admin/` stays with the first admin
    alone: its signing key exists nowhere else. Raises CosiloError where the folder holds anything, and then leaves it
    as it was.
    """
    for address in (founding.address, founding.enrolment_address):
        check_address("found federation", address)
    _check_empty(directory)
    unfinished = directory / _UNFINISHED_FOLDER
    folders = {name: unfinished / name for name in (CA_FOLDER, COORDINATOR_FOLDER, ADMIN_FOLDER)}
    try:
        for folder in (directory, unfinished, *folders.values()):
            folder.mkdir(mode=SECRET_FOLDER_MODE, parents=folder == directory, exist_ok=folder == directory)
        _fill(folders, founding, now)
        for name, folder in folders.items():
            sync_folder(folder)
            folder.rename(directory / name)
        unfinished.rmdir()
        sync_folder(directory)
    except OSError as error:
        raise CosiloError("found federation", f"{directory}: {error.strerror}", "correct the folder's path or its rights") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_root(federation: str, key: TlsKey, now: datetime, number: int) -> x509.Certificate:
    """A root's certificate, signed by itself. number: of the rotation, for people who look at it."""
    return _make_root(federation, key, now, f"root {number}")


def sign_intermediate(
    federation: str, key: ec.EllipticCurvePublicKey, root: x509.Certificate, root_key: TlsKey, now: datetime, number: int
) -> x509.Certificate:
    """A coordinator's intermediate under a root. Two roots that sign the same key and number give certificates that stand for each other."""
    return _make_intermediate(federation, key, root, root_key, now, f"enrolment {number}")


def load_root(folder: Path) -> tuple[x509.Certificate, TlsKey]:
    """The root in a `ca/` folder. Raises CosiloError where a file is missing, readable by others, or of another pair."""
    root = read_chain(read_public(folder / ROOT_CERTIFICATE_FILE, CHAIN_BYTES_MAX))[0]
    key = load_tls_key(folder / ROOT_KEY_FILE)
    if certified_key(root) != tls_public_bytes(key):
        raise CosiloError("open CA", f"{folder / ROOT_KEY_FILE} is not the key of {ROOT_CERTIFICATE_FILE}", "restore the pair")
    return root, key


def _load_issuer(folder: Path) -> _Issuer:
    certificate = read_chain(read_public(folder / INTERMEDIATE_CERTIFICATE_FILE, CHAIN_BYTES_MAX))[0]
    key = load_tls_key(folder / INTERMEDIATE_KEY_FILE)
    following = folder / NEXT_KEY_FILE
    if certified_key(certificate) != tls_public_bytes(key) and following.exists():  # a rotation was killed right between the two
        key = load_tls_key(following)
        if certified_key(certificate) == tls_public_bytes(key):
            following.replace(folder / INTERMEDIATE_KEY_FILE)
            sync_folder(folder)
    cross_file = folder / CROSS_CERTIFICATE_FILE
    cross = read_chain(read_public(cross_file, CHAIN_BYTES_MAX))[0] if cross_file.exists() else None
    if cross is not None and certified_key(cross) != certified_key(certificate):
        cross = None  # of a rotation that was killed before its certificate was in place: it is put again
    return _Issuer(certificate, key, cross)


def _fill(folders: dict[str, Path], founding: Founding, now: datetime) -> None:
    root_key, intermediate_key, coordinator_key, admin_key = (make_tls_key() for _ in range(4))
    signing_key = make_signing_key()
    root = _make_root(founding.federation, root_key, now)
    intermediate = _make_intermediate(founding.federation, intermediate_key.public_key(), root, root_key, now)
    root_pem = root.public_bytes(Encoding.PEM)
    authority = Authority(founding.federation, intermediate, intermediate_key, root_pem, founding.leaf_life)
    admin = PeerName(founding.federation, Role.ADMIN, founding.admin)
    members = found_members(founding.federation, founding.admin, signing_key)

    ca = folders[CA_FOLDER]
    save_private_key(ca / ROOT_KEY_FILE, root_key)
    write_public(ca / ROOT_CERTIFICATE_FILE, root_pem)

    coordinator = folders[COORDINATOR_FOLDER]
    save_private_key(coordinator / INTERMEDIATE_KEY_FILE, intermediate_key)
    write_public(coordinator / INTERMEDIATE_CERTIFICATE_FILE, intermediate.public_bytes(Encoding.PEM))
    chains = (
        (coordinator, coordinator_key, authority.issue_coordinator_certificate(coordinator_key.public_key(), now)),
        (folders[ADMIN_FOLDER], admin_key, authority._issue(admin_key.public_key(), admin, now)),
    )
    for folder, key, chain in chains:
        save_private_key(folder / TLS_KEY_FILE, key)
        write_public(folder / TLS_CERTIFICATE_FILE, chain)
        write_public(folder / CA_FILE, root_pem)
        write_public(folder / MEMBERS_FILE, members.canonical())
    save_private_key(folders[ADMIN_FOLDER] / SIGNING_KEY_FILE, signing_key)

    def membership(role: Role, name: str) -> Membership:
        return Membership(
            federation=founding.federation,
            role=role,
            name=name,
            address=founding.address,
            enrolment_address=founding.enrolment_address,
            anchor=members.anchor(),
        )

    write_public(coordinator / FEDERATION_FILE, membership_json(membership(Role.COORDINATOR, Role.COORDINATOR.value)))
    write_public(folders[ADMIN_FOLDER] / ADMIN_FILE, membership_toml(membership(Role.ADMIN, founding.admin)))


def _make_root(federation: str, key: TlsKey, now: datetime, title: str = "root") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title), _organisation(federation)])
    builder = _certificate(subject, key.public_key(), now - BACKDATING, now + ROOT_LIFE).issuer_name(subject)
    return _authority_extensions(builder, path_length=1).sign(key, hashes.SHA256())


def _make_intermediate(
    federation: str, key: ec.EllipticCurvePublicKey, root: x509.Certificate, root_key: TlsKey, now: datetime, title: str = "enrolment"
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title), _organisation(federation)])
    builder = _certificate(subject, key, now - BACKDATING, min(now + INTERMEDIATE_LIFE, root.not_valid_after_utc))
    builder = builder.issuer_name(root.subject).add_extension(_issuer_key(root), critical=False)
    return _authority_extensions(builder, path_length=0).sign(root_key, hashes.SHA256())


def _certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begins.replace(microsecond=0)).not_valid_after(ends.replace(microsecond=0))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _authority_extensions(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    return builder.add_extension(_key_usage(authority=True), critical=True)


def _issuer_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _organisation(federation: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation)


def _check_empty(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise CosiloError("found federation", f"{directory} is not a folder", "give a new or empty folder")
    if directory.exists() and any(entry.name != _UNFINISHED_FOLDER for entry in directory.iterdir()):
        raise CosiloError("found federation", f"{directory} is not empty", "give a new or empty folder: keys are never overwritten")
    shutil.rmtree(directory / _UNFINISHED_FOLDER, ignore_errors=True)  # of an init that was killed: its keys were never used
