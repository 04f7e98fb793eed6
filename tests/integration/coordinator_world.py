"""A coordinator over real gRPC with real certificates, whose admin and sites a test plays by hand. A fixture, imported by name where it is used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.canonical import sha256
from cosilo_common.diffusion.model import tensor_table
from cosilo_common.diffusion.specification import Architecture, Sampling, Schedule, Training
from cosilo_common.encoding import Encoding
from cosilo_common.identity.keys import make_signing_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import TlsFiles, federation_channel
from cosilo_common.manifest import Deadlines, EncodingTerms, Manifest, Participant, sign_manifest
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2, site_pb2_grpc
from cosilo_common.secagg.messages import Advert, MessageType, RoundKind, Signed, Upload, sign
from cosilo_common.weights import open_vector
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from cosilo_server.evaluation import Evaluation
from cosilo_server.worker import perform
from tests.identity_parties import FEDERATION, Founded, found

SITES = ("st-anna", "st-beda", "st-clara")
TINY = Architecture(sample_size=4, in_channels=1, num_classes=2, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
TIMEOUT_S = 30.0
ANYWHERE = "127.0.0.1:0"
CREATE_S = 240.0  # the first run of a process loads torch and diffusers: 5 s alone, over a minute where ten others do the same


class EvaluationHere(Evaluation):
    """A worker's tasks in this process, which has loaded torch: the process is the business of tests/system."""

    async def _run(self, job: dict[str, object]) -> None:
        await asyncio.to_thread(perform, job)


@dataclass
class World:
    """A running coordinator, the admin's stub, and three sites with keys."""

    founded: Founded
    coordinator: Coordinator
    data: Path
    admin: Any
    keys: dict[str, Ed25519PrivateKey]
    tls: dict[str, TlsFiles]
    runs: dict[str, bytes] = field(default_factory=dict)
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    def channel(self, tls: TlsFiles) -> grpc.aio.Channel:
        channel = federation_channel(self.coordinator.endpoints["federation"], tls)
        self.channels.append(channel)
        return channel

    def site(self, name: str) -> Any:
        return site_pb2_grpc.SiteServiceStub(self.channel(self.tls[name]))

    def manifest(self, name: str, **changes: Any) -> Manifest:
        values: dict[str, Any] = {
            "name": name,
            "federation": FEDERATION,
            "nonce": sha256(name.encode())[:16].hex(),
            "participants": tuple(Participant(name=n, key=public_bytes(self.keys[n]).hex()) for n in SITES),
            "architecture": TINY,
            "schedule": Schedule(),
            "training": Training(loss_buckets=2),
            "sampling": Sampling(),
            "tensors": tuple((n, tuple(shape)) for n, shape in tensor_table(TINY).to_plain()),
            "aggregation": "insecure-plain-sum",
            "encoding": EncodingTerms(clip=0.5, cap=100),
            "n_min": 2,
            "deadlines": Deadlines(gather_s=5, training_s=60, uploading_s=60),
        }
        return Manifest(**{**values, **changes})

    async def create(self, manifest: Manifest) -> bytes:
        signature = sign_manifest(manifest, self.founded.admin_key)
        answer = await self.admin.CreateRun(
            admin_pb2.CreateRunRequest(manifest=manifest.canonical(), signature=signature), timeout=CREATE_S
        )
        assert answer.run == manifest.digest()
        return answer.run


def a_coordinator(founded: Founded, data: Path, page: str = "") -> Coordinator:
    """One on free ports, with a folder of its own. page: where its status page is, if it has one."""
    data.mkdir()
    listen = Listen(federation=ANYWHERE, enrolment=ANYWHERE, metrics=ANYWHERE, page=page)
    paths = Paths(identity=founded.coordinator.folder, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosilo_server.coordinator.Evaluation", EvaluationHere)
        return Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths))


@asynccontextmanager
async def three_members(founded: Founded, data: Path, page: str = "") -> AsyncIterator[World]:
    """A running coordinator, and three members whose list its admin has put."""
    coordinator = a_coordinator(founded, data, page)
    await coordinator.start()
    keys = {name: make_signing_key() for name in SITES}
    world = World(founded, coordinator, data, None, keys, {n: founded.party(Role.SITE, n) for n in SITES})
    world.admin = admin_pb2_grpc.AdminServiceStub(world.channel(founded.admin.tls))
    members = founded.members
    draft = members.draft()
    for name in SITES:
        draft = draft.approve(name, Role.SITE, public_bytes(keys[name]))
    signed = sign_members(members, draft, founded.admin.membership.name, founded.admin_key)
    await world.admin.PutMembers(admin_pb2.PutMembersRequest(members=signed.canonical()), timeout=TIMEOUT_S)
    yield world
    for channel in world.channels:
        await channel.close()
    await coordinator.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    root = tmp_path_factory.mktemp("world")
    async with three_members(found(root / "f"), root / "data") as made:
        yield made


