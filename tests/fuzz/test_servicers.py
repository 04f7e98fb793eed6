"""Every method of both ports over real gRPC with real certificates: whatever a member sends, it gets a documented status and nothing moves.

A coordinator in a thread of its own, with a run whose round waits for uploads; the callers are members, since everybody else is turned away
before a byte is looked at (test_a_stranger_gets_no_further_than_the_handshake, and test_every_method_refuses_the_wrong_role).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.identity.certificates import make_csr
from cosilo_common.identity.keys import make_signing_key, make_tls_key, public_bytes
from cosilo_common.identity.members import sign_members
from cosilo_common.identity.names import PeerName, Role
from cosilo_common.identity.tls import federation_channel_sync
from cosilo_common.manifest import Deadlines, Participant, sign_manifest
from cosilo_common.rpc.v1 import admin_pb2, enrolment_pb2, site_pb2
from cosilo_common.secagg.messages import Advert, MessageType, RoundKind, Upload, sign
from cosilo_server import coordinator as coordinator_module
from cosilo_server.config import CoordinatorConfig, Listen, Paths
from cosilo_server.coordinator import Coordinator
from cosilo_server.rounds import machine
from cosilo_server.rounds.events import AdvertReceived
from cosilo_server.rounds.state import Phase
from cosilo_server.services.admission import ENROLMENT_LIMITS, FEDERATION_LIMITS, MethodLimit
from cosilo_server.store import StoredCheckpoint, terms_of
from tests.fuzz.mutation import fuzzed, inputs, some
from tests.identity_parties import ADMIN, FEDERATION, Founded, found
from tests.protocol.manifests import a_manifest

TIMEOUT_S = 20.0
WATCH_S = 0.5  # of a stream that has no end of its own
SITES = ("st-anna", "st-beda", "st-clara")
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNIMPLEMENTED,
}
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for module in (site_pb2, admin_pb2, enrolment_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
ENDLESS = "WatchRun"
READS = ("List", "Get", "Watch")  # what an admin asks for happens, so whatever else they ask is of a run that is not there
DIGEST = sha256(b"digest")


class Unhurried(dict[str, MethodLimit]):
    """The same limits without the one on calls a minute."""

    def get(self, key: str, default: Any = None) -> Any:
        return replace(super().get(key, default), a_minute=1e9)


@dataclass
class World:
    """A coordinator at work, and what its callers know."""

    coordinator: Coordinator
    data: Path
    run: bytes
    known: list[bytes]
    channels: dict[str, grpc.Channel]

    def channel(self, path: str) -> grpc.Channel:
        return self.channels[path.split("/")[1].rpartition(".")[2]]

    def standing(self) -> tuple[Any, ...]:
        """What no wrong message may change."""
        store = self.coordinator._store
        kept = (path for name in ("spool", "artifacts") for path in (self.data / name).rglob("*") if path.is_file())
        files = sorted(str(path.relative_to(self.data)) for path in kept if path.suffix != ".part")  # what was begun under a signature
        state = self.coordinator.conductor.round(self.run)
        assert state is not None
        messages = [(site.advert, site.shares, site.upload, site.consent, site.reveal) for site in state.sites.values()]
        return (files, len(store.runs()), len(store.invitations()), self.coordinator._members.version(), state.phase, messages)


class InThread:
    """An event loop in a thread: hypothesis calls, and the coordinator answers beside it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(60)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    patch = pytest.MonkeyPatch()
    patch.setattr(coordinator_module, "FEDERATION_LIMITS", Unhurried(FEDERATION_LIMITS))
    patch.setattr(coordinator_module, "ENROLMENT_LIMITS", Unhurried(ENROLMENT_LIMITS))
    patch.setattr("cosilo_server.services.admission.CALLS_PER_MINUTE_MAX", 1e9)
    patch.setattr("cosilo_server.enrolment.AttemptLimit.allow", lambda *_: True)
    root = tmp_path_factory.mktemp("world")
    founded, thread = found(root / "f"), InThread()
    listen = Listen(federation="127.0.0.1:0", enrolment="127.0.0.1:0", metrics="127.0.0.1:0")
    paths = Paths(identity=founded.coordinator.folder, data=root / "data")
    paths.data.mkdir()

    async def build() -> Coordinator:
        return Coordinator(CoordinatorConfig(federation=FEDERATION, listen=listen, paths=paths))

    coordinator: Coordinator = thread.run(build())
    keys = {name: make_signing_key() for name in SITES}
    run, known = a_round(coordinator, founded, keys)
    thread.run(coordinator.start())
    site = federation_channel_sync(coordinator.endpoints["federation"], founded.party(Role.SITE, "st-anna"))
    admin = federation_channel_sync(coordinator.endpoints["federation"], founded.admin.tls)
    roots = grpc.ssl_channel_credentials(founded.admin.tls.ca.read_bytes())
    anybody = grpc.secure_channel(
        coordinator.endpoints["enrolment"], roots, options=[("grpc.ssl_target_name_override", "coordinator.cosilo")]
    )
    channels = {"SiteService": site, "AdminService": admin, "EnrolmentService": anybody}
    yield World(coordinator, paths.data, run, known, channels)
    for channel in channels.values():
        channel.close()
    thread.run(coordinator.stop())
    thread.close()
    patch.undo()


