"""What stands between this site and its coordinator, in words: a proxy that refuses, a firewall that reads along, a CA that
changed while the site was away.

gRPC says of all of them that a handshake failed. This looks once more at what is on the way, sends nothing but the
beginning of a TLS connection, believes nothing that it finds, and turns it into what a person can do. Must not know
sessions.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from contextlib import suppress
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cosilo_client.coordinator import Unreachable
from cosilo_common.errors import CosiloError, printable
from cosilo_common.identity.certificates import CHAIN_BYTES_MAX, COORDINATOR_DNS_NAME
from cosilo_common.identity.names import UNPARSABLE, PeerName, coordinator_name, peer_from_certificate
from cosilo_common.identity.proxy import Proxy, parse_proxy
from cosilo_common.identity.secret_files import read_public
from cosilo_common.identity.tls import TlsFiles

LOOK_TIMEOUT_S: Final = 10.0  # three round trips; the daemon tries again anyway
ANSWER_BYTES_MAX: Final = 8 * 1024  # of a proxy's answer: a status line and headers
NAME_CHARS_MAX: Final = 120
_TLS_SIGNS: Final = (
    "CERTIFICATE_VERIFY_FAILED",
    "certificate verify failed",
    "Handshake",
    "handshake",
    "SSL_ERROR",
    "WRONG_VERSION_NUMBER",
)
_CONNECT_SIGNS: Final = ("ailed to connect", "DNS resolution failed")
_PROXY_SIGN: Final = "HTTP proxy returned response code"


async def explain(error: CosiloError, address: str, federation: str, ca_pem: bytes, proxy: Proxy | None) -> CosiloError:
    """The same failure in better words where a look at the way finds any, of the same kind; else the failure itself."""
    if not isinstance(error, Unreachable):  # the coordinator's own words, which say what they mean
        return error
    said = error.subject
    found: tuple[str, str] | None = None
    if _PROXY_SIGN in said:
        found = _proxy_refused(said, address, proxy)
    elif any(sign in said for sign in _TLS_SIGNS):
        with suppress(
            OSError, ssl.SSLError, TimeoutError, CosiloError, *UNPARSABLE, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                shown = await foreign_certificate(address, ca_pem, proxy or _environment_proxy())
            found = judge(shown, address, federation) if shown is not None else None
    elif proxy is not None and proxy.address and any(sign in said for sign in _CONNECT_SIGNS):
        found = (
            f"the proxy {proxy.address} does not lead to {address} ({said[:200]})",
            "check proxy in [coordinator] of site.toml, and that the proxy runs; it is tried again",
        )
    if found is None:
        return error
    return Unreachable(error.operation, *found)


def judge(shown: x509.Certificate, address: str, federation: str) -> tuple[str, str]:
    """What it means, and what to do, when a certificate that does not verify is shown at the coordinator's address."""
    issuer = printable(shown.issuer.rfc4514_string())[:NAME_CHARS_MAX] or "without a name"
    claimed = _claimed(shown.public_bytes(Encoding.PEM))
    if claimed == coordinator_name(federation):
        return (
            f"{address} shows a coordinator's certificate of a CA that this site does not trust (issuer {issuer}), or one that is not valid now",
            "if the federation changed its CA while this site was away, enrol again with a new invitation; ask an admin which, by telephone",
        )
    if claimed is not None:
        return f"{address} shows the certificate of {claimed.uri()}, not the coordinator's", "check the address with an admin"
    return (
        f"somebody on the way to {address} presents a certificate of another CA (issuer {issuer}): "
        "a firewall that reads TLS connections, most likely",
        f"ask the network's people to exempt {address} from TLS inspection; nothing was sent through it",
    )


async def foreign_certificate(address: str, ca_pem: bytes, proxy: Proxy | None) -> x509.Certificate | None:
    """The certificate that is shown at an address, where it does not verify as the coordinator's; none where it does.

    Raises OSError and ssl.SSLError.
    """
    verifying = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    verifying.load_verify_locations(cadata=ca_pem.decode("ascii"))
    try:
        await _shown(address, verifying, proxy)
    except ssl.SSLCertVerificationError:
        looking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        looking.check_hostname = False
        looking.verify_mode = ssl.CERT_NONE  # the question is who shows what: nothing is sent, and nothing believed
        return x509.load_der_x509_certificate(await _shown(address, looking, proxy))
    return None


async def _shown(address: str, context: ssl.SSLContext, proxy: Proxy | None) -> bytes:
    host, _, port = address.rpartition(":")
    dialled = proxy.address if proxy is not None and proxy.address else address
    dialled_host, _, dialled_port = dialled.rpartition(":")
    reader, writer = await asyncio.open_connection(dialled_host.strip("[]"), int(dialled_port))
    try:
        if proxy is not None and proxy.address:
            await _tunnel(reader, writer, f"{host}:{port}", proxy)
        context.set_alpn_protocols(["h2"])
        await writer.start_tls(context, server_hostname=COORDINATOR_DNS_NAME)  # as gRPC asks, so that the same one answers
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
    finally:
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


async def _tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str, proxy: Proxy) -> None:
    header = proxy.header()
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *([f"Proxy-Authorization: {header}"] if header else []), "", ""]
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    answer = await reader.readuntil(b"\r\n\r\n")
    if len(answer) > ANSWER_BYTES_MAX or answer.split(b" ", 2)[1:2] != [b"200"]:
        raise ValueError("the proxy refused")


def _proxy_refused(said: str, address: str, proxy: Proxy | None) -> tuple[str, str]:
    code = said.split(_PROXY_SIGN, 1)[1].strip()[:3]
    who = f"the proxy {proxy.address}" if proxy is not None else "the proxy that the environment names (https_proxy)"
    if code == "407":
        hint = "put user:password into a file of mode 0600, and its path into proxy_credentials in [coordinator] of site.toml"
        return f"{who} wants a name and a password for {address} (407), or refuses those it was given", hint
    if code == "403":
        return f"{who} does not allow a connection to {address} (403)", f"ask the network's people to allow CONNECT {address}"
    return (
        f"{who} answered {code} to CONNECT {address}",
        "ask the network's people what that proxy allows, and whether it reaches the coordinator",
    )


def _environment_proxy() -> Proxy | None:
    """The proxy that gRPC takes where the configuration names none: the first of the variables that it looks at."""
    named = next((os.environ[name] for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), "")
    try:
        return Proxy(parse_proxy(named)) if named else None
    except CosiloError:  # with a password in it, or of another kind: then there is no look, and gRPC's own words
        return None


def _claimed(pem: bytes) -> PeerName | None:
    try:
        return peer_from_certificate(pem).name
    except CosiloError:
        return None


def trusted_roots(tls: TlsFiles) -> bytes:
    """The roots in a party's folder; empty where they cannot be read."""
    try:
        return read_public(tls.ca, CHAIN_BYTES_MAX)
    except CosiloError:
        return b""
