"""Transfers through a link that breaks: real coordinator, real session, certificates, and a relay that cuts at any byte.

What is sent again after a cut is at most one chunk and the window in flight, in both directions and over restarts of either side; and bytes
that rot on either disk are found by their digest and sent again.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import NetworkTable
from cosilo_client.coordinator import UploadHeader
from cosilo_client.metrics import SiteMetrics
from cosilo_client.session import Session
from cosilo_client.wire import owed_from
from cosilo_common.identity.folder import Identity, Membership
from cosilo_common.identity.names import Role
from cosilo_common.identity.tls import RECEIVE_WINDOW_BYTES
from cosilo_common.manifest import Manifest
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2
from cosilo_common.transfer import CHUNK_BYTES, partial_path
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from tests.federation.relay import Direction, Relay
from tests.identity_parties import FEDERATION
from tests.integration.coordinator_world import TINY, HandSite, World, payload_of, start, world

__all__ = ["world"]  # the fixture

pytestmark = pytest.mark.asyncio(loop_scope="module")

SITE: Final = "st-anna"
RESENT_MAX: Final = CHUNK_BYTES + RECEIVE_WINDOW_BYTES
OVERHEAD: Final = 1.02  # TLS records, HTTP/2 frames
HANDSHAKE_BYTES: Final = 64 << 10  # of one connection, with its hello and what is said beside the transfer
RATE_BYTES_PER_S: Final = 20e6  # as fast as the relay goes, and slow enough for a test to act in the middle
SLOW_BYTES_PER_S: Final = 5e6  # slow enough to restart somebody in the middle
QUICK: Final = NetworkTable(timeout_s=5.0, stall_s=5.0, backoff_min_s=0.02, backoff_max_s=0.5)
LIMIT_S: Final = 60.0
LARGE: Final = TINY.model_copy(update={"block_out_channels": (128,)})  # 9.8 MiB of weights: more than two windows


@dataclass
class Link:
    """The relay between one site's session and the coordinator, and that session, which can be replaced as a restart would."""

    world: World
    relay: Relay
    run: bytes
    manifest: Manifest
    hand: HandSite
    folder: Path
    moved: list[int] = field(default_factory=list)
    session: Session | None = None
    _running: asyncio.Task[None] | None = None

    async def connect(self, folder: Path) -> Session:
        """A new session over the relay, with its cache in a folder."""
        await self.disconnect()
        tls = self.world.tls[SITE]
        membership = Membership(
            federation=FEDERATION, role=Role.SITE, name=SITE, address=self.relay.address, enrolment_address="127.0.0.1:1",
            anchor=self.world.founded.members.anchor(),
        )  # fmt: skip
        identity = Identity(folder=tls.certificate.parent, membership=membership)
        cache = ArtifactCache(folder, 1 << 30)
        self.session = Session(identity, cache, QUICK, SiteMetrics(), lambda _: None, lambda _: None, random.Random(1))
        self._running = asyncio.create_task(self.session.run())
        return self.session

    async def disconnect(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def restart_coordinator(self) -> None:
        """Another coordinator on the same folder; what was in flight is lost, as the relay's buffers are."""
        self.relay.refuse(True)
        await self.world.coordinator.stop()
        listen = Listen(federation="127.0.0.1:0", enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
        paths = Paths(identity=self.world.founded.coordinator.folder, data=self.world.data)
        self.world.coordinator = Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths))
        await self.world.coordinator.start()
        self.world.admin = admin_pb2_grpc.AdminServiceStub(self.world.channel(self.world.founded.admin.tls))
        self.hand = await HandSite(self.world, SITE).join()
        self.relay.retarget(self.world.coordinator.endpoints["federation"])
        self.relay.refuse(False)

    async def carried(self, direction: Direction, count: int, transfer: asyncio.Task[Any]) -> None:
        """Returns once so many bytes more went through the relay, or raises what ended the transfer before."""
        goal = self.relay.carried[direction] + count
        async with asyncio.timeout(LIMIT_S):
            while self.relay.carried[direction] < goal:
                if transfer.done():
                    raise AssertionError(f"it ended before: {transfer.exception()!r}")
                await asyncio.sleep(0.001)

    async def uploading(self) -> tuple[site_pb2.Assignment, bytes]:
        """A new round in which the site owes an upload, and an upload for it."""
        await start(self.world, self.run)
        await self.hand.advert(await self.hand.owed(self.run, site_pb2.ROUND_PHASE_TRAINING))
        due = await self.hand.owed(self.run, site_pb2.ROUND_PHASE_UPLOADING)
        values = np.random.default_rng(due.round).normal(0, 0.01, self.manifest.tensor_table.size)
        return due, payload_of(due, values, 10, (1.0, 1.0, 1.0))

    def header(self, due: site_pb2.Assignment, payload: bytes) -> UploadHeader:
        header = self.hand.header(due, payload).header
        return UploadHeader(header.run, header.round, header.attempt, header.statement)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def link(world: World, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Link]:  # pytest's way
    from cosilo_common.diffusion.model import tensor_table

    manifest = world.manifest(
        "large", n_min=1, participants=tuple(p for p in world.manifest("x").participants if p.name == SITE), architecture=LARGE,
        tensors=tuple((n, tuple(shape)) for n, shape in tensor_table(LARGE).to_plain()), rounds_max=1000,
    )  # fmt: skip
    run = await world.create(manifest)
    folder = tmp_path_factory.mktemp("link")
    with Relay(world.coordinator.endpoints["federation"], rate_bytes_per_s=RATE_BYTES_PER_S) as relay:
        found = Link(world, relay, run, manifest, await HandSite(world, SITE).join(), folder)
        yield found
        await found.disconnect()