def a_round(coordinator: Coordinator, founded: Founded, keys: dict[str, Any]) -> tuple[bytes, list[bytes]]:
    """Members, a run and a round that waits for uploads, put into the store as a coordinator that was stopped left them."""
    draft = founded.members.draft()
    for name in SITES:
        draft = draft.approve(name, Role.SITE, public_bytes(keys[name]))
    signed = sign_members(founded.members, draft, ADMIN, founded.admin_key)
    coordinator._members.put(signed.canonical())
    participants = tuple(Participant(name=name, key=public_bytes(keys[name]).hex()) for name in SITES)
    manifest = a_manifest(participants).model_copy(
        update={"federation": FEDERATION, "aggregation": "insecure-plain-sum", "deadlines": Deadlines(uploading_s=86_400)}
    )
    run, encoding = manifest.digest(), round_encoding(manifest, RoundKind.TRAIN)
    weights = bytes.fromhex(put(coordinator, bytes(192)))
    coordinator._store.add_run(
        run,
        manifest.canonical(),
        sign_manifest(manifest, founded.admin_key),
        ADMIN,
        StoredCheckpoint(run, 0, weights, b"", b"", 192, 0.0),
    )
    coordinator._store.add_order(run, RoundKind.TRAIN, 1)
    state, _ = machine.begin(
        run=run, number=1, kind=RoundKind.TRAIN, terms=terms_of(manifest), base_digest=weights, base_bytes=192,
        encoding=encoding.canonical(), seed=bytes(32), connected=SITES, now=0.0,
    )  # fmt: skip
    coordinator._store.begin_round(state)
    adverts = {}
    for name in SITES:
        body = Advert(RoundKind.TRAIN, weights, encoding.digest(), b"", b"")
        adverts[name] = sign(keys[name], MessageType.ADVERT, run, 1, 1, name, body).encode()
        state, _ = machine.step(state, AdvertReceived(name, 1, adverts[name]), 0.0)
    assert state.phase is Phase.UPLOADING
    coordinator._store.save_round(state, "adverts")
    statement = sign(keys["st-anna"], MessageType.UPLOAD, run, 1, 1, "st-anna", Upload(DIGEST, encoding.wire_bytes)).encode()
    other = sign(keys["st-beda"], MessageType.UPLOAD, run, 1, 1, "st-beda", Upload(DIGEST, encoding.wire_bytes)).encode()
    csr = make_csr(make_tls_key(), PeerName(FEDERATION, Role.SITE, "st-beda"))
    return run, [run, weights, DIGEST, *adverts.values(), statement, other, manifest.canonical(), signed.canonical(), csr]


