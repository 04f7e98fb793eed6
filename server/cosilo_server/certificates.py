"""Which certificate each member has: seen when it calls, kept over restarts, shown in the metrics, and judged by the trust
document.

A certificate counts while its intermediate stands in the document. A stream that was opened with an older one goes on once
its owner has shown, with the same TLS key, one that counts: so a renewal drops no stream, and the end of an overlap cuts
those alone who never renewed. Must not know sockets, or how a document is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cosilo_common.identity.members import Member
from cosilo_common.identity.names import Peer, Role
from cosilo_server.metrics import CoordinatorMetrics
from cosilo_server.store import Store

RETIRED_WORDS = "its certificate is of a CA that was retired while it was away: enrol again, with a new invitation of an admin"


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """key_digest: SHA-256 of the certified key; issuer: the intermediate's key identifier in hex; expires_at: UTC seconds."""

    key_digest: bytes
    issuer: str
    expires_at: float


class CertificateBook:
    """issuers: the intermediates that count now, newest first; empty while every one does (before the first rotation, or
    under a federation's own PKI)."""

    def __init__(self, store: Store, metrics: CoordinatorMetrics, issuers: Callable[[], Sequence[str]]) -> None:
        self._store = store
        self._metrics = metrics
        self._issuers = issuers
        self._lock = threading.Lock()
        self._shown = {
            (Role(row["role"]), row["name"]): ShownCertificate(row["key_digest"], row["issuer"], row["expires_at"])
            for row in store.certificates_seen()
        }

    def retired(self, peer: Peer) -> bool:
        """Whether this certificate counts no longer, and its owner has shown none that does."""
        issuers = self._issuers()
        if not issuers or peer.issuer in issuers:
            return False
        newest = self._shown.get((peer.name.role, peer.name.name))
        return newest is None or newest.key_digest != peer.key_digest or newest.issuer not in issuers

    def is_new(self, peer: Peer) -> bool:
        """Whether `note` would keep something: cheap, for every call."""
        newest = self._shown.get((peer.name.role, peer.name.name))
        if newest is None or newest.key_digest != peer.key_digest:
            return True
        # Newer by its issuer, then by its end: an old stream's calls do not take back what was renewed.
        shown, before = self._rank(peer.issuer), self._rank(newest.issuer)
        return shown < before or (shown == before and newest.expires_at < peer.not_after.timestamp())

    def note(self, peer: Peer) -> None:
        """Keeps a member's certificate. Blocks on the disk."""
        shown = ShownCertificate(peer.key_digest, peer.issuer, peer.not_after.timestamp())
        with self._lock:
            if not self.is_new(peer):
                return
            self._store.saw_certificate(
                {
                    "role": peer.name.role.value,
                    "name": peer.name.name,
                    "key_digest": shown.key_digest,
                    "issuer": shown.issuer,
                    "expires_at": shown.expires_at,
                }
            )
            self._shown[peer.name.role, peer.name.name] = shown
        self._metrics.certificate_expiry.labels(subject=f"{peer.name.role}/{peer.name.name}").set(shown.expires_at)

    def of(self, member: Member) -> ShownCertificate | None:
        """What a member showed last."""
        return self._shown.get((member.role, member.name))

    def show(self, members: Collection[Member]) -> None:
        """Puts into the metrics when each member's certificate ends, and takes out who is none any more."""
        present = {(member.role, member.name) for member in members}
        for (role, name), shown in list(self._shown.items()):
            subject = f"{role}/{name}"
            if (role, name) in present:
                self._metrics.certificate_expiry.labels(subject=subject).set(shown.expires_at)
            else:
                self._metrics.certificate_expiry.remove(subject)

    def _rank(self, issuer: str) -> int:
        """How new an intermediate is: 0 is today's."""
        issuers = self._issuers()
        return issuers.index(issuer) if issuer in issuers else len(issuers)
