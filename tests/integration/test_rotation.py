"""A federation changes its CA under a live coordinator: streams and transfers go on, the absent are told, forgeries are refused."""

from __future__ import annotations

import asyncio
import json
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from cosilo_client.obstacles import _shown
from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import check_issued, make_csr, read_chain
from cosilo_common.identity.folder import (
    TRUST_FILE,
    Identity,
)
from cosilo_common.identity.keys import load_tls_key, make_signing_key, make_tls_key, public_bytes
from cosilo_common.identity.members import Member, sign_members
from cosilo_common.identity.names import Role, peer_from_certificate
from cosilo_common.identity.renewal import take_renewed
from cosilo_common.identity.secret_files import replace_file
from cosilo_common.identity.tls import federation_channel
from cosilo_common.identity.trust import SignedTrust, Trust, key_id, pem_of, sign_trust, vouch
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2, site_pb2_grpc
from cosilo_server import rotation
from cosilo_server.authority import CA_FOLDER, load_root, make_root, sign_intermediate
from tests.identity_parties import ADMIN, FEDERATION, NOW, found
from tests.integration.live_federation import SITES, TIMEOUT_S, Live, big_artifact, coordinator, live, site_identity

__all__ = ["live"]


def issuer_of(identity: Identity) -> str:
    return peer_from_certificate(read_leaf(identity)).issuer


def read_leaf(identity: Identity) -> bytes:
    return pem_of(read_chain(identity.tls.certificate.read_bytes())[0]).encode()


def ca_folder(live: Live) -> str:
    return str(live.founded.directory / CA_FOLDER)


