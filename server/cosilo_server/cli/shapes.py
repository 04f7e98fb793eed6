"""What the coordinator says, as the plain values that `--json` prints (docs/cli.md documents every key).

Digests and keys are lower-case hex, enums are lower-case words, what is absent is null. Must not know connections or
commands.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor

    from cosilo_common.rpc.v1 import admin_pb2


class RunShape(TypedDict):
    """One run in a list."""

    run: str
    name: str
    state: str
    rounds_closed: int
    rounds_wanted: int
    aggregation: str
    checkpoint: str | None
    parameters: int
    participants: list[str]
    note: str


class LossShape(TypedDict):
    """What a round's sum said. heldout: of the weights the round started from."""

    heldout: float | None
    heldout_by_bucket: list[float | None]
    train: float | None
    clip_ratio: float | None
    total_weight: int
    update_norm: float | None


class ProgressShape(TypedDict):
    """One site in a round in progress."""

    site: str
    connected: bool
    activity: str
    tenths: int
    bytes: int
    delivered: bool
    declined: str | None
    late: bool


class RoundShape(TypedDict):
    """One round."""

    round: int
    kind: str
    phase: str
    reason: str
    note: str
    started_unix_s: float
    seconds: float
    attempt: int
    invited: list[str]
    survivors: list[str]
    bytes_down: int
    bytes_up: int
    base: str | None
    checkpoint: str | None
    moments: str | None
    losses: LossShape | None
    sites: list[ProgressShape]


class CheckpointShape(TypedDict):
    """One checkpoint's artifacts."""

    round: int
    weights: str
    ema: str | None
    bytes: int
    created_unix_s: float
    name: str | None
    kept: str | None
    retired_unix_s: float | None


class CaPartyShape(TypedDict):
    """A member's newest certificate: current, old, or unseen."""

    name: str
    role: str
    certificate: str
    expires_unix_s: int | None


class CaShape(TypedDict):
    """The CA as it stands. waiting: names without a certificate of today's CA, in an overlap."""

    version: int
    overlap: bool
    roots_expire_unix_s: list[int]
    intermediate_expires_unix_s: int
    parties: list[CaPartyShape]
    waiting: list[str]


class EnrolmentShape(TypedDict):
    """One invitation and what came of it. fingerprint: of the signing key, once enrolled."""

    name: str
    role: str
    state: str
    key: str | None
    fingerprint: str | None
    expires_unix_s: int
    enrolled_unix_s: int | None


class SiteShape(TypedDict):
    """One site's connection."""

    site: str
    connected: bool
    last_seen_unix_s: float | None
    address: str
    certificate_expires_unix_s: int | None
    software: str
    left_unix_s: float | None


class StatusShape(TypedDict):
    """The federation at a glance."""

    federation: str
    software: str
    uptime_s: float
    members_version: int
    disk_free_bytes: int
    certificate_expires_unix_s: int | None
    sites: list[SiteShape]
    runs: list[RunShape]


class SpanShape(TypedDict):
    """A party was busy with something in a round. began_s: since the round's start."""

    party: str | None
    lane: str
    what: str
    attempt: int
    began_s: float
    seconds: float
    running: bool
    bytes: int
    pieces: int
    outcome: str | None


class PhaseShape(TypedDict):
    """A phase of a round, and whom it waited for last. alone_s: for how long for nobody else."""

    phase: str
    attempt: int
    began_s: float
    seconds: float
    last_site: str | None
    alone_s: float | None


class TraceShape(TypedDict):
    """A round as a timeline."""

    run: str
    round: int
    kind: str
    phase: str
    reason: str
    started_unix_s: float
    seconds: float
    phases: list[PhaseShape]
    spans: list[SpanShape]
    left_out: int


def run_shape(summary: admin_pb2.RunSummary) -> RunShape:
    """A RunSummary."""
    return {
        "run": summary.run.hex(),
        "name": summary.name,
        "state": summary.state,
        "rounds_closed": summary.rounds_closed,
        "rounds_wanted": summary.rounds_wanted,
        "aggregation": summary.aggregation,
        "checkpoint": summary.checkpoint.hex() or None,
        "parameters": summary.parameters,
        "participants": list(summary.participants),
        "note": summary.note,
    }


