"""What one site owes, as a function of the round's state: level-triggered, whole, and the same however often it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.machine import deadline_s, has_delivered
from cosilo_server.rounds.state import Phase, Round, WeightsStep

_ROSTER_KNOWN = frozenset({Phase.SHARING, Phase.UPLOADING, Phase.CONSENTING, Phase.REVEALING, Phase.OPENING})
_SURVIVORS_KNOWN = frozenset({Phase.CONSENTING, Phase.REVEALING, Phase.OPENING})


@dataclass(frozen=True)
class Assignment:
    """What a site owes in one run. Messages are signed and verbatim; digests 32 bytes; deadline in seconds without progress."""

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
    roster: tuple[bytes, ...]
    shares: tuple[bytes, ...]
    survivors: tuple[str, ...]
    consents: tuple[bytes, ...]
    checkpoint: bytes
    delivered: bool
    deadline_s: float
    reason: str
    step: WeightsStep | None


def assignment_for(state: Round, site: str) -> Assignment:
    """What `site` owes now. A site that was not invited, or is left out, sees `invited` false and owes nothing."""
    record = state.sites[site]
    phase = state.phase
    invited = site in state.invited and not (record.late and phase in (Phase.TRAINING, Phase.SHARING, Phase.UPLOADING))
    adverts = tuple(m for n in state.roster if (m := state.sites[n].advert) is not None)
    shares = tuple(m for n in state.roster if (m := state.sites[n].shares) is not None)
    consents = tuple(m for n in state.roster if (m := state.sites[n].consent) is not None)
    return Assignment(
        run=state.run,
        round=state.number,
        kind=state.kind,
        phase=phase,
        invited=invited,
        attempt=state.attempt,
        invited_sites=state.invited,
        base_digest=state.base_digest,
        base_bytes=state.base_bytes,
        encoding=state.encoding,
        roster=adverts if phase in _ROSTER_KNOWN else (),
        shares=shares if phase is Phase.UPLOADING else (),
        survivors=state.survivors if phase in _SURVIVORS_KNOWN or state.ended else (),
        consents=consents if phase is Phase.REVEALING else (),
        checkpoint=state.checkpoint,
        delivered=has_delivered(state, site),
        deadline_s=deadline_s(state),
        reason=state.reason,
        step=state.step,
    )