async def presented_root(live: Live, roots: bytes) -> bool:
    """Whether a new handshake succeeds for somebody who trusts these roots alone."""
    credentials = grpc.ssl_channel_credentials(
        root_certificates=roots,
        private_key=live.founded.admin.tls.key.read_bytes(),
        certificate_chain=live.founded.admin.tls.certificate.read_bytes(),
    )
    options = [("grpc.ssl_target_name_override", "coordinator.cosilo"), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(live.address, credentials, options=options) as channel:
        try:
            await admin_pb2_grpc.AdminServiceStub(channel).GetMemberList(site_pb2.GetMembersRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


async def test_a_ca_is_rotated_and_no_stream_and_no_transfer_is_dropped(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    old = live.founded.admin.tls.ca.read_bytes()
    for name in SITES:
        live.attend(name)
    await live.until(lambda: all(session.state()[0] for session in live.sessions.values()))
    stood = {name: session._connected_at for name, session in live.sessions.items()}
    artifact, size = await big_artifact(live)
    async with federation_channel(live.address, live.founded.admin.tls) as channel:
        call = site_pb2_grpc.SiteServiceStub(channel).GetArtifact(site_pb2.GetArtifactRequest(digest=artifact))
        got = len((await call.read()).data)
        assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
        await live.until(lambda: not live.waiting())
        assert await presented_root(live, old)  # whoever has not heard of the new root yet is served all the same
        both = live.founded.admin.tls.ca.read_bytes()
        assert read_chain(both)[1:] == read_chain(old)
        assert await live.cosilo("ca", "status", "--json") == 0
        shown = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
        assert (shown["version"], shown["overlap"], shown["waiting"]) == (1, True, [])
        assert await live.cosilo("ca", "retire") == 0
        while (message := await call.read()) is not grpc.aio.EOF:
            got += len(message.data)
    assert got == size
    new = live.founded.admin.tls.ca.read_bytes()
    assert read_chain(new) == read_chain(both)[:1]
    await live.until(lambda: all(identity.tls.ca.read_bytes() == new for identity in live.sites.values()))
    assert {name: session._connected_at for name, session in live.sessions.items()} == stood  # not one stream was set up again
    assert all(session.state()[0] for session in live.sessions.values())
    assert not await presented_root(live, old)
    assert await presented_root(live, new)
    await live.restart()
    await live.until(lambda: all(live.coordinator.conductor.connected(name) for name in SITES))


async def test_both_sides_renew_at_two_thirds_and_what_stands_goes_on(tmp_path: Path) -> None:
    """Certificates of 90 days, 70 days ago: everybody's is in its last third."""
    then, life = NOW - timedelta(days=70), timedelta(days=90)
    founded = found(tmp_path / "f", now=then)
    before = founded.coordinator.tls.certificate.read_bytes()
    running = coordinator(founded, tmp_path / "data")
    await running.start()
    members = founded.members
    draft = members.draft().approve("st-anna", Role.SITE, public_bytes(make_signing_key()))
    running._members.put(sign_members(members, draft, ADMIN, founded.admin_key).canonical())
    site = site_identity(founded, "st-anna", members, running.endpoints["federation"], then, life)
    old = read_leaf(site)
    live = Live(founded, tmp_path / "data", running, {"st-anna": site})
    try:
        session = live.attend("st-anna")
        await live.until(lambda: session.state()[0])
        stood = session._connected_at
        await live.until(lambda: read_leaf(site) != old)  # renewed by itself
        newest = peer_from_certificate(read_leaf(site))
        assert newest.not_after > NOW + timedelta(days=89)
        await live.until(
            lambda: running._certificates.of(shown_as("st-anna")) is not None and expiry_known(live) == newest.not_after.timestamp()
        )
        await live.until(lambda: founded.coordinator.tls.certificate.read_bytes() != before)
        first = await presented(live)
        key = load_tls_key(founded.coordinator.tls.key).public_key()
        take_renewed(
            founded.coordinator,
            founded.authority.issue_coordinator_certificate(key, NOW + timedelta(minutes=1)),
            NOW + timedelta(minutes=2),
        )
        second = await presented(live)
        assert second != first  # a new handshake sees the new certificate
        assert second == read_chain(founded.coordinator.tls.certificate.read_bytes())[0].public_bytes(Encoding.DER)
        assert (session.state()[0], session._connected_at) == (True, stood)  # and the stream stands
    finally:
        await live.close()


def shown_as(site: str) -> Member:
    return Member(name=site, role=Role.SITE, key=bytes(32), added=1)


def expiry_known(live: Live) -> float:
    shown = live.coordinator._certificates.of(shown_as("st-anna"))
    return shown.expires_at if shown is not None else 0.0


async def presented(live: Live) -> bytes:
    """The leaf that a new handshake is shown, DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return await _shown(live.address, context, None)


def forged(live: Live, **changes: Any) -> SignedTrust:
    """A trust document by whoever holds the coordinator's folder: its own root, signed by keys of its own."""
    root_key = make_tls_key()
    new = make_root(FEDERATION, root_key, NOW, 1)
    old, _ = load_root(live.founded.directory / CA_FOLDER)
    trust = Trust(version=1, federation=FEDERATION, roots=(pem_of(new), pem_of(old)), issuers=("00" * 20,))
    voucher = vouch(FEDERATION, old, root_key, new)  # not by the old root's key, which lies in a safe
    key = make_signing_key()
    signed = sign_trust(trust, (voucher,), ADMIN, key, {ADMIN: public_bytes(key)})
    return signed.model_copy(update=changes)


async def test_a_forged_trust_document_is_refused_by_coordinator_and_site(live: Live) -> None:
    site = live.sites["st-anna"]
    before = site.tls.ca.read_bytes()
    bad_admin = forged(live)
    bad_voucher = forged(live)
    bad_voucher = sign_trust(bad_voucher.trust, bad_voucher.vouchers, ADMIN, live.founded.admin_key, live.founded.members.admins())
    for document, reason in ((bad_admin, "ada's signature does not hold"), (bad_voucher, "not vouched for by a root that is trusted here")):
        with pytest.raises(CosiloError, match=reason):
            site.take_trust(document.canonical())
        async with federation_channel(live.address, live.founded.admin.tls) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                request = admin_pb2.PutAuthorityRequest(trust=document.canonical())
                await admin_pb2_grpc.AdminServiceStub(channel).PutAuthority(request, timeout=TIMEOUT_S)
            assert reason in (refused.value.details() or "")
    assert site.tls.ca.read_bytes() == before
    assert not (site.folder / TRUST_FILE).exists()
    assert live.coordinator._rotation.version() == 0


async def test_an_older_trust_document_is_refused_and_none_after_one(live: Live) -> None:
    site = live.sites["st-anna"]
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    first = live.coordinator._rotation.data()
    site.take_members(live.coordinator._members.data())
    assert site.take_trust(first) == live.founded.admin.trust()
    assert await live.cosilo("ca", "retire", "--force") == 0
    site.take_trust(live.coordinator._rotation.data())
    narrow = site.tls.ca.read_bytes()
    for older in (first, b""):
        with pytest.raises(CosiloError, match="version 2 was seen before"):
            site.take_trust(older)
    assert site.tls.ca.read_bytes() == narrow


async def test_the_end_of_an_overlap_waits_for_who_is_away_and_forced_cuts_it_off_with_words(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    live.attend("st-anna")
    away = live.attend("st-beda")
    await live.until(lambda: all(session.state()[0] for session in live.sessions.values()))
    gone = live.running.pop()  # st-beda's machine is off during the whole overlap
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    await live.until(lambda: live.waiting() == {"st-beda"})
    assert await live.cosilo("ca", "retire") == 1
    assert "st-beda would be cut off" in capsys.readouterr().err
    assert await live.cosilo("ca", "retire", "--force") == 0
    assert "cut off, until they enrol again with new invitations: st-beda" in capsys.readouterr().err
    live.running.append(asyncio.create_task(away.run()))
    await live.until(lambda: "enrol again with a new invitation" in away.state()[1])
    assert "of a CA that this site does not trust (issuer O=north-star,CN=enrolment 1)" in away.state()[1]
    assert live.sessions["st-anna"].state()[0]


async def test_a_site_that_went_away_before_it_had_renewed_is_told_so(live: Live) -> None:
    site = live.sites["st-beda"]
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    site.take_members(live.coordinator._members.data())
    site.take_trust(live.coordinator._rotation.data())  # and here its machine was switched off
    assert await live.cosilo("ca", "retire", "--force") == 0
    session = live.attend("st-beda")
    await live.until(lambda: "if that was retired meanwhile, enrol again" in session.state()[1])


async def test_a_stream_of_a_retired_ca_is_cut_at_once(live: Live) -> None:
    """A party that keeps its stream and never renews: as a thief of a key of the old CA would."""
    async with federation_channel(live.address, live.sites["st-beda"].tls) as channel:
        call = site_pb2_grpc.SiteServiceStub(channel).Attend()
        await call.write(site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=1, software="hand")))
        await call.read()
        assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
        assert await live.cosilo("ca", "retire", "--force") == 0
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            while await asyncio.wait_for(call.read(), TIMEOUT_S) is not grpc.aio.EOF:
                pass
        assert cut.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "retired while it was away: enrol again" in (cut.value.details() or "")


async def test_an_intermediate_alone_is_renewed_under_the_same_root(live: Live) -> None:
    session = live.attend("st-anna")
    await live.until(lambda: session.state()[0])
    stood, before = session._connected_at, issuer_of(live.sites["st-anna"])
    assert await live.cosilo("ca", "renew", ca_folder(live)) == 0
    await live.until(lambda: live.waiting() == {"st-beda"})
    assert issuer_of(live.sites["st-anna"]) == key_id(live.coordinator._authority.intermediate) != before
    assert len(read_chain(live.sites["st-anna"].tls.ca.read_bytes())) == 1
    assert await live.cosilo("ca", "retire", "--force") == 0
    async with federation_channel(live.address, live.sites["st-beda"].tls) as channel:  # its root is trusted, its issuer is not
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site_pb2_grpc.SiteServiceStub(channel).GetMembers(site_pb2.GetMembersRequest(), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert session._connected_at == stood


async def test_a_thief_of_the_old_intermediate_cannot_name_the_new_one_as_its_issuer(live: Live) -> None:
    """Which intermediate signed is read from the leaf, where its signer writes what it likes: TLS itself must find that it lies."""
    stolen = live.founded.authority._issuer  # as it was before; its root stays
    site = live.sites["st-beda"]
    assert await live.cosilo("ca", "renew", ca_folder(live)) == 0
    assert await live.cosilo("ca", "retire", "--force") == 0
    honest = read_chain(site.tls.certificate.read_bytes())[0]
    newest = live.coordinator._authority.intermediate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(honest.subject)
        .issuer_name(honest.issuer)
        .public_key(load_tls_key(site.tls.key).public_key())
    )
    builder = builder.serial_number(7).not_valid_before(honest.not_valid_before_utc).not_valid_after(honest.not_valid_after_utc)
    for extension in honest.extensions:
        lie = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(newest)
        value = lie if isinstance(extension.value, x509.AuthorityKeyIdentifier) else extension.value
        builder = builder.add_extension(value, extension.critical)
    leaf = builder.sign(stolen.key, hashes.SHA256())
    replace_file(site.tls.certificate, (pem_of(leaf) + pem_of(stolen.certificate)).encode())
    assert issuer_of(site) == key_id(live.coordinator._authority.intermediate), "it says so"
    async with federation_channel(live.address, site.tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site_pb2_grpc.SiteServiceStub(channel).GetMembers(site_pb2.GetMembersRequest(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, "the handshake fails"


async def test_an_invitation_from_before_the_rotation_still_enrols_in_the_overlap(live: Live) -> None:
    site = live.sites["st-anna"]  # its folder trusts the old root alone, as the invitation said
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    request = make_csr(load_tls_key(site.tls.key), site.peer)
    chain = live.coordinator._authority.issue_site_certificate(request, "st-anna", NOW + timedelta(minutes=1))
    replace_file(site.tls.certificate, chain)
    check_issued(chain, site.tls.ca.read_bytes(), load_tls_key(site.tls.key), site.peer, NOW + timedelta(minutes=2))
    session = live.attend("st-anna")
    await live.until(lambda: session.state()[0] and site.tls.certificate.read_bytes() != chain)  # takes the document, renews at once
    newest = live.founded.admin.trust()
    assert newest is not None
    check_issued(
        site.tls.certificate.read_bytes(), newest.trust.roots[0].encode(), load_tls_key(site.tls.key), site.peer, NOW + timedelta(minutes=2)
    )


async def test_another_admin_signs_again_and_the_version_grows(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert await live.cosilo("ca", "sign") == 1
    assert "nothing is left to do" in capsys.readouterr().err
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    assert await live.cosilo("ca", "sign") == 0
    assert live.coordinator._rotation.version() == 2
    site = live.sites["st-anna"]  # which never saw version 1, and follows the old root's word in version 2
    site.take_members(live.coordinator._members.data())
    assert site.take_trust(live.coordinator._rotation.data()) is not None
    assert len(read_chain(site.tls.ca.read_bytes())) == 2


class Killed(BaseException):
    """As SIGKILL would: nothing after it runs."""


@pytest.mark.parametrize("command", ["rotate", "retire"])
@pytest.mark.parametrize("writes", range(1, 8))
async def test_a_coordinator_killed_at_any_write_of_a_change_finishes_it(
    live: Live, command: str, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "retire":
        assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    left = writes

    def dying(path: Path, data: bytes, mode: int = 0o644) -> None:
        nonlocal left
        if path.parent == live.founded.coordinator.folder:
            left -= 1
            if left == 0:
                raise Killed
        replace_file(path, data, mode)

    old, version = live.coordinator, live.coordinator._rotation.version()
    with monkeypatch.context() as patch:
        for module in (rotation, "cosilo_common.identity.folder", "cosilo_common.identity.renewal"):
            target = module if isinstance(module, str) else module.__name__
            patch.setattr(f"{target}.replace_file", dying)
        try:
            change(live, command)
        except Killed:
            assert left == 0
    await old.stop()
    live.coordinator = coordinator(live.founded, live.data, live.address)
    await live.coordinator.start()
    change(live, command)  # the admin's command, again: done already, or done now
    assert live.coordinator._rotation.version() == version + 1
    roots = read_chain(live.founded.coordinator.tls.ca.read_bytes())
    assert len(roots) == (2 if command == "rotate" else 1)
    assert not (live.founded.coordinator.folder / rotation.CHANGE_FILE).exists()
    live.founded.admin.take_trust(live.coordinator._rotation.data())
    assert await presented_root(live, pem_of(roots[-1]).encode())


def change(live: Live, command: str) -> None:
    """What `cosilo ca rotate` or `retire` sends, sent by hand and into this process."""
    state, admin = live.coordinator._rotation, live.founded.admin
    if (live.data / f"{command}.sent").exists():
        trust, intermediate, cross = (live.data / f"{command}.{part}" for part in ("trust", "intermediate", "cross"))
        state.put(trust.read_bytes(), intermediate.read_bytes(), cross.read_bytes(), NOW)
        return
    ca = live.founded.directory / CA_FOLDER
    old, old_key = load_root(ca)
    vouchers: tuple[Any, ...] = ()
    parts = [b"", b""]
    if command == "rotate":
        from cosilo_common.identity.certificates import read_csr

        key = make_tls_key()
        new = make_root(FEDERATION, key, NOW, 1)
        public = read_csr(state.request(), live.founded.coordinator.peer)
        intermediate = sign_intermediate(FEDERATION, public, new, key, NOW, 1)
        before = key_id(live.coordinator._authority.intermediate)
        trust = Trust(version=1, federation=FEDERATION, roots=(pem_of(new), pem_of(old)), issuers=(key_id(intermediate), before))
        vouchers = (vouch(FEDERATION, old, old_key, new),)
        parts = [pem_of(intermediate).encode(), pem_of(sign_intermediate(FEDERATION, public, old, old_key, NOW, 1)).encode()]
    else:
        known = admin.trust()
        assert known is not None
        trust = known.trust.model_copy(
            update={"version": known.version + 1, "roots": known.trust.roots[:1], "issuers": known.trust.issuers[:1]}
        )
    signed = sign_trust(trust, vouchers, ADMIN, live.founded.admin_key, live.founded.members.admins()).canonical()
    for part, data in (("trust", signed), ("intermediate", parts[0]), ("cross", parts[1]), ("sent", b"")):
        (live.data / f"{command}.{part}").write_bytes(data)
    state.put(signed, *parts, NOW)


async def test_expiry_is_in_the_metrics_thirty_days_ahead_and_after_a_restart(live: Live) -> None:
    session = live.attend("st-anna")
    await live.until(lambda: session.state()[0])
    assert await live.cosilo("ca", "rotate", ca_folder(live)) == 0
    await live.until(lambda: live.waiting() == {"st-beda"})
    for _ in range(2):
        value = live.coordinator.metrics.registry.get_sample_value
        found_at = {
            subject: value("cosilo_certificate_expiry_timestamp_seconds", {"subject": subject})
            for subject in ("coordinator", "intermediate", "root", "root/old", "site/st-anna", "admin/ada", "site/st-beda")
        }
        assert found_at["site/st-beda"] is None  # never seen
        seen = {subject: at for subject, at in found_at.items() if at is not None}
        assert len(seen) == 6
        assert all(at > (NOW + timedelta(days=30)).timestamp() for at in seen.values())
        for task in live.running:  # from here on the coordinator knows what its store has
            task.cancel()
        await live.restart()
    metrics = session._metrics.registry.get_sample_value
    ca = read_chain(live.sites["st-anna"].tls.ca.read_bytes())[0]
    leaf = read_chain(live.sites["st-anna"].tls.certificate.read_bytes())[0]
    assert metrics("cosilo_ca_expiry_timestamp_seconds") == ca.not_valid_after_utc.timestamp()
    assert metrics("cosilo_certificate_expiry_timestamp_seconds") == leaf.not_valid_after_utc.timestamp()
