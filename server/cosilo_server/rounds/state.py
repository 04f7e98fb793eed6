"""What a round is: frozen values only.

A round is folded from verified messages; `sites` holds what each site has delivered, verbatim, because later phases send it on. Fields marked
transient are not persisted: after a restart they start anew and the watch over progress with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter

from cosilo_common.secagg.messages import RoundKind


class Phase(StrEnum):
    """Where a round stands, in the order of the protocol (PROTOCOL.md, Phases)."""

    GATHERING = "gathering"
    TRAINING = "training"
    SHARING = "sharing"
    UPLOADING = "uploading"
    CONSENTING = "consenting"
    REVEALING = "revealing"
    OPENING = "opening"
    CLOSED = "closed"
    ABANDONED = "abandoned"


ENDED = frozenset({Phase.CLOSED, Phase.ABANDONED})


class Activity(StrEnum):
    """What a site says it is doing, in the order in which it does it."""

    IDLE = "idle"
    FETCHING = "fetching"
    TRAINING = "training"
    MASKING = "masking"
    UPLOADING = "uploading"
    WAITING = "waiting"


ACTIVITY_ORDER = {activity: place for place, activity in enumerate(Activity)}


class DeclineCode(StrEnum):
    """Why a site does not take part."""

    NOT_ACCEPTED = "not accepted"
    POLICY = "policy"
    PROTOCOL = "protocol"
    DATA = "data"
    TRAINER = "trainer"
    DISK = "disk"
    PAUSED = "paused"


@dataclass(frozen=True)
class Deadlines:
    """Seconds without progress after which a site is left out of the phase."""

    gather_s: float
    training_s: float
    sharing_s: float
    uploading_s: float
    consenting_s: float
    revealing_s: float


@dataclass(frozen=True)
class Terms:
    """What a round needs of its run's manifest. participants: sorted names; cohort: sites to invite, 0 for all."""

    participants: tuple[str, ...]
    secure: bool
    n_min: int
    f: int
    cohort: int
    deadlines: Deadlines

    @property
    def least_invited(self) -> int:
        """R1: |I| >= max(n_min, f + 2) under masks; n_min in plain sum."""
        return max(self.n_min, self.f + 2) if self.secure else self.n_min


@dataclass(frozen=True)
class Upload:
    """A whole upload, on disk, whose digest was checked. statement: the site's signed message that names digest and size."""

    statement: bytes
    digest: bytes
    size_bytes: int


@dataclass(frozen=True)
class WeightsStep:
    """How a site that holds earlier weights makes the round's. digest: of the artifact; base: of those weights; 32 bytes each."""

    digest: bytes
    base: bytes
    bytes: int


_TRANSIENT = {"transient": True}


@dataclass(frozen=True)
class Site:
    """One participant in this round: what it delivered, and how it stands."""

    advert: bytes | None = None
    shares: bytes | None = None
    upload: Upload | None = None
    consent: bytes | None = None
    reveal: bytes | None = None
    complaints: tuple[str, ...] = ()  # dealers it complained of, over all attempts
    declined: DeclineCode | None = None
    late: bool = False
    connected: bool = field(default=False, metadata=_TRANSIENT)
    activity: Activity = field(default=Activity.IDLE, metadata=_TRANSIENT)
    tenths: int = field(default=0, metadata=_TRANSIENT)
    bytes_moved: int = field(default=0, metadata=_TRANSIENT)
    progressed_at: float = field(default=0.0, metadata=_TRANSIENT)
    graces: int = field(default=0, metadata=_TRANSIENT)  # reconnections in this phase that gave it a whole deadline again


@dataclass(frozen=True)
class Round:
    """One round, whole.

    run, base_digest, seed: 32 bytes; base_bytes: length of the weights artifact; encoding: its canonical bytes; seed: chooses the cohort.
    invited, roster, survivors: PROTOCOL.md's I, U1 and U3, sorted. Times are UTC seconds as handed in with each event.
    """

    run: bytes
    number: int
    kind: RoundKind
    terms: Terms
    base_digest: bytes
    base_bytes: int
    encoding: bytes
    seed: bytes
    started_at: float
    phase: Phase = Phase.GATHERING
    phase_since: float = 0.0
    attempt: int = 1
    sites: Mapping[str, Site] = field(default_factory=dict)
    invited: tuple[str, ...] = ()
    roster: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    checkpoint: bytes = b""
    reason: str = ""
    ended_at: float = 0.0
    step: WeightsStep | None = None

    @property
    def threshold(self) -> int:
        """R1: t = floor((|I| + f) / 2) + 1."""
        return (len(self.invited) + self.terms.f) // 2 + 1

    @property
    def quorum(self) -> int:
        """Fewest sites that may stand in a roster or a survivor set."""
        return max(self.threshold, self.terms.n_min) if self.terms.secure else self.terms.n_min

    @property
    def ended(self) -> bool:
        """Closed or abandoned."""
        return self.phase in ENDED

    def same_in_store(self, other: Round) -> bool:
        """Whether a restart would find the same; most of what sites say moves one of them, and only what is not stored."""
        return (
            _ROUND_STORED(self) == _ROUND_STORED(other)
            and self.sites.keys() == other.sites.keys()
            and all(site is other.sites[name] or _SITE_STORED(site) == _SITE_STORED(other.sites[name]) for name, site in self.sites.items())
        )


_SITE_STORED = attrgetter(*(each.name for each in fields(Site) if not each.metadata.get("transient")))
_ROUND_STORED = attrgetter(*(each.name for each in fields(Round) if each.name != "sites"))
