"""One run of three sites in plain sum at b = 24, through the conductor, the closer and the store; the sites upload what a test says."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest_asyncio
from numpy.typing import NDArray

from cosilo_client.due_terms import checked_encoding
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.encoding import Encoding
from cosilo_common.manifest import PLAIN_AGGREGATION
from cosilo_common.secagg.keys import SystemRandomness
from cosilo_common.secagg.masks import pack24
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.weights import open_vector, write_weights
from cosilo_server.aggregation import Aggregation
from cosilo_server.artifacts import Artifacts
from cosilo_server.closing import RoundCloser, RoundOutcome, untrained_checkpoint
from cosilo_server.conductor import Conductor
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import AdvertReceived, UploadReceived
from cosilo_server.rounds.state import Phase, Round, Upload
from cosilo_server.spool import Spool
from cosilo_server.store import Store
from tests.integration.memory_rounds import manifest_of

SITES = ("anna", "beda", "clara")
CLIP, CAP = 0.5, 64


class World:
    """One run of three sites in plain sum, whose sites upload what a test says."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.store = Store(folder / "state.db")
        terms = {"aggregation": PLAIN_AGGREGATION, "f": 0, "encoding": {"bits": 24, "clip": CLIP, "cap": CAP}}
        self.manifest = manifest_of(SITES, **{**terms, **changes})
        self.run = self.manifest.digest()
        self.artifacts = Artifacts(folder / "artifacts")
        self.spool = Spool(folder / "spool")
        table = self.manifest.tensor_table
        with self.artifacts.scratch() as path:
            write_weights(path, table, [np.zeros(table.size, np.float32)])
            weights = self.artifacts.put_file(path)
        aggregation = Aggregation(
            self.artifacts, table, round_encoding(self.manifest, RoundKind.TRAIN), self.manifest.server_optimiser, self.manifest.ema_decay
        )
        first = untrained_checkpoint(
            self.run, aggregation.initial(weights), self.artifacts.size(weights), bool(self.manifest.ema_decay), 0.0
        )
        self.store.add_run(self.run, self.manifest.canonical(), bytes(64), "ada", first)
        self.conductor = self.new_conductor()

    def new_conductor(self) -> Conductor:
        self.closer = RoundCloser(self.store, self.artifacts, self.spool)
        return Conductor(self.store, self.spool, self.closer, CoordinatorMetrics())

    async def restart(self) -> None:
        """Another process on the same folder."""
        await self.conductor.stop()
        self.conductor = self.new_conductor()
        await self.conductor.start()

    async def encoding(self, kind: RoundKind) -> Encoding:
        """Begins a round, and says how it is encoded."""
        for name in SITES:
            if not self.conductor.connected(name):
                await self.conductor.attend(name, True)
        await self.conductor.order(self.run, kind, 1)
        await self.until(Phase.TRAINING)
        encoding = checked_encoding(self.manifest, kind, self.state.encoding)  # as every site does
        assert encoding == Encoding.parse(self.state.encoding)
        return encoding

    async def advert(self) -> None:
        """Every site's advert."""
        for name in SITES:
            assert await self.conductor.handle(self.run, AdvertReceived(name, 1, b"advert of " + name.encode())) == ""

    async def upload(self, encoding: Encoding, name: str, update: NDArray[np.float32]) -> Path:
        """One site's upload; where it lies."""
        data = uploaded(encoding, update)
        path = self.spool.path(self.run.hex(), self.state.number, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sent = Upload(name.encode(), hashlib.sha256(data).digest(), len(data))
        assert await self.conductor.handle(self.run, UploadReceived(name, 1, sent)) == ""
        return path

    async def close(self, encoding: Encoding, updates: list[NDArray[np.float32]]) -> None:
        """Adverts and uploads, and the sum is opened."""
        await self.advert()
        for name, update in zip(SITES, updates, strict=True):
            await self.upload(encoding, name, update)
        await self.until(Phase.CLOSED)

    async def until(self, phase: Phase) -> None:
        async with asyncio.timeout(20), self.conductor.watch() as changed:
            while self.state.phase is not phase:
                assert not self.state.reason
                changed.clear()
                await changed.wait()

    @property
    def state(self) -> Round:
        found = self.conductor.round(self.run)
        assert found is not None
        return found

    def outcome(self) -> RoundOutcome:
        return RoundOutcome.from_json(self.store.rounds(self.run)[-1].outcome)

    def weights(self) -> NDArray[np.float32]:
        newest = self.store.newest_checkpoint(self.run)
        assert newest is not None
        return np.array(open_vector(self.artifacts.path(newest.weights.hex()), self.manifest.tensor_table))


def uploaded(encoding: Encoding, update: NDArray[np.float32]) -> bytes:
    """One site's whole upload at full weight."""
    words, random = np.zeros(encoding.length, np.uint32), SystemRandomness()
    clipped = encoding.quantise(update, 0, CAP, words[: encoding.size], random) if encoding.size else 0
    words[encoding.size :] = encoding.tail(CAP, (1.0,) * encoding.losses, clipped, random)
    return pack24(words, np.empty(3 * encoding.length, np.uint8)).tobytes()


Conducted = TypeVar("Conducted", bound=World)


@asynccontextmanager
async def conducted(world: Conducted) -> AsyncIterator[Conducted]:
    """Its conductor at work, until the block ends."""
    await world.conductor.start()
    yield world
    await world.conductor.stop()
    world.store.close()


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with conducted(World(tmp_path)) as made:
        yield made
