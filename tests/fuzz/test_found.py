"""What fuzzing found, each with the bytes that showed it."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cosilo_client.config import load_site_config
from cosilo_client.data import DataConfig
from cosilo_client.data.npz import open_npz
from cosilo_common.canonical import u64
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.encoding import Encoding
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import make_csr, read_chain, read_csr
from cosilo_common.identity.keys import make_tls_key
from cosilo_common.identity.names import PeerName, Role, peer_from_certificate
from cosilo_common.identity.tls import federation_channel
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.cli.run_file import RunFile
from cosilo_server.config import CoordinatorConfig
from cosilo_server.rounds import record
from cosilo_server.store import terms_of
from tests.identity_parties import FEDERATION, found
from tests.integration.memory_rounds import manifest_of

ANNA = PeerName(FEDERATION, Role.SITE, "st-anna")


@pytest.mark.parametrize("read", [peer_from_certificate, read_chain])
def test_a_certificate_of_a_version_that_is_none_does_not_parse(read: Callable[[bytes], object], tmp_path: Path) -> None:
    """`cryptography` raises a plain Exception for it, not a ValueError."""
    pem = found(tmp_path / "f").coordinator.tls.certificate.read_bytes()
    leaf = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    version_3 = bytes.fromhex("a003020102")
    assert leaf.count(version_3) == 1
    odd = leaf.replace(version_3, bytes.fromhex("a003020107"))
    with pytest.raises(CosiloError, match="read certificate"):
        read(b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(odd) + b"-----END CERTIFICATE-----\n")


def test_a_request_of_a_version_that_is_none_does_not_parse() -> None:
    """The same in a certificate request, which anybody with an invitation may send: it answered UNKNOWN."""
    csr = make_csr(make_tls_key(), ANNA)
    version_1 = bytes.fromhex("020100")
    odd = csr.replace(version_1, bytes.fromhex("020105"), 1)
    with pytest.raises(CosiloError, match="does not parse"):
        read_csr(odd, ANNA)


@pytest.mark.parametrize("header", [b"{'descr': '|u1', 'shape': (3,\n", b"{'descr'\0", b"(" * 60, b'{1: 2, "a'])
def test_an_array_whose_header_is_no_python_is_refused(header: bytes, tmp_path: Path) -> None:
    """numpy reads it with Python's own parser, which raises TokenError or SyntaxError."""
    path = tmp_path / "x.npz"
    out = io.BytesIO()
    np.lib.format.write_array(out, np.zeros(3, np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        archive.writestr("train_labels.npy", out.getvalue())
    with pytest.raises(CosiloError, match="read data"):
        open_npz(DataConfig(kind="npz", path=path))


@pytest.mark.parametrize("document", ["", "{}", "[]", '{"phase": 1}', "null"])
def test_a_round_s_document_that_is_none_is_refused_with_what_to_do(document: str) -> None:
    terms = terms_of(manifest_of(("anna", "beda", "clara")))
    with pytest.raises(CosiloError, match="put the newest backup back"):
        record.load(document, {}, run=bytes(32), number=1, kind=RoundKind.TRAIN, terms=terms, started_at=0.0)


@pytest.mark.parametrize("bits", [0, 2**33, 2**64 - 1])
def test_an_encoding_of_any_number_of_bits_is_refused_before_it_is_reckoned_with(bits: int) -> None:
    """From the coordinator, in every assignment: 2^bits was computed first, which ends a site's daemon for want of memory."""
    encoding = round_encoding(manifest_of(("anna", "beda", "clara")), RoundKind.TRAIN)
    data = encoding.canonical()
    assert data.count(u64(encoding.bits)) == 1
    with pytest.raises(CosiloError, match="bits must be 24 or 32"):
        Encoding.parse(data.replace(u64(encoding.bits), u64(bits)))


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "1" * 5000])
@pytest.mark.parametrize("read", [load_site_config, CoordinatorConfig.read, RunFile])
def test_toml_that_no_parser_finishes_is_refused(read: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(CosiloError):
        read(path)


def test_a_key_of_an_unknown_kind_is_no_tls_key(tmp_path: Path) -> None:
    """`cryptography` raises UnsupportedAlgorithm for it, which is no ValueError."""
    tls = found(tmp_path / "f").party(Role.SITE, "st-anna")
    der = base64.b64decode(b"".join(tls.key.read_bytes().splitlines()[1:-1]))
    ec_public_key = bytes.fromhex("06072a8648ce3d0201")
    odd = der.replace(ec_public_key, bytes.fromhex("06072a8648ce3d0209"))
    assert odd != der
    tls.key.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(odd) + b"-----END PRIVATE KEY-----\n")
    with pytest.raises(CosiloError, match="not a private key in PEM"):
        federation_channel("127.0.0.1:1", tls)