class HandSite:
    """A site whose every message the test makes."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.key = world.keys[name]
        self.stub = world.site(name)
        self._queue: asyncio.Queue[site_pb2.AttendRequest] = asyncio.Queue()
        self._queue.put_nowait(site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=1, software="hand")))
        self._call = self.stub.Attend(self._requests())
        self._pending: asyncio.Task[site_pb2.AttendResponse] | None = None

    async def _requests(self) -> AsyncIterator[site_pb2.AttendRequest]:
        while True:
            yield await self._queue.get()

    async def owed(self, run: bytes, phase: int, number: int | None = None) -> site_pb2.Assignment:
        """Reads snapshots until the run's assignment is in that phase."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                response = await self._call.read()
                assert response is not grpc.aio.EOF, await self._call.details()
                for one in response.owed:
                    if one.run == run and one.phase == phase and number in (None, one.round):
                        return one

    def say(self, **what: Any) -> None:
        self._queue.put_nowait(site_pb2.AttendRequest(**what))

    def signed(self, owed: site_pb2.Assignment, type_: MessageType, body: Any) -> Signed:
        return sign(self.key, type_, owed.run, owed.round, owed.attempt, self.name, body)

    async def advert(self, owed: site_pb2.Assignment, kind: RoundKind = RoundKind.TRAIN) -> None:
        body = Advert(kind, owed.base_digest, Encoding.parse(owed.encoding).digest(), b"", b"")
        message = self.signed(owed, MessageType.ADVERT, body)
        await self.stub.Submit(site_pb2.SubmitRequest(message=message.encode()), timeout=TIMEOUT_S)

    def header(self, owed: site_pb2.Assignment, payload: bytes) -> site_pb2.PutUpdateRequest:
        statement = self.signed(owed, MessageType.UPLOAD, Upload(sha256(payload), len(payload)))
        header = site_pb2.PutUpdateHeader(run=owed.run, round=owed.round, attempt=owed.attempt, statement=statement.encode())
        return site_pb2.PutUpdateRequest(header=header)

    async def put(self, owed: site_pb2.Assignment, payload: bytes) -> None:
        call = self.stub.PutUpdate(timeout=TIMEOUT_S)
        await call.write(self.header(owed, payload))
        offset = (await call.read()).resume_offset
        for start in range(offset, len(payload), 1 << 20):
            await call.write(site_pb2.PutUpdateRequest(data=payload[start : start + (1 << 20)]))
        await call.done_writing()
        assert (await call.read()).stored

    async def join(self) -> HandSite:
        """Waits until the coordinator counts the stream."""
        await self._until_connected_is(True)
        return self

    async def leave(self) -> None:
        """Ends the stream, and waits until the coordinator has seen it."""
        self._call.cancel()
        await self._until_connected_is(False)

    async def _until_connected_is(self, wanted: bool) -> None:
        async with asyncio.timeout(TIMEOUT_S), self._world.coordinator.conductor.watch() as changed:
            while self._world.coordinator.conductor.connected(self.name) is not wanted:
                await changed.wait()
                changed.clear()


class FixedRandom:
    """Rounds every loss down, so that a sum is known to the last bit."""

    def token_bytes(self, n: int) -> bytes:
        return bytes(n)


def payload_of(owed: site_pb2.Assignment, values: np.ndarray, weight: int, losses: Iterable[float]) -> bytes:
    encoding = Encoding.parse(owed.encoding)
    words = np.empty(encoding.length, dtype="<u4")
    clipped = encoding.quantise(values.astype(np.float32), 0, weight, words[: encoding.size]) if encoding.size else 0
    words[encoding.size :] = encoding.tail(weight, list(losses), clipped, FixedRandom())
    return words.tobytes()


async def start(world: World, run: bytes, kind: int = site_pb2.ROUND_KIND_TRAIN, rounds: int = 1) -> None:
    await world.admin.StartRounds(admin_pb2.StartRoundsRequest(run=run, rounds=rounds, kind=kind), timeout=TIMEOUT_S)


async def newest_weights(world: World, run: bytes, manifest: Manifest) -> np.ndarray:
    answer = await world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=run), timeout=TIMEOUT_S)
    path = world.data / "artifacts" / answer.checkpoints[-1].weights_digest.hex()
    return np.array(open_vector(path, manifest.tensor_table))


async def code_of(call: Any) -> grpc.StatusCode:
    """Awaits a call, of whatever shape, to its end and returns its status."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def details_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.details() or ""
