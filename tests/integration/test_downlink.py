"""What a site fetches where a run's checkpoints are steps apart: the step and nothing else if it can, all of them if not; every byte counted.

Over real gRPC with real certificates: a coordinator, a site whose uploads are made by hand, and sessions that fetch as daemons do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import NetworkTable
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Owed
from cosilo_client.session import Session
from cosilo_client.wire import owed_from
from cosilo_common.diffusion.specification import Training
from cosilo_common.errors import CosiloError
from cosilo_common.identity.folder import Identity, Membership
from cosilo_common.identity.names import Role
from cosilo_common.manifest import DownlinkTerms, Manifest, ServerOptimiserTerms
from cosilo_common.rpc.v1 import admin_pb2, admin_pb2_grpc, site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.step import HEADER_BYTES, step_bytes
from cosilo_common.transfer import file_digest
from cosilo_common.weights import open_vector, read_header
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from tests.identity_parties import FEDERATION
from tests.integration.conducted_run import World as Conducted
from tests.integration.conducted_run import conducted
from tests.integration.coordinator_world import ANYWHERE, TIMEOUT_S, HandSite, World, payload_of, start, world

__all__ = ["world"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

SITE = "st-anna"
NETWORK = NetworkTable(timeout_s=5.0, stall_s=5.0, backoff_min_s=0.02, backoff_max_s=0.5)


class Run:
    """One run of one site, whose rounds a test moves on."""

    def __init__(self, world: World, manifest: Manifest, run: bytes, hand: HandSite) -> None:
        self.world, self.manifest, self.run, self.hand = world, manifest, run, hand
        self.values = manifest.tensor_table.size

    @classmethod
    async def create(cls, world: World, name: str, **changes: object) -> Run:
        alone = tuple(p for p in world.manifest("x").participants if p.name == SITE)
        manifest = world.manifest(name, n_min=1, participants=alone, **{"downlink": DownlinkTerms(), **changes})
        return cls(world, manifest, await world.create(manifest), await HandSite(world, SITE).join())

    async def begun(self) -> tuple[site_pb2.Assignment, Owed]:
        await start(self.world, self.run)
        due = await self.hand.owed(self.run, site_pb2.ROUND_PHASE_TRAINING)
        return due, owed_from(due)

    async def close(self, due: site_pb2.Assignment) -> None:
        await self.hand.advert(due)
        uploading = await self.hand.owed(self.run, site_pb2.ROUND_PHASE_UPLOADING)
        update = np.random.default_rng([due.round, *self.run[:4]]).normal(0, 0.01, self.values)
        await self.hand.put(uploading, payload_of(uploading, update, 10, (1.0, 1.0, 1.0)))
        await self.hand.owed(self.run, site_pb2.ROUND_PHASE_CLOSED, due.round)

    async def next(self) -> tuple[site_pb2.Assignment, Owed]:
        """A round that nobody fetches for, and the one after it as it begins."""
        due, _ = await self.begun()
        await self.close(due)
        return await self.begun()

    async def bytes_down(self) -> int:
        rounds = await self.world.admin.ListRounds(admin_pb2.ListRoundsRequest(run=self.run), timeout=TIMEOUT_S)
        return int(rounds.rounds[-1].bytes_down)

    def artifact(self, digest: bytes) -> Path:
        return self.world.data / "artifacts" / digest.hex()

    @asynccontextmanager
    async def site(self, folder: Path) -> AsyncIterator[Session]:
        """A daemon's session with its cache in a folder."""
        tls = self.world.tls[SITE]
        address, anchor = self.world.coordinator.endpoints["federation"], self.world.founded.members.anchor()
        membership = Membership(
            federation=FEDERATION, role=Role.SITE, name=SITE, address=address, enrolment_address="127.0.0.1:1", anchor=anchor
        )
        identity = Identity(folder=tls.certificate.parent, membership=membership)
        cache = ArtifactCache(folder, 1 << 30)
        session = Session(identity, cache, NETWORK, SiteMetrics(), lambda _: None, lambda _: None, random.Random(1))
        running = asyncio.create_task(session.run())
        yield session
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def fetch(self, owed: Owed, folder: Path) -> tuple[int, int]:
        """Fetches as a daemon with that cache; the bytes that it cost the coordinator, and how many the site said last that it had moved."""
        before, moved = await self.bytes_down(), [0]
        async with self.site(folder) as session:
            path = await asyncio.wait_for(session.fetch(owed, False, moved.append), TIMEOUT_S)
        assert file_digest(path) == owed.base_digest.hex()
        return await self.bytes_down() - before, moved[-1]

    async def restart(self) -> None:
        """Another coordinator on the same folder."""
        await self.hand.leave()
        await self.world.coordinator.stop()
        listen = Listen(federation=ANYWHERE, enrolment=ANYWHERE, metrics=ANYWHERE)
        paths = Paths(identity=self.world.founded.coordinator.folder, data=self.world.data)
        self.world.coordinator = Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths))
        await self.world.coordinator.start()
        self.world.admin = admin_pb2_grpc.AdminServiceStub(self.world.channel(self.world.founded.admin.tls))
        self.hand = await HandSite(self.world, SITE).join()


