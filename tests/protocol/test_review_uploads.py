"""Attacks of one site on its own upload (R4, phase-4): what the round counts on is not replaced, and no call leaves anything open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.framing import frame_data
from cosilo_common.manifest import PLAIN_AGGREGATION, Manifest
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Advert, MessageType, RoundKind, Signed, Upload, sign
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_common.transfer import Refusal, TransferError
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.rounds import machine
from cosilo_server.rounds.events import AdvertReceived, Event, Refuse
from cosilo_server.rounds.state import Phase, Round
from cosilo_server.services import uploads
from cosilo_server.services.uploads import UploadDesk
from cosilo_server.spool import Spool
from cosilo_server.store import Store, terms_of
from cosilo_server.trace import RoundTrace
from tests.integration.memory_rounds import manifest_of, signing_key

SITES = ("anna", "beda", "mallory")
BASE = sha256(b"the base model")


class OneRound:
    """A conductor of one plain round that waits for three uploads; the machine and its verification are real."""

    def __init__(self) -> None:
        self._manifest = manifest_of(SITES, aggregation=PLAIN_AGGREGATION, n_min=3, f=0)
        self.run = self._manifest.digest()
        encoding = round_encoding(self._manifest, RoundKind.TRAIN)
        self.state, _ = machine.begin(
            run=self.run, number=1, kind=RoundKind.TRAIN, terms=terms_of(self._manifest), base_digest=BASE, base_bytes=192,
            encoding=encoding.canonical(), seed=bytes(32), connected=SITES, now=0.0,
        )  # fmt: skip
        for name in SITES:
            advert = Advert(RoundKind.TRAIN, BASE, encoding.digest(), b"", b"")
            self.step(AdvertReceived(name, 1, self.signed(MessageType.ADVERT, advert, name).encode()))
        assert self.state.phase is Phase.UPLOADING
        self.size = encoding.wire_bytes
        self.trace = RoundTrace(None, lambda: 0.0)  # type: ignore[arg-type]  # nothing of it is stored

    def signed(self, type_: MessageType, body: Advert | Upload, name: str = "mallory") -> Signed:
        return sign(signing_key(name), type_, self.run, 1, 1, name, body)

    def step(self, event: Event) -> str:
        self.state, effects = machine.step(self.state, event, 1.0)
        return next((effect.reason for effect in effects if isinstance(effect, Refuse)), "")

    def manifest(self, run: bytes) -> Manifest | None:
        return self._manifest

    def round(self, run: bytes) -> Round | None:
        return self.state

    async def handle(self, run: bytes, event: Event, number: int | None = None) -> str:
        assert number == 1
        return self.step(event)


class Desk:
    """The desk under attack, and its spool on a disk."""

    def __init__(self, folder: Path) -> None:
        self.round = OneRound()
        self.spool = Spool(folder / "spool")
        self.desk = UploadDesk(self.round, Store(folder / "state.db"), self.spool, CoordinatorMetrics())  # type: ignore[arg-type]  # as much of a conductor as it asks
        self.path = self.spool.path(self.round.run.hex(), 1, "mallory")

    def payload(self, fill: bytes) -> bytes:
        return fill * self.round.size

    def header(self, payload: bytes) -> bytes:
        statement = self.round.signed(MessageType.UPLOAD, Upload(sha256(payload), len(payload))).encode()
        header = site_pb2.PutUpdateHeader(run=self.round.run, round=1, attempt=1, statement=statement)
        return site_pb2.PutUpdateRequest(header=header).SerializeToString()

    async def put(self, payload: bytes) -> list[site_pb2.PutUpdateResponse]:
        return [response async for response in self.desk.receive("mallory", stream(self.header(payload), frame_data(payload)))]

    def open_files(self) -> list[str]:
        return [target for fd in Path("/proc/self/fd").iterdir() if (target := link(fd)).startswith(str(self.path))]


def link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # the listing's own descriptor
        return ""


async def stream(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_an_upload_that_counts_is_not_replaced(desk: Desk) -> None:
    """R4: a second statement in the attempt is refused at its header. Its bytes would take the place of those that the others' consents
    are about, and the round would be abandoned when everybody has revealed."""
    first, second = desk.payload(b"\x01"), desk.payload(b"\x02")
    assert [r.stored for r in await desk.put(first)] == [False, True]
    with pytest.raises(ProtocolViolation) as caught:
        await desk.put(second)
    assert caught.value.rule == "R4"
    assert desk.path.read_bytes() == first
    assert [r.stored for r in await desk.put(first)] == [False, True]  # the same statement again is no attack


async def test_an_upload_that_a_crash_left_whole_is_synced_before_it_is_acknowledged(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between the renaming and the sync of its folder leaves a name that a power cut may take: the next one, which
    finds the upload there, makes it last before it says that it has it. Found by the simulator's rule "durable"."""
    payload, synced = desk.payload(b"\x01"), list[Path]()
    desk.path.parent.mkdir(parents=True)
    desk.path.write_bytes(payload)
    monkeypatch.setattr(uploads, "sync_folder", synced.append)
    answers = desk.desk.receive("mallory", stream(desk.header(payload)))
    assert (await anext(answers)).resume_offset == len(payload)
    assert synced == [desk.path.parent]
    assert (await anext(answers)).stored


async def test_one_upload_at_a_time(desk: Desk) -> None:
    """phase-4: each statement that a site signs would have a file of its own, whatever the disk holds."""
    first, second = desk.payload(b"\x01"), desk.payload(b"\x02")
    queue: asyncio.Queue[bytes] = asyncio.Queue()

    async def slow() -> AsyncIterator[bytes]:
        yield desk.header(first)
        yield await queue.get()

    call = desk.desk.receive("mallory", slow())
    assert (await anext(call)).resume_offset == 0
    with pytest.raises(TransferError) as caught:
        await desk.put(second)
    assert caught.value.refusal is Refusal.BUSY
    queue.put_nowait(frame_data(first))
    assert (await anext(call)).stored
    await call.aclose()
    assert desk.path.read_bytes() == first
    assert desk.round.state.sites["mallory"].upload is not None


async def test_a_call_given_up_at_its_answer_leaves_nothing_open(desk: Desk) -> None:
    """phase-4: the descriptor and the lock go with the call, or a site could have as many as it likes and block itself besides."""
    payload = desk.payload(b"\x01")
    for _ in range(3):
        call = desk.desk.receive("mallory", stream(desk.header(payload)))
        await anext(call)
        assert len(desk.open_files()) == 1
        await call.aclose()
        assert desk.open_files() == []
    assert [r.stored for r in await desk.put(payload)] == [False, True]
