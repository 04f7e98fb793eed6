"""What admins are told, in the wire's words, from the store and the live rounds. Reads only; decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from cosilo_common.identity.members import SignedMembers
from cosilo_common.identity.names import Role
from cosilo_common.rpc.v1 import admin_pb2, site_pb2
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.transfer import free_bytes
from cosilo_server.artifacts import Artifacts
from cosilo_server.closing import RoundOutcome
from cosilo_server.conductor import Conductor
from cosilo_server.membership import StoredMembers
from cosilo_server.retention import Collector
from cosilo_server.rounds.machine import has_delivered
from cosilo_server.rounds.state import Round
from cosilo_server.services.translation import ACTIVITY_TO_WIRE, DECLINE_TO_WIRE, KIND_TO_WIRE, PHASE_TO_WIRE
from cosilo_server.store import Store, StoredRound, StoredRun
from cosilo_server.trace import SPANS_TOLD


class Summaries:
    """Answers the admin's questions. certificate_expires: UTC seconds at which the coordinator's own certificate ends."""

    def __init__(
        self,
        federation: str,
        software: str,
        store: Store,
        artifacts: Artifacts,
        conductor: Conductor,
        members: StoredMembers,
        collector: Collector,
        certificate_expires: Callable[[], float],
    ) -> None:
        self._federation = federation
        self._software = software
        self._store = store
        self._artifacts = artifacts
        self._conductor = conductor
        self._members = members
        self._collector = collector
        self._certificate_expires = certificate_expires
        self._began = time.monotonic()

    def runs(self) -> list[admin_pb2.RunSummary]:
        """Every run, oldest first."""
        return [self._run(stored) for stored in self._store.runs()]

    def rounds(self, run: bytes, newest: int | None = None) -> list[admin_pb2.RoundSummary]:
        """A run's rounds, oldest first. newest: no more than so many, the last ones."""
        return [self._round(stored) for stored in self._store.rounds(run, newest)]

    def newest_round(self, run: bytes) -> admin_pb2.RoundSummary | None:
        """A run's newest round, if it has had one."""
        newest = self._store.newest_round(run)
        return self._round(newest) if newest else None

    def trace(self, run: bytes, number: int) -> admin_pb2.GetRoundTraceResponse | None:
        """What took how long in a round; None where there was no such round."""
        stored = self._store.round(run, number)
        if stored is None:
            return None
        spans = self._conductor.trace.spans(run, number)
        return admin_pb2.GetRoundTraceResponse(
            summary=self._round(stored),
            spans=[
                admin_pb2.RoundSpan(
                    party=span.party,
                    lane=span.lane,
                    what=span.what,
                    attempt=span.attempt,
                    began_unix_s=span.began_at,
                    ended_unix_s=span.ended_at,
                    bytes=span.bytes,
                    pieces=span.pieces,
                    outcome=span.outcome,
                )
                for span in spans[:SPANS_TOLD]
            ],
            left_out=max(0, self._store.spans.count(run, number) - SPANS_TOLD) if len(spans) > SPANS_TOLD else 0,
            now_unix_s=time.time(),
        )

    def watch(self, run: bytes) -> admin_pb2.WatchRunResponse:
        """A run and its newest round."""
        stored = self._store.run(run)
        assert stored is not None  # the caller found it
        return admin_pb2.WatchRunResponse(summary=self._run(stored), current=self.newest_round(run))

    def checkpoints(self, run: bytes) -> list[admin_pb2.Checkpoint]:
        """A run's checkpoints, oldest first, the retired among them."""
        reasons, retired = self._collector.reasons(run), self._store.shelf.retired(run)
        named = self._store.shelf.shelved(run).named
        return [
            admin_pb2.Checkpoint(
                round=c.round,
                weights_digest=c.weights,
                ema_digest=c.ema,
                bytes=c.bytes,
                created_unix_s=c.created_at,
                kept=reasons.get(c.round, ""),
                retired_unix_s=retired.get(c.round, 0.0),
                name=named.get(c.round, ""),
            )
            for c in self._store.checkpoints(run)
        ]

    def enrolments(self) -> list[admin_pb2.Enrolment]:
        """Invitations and what came of them, newest first."""
        members, now = self._members.newest(), time.time()
        return [
            admin_pb2.Enrolment(
                name=row["name"],
                role=row["role"],
                state=self._enrolment_state(row["name"], row["role"], row["signing_key"], row["expires_unix_s"], members, now),
                signing_key=row["signing_key"] or b"",
                expires_unix_s=row["expires_unix_s"],
                enrolled_unix_s=row["enrolled_unix_s"] or 0,
            )
            for row in self._store.invitations()
        ]

    def status(self) -> admin_pb2.GetStatusResponse:
        """The federation at a glance."""
        seen = self._store.sites_seen()
        keys = {m.name: m.key for m in self._members.newest().everyone() if m.role is Role.SITE}
        sites = []
        for name, key in keys.items():
            last = seen.get(name)
            sites.append(
                admin_pb2.SiteStatus(
                    site=name,
                    connected=self._conductor.connected(name),
                    last_seen_unix_s=last.at if last else 0.0,
                    address=last.address if last else "",
                    certificate_expires_unix_s=int(last.certificate_expires_at) if last else 0,
                    software=last.software if last else "",
                    left_unix_s=self._store.left_at(name, key),
                )
            )
        return admin_pb2.GetStatusResponse(
            federation=self._federation,
            software=self._software,
            uptime_s=time.monotonic() - self._began,
            members_version=self._members.newest().version,
            sites=sites,
            runs=self.runs(),
            disk_free_bytes=free_bytes(self._artifacts.root),
            certificate_expires_unix_s=int(self._certificate_expires()),
        )

    def _enrolment_state(
        self, name: str, role: str, signing_key: bytes | None, expires_unix_s: int, members: SignedMembers, now: float
    ) -> str:
        entry = members.member(name)
        if signing_key is None:
            return "expired" if now > expires_unix_s else "invited"
        if entry is not None and entry.role.value == role and entry.key == signing_key:
            return "left" if role == Role.SITE.value and self._store.left_at(name, signing_key) else "member"
        return "revoked" if self._members.was_removed(name, signing_key) else "enrolled"

    def _run(self, stored: StoredRun) -> admin_pb2.RunSummary:
        wanted, closed = self._store.wanted(stored.run, RoundKind.TRAIN)
        checkpoint = self._store.newest_checkpoint(stored.run)
        return admin_pb2.RunSummary(
            run=stored.run,
            name=stored.manifest.name,
            state=self._state(stored),
            rounds_closed=closed,
            rounds_wanted=wanted,
            aggregation=stored.manifest.aggregation,
            checkpoint=checkpoint.weights if checkpoint else b"",
            note=self._conductor.note(stored.run),
            parameters=stored.manifest.tensor_table.size,
            participants=[p.name for p in stored.manifest.participants],
        )

    def _state(self, stored: StoredRun) -> str:
        live = self._conductor.round(stored.run)
        if live is not None and not live.ended:
            return "running"
        if stored.stopped:
            return "stopped"
        if stored.paused is not None:
            return "paused"
        return "waiting" if self._store.open_order(stored.run) is not None else "idle"

    def _round(self, stored: StoredRound) -> admin_pb2.RoundSummary:
        live = self._conductor.round(stored.state.run)
        state = live if live is not None and live.number == stored.state.number else stored.state
        summary = admin_pb2.RoundSummary(
            round=state.number,
            kind=KIND_TO_WIRE[state.kind],
            phase=PHASE_TO_WIRE[state.phase],
            reason=state.reason,
            started_unix_s=state.started_at,
            seconds=max(0.0, (state.ended_at or time.time()) - state.started_at),
            attempt=state.attempt,
            invited=state.invited,
            survivors=state.survivors,
            bytes_down=stored.bytes_down,
            bytes_up=stored.bytes_up,
            base_digest=state.base_digest,
            checkpoint_digest=state.checkpoint,
            sites=[] if state.ended else self._sites(state),
        )
        if stored.outcome:
            _add_outcome(summary, RoundOutcome.from_json(stored.outcome))
        return summary

    def _sites(self, state: Round) -> list[admin_pb2.SiteProgress]:
        return [
            admin_pb2.SiteProgress(
                site=name,
                connected=self._conductor.connected(name),
                activity=ACTIVITY_TO_WIRE[site.activity],
                tenths=site.tenths,
                bytes=site.bytes_moved,
                delivered=has_delivered(state, name),
                declined=DECLINE_TO_WIRE[site.declined] if site.declined else site_pb2.DECLINE_CODE_UNSPECIFIED,
                late=site.late,
            )
            for name, site in sorted(state.sites.items())
        ]


def _add_outcome(summary: admin_pb2.RoundSummary, outcome: RoundOutcome) -> None:
    summary.has_losses = outcome.heldout_loss is not None
    summary.heldout_loss = outcome.heldout_loss or 0.0
    summary.heldout_loss_by_bucket.extend(outcome.heldout_loss_by_bucket)
    summary.train_loss = outcome.train_loss or 0.0
    summary.clip_ratio = outcome.clip_ratio
    summary.total_weight = outcome.total_weight
    summary.update_norm = outcome.update_norm or 0.0
    summary.note = outcome.note
    summary.moments_digest = bytes.fromhex(outcome.moments)
