"""Protobuf to the coordinator's own values and back. protobuf types stop here."""

from __future__ import annotations

from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.assignments import Assignment
from cosilo_server.rounds.state import Activity, DeclineCode, Phase

KIND_TO_WIRE = {
    RoundKind.TRAIN: site_pb2.ROUND_KIND_TRAIN,
    RoundKind.REHEARSAL: site_pb2.ROUND_KIND_REHEARSAL,
    RoundKind.STATISTICS: site_pb2.ROUND_KIND_STATISTICS,
    RoundKind.MOMENTS: site_pb2.ROUND_KIND_MOMENTS,
}
KIND_FROM_WIRE = {wire: kind for kind, wire in KIND_TO_WIRE.items()}

PHASE_TO_WIRE = {
    Phase.GATHERING: site_pb2.ROUND_PHASE_GATHERING,
    Phase.TRAINING: site_pb2.ROUND_PHASE_TRAINING,
    Phase.SHARING: site_pb2.ROUND_PHASE_SHARING,
    Phase.UPLOADING: site_pb2.ROUND_PHASE_UPLOADING,
    Phase.CONSENTING: site_pb2.ROUND_PHASE_CONSENTING,
    Phase.REVEALING: site_pb2.ROUND_PHASE_REVEALING,
    Phase.OPENING: site_pb2.ROUND_PHASE_OPENING,
    Phase.CLOSED: site_pb2.ROUND_PHASE_CLOSED,
    Phase.ABANDONED: site_pb2.ROUND_PHASE_ABANDONED,
}

ACTIVITY_TO_WIRE = {
    Activity.IDLE: site_pb2.SITE_ACTIVITY_UNSPECIFIED,
    Activity.FETCHING: site_pb2.SITE_ACTIVITY_FETCHING,
    Activity.TRAINING: site_pb2.SITE_ACTIVITY_TRAINING,
    Activity.MASKING: site_pb2.SITE_ACTIVITY_MASKING,
    Activity.UPLOADING: site_pb2.SITE_ACTIVITY_UPLOADING,
    Activity.WAITING: site_pb2.SITE_ACTIVITY_WAITING,
}
ACTIVITY_FROM_WIRE = {wire: activity for activity, wire in ACTIVITY_TO_WIRE.items()}

DECLINE_TO_WIRE = {
    DeclineCode.NOT_ACCEPTED: site_pb2.DECLINE_CODE_NOT_ACCEPTED,
    DeclineCode.POLICY: site_pb2.DECLINE_CODE_POLICY,
    DeclineCode.PROTOCOL: site_pb2.DECLINE_CODE_PROTOCOL,
    DeclineCode.DATA: site_pb2.DECLINE_CODE_DATA,
    DeclineCode.TRAINER: site_pb2.DECLINE_CODE_TRAINER,
    DeclineCode.DISK: site_pb2.DECLINE_CODE_DISK,
    DeclineCode.PAUSED: site_pb2.DECLINE_CODE_PAUSED,
}
DECLINE_FROM_WIRE = {wire: code for code, wire in DECLINE_TO_WIRE.items()}


def assignment_to_wire(owed: Assignment) -> site_pb2.Assignment:
    """What a site owes, field by field."""
    return site_pb2.Assignment(
        run=owed.run,
        round=owed.round,
        kind=KIND_TO_WIRE[owed.kind],
        phase=PHASE_TO_WIRE[owed.phase],
        invited=owed.invited,
        attempt=owed.attempt,
        invited_sites=owed.invited_sites,
        base_digest=owed.base_digest,
        base_bytes=owed.base_bytes,
        encoding=owed.encoding,
        roster=owed.roster,
        shares=owed.shares,
        survivors=owed.survivors,
        consents=owed.consents,
        checkpoint_digest=owed.checkpoint,
        delivered=owed.delivered,
        deadline_s=owed.deadline_s,
        reason=owed.reason,
        step=None if owed.step is None else site_pb2.Step(digest=owed.step.digest, bytes=owed.step.bytes, base_digest=owed.step.base),
    )
