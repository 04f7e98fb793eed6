"""What stands between a site and its coordinator, each with a real one: a firewall that reads TLS, a proxy that refuses or wants a
password; and the words for it in enrol, check and serve."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import CoordinatorTable, NetworkTable, SiteConfig, load_site_config
from cosilo_client.coordinator import Unreachable
from cosilo_client.data.config import DataConfig
from cosilo_client.errands import enrol_site
from cosilo_client.metrics import SiteMetrics
from cosilo_client.preflight import Outcome, preflight
from cosilo_client.session import Session
from cosilo_client.transport import Transport
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import FEDERATION_FILE, MEMBERS_FILE, Identity, Membership, load_identity, membership_json
from cosilo_common.identity.invitation import make_invitation, write_invitation
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.proxy import Proxy, parse_proxy
from cosilo_common.identity.secret_files import write_public, write_secret
from cosilo_common.identity.tls import client_options, server_credentials, server_options
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found

FAST = NetworkTable(timeout_s=5.0, stall_s=5.0, backoff_min_s=0.01, backoff_max_s=0.05)
PASSWORD = "p@ss:word/%41 with everything"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Founded:
    return found(tmp_path_factory.mktemp("obstacles") / "f")


@asynccontextmanager
async def listening(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on loopback; its address."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def inspecting_firewall(organisation: str = "St Anna Network Security") -> AsyncIterator[str]:
    """Answers every TLS connection itself, with a certificate of its own CA, as firewalls that read along do."""
    ca = trustme.CA(organization_name=organisation)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("coordinator.cosilo").configure_cert(context)
    context.set_alpn_protocols(["h2"])

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with listening(hang_up, context) as address:
        yield address


class PlainProxy:
    """CONNECT to one address, whatever name is asked for. refuse: the status line of every answer; wanted: the header it asks for."""

    def __init__(self, target: str, refuse: str = "", wanted: str = "") -> None:
        self._target, self._refuse, self._wanted = target, refuse, wanted
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        status = self._refuse or ("" if not self._wanted or self._wanted in head else "407 Proxy Authentication Required")
        if status:
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            writer.close()
            return
        host, _, port = self._target.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_pump(reader, back), _pump(there, writer), return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


class Members(site_pb2_grpc.SiteServiceServicer):
    """Answers one question."""

    async def GetMembers(self, request: site_pb2.GetMembersRequest, context: Any) -> site_pb2.GetMembersResponse:
        return site_pb2.GetMembersResponse(members=b"members")


@asynccontextmanager
async def serving(founded: Founded) -> AsyncIterator[str]:
    server = grpc.aio.server(options=server_options())
    site_pb2_grpc.add_SiteServiceServicer_to_server(Members(), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(founded.coordinator.tls))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def site_of(founded: Founded, folder: Path, address: str) -> SiteConfig:
    """An enrolled site's configuration, its coordinator at this address."""
    tls = founded.party(Role.SITE, "st-anna")
    membership = Membership(
        federation=FEDERATION,
        role=Role.SITE,
        name="st-anna",
        address=address,
        enrolment_address=address,
        anchor=founded.members.anchor(),
    )
    write_public(tls.certificate.parent / FEDERATION_FILE, membership_json(membership))
    write_public(tls.certificate.parent / MEMBERS_FILE, founded.members.canonical())
    write_secret(tls.certificate.parent / "signing.key", (founded.admin.folder / "signing.key").read_bytes())
    (folder / "state").mkdir()
    tls.certificate.parent.rename(folder / "state" / "identity")
    return SiteConfig(state=str(folder / "state"), data=DataConfig(kind="digits", path=None), network=FAST)  # type: ignore[arg-type]  # as TOML has it


def session_of(identity: Identity, folder: Path, proxy: Proxy | None = None) -> Session:
    cache = ArtifactCache(folder / "artifacts", 1 << 30)
    return Session(identity, cache, FAST, SiteMetrics(), lambda _: None, lambda _: None, random.Random(1), proxy)


async def reason_of(session: Session, wanted: str) -> str:
    """What the daemon says of itself (/readyz, `cosilo-site status`, the log) once it has these words."""
    running = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(20):
            while wanted not in session.state()[1]:
                await asyncio.sleep(0.01)
        return session.state()[1]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


INSPECTED = "somebody on the way to {address} presents a certificate of another CA (issuer "
ISSUER = "O=St Anna Network Security): a firewall that reads TLS connections"


async def test_a_firewall_that_reads_tls_is_named_to_the_daemon_and_in_a_check(founded: Founded, tmp_path: Path) -> None:
    async with inspecting_firewall() as address:
        config = site_of(founded, tmp_path, address)
        said = await reason_of(session_of(load_identity(config.state / "identity"), tmp_path), "somebody on the way")
        assert INSPECTED.format(address=address) in said
        assert ISSUER in said
        assert f"exempt {address} from TLS inspection" in said
        finding = next(found for found in await preflight(config) if found.what == "coordinator")
        assert finding.outcome is Outcome.FAILED
        assert finding.text.startswith(INSPECTED.format(address=address))
        assert finding.hint == f"ask the network's people to exempt {address} from TLS inspection; nothing was sent through it"