async def weights(link: Link) -> tuple[Any, bytes]:
    """An assignment whose weights, the newest, are to be fetched, and their bytes. No round is open for it."""
    checkpoints = (await link.world.admin.ListCheckpoints(admin_pb2.ListCheckpointsRequest(run=link.run))).checkpoints
    due = site_pb2.Assignment(
        run=link.run, round=1, kind=site_pb2.ROUND_KIND_TRAIN, phase=site_pb2.ROUND_PHASE_TRAINING, invited=True, attempt=1,
        invited_sites=[SITE], base_digest=checkpoints[-1].weights_digest, base_bytes=checkpoints[-1].bytes,
    )  # fmt: skip
    return owed_from(due), (link.world.data / "artifacts" / due.base_digest.hex()).read_bytes()


@pytest_asyncio.fixture(loop_scope="module")
async def owed(link: Link) -> tuple[Any, bytes]:
    return await weights(link)


def resent_bytes(link: Link, direction: Direction, before: int, size: int, interruptions: int) -> int:
    """What went through the link beyond the file itself; framing and handshakes are allowed for."""
    carried = link.relay.carried[direction] - before
    resent = carried - int(OVERHEAD * size)
    assert resent <= interruptions * (OVERHEAD * RESENT_MAX) + (1 + interruptions) * HANDSHAKE_BYTES, (carried, size, interruptions)
    return max(0, resent)


CUTS = st.lists(st.integers(0, 12 << 20), min_size=1, max_size=3)
# One module-wide link: hypothesis is told that it does not reset between examples, which each example does itself.
ANY_BYTE = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@ANY_BYTE
@given(cuts=CUTS)
async def test_a_fetch_cut_at_any_byte_sends_a_chunk_and_a_window_again_at_most(
    link: Link, owed: tuple[Any, bytes], cuts: list[int]
) -> None:
    due, data = owed
    folder = fresh(link.folder / "cache")
    before, cut = link.relay.carried[Direction.DOWN], link.relay.cuts
    link.relay.cut_at(Direction.DOWN, *cuts)
    session = await link.connect(folder)
    path = await asyncio.wait_for(session.fetch(due, False, link.moved.append), LIMIT_S)
    assert path.read_bytes() == data
    link.relay.forget_cuts()
    resent_bytes(link, Direction.DOWN, before, len(data), link.relay.cuts - cut)


@ANY_BYTE
@given(cuts=CUTS)
async def test_an_upload_cut_at_any_byte_sends_a_chunk_and_a_window_again_at_most(link: Link, cuts: list[int]) -> None:
    due, payload = await link.uploading()
    spool = link.folder / "spool"
    spool.write_bytes(payload)
    before, cut = link.relay.carried[Direction.UP], link.relay.cuts
    link.relay.cut_at(Direction.UP, *cuts)
    session = await link.connect(fresh(link.folder / "cache"))
    moved: list[int] = []
    await asyncio.wait_for(session.put(link.header(due, payload), spool, moved.append), LIMIT_S)
    link.relay.forget_cuts()
    resent_bytes(link, Direction.UP, before, len(payload), link.relay.cuts - cut)
    assert sent_again(moved) <= (link.relay.cuts - cut) * RESENT_MAX
    await link.hand.owed(link.run, site_pb2.ROUND_PHASE_CLOSED, due.round)  # the digest was right and the sum opened


def sent_again(moved: Sequence[int]) -> int:
    """Bytes that the site handed to gRPC more than once, by the offsets that it named."""
    return sum(max(0, former - later) for former, later in pairwise(moved))


