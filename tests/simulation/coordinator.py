"""The coordinator in the simulator: the real store, spool, closer, conductor and services, in a process that can be killed.

Owns how they are put together (as cosilo_server.coordinator does it, less TLS, the HTTP port and the admin's servicer) and where the
watch looks in. Must not decide when the process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import Engine

from cosilo_common.clip_ranges import round_encoding
from cosilo_common.errors import CosiloError
from cosilo_common.identity.names import Peer, Role
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.weights import WeightsWriter
from cosilo_server.aggregation import Aggregation
from cosilo_server.artifacts import Artifacts
from cosilo_server.closing import RoundCloser, RoundOutcome, Step, untrained_checkpoint
from cosilo_server.conductor import Conductor
from cosilo_server.config import Limits
from cosilo_server.membership import Removal
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds.events import Event
from cosilo_server.rounds.state import Round
from cosilo_server.services.federation import SiteService
from cosilo_server.services.gate import Gate
from cosilo_server.services.uploads import UploadDesk
from cosilo_server.spool import Spool
from cosilo_server.store import Store, StoredCheckpoint
from tests.simulation.disk import Disk
from tests.simulation.network import Network, Server
from tests.simulation.process import CURRENT, Process
from tests.simulation.trainer import update_of
from tests.simulation.watch import Watch
from tests.simulation.wire import FEDERATION, Context

EPOCH_S = 1_000_000.0  # simulated time 0 as UTC seconds


class WatchedStore(Store):
    """The store, which tells the watch what it has committed."""

    def __init__(self, path: Path, now: Callable[[], float], watch: Watch) -> None:
        super().__init__(path, now)
        self.watch = watch

    def begin_round(self, state: Round) -> None:
        self.watch.saving(state)
        super().begin_round(state)
        self.watch.saved(state)

    def save_round(self, state: Round, what: str, site: str = "") -> None:
        self.watch.saving(state)
        super().save_round(state, what, site)
        self.watch.saved(state)

    def close_round(self, state: Round, outcome: str, checkpoint: StoredCheckpoint | None) -> None:
        self.watch.saving(state)
        super().close_round(state, outcome, checkpoint)
        self.watch.saved(state)

    @property
    def engine(self) -> Engine:
        return self._engine


class WatchedCloser(RoundCloser):
    """The closer, which says which sum it opens."""

    watch: Watch

    def open(self, manifest: Manifest, state: Round, step: Step) -> tuple[RoundOutcome, StoredCheckpoint | None]:
        self.watch.opening(state)
        try:
            return super().open(manifest, state, step)
        except (CosiloError, OSError) as error:
            process = CURRENT.get()
            if process is not None and process.alive and not process.disk.full:
                self.watch.fail("sum", f"round {state.number} has all it needs and cannot be opened: {error!r}")
            raise


class WatchedConductor(Conductor):
    """The conductor, observed before and after every event while nothing is under way."""

    witness: Watch

    async def handle(self, run: bytes, event: Event, *more: Any, **named: Any) -> str:
        self._observe(run)
        try:
            return await super().handle(run, event, *more, **named)
        finally:
            self._observe(run)

    def _observe(self, run: bytes) -> None:
        if not self._runs[run].lock.locked():
            self.witness.observe(self, run)


class _Gate(Gate):
    """Knows the caller by its connection where the real one reads its certificate."""

    async def _expect(self, context: Any, *roles: Role) -> Peer:
        assert isinstance(context, Context)
        return context.caller


class _Members:
    """A members list that never changes; revocation is not simulated."""

    def version(self) -> int:
        return 1

    def data(self) -> bytes:
        return b"members"


class CoordinatorParty:
    """The coordinator over all its incarnations: what is on disk stays."""

    def __init__(self, root: Path, loop: asyncio.AbstractEventLoop, network: Network, watch: Watch, random: Random) -> None:
        self.disk = Disk(f"{root}/", random)
        self.watch = watch
        self.incarnations = 0
        self.process: Process | None = None
        self.conductor: WatchedConductor | None = None
        self.store: WatchedStore | None = None
        self._root = root
        self._loop = loop
        self._network = network
        root.mkdir()

    @property
    def up(self) -> bool:
        """Whether it serves."""
        return self._network.server is not None

    def found(self, manifests: list[Manifest]) -> None:
        """Stores the runs with their untrained weights, as RunRegistry does with the worker's."""
        store = Store(self._root / "state.db")
        artifacts = Artifacts(self._root / "artifacts")
        for manifest in manifests:
            table = manifest.tensor_table
            with artifacts.scratch(".safetensors") as path:
                with WeightsWriter(path, table) as writer:
                    writer.append(update_of(manifest.training.seed, table.size))
                weights = artifacts.put_file(path)
            encoding = round_encoding(manifest, RoundKind.TRAIN)
            aggregation = Aggregation(artifacts, table, encoding, manifest.server_optimiser, manifest.ema_decay)
            checkpoint = aggregation.initial(weights)
            run = manifest.digest()
            first = untrained_checkpoint(run, checkpoint, artifacts.size(weights), bool(manifest.ema_decay), EPOCH_S)
            store.add_run(run, manifest.canonical(), bytes(64), "admin", first)
            self.watch.manifests[run] = manifest
        store.close()

    def boot(self, on_death: Callable[[Process], None]) -> Process:
        """Starts a new incarnation on what the disk holds."""
        self.incarnations += 1
        self.process = Process("coordinator", self._loop, self.disk, on_death)
        self.process.start(self._serve(self.process), name="coordinator")
        return self.process

    async def _serve(self, process: Process) -> None:
        now = lambda: EPOCH_S + self._loop.time()  # noqa: E731
        self.store = store = WatchedStore(self._root / "state.db", now, self.watch)
        for run in self.watch.manifests:
            if (newest := store.newest_round(run)) is not None:
                self.watch.reopened(newest.state)
        artifacts, spool = Artifacts(self._root / "artifacts"), Spool(self._root / "spool")
        metrics = CoordinatorMetrics()
        closer = WatchedCloser(store, artifacts, spool, now)
        conductor = WatchedConductor(store, spool, closer, metrics, now)
        closer.watch = conductor.witness = self.watch
        self.conductor = conductor
        members: Any = _Members()
        gate = _Gate(FEDERATION, lambda _: True, lambda _: Removal.NOTHING, metrics)
        uploads = UploadDesk(conductor, store, spool, metrics)
        service = SiteService(
            gate=gate,
            conductor=conductor,
            store=store,
            artifacts=artifacts,
            uploads=uploads,
            members=members,
            authority=_no_authority(),
            metrics=metrics,
            streams_per_site=Limits().streams_per_site,
        )
        server = Server(process)
        service.add_to(server)  # type: ignore[arg-type]  # as much of a server as it needs
        try:
            await conductor.start()
        except CosiloError as error:  # systemd starts it again
            self.watch.trace(f"the coordinator does not start: {error}")
            process.die()
            return
        self._network.server = server

    async def stop(self) -> None:
        """Stops gracefully, as SIGTERM does: calls in flight end with their connections, then the conductor, then the store."""
        assert self.process is not None
        assert self.conductor is not None
        self._network.died(self.process, silently=False)
        stopping = self.process.start(self.conductor.stop(), name="stop")
        with contextlib.suppress(BaseException):
            await asyncio.wait({stopping})
        self.process.die()

    async def bury(self) -> None:
        """Waits until the dead incarnation is unwound."""
        assert self.process is not None
        await self.process.reap()
        if self.store is not None:
            self.store.engine.dispose()
        self.conductor = self.store = None

    def lose_power(self) -> None:
        """A power cut."""
        self.disk.lose_power()

    @property
    def root(self) -> Path:
        """Its data folder."""
        return self._root


def _no_authority() -> Any:
    """What renews certificates: no site asks it here, as connections have none."""
    return None
