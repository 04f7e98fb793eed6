"""May this run, this round, at this hour, be joined? Pure: what the site allows, what is asked, and an answer.

Owns the judgement of `[policy]`. A person's acceptance of a run does not override it: the table is the site's, the
acceptance one person's. Must not know the network, files or the clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time

from cosilo_client.config import PolicyTable
from cosilo_client.owed import DeclineCode
from cosilo_client.secagg import least_f_by_default
from cosilo_common.manifest import PLAIN_AGGREGATION, Manifest
from cosilo_common.secagg.messages import RoundKind


@dataclass(frozen=True)
class Refusal:
    """What the site will not do. code: all that the coordinator is told; reason: for the site's own log and screen."""

    code: DeclineCode
    reason: str


@dataclass(frozen=True)
class Spent:
    """What a run has had of this site: rounds trained, seconds of training, and statistics rounds measured."""

    rounds: int = 0
    seconds: float = 0.0
    statistics: int = 0


def least_f(policy: PolicyTable, participants: int) -> int:
    """The least f this site accepts (PROTOCOL.md, R1): its own, or max(1, floor(|P| / 3))."""
    return least_f_by_default(participants) if policy.f_min is None else policy.f_min


def refuse_run(policy: PolicyTable, manifest: Manifest) -> Refusal | None:
    """Why this site joins no round of this run at all, whoever accepts it; None where it may."""
    participants = len(manifest.participants)
    if not manifest.secure and not policy.allow_insecure_plain_sum:
        return _no(
            f"its aggregation is {PLAIN_AGGREGATION}: the coordinator would see this site's own update; "
            "set allow_insecure_plain_sum = true in [policy] to allow that"
        )
    if manifest.secure and manifest.f < least_f(policy, participants):
        return _no(
            f"it withstands {manifest.f} colluding sites of {participants} and this site's least is "
            f"{least_f(policy, participants)}; set f_min in [policy] to allow that"
        )
    if (manifest.cohort or participants) < policy.cohort_min:
        return _no(
            f"its rounds have at most {manifest.cohort or participants} sites and this site's least is "
            f"{policy.cohort_min}; set cohort_min in [policy] to allow that"
        )
    return None


def refuse_round(policy: PolicyTable, manifest: Manifest, kind: RoundKind, invited: int, spent: Spent, now: time) -> Refusal | None:
    """Why this site does not begin a round now; None where it does.

    invited: |I|. spent: on this run so far. now: the site's local time of day. Rounds that train count against
    rounds_max and hours_max, statistics rounds by themselves against rounds_max and statistics_rounds_max: each answers a
    question about this site's held-out images, asked with any model that the coordinator likes. Moments rounds count
    among them. A rehearsal tells nothing and counts for nothing. The hours of the day are for every round.
    """
    refusal = refuse_run(policy, manifest)
    if refusal is not None:
        return refusal
    if invited < policy.cohort_min:
        return _no(f"{invited} sites are invited and this site's least is {policy.cohort_min}")
    if spans := outside_hours(policy, now):
        return _no(f"it is {now:%H:%M} and rounds begin within {spans}")
    if kind is RoundKind.TRAIN and spent.rounds >= policy.rounds_max:
        return _no(f"{spent.rounds} rounds are trained and this site's most is {policy.rounds_max}")
    statistics_max = min(policy.rounds_max, policy.statistics_rounds_max)
    if kind in (RoundKind.STATISTICS, RoundKind.MOMENTS) and spent.statistics >= statistics_max:
        return _no(f"{spent.statistics} statistics rounds are measured and this site's most is {statistics_max}")
    if kind is RoundKind.TRAIN and spent.seconds >= policy.hours_max * 3600:
        return _no(f"{spent.seconds / 3600:.1f} hours are trained and this site's most is {policy.hours_max:g}")
    return None


def refuse_going_on(policy: PolicyTable, now: time) -> Refusal | None:
    """Why a round that this site has begun is not trained further now; None where it is.

    A round that begins outside the hours is declined by `refuse_round`; one that was begun within them is paused.
    """
    words = outside_hours(policy, now)
    return Refusal(DeclineCode.PAUSED, f"it is {now:%H:%M} and this site trains within {words}") if words else None


def outside_hours(policy: PolicyTable, now: time) -> str:
    """The hours of [policy], where a local time of day lies outside them; empty where it does not."""
    if not policy.hours or any(span.holds(now) for span in policy.hours):
        return ""
    return ", ".join(f"{span.start:%H:%M}-{span.end:%H:%M}" for span in policy.hours)


def is_listed(policy: PolicyTable, run: bytes, name: str) -> bool:
    """Whether [policy] names this run, by name or by digest in hex."""
    return policy.runs != "accepted" and (name in policy.runs or run.hex() in policy.runs)


def refuse_unasked(policy: PolicyTable, run: bytes, manifest: Manifest, pins: Mapping[str, bytes]) -> Refusal | None:
    """Why the policy does not accept a run without a person; None where it does.

    pins: Ed25519 keys by name that a person's acceptances pinned. Every participant's key must stand there
    (PROTOCOL.md, Parties and trust): a members list only proposes who belongs.
    """
    if not is_listed(policy, run, manifest.name):
        return Refusal(DeclineCode.NOT_ACCEPTED, f"nobody has accepted it: run cosilo-site accept {run.hex()[:12]}")
    unknown = [p.name for p in manifest.participants if pins.get(p.name) != bytes.fromhex(p.key)]
    if unknown:
        return Refusal(
            DeclineCode.NOT_ACCEPTED,
            f"it is listed in [policy], but the keys of {', '.join(unknown[:5])} are not pinned: "
            f"a person must run cosilo-site accept {run.hex()[:12]}",
        )
    if manifest.max_rounds_per_model > policy.max_rounds_per_model:
        return Refusal(
            DeclineCode.NOT_ACCEPTED,
            f"it is listed in [policy], but asks for {manifest.max_rounds_per_model} rounds from one model and this site's "
            f"most is {policy.max_rounds_per_model}: a person must run cosilo-site accept {run.hex()[:12]}",
        )
    return refuse_run(policy, manifest)


def _no(reason: str) -> Refusal:
    return Refusal(DeclineCode.POLICY, reason)