@pytest.mark.parametrize("at", [CHUNK_BYTES // 2, 5 << 20], ids=["half a chunk", "half the file"])
async def test_a_fetch_goes_on_over_a_restart_of_either_side(link: Link, owed: tuple[Any, bytes], at: int) -> None:
    due, data = owed
    folder = fresh(link.folder / "cache")
    before = link.relay.carried[Direction.DOWN]
    link.relay.shape(SLOW_BYTES_PER_S, 0.0)
    fetching = asyncio.create_task((await link.connect(folder)).fetch(due, False, link.moved.append))
    await link.carried(Direction.DOWN, at, fetching)
    await link.disconnect()
    fetching.cancel()
    await asyncio.gather(fetching, return_exceptions=True)
    fetching = asyncio.create_task((await link.connect(folder)).fetch(due, False, link.moved.append))
    await link.carried(Direction.DOWN, 2 << 20, fetching)
    await link.restart_coordinator()
    link.relay.shape(RATE_BYTES_PER_S, 0.0)
    assert (await asyncio.wait_for(fetching, LIMIT_S)).read_bytes() == data
    resent_bytes(link, Direction.DOWN, before, len(data), 2)


async def test_an_upload_goes_on_over_a_restart_of_either_side(link: Link) -> None:
    due, payload = await link.uploading()
    spool = link.folder / "spool"
    spool.write_bytes(payload)
    before = link.relay.carried[Direction.UP]
    link.relay.shape(SLOW_BYTES_PER_S, 0.0)
    header = link.header(due, payload)
    putting = asyncio.create_task((await link.connect(fresh(link.folder / "cache"))).put(header, spool, link.moved.append))
    await link.carried(Direction.UP, 2 << 20, putting)
    await link.disconnect()
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    putting = asyncio.create_task((await link.connect(link.folder / "cache")).put(header, spool, link.moved.append))
    await link.carried(Direction.UP, 2 << 20, putting)
    await link.restart_coordinator()
    link.relay.shape(RATE_BYTES_PER_S, 0.0)
    await asyncio.wait_for(putting, LIMIT_S)
    resent_bytes(link, Direction.UP, before, len(payload), 2)
    await link.hand.owed(link.run, site_pb2.ROUND_PHASE_CLOSED, due.round)


# Bytes that rot


async def test_a_flipped_byte_in_half_fetched_weights_is_found_and_they_are_fetched_again(link: Link, owed: tuple[Any, bytes]) -> None:
    due, data = owed
    folder = fresh(link.folder / "cache")
    folder.mkdir()
    half = bytearray(data[: len(data) // 2])
    half[1234] ^= 1
    partial_path(folder / due.base_digest.hex(), due.base_digest.hex()).write_bytes(half)
    path = await asyncio.wait_for((await link.connect(folder)).fetch(due, False, link.moved.append), LIMIT_S)
    assert path.read_bytes() == data
    assert [file.name for file in folder.iterdir()] == [due.base_digest.hex()]


async def test_a_flipped_byte_in_whole_fetched_weights_is_found_and_they_are_fetched_again(link: Link, owed: tuple[Any, bytes]) -> None:
    due, data = owed
    folder = fresh(link.folder / "cache")
    session = await link.connect(folder)
    path = await asyncio.wait_for(session.fetch(due, False, link.moved.append), LIMIT_S)
    flip(path, 4321)
    before = link.relay.carried[Direction.DOWN]
    assert (await asyncio.wait_for(session.fetch(due, False, link.moved.append), LIMIT_S)).read_bytes() == data
    assert link.relay.carried[Direction.DOWN] - before >= len(data)


async def test_a_flipped_byte_in_a_half_received_upload_is_found_and_it_is_sent_again(link: Link) -> None:
    due, payload = await link.uploading()
    spool = link.folder / "spool"
    spool.write_bytes(payload)
    link.relay.cut_at(Direction.UP, 6 << 20)
    cut = link.relay.cuts
    session = await link.connect(fresh(link.folder / "cache"))
    putting = asyncio.create_task(session.put(link.header(due, payload), spool, link.moved.append))
    while link.relay.cuts == cut:
        await asyncio.sleep(0.001)
    received = link.world.data / "spool" / link.run.hex() / str(due.round)
    flip(next(received.glob("*.part")), 99)  # it may go on receiving meanwhile: the byte is of what has arrived
    await asyncio.wait_for(putting, LIMIT_S)
    await link.hand.owed(link.run, site_pb2.ROUND_PHASE_CLOSED, due.round)


def flip(path: Path, at: int) -> None:
    """Flips one bit of a file where it lies."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
