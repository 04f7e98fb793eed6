"""Certificates renew at two thirds of their life: a site's and an admin's over the wire, the coordinator's by itself, and no stream is dropped."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cosilo_common.errors import CosiloError
from cosilo_common.identity.certificates import make_csr, read_chain
from cosilo_common.identity.folder import Identity
from cosilo_common.identity.keys import load_tls_key, make_tls_key
from cosilo_common.identity.names import PeerName, Role, peer_from_certificate
from cosilo_common.identity.renewal import renewal_due, renewal_request, take_renewed
from cosilo_common.identity.tls import federation_channel
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from cosilo_server.authority import LEAF_LIFE, Authority
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from tests.identity_parties import ADMIN, FEDERATION, NOW, Founded, found

TIMEOUT_S = 30.0


@pytest.fixture
def old(tmp_path: Path) -> Founded:
    """A federation founded 70 days ago: every certificate of 90 days is in its last third."""
    return found(tmp_path / "f", now=NOW - timedelta(days=70))


def ends(identity: Identity) -> float:
    return peer_from_certificate(identity.tls.certificate.read_bytes()).not_after.timestamp()


def test_a_certificate_is_due_at_two_thirds_of_its_life(old: Founded) -> None:
    leaf = read_chain(old.admin.tls.certificate.read_bytes())[0]
    due = leaf.not_valid_before_utc + (leaf.not_valid_after_utc - leaf.not_valid_before_utc) * 2 / 3
    assert not renewal_due(old.admin, due - timedelta(seconds=1))
    assert renewal_due(old.admin, due + timedelta(seconds=1))


def test_a_renewed_chain_takes_the_old_ones_place_and_the_key_stays(old: Founded) -> None:
    key = old.admin.tls.key.read_bytes()
    authority = Authority.load(old.coordinator.folder)
    chain = authority.renew(renewal_request(old.admin), peer_from_certificate(old.admin.tls.certificate.read_bytes()), NOW)
    assert take_renewed(old.admin, chain, NOW) == NOW + LEAF_LIFE
    assert old.admin.tls.certificate.read_bytes() == chain
    assert old.admin.tls.key.read_bytes() == key
    assert not renewal_due(old.admin, NOW)


@pytest.mark.parametrize("case", ["another key", "another name", "another CA"])
def test_a_chain_that_is_not_ours_leaves_the_old_one(old: Founded, tmp_path: Path, case: str) -> None:
    before = old.admin.tls.certificate.read_bytes()
    authority = Authority.load((found(tmp_path / "g") if case == "another CA" else old).coordinator.folder)
    name = PeerName(FEDERATION, Role.ADMIN, "eve") if case == "another name" else old.admin.peer
    key = make_tls_key() if case == "another key" else load_tls_key(old.admin.tls.key)
    with pytest.raises(CosiloError, match="check certificate"):
        take_renewed(old.admin, authority.issue_admin_certificate(make_csr(key, name), name.name, NOW), NOW)
    assert old.admin.tls.certificate.read_bytes() == before


async def test_the_coordinator_renews_itself_and_others_and_a_stream_goes_on(old: Founded, tmp_path: Path) -> None:
    listen = Listen(federation="127.0.0.1:0", enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
    paths = Paths(identity=old.coordinator.folder, data=tmp_path / "data")
    paths.data.mkdir()
    coordinator = Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths))
    before = ends(old.coordinator)
    await coordinator.start()
    try:
        async with federation_channel(coordinator.endpoints["federation"], old.admin.tls) as channel:
            stub = site_pb2_grpc.SiteServiceStub(channel)
            request = site_pb2.RenewCertificateRequest(csr=renewal_request(old.admin))
            answer = await stub.RenewCertificate(request, timeout=TIMEOUT_S)
            take_renewed(old.admin, answer.certificate_chain, NOW + timedelta(minutes=1))
            eve = replace(old.admin.peer, name="eve")
            stolen = site_pb2.RenewCertificateRequest(csr=make_csr(load_tls_key(old.admin.tls.key), eve))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.RenewCertificate(stolen, timeout=TIMEOUT_S)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            again = await stub.RenewCertificate(request, timeout=TIMEOUT_S)  # on the connection made with the old certificate
            assert peer_from_certificate(again.certificate_chain).name == PeerName(FEDERATION, Role.ADMIN, ADMIN)
        async with federation_channel(coordinator.endpoints["federation"], old.admin.tls) as channel:
            await site_pb2_grpc.SiteServiceStub(channel).RenewCertificate(request, timeout=TIMEOUT_S)  # and on one with the new
        assert ends(old.coordinator) > before + timedelta(days=60).total_seconds()
    finally:
        await coordinator.stop()
