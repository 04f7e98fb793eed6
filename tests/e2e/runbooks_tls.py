"""Who is believed with which certificate, tried by handshakes of this test's own.

Must not know Cosilo's channels: a thief writes their own.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from tests.federation.local import COORDINATOR, LocalFederation

ANSWER_S = 10.0
_STEPS_MAX = 10  # of a handshake whose two ends are in this process; TLS 1.3 takes three


def believed(identity: Path, roots: str) -> bool:
    """Whether a server with the tls.crt and tls.key of a folder is believed by somebody who trusts these roots only."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [_trusting(roots).wrap_bio(back, there), serving.wrap_bio(there, back, server_side=True)]
    try:
        for _ in range(_STEPS_MAX):
            ends = [end for end in ends if not _shaken(end)]
    except ssl.SSLCertVerificationError:
        return False
    return not ends


def answered(federation: LocalFederation, identity: Path, trusted: Path, roots: str = "ca.crt") -> bool:
    """Whether the coordinator's port says a word to somebody with the tls.crt and tls.key of a folder; trusted: the folder of the roots' file."""
    host, port = federation.endpoints(COORDINATOR)["federation"].rsplit(":", 1)
    context = _trusting((trusted / roots).read_text(encoding="ascii"))
    context.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as plain, context.wrap_socket(plain) as wrapped:
            return bool(wrapped.recv(1))  # in TLS 1.3 the server judges the client after the client is done
    except (ssl.SSLError, ConnectionError):
        return False


def _trusting(roots: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name is a URI, which Cosilo's own handshake checks
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=roots)
    return context


def _shaken(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
