"""The coordinator over real gRPC with real certificates; the test plays the admin and the sites by hand, byte by byte."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from cosilo_common.canonical import sha256
from cosilo_common.diffusion.adapters import adapter_table
from cosilo_common.diffusion.lora import Lora, file_bytes
from cosilo_common.diffusion.model import initial_state, tensor_table
from cosilo_common.diffusion.specification import Training
from cosilo_common.encoding import Encoding
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles
from cosilo_common.manifest import Participant, WarmStartTerms, sign_manifest
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2, site_pb2_grpc
from cosilo_common.secagg.messages import Advert, MessageType, RoundKind, Signed, sign
from cosilo_common.transfer import file_digest
from cosilo_common.weights import write_weights
from tests.integration.coordinator_world import (
    CREATE_S,
    SITES,
    TIMEOUT_S,
    TINY,
    HandSite,
    World,
    code_of,
    details_of,
    newest_weights,
    payload_of,
    start,
    world,
)

__all__ = ["world"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_round_gives_the_weighted_mean_whatever_the_order_of_arrival(world: World) -> None:
    manifest = world.manifest("mean")
    size = manifest.tensor_table.size
    generator = np.random.default_rng(5)
    updates = {name: generator.normal(0, 0.01, size).astype(np.float32) for name in SITES}
    weights = {"st-anna": 30, "st-beda": 50, "st-clara": 100}
    digests = set()
    for order in (SITES, tuple(reversed(SITES))):
        manifest = world.manifest("mean", nonce=sha256(repr(order).encode())[:16].hex())
        run = await world.create(manifest)
        before = await newest_weights(world, run, manifest)
        sites = {name: await HandSite(world, name).join() for name in SITES}
        await start(world, run)
        owed = {name: await sites[name].owed(run, site_pb2.ROUND_PHASE_TRAINING) for name in SITES}
        for name in order:
            await sites[name].advert(owed[name])
        for name in order:
            due = await sites[name].owed(run, site_pb2.ROUND_PHASE_UPLOADING)
            await sites[name].put(due, payload_of(due, updates[name], weights[name], (1.0, 2.0, 0.5)))
        closed = await sites["st-anna"].owed(run, site_pb2.ROUND_PHASE_CLOSED)
        digests.add(closed.checkpoint_digest)
        after = await newest_weights(world, run, manifest)
        mean = sum(weights[n] * updates[n].astype(np.float64) for n in SITES) / 180
        bound = Encoding.parse(owed["st-anna"].encoding).error_bound(0.5, 3, 180)
        wanted = before + mean
        float32_steps = np.spacing(np.abs(wanted).astype(np.float32)) + np.spacing(np.abs(mean).astype(np.float32))
        assert (np.abs(after - wanted) <= bound + float32_steps).all()
        rounds = await world.admin.ListRounds(admin_pb2.ListRoundsRequest(run=run), timeout=TIMEOUT_S)
        summary = rounds.rounds[-1]
        assert (summary.total_weight, list(summary.survivors), summary.has_losses) == (180, list(SITES), True)
        assert summary.heldout_loss == pytest.approx(1.5, abs=1e-6)
        assert summary.train_loss == pytest.approx(0.5, abs=1e-6)
        assert summary.bytes_up == 3 * 4 * Encoding.parse(owed["st-anna"].encoding).length
        for site in sites.values():
            await site.leave()
    assert len(digests) == 1


async def test_a_rehearsal_opens_exactly_zero_and_moves_nothing(world: World) -> None:
    manifest = world.manifest("drill")
    run = await world.create(manifest)
    sites = {name: await HandSite(world, name).join() for name in SITES}
    await start(world, run, site_pb2.ROUND_KIND_REHEARSAL)
    for name in SITES:
        await sites[name].advert(await sites[name].owed(run, site_pb2.ROUND_PHASE_TRAINING), RoundKind.REHEARSAL)
    for name in SITES:
        due = await sites[name].owed(run, site_pb2.ROUND_PHASE_UPLOADING)
        await sites[name].put(due, Encoding.parse(due.encoding).zero_words().tobytes())
    closed = await sites["st-anna"].owed(run, site_pb2.ROUND_PHASE_CLOSED)
    assert closed.checkpoint_digest == closed.base_digest
    checkpoints = await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)
    assert [c.round for c in checkpoints.checkpoints] == [0]
    summary = (await world.admin.ListRounds(admin_pb2.ListRoundsRequest(run=run), timeout=TIMEOUT_S)).rounds[-1]
    assert summary.note == f"the opened sum of {manifest.tensor_table.size} values is exactly zero"
    for site in sites.values():
        await site.leave()


async def test_an_upload_resumes_at_its_offset_and_the_digest_decides(world: World) -> None:
    manifest = world.manifest("resume", n_min=1, participants=tuple(p for p in world.manifest("x").participants if p.name == "st-anna"))
    run = await world.create(manifest)
    site = await HandSite(world, "st-anna").join()
    await start(world, run)
    await site.advert(await site.owed(run, site_pb2.ROUND_PHASE_TRAINING))
    due = await site.owed(run, site_pb2.ROUND_PHASE_UPLOADING)
    payload = payload_of(due, np.zeros(manifest.tensor_table.size), 10, (1.0, 1.0, 1.0))

    cut = site.stub.PutUpdate(timeout=TIMEOUT_S)
    await cut.write(site.header(due, payload))
    assert (await cut.read()).resume_offset == 0
    await cut.write(site_pb2.PutUpdateRequest(data=payload[:1000]))
    await cut.done_writing()
    assert await code_of(cut) is grpc.StatusCode.UNAVAILABLE  # the stream ended early: resume

    wrong = site.stub.PutUpdate(timeout=TIMEOUT_S)
    await wrong.write(site.header(due, payload))
    assert (await wrong.read()).resume_offset == 1000
    await wrong.write(site_pb2.PutUpdateRequest(data=bytes(len(payload) - 1000)[:-1] + b"\x01"))
    assert await code_of(wrong) is grpc.StatusCode.DATA_LOSS  # and what had arrived is discarded

    past = site.stub.PutUpdate(timeout=TIMEOUT_S)
    await past.write(site.header(due, payload))
    assert (await past.read()).resume_offset == 0
    await past.write(site_pb2.PutUpdateRequest(data=payload + b"x"))
    assert await code_of(past) is grpc.StatusCode.INVALID_ARGUMENT

    await site.put(due, payload)
    await site.put(due, payload)  # again, after it is stored: the same answer
    assert (await site.owed(run, site_pb2.ROUND_PHASE_CLOSED)).checkpoint_digest == due.base_digest  # a zero update
    await site.leave()


async def test_messages_of_another_site_run_or_round_are_refused_with_the_rule(world: World) -> None:
    manifest = world.manifest("wrong")
    run = await world.create(manifest)
    sites = {name: await HandSite(world, name).join() for name in SITES}
    await start(world, run)
    owed = await sites["st-anna"].owed(run, site_pb2.ROUND_PHASE_TRAINING)
    anna, beda = sites["st-anna"], sites["st-beda"]
    body = Advert(RoundKind.TRAIN, owed.base_digest, Encoding.parse(owed.encoding).digest(), b"", b"")

    def submit(site: HandSite, message: Signed) -> Any:
        return site.stub.Submit(site_pb2.SubmitRequest(message=message.encode()), timeout=TIMEOUT_S)

    honest = anna.signed(owed, MessageType.ADVERT, body)
    assert "submitted a message that names st-anna" in await details_of(submit(beda, honest))
    forged = sign(beda.key, MessageType.ADVERT, run, owed.round, owed.attempt, "st-anna", body)
    assert "signature: advert of st-anna is not signed" in await details_of(submit(anna, forged))
    other_round = sign(anna.key, MessageType.ADVERT, run, owed.round + 1, owed.attempt, "st-anna", body)
    assert "R2" in await details_of(submit(anna, other_round))
    other_model = Advert(RoundKind.TRAIN, b"x" * 32, body.encoding_digest, b"", b"")
    assert "R3" in await details_of(submit(anna, anna.signed(owed, MessageType.ADVERT, other_model)))
    early = anna.stub.PutUpdate(timeout=TIMEOUT_S)
    await early.write(anna.header(owed, b"x" * 100))
    assert await code_of(early) is grpc.StatusCode.FAILED_PRECONDITION
    assert (
        await code_of(anna.stub.Submit(site_pb2.SubmitRequest(message=b"junk"), timeout=TIMEOUT_S)) is grpc.StatusCode.FAILED_PRECONDITION
    )
    await submit(anna, honest)
    await submit(anna, honest)  # the same bytes again
    await world.admin.StopRun(admin_pb2.StopRunRequest(run=run, abandon=True), timeout=TIMEOUT_S)
    ended = await anna.owed(run, site_pb2.ROUND_PHASE_ABANDONED)
    assert ended.reason == "stopped by an admin"
    for site in sites.values():
        await site.leave()


async def test_artifacts_come_from_any_offset_and_only_to_whom_they_belong(world: World) -> None:
    alone = tuple(p for p in world.manifest("x").participants if p.name == "st-anna")
    run = await world.create(world.manifest("artifact", n_min=1, participants=alone, nonce="ab" * 16))
    answer = await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)
    digest = answer.checkpoints[0].weights_digest
    whole = (world.data / "artifacts" / digest.hex()).read_bytes()
    for offset in (0, 1, 1000, len(whole)):
        call = world.site("st-anna").GetArtifact(site_pb2.GetArtifactRequest(digest=digest, offset=offset), timeout=TIMEOUT_S)
        got = [response async for response in call]
        assert got[0].total_bytes == len(whole)
        assert b"".join(r.data for r in got) == whole[offset:]
    assert hashlib.sha256(whole).digest() == digest

    def fetch(tls: TlsFiles, wanted: bytes, offset: int = 0) -> Any:
        stub = site_pb2_grpc.SiteServiceStub(world.channel(tls))
        return stub.GetArtifact(site_pb2.GetArtifactRequest(digest=wanted, offset=offset), timeout=TIMEOUT_S)

    assert await code_of(fetch(world.tls["st-anna"], digest, len(whole) + 1)) is grpc.StatusCode.OUT_OF_RANGE
    assert await code_of(fetch(world.tls["st-anna"], b"\0" * 32)) is grpc.StatusCode.PERMISSION_DENIED
    assert await code_of(fetch(world.founded.admin.tls, b"\0" * 32)) is grpc.StatusCode.NOT_FOUND
    assert await code_of(fetch(world.founded.admin.tls, b"../../state.db")) is grpc.StatusCode.NOT_FOUND
    optimiser = next(p.name for p in (world.data / "artifacts").iterdir() if p.is_file() and p.name != digest.hex())
    assert await code_of(fetch(world.tls["st-anna"], bytes.fromhex(optimiser))) is grpc.StatusCode.PERMISSION_DENIED


async def test_every_method_refuses_the_wrong_role(world: World) -> None:
    site_channel, admin_channel = world.channel(world.tls["st-anna"]), world.channel(world.founded.admin.tls)
    checked = 0
    for pb2, service, channel, also in (
        (site_pb2, "SiteService", admin_channel, {"GetArtifact", "RenewCertificate"}),
        (admin_pb2, "AdminService", site_channel, set()),
    ):
        descriptor = pb2.DESCRIPTOR.services_by_name[service]
        for method in descriptor.methods:
            if method.name in also:  # both roles may call it; what they may fetch is tested above, what they may renew in test_renewal.py
                continue
            shape = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
            call = getattr(channel, shape)(f"/cosilo.v1.{service}/{method.name}", request_serializer=bytes, response_deserializer=bytes)
            asked = call(aiter_of(b"") if method.client_streaming else b"", timeout=TIMEOUT_S)
            assert await code_of(asked) is grpc.StatusCode.PERMISSION_DENIED, method.name
            checked += 1
    assert checked == len(site_pb2.DESCRIPTOR.services_by_name["SiteService"].methods) - 2 + len(
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods
    )


async def aiter_of(*items: bytes) -> AsyncIterator[bytes]:
    for item in items:
        yield item


async def test_a_certificate_without_membership_and_a_revoked_member_are_refused(world: World) -> None:
    stranger = site_pb2_grpc.SiteServiceStub(world.channel(world.founded.party(Role.SITE, "stranger")))
    text = await details_of(stranger.ListMyRuns(site_pb2.ListMyRunsRequest(), timeout=TIMEOUT_S))
    assert text == "site stranger is not a member of north-star; an admin adds it with `cosilo site approve stranger`"


async def test_a_hello_of_another_version_is_refused_politely(world: World) -> None:
    stub = world.site("st-beda")
    for version, older in ((99, "the coordinator"), (0, "cosilo-site at this site")):
        call = stub.Attend()
        await call.write(site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=version)))
        assert await code_of(call) is grpc.StatusCode.FAILED_PRECONDITION
        said = f"hello.protocol_version: the site speaks protocol version {version} and the coordinator 1: upgrade {older}"
        assert await call.details() == said
    silent = stub.Attend()
    await silent.write(site_pb2.AttendRequest(progress=site_pb2.Progress()))
    assert await code_of(silent) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_checkpoint_is_kept_by_name_and_left_to_the_policy_again(world: World) -> None:
    run = await world.create(world.manifest("kept"))

    async def listed() -> list[tuple[int, str, str]]:
        answer = await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)
        return [(checkpoint.round, checkpoint.name, checkpoint.kept) for checkpoint in answer.checkpoints]

    assert await listed() == [(0, "", "newest")]
    await world.admin.KeepCheckpoint(admin_pb2.KeepCheckpointRequest(run=run, round=0, name="untrained"), timeout=TIMEOUT_S)
    assert await listed() == [(0, "untrained", "named untrained")]
    refused = world.admin.KeepCheckpoint(admin_pb2.KeepCheckpointRequest(run=run, round=7), timeout=TIMEOUT_S)
    assert "round 7 made no checkpoint" in await details_of(refused)
    await world.admin.KeepCheckpoint(admin_pb2.KeepCheckpointRequest(run=run, round=0, leave=True), timeout=TIMEOUT_S)
    assert await listed() == [(0, "", "newest")]
    stub = admin_pb2_grpc.AdminServiceStub(world.channel(world.tls["st-anna"]))
    refused = stub.KeepCheckpoint(admin_pb2.KeepCheckpointRequest(run=run, round=0), timeout=TIMEOUT_S)
    assert await code_of(refused) is grpc.StatusCode.PERMISSION_DENIED


async def test_a_run_is_refused_unless_an_admin_signed_it_for_members(world: World) -> None:
    manifest = world.manifest("unsigned")

    def create(data: bytes, signature: bytes) -> Any:
        return world.admin.CreateRun(admin_pb2.CreateRunRequest(manifest=data, signature=signature), timeout=TIMEOUT_S)

    assert "is not signed by an admin" in await details_of(create(manifest.canonical(), make_signing_key().sign(b"x")))
    spaced = manifest.canonical().replace(b":", b": ", 1)
    assert "not in canonical form" in await details_of(create(spaced, sign_manifest(manifest, world.founded.admin_key)))
    unknown = manifest.canonical()[:-1] + b',"zzz":1}'
    assert "zzz: Extra inputs are not permitted" in await details_of(create(unknown, bytes(64)))
    sybil = world.manifest("sybil", participants=(*manifest.participants, Participant(name="sybil", key="ab" * 32)))
    refused = await details_of(create(sybil.canonical(), sign_manifest(sybil, world.founded.admin_key)))
    assert "participant sybil is no member site with that key" in refused
    assert "no run" in await details_of(
        world.admin.StartRounds(admin_pb2.StartRoundsRequest(run=b"\1" * 32, rounds=1, kind=site_pb2.ROUND_KIND_TRAIN), timeout=TIMEOUT_S)
    )


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
async def test_a_round_that_no_store_could_hold_is_an_unknown_one(world: World, number: int) -> None:
    manifest = world.manifest("numbered")
    run = await world.create(manifest)
    for asked in (
        world.admin.GetRoundTrace(admin_pb2.GetRoundTraceRequest(run=run, round=number), timeout=TIMEOUT_S),
        world.admin.KeepCheckpoint(admin_pb2.KeepCheckpointRequest(run=run, round=number, name="x"), timeout=TIMEOUT_S),
        world.admin.Sample(admin_pb2.SampleRequest(run=run, round=number, per_class=1, steps=2), timeout=TIMEOUT_S),
    ):
        assert f"there is no round {number}" in await details_of(asked)


async def test_a_run_whose_signer_is_no_admin_any_more_is_signed_again(world: World) -> None:
    manifest, former = world.manifest("inherited"), make_signing_key()
    run = await world.create(manifest)
    theirs, ours = sign_manifest(manifest, former), sign_manifest(manifest, world.founded.admin_key)

    async def signed_again(signature: bytes) -> tuple[str, bytes]:
        await world.admin.CreateRun(admin_pb2.CreateRunRequest(manifest=manifest.canonical(), signature=signature), timeout=TIMEOUT_S)
        answer = await world.admin.GetManifest(site_pb2.GetRunRequest(run=run), timeout=TIMEOUT_S)
        return answer.signer, answer.signature

    assert await signed_again(ours) == ("ada", ours)
    world.coordinator._store.sign_run(run, theirs, "bob")  # as an admin left it who was revoked since
    assert "is not signed by an admin" in await details_of(signed_again(theirs))
    assert await signed_again(ours) == ("ada", ours)
    checkpoints = await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)
    assert len(checkpoints.checkpoints) == 1


@pytest.mark.usefixtures("worker_process")  # what it answers to both, and its refusals
async def test_a_run_begins_from_the_weights_that_its_manifest_names(world: World) -> None:
    first = await world.create(world.manifest("cold", training=Training(loss_buckets=2, seed=5)))
    listing = admin_pb2.ListCheckpointsRequest
    cold = (await world.admin.ListCheckpoints(listing(run=first), timeout=TIMEOUT_S)).checkpoints[0].weights_digest
    manifest = world.manifest("warm", training=Training(loss_buckets=2, seed=6), warm_start=WarmStartTerms(sha256=cold.hex()))
    second = await world.create(manifest)
    warm = (await world.admin.ListCheckpoints(listing(run=second), timeout=TIMEOUT_S)).checkpoints[0].weights_digest
    assert warm == cold

    folder = world.data / "warm"
    folder.mkdir()
    (folder / f"{'ab' * 32}.safetensors").write_bytes((world.data / "artifacts" / cold.hex()).read_bytes())
    for named, said in (("cd" * 32, "no weights with the digest cdcd"), ("ab" * 32, f"has the digest {cold.hex()}")):
        wrong = world.manifest(f"warm-{named[:2]}", warm_start=WarmStartTerms(sha256=named))
        request = admin_pb2.CreateRunRequest(manifest=wrong.canonical(), signature=sign_manifest(wrong, world.founded.admin_key))
        assert said in await details_of(world.admin.CreateRun(request, timeout=CREATE_S))


async def test_what_adapters_stand_on_is_checked_kept_and_fetched_by_the_run_s_sites(world: World, tmp_path: Path) -> None:
    table, folder = tensor_table(TINY), world.data / "warm"
    folder.mkdir(exist_ok=True)
    write_weights(tmp_path / "base", table, (tensor.numpy().ravel() for tensor in initial_state(TINY, 3).values()))
    base = file_digest(tmp_path / "base")
    terms = Lora(base=base, base_bytes=file_bytes(table), rank=2, targets=("to_q", "to_v"))
    manifest = world.manifest(
        "adapters",
        lora=terms,
        tensors=adapter_table(TINY, terms).entries,
        participants=tuple(p for p in world.manifest("x").participants if p.name != "st-clara"),
    )

    def create() -> Any:
        request = admin_pb2.CreateRunRequest(manifest=manifest.canonical(), signature=sign_manifest(manifest, world.founded.admin_key))
        return world.admin.CreateRun(request, timeout=CREATE_S)

    assert f"no weights with the digest {base}" in await details_of(create())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosilo_common.diffusion.lora.importlib.util.find_spec", lambda name: None)
        assert "pip install 'cosilo-server[lora]'" in await details_of(create())
    (folder / f"{base}.safetensors").write_bytes((tmp_path / "base").read_bytes())
    run = (await create()).run
    checkpoint = (await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)).checkpoints[0]
    assert checkpoint.bytes == file_bytes(manifest.tensor_table) < terms.base_bytes / 20

    (folder / f"{base}.safetensors").unlink()  # the artifact is what counts from here on, and no collection takes it
    assert bytes.fromhex(base) in world.coordinator._store.shelf.references()
    asked = site_pb2.GetArtifactRequest(digest=bytes.fromhex(base))
    got = [response async for response in world.site("st-anna").GetArtifact(asked, timeout=TIMEOUT_S)]
    assert got[0].total_bytes == terms.base_bytes
    assert sha256(b"".join(response.data for response in got)).hex() == base
    with pytest.raises(grpc.aio.AioRpcError, match="is not the weights of a run of st-clara"):
        await anext(aiter(world.site("st-clara").GetArtifact(asked, timeout=TIMEOUT_S)))
    drawn = await world.admin.Sample(admin_pb2.SampleRequest(run=run, newest=True, per_class=1, steps=2), timeout=CREATE_S)
    assert drawn.round == 0


async def test_fewer_sites_than_a_round_needs_wait_and_say_so(world: World) -> None:
    run = await world.create(world.manifest("waiting"))
    await start(world, run)
    watch = world.admin.WatchRun(admin_pb2.WatchRunRequest(run=run), timeout=TIMEOUT_S)
    snapshot = await watch.read()
    assert (snapshot.summary.state, snapshot.summary.note) == ("waiting", "waiting: 0 of the 2 sites that a round needs are connected")
    watch.cancel()
    await world.admin.StopRun(admin_pb2.StopRunRequest(run=run), timeout=TIMEOUT_S)


async def test_a_removed_admin_s_watch_and_a_removed_site_s_upload_are_cut_at_once(world: World) -> None:
    manifest = world.manifest("removed", n_min=1, participants=tuple(p for p in world.manifest("x").participants if p.name == "st-clara"))
    run = await world.create(manifest)

    async def put(change: Any) -> None:
        newest = world.coordinator._members.newest()
        signed = sign_members(newest, change(newest.draft()), world.founded.admin.membership.name, world.founded.admin_key)
        await world.admin.PutMembers(admin_pb2.PutMembersRequest(members=signed.canonical()), timeout=TIMEOUT_S)

    await put(lambda draft: draft.approve("eve", Role.ADMIN, public_bytes(make_signing_key())))
    eve = admin_pb2_grpc.AdminServiceStub(world.channel(world.founded.party(Role.ADMIN, "eve")))
    watch = eve.WatchRun(admin_pb2.WatchRunRequest(run=run), timeout=TIMEOUT_S)
    await watch.read()
    site = await HandSite(world, "st-clara").join()
    await start(world, run)
    await site.advert(await site.owed(run, site_pb2.ROUND_PHASE_TRAINING))
    due = await site.owed(run, site_pb2.ROUND_PHASE_UPLOADING)
    payload = payload_of(due, np.zeros(manifest.tensor_table.size), 10, (1.0, 1.0, 1.0))
    upload = site.stub.PutUpdate(timeout=TIMEOUT_S)
    await upload.write(site.header(due, payload))
    assert (await upload.read()).resume_offset == 0
    await upload.write(site_pb2.PutUpdateRequest(data=payload[:1000]))  # and then silence: nothing else would end it for a minute

    await put(lambda draft: draft.remove("eve").remove("st-clara"))
    async with asyncio.timeout(10):
        assert await code_of(watch) is grpc.StatusCode.PERMISSION_DENIED
        assert await code_of(upload) is grpc.StatusCode.PERMISSION_DENIED
    await world.admin.StopRun(admin_pb2.StopRunRequest(run=run, abandon=True), timeout=TIMEOUT_S)
    await put(lambda draft: draft.approve("st-clara", Role.SITE, public_bytes(world.keys["st-clara"]), readmit=True))
