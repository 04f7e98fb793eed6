"""From a signed message to an event that the round machine may see: the coordinator's cryptographic checks, in the state that they depend on.

Pure: a round's state and a manifest in, an event or ProtocolViolation out. The machine never sees a message that did not pass here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Final

from cosilo_common.encoding import Encoding
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import Complaint, MessageType, Reveal, Shares, Signed
from cosilo_common.secagg.messages import Upload as UploadBody
from cosilo_common.secagg.roster import Roster
from cosilo_common.secagg.roster import Terms as AttemptTerms
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_server import secagg
from cosilo_server.rounds.events import AdvertReceived, ComplaintReceived, ConsentReceived, Message, RevealReceived, SharesReceived
from cosilo_server.rounds.state import Phase, Round

ROSTERS_KEPT: Final = 32  # one a run that is in a round; with more at once, some are opened again

_PHASE_OF = {
    MessageType.ADVERT: Phase.TRAINING,
    MessageType.SHARES: Phase.SHARING,
    MessageType.CONSENT: Phase.CONSENTING,
    MessageType.REVEAL: Phase.REVEALING,
}


def attempt_terms(manifest: Manifest, state: Round) -> AttemptTerms:
    """What this attempt's messages are checked against."""
    encoding = Encoding.parse(state.encoding)
    return AttemptTerms(
        run=state.run,
        round=state.number,
        kind=state.kind,
        attempt=state.attempt,
        invited=state.invited,
        f=manifest.f,
        n_min=manifest.n_min,
        keys=manifest.participant_keys(),
        base_digest=state.base_digest,
        encoding_digest=encoding.digest(),
        bits=encoding.bits,
        length=encoding.length,
        secure=manifest.secure,
    )


def roster_of(manifest: Manifest, state: Round) -> Roster:
    """U1 with its verified adverts and ctx.

    Every message of a later phase is checked against it, and it costs a signature check a site: so it is kept, and a round costs N of
    them, not N^2.
    """
    found = (state.sites[name].advert for name in state.roster)
    adverts, terms = tuple(advert for advert in found if advert is not None), attempt_terms(manifest, state)
    said = tuple(getattr(terms, each.name) for each in fields(terms) if each.name != "keys")
    return _opened(_Adverts(terms, (*said, *sorted(terms.keys.items())), adverts))


@dataclass(frozen=True)
class _Adverts:
    """What a roster is opened from, comparable. said: all that `terms` says."""

    terms: AttemptTerms = field(compare=False)
    said: tuple[object, ...]
    adverts: tuple[bytes, ...]


@lru_cache(maxsize=ROSTERS_KEPT)
def _opened(known: _Adverts) -> Roster:
    return Roster.open(known.terms, (Signed.decode(advert) for advert in known.adverts))


def dealt_shares(state: Round) -> dict[str, Shares]:
    """The bodies of U1's shares messages, which were verified when they came."""
    messages = {name: state.sites[name].shares for name in state.roster}
    return {name: Shares.decode(Signed.decode(message).body) for name, message in messages.items() if message is not None}


def reveals_of(state: Round) -> dict[str, Reveal]:
    """The bodies of the reveals so far, which were verified when they came."""
    messages = {name: state.sites[name].reveal for name in state.roster}
    return {name: Reveal.decode(Signed.decode(message).body) for name, message in messages.items() if message is not None}


def is_repeat(state: Round, site: str, message: bytes) -> bool:
    """Whether the site has delivered exactly these bytes already, so that the answer is yes whatever the phase is now."""
    record = state.sites.get(site)
    return record is not None and message in (record.advert, record.shares, record.consent, record.reveal)


def is_superfluous(state: Round, signed: Signed) -> bool:
    """Whether it is a consent or a reveal that came after enough others: no fault of the site's, and of no use any more."""
    if signed.type not in (MessageType.CONSENT, MessageType.REVEAL) or signed.site not in state.roster:
        return False
    if (signed.run, signed.round, signed.attempt) != (state.run, state.number, state.attempt):
        return False
    order = list(Phase)
    return order.index(state.phase) > order.index(_PHASE_OF[signed.type])


def verified_event(manifest: Manifest, state: Round, signed: Signed) -> Message:
    """The event of one message. Raises ProtocolViolation naming the rule, or "phase" matters where it has no place now."""
    if signed.type is MessageType.COMPLAINT:
        return _complaint(manifest, state, signed)
    due = _PHASE_OF.get(signed.type)
    if due is None:
        raise ProtocolViolation(Rule.MESSAGE, f"{signed.type} is sent with the upload, not by itself")
    if (signed.run, signed.round) != (state.run, state.number):
        raise ProtocolViolation(Rule.ORDER, f"{signed.type} of {signed.site} is for round {signed.round}; this is round {state.number}")
    if state.phase is not due:
        raise ProtocolViolation(Rule.ORDER, f"{signed.type} of {signed.site} has no place while round {state.number} is {state.phase}")
    raw = signed.encode()
    if signed.type is MessageType.ADVERT:
        secagg.verify_advert(signed, attempt_terms(manifest, state))
        return AdvertReceived(signed.site, signed.attempt, raw)
    roster = roster_of(manifest, state)
    if signed.type is MessageType.SHARES:
        secagg.verify_shares(signed, roster)
        return SharesReceived(signed.site, signed.attempt, raw)
    if signed.type is MessageType.CONSENT:
        secagg.verify_consent(signed, roster, state.survivors)
        return ConsentReceived(signed.site, signed.attempt, raw)
    secagg.verify_reveal(signed, roster, state.survivors, dealt_shares(state))
    return RevealReceived(signed.site, signed.attempt, raw)


def verified_upload(manifest: Manifest, state: Round, signed: Signed) -> UploadBody:
    """The body of an upload statement that may be acted upon now."""
    if (signed.run, signed.round) != (state.run, state.number):
        raise ProtocolViolation(Rule.ORDER, f"upload of {signed.site} is for round {signed.round}; this is round {state.number}")
    if state.phase is not Phase.UPLOADING:
        raise ProtocolViolation(Rule.ORDER, f"upload of {signed.site} has no place while round {state.number} is {state.phase}")
    return secagg.verify_upload(signed, roster_of(manifest, state))


def _complaint(manifest: Manifest, state: Round, signed: Signed) -> Message:
    if (signed.run, signed.round) != (state.run, state.number):
        raise ProtocolViolation(Rule.ORDER, f"complaint of {signed.site} is for round {signed.round}; this is round {state.number}")
    if state.phase is Phase.UPLOADING and signed.attempt == state.attempt:
        body = secagg.verify_complaint(signed, roster_of(manifest, state))
    else:  # of an attempt that another complaint ended already: it still counts against its dealer
        body = _late_complaint(manifest, state, signed)
    return ComplaintReceived(signed.site, signed.attempt, body.dealer)


def _late_complaint(manifest: Manifest, state: Round, signed: Signed) -> Complaint:
    if not 1 <= signed.attempt < state.attempt:
        raise ProtocolViolation(Rule.ORDER, f"complaint of {signed.site} is for attempt {signed.attempt}, which has no shares yet")
    replace(attempt_terms(manifest, state), attempt=signed.attempt).check_envelope(signed, MessageType.COMPLAINT)
    body = Complaint.decode(signed.body)
    if body.dealer not in state.invited or body.dealer == signed.site:
        raise ProtocolViolation(Rule.SHARES, f"{signed.site} complains of {body.dealer}, who is no other invited site")
    return body
