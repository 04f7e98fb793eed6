"""What travels: every message that real site daemons send is recorded at the coordinator's port, decoded and held against DESIGN.md.

"What the coordinator may know of one site: its name, address, phase, progress in tenths, bytes." Beside that only the protocol's own signed
messages and masked uploads may travel, and a masked upload must look like random bytes.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from cosilo_common.encoding import Encoding, Section
from cosilo_common.identity.names import peer_from_certificate
from cosilo_common.manifest import Manifest, parse_manifest
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Advert, Complaint, Consent, MessageType, Reveal, Shares, Signed, Upload
from cosilo_server.config import CoordinatorConfig
from cosilo_server.coordinator import Coordinator
from tests.federation.digits import digits_sites
from tests.federation.local import COORDINATOR, START_TIMEOUT_S, LocalFederation
from tests.integration.coordinator_world import EvaluationHere

Answer = TypeVar("Answer")

SERVICE = "/cosilo.v1.SiteService/"
SITES = 4
STEPS, BATCH = 4, 32
CLIP, CAP = 1.0, 1024

# Every field that a site may set, by message. A new field of the wire is a new line here, and somebody's decision.
ALLOWED: dict[str, set[str]] = {
    "AttendRequest": {"hello", "progress", "decline"},
    "Hello": {"protocol_version", "software"},
    "Progress": {"run", "round", "activity", "tenths", "bytes"},
    "Decline": {"run", "round", "code"},
    "GetArtifactRequest": {"digest", "offset"},
    "PutUpdateRequest": {"data", "header"},
    "PutUpdateHeader": {"run", "round", "attempt", "statement"},
    "SubmitRequest": {"message"},
    "GetRunRequest": {"run"},
    "ListMyRunsRequest": set(),
    "GetMembersRequest": set(),
}
METHODS: dict[str, type[Message]] = {
    "Attend": site_pb2.AttendRequest,
    "GetArtifact": site_pb2.GetArtifactRequest,
    "PutUpdate": site_pb2.PutUpdateRequest,
    "Submit": site_pb2.SubmitRequest,
    "GetRun": site_pb2.GetRunRequest,
    "ListMyRuns": site_pb2.ListMyRunsRequest,
    "GetMembers": site_pb2.GetMembersRequest,
}
BODIES: dict[MessageType, Any] = {
    MessageType.ADVERT: Advert,
    MessageType.SHARES: Shares,
    MessageType.COMPLAINT: Complaint,
    MessageType.UPLOAD: Upload,
    MessageType.CONSENT: Consent,
    MessageType.REVEAL: Reveal,
}


@dataclass(frozen=True)
class Sent:
    """One message as it came: bytes and all. call: one number for each call."""

    site: str
    method: str
    call: int
    data: bytes

    @property
    def message(self) -> Any:
        return METHODS[self.method].FromString(self.data)


@dataclass
class Recorder(grpc.aio.ServerInterceptor):
    """Writes down what comes in, before the coordinator's own code sees it."""

    sent: list[Sent] = field(default_factory=list)
    headers: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        method = str(details.method)
        if handler is None or not method.startswith(SERVICE):
            return handler
        return _recording(handler, method.removeprefix(SERVICE), self)

    def note(self, method: str, call: int, context: Any, data: bytes) -> None:
        (pem,) = context.auth_context()["x509_pem_cert"]
        self.sent.append(Sent(peer_from_certificate(bytes(pem)).name.name, method, call, data))

    def begin(self, context: Any) -> int:
        self.calls += 1
        self.headers += [(str(key), str(value)) for key, value in context.invocation_metadata()]
        return self.calls


