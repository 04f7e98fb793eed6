"""The rules that hold after every event, whatever fails: watched on the wire, in the store and in the coordinator's memory.

Owns what must never happen (PROTOCOL's R1 to R8, persist before speaking, nothing acknowledged lost, nothing counted twice, one survivor
set) as checks over everything that leaves a party. It sees messages as bytes, so it believes nobody. Must not cause anything.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cosilo_client.ledger import RoundEntry
from cosilo_common.canonical import sha256
from cosilo_common.framing import data_of
from cosilo_common.manifest import Manifest
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.messages import Advert, Consent, MessageType, Reveal, RoundKind, Signed, threshold
from cosilo_common.secagg.messages import Upload as UploadBody
from cosilo_server.conductor import Conductor
from cosilo_server.rounds.state import Round
from tests.simulation.sums import Sums

SUBMIT = "/cosilo.v1.SiteService/Submit"
PUT = "/cosilo.v1.SiteService/PutUpdate"
ATTEND = "/cosilo.v1.SiteService/Attend"


class Violation(Exception):
    """A rule is broken. rule: which, in one word."""

    def __init__(self, rule: str, what: str, at_s: float) -> None:
        self.rule = rule
        super().__init__(f"{rule}: {what} (at {at_s:.3f} simulated seconds)")


@dataclass
class _Put:
    """One PutUpdate call."""

    signed: Signed
    digest: bytes
    offset: int = 0


@dataclass
class Watch:
    """What was seen so far. honest: whether the coordinator tells the truth; if not, what it proposes is no concern.

    entry_of: a site's ledger on one round; permits: what a person at a site allowed for a base model; durable: whether a power cut would
    leave the coordinator what one site uploaded in a round.
    """

    now: Callable[[], float]
    entry_of: Callable[[str, bytes, int], RoundEntry | None]
    permits: Callable[[str, bytes], int]
    durable: Callable[[bytes, int, str], bool]
    trace: Callable[[str], None]
    honest: bool = True
    violation: Violation | None = None
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    on_upload: Callable[[Signed], None] = lambda signed: None
    manifests: dict[bytes, Manifest] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    committed: dict[bytes, Round] = field(default_factory=dict)
    pending: dict[bytes, Round] = field(default_factory=dict)
    sums: Sums | None = None
    _observed: dict[bytes, Round] = field(default_factory=dict)
    _compared: dict[bytes, Round] = field(default_factory=dict)
    _unique: dict[tuple[object, ...], bytes] = field(default_factory=dict)
    _round_of: dict[tuple[str, bytes], int] = field(default_factory=dict)
    _calls: dict[int, Signed] = field(default_factory=dict)
    _puts: dict[int, _Put] = field(default_factory=dict)
    _acknowledged: dict[tuple[bytes, int, int], dict[tuple[str, str], bytes]] = field(default_factory=dict)
    _uploads: dict[tuple[str, bytes], dict[tuple[bytes, int], tuple[str, ...]]] = field(default_factory=dict)
    _excluded: set[tuple[str, bytes, int]] = field(default_factory=set)
    _revealed: dict[tuple[str, bytes, int], tuple[set[str], set[str]]] = field(default_factory=dict)
    _ended: set[tuple[bytes, int]] = field(default_factory=set)

    def fail(self, rule: str, what: str) -> None:
        """Notes the first rule that is broken; the simulation ends at its next step."""
        if self.violation is None:
            self.violation = Violation(rule, what, self.now())
            self.trace(f"VIOLATION {rule}: {what}")
            self.broken.set()

    # What sites say

    def site_sends(self, site: str, method: str, call: int, data: bytes) -> None:
        """Bytes leave a site."""
        if method == SUBMIT:
            signed = Signed.decode(site_pb2.SubmitRequest.FromString(data).message)
            self._calls[call] = signed
            self._signed(site, signed)
        elif method == PUT:
            chunk = data_of(data)
            if chunk is None:
                signed = Signed.decode(site_pb2.PutUpdateRequest.FromString(data).header.statement)
                self._signed(site, signed)
                self._puts[call] = _Put(signed, UploadBody.decode(signed.body).digest)
            else:
                self._chunk(site, self._puts[call], bytes(chunk))

    def _signed(self, site: str, signed: Signed) -> None:
        run, round_, attempt = signed.run, signed.round, signed.attempt
        self.counts[f"sent {signed.type}"] += 1
        self.trace(f"{site} sends {signed.type} {run.hex()[:6]}/{round_}.{attempt} {sha256(signed.encode()).hex()[:8]}")
        if signed.site != site:
            self.fail("signature", f"{site} sends a message of {signed.site}")
        highest = self._round_of.get((site, run), 0)
        if round_ < highest:
            self.fail("R2", f"{site} signs for round {round_} after round {highest}")
        self._round_of[site, run] = max(highest, round_)
        if signed.type is MessageType.REVEAL:  # before R4: that two of them differ is the lesser harm
            self._reveal(site, signed)
        once = (site, run, round_) if signed.type is MessageType.CONSENT else (site, run, round_, attempt)
        rule = "R5" if signed.type is MessageType.CONSENT else "R4"
        self._only_one(rule, (signed.type, *once), signed.encode(), f"{site} sends two different {signed.type}s in {round_}.{attempt}")
        match signed.type:
            case MessageType.ADVERT:
                self._invited(site, signed)
                self._advert(site, signed)
            case MessageType.CONSENT:
                consent = Consent.decode(signed.body)
                self._only_one("R5", ("attempt", *once), bytes([attempt]), f"{site} consents in two attempts of round {round_}")
                if site not in consent.survivors:
                    self._excluded.add((site, run, round_))
            case MessageType.SHARES:
                self._invited(site, signed)

    def _advert(self, site: str, signed: Signed) -> None:
        body = Advert.decode(signed.body)
        where = lambda: f"{site} in {signed.round}.{signed.attempt}"  # noqa: E731
        if (MessageType.CONSENT, site, signed.run, signed.round) in self._unique:
            consented = self._unique["attempt", site, signed.run, signed.round]
            if consented != bytes([signed.attempt]):
                self.fail("R5", f"{where()} adverts after it consented in attempt {consented[0]}")
        for key in filter(None, (body.share_key, body.mask_key)):
            self._only_one("R4", ("key", key), signed.encode(), f"{where()} uses a key of another attempt")
        self._only_one("R3", ("base", site, signed.run, signed.round), body.base_digest, f"{where()} adverts another base model")
        self._unique["kind", signed.run, signed.round] = body.kind.encode()

    def _invited(self, site: str, signed: Signed) -> tuple[str, ...]:
        entry = self.entry_of(site, signed.run, signed.round)
        manifest = self.manifests[signed.run]
        if entry is None:
            self.fail("R1", f"{site} signs for round {signed.round}, which its ledger does not hold")
            return ()
        if len(entry.invited) < manifest.least_invited:
            self.fail("R1", f"{site} takes part in round {signed.round} with only {len(entry.invited)} invited")
        names = " ".join(entry.invited).encode()
        self._only_one("R1", ("invited", site, signed.run, signed.round), names, f"{site}: round {signed.round} has two invited sets")
        return entry.invited

    def _reveal(self, site: str, signed: Signed) -> None:
        body = Reveal.decode(signed.body)
        b, s = self._revealed.setdefault((site, signed.run, signed.round), (set(), set()))
        b |= set(body.b_shares)
        s |= set(body.s_shares)
        if b & s:
            self.fail("R6", f"{site} has revealed both shares for {sorted(b & s)} in round {signed.round}")

    def _chunk(self, site: str, put: _Put, chunk: bytes) -> None:
        """Upload bytes leave a site: only those that it signed, only where it may (R4, R5, R8)."""
        signed = put.signed
        run, round_ = signed.run, signed.round
        assert self.sums is not None
        masked = self.sums.find(put.digest)
        if masked is None or masked.data[put.offset : put.offset + len(chunk)] != chunk:
            self.fail("R4", f"{site} uploads bytes that it did not sign in {round_}.{signed.attempt}")
        put.offset += len(chunk)
        if (site, run, round_) in self._excluded:
            self.fail("R5", f"{site} uploads in round {round_} after it consented to survivors without itself")
        self._model(site, signed)

    def _model(self, site: str, signed: Signed) -> None:
        run, round_ = signed.run, signed.round
        if self._unique["kind", run, round_] == RoundKind.REHEARSAL.encode():
            return
        base = self._unique["base", site, run, round_]
        rounds = self._uploads.setdefault((site, base), {})
        if (run, round_) in rounds:
            return
        rounds[run, round_] = self._invited(site, signed)
        allowed = self.permits(site, base)
        if len(rounds) <= allowed:
            return
        if len(rounds) > self.manifests[run].max_rounds_per_model:
            self.fail("R8", f"{site} uploads in {len(rounds)} rounds for one base model")
        if len(set(rounds.values())) > 1:
            self.fail("R8", f"{site} uploads for one base model among different invited sites")

    # What the coordinator says

    def coordinator_sends(self, site: str, method: str, call: int, data: bytes, ended: bool) -> None:
        """Bytes, or an end that is OK, leave the coordinator for a site."""
        if method == PUT and data:
            answer = site_pb2.PutUpdateResponse.FromString(data)
            put = self._puts[call]
            if answer.stored:
                self._acknowledge(put.signed, "upload", put.digest)
            else:
                put.offset = answer.resume_offset
        elif method == SUBMIT and ended:
            signed = self._calls.pop(call, None)
            if signed is not None:
                self._acknowledge(signed, signed.type.value, signed.encode())
        elif method == ATTEND and data:
            for owed in site_pb2.AttendResponse.FromString(data).owed:
                self._assigned(site, owed)

    def _acknowledge(self, signed: Signed, what: str, content: bytes) -> None:
        self.counts[f"acknowledged {what}"] += 1
        if what == "upload" and not self.durable(signed.run, signed.round, signed.site):
            self.fail("durable", f"the upload of {signed.site} in {signed.round}.{signed.attempt} is acknowledged and not synced")
        if what == "upload":
            self.on_upload(signed)
        self.trace(f"coordinator acknowledges {what} of {signed.site} {signed.run.hex()[:6]}/{signed.round}.{signed.attempt}")
        self._acknowledged.setdefault((signed.run, signed.round, signed.attempt), {})[signed.site, what] = content

    def _assigned(self, site: str, owed: site_pb2.Assignment) -> None:
        """What a coordinator tells one site may not be other than what it tells the next, or told before."""
        if not self.honest:
            return
        where = (owed.run, owed.round)
        if owed.invited_sites:
            names = " ".join(owed.invited_sites).encode()
            self._only_one("R1", ("told invited", *where), names, f"round {owed.round} is announced with two invited sets")
        self._only_one("R3", ("told base", *where), owed.base_digest, f"round {owed.round} is announced with two base models")
        if owed.roster:
            roster = sha256(b"".join(owed.roster))
            self._only_one("phase-2", ("told roster", *where, owed.attempt), roster, f"{owed.round}.{owed.attempt} has two rosters")
        if owed.survivors:
            self._survivors(owed.run, owed.round, tuple(owed.survivors))

    # What the coordinator holds

    def saving(self, state: Round) -> None:
        """A round is about to be committed: a process that dies in between may have done it or not."""
        self.pending[state.run] = state

    def reopened(self, state: Round) -> None:
        """A coordinator came back and found this: what was committed, or what was about to be."""
        self._observed.pop(state.run, None)
        if not any(_same(state, found) for found in (self.committed.get(state.run), self.pending.get(state.run))):
            self.fail("persist", f"round {state.number} comes back as {state.phase}, not as {_phase(self.committed.get(state.run))}")
        if not _same(state, self.committed.get(state.run)):
            self.saved(state)

    def saved(self, state: Round) -> None:
        """A round was committed."""
        self.committed[state.run] = state
        if state.survivors:
            self._of_this_attempt(state)
            self._survivors(state.run, state.number, state.survivors)
            self._in_time(state)
        if state.ended:
            if (state.run, state.number) in self._ended:
                self.fail("counted", f"round {state.number} ends twice")
            self._ended.add((state.run, state.number))
            self.counts[f"rounds {state.phase}"] += 1
            self.counts[f"{state.phase} {state.kind}"] += 1
            self.trace(f"round {state.run.hex()[:6]}/{state.number} {state.kind} {state.phase} {state.reason}")

    def observe(self, conductor: Conductor, run: bytes) -> None:
        """Nothing is under way in a run: the coordinator's memory holds what its store holds, and all that was acknowledged."""
        state = conductor.round(run)
        if state is None or (state is self._observed.get(run) and self.committed.get(run) is self._compared.get(run)):
            return
        self._observed[run], self._compared[run] = state, self.committed[run]
        if not _same(state, self.committed.get(run)):
            self.fail("persist", f"round {state.number} is {state.phase} in memory and {_phase(self.committed.get(run))} in the store")
        if not state.ended:
            self._holds_acknowledged(state)

    def _holds_acknowledged(self, state: Round) -> None:
        for (site, what), content in self._acknowledged.get((state.run, state.number, state.attempt), {}).items():
            record = state.sites[site]
            if what == "upload":
                if record.upload is None or record.upload.digest != content:
                    self.fail("lost", f"the upload of {site} in {state.number}.{state.attempt} was acknowledged and is gone")
                elif state.survivors and site not in state.survivors:
                    self.fail("lost", f"{site} uploaded in time in round {state.number} and is no survivor")
            elif what in ("advert", "shares") and getattr(record, what) != content:
                self.fail("lost", f"the {what} of {site} in {state.number}.{state.attempt} was acknowledged and is gone")

    def _of_this_attempt(self, state: Round) -> None:
        """The masks of another attempt do not cancel in this one's sum."""
        if ("survivors", state.run, state.number) in self._unique or state.ended:
            return
        for site in state.survivors:
            upload = state.sites[site].upload
            if upload is None or Signed.decode(upload.statement).attempt != state.attempt:
                self.fail("attempt", f"{site} is a survivor of {state.number}.{state.attempt} without an upload of that attempt")

    def _in_time(self, state: Round) -> None:
        """Once there are survivors no upload is taken any more: it would count for nothing, and stand under masks that are opened."""
        for site in state.roster:
            if state.sites[site].upload is not None and site not in state.survivors:
                self.fail("late", f"{site} is no survivor of {state.number}.{state.attempt}, and its upload stands there")

    def _survivors(self, run: bytes, round_: int, survivors: tuple[str, ...]) -> None:
        self._only_one("survivors", ("survivors", run, round_), " ".join(survivors).encode(), f"round {round_} has two survivor sets")

    def opening(self, state: Round) -> None:
        """A sum is about to be opened: t distinct sites of U1 agreed to it, and to no other."""
        self._survivors(state.run, state.number, state.survivors)
        manifest = self.manifests[state.run]
        if not manifest.secure:
            return
        agreed = set()
        for site in state.roster:
            message = state.sites[site].consent
            if message is not None and Consent.decode(Signed.decode(message).body).survivors == state.survivors:
                agreed.add(site)
        if len(agreed) < threshold(len(state.invited), manifest.f):
            self.fail("R5", f"round {state.number} is opened with the consent of {len(agreed)} sites")

    def forget_rounds(self) -> None:
        """Between chapters: what can no longer be asked about goes."""
        self._acknowledged.clear()
        if self.sums is not None:
            self.sums.forget()

    def _only_one(self, rule: str, key: tuple[object, ...], value: bytes, what: str) -> None:
        if self._unique.setdefault(key, value) != value:
            self.fail(rule, what)


def _same(state: Round, committed: Round | None) -> bool:
    """Whether memory holds what the store does. Messages of a round that is over are dropped there."""
    if committed is None:
        return False
    if not (state.ended and committed.ended):
        return state.same_in_store(committed)
    return all(getattr(state, name) == getattr(committed, name) for name in ("number", "phase", "attempt", "survivors", "checkpoint"))


def _phase(state: Round | None) -> str:
    return "absent" if state is None else f"{state.phase} of round {state.number}"