async def test_who_holds_the_last_checkpoint_fetches_the_step_alone_also_after_a_restart(world: World, tmp_path: Path) -> None:
    run = await Run.create(world, "steps", server_optimiser=ServerOptimiserTerms(kind="fedadam"))
    due, owed = await run.begun()
    assert owed.step is None  # nothing comes before untrained weights
    assert await run.fetch(owed, tmp_path / "a") == (owed.base_bytes, owed.base_bytes)
    await run.close(due)

    await run.restart()
    _, second = await run.begun()
    assert second.step is not None
    assert (second.step.base, second.step.bytes) == (owed.base_digest, step_bytes(run.values))
    assert await run.fetch(second, tmp_path / "a") == (second.step.bytes, second.step.bytes)
    assert second.step.bytes < 0.7503 * second.base_bytes
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([owed.base_digest.hex(), second.base_digest.hex()])
    assert await run.fetch(second, tmp_path / "a") == (0, 0)  # it is here now

    assert await run.fetch(second, tmp_path / "b") == (second.base_bytes, second.base_bytes)  # who came later has nothing to step from
    await run.hand.leave()


async def test_a_damaged_step_costs_its_bytes_and_the_whole_is_fetched(world: World, tmp_path: Path) -> None:
    run = await Run.create(world, "damaged")
    due, first = await run.begun()
    await run.fetch(first, tmp_path / "a")
    await run.close(due)
    due, owed = await run.begun()
    assert owed.step is not None
    step = run.artifact(owed.step.digest)
    data = bytearray(step.read_bytes())
    data[HEADER_BYTES + 5] ^= 1
    step.write_bytes(data)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / first.base_digest.hex()).write_bytes(run.artifact(first.base_digest).read_bytes())
    spent, moved = await run.fetch(owed, tmp_path / "a")
    assert spent == 3 * owed.step.bytes + owed.base_bytes  # a corrupt transfer is tried three times
    assert moved == owed.step.bytes + owed.base_bytes  # later bytes count as progress still
    assert owed.step.digest.hex() not in {path.name for path in (tmp_path / "a").iterdir()}

    data[HEADER_BYTES + 5] ^= 1
    step.write_bytes(data)
    held = tmp_path / "b" / first.base_digest.hex()
    rotten = bytearray(held.read_bytes())
    rotten[-1] ^= 1
    held.write_bytes(rotten)
    assert (await run.fetch(owed, tmp_path / "b"))[0] == owed.step.bytes + owed.base_bytes  # a base that rotted here
    await run.hand.leave()


async def test_a_step_that_lies_of_its_length_is_not_fetched(world: World, tmp_path: Path) -> None:
    run = await Run.create(world, "lies")
    due, first = await run.begun()
    await run.fetch(first, tmp_path / "a")
    await run.close(due)
    due, _ = await run.begun()
    due.step.bytes = 1 << 40
    owed = owed_from(due)
    assert (await run.fetch(owed, tmp_path / "a"))[0] == owed.base_bytes
    due.step.digest = b"short"
    with pytest.raises(CosiloError, match=r"step.digest: 5 bytes, not 32"):
        owed_from(due)
    await run.hand.leave()


async def test_a_run_that_does_not_ask_has_no_steps(world: World) -> None:
    run = await Run.create(world, "whole", downlink=None)
    assert b"downlink" not in run.manifest.canonical()
    due, owed = await run.next()
    assert owed.step is None and not due.HasField("step")
    await run.hand.leave()


async def test_a_sum_opened_twice_gives_one_step_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    update = [np.linspace(-0.01, 0.01, 16, dtype=np.float32)] * 3
    async with conducted(Conducted(tmp_path, downlink={}, ema_decay=0.5)) as made:
        encoding = await made.encoding(RoundKind.TRAIN)
        real, opened = made.closer.open, []

        def twice(*args: object) -> object:
            opened.extend(real(*args) for _ in range(2))  # as a restart after a crash in the opening does
            return opened[-1]

        made.closer.open = twice
        await made.close(encoding, update)
        (_, one), (_, other) = opened
        assert one.step is not None and (one.step, one.weights) == (other.step, other.weights)
        first = made.store.newest_checkpoint(made.run)
        assert first is not None and first.step == one.step
        assert first.step.digest in made.store.shelf.references()
        await made.restart()
        await made.close(await made.encoding(RoundKind.TRAIN), update)
        second = made.store.newest_checkpoint(made.run)
        assert second is not None and second.step is not None and second.step.base == first.weights
        assert made.state.step == first.step  # of the round that is over: the step to what it began from
        wanted = made.store.shelf.references()
        assert second.step.digest in wanted and first.step.digest not in wanted
        assert {first.step.digest, second.step.digest} <= made.store.shelf.stored().keys()
        path = made.artifacts.path(second.weights.hex())
        assert np.abs(open_vector(path, read_header(path).table)).max() > 0.01


async def test_a_manifest_with_control_variates_or_other_bits_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="downlink: a checkpoint with control_variates is fetched whole"):
        world.manifest("scaffold", downlink=DownlinkTerms(), training=Training(control_variates=True))
    with pytest.raises(ValueError, match="Input should be 24"):
        DownlinkTerms.model_validate({"bits": 16})
