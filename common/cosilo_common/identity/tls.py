"""gRPC credentials, channels and options: the one place in Cosilo that makes them.

Every connection of the federation is mutual TLS against the federation's own root; the enrolment port alone takes
callers without a certificate.
A client asks for the name `coordinator.cosilo` at whatever address it dials, so any address works and a site's
certificate cannot pass as the coordinator's. Protocol versions and ciphers are gRPC's (TLS 1.2 and later). Must not
know services or what travels.

Certificates change under a running daemon (LESSONS.md, the zombie of FLIP#593). A server looks at its files at every
handshake. A client's channel goes on presenting what it was made with, so a session makes a new channel for every
connection it sets up, with `federation_channel`, which reads the files again; and when connecting fails,
`check_tls_files` says what is wrong with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import (
    CHAIN_BYTES_MAX,
    COORDINATOR_DNS_NAME,
    certified_key,
    check_chain,
    read_chain,
)
from cosilo_common.identity.keys import KEY_FILE_BYTES_MAX
from cosilo_common.identity.names import Peer, peer_from_certificate
from cosilo_common.identity.proxy import Proxy
from cosilo_common.identity.secret_files import read_public, read_secret

MESSAGE_BYTES_MAX = 32 << 20  # the largest message is a manifest (16 MiB) or a round's shares (400 sites); bulk goes in chunks of 1 MiB
ENROLMENT_REQUEST_BYTES_MAX = 16 * 1024  # anybody may call that port: a request is two keys, two signatures and a CSR of at most 4 KiB
KEEPALIVE_MS = 12_000  # of silence, then a ping; also far below what firewalls and NAT forget idle connections after
KEEPALIVE_TIMEOUT_MS = 15_000  # for its answer: a half-open link shows within 30 s of silence; at 1 MB/s a ping waits behind 8 s of buffers
PING_INTERVAL_MIN_MS = 5_000  # the server's patience: below half of KEEPALIVE_MS, so that no honest client is told "too many pings"
HANDSHAKE_TIMEOUT_MS = 20_000  # a handshake is two round trips; gRPC's own limit, 120 s, keeps a dead peer's socket two minutes
METADATA_BYTES_MAX = 8 << 10  # headers of one call; Cosilo sends none of its own, and a status' words are cut at 1000 characters
STREAMS_PER_CONNECTION_MAX = 64  # calls open on one connection: a daemon has a handful, and the rest wait at the caller
CONNECTIONS_MAX = 4096  # four each for the 1000 sites that a manifest may name; one more is hung up on before its handshake
ENROLMENT_CONNECTIONS_MAX = 64  # enrolling takes a second; this many at once are a flood
ENROLMENT_CONNECTION_LIFE_MS = 60_000  # an enrolment is one call: whoever stays longer holds one of those for nothing
CONNECTION_IDLE_MS = 300_000  # a site's stream is always open; a connection without a call for so long serves nobody
RECONNECT_FIRST_MS = 1_000
RECONNECT_MAX_MS = 30_000  # gRPC's 120 s would keep a site away for two minutes after a coordinator's restart

# Bytes in flight on one stream before its receiver takes them. Fixed, because gRPC's own growing window let a receiver
# of a 400 MB stream grow by 90 to 120 MB where this takes 13, at no loss of speed over loopback; 4 MiB carry 40 MB/s
# over a link with a round trip of 100 ms.
RECEIVE_WINDOW_BYTES = 4 << 20

Options = list[tuple[str, int | str]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a party's TLS files are: the CA's roots, its own chain (leaf, then intermediates), its key (mode 0600). All
    PEM."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, repr=False)
class _Loaded:
    ca: bytes
    chain: bytes
    key: bytes


def federation_channel(address: str, tls: TlsFiles, proxy: Proxy | None = None) -> grpc.aio.Channel:
    """A channel to the coordinator's federation port, with this party's certificate. Reads the files now; connects when
    first used.

    address: `host:port`, `[v6]:port`; proxy: instead of what the environment says. Raises CosiloError where a file is
    missing, readable by others, or key and certificate do not match.
    """
    return grpc.aio.secure_channel(address, _client_credentials(_load(tls)), options=client_options(proxy))


def federation_channel_sync(address: str, tls: TlsFiles) -> grpc.Channel:
    """`federation_channel` for programs without an event loop."""
    return grpc.secure_channel(address, _client_credentials(_load(tls)), options=client_options())


def enrolment_channel(address: str, ca_pem: bytes, proxy: Proxy | None = None) -> grpc.aio.Channel:
    """A channel to the enrolment port. The caller has no certificate yet; the coordinator is checked against the
    invitation's CA all the same."""
    read_chain(ca_pem)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=ca_pem), options=client_options(proxy))


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of the federation port: callers without a certificate by this CA are refused in the handshake. Files
    that change are reloaded."""
    return _reloading_credentials(tls, ask_client=True)


def enrolment_server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of the enrolment port: the server shows its certificate and asks for none. Files that change are
    reloaded."""
    return _reloading_credentials(tls, ask_client=False)


