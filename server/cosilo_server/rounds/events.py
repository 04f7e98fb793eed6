"""What can happen to a round, and what the machine asks for in return. Messages arrive here verified: signature, context, commitments."""

from __future__ import annotations

from dataclasses import dataclass

from cosilo_server.rounds.state import Activity, DeclineCode, Upload


@dataclass(frozen=True)
class Connected:
    """A participant's stream opened."""

    site: str


@dataclass(frozen=True)
class Disconnected:
    """A participant's stream ended."""

    site: str


@dataclass(frozen=True)
class Progressed:
    """A site advanced; tenths 0 to 10, bytes moved in that activity."""

    site: str
    activity: Activity
    tenths: int
    bytes_moved: int


@dataclass(frozen=True)
class Declined:
    """A site will not take part, or not further."""

    site: str
    code: DeclineCode


@dataclass(frozen=True)
class AdvertReceived:
    """Training is done at a site; message: its signed advert, verbatim."""

    site: str
    attempt: int
    message: bytes


@dataclass(frozen=True)
class SharesReceived:
    """A site's encrypted shares for all of U1."""

    site: str
    attempt: int
    message: bytes


@dataclass(frozen=True)
class ComplaintReceived:
    """A site found a dealer's share wrong."""

    site: str
    attempt: int
    dealer: str


@dataclass(frozen=True)
class UploadReceived:
    """A site's upload is whole and on disk, its digest as signed."""

    site: str
    attempt: int
    upload: Upload


@dataclass(frozen=True)
class ConsentReceived:
    """A site signed the survivors."""

    site: str
    attempt: int
    message: bytes


@dataclass(frozen=True)
class RevealReceived:
    """A site revealed the shares that open the sum."""

    site: str
    attempt: int
    message: bytes


@dataclass(frozen=True)
class SumOpened:
    """The sum was opened and the checkpoint (32-byte digest of its weights) is on disk."""

    checkpoint: bytes


@dataclass(frozen=True)
class SumRefused:
    """The sum could not be opened."""

    reason: str


@dataclass(frozen=True)
class Stopped:
    """An admin abandons the round."""

    reason: str


@dataclass(frozen=True)
class Resumed:
    """The coordinator came back: whoever is pending gets a whole deadline again."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Message = AdvertReceived | SharesReceived | ComplaintReceived | UploadReceived | ConsentReceived | RevealReceived
Event = Message | Connected | Disconnected | Progressed | Declined | SumOpened | SumRefused | Stopped | Resumed | Tick


@dataclass(frozen=True)
class Refuse:
    """The event changed nothing; reason names why, for the log, the metric and the caller alike."""

    reason: str


@dataclass(frozen=True)
class OpenSum:
    """Open the survivors' sum, then hand in SumOpened or SumRefused. Asked again on Resumed; must be repeatable."""


@dataclass(frozen=True)
class EndRound:
    """The round is over: drop its spool, start what comes next."""


@dataclass(frozen=True)
class LeftOut:
    """A site goes on without this round from here; for the metrics."""

    site: str
    phase: str


Effect = Refuse | OpenSum | EndRound | LeftOut
