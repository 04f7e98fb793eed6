"""The coordinator's metrics, as DESIGN names them. No unbounded labels: sites and runs come from members lists and manifests, the rest from enums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cosilo_server.rounds.state import Phase, Round

if TYPE_CHECKING:
    from cosilo_server.closing import RoundOutcome

SECONDS_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000)
_PHASE_NUMBER = {phase: number for number, phase in enumerate(Phase, start=1)}


class CoordinatorMetrics:
    """Every metric of the coordinator, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.rounds = Counter("cosilo_rounds", "Rounds that ended, by outcome", ["outcome"], registry=registry)
        self.round_phase = Gauge(
            "cosilo_round_phase", "Phase of the round in progress, 1 gathering to 7 opening", ["run"], registry=registry
        )
        self.phase_duration = Histogram(
            "cosilo_phase_duration_seconds", "Seconds a round spent in a phase", ["phase"], registry=registry, buckets=SECONDS_BUCKETS
        )
        self.sites_connected = Gauge("cosilo_sites_connected", "Sites whose stream is open", registry=registry)
        self.site_last_seen = Gauge("cosilo_site_last_seen_timestamp_seconds", "When a site was last heard of", ["site"], registry=registry)
        self.transfer_bytes = Counter(
            "cosilo_transfer_bytes", "Bytes transferred, down to or up from sites", ["direction", "site"], registry=registry
        )
        self.transfer_duration = Histogram(
            "cosilo_transfer_duration_seconds", "Seconds of whole transfers", ["direction"], registry=registry, buckets=SECONDS_BUCKETS
        )
        self.upload_resumed = Counter("cosilo_upload_resumed", "Uploads that went on from an offset", registry=registry)
        self.attempts = Counter("cosilo_secagg_attempts", "Attempts of the masking protocol", ["outcome"], registry=registry)
        self.dropouts = Counter("cosilo_secagg_dropouts", "Sites left out, by phase", ["phase"], registry=registry)
        self.refusals = Counter("cosilo_secagg_refusals", "Protocol messages refused, by rule", ["rule"], registry=registry)
        self.aggregate_duration = Histogram(
            "cosilo_aggregate_duration_seconds", "Seconds to open a sum and step the model", registry=registry, buckets=SECONDS_BUCKETS
        )
        self.global_loss = Gauge("cosilo_global_loss", "Mean held-out loss of the weights a round started from", ["run"], registry=registry)
        self.update_norm = Gauge("cosilo_update_norm", "L2 norm of the mean update", ["run"], registry=registry)
        self.clipped_ratio = Gauge("cosilo_clipped_ratio", "Share of update values clipped by the encoding", ["run"], registry=registry)
        self.corrections_failed = Counter("cosilo_corrections_failed", "Averages that were to be corrected and were not", registry=registry)
        self.audit_failures = Counter("cosilo_audit_failures", "Entries that could not be written to the audit log", registry=registry)
        self.certificate_expiry = Gauge(
            "cosilo_certificate_expiry_timestamp_seconds", "When a certificate ends", ["subject"], registry=registry
        )
        self.rejected = Counter("cosilo_rejected_messages", "Calls and messages refused, by reason", ["reason"], registry=registry)
        self.artifacts_bytes = Gauge("cosilo_artifacts_bytes", "Bytes of checkpoints and grids on disk", registry=registry)
        self.artifacts_deleted = Counter("cosilo_artifacts_deleted", "Artifacts deleted: nothing referred to them", registry=registry)
        self.checkpoints_retired = Counter("cosilo_checkpoints_retired", "Checkpoints retired by policy", registry=registry)
        self.disk_free = Gauge("cosilo_disk_free_bytes", "Free bytes where artifacts are kept", registry=registry)

    def count_refusal(self, reason: str) -> None:
        """A call, a message or a connection was refused. reason: one of a fixed set, never anything from outside."""
        self.rejected.labels(reason=reason).inc()

    def round_began(self, state: Round) -> None:
        """A round started; it may have passed its first phase at once."""
        self.round_phase.labels(run=_run_label(state)).set(_PHASE_NUMBER[state.phase])

    def round_moved(self, run: bytes, before: Round, after: Round, now: float) -> None:
        """A round moved: phases timed, attempts and outcomes counted."""
        if after.phase is before.phase and after.attempt == before.attempt:
            return
        self.phase_duration.labels(phase=before.phase).observe(max(0.0, now - before.phase_since))
        if after.attempt != before.attempt:
            self.attempts.labels(outcome="repeated").inc()
        label = _run_label(after)
        if after.ended:
            self.rounds.labels(outcome=after.phase).inc()
            if after.terms.secure:
                self.attempts.labels(outcome="opened" if after.phase is Phase.CLOSED else "abandoned").inc()
            self.round_phase.remove(label)
        else:
            self.round_phase.labels(run=label).set(_PHASE_NUMBER[after.phase])

    def sum_opened(self, run: bytes, outcome: RoundOutcome, seconds: float) -> None:
        """A sum was opened: its public means."""
        self.aggregate_duration.observe(seconds)
        label = run.hex()[:12]
        self.clipped_ratio.labels(run=label).set(outcome.clip_ratio)
        if outcome.heldout_loss is not None:
            self.global_loss.labels(run=label).set(outcome.heldout_loss)
        if outcome.update_norm is not None:
            self.update_norm.labels(run=label).set(outcome.update_norm)


def _run_label(state: Round) -> str:
    return state.run.hex()[:12]
