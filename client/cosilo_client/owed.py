"""What the coordinator says a site owes, and what a site says of itself: the wire's meaning without the wire, frozen.

Owns the words that the session (which knows gRPC) and participation (which does not) share. Holds no logic beyond
reading one value.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cosilo_common.secagg.messages import RoundKind


class Phase(IntEnum):
    """Where a round stands, with the wire's numbers (site.proto, RoundPhase)."""

    GATHERING = 1
    TRAINING = 2
    SHARING = 3
    UPLOADING = 4
    CONSENTING = 5
    REVEALING = 6
    OPENING = 7
    CLOSED = 8
    ABANDONED = 9

    @property
    def ended(self) -> bool:
        """Closed or abandoned."""
        return self >= Phase.CLOSED


class Activity(IntEnum):
    """What this site is doing, with the wire's numbers (site.proto, SiteActivity)."""

    FETCHING = 1
    TRAINING = 2
    MASKING = 3
    UPLOADING = 4
    WAITING = 5


class DeclineCode(IntEnum):
    """Why this site does not do what it owes, with the wire's numbers. Reasons in words stay at the site."""

    NOT_ACCEPTED = 1
    POLICY = 2
    PROTOCOL = 3
    DATA = 4
    TRAINER = 5
    DISK = 6
    PAUSED = 7


@dataclass(frozen=True)
class WeightsStep:
    """An artifact that turns other weights into a round's. digest: its own; base: of those weights; 32 bytes each. bytes: its length."""

    digest: bytes
    base: bytes
    bytes: int


@dataclass(frozen=True)
class Owed:
    """What this site owes in one run, whole. Digests are 32 bytes; messages are signed and verbatim; see site.proto."""

    run: bytes
    round: int
    kind: RoundKind
    phase: Phase
    invited: bool
    attempt: int
    invited_sites: tuple[str, ...]
    base_digest: bytes
    base_bytes: int
    encoding: bytes
    roster: tuple[bytes, ...] = ()
    shares: tuple[bytes, ...] = ()
    survivors: tuple[str, ...] = ()
    consents: tuple[bytes, ...] = ()
    checkpoint: bytes = b""
    delivered: bool = False
    deadline_s: float = 0.0
    reason: str = ""
    step: WeightsStep | None = None

    @property
    def label(self) -> str:
        """The run and round as people read them in a log."""
        return f"{self.run.hex()[:12]}/{self.round}"


@dataclass(frozen=True)
class Progress:
    """How far this site is in a round; tenths 0 to 10 and bytes moved, of that activity."""

    run: bytes
    round: int
    activity: Activity
    tenths: int
    bytes_moved: int = 0


@dataclass(frozen=True)
class Decline:
    """This site does not take part, or not further, in a round. reached: see site.proto."""

    run: bytes
    round: int
    code: DeclineCode
    reached: int = 0
