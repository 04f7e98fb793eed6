"""Real gRPC on port 0 with real certificates: who gets through the door, and who does not."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import COORDINATOR_DNS_NAME
from cosilo_common.identity.keys import load_tls_key
from cosilo_common.identity.names import Role, expect_peer
from cosilo_common.identity.tls import (
    ENROLMENT_REQUEST_BYTES_MAX,
    TlsFiles,
    check_tls_files,
    client_options,
    enrolment_channel,
    enrolment_server_credentials,
    federation_channel,
    federation_channel_sync,
    peer_of,
    server_credentials,
    server_options,
)
from tests.identity_parties import FEDERATION, NOW, Founded, found

CALL_TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("federation") / "f")


async def _who(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    try:
        name = expect_peer(peer_of(context.auth_context()), FEDERATION, Role.SITE)
    except CosiloError as error:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
    return name.uri().encode()


async def _anybody(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return request


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials, options: Any = None) -> AsyncIterator[str]:
    server = grpc.aio.server(options=options or server_options())
    handlers: dict[str, Any] = {
        "Who": grpc.unary_unary_rpc_method_handler(_who),
        "Anybody": grpc.unary_unary_rpc_method_handler(_anybody),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Door", handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def call(channel: grpc.aio.Channel, method: str = "Who", request: bytes = b"") -> bytes:
    async with channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/test.Door/{method}")
        reply: bytes = await ask(request, timeout=CALL_TIMEOUT_S)
        return reply


async def refusal(channel: grpc.aio.Channel, method: str = "Anybody") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, method)
    return caught.value.code(), str(caught.value.details())


async def test_a_site_is_known_by_its_certificate(founded: Founded) -> None:
    site = founded.party(Role.SITE, "st-anna")
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        assert await call(federation_channel(address, site)) == b"spiffe://north-star/site/st-anna"


async def test_the_synchronous_channel_passes_too(founded: Founded) -> None:
    site = founded.party(Role.SITE, "st-anna")

    def ask(address: str) -> bytes:
        with federation_channel_sync(address, site) as channel:
            who: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Door/Who")
            return who(b"", timeout=CALL_TIMEOUT_S)

    async with serving(server_credentials(founded.coordinator.tls)) as address:
        assert await asyncio.to_thread(ask, address) == b"spiffe://north-star/site/st-anna"


async def test_a_wrong_role_is_refused_at_the_call(founded: Founded) -> None:
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        code, details = await refusal(federation_channel(address, founded.admin.tls), "Who")
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == ("check peer: spiffe://north-star/admin/ada is not a site; use a certificate of a site")


async def test_no_certificate_is_refused_in_the_handshake(founded: Founded) -> None:
    ca = founded.coordinator.tls.ca.read_bytes()
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        code, _ = await refusal(enrolment_channel(address, ca))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_is_refused_in_the_handshake(founded: Founded, tmp_path: Path) -> None:
    stranger = found(tmp_path / "other").party(Role.SITE, "st-anna")  # the same names under another root
    mixed = TlsFiles(ca=founded.coordinator.tls.ca, certificate=stranger.certificate, key=stranger.key)
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        code, _ = await refusal(federation_channel(address, mixed))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_coordinator_of_another_ca_is_refused_by_the_client(founded: Founded, tmp_path: Path) -> None:
    impostor = found(tmp_path / "other")
    site = founded.party(Role.SITE, "st-anna")
    async with serving(server_credentials(impostor.coordinator.tls)) as address:
        code, details = await refusal(federation_channel(address, site))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details


async def test_an_expired_certificate_is_refused_in_the_handshake(founded: Founded) -> None:
    site = founded.party(Role.SITE, "st-anna", now=NOW - timedelta(days=10), life=timedelta(days=1))
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        code, _ = await refusal(federation_channel(address, site))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_an_expired_coordinator_is_refused_by_the_client(tmp_path: Path) -> None:
    old = found(tmp_path / "old", now=NOW - timedelta(days=10), life=timedelta(days=1))
    site = old.party(Role.SITE, "st-anna")
    async with serving(server_credentials(old.coordinator.tls)) as address:
        code, details = await refusal(federation_channel(address, site))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details


@pytest.mark.parametrize("role", [Role.SITE, Role.ADMIN])
async def test_a_partys_certificate_cannot_serve_as_the_coordinator(founded: Founded, role: Role) -> None:
    rogue = founded.party(role, "rogue")
    site = founded.party(Role.SITE, "st-anna")
    async with serving(server_credentials(rogue)) as address:
        code, details = await refusal(federation_channel(address, site))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "CERTIFICATE_VERIFY_FAILED" in details or "not match" in details
        code, _ = await refusal(enrolment_channel(address, founded.coordinator.tls.ca.read_bytes()))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_plaintext_is_not_spoken(founded: Founded) -> None:
    async with serving(server_credentials(founded.coordinator.tls)) as address:
        code, _ = await refusal(grpc.aio.insecure_channel(address))
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_tls_1_1_is_not_spoken(founded: Founded) -> None:
    def shake(address: str, newest: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(founded.coordinator.tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.set_alpn_protocols(["h2"])
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), timeout=CALL_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=COORDINATOR_DNS_NAME) as secure,
        ):
            return secure.version()

    async with serving(enrolment_server_credentials(founded.coordinator.tls)) as address:
        assert await asyncio.to_thread(shake, address, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(shake, address, ssl.TLSVersion.TLSv1_1)


async def test_the_enrolment_port_takes_a_caller_without_a_certificate(founded: Founded) -> None:
    ca = founded.coordinator.tls.ca.read_bytes()
    async with serving(enrolment_server_credentials(founded.coordinator.tls)) as address:
        assert await call(enrolment_channel(address, ca), "Anybody", b"hello") == b"hello"


async def test_the_enrolment_port_bounds_a_request(founded: Founded) -> None:
    ca = founded.coordinator.tls.ca.read_bytes()
    credentials = enrolment_server_credentials(founded.coordinator.tls)
    async with serving(credentials, server_options(ENROLMENT_REQUEST_BYTES_MAX)) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(enrolment_channel(address, ca), "Anybody", bytes(ENROLMENT_REQUEST_BYTES_MAX + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_site_without_the_coordinators_name_is_refused_even_with_the_right_address(founded: Founded) -> None:
    """The name is what is checked: without the override the same certificate does not pass for 127.0.0.1."""
    options = [option for option in client_options() if option[0] != "grpc.ssl_target_name_override"]
    roots = grpc.ssl_channel_credentials(root_certificates=founded.coordinator.tls.ca.read_bytes())
    async with serving(enrolment_server_credentials(founded.coordinator.tls)) as address:
        code, _ = await refusal(grpc.aio.secure_channel(address, roots, options=options))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_renewed_server_certificate_is_taken_up_without_a_restart(tmp_path: Path) -> None:
    """LESSONS.md, FLIP#593: certificates re-provisioned, and the handshake failed for two days."""
    founded = found(tmp_path / "f", now=NOW - timedelta(days=10), life=timedelta(days=1))
    files = founded.coordinator.tls
    site = founded.party(Role.SITE, "st-anna")
    async with serving(server_credentials(files)) as address:
        code, _ = await refusal(federation_channel(address, site))
        assert code is grpc.StatusCode.UNAVAILABLE
        chain = founded.authority.issue_coordinator_certificate(load_tls_key(files.key).public_key(), NOW)
        fresh = tmp_path / "fresh.crt"
        fresh.write_bytes(chain)
        fresh.replace(files.certificate)
        assert await call(federation_channel(address, site)) == b"spiffe://north-star/site/st-anna"


