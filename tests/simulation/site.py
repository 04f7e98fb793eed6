"""A site in the simulator: the real session, transport, participation, role and journal, in a process that can be killed.

Owns how they are put together (as cosilo_client.daemon does it, less TLS files and the HTTP port) and the person at the site who accepts
runs and permits models. Must not decide when the process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

import cosilo_client.session
from cosilo_client.artifacts import ArtifactCache
from cosilo_client.config import NetworkTable, PolicyTable
from cosilo_client.data import DataConfig
from cosilo_client.duties import Site
from cosilo_client.joining import refuse_unlisted
from cosilo_client.journal import Journal, _facts, open_ledger
from cosilo_client.ledger import RoundEntry
from cosilo_client.metrics import SiteMetrics
from cosilo_client.participation import Participation
from cosilo_client.policy import Refusal
from cosilo_client.session import Session
from cosilo_client.spending import Spending
from cosilo_client.trainer.jobs import Job, TrainJob
from cosilo_client.training import Training
from cosilo_client.transport import Transport
from cosilo_common.canonical import sha256
from cosilo_common.diffusion.seeding import site_seed
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.keys import InsecureFakeRandom
from tests.simulation.disk import Disk
from tests.simulation.network import Network
from tests.simulation.process import CURRENT, Process, outside
from tests.simulation.trainer import SimulatedTrainer, Temper
from tests.simulation.watch import Watch
from tests.simulation.wire import NOT_AFTER, Channel

NETWORK = NetworkTable(timeout_s=8.0, stall_s=15.0, backoff_min_s=0.5, backoff_max_s=8.0)
ACCEPTED_AT = "2026-01-01T00:00:00+00:00"
CACHE_BYTES = 1 << 30


def signing_key(name: str) -> Ed25519PrivateKey:
    """The same key for the same name."""
    return Ed25519PrivateKey.from_private_bytes(sha256(f"signing key of {name}".encode()))


class SiteParty:
    """One site over all its incarnations. seed: of its cryptographic randomness, which no two incarnations share."""

    def __init__(
        self,
        name: str,
        root: Path,
        loop: asyncio.AbstractEventLoop,
        network: Network,
        watch: Watch,
        temper: Temper,
        manifests: list[Manifest],
        seed: str,
    ) -> None:
        self.name = name
        self.root = root
        self.random = Random(f"{seed}/{name}")
        self.disk = Disk(f"{root}/", self.random)
        self.manifests = manifests
        self.policy = PolicyTable(allow_insecure_plain_sum=True)
        self.incarnations = 0
        self.process: Process | None = None
        self.journal: Journal | None = None
        self.willing = True  # at this hour
        self._key = signing_key(name)
        self._seed = seed
        self._loop = loop
        self._network = network
        self._watch = watch
        self._temper = temper
        self._trained: set[tuple[bytes, int]] = set()
        root.mkdir()

    def accept(self, manifest: Manifest) -> None:
        """`cosilo-site accept`, by a person, while the daemon may be running."""
        with outside():
            ledger = open_ledger(self.root)
            run, keys = manifest.digest(), manifest.participant_keys()
            ledger.accept(run, manifest.canonical(), bytes(64), keys, accepted_at=ACCEPTED_AT, accepted_by="person")
            ledger._engine.dispose()

    def permit(self, base_digest: bytes) -> None:
        """A person looks at what R8 refuses, and allows one round more for the base model."""
        if self.journal is None:
            return
        with outside():
            ledger = self.journal.ledger  # as the command would open it: another connection to the same file
            done = len(ledger.model_uploads(base_digest))
            if done and done >= ledger.permitted_rounds(base_digest):
                ledger.permit_model(base_digest, done + 1, permitted_at=ACCEPTED_AT)

    def entry(self, run: bytes, round_: int) -> RoundEntry | None:
        """The ledger's entry of a round."""
        assert self.journal is not None
        return self.journal.ledger.round(run, round_)

    def permitted(self, base_digest: bytes) -> int:
        """What a person allowed for a base model."""
        assert self.journal is not None
        return self.journal.ledger.permitted_rounds(base_digest)

    def boot(self, on_death: Callable[[Process], None]) -> Process:
        """Starts a new incarnation on what the disk holds."""
        self.incarnations += 1
        self.process = Process(self.name, self._loop, self.disk, on_death)
        self.process.start(self._run(self.process), name=self.name)
        return self.process

    async def _run(self, process: Process) -> None:
        randomness = InsecureFakeRandom(f"{self._seed}/{self.name}/{self.incarnations}")
        public = self._key.public_key().public_bytes_raw()
        try:
            journal = Journal.open(self.root, site_key=public, randomness=randomness)
        except CosiloError as error:
            self._watch.fail("recovery", f"{self.name} does not start again: {error}")
            return
        self.journal = journal
        metrics = SiteMetrics()
        membership = SimpleNamespace(address="simulated", name=self.name, federation="simulated")
        nowhere = SimpleNamespace(certificate=self.root / "tls.crt", ca=self.root / "ca.crt")  # certificates are not simulated
        identity: Any = SimpleNamespace(membership=membership, tls=nowhere, take_trust=lambda data: None)
        self.session = session = Session(
            identity=identity,
            cache=ArtifactCache(self.root / "artifacts", CACHE_BYTES),
            network=NETWORK,
            metrics=metrics,
            on_snapshot=lambda snapshot: self.participation.owe(snapshot),
            on_members=lambda data: None,
            random=Random(self.random.random()),
        )
        trainer = SimulatedTrainer(self.random, self._temper, self.manifests[0].tensor_table, self._training_starts)
        spending = Spending(self.root)
        data = DataConfig(kind="digits")
        self.participation = Participation(
            Site(
                name=self.name,
                key=self._key,
                journal=journal,
                coordinator=session,
                training=Training(self.name, journal, session, trainer, data, 1, spending, metrics),
                spending=spending,
                policy=self.policy,
                accept=self._refuse(),
                local_time=lambda: time(12),
                role_lock=asyncio.Lock(),
                randomness=randomness,
            )
        )
        await session.run()

    def _refuse(self) -> Callable[[bytes], Awaitable[Refusal | None]]:
        async def refuse(run: bytes) -> Refusal | None:
            return refuse_unlisted(run)

        return refuse

    def _training_starts(self, job: Job) -> None:
        """A site trains a round once, whatever is killed, unless what it trained was lost (R4, R8)."""
        if not isinstance(job, TrainJob) or self.process is None or not self.process.alive:
            return
        facts = job.update.parent / "update.json"
        found = _facts(facts.read_bytes()) if facts.exists() else None
        if found is not None and site_seed(found.round, self.name, job.training.seed) == job.seed and job.update.exists():
            self._watch.fail("trained", f"{self.name} trains again though its update is on disk")

    async def stop(self) -> None:
        """Stops gracefully, as SIGTERM does."""
        assert self.process is not None
        if hasattr(self, "participation"):
            closing = self.process.start(self.participation.close(), name="stop")
            with contextlib.suppress(BaseException):
                await asyncio.wait({closing})
        self.process.die()

    async def bury(self) -> None:
        """Waits until the dead incarnation is unwound."""
        assert self.process is not None
        await self.process.reap()
        if self.journal is not None:
            self.journal._engine.dispose()
            self.journal = None

    def lose_power(self) -> None:
        """A power cut, and after it what no program could have changed is as it was: change times."""
        self.disk.lose_power()
        for old, new in self.disk.renumbered.items():
            self._renumber(old, new)
        self.disk.renumbered.clear()

    def _renumber(self, old_ns: int, new_ns: int) -> None:
        """The change time of a file whose renaming was undone is the old one again: here the ledger is told the new one instead."""
        with outside():
            ledger = open_ledger(self.root)
            with ledger._engine.begin() as connection:
                connection.execute(text("UPDATE incarnation SET changed_ns = :new WHERE changed_ns = :old"), {"new": new_ns, "old": old_ns})
            ledger._engine.dispose()


def patches(network: Network) -> list[tuple[Any, str, Any]]:
    """Where the simulated wire stands in the session: (module, name, what stands there)."""

    class SimulatedTransport(Transport):
        @classmethod
        def open(cls, address: str, tls: Any, *, timeout_s: float, stall_s: float, proxy: Any = None) -> Any:
            process = CURRENT.get()
            assert process is not None
            return cls(Channel(network, process), timeout_s=timeout_s, stall_s=stall_s)  # type: ignore[arg-type]  # as much as it needs

    return [
        (cosilo_client.session, "Transport", SimulatedTransport),
        (cosilo_client.session, "check_tls_files", lambda tls, now: SimpleNamespace(not_after=NOT_AFTER)),
        (cosilo_client.session, "renewal_due", lambda identity, now: False),
        (cosilo_client.session, "superseded", lambda identity: False),
        (cosilo_client.session, "version", lambda name: "simulated"),
        (cosilo_client.session, "datetime", _Clock),
    ]


class _Clock:
    @staticmethod
    def now(_zone: object) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)
