"""Key files and fingerprints."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from cosilo_common.errors import CosiloError
from cosilo_common.identity.keys import (
    fingerprint,
    load_signing_key,
    load_tls_key,
    make_signing_key,
    make_tls_key,
    public_bytes,
    save_private_key,
    signature_holds,
    tls_public_bytes,
)
from cosilo_common.identity.secret_files import read_public, read_secret, replace_file, write_public, write_secret

# RFC 8032, section 7.1, test 2
RFC_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_come_back_from_their_files_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    tls_key, signing_key = make_tls_key(), make_signing_key()
    save_private_key(tmp_path / "tls.key", tls_key)
    save_private_key(tmp_path / "signing.key", signing_key)
    assert (mode(tmp_path / "tls.key"), mode(tmp_path / "signing.key")) == (0o600, 0o600)
    assert tls_public_bytes(load_tls_key(tmp_path / "tls.key")) == tls_public_bytes(tls_key)
    assert public_bytes(load_signing_key(tmp_path / "signing.key")) == public_bytes(signing_key)


def test_a_secret_has_its_mode_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real_open = os.open

    def watching(path: str | Path, flags: int, mode: int = 0o777, **kwargs: int) -> int:
        descriptor = real_open(path, flags, mode, **kwargs)
        seen.append((flags & os.O_EXCL != 0, stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))
        return descriptor

    monkeypatch.setattr(os, "open", watching)
    umask = os.umask(0)
    try:
        write_secret(tmp_path / "secret", b"canary")
    finally:
        os.umask(umask)
    assert seen == [(True, 0o600, 0)]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    save_private_key(path, make_signing_key())
    before = path.read_bytes()
    with pytest.raises(CosiloError, match="exists already; move it away first: it is never overwritten"):
        save_private_key(path, make_signing_key())
    assert path.read_bytes() == before


@pytest.mark.parametrize("rights", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, rights: int) -> None:
    path = tmp_path / "signing.key"
    save_private_key(path, make_signing_key())
    path.chmod(rights)
    with pytest.raises(CosiloError) as caught:
        load_signing_key(path)
    assert str(caught.value) == f"read key: {path} may be read by others (mode {rights:04o}); run chmod 600 {path}"


def test_a_key_behind_a_link_is_refused(tmp_path: Path) -> None:
    save_private_key(tmp_path / "real.key", make_signing_key())
    (tmp_path / "link.key").symlink_to(tmp_path / "real.key")
    with pytest.raises(CosiloError, match=r"link\.key"):
        load_signing_key(tmp_path / "link.key")


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CosiloError, match="exists already"):
        save_private_key(tmp_path / "link.key", make_signing_key())
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_not_the_right_key_is_refused(tmp_path: Path) -> None:
    def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    locked = make_tls_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    save_private_key(tmp_path / "ed", make_signing_key())
    write_secret(tmp_path / "p384", pem(ec.generate_private_key(ec.SECP384R1())))
    write_secret(tmp_path / "rsa", pem(rsa.generate_private_key(65537, 2048)))
    write_secret(tmp_path / "locked", locked)
    write_secret(tmp_path / "junk", b"not a key")
    write_secret(tmp_path / "empty", b"")
    write_secret(tmp_path / "long", bytes(16 * 1024 + 1))
    (tmp_path / "folder").mkdir(mode=0o700)
    reasons = {
        "ed": "is not an ECDSA P-256 key",
        "p384": "is not an ECDSA P-256 key",
        "rsa": "is not an ECDSA P-256 key",
        "locked": "is encrypted",
        "junk": "is not a private key in PEM",
        "empty": "is not a private key in PEM",
        "long": "is longer than 16384 bytes",
        "folder": "",
        "absent": "does not exist",
    }
    for name, reason in reasons.items():
        with pytest.raises(CosiloError, match=f"{tmp_path / name}.*{reason}"):
            load_tls_key(tmp_path / name)
    with pytest.raises(CosiloError, match="is not an Ed25519 key"):
        load_signing_key(tmp_path / "rsa")


def test_a_broken_key_file_is_not_quoted_in_the_error(tmp_path: Path) -> None:
    write_secret(tmp_path / "tls.key", b"canary-7d1f")
    with pytest.raises(CosiloError) as caught:
        load_tls_key(tmp_path / "tls.key")
    assert "canary" not in str(caught.value) + repr(caught.value)


def test_a_fingerprint_is_eight_groups_of_the_digest() -> None:
    # sha256(b"") = e3b0c44298fc1c149afbf4c8996fb92427ae41e4...
    assert fingerprint(b"") == "e3b0-c442-98fc-1c14-9afb-f4c8-996f-b924"


def test_signatures_hold_for_their_key_and_message_only() -> None:
    assert public_bytes(Ed25519PrivateKey.from_private_bytes(RFC_SEED)) == RFC_PUBLIC
    assert signature_holds(RFC_PUBLIC, RFC_SIGNATURE, b"\x72")
    assert not signature_holds(RFC_PUBLIC, RFC_SIGNATURE, b"\x73")
    assert not signature_holds(RFC_PUBLIC, RFC_SIGNATURE[:-1], b"\x72")
    assert not signature_holds(RFC_PUBLIC[:-1], RFC_SIGNATURE, b"\x72")
    assert not signature_holds(bytes(32), RFC_SIGNATURE, b"\x72")
    assert not signature_holds(b"", b"", b"")


def test_a_public_file_is_readable_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        write_public(tmp_path / "ca.crt", b"x")
    finally:
        os.umask(umask)
    assert mode(tmp_path / "ca.crt") == 0o644


def test_a_file_is_replaced_whole_even_where_a_crash_left_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    replace_file(path, b"one")
    (tmp_path / ".members.json.new").write_bytes(b"ha")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["members.json"]


def test_reads_are_bounded(tmp_path: Path) -> None:
    write_secret(tmp_path / "s", b"12345")
    assert read_secret(tmp_path / "s", 5) == b"12345"
    assert read_public(tmp_path / "s", 5) == b"12345"
    with pytest.raises(CosiloError, match="is longer than 4 bytes"):
        read_public(tmp_path / "s", 4)
