"""The round machine: `step(state, event, now) -> (state, effects)`. Pure: same inputs, same outputs, nothing else touched.

Its rules:
1. A phase waits for deliveries from some sites. A site is *late* when it has not delivered and has not progressed for the phase's deadline;
   it has *given up* when it declined. The phase ends when every site it waits for has delivered, is late or has given up, or as soon as
   enough have where the protocol needs no more.
2. If enough delivered, the next phase begins; if not, the round is abandoned with a reason (or, while shares are dealt, a new attempt begins).
   So every phase has an exit: progress is bounded (PROGRESS_PARTS), reconnections that excuse a silence are (GRACES_MAX), and a deadline
   runs from the last of them.
3. The first delivery of a kind stands. The same bytes again change nothing; other bytes are refused.
4. Once survivors are proposed they never change (PROTOCOL.md, phase 5).
Sources: PROTOCOL.md, Phases and R1; Bonawitz et al., CCS 2017, figure 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cosilo_common.secagg.messages import RoundKind
from cosilo_server.rounds.events import (
    AdvertReceived,
    ComplaintReceived,
    Connected,
    ConsentReceived,
    Declined,
    Disconnected,
    Effect,
    EndRound,
    Event,
    LeftOut,
    OpenSum,
    Progressed,
    Refuse,
    Resumed,
    RevealReceived,
    SharesReceived,
    Stopped,
    SumOpened,
    SumRefused,
    Tick,
    UploadReceived,
)
from cosilo_server.rounds.state import ACTIVITY_ORDER, DeclineCode, Phase, Round, Site, Terms, WeightsStep

ATTEMPTS_MAX = 5  # PROTOCOL.md, phase 2
PROGRESS_PARTS = 128  # a transfer counts as advancing when it moved this part of the model: bounds how long a dribble can hold a round
PROGRESS_BYTES_MIN = 64 << 10  # and at least this much, so that a tiny model is not held by single bytes
GRACES_MAX = 3  # returns in a phase, of a link or from a pause, that give a whole deadline again: a site may crash twice, not flap for ever

Step = tuple[Round, tuple[Effect, ...]]


@dataclass(frozen=True)
class PhaseRule:
    """One row of the table: whom the phase waits for, which delivery, how many suffice, what follows."""

    delivery: str  # the field of Site that holds it, or "connected"
    deadline: str  # the field of Deadlines
    waits_for: Callable[[Round], Iterable[str]]
    suffices: Callable[[Round], int] | None  # ends the phase as soon as so many delivered; None waits for all
    then: Callable[[Round, tuple[str, ...], float], Step]


def begin(
    *,
    run: bytes,
    number: int,
    kind: RoundKind,
    terms: Terms,
    base_digest: bytes,
    base_bytes: int,
    encoding: bytes,
    seed: bytes,
    connected: Iterable[str],
    now: float,
    gone: Iterable[str] = (),
    step: WeightsStep | None = None,
) -> Step:
    """Begins a round: it gathers participants, and invites at once when all it wants are connected. gone: who is no member any more."""
    present, declined = set(connected), dict.fromkeys(gone, DeclineCode.NOT_ACCEPTED)
    sites = {name: Site(connected=name in present, progressed_at=now, declined=declined.get(name)) for name in terms.participants}
    state = Round(run, number, kind, terms, base_digest, base_bytes, encoding, seed, now, phase_since=now, sites=sites, step=step)
    return _advance(state, now)


def step(state: Round, event: Event, now: float) -> Step:
    """Moves a round by one event. An event that has no place in the state changes nothing and yields Refuse with the reason."""
    if state.ended:
        return _refuse(state, f"round {state.number} is {state.phase}")
    match event:
        case Tick():
            return _advance(state, now)
        case Resumed():
            return _resume(state, now)
        case Connected(site) | Disconnected(site) | Declined(site) | Progressed(site):
            if site not in state.sites:
                return _refuse(state, f"{site} is no participant of this run")
            return _advance(_note(state, event, now), now)
        case Stopped(reason):
            return _abandon(state, reason, now)
        case SumOpened(checkpoint):
            if state.phase is not Phase.OPENING:
                return _refuse(state, f"no sum is being opened while {state.phase}")
            return replace(state, phase=Phase.CLOSED, phase_since=now, checkpoint=checkpoint, ended_at=now), (EndRound(),)
        case SumRefused(reason):
            if state.phase is not Phase.OPENING:
                return _refuse(state, f"no sum is being opened while {state.phase}")
            return _abandon(state, reason, now)
        case ComplaintReceived():
            return _complain(state, event, now)
        case _:
            return _deliver(state, event, now)


def waiting_for(state: Round) -> tuple[str, ...]:
    """Sites that this phase still waits for, sorted."""
    rule = TABLE.get(state.phase)
    return () if rule is None else tuple(sorted(n for n in rule.waits_for(state) if _pending(state.sites[n], rule)))


def has_delivered(state: Round, site: str) -> bool:
    """Whether the site has given what this phase asks."""
    rule = TABLE.get(state.phase)
    return rule is not None and site in state.sites and _delivered(state.sites[site], rule)


def deadline_s(state: Round) -> float:
    """Seconds without progress that this phase allows; 0 where it waits for no site."""
    rule = TABLE.get(state.phase)
    if rule is None:
        return 0.0
    if state.phase is Phase.TRAINING and state.attempt > 1:  # trained already: only an advert is owed
        return state.terms.deadlines.sharing_s
    return float(getattr(state.terms.deadlines, rule.deadline))


# --- noting what sites say of themselves ---


def _note(state: Round, event: Event, now: float) -> Round:
    match event:
        case Connected(name):
            graces = state.sites[name].graces + 1
            excused = {"progressed_at": now, "graces": graces} if graces <= GRACES_MAX else {}
            return _with_site(state, name, connected=True, **excused)
        case Disconnected(name):
            return _with_site(state, name, connected=False)
        case Declined(name, code) if state.sites[name].declined is None:  # the first stands until it works again: each is written down
            return _with_site(state, name, declined=code)
        case Progressed(name, activity, tenths, moved):
            return _progress(state, name, Site(activity=activity, tenths=tenths, bytes_moved=moved), now)
        case _:
            return state


def _progress(state: Round, name: str, said: Site, now: float) -> Round:
    """Takes progress when it is real: a later activity, a higher tenth, or a whole part of the model more, of which there are only so many."""
    site = state.sites[name]
    part = max(PROGRESS_BYTES_MIN, state.base_bytes // PROGRESS_PARTS)
    step_bytes = 0 if state.step is None else state.step.bytes
    most = (state.base_bytes + step_bytes) // part + 1  # a site says what it likes: more than a step in vain and the model is no progress
    tenths = min(max(said.tenths, 0), 10)
    later = ACTIVITY_ORDER[said.activity] > ACTIVITY_ORDER[site.activity]
    further = tenths > site.tenths or min(said.bytes_moved // part, most) > site.bytes_moved // part
    whole = site.bytes_moved < state.base_bytes <= said.bytes_moved
    if not later and (said.activity is not site.activity or not (further or whole)):
        if site.declined is not None and site.graces < GRACES_MAX:  # it was paused, and begins this round's work again
            again = {"activity": said.activity, "tenths": tenths, "bytes_moved": said.bytes_moved}
            return _with_site(state, name, **again, progressed_at=now, declined=None, graces=site.graces + 1)
        return state
    if not later:
        tenths = max(tenths, site.tenths)
        said = replace(said, bytes_moved=max(said.bytes_moved, site.bytes_moved))
    # A site that declined and then works has changed its mind (an acceptance, an hour of the day): it is in again.
    return _with_site(
        state,
        name,
        activity=said.activity,
        tenths=tenths,
        bytes_moved=said.bytes_moved,
        progressed_at=now,
        declined=None,
    )


def _resume(state: Round, now: float) -> Step:
    sites = {n: replace(s, progressed_at=now, connected=False) for n, s in state.sites.items()}
    state = replace(state, sites=sites, phase_since=now)
    return (state, (OpenSum(),)) if state.phase is Phase.OPENING else (state, ())


# --- deliveries ---

_DELIVERED_IN = {
    AdvertReceived: (Phase.TRAINING, "advert"),
    SharesReceived: (Phase.SHARING, "shares"),
    UploadReceived: (Phase.UPLOADING, "upload"),
    ConsentReceived: (Phase.CONSENTING, "consent"),
    RevealReceived: (Phase.REVEALING, "reveal"),
}


def _deliver(state: Round, event: Event, now: float) -> Step:
    assert isinstance(event, AdvertReceived | SharesReceived | UploadReceived | ConsentReceived | RevealReceived)
    phase, name = _DELIVERED_IN[type(event)]
    body = event.upload if isinstance(event, UploadReceived) else event.message
    site = state.sites.get(event.site)
    if site is None:
        return _refuse(state, f"{event.site} is no participant of this run")
    if event.attempt != state.attempt:
        return _refuse(state, f"{name} for attempt {event.attempt}; this is attempt {state.attempt}")
    if getattr(site, name) == body:
        return state, ()
    if getattr(site, name) is not None:
        return _refuse(state, f"{event.site} has delivered another {name} in this attempt")
    if state.phase is not phase:
        return _refuse(state, f"{name} has no place while {state.phase}")
    if event.site not in set(TABLE[phase].waits_for(state)):
        return _refuse(state, f"{event.site} is left out of this round")
    if site.late:
        return _refuse(state, f"{event.site} is late in this round")
    return _advance(_with_site(state, event.site, **{name: body}, declined=None, progressed_at=now), now)


def _complain(state: Round, event: ComplaintReceived, now: float) -> Step:
    """A complaint ends its attempt. Late complaints of an ended attempt still count against their dealer."""
    if event.site not in state.invited or event.dealer not in state.invited:
        return _refuse(state, f"complaint of {event.site} against {event.dealer}: not both are invited")
    if state.phase not in (Phase.TRAINING, Phase.SHARING, Phase.UPLOADING) or event.attempt > state.attempt:
        return _refuse(state, f"a complaint has no place while {state.phase}")
    site = state.sites[event.site]
    if event.dealer in site.complaints:
        return state, ()
    state = _with_site(state, event.site, complaints=(*site.complaints, event.dealer))
    if event.attempt < state.attempt or state.phase is not Phase.UPLOADING:
        return _advance(state, now)
    return _next_attempt(state, f"{event.site} complained of {event.dealer}", now)


def barred(state: Round) -> frozenset[str]:
    """Whom complaints leave out: dealers with more than f complaints; otherwise the complainer (PROTOCOL.md, phase 3)."""
    against: dict[str, set[str]] = {}
    for name, site in state.sites.items():
        for dealer in site.complaints:
            against.setdefault(dealer, set()).add(name)
    guilty = {dealer for dealer, accusers in against.items() if len(accusers) > state.terms.f}
    return frozenset(guilty).union(*(accusers for dealer, accusers in against.items() if dealer not in guilty))


# --- the table ---


def _advance(state: Round, now: float) -> Step:
    """Ends phases for as long as they have an end: rule 1."""
    effects: list[Effect] = []
    while (rule := TABLE.get(state.phase)) is not None:
        state, left = _mark_late(state, rule, now)
        effects += left
        waited = sorted(rule.waits_for(state))
        delivered = tuple(n for n in waited if _delivered(state.sites[n], rule))
        enough = rule.suffices is not None and len(delivered) >= rule.suffices(state)
        if not enough and any(_pending(state.sites[n], rule) for n in waited) and not _gathered(state, now):
            break
        phase, attempt = state.phase, state.attempt
        state, more = rule.then(state, delivered, now)
        effects += more
        if (state.phase, state.attempt) == (phase, attempt):
            break
    return state, tuple(effects)


def _gathered(state: Round, now: float) -> bool:
    return state.phase is Phase.GATHERING and now - state.phase_since >= deadline_s(state)


def _mark_late(state: Round, rule: PhaseRule, now: float) -> tuple[Round, list[Effect]]:
    if state.phase is Phase.GATHERING:
        return state, []
    left: list[Effect] = []
    for name in sorted(rule.waits_for(state)):
        site = state.sites[name]
        if _pending(site, rule) and now - max(site.progressed_at, state.phase_since) >= deadline_s(state):
            state = _with_site(state, name, late=True)
            left.append(LeftOut(name, state.phase))
    return state, left


def _delivered(site: Site, rule: PhaseRule) -> bool:
    return bool(getattr(site, rule.delivery))


def _pending(site: Site, rule: PhaseRule) -> bool:
    return not _delivered(site, rule) and not site.late and site.declined is None


def _wanted(state: Round) -> tuple[str, ...]:
    """The cohort this round would like: the first k of the participants in an order drawn from the seed, or all."""
    ranked = _ranked(state)
    return ranked[: state.terms.cohort] if state.terms.cohort else ranked


def _ranked(state: Round) -> tuple[str, ...]:
    return tuple(sorted(state.sites, key=lambda name: hashlib.sha256(state.seed + name.encode()).digest()))


def _in_attempt(state: Round) -> tuple[str, ...]:
    out = barred(state)
    return tuple(n for n in state.invited if n not in out)


def _after_gathering(state: Round, connected: tuple[str, ...], now: float) -> Step:
    present = [n for n in _ranked(state) if state.sites[n].connected and state.sites[n].declined is None]
    cohort = tuple(sorted(present[: state.terms.cohort or len(present)]))
    if len(cohort) < state.terms.least_invited:
        return _abandon(state, f"{len(cohort)} sites are connected and {state.terms.least_invited} are needed", now)
    return _enter(replace(state, invited=cohort), Phase.TRAINING, now), ()


def _after_training(state: Round, delivered: tuple[str, ...], now: float) -> Step:
    if len(delivered) < state.quorum:
        return _abandon(state, f"{len(delivered)} sites finished training and {state.quorum} are needed{_declines(state)}", now)
    following = Phase.SHARING if state.terms.secure else Phase.UPLOADING
    return _enter(replace(state, roster=delivered), following, now), ()


def _declines(state: Round) -> str:
    """Why invited sites declined, for the reason: by code, which is all that they say."""
    codes = [site.declined for name in state.invited if (site := state.sites[name]).declined is not None]
    return "".join(f"; {codes.count(code)} declined: {code}" for code in DeclineCode if code in codes)


def _after_sharing(state: Round, delivered: tuple[str, ...], now: float) -> Step:
    if len(delivered) == len(state.roster):
        return _enter(state, Phase.UPLOADING, now), ()
    missing = [n for n in state.roster if n not in delivered]
    for name in missing:  # left out also where it gave up: one that adverts and declines anew would spend every attempt
        state = _with_site(state, name, late=True)
    return _next_attempt(state, f"no shares from {', '.join(missing)}", now)


def _after_uploading(state: Round, delivered: tuple[str, ...], now: float) -> Step:
    if len(delivered) < state.quorum:
        return _abandon(state, f"{len(delivered)} sites uploaded and {state.quorum} are needed", now)
    state = replace(state, survivors=delivered)
    if state.terms.secure:
        return _enter(state, Phase.CONSENTING, now), ()
    return _enter(state, Phase.OPENING, now), (OpenSum(),)


def _after_consenting(state: Round, delivered: tuple[str, ...], now: float) -> Step:
    if len(delivered) < state.threshold:
        return _abandon(state, f"{len(delivered)} sites consented and {state.threshold} are needed", now)
    return _enter(state, Phase.REVEALING, now), ()


def _after_revealing(state: Round, delivered: tuple[str, ...], now: float) -> Step:
    if len(delivered) < state.threshold:
        return _abandon(state, f"{len(delivered)} sites revealed their shares and {state.threshold} are needed", now)
    return _enter(state, Phase.OPENING, now), (OpenSum(),)


TABLE: Mapping[Phase, PhaseRule] = {
    #                          delivery     deadline        waits for           enough          then
    Phase.GATHERING: PhaseRule("connected", "gather_s", _wanted, None, _after_gathering),
    Phase.TRAINING: PhaseRule("advert", "training_s", _in_attempt, None, _after_training),
    Phase.SHARING: PhaseRule("shares", "sharing_s", lambda s: s.roster, None, _after_sharing),
    Phase.UPLOADING: PhaseRule("upload", "uploading_s", lambda s: s.roster, None, _after_uploading),
    Phase.CONSENTING: PhaseRule("consent", "consenting_s", lambda s: s.roster, lambda s: s.threshold, _after_consenting),
    Phase.REVEALING: PhaseRule("reveal", "revealing_s", lambda s: s.roster, lambda s: s.threshold, _after_revealing),
}


# --- moves ---


def _enter(state: Round, phase: Phase, now: float) -> Round:
    sites = {n: replace(s, graces=0) if s.graces else s for n, s in state.sites.items()}
    if phase in (Phase.CONSENTING, Phase.REVEALING):
        # A site that was late or gave up while uploading may still sign and reveal: it holds shares that the others need.
        sites = {n: replace(s, late=False, declined=None) for n, s in sites.items()}
    return replace(state, phase=phase, phase_since=now, sites=sites)


def _next_attempt(state: Round, why: str, now: float) -> Step:
    if state.attempt >= ATTEMPTS_MAX:
        return _abandon(state, f"{why}; {ATTEMPTS_MAX} attempts are spent", now)
    sites = {n: replace(s, advert=None, shares=None, upload=None) for n, s in state.sites.items()}
    state = replace(state, attempt=state.attempt + 1, roster=(), sites=sites)
    return _advance(_enter(state, Phase.TRAINING, now), now)


def _abandon(state: Round, reason: str, now: float) -> Step:
    return replace(state, phase=Phase.ABANDONED, phase_since=now, reason=reason, ended_at=now), (EndRound(),)


def _refuse(state: Round, reason: str) -> Step:
    return state, (Refuse(reason),)


def _with_site(state: Round, name: str, **changes: object) -> Round:
    return replace(state, sites={**state.sites, name: replace(state.sites[name], **changes)})  # type: ignore[arg-type]  # names are Site's