def _recording(handler: Any, method: str, recorder: Recorder) -> Any:
    """The handler, which now takes its requests as bytes, has them noted, and only then parses them."""
    parse = handler.request_deserializer or (lambda data: data)

    async def noted(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        call = recorder.begin(context)
        async for data in requests:
            recorder.note(method, call, context, data)
            yield parse(data)

    def one(data: bytes, context: Any) -> Any:
        recorder.note(method, recorder.begin(context), context, data)
        return parse(data)

    if handler.request_streaming:
        inner = handler.stream_stream

        async def stream_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async for answer in inner(noted(requests, context), context):
                yield answer

        return grpc.stream_stream_rpc_method_handler(stream_stream, None, handler.response_serializer)
    if handler.response_streaming:
        stream = handler.unary_stream

        async def unary_stream(data: bytes, context: Any) -> AsyncIterator[Any]:
            async for answer in stream(one(data, context), context):
                yield answer

        return grpc.unary_stream_rpc_method_handler(unary_stream, None, handler.response_serializer)
    unary = handler.unary_unary

    async def unary_unary(data: bytes, context: Any) -> Any:
        return await unary(one(data, context), context)

    assert inspect.iscoroutinefunction(unary)
    return grpc.unary_unary_rpc_method_handler(unary_unary, None, handler.response_serializer)


class ListeningFederation(LocalFederation):
    """A local federation whose coordinator runs in this process, on a thread and an event loop of its own, with the recorder at its port."""

    def __init__(self, root: Path, recorder: Recorder, **more: Any) -> None:
        super().__init__(root, digits_sites(root, SITES, alpha=0.5, least=200, seed=1), **more)
        self.recorder = recorder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=COORDINATOR)
        self._coordinator: Coordinator | None = None

    def _start_and_wait(self, who: str) -> None:
        if who != COORDINATOR:
            super()._start_and_wait(who)
            return
        self._thread.start()
        config = CoordinatorConfig.read(self.config(COORDINATOR))
        config.paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._coordinator = Coordinator(config)
        self._await(self._coordinator.start())

    def stop(self) -> None:
        super().stop()
        coordinator, self._coordinator = self._coordinator, None
        if coordinator is not None:
            self._await(coordinator.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_TIMEOUT_S)
            self._loop.close()

    def _await(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_TIMEOUT_S)


@dataclass
class Recorded:
    """Two runs that are one training, a round each; and two rehearsals of the first, whose update is all zeros."""

    federation: LocalFederation
    sent: list[Sent]
    headers: list[tuple[str, str]]
    runs: tuple[str, str]
    manifests: dict[bytes, Manifest]
    losses: dict[str, float]  # each site's own, of its last training

    def uploads(self, run: str, number: int) -> dict[str, bytes]:
        """Every site's upload in a round, whole."""
        found: dict[str, bytes] = {}
        for sent in self.sent:
            header = sent.message.header if sent.method == "PutUpdate" and sent.message.WhichOneof("what") == "header" else None
            if header is not None and (header.run.hex(), header.round) == (run, number):
                assert sent.site not in found, "one call was enough"
                found[sent.site] = b"".join(s.message.data for s in self.sent if s.call == sent.call)
        return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    recorder, build = Recorder(), grpc.aio.server
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosilo_server.coordinator.Evaluation", EvaluationHere)
        patch.setattr(grpc.aio, "server", lambda *, interceptors=(), **more: build(interceptors=[*interceptors, recorder], **more))
        with ListeningFederation(tmp_path_factory.mktemp("wire"), recorder) as federation:
            federation.start()
            first, second = (
                federation.create_run(
                    {
                        "name": name,
                        "preset": "digits",
                        "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
                        "training": {"local_epochs": 1, "batch_size": BATCH, "max_steps": STEPS, "seed": 7},
                        "encoding": {"clip": CLIP, "cap": CAP},
                    }
                )
                for name in ("first", "second")
            )
            rounds = []
            for run in (first, second):
                federation.accept_all(run)
                rounds += federation.run_rounds(run, 1)
            losses = {site: federation.metric(site, "cosilo_training_loss") for site in federation.sites}
            rounds += federation.run_rounds(first, 2, "--rehearsal")[1:]
            assert [(r["kind"], r["phase"], len(r["survivors"])) for r in rounds] == [("train", "closed", SITES)] * 2 + [
                ("rehearsal", "closed", SITES)
            ] * 2
            assert rounds[0]["checkpoint"] == rounds[1]["checkpoint"], "the two runs are one training"
            manifests = {bytes.fromhex(run): _manifest(federation, run) for run in (first, second)}
            yield Recorded(federation, list(recorder.sent), list(recorder.headers), (first, second), manifests, losses)


