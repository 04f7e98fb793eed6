"""A member that is removed while the coordinator serves: every stream, upload and download of its is cut at once, and for good."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import federation_channel
from cosilo_common.rpc.v1 import site_pb2, site_pb2_grpc
from tests.identity_parties import ADMIN
from tests.integration.live_federation import TIMEOUT_S, Live, big_artifact, live

__all__ = ["live"]


async def test_a_removed_member_s_every_stream_is_cut_at_once_and_stays_out_after_a_restart(live: Live) -> None:
    site = live.sites["st-beda"]
    async with federation_channel(live.address, site.tls) as channel:
        stub = site_pb2_grpc.SiteServiceStub(channel)
        attend = stub.Attend()
        await attend.write(site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=1, software="hand")))
        await attend.read()
        upload = stub.PutUpdate()  # has said nothing yet, and would hold its place for a minute
        await live.until(lambda: len(live.coordinator.conductor._watchers) == 2)
        assert await live.cosilo("site", "revoke", "st-beda", "--yes") == 0
        for call in (attend, upload):
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                while await asyncio.wait_for(call.read(), 5) is not grpc.aio.EOF:
                    pass
            assert cut.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "no longer a member" in (cut.value.details() or "")
    await live.restart()
    async with federation_channel(live.address, site.tls) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site_pb2_grpc.SiteServiceStub(channel).GetMembers(site_pb2.GetMembersRequest(), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_removed_admin_s_download_is_cut(live: Live) -> None:
    members = live.coordinator._members.newest()
    eve = make_signing_key()
    draft = members.draft().approve("eve", Role.ADMIN, public_bytes(eve))
    live.coordinator._members.put(sign_members(members, draft, ADMIN, live.founded.admin_key).canonical())
    tls = live.founded.party(Role.ADMIN, "eve")
    digest, _ = await big_artifact(live)
    async with federation_channel(live.address, tls) as channel:
        call = site_pb2_grpc.SiteServiceStub(channel).GetArtifact(site_pb2.GetArtifactRequest(digest=digest))
        await call.read()
        assert await live.cosilo("admin", "revoke", "eve", "--yes") == 0
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            while await asyncio.wait_for(call.read(), 5) is not grpc.aio.EOF:
                pass
        assert (cut.value.code(), "no longer a member" in (cut.value.details() or "")) == (grpc.StatusCode.PERMISSION_DENIED, True)
