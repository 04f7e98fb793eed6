"""Private keys of a party, made where they are used, and the fingerprints that people compare.

Two keys a party: an ECDSA P-256 key for TLS, and an Ed25519 key that signs protocol messages, members lists and
manifests. They are kept apart because TLS certificates are issued by the coordinator, which must never be able to speak
for a site. Must not know certificates or sockets.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from cosilo_common.canonical import sha256
from cosilo_common.errors import CosiloError
from cosilo_common.identity.secret_files import read_secret, write_secret

KEY_FILE_BYTES_MAX = 16 * 1024  # a P-256 key is 241 bytes of PEM; an RSA-8192 key of somebody's own PKI about 6.5 KiB
PUBLIC_KEY_BYTES = 32  # Ed25519, RFC 8032
SEED_BYTES = 32  # Ed25519, RFC 8032
SIGNATURE_BYTES = 64  # Ed25519, RFC 8032

# A fingerprint is read aloud. Eight groups of four hex digits are 128 bits of SHA-256: making another key with the same
# fingerprint costs 2^128 trials (a second preimage; the 2^64 of a collision is no use, since the honest key is not the
# attacker's to choose), and a group of four is what a person holds in mind while they listen. The remaining 128 bits
# would double the reading and add nothing.
FINGERPRINT_GROUPS = 8
FINGERPRINT_GROUP_CHARS = 4

TlsKey = ec.EllipticCurvePrivateKey


def make_tls_key() -> TlsKey:
    """Makes an ECDSA P-256 key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def make_signing_key() -> Ed25519PrivateKey:
    """Makes an Ed25519 key."""
    return Ed25519PrivateKey.generate()


def save_private_key(path: Path, key: TlsKey | Ed25519PrivateKey) -> None:
    """Writes a key as PKCS#8 PEM into a new file of mode 0600. Raises CosiloError where the path exists already."""
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def load_tls_key(path: Path) -> TlsKey:
    """Reads an ECDSA P-256 key. Raises CosiloError where it is missing, of another kind, or readable by others."""
    key = _load(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CosiloError("read key", f"{path} is not an ECDSA P-256 key", "check that it is the TLS key")
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Reads an Ed25519 key. Raises CosiloError where it is missing, of another kind, or readable by others."""
    key = _load(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise CosiloError("read key", f"{path} is not an Ed25519 key", "check that it is the signing key")
    return key


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The raw public key: 32 bytes."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def tls_public_bytes(key: TlsKey | ec.EllipticCurvePublicKey) -> bytes:
    """A TLS key's public half as DER (SubjectPublicKeyInfo), the form in which certificates carry it."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def signature_holds(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an Ed25519 signature (64 bytes) by a raw public key (32 bytes) is over this message. False for keys and
    signatures of any other shape."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(data: bytes) -> str:
    """The short form of SHA-256 that people compare over a telephone, as in `3f2a-91bc-04d7-e6a0-58c3-7b19-aa42-0f6e`.

    data: a raw Ed25519 public key, or a certificate in DER.
    """
    digits = sha256(data).hex()
    starts = range(0, FINGERPRINT_GROUPS * FINGERPRINT_GROUP_CHARS, FINGERPRINT_GROUP_CHARS)
    return "-".join(digits[start : start + FINGERPRINT_GROUP_CHARS] for start in starts)


def _load(path: Path) -> PrivateKeyTypes:
    data = read_secret(path, KEY_FILE_BYTES_MAX)
    try:
        return load_pem_private_key(data, password=None)
    except TypeError:
        raise CosiloError("read key", f"{path} is encrypted", "decrypt it: a daemon starts without anybody to type a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CosiloError("read key", f"{path} is not a private key in PEM", "check that it is the right file") from None
