"""Sites without a network: real participation, roles and journals against the real round machine, in one event loop.

The coordinator is the machine and its verification with a dictionary for a disk; only transfers and the trainer process
are left out. A site can be stopped at a named call, before or after it took effect, which is how it is "killed" there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_client.config import PolicyTable
from cosilo_client.coordinator import OnBytes, Refused, SignedRun, UploadHeader
from cosilo_client.data import DataConfig
from cosilo_client.duties import Site
from cosilo_client.joining import refuse_unlisted
from cosilo_client.journal import Journal
from cosilo_client.metrics import SiteMetrics
from cosilo_client.owed import Activity, Decline, Owed, Phase, Progress
from cosilo_client.participation import Participation
from cosilo_client.pause import Pause
from cosilo_client.policy import Refusal
from cosilo_client.spending import Spending
from cosilo_client.trainer.jobs import EvaluateJob, Job, Result, TrainJob
from cosilo_client.trainer.jobs import Progress as TrainerProgress
from cosilo_client.training import Training
from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest, Participant
from cosilo_common.secagg.messages import RoundKind, Signed
from cosilo_common.secagg.messages import Upload as UploadBody
from cosilo_server.rounds import events, machine, state
from cosilo_server.rounds.assignments import assignment_for
from cosilo_server.store import terms_of
from cosilo_server.verification import is_repeat, verified_event, verified_upload
from tests.protocol.manifests import a_manifest

WEIGHTS = bytes(192)  # as long as a safetensors file of these two tensors; only the fake trainer gets it
CHECKPOINT = sha256(b"the next weights")


def signing_key(name: str) -> Ed25519PrivateKey:
    """The same key for the same name."""
    return Ed25519PrivateKey.from_private_bytes(sha256(f"signing key of {name}".encode()))


def manifest_of(names: tuple[str, ...], **changes: object) -> Manifest:
    """A run of these sites: 16 values, 5 loss words."""
    participants = tuple(Participant(name=n, key=signing_key(n).public_key().public_bytes_raw().hex()) for n in names)
    base = a_manifest(participants).model_dump(mode="json")
    return Manifest.model_validate({**base, **changes})


class CountingTrainer:
    """Writes an update at once. failure: raised instead, as often as it is asked."""

    def __init__(self) -> None:
        self.restarts = 0
        self.jobs: list[Job] = []
        self.failure: CosiloError | None = None
        self.cancelled = 0
        self.hold: asyncio.Event | None = None

    async def run(self, job: Job, on_progress: Callable[[TrainerProgress], None]) -> Result:
        self.jobs.append(job)
        on_progress(TrainerProgress(tenths=5, images=50, images_per_second=10.0, loss=0.5))
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.failure is not None:
            raise self.failure
        if isinstance(job, TrainJob):
            job.update.write_bytes(np.linspace(-0.1, 0.1, 16, dtype="<f4").tobytes())
        return Result(
            weight=9000,
            heldout_losses=(1.0, 2.0, 3.0, 4.0),
            train_loss=0.0 if isinstance(job, EvaluateJob) else 0.25,
            steps=2,
            images=100,
            seconds=7.0,
            images_per_second=14.0,
            gpu_memory_bytes=0,
            device="cpu",
            skipped=0,
        )


@dataclass
class MemoryCoordinator:
    """The round machine with its verification; tells every site what it owes after each step."""

    manifest: Manifest
    state: state.Round | None = None
    sites: dict[str, MemorySite] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    now: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def start(self, number: int = 1, kind: RoundKind = RoundKind.TRAIN) -> None:
        """Begins a round with every site that is up."""
        self.uploads.clear()
        self.state, _ = machine.begin(
            run=self.manifest.digest(),
            number=number,
            kind=kind,
            terms=terms_of(self.manifest),
            base_digest=sha256(WEIGHTS),
            base_bytes=len(WEIGHTS),
            encoding=round_encoding(self.manifest, kind).canonical(),
            seed=bytes(32),
            connected=[name for name, site in self.sites.items() if site.is_up],
            now=self.now,
        )
        self.tell()

    def handle(self, event: events.Event) -> None:
        """One event, and what follows from it."""
        assert self.state is not None
        before = self.state
        self.state, effects = machine.step(self.state, event, self.now)
        for effect in effects:
            if isinstance(effect, events.Refuse):
                raise Refused("submit", effect.reason, "FAILED_PRECONDITION")
            if isinstance(effect, events.OpenSum):
                self.state, _ = machine.step(self.state, events.SumOpened(CHECKPOINT), self.now)
        if before != self.state:
            self.tell()

    def tell(self) -> None:
        """Everything that each site owes, whole."""
        for name, site in self.sites.items():
            if site.is_up and not site.deaf:
                site.participation.owe(self.owed(name))

    def owed(self, name: str) -> list[Owed]:
        """What a site owes."""
        if self.state is None:
            return []
        found = assignment_for(self.state, name)
        fields = {**vars(found), "phase": Phase[found.phase.name]}
        return [Owed(**fields)]

    def submit(self, site: str, message: bytes) -> None:
        assert self.state is not None
        signed = Signed.decode(message)
        self.counts[f"{site}:{signed.type}"] += 1
        if not is_repeat(self.state, site, message):
            self.handle(verified_event(self.manifest, self.state, signed))

    def upload(self, site: str, header: UploadHeader, data: bytes) -> None:
        assert self.state is not None
        signed = Signed.decode(header.statement)
        stored = self.state.sites[site].upload
        if stored is not None and stored.statement == header.statement:
            return
        body: UploadBody = verified_upload(self.manifest, self.state, signed)
        assert (sha256(data), len(data)) == (body.digest, body.size_bytes)
        self.uploads[site] = data
        self.handle(events.UploadReceived(site, signed.attempt, state.Upload(header.statement, body.digest, len(data))))

    @property
    def phase(self) -> str:
        return self.state.phase.value if self.state is not None else ""

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Returns when a condition of the federation holds; there is no event to wait for that covers them all."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_phase(self, phase: str) -> None:
        await self.until(lambda: self.phase == phase)


class MemorySite:
    """One site: its folder outlives it, its participation does not."""

    def __init__(self, name: str, folder: Path, coordinator: MemoryCoordinator, policy: PolicyTable | None = None) -> None:
        self.name = name
        self.folder = folder
        self.coordinator = coordinator
        self.policy = policy or PolicyTable()
        self.trainer = CountingTrainer()
        self.said: list[Progress | Decline] = []
        self.stop_at = ""
        self.stopped = asyncio.Event()
        self.fetches = 0
        self.fetch_forced: list[bool] = []
        self.is_up = False
        self.deaf = False  # the test itself says what this site owes
        self.hour = time(12, 0)
        self.pause: Pause | None = None
        self.weights = folder.parent / "weights"
        self.weights.write_bytes(WEIGHTS)
        coordinator.sites[name] = self

    def up(self) -> None:
        """Starts the site on whatever its folder holds."""
        key = signing_key(self.name)
        self.journal = Journal.open(self.folder, site_key=key.public_key().public_bytes_raw())
        spending, metrics = Spending(self.folder), SiteMetrics()
        self.metrics = metrics
        training = Training(self.name, self.journal, self, self.trainer, DataConfig(kind="digits"), 1, spending, metrics)
        self.participation = Participation(
            Site(
                name=self.name,
                key=key,
                journal=self.journal,
                coordinator=self,
                training=training,
                spending=spending,
                policy=self.policy,
                accept=self._accept,
                local_time=lambda: self.hour,
                role_lock=asyncio.Lock(),
                pause=lambda: self.pause,
            )
        )
        self.is_up = True
        if self.coordinator.state is not None and not self.coordinator.state.ended:
            self.coordinator.handle(events.Connected(self.name))
        self.participation.owe(self.coordinator.owed(self.name))

    def accept(self) -> None:
        """`cosilo-site accept`, by a person."""
        manifest = self.coordinator.manifest
        self.journal.ledger.accept(
            manifest.digest(),
            manifest.canonical(),
            bytes(64),
            manifest.participant_keys(),
            accepted_at="2026-01-01T00:00:00+00:00",
            accepted_by="person",
        )

    async def down(self) -> None:
        """Ends the site, as a kill does: what is on disk stays."""
        self.is_up = False
        await self.participation.close()
        self.journal.close()

    async def restart(self) -> None:
        """Down and up again."""
        await self.down()
        self.stop_at = ""
        self.stopped.clear()
        self.up()

    def declines(self) -> list[str]:
        """The names of the codes declined with, each once, in order."""
        return list(dict.fromkeys(said.code.name for said in self.said if isinstance(said, Decline)))

    def activities(self) -> list[Activity]:
        """What was said of the work, without repeats in a row."""
        found: list[Activity] = []
        for said in self.said:
            if isinstance(said, Progress) and found[-1:] != [said.activity]:
                found.append(said.activity)
        return found

    # The Coordinator that participation asks

    async def fetch(self, owed: Owed, forced: bool, on_bytes: OnBytes) -> Path:
        async with self._stop("fetch"):
            self.fetches += 1
            self.fetch_forced.append(forced)
            on_bytes(owed.base_bytes)
        return self.weights

    async def fetch_base(self, run: bytes, digest: bytes, size_bytes: int, on_bytes: OnBytes) -> Path:
        raise AssertionError("no test of these has adapters")

    async def put(self, header: UploadHeader, spool: Path, on_bytes: OnBytes) -> None:
        async with self._stop("put"):
            self.coordinator.upload(self.name, header, spool.read_bytes())
            on_bytes(spool.stat().st_size)

    async def submit(self, message: bytes) -> None:
        try:
            async with self._stop(Signed.decode(message).type.value):
                self.coordinator.submit(self.name, message)
        except Refused:
            raise
        except CosiloError as error:
            raise Refused("submit", str(error), "FAILED_PRECONDITION") from None

    async def manifest(self, run: bytes) -> SignedRun:
        raise AssertionError("no test of these asks")

    def say(self, said: Progress | Decline) -> None:
        self.said.append(said)
        if self.coordinator.state is None or self.coordinator.state.ended:
            return
        if isinstance(said, Decline):
            event: events.Event = events.Declined(self.name, state.DeclineCode[said.code.name])
        else:
            event = events.Progressed(self.name, state.Activity[said.activity.name], said.tenths, said.bytes_moved)
        asyncio.get_running_loop().call_soon(self._tell, event)  # a stream is not a call: nobody waits for it

    async def _accept(self, run: bytes) -> Refusal | None:
        return refuse_unlisted(run)

    def _tell(self, event: events.Event) -> None:
        if self.coordinator.state is not None and not self.coordinator.state.ended:
            self.coordinator.handle(event)

    def _stop(self, call: str) -> _Stop:
        return _Stop(self, call)


class _Stop:
    """Stands still for ever before or after a named call, once the test asked for it."""

    def __init__(self, site: MemorySite, call: str) -> None:
        self._site = site
        self._call = call

    async def __aenter__(self) -> None:
        await self._stand("before")

    async def __aexit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            await self._stand("after")

    async def _stand(self, when: str) -> None:
        if self._site.stop_at == f"{when} {self._call}":
            self._site.stopped.set()
            await asyncio.Event().wait()