def _manifest(federation: LocalFederation, run: str) -> Manifest:
    coordinator = federation._coordinator if isinstance(federation, ListeningFederation) else None
    assert coordinator is not None
    manifest = coordinator.conductor.manifest(bytes.fromhex(run))
    assert manifest is not None
    return parse_manifest(manifest.canonical())


def test_the_recorder_hears_every_kind_of_message_from_every_site(recorded: Recorded) -> None:
    sites = set(recorded.federation.sites)
    for method in ("Attend", "GetArtifact", "PutUpdate", "Submit", "GetRun", "GetMembers"):
        assert {sent.site for sent in recorded.sent if sent.method == method} == sites, method
    kinds = {(sent.site, Signed.decode(sent.message.message).type) for sent in recorded.sent if sent.method == "Submit"}
    assert kinds >= {(site, kind) for site in sites for kind in (MessageType.ADVERT, MessageType.SHARES, MessageType.CONSENT)}


def test_only_the_allowed_fields_travel(recorded: Recorded) -> None:
    assert {sent.method for sent in recorded.sent} <= METHODS.keys()
    for sent in recorded.sent:
        _check_fields(sent.message)
        assert sent.message.SerializeToString() == sent.data, "nothing beside the fields"


def _check_fields(message: Message) -> None:
    allowed = ALLOWED[message.DESCRIPTOR.name]
    assert {name.name for name in message.DESCRIPTOR.fields} == allowed, "a new field of the wire"
    assert len(UnknownFieldSet(message)) == 0
    for descriptor, value in message.ListFields():
        assert descriptor.name in allowed
        if isinstance(value, Message):
            _check_fields(value)


def test_what_a_site_says_of_itself_is_phase_tenths_and_bytes(recorded: Recorded) -> None:
    manifest = next(iter(recorded.manifests.values()))
    largest = max(_encoding(manifest).wire_bytes, max(r["bytes"] for r in recorded.federation.checkpoints(recorded.runs[0])))
    activities = set(site_pb2.SiteActivity.values()) - {site_pb2.SITE_ACTIVITY_UNSPECIFIED}
    said = [sent.message for sent in recorded.sent if sent.method == "Attend"]
    assert {one.WhichOneof("what") for one in said} == {"hello", "progress"}
    for hello in (one.hello for one in said if one.HasField("hello")):
        assert hello.protocol_version == 1
        assert re.fullmatch(r"cosilo-site \d+(\.\d+)+", hello.software)
    for progress in (one.progress for one in said if one.HasField("progress")):
        assert progress.run in recorded.manifests
        assert progress.activity in activities
        assert 0 <= progress.tenths <= 10
        transfer = progress.activity in (site_pb2.SITE_ACTIVITY_FETCHING, site_pb2.SITE_ACTIVITY_UPLOADING)
        assert 0 <= progress.bytes <= (largest if transfer else 0)


def test_what_is_submitted_is_a_protocol_message_and_nothing_else(recorded: Recorded) -> None:
    for sent in recorded.sent:
        if sent.method == "Submit":
            signed = _strictly_signed(sent, sent.message.message)
            assert signed.type is not MessageType.UPLOAD
        elif sent.method == "PutUpdate" and sent.message.WhichOneof("what") == "header":
            signed = _strictly_signed(sent, sent.message.header.statement)
            body = Upload.decode(signed.body)
            assert body.size_bytes == _encoding(recorded.manifests[signed.run]).wire_bytes


def _strictly_signed(sent: Sent, data: bytes) -> Signed:
    """The message, whose bytes are all accounted for: an envelope, one body, one deterministic signature."""
    signed = Signed.decode(data)
    assert signed.encode() == data
    assert signed.site == sent.site
    assert BODIES[signed.type].decode(signed.body).encode() == signed.body
    return signed


def test_the_headers_of_a_call_say_nothing_of_the_site(recorded: Recorded) -> None:
    assert {key for key, _ in recorded.headers} == {"user-agent"}
    assert all(re.fullmatch(r"grpc-python-asyncio/[\d.]+ grpc-c/[\d.]+ \(linux; chttp2\)", value) for _, value in recorded.headers)