async def test_a_firewall_that_reads_tls_is_named_at_enrolment(founded: Founded, tmp_path: Path) -> None:
    async with inspecting_firewall("Another \x1b[31mName") as address:
        members, key = founded.members, founded.admin_key
        ca = founded.admin.tls.ca.read_bytes()
        peer = PeerName(FEDERATION, Role.SITE, "st-anna")
        invitation = make_invitation(peer, ADMIN, key, members, ca, address, address, int(NOW.timestamp()) + 3600)
        write_invitation(tmp_path / "invitation", invitation)
        config = SiteConfig(state=str(tmp_path / "state"), data=DataConfig(kind="digits", path=None))  # type: ignore[arg-type]  # as TOML has it
        with pytest.raises(Unreachable) as failed:
            await asyncio.to_thread(enrol_site, config, tmp_path / "invitation")
        assert f"somebody on the way to {address}" in failed.value.subject
        assert "\x1b" not in str(failed.value)
        assert not (tmp_path / "state" / "identity").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("403 Forbidden", "the proxy {proxy} does not allow a connection to coordinator.hospital.test:7443 (403)"),
        ("407 Proxy Authentication Required", "the proxy {proxy} wants a name and a password for coordinator.hospital.test:7443 (407)"),
        ("502 Bad Gateway", "the proxy {proxy} answered 502 to CONNECT coordinator.hospital.test:7443"),
    ],
)
async def test_a_proxy_that_refuses_is_named_with_what_to_do(founded: Founded, tmp_path: Path, status: str, words: str) -> None:
    async with listening(PlainProxy("", refuse=status).serve) as address:
        config = site_of(founded, tmp_path, "coordinator.hospital.test:7443")
        said = await reason_of(session_of(load_identity(config.state / "identity"), tmp_path, Proxy(address)), "the proxy")
        assert words.format(proxy=address) in said


async def test_a_proxy_that_is_not_there_is_named(founded: Founded, tmp_path: Path) -> None:
    config = site_of(founded, tmp_path, "coordinator.hospital.test:7443")
    said = await reason_of(session_of(load_identity(config.state / "identity"), tmp_path, Proxy("127.0.0.1:1")), "the proxy")
    assert "the proxy 127.0.0.1:1 does not lead to coordinator.hospital.test:7443" in said


async def test_a_firewall_behind_a_proxy_is_found_through_the_proxy(founded: Founded, tmp_path: Path) -> None:
    async with inspecting_firewall() as inspected, listening(PlainProxy(inspected).serve) as address:
        config = site_of(founded, tmp_path, "coordinator.hospital.test:7443")
        said = await reason_of(session_of(load_identity(config.state / "identity"), tmp_path, Proxy(address)), "somebody on the way")
        assert INSPECTED.format(address="coordinator.hospital.test:7443") in said


async def test_a_password_of_any_characters_reaches_the_proxy_and_nobody_else(
    founded: Founded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_secret(tmp_path / "credentials", f"st-anna:{PASSWORD}\n".encode())
    encoded = base64.b64encode(f"st-anna:{PASSWORD}".encode()).decode()
    async with serving(founded) as coordinator:
        proxy = PlainProxy(coordinator, wanted=f"Basic {encoded}")
        async with listening(proxy.serve) as address:
            way = Proxy(address, tmp_path / "credentials")
            transport = Transport.open(
                "coordinator.hospital.test:7443", founded.party(Role.SITE, "st-anna"), timeout_s=10, stall_s=5, proxy=way
            )
            assert await transport.members() == b"members"
            await transport.close()
            assert proxy.asked[0].startswith("CONNECT coordinator.hospital.test:7443 HTTP/1.")
    for text in (repr(way), str(way), caplog.text):
        assert PASSWORD not in text
        assert encoded not in text


async def test_the_environment_s_proxy_is_taken_unless_the_configuration_says_otherwise(
    founded: Founded, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(founded) as coordinator:
        proxy = PlainProxy(coordinator)
        async with listening(proxy.serve) as address:
            monkeypatch.setenv("https_proxy", f"http://{address}")
            tls = founded.party(Role.SITE, "st-anna")
            for way, times in ((None, 1), (CoordinatorTable(proxy="").route(), 1)):
                transport = Transport.open(coordinator, tls, timeout_s=10, stall_s=5, proxy=way)
                assert await transport.members() == b"members"
                await transport.close()
                assert len(proxy.asked) == times


def test_credentials_that_others_can_read_are_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "credentials", b"user:secret")
    (tmp_path / "credentials").chmod(0o644)
    with pytest.raises(CosiloError, match="may be read by others") as refused:
        client_options(Proxy("127.0.0.1:1", tmp_path / "credentials"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"nocolon", b"user:\n", b"user:pass\r\nX-Evil: 1", b"\xff:x"])
def test_credentials_that_are_no_user_and_password_are_refused_unseen(tmp_path: Path, content: bytes) -> None:
    write_secret(tmp_path / "credentials", content)
    with pytest.raises(CosiloError, match="is not one line of user:password") as refused:
        Proxy("127.0.0.1:1", tmp_path / "credentials").header()
    assert "Evil" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["https://proxy:3128", "proxy:3128", "http://user:secret@proxy:3128", "http://proxy", "http://proxy:3128/x"]
)
def test_a_proxy_is_written_as_http_host_port_and_never_with_a_password(tmp_path: Path, text: str) -> None:
    with pytest.raises(CosiloError):
        parse_proxy(text)
    path = tmp_path / "site.toml"
    path.write_text(f'state = "state"\n[data]\nkind = "digits"\n[coordinator]\nproxy = "{text}"\n')
    with pytest.raises(CosiloError, match=r"coordinator\.proxy|coordinator") as refused:
        load_site_config(path)
    assert "secret" not in str(refused.value)


def test_a_proxy_and_its_credentials_are_read_from_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        'state = "state"\n[data]\nkind = "digits"\n[coordinator]\nproxy = "http://proxy:3128"\nproxy_credentials = "secret/proxy"\n'
    )
    assert load_site_config(path).coordinator.route() == Proxy("proxy:3128", tmp_path / "secret" / "proxy")