def round_shape(summary: admin_pb2.RoundSummary) -> RoundShape:
    """A RoundSummary."""
    losses: LossShape | None = None
    if summary.has_losses:
        losses = {
            "heldout": _finite(summary.heldout_loss),
            "heldout_by_bucket": [_finite(loss) for loss in summary.heldout_loss_by_bucket],
            "train": _finite(summary.train_loss) if kind_word(summary.kind) == "train" else None,
            "clip_ratio": _finite(summary.clip_ratio),
            "total_weight": summary.total_weight,
            "update_norm": _finite(summary.update_norm),
        }
    return {
        "round": summary.round,
        "kind": kind_word(summary.kind),
        "phase": phase_word(summary.phase),
        "reason": summary.reason,
        "note": summary.note,
        "started_unix_s": summary.started_unix_s,
        "seconds": summary.seconds,
        "attempt": summary.attempt,
        "invited": list(summary.invited),
        "survivors": list(summary.survivors),
        "bytes_down": summary.bytes_down,
        "bytes_up": summary.bytes_up,
        "base": summary.base_digest.hex() or None,
        "checkpoint": summary.checkpoint_digest.hex() or None,
        "moments": summary.moments_digest.hex() or None,
        "losses": losses,
        "sites": [_progress_shape(site) for site in summary.sites],
    }


def checkpoint_shape(checkpoint: admin_pb2.Checkpoint) -> CheckpointShape:
    """A Checkpoint."""
    return {
        "round": checkpoint.round,
        "weights": checkpoint.weights_digest.hex(),
        "ema": checkpoint.ema_digest.hex() or None,
        "bytes": checkpoint.bytes,
        "created_unix_s": checkpoint.created_unix_s,
        "name": checkpoint.name or None,
        "kept": checkpoint.kept or None,
        "retired_unix_s": checkpoint.retired_unix_s or None,
    }


def span_shape(span: admin_pb2.RoundSpan, started_unix_s: float, now_unix_s: float) -> SpanShape:
    """A RoundSpan of a round that started then."""
    return {
        "party": span.party or None,
        "lane": span.lane,
        "what": span.what,
        "attempt": span.attempt,
        "began_s": max(0.0, span.began_unix_s - started_unix_s),
        "seconds": max(0.0, (span.ended_unix_s or now_unix_s) - max(span.began_unix_s, started_unix_s)),
        "running": span.ended_unix_s == 0.0,
        "bytes": span.bytes,
        "pieces": span.pieces,
        "outcome": span.outcome or None,
    }


def enrolment_shape(enrolment: admin_pb2.Enrolment) -> EnrolmentShape:
    """An Enrolment."""
    from cosilo_common.identity.keys import fingerprint

    return {
        "name": enrolment.name,
        "role": enrolment.role,
        "state": enrolment.state,
        "key": enrolment.signing_key.hex() or None,
        "fingerprint": fingerprint(enrolment.signing_key) if enrolment.signing_key else None,
        "expires_unix_s": enrolment.expires_unix_s,
        "enrolled_unix_s": enrolment.enrolled_unix_s or None,
    }


def status_shape(status: admin_pb2.GetStatusResponse) -> StatusShape:
    """A GetStatusResponse."""
    return {
        "federation": status.federation,
        "software": status.software,
        "uptime_s": status.uptime_s,
        "members_version": status.members_version,
        "disk_free_bytes": status.disk_free_bytes,
        "certificate_expires_unix_s": status.certificate_expires_unix_s or None,
        "sites": [
            {
                "site": site.site,
                "connected": site.connected,
                "last_seen_unix_s": site.last_seen_unix_s or None,
                "address": site.address,
                "certificate_expires_unix_s": site.certificate_expires_unix_s or None,
                "software": site.software,
                "left_unix_s": site.left_unix_s or None,
            }
            for site in status.sites
        ],
        "runs": [run_shape(run) for run in status.runs],
    }


def kind_word(kind: int) -> str:
    """train, rehearsal, statistics or moments."""
    from cosilo_common.rpc.v1.site_pb2 import RoundKind

    return _word(RoundKind.DESCRIPTOR, kind, "ROUND_KIND_")


def phase_word(phase: int) -> str:
    """gathering to closed, or abandoned."""
    from cosilo_common.rpc.v1.site_pb2 import RoundPhase

    return _word(RoundPhase.DESCRIPTOR, phase, "ROUND_PHASE_")


def _progress_shape(site: admin_pb2.SiteProgress) -> ProgressShape:
    from cosilo_common.rpc.v1.site_pb2 import DeclineCode, SiteActivity

    activity = _word(SiteActivity.DESCRIPTOR, site.activity, "SITE_ACTIVITY_")
    return {
        "site": site.site,
        "connected": site.connected,
        "activity": "idle" if activity == "unspecified" else activity,
        "tenths": site.tenths,
        "bytes": site.bytes,
        "delivered": site.delivered,
        "declined": _word(DeclineCode.DESCRIPTOR, site.declined, "DECLINE_CODE_") if site.declined else None,
        "late": site.late,
    }


def _word(kind: EnumDescriptor, value: int, prefix: str) -> str:
    """An enum's word; one that a newer coordinator has and this program does not is shown by its number."""
    named = kind.values_by_number.get(value)
    return named.name.removeprefix(prefix).lower().replace("_", " ") if named else f"unknown {value}"


def _finite(value: float) -> float | None:
    """JSON has no NaN: a loss that is none is null."""
    return value if math.isfinite(value) else None