async def test_unusable_new_files_leave_the_old_certificate_in_service(tmp_path: Path) -> None:
    founded = found(tmp_path / "f")
    files = founded.coordinator.tls
    site = founded.party(Role.SITE, "st-anna")
    async with serving(server_credentials(files)) as address:
        files.certificate.write_bytes(b"half a file")
        assert await call(federation_channel(address, site)) == b"spiffe://north-star/site/st-anna"


def test_key_and_certificate_that_do_not_belong_together_are_named(founded: Founded) -> None:
    one, other = founded.party(Role.SITE, "one"), founded.party(Role.SITE, "other")
    with pytest.raises(CosiloError, match=f"{other.key} is not the key of {one.certificate}"):
        check_tls_files(TlsFiles(ca=one.ca, certificate=one.certificate, key=other.key), NOW)


def test_check_tls_files_says_who_we_are_and_when_that_ends(founded: Founded) -> None:
    site = founded.party(Role.SITE, "st-anna", life=timedelta(days=1))
    peer = check_tls_files(site, NOW)
    assert (peer.name.uri(), peer.not_after) == ("spiffe://north-star/site/st-anna", NOW + timedelta(days=1))


def test_check_tls_files_names_an_expired_certificate_and_what_to_do(founded: Founded) -> None:
    site = founded.party(Role.SITE, "st-anna", life=timedelta(days=1))
    ends = NOW + timedelta(days=1)
    with pytest.raises(CosiloError) as caught:
        check_tls_files(site, NOW + timedelta(days=2))
    assert str(caught.value) == (
        f"check certificate: site st-anna: certificate expired {ends:%Y-%m-%d %H:%M} UTC; ask an admin for an invitation and enrol again"
    )


def test_a_key_that_others_may_read_opens_no_channel(founded: Founded, tmp_path: Path) -> None:
    site = founded.party(Role.SITE, "st-anna")
    loose = tmp_path / "tls.key"
    shutil.copy(site.key, loose)
    loose.chmod(0o640)
    with pytest.raises(CosiloError, match=rf"{loose} may be read by others \(mode 0640\); run chmod 600 {loose}"):
        federation_channel_sync("127.0.0.1:1", TlsFiles(ca=site.ca, certificate=site.certificate, key=loose))