def client_options(proxy: Proxy | None = None) -> Options:
    """Channel options of every client."""
    return [
        *(proxy.channel_options() if proxy is not None else ()),
        ("grpc.ssl_target_name_override", COORDINATOR_DNS_NAME),
        *_message_limits(MESSAGE_BYTES_MAX),
        *_receive_window(),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        (
            "grpc.http2.ping_timeout_ms",
            KEEPALIVE_TIMEOUT_MS,
        ),  # what gRPC 1.85 goes by: 60 s unless it is set, whatever keepalive says
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # 0 is no limit: a site that trains for an hour sends nothing else
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_FIRST_MS),
        (
            "grpc.min_reconnect_backoff_ms",
            HANDSHAKE_TIMEOUT_MS,
        ),  # despite its name, gRPC's time limit for one attempt to connect
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel must not inherit a connection made with old certificates
    ]


def enrolment_server_options() -> Options:
    """Options of the enrolment port, where anybody may call: small requests, few connections, and none that stays."""
    return [
        *server_options(ENROLMENT_REQUEST_BYTES_MAX, ENROLMENT_CONNECTIONS_MAX),
        ("grpc.max_connection_age_ms", ENROLMENT_CONNECTION_LIFE_MS),
        ("grpc.max_connection_age_grace_ms", HANDSHAKE_TIMEOUT_MS),
    ]


def server_options(message_bytes_max: int = MESSAGE_BYTES_MAX, connections_max: int = CONNECTIONS_MAX) -> Options:
    """Options of the federation port; `enrolment_server_options` are the other's."""
    return [
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),  # without it, gRPC refuses only some calls between the two
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: masks do not compress, and a small message must not become a large one
        *_message_limits(message_bytes_max, send_bytes_max=MESSAGE_BYTES_MAX),
        *_receive_window(),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.so_reuseport", 0),  # a second coordinator on the port is an error, not a rival for its connections
    ]


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """Who calls, from a servicer context's `auth_context()`. Raises CosiloError where the connection carries no party's
    certificate."""
    certificates = list(auth_context.get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise CosiloError("check peer", "the caller has no certificate", "enrol first")
    return peer_from_certificate(certificates[0])


def check_tls_files(tls: TlsFiles, now: datetime) -> Peer:
    """Whom the files say we are, once they are found to be usable at `now` (aware).

    Raises CosiloError where one is missing, readable by others or does not match, where the certificate has expired, or
    where it is not by this CA.
    """
    loaded = _load(tls)
    peer = peer_from_certificate(_leaf_pem(loaded.chain))
    check_chain(loaded.chain, loaded.ca, peer.name, now)
    return peer


def _reloading_credentials(tls: TlsFiles, ask_client: bool) -> grpc.ServerCredentials:
    fetch = _Reloader(tls)  # looks at the files before they are read, so that a change in between is seen
    first = _load(tls)
    # gRPC takes None for "no change" (its documentation), which its type stubs leave out
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", lambda: fetch(ask_client))
    return grpc.dynamic_ssl_server_credentials(_configuration(first, ask_client), fetcher, ask_client)


class _Reloader:
    """Called by gRPC at each handshake: a new configuration when the files changed, nothing when they did not or cannot
    be used."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._seen = _state_of(tls)

    def __call__(self, ask_client: bool) -> grpc.ServerCertificateConfiguration | None:
        state = _state_of(self._tls)
        if state == self._seen:
            return None
        self._seen = state
        try:
            loaded = _load(self._tls)
        except CosiloError as error:  # a renewal half done: the old certificate serves until the next handshake looks again
            _log.warning("certificate files changed but cannot be used yet: %s", error)
            return None
        _log.info("certificate reloaded from %s", self._tls.certificate)
        return _configuration(loaded, ask_client)


def _state_of(tls: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    state = []
    for path in (tls.ca, tls.certificate, tls.key):
        try:
            status = path.stat()
        except OSError:
            state.append((0, 0, 0))
        else:
            state.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(state)


def _configuration(loaded: _Loaded, ask_client: bool) -> grpc.ServerCertificateConfiguration:
    roots = loaded.ca if ask_client else None
    return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.chain)], root_certificates=roots)


def _client_credentials(loaded: _Loaded) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(root_certificates=loaded.ca, private_key=loaded.key, certificate_chain=loaded.chain)


def _load(tls: TlsFiles) -> _Loaded:
    ca = read_public(tls.ca, CHAIN_BYTES_MAX)
    chain = read_public(tls.certificate, CHAIN_BYTES_MAX)
    key = read_secret(tls.key, KEY_FILE_BYTES_MAX)
    read_chain(ca)
    leaf = read_chain(chain)[0]
    if _public_half(tls.key, key) != certified_key(leaf):
        raise CosiloError("read TLS files", f"{tls.key} is not the key of {tls.certificate}", "put the pair that belongs together")
    return _Loaded(ca=ca, chain=chain, key=key)


def _public_half(path: Path, key_pem: bytes) -> bytes:
    try:
        key: Any = load_pem_private_key(key_pem, password=None)
    except TypeError:
        raise CosiloError("read TLS files", f"{path} is encrypted", "decrypt it: a daemon starts without anybody to type") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CosiloError("read TLS files", f"{path} is not a private key in PEM", "check that it is the right file") from None
    public: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public


def _leaf_pem(chain_pem: bytes) -> bytes:
    return read_chain(chain_pem)[0].public_bytes(Encoding.PEM)


def _receive_window() -> Options:
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", RECEIVE_WINDOW_BYTES)]


def _message_limits(receive_bytes_max: int, send_bytes_max: int = MESSAGE_BYTES_MAX) -> Options:
    return [("grpc.max_receive_message_length", receive_bytes_max), ("grpc.max_send_message_length", send_bytes_max)]