def put(coordinator: Coordinator, data: bytes) -> str:
    with coordinator._artifacts.scratch(".safetensors") as path:
        path.write_bytes(data)
        return coordinator._artifacts.put_file(path)


# What is sent


def value(field: FieldDescriptor, known: list[bytes]) -> st.SearchStrategy[Any]:
    """Of one field: what a caller who knows the federation would put there, and what nobody would."""
    match field.type:
        case FieldDescriptor.TYPE_BYTES:
            return st.sampled_from(known) | st.binary(max_size=70) | st.sampled_from(known).flatmap(some)
        case FieldDescriptor.TYPE_STRING:
            return st.sampled_from([*SITES, ADMIN, "site", "admin", "../x", "", "a" * 300]) | st.text(max_size=70)
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_ENUM:
            return st.sampled_from([number.number for number in field.enum_type.values]) | st.integers(-(2**31), 2**31 - 1)
        case FieldDescriptor.TYPE_MESSAGE:
            return message(field.message_type, known)
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.floats()
        case FieldDescriptor.TYPE_UINT32:
            return st.sampled_from([0, 1, 2, 5, 6, 10_001, 2**32 - 1])
        case FieldDescriptor.TYPE_INT64:
            return st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
        case _:
            return st.sampled_from([0, 1, 2, 191, 192, 193, 2**32, 2**63, 2**64 - 1])


@st.composite
def message(draw: st.DrawFn, descriptor: Descriptor, known: list[bytes]) -> Message:
    """A message of this kind, some of its fields left out."""
    made = GetMessageClass(descriptor)()
    for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), unique_by=lambda f: f.name)) if descriptor.fields else ():
        if field.is_repeated:
            part = getattr(made, field.name)
            for one in draw(st.lists(value(field, known), max_size=3)):
                part.append(one)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(made, field.name).CopyFrom(draw(value(field, known)))
        else:
            setattr(made, field.name, draw(value(field, known)))
    return made


@st.composite
def requests(draw: st.DrawFn, method: MethodDescriptor, known: list[bytes]) -> list[bytes]:
    """What is sent in one call: well-formed, well-formed and then changed, or anything."""
    well = message(method.input_type, known).map(lambda one: one.SerializeToString())
    one = st.one_of(well, well, well.flatmap(some), st.binary(max_size=200))
    return draw(st.lists(one, max_size=4) if method.client_streaming else st.lists(one, min_size=1, max_size=1))


def ask(world: World, path: str, sent: list[bytes]) -> grpc.StatusCode:
    """Sends them in one call, half-closes, and reads to the end."""
    call = world.channel(path).stream_stream(path)(iter(sent), timeout=TIMEOUT_S)
    try:
        for _ in call:
            if path.endswith(ENDLESS):
                call.cancel()
                return grpc.StatusCode.OK
    except grpc.RpcError:
        pass
    code: grpc.StatusCode = call.code()
    return code


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.rpartition("/")[2])
def test_whatever_is_sent_gets_a_documented_status_and_moves_nothing(path: str, world: World) -> None:
    method = METHODS[path]
    reads = method.name.startswith(READS) or "SiteService" in path
    known = world.known if reads and method.name != "Attend" else world.known[1:]  # a site that declines a round of its own is heard
    before = world.standing()

    @fuzzed(25)
    @given(requests(method, known))
    def try_some(sent: list[bytes]) -> None:
        inputs[method.name] += max(1, len(sent))
        assert ask(world, path, sent) in DOCUMENTED

    try_some()
    assert world.standing() == before
    assert world.coordinator.healthy()[0]
    assert world.coordinator.metrics.registry.get_sample_value("cosilo_rejected_messages_total", {"reason": "internal"}) is None


def test_a_stranger_gets_no_further_than_the_handshake(world: World) -> None:
    """A member's name in a certificate of another CA."""
    founded = found(world.data.parent / "other")
    stranger = federation_channel_sync(world.coordinator.endpoints["federation"], founded.party(Role.SITE, "st-anna"))
    with stranger:
        call = stranger.unary_unary("/cosilo.v1.SiteService/Submit")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
