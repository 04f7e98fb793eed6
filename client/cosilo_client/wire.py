"""Protobuf to this site's own values and back: protobuf types stop here.

Owns what of a coordinator's message is believed to be well-formed. Must not know sockets or what follows from a value.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from cosilo_client.owed import Decline, Owed, Phase, Progress, WeightsStep
from cosilo_common.canonical import check_name
from cosilo_common.errors import CosiloError
from cosilo_common.framing import data_of, frame_data
from cosilo_common.manifest import ROUNDS_MAX
from cosilo_common.protocol_version import PROTOCOL_VERSION
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import ATTEMPTS_MAX, RoundKind

RUNS_MAX: Final = 1000  # assignments in one snapshot: runs of a site's whole life
DIGEST_BYTES: Final = 32
REASON_CHARS_MAX: Final = 1000  # for the log

_KINDS: Final = {
    site_pb2.ROUND_KIND_TRAIN: RoundKind.TRAIN,
    site_pb2.ROUND_KIND_REHEARSAL: RoundKind.REHEARSAL,
    site_pb2.ROUND_KIND_STATISTICS: RoundKind.STATISTICS,
    site_pb2.ROUND_KIND_MOMENTS: RoundKind.MOMENTS,
}


def owed_from(message: site_pb2.Assignment) -> Owed:
    """One assignment. Raises CosiloError, naming the field, where a value cannot be what it should."""
    if len(message.run) != DIGEST_BYTES:
        raise _bad("run", f"{len(message.run)} bytes, not {DIGEST_BYTES}")
    if len(message.base_digest) != DIGEST_BYTES:
        raise _bad("base_digest", f"{len(message.base_digest)} bytes, not {DIGEST_BYTES}")
    kind = _KINDS.get(message.kind)
    if kind is None:
        raise _bad("kind", f"{message.kind} is unknown here; upgrade this site")
    try:
        phase = Phase(message.phase)
    except ValueError:
        raise _bad("phase", f"{message.phase} is unknown here; upgrade this site") from None
    if not 1 <= message.round <= ROUNDS_MAX:
        raise _bad("round", f"it counts from 1, and no run has more than {ROUNDS_MAX}")
    if not 1 <= message.attempt <= ATTEMPTS_MAX:
        raise _bad("attempt", f"{message.attempt} is not from 1 to {ATTEMPTS_MAX}")
    return Owed(
        run=message.run,
        round=message.round,
        kind=kind,
        phase=phase,
        invited=message.invited,
        attempt=message.attempt,
        invited_sites=tuple(_name("invited_sites", name) for name in message.invited_sites),
        base_digest=message.base_digest,
        base_bytes=message.base_bytes,
        encoding=message.encoding,
        roster=tuple(message.roster),
        shares=tuple(message.shares),
        survivors=tuple(_name("survivors", name) for name in message.survivors),
        consents=tuple(message.consents),
        checkpoint=message.checkpoint_digest,
        delivered=message.delivered,
        deadline_s=message.deadline_s,
        reason=message.reason[:REASON_CHARS_MAX],
        step=_step(message.step) if message.HasField("step") else None,
    )


def hello(software: str) -> site_pb2.AttendRequest:
    """The first message of a stream."""
    return site_pb2.AttendRequest(hello=site_pb2.Hello(protocol_version=PROTOCOL_VERSION, software=software))


def statement_to(said: Progress | Decline) -> site_pb2.AttendRequest:
    """What this site says of itself."""
    if isinstance(said, Decline):
        code = site_pb2.DeclineCode.ValueType(said.code)
        return site_pb2.AttendRequest(decline=site_pb2.Decline(run=said.run, round=said.round, code=code, reached=said.reached))
    return site_pb2.AttendRequest(
        progress=site_pb2.Progress(
            run=said.run,
            round=said.round,
            activity=site_pb2.SiteActivity.ValueType(said.activity),
            tenths=said.tenths,
            bytes=said.bytes_moved,
        )
    )


def frame_chunk(chunk: bytes) -> bytes:
    """`PutUpdateRequest(data=chunk)` as bytes, in one copy."""
    return frame_data(chunk)


def chunk_from(message: bytes) -> tuple[memoryview, int]:
    """(data, total_bytes) of a GetArtifactResponse, without a copy where it carries data alone. Raises CosiloError."""
    data = data_of(message)
    if data is not None:
        return data, 0
    try:
        parsed = site_pb2.GetArtifactResponse.FromString(message)
    except DecodeError:
        raise CosiloError("fetch", "a chunk is not a message of this protocol", "tell the coordinator's admin") from None
    return memoryview(parsed.data), parsed.total_bytes


def _step(message: site_pb2.Step) -> WeightsStep:
    for field, digest in (("step.digest", message.digest), ("step.base_digest", message.base_digest)):
        if len(digest) != DIGEST_BYTES:
            raise _bad(field, f"{len(digest)} bytes, not {DIGEST_BYTES}")
    return WeightsStep(message.digest, message.base_digest, message.bytes)


def _name(field: str, name: str) -> str:
    try:
        return check_name(name)
    except ValueError:
        raise _bad(field, "it holds what is no site's name") from None


def _bad(field: str, why: str) -> CosiloError:
    return CosiloError("read assignment", f"{field}: {why}", "tell the coordinator's admin")