def test_no_loss_file_name_or_path_is_among_the_bytes(recorded: Recorded) -> None:
    everything = b"\n".join(sent.data for sent in recorded.sent)
    assert recorded.losses.keys() == recorded.federation.sites.keys()
    for loss in recorded.losses.values():
        assert 0 < loss < 16
        assert f"{loss:.4f}".encode() not in everything
        assert all(struct.pack(form, loss) not in everything for form in ("<d", ">d", "<f", ">f"))
    for spec in recorded.federation.sites.values():
        index_file = Path(str(spec.data["index_file"]))
        for word in (index_file.name, str(index_file.parent), "digits", "sklearn", "images"):
            assert word.encode() not in everything, word


def test_a_masked_upload_of_zeros_looks_like_random_bytes(recorded: Recorded) -> None:
    for number in (2, 3):
        uploads = recorded.uploads(recorded.runs[0], number)
        assert uploads.keys() == recorded.federation.sites.keys()
        for site, data in uploads.items():
            _check_random(np.frombuffer(data, np.uint8), f"{site}, round {number}")
        _check_random(np.frombuffer(b"".join(uploads.values()), np.uint8), f"round {number}")


def test_an_upload_that_is_not_masked_would_not(recorded: Recorded) -> None:
    encoding = _encoding(next(iter(recorded.manifests.values())))
    with pytest.raises(AssertionError, match="chi-square"):
        _check_random(np.frombuffer(encoding.zero_words().tobytes(), np.uint8), "unmasked")
    half = np.frombuffer(next(iter(recorded.uploads(recorded.runs[0], 2).values())), np.uint8).repeat(2)
    with pytest.raises(AssertionError, match="lag-1"):
        _check_random(half, "every byte twice")


SIGMAS = 6.0  # two-sided 2e-9: a dozen true samples fail once in tens of millions of runs


def _check_random(data: NDArray[np.uint8], what: str) -> None:
    """Chi-square over the 256 values, and the correlation of each byte with the next, both within SIGMAS of their expectation."""
    assert data.size > 100_000
    counts = np.bincount(data, minlength=256)
    expected = data.size / 256
    chi_square = float(np.sum((counts - expected) ** 2) / expected)
    # Wilson and Hilferty 1931: the cube root of chi-square over its degrees of freedom is near to normal, far into its tails.
    degrees = 255.0
    z = ((chi_square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    centred = data.astype(np.float64) - data.mean()
    lag = float(np.dot(centred[:-1], centred[1:]) / np.dot(centred, centred)) * math.sqrt(data.size)
    assert abs(lag) < SIGMAS, f"{what}: lag-1 serial correlation is {lag:.1f} sigma from none"
    assert abs(z) < SIGMAS, f"{what}: chi-square {chi_square:.1f} of 255 degrees is {z:.1f} sigma from uniform"


def test_two_uploads_of_one_update_share_nothing(recorded: Recorded) -> None:
    first, second = recorded.runs
    pairs = [(recorded.uploads(first, 1), recorded.uploads(second, 1)), (recorded.uploads(first, 2), recorded.uploads(first, 3))]
    for one, other in pairs:
        for site in recorded.federation.sites:
            assert len(one[site]) == len(other[site])
            assert not common_blocks(one[site], other[site])
    everybody = [data for upload in (*pairs[0], *pairs[1]) for data in upload.values()]
    blocks = [data[at : at + 16] for data in everybody for at in range(0, len(data) - 15, 16)]
    assert len(set(blocks)) == len(blocks), "a mask was used twice, between sites, rounds or runs"


def common_blocks(one: bytes, other: bytes) -> set[bytes]:
    """16-byte blocks of `one`, at multiples of 16, that stand anywhere in `other`."""
    aligned = {one[at : at + 16] for at in range(0, len(one) - 15, 16)}
    return {other[at : at + 16] for at in range(len(other) - 15)} & aligned


def _encoding(manifest: Manifest) -> Encoding:
    terms = manifest.encoding
    return Encoding(
        bits=terms.bits,
        participants=len(manifest.participants),
        cap=terms.cap,
        sections=(Section(manifest.tensor_table.size, terms.clip),),
        loss_max=terms.loss_max,
        losses=manifest.loss_words,
    )
