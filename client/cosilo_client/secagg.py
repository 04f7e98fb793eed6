"""The site's half of `cosilo-secagg/1`, sans I/O: a message in, a signed message out (docs/protocol.md, Phases).

Owns every decision whether this site signs, shares, masks, consents or reveals. Its only memory is the journal: a
role built anew from the journal after a crash, given the same Start, answers every repeated call with the same bytes.
A rule that is broken raises ProtocolViolation and changes nothing. Must not know gRPC, sockets or the clock; files
only through the journal.

    begin -> advert -> roster -> deliver -> mask_chunks -> consent -> reveal -> close       secure
    begin -> advert ---------------------> mask_chunks -----------------> close             insecure-plain-sum
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_client.journal import Journal
from cosilo_client.ledger import ConsentEntry, Phase, RoundEntry, RoundState
from cosilo_client.looks import Looks
from cosilo_client.masking import REHEARSAL, WORKERS, Vector, write_spool
from cosilo_client.run_terms import RunTerms as RunTerms
from cosilo_client.run_terms import Start as Start
from cosilo_client.run_terms import least_f_by_default as least_f_by_default
from cosilo_client.vault import Keeps
from cosilo_common.canonical import lp, sha256, unlp
from cosilo_common.errors import CosiloError
from cosilo_common.secagg.dealing import BadDealing, DealtShares, check_shape, deal, open_dealt, site_masks
from cosilo_common.secagg.keys import Randomness, Secret, SystemRandomness, generate_secret, public_of
from cosilo_common.secagg.masks import SignedMask
from cosilo_common.secagg.messages import (
    SITES_MAX,
    Advert,
    Body,
    Complaint,
    Consent,
    MessageType,
    Reveal,
    RoundKind,
    Shares,
    Signed,
    sign,
)
from cosilo_common.secagg.roster import Roster, Terms
from cosilo_common.secagg.violation import ProtocolViolation, Rule

# What the vault holds of one attempt.
_ADVERT: Final = "advert"
_ROUNDING: Final = "rounding"
_SHARE_KEY: Final = "share key"
_MASK_KEY: Final = "mask key"
_ROSTER: Final = "roster"
_SELF_SECRET: Final = "self secret"  # noqa: S105 - a row's name
_SHARES: Final = "shares"
_DELIVERED: Final = "delivered"
_HELD: Final = "held"
_COMPLAINT: Final = "complaint"
_REVEAL: Final = "reveal"
_UNTIL_SPOOLED: Final = dict.fromkeys((_ROUNDING, _SHARE_KEY, _MASK_KEY, _SELF_SECRET), Keeps.MASKS)


class SiteRole:
    """One site in one run. Not thread-safe: the daemon makes one call at a time.

    site: this site's name; key: its Ed25519 key; randomness: passed in, so that vectors can be frozen.
    """

    def __init__(self, terms: RunTerms, site: str, key: Ed25519PrivateKey, journal: Journal, randomness: Randomness | None = None) -> None:
        self._terms = terms
        self._site = site
        self._key = key
        self._journal = journal
        self._ledger = journal.ledger
        self._looks = Looks(terms, journal.ledger)
        self._vault = journal.vault
        self._random = randomness or SystemRandomness()
        self._start: Start | None = None
        self._open_roster: Roster | None = None

    # Phase 0

    def begin(self, start: Start) -> RoundEntry:
        """Joins a round, or resumes it after a restart. Returns the ledger's entry, which says how far this site came.

        Raises ProtocolViolation: "R2" on a round that may not be begun or resumed, "R1" on too few invited, "pins" on
        somebody who is no participant, "R3" on digests that differ, "R8" on a base model that this site has uploaded
        for too often, "R9" on moments that cannot be in the same sum again, "phase-0".
        """
        self._check_acceptance()
        resumed = self._check_order(start)
        self._check_terms(start)
        self._looks.check_begin(start)
        self._start, self._open_roster = start, None
        if resumed is None:
            self._journal.begin(
                RoundEntry(
                    run=self._terms.run,
                    round=start.round,
                    kind=start.kind.value,
                    invited=start.invited,
                    base_digest=start.base_digest,
                    encoding_digest=start.encoding_digest,
                )
            )
        else:
            self._journal.reconcile(resumed)
        return self._entry()

    # Phase 1

    def advert(self, attempt: int) -> Signed:
        """Fresh keys for an attempt, journaled before this returns; again for the same attempt, the same bytes (R4).

        A higher attempt destroys the lower one's secrets. Raises ProtocolViolation: "R5" after a consent in another
        attempt, "phase-2" on a lower attempt or one above 5; CosiloError where there is nothing trained to advert.
        """
        entry, start = self._entry(), self._started()
        terms = self._attempt_terms(attempt)
        consent = self._ledger.consent(entry.run, entry.round)
        if consent is not None and consent.attempt != attempt:
            raise ProtocolViolation(Rule.ONE_CONSENT, f"consented in attempt {consent.attempt}; no attempt {attempt} in this round")
        if attempt < entry.attempt:
            raise ProtocolViolation(Rule.ROSTER, f"attempt {attempt} is below {entry.attempt}: attempts only increase")
        if attempt == entry.attempt:
            stored = self._get(entry, _ADVERT)
            if stored is not None:
                return Signed.decode(stored)
        self._vector(entry)  # nothing cryptographic is spent until training is done

        self._open_roster = None
        if attempt > entry.attempt:
            self._ledger.raise_attempt(entry.run, entry.round, attempt)
            entry = replace(entry, attempt=attempt, upload=None)
        self._journal.files(entry.run).keep_spool(None)
        self._vault.renew(entry.run)
        secrets = {_ROUNDING: generate_secret(self._random).reveal()}
        share_public = mask_public = b""
        if terms.secure:
            share_private, mask_private = generate_secret(self._random), generate_secret(self._random)
            share_public, mask_public = public_of(share_private), public_of(mask_private)
            secrets |= {_SHARE_KEY: share_private.reveal(), _MASK_KEY: mask_private.reveal()}
        body = Advert(start.kind, start.base_digest, start.encoding_digest, share_public, mask_public)
        signed = self._sign(MessageType.ADVERT, entry, body)
        self._put(entry, secrets | {_ADVERT: signed.encode()})
        return signed

    # Phases 2 and 3

    def roster(self, adverts: Iterable[Signed]) -> Signed:
        """Checks U1 as phase 2 says, and shares b_i and s_i with it; again with the same roster, the same bytes (R4).

        Raises ProtocolViolation: "signature", "pins", "R2", "R3", "phase-1" and "phase-2" on a roster this site does
        not believe; "phase-2" on a second, different roster for the attempt.
        """
        entry = self._attempt_entry()
        self._secure_only(Rule.ROSTER)
        own = Signed.decode(self._need(entry, _ADVERT, Rule.ROSTER, "advert first"))
        roster = Roster.open(self._attempt_terms(entry.attempt), adverts, own)
        known = self._get(entry, _ROSTER)
        if known is not None:
            if known != _joined(roster.adverts.values()):
                raise ProtocolViolation(Rule.ROSTER, f"another roster was seen for attempt {entry.attempt}")
            return Signed.decode(self._need(entry, _SHARES, Rule.SHARES, "shares"))
        if self._ledger.consent(entry.run, entry.round) is not None:
            raise ProtocolViolation(Rule.ONE_CONSENT, "this site has consented; its keys are gone")

        b = generate_secret(self._random)
        body, kept = deal(roster, self._site, b, self._secret(entry, _MASK_KEY), self._secret(entry, _SHARE_KEY), self._random)
        signed = self._sign(MessageType.SHARES, entry, body)
        self._put(
            entry,
            {
                _ROSTER: _joined(roster.adverts.values()),
                _SELF_SECRET: b.reveal(),
                _SHARES: signed.encode(),
                _own(self._site): lp(kept.b, kept.s),
            },
        )
        return signed

    def deliver(self, shares: Iterable[Signed]) -> Signed | None:
        """Opens and checks what all of U1 dealt to this site. Returns None, or a complaint, which ends the attempt.

        shares: one message from each of U1; this site's own may be left out. Raises ProtocolViolation("phase-3")
        where one is missing, repeated or another than was delivered before; "signature", "pins", "R2", "phase-2" on
        one that is not of this attempt.
        """
        entry = self._attempt_entry()
        roster = self._roster(entry)
        messages = self._check_delivery(entry, roster, shares)
        delivered = sha256(_joined(messages[site] for site in roster.members))
        known = self._get(entry, _DELIVERED)
        if known is not None:
            if known != delivered:
                raise ProtocolViolation(Rule.SHARES, "other shares were delivered before in this attempt")
            complaint = self._get(entry, _COMPLAINT)
            return None if complaint is None else Signed.decode(complaint)

        bodies = {site: Shares.decode(message.body) for site, message in messages.items()}
        for dealer, body in bodies.items():
            check_shape(roster, dealer, body)
        share_private = self._secret(entry, _SHARE_KEY)
        held: dict[str, DealtShares] = {}
        try:
            for dealer in roster.members:
                if dealer != self._site:
                    held[dealer] = open_dealt(roster, self._site, share_private, dealer, bodies[dealer])
        except BadDealing as bad:
            signed = self._sign(MessageType.COMPLAINT, entry, Complaint(bad.dealer, bad.code))
            self._put(entry, {_DELIVERED: delivered, _COMPLAINT: signed.encode()})
            return signed
        fields = (part for dealer, pair in held.items() for part in (dealer.encode(), pair.b, pair.s))
        self._put(entry, {_DELIVERED: delivered, _HELD: lp(*fields)})
        return None

    # Phase 4

    def mask_chunks(self, workers: int = WORKERS) -> Signed:
        """Masks the update into the attempt's spool file and signs it; again after that, the same statement (R4).

        When this returns the spool (`journal.files(run).spool(attempt)`) and the statement are on disk and the mask
        keys are gone. Raises ProtocolViolation: "phase-4" before all of U1's shares are held, "R5" once this site
        consented to survivors without itself, "R8" and "R9" as `begin`; CosiloError on a value that is not finite or a full
        disk.
        """
        entry = self._attempt_entry()
        spool = self._journal.files(entry.run).spool(entry.attempt)
        consent = self._ledger.consent(entry.run, entry.round)
        if consent is not None and not consent.survives:
            raise ProtocolViolation(Rule.ONE_CONSENT, "consented to survivors without this site: it uploads nothing more")
        if entry.upload is not None:
            if not spool.exists():
                raise CosiloError("mask the update", f"round {entry.round}: its signed spool is gone", "abandon the round")
            return Signed.decode(entry.upload)
        start, data = self._started(), self._measured(entry)
        members = self._roster(entry).members if self._terms.secure else ()
        self._looks.check_upload(start, members, data)
        vector = self._vector(entry)
        masks = self._masks(entry)

        # Killed anywhere before record_upload: no byte has left, the spool is discarded (Journal.reconcile) and made
        # again under the same keys. That is no second quantisation in R4's sense, and gives the same bytes besides:
        # all rounding comes from one seed.
        statement = write_spool(spool, start.encoding, masks, vector, self._secret(entry, _ROUNDING), workers=workers)
        signed = self._sign(MessageType.UPLOAD, entry, statement)
        self._journal.advance()
        with self._journal.writing:  # a round of another run may have uploaded for this model meanwhile
            self._looks.check_upload(start, members, data)
            key, beside = self._looks.counted(start, data)
            self._ledger.record_upload(entry, signed.encode(), key=key, cohort=beside, counted=start.kind is not RoundKind.REHEARSAL)
        self._vault.destroy_masks(entry.run)
        return signed

    def uploaded(self) -> None:
        """Notes that the coordinator has the whole upload."""
        entry = self._attempt_entry()
        if entry.upload is not None:
            self._ledger.reach(entry.run, entry.round, Phase.UPLOADED)

    # Phase 5

    def consent(self, survivors: Sequence[str]) -> Signed:
        """Signs that exactly these survivors' sum is opened; in the ledger first, and once in a round (R5).

        The unmasked update is gone afterwards. Raises ProtocolViolation: "R5" after another consent in this round,
        "phase-5" on survivors that are not a large enough part of U1, or with this site among them when it has signed
        no upload.
        """
        entry, proposed = self._attempt_entry(), tuple(survivors)
        roster = self._roster(entry)
        known = self._ledger.consent(entry.run, entry.round)
        if known is not None:
            if (known.attempt, known.survivors) != (entry.attempt, proposed):
                raise ProtocolViolation(Rule.ONE_CONSENT, f"consented already in round {entry.round}, to other survivors")
            self._journal.reconcile(entry)
            return Signed.decode(known.message)
        self._held(entry)
        roster.check_survivors(proposed)
        if self._site in proposed and entry.upload is None:
            raise ProtocolViolation(Rule.CONSENT, "named as a survivor, but this site has signed no upload in this attempt")

        self._looks.check_consent(self._started(), proposed)

        signed = self._sign(MessageType.CONSENT, entry, Consent(roster.ctx, proposed))
        self._journal.advance()
        self._ledger.record_consent(entry.run, entry.round, ConsentEntry(entry.attempt, proposed, self._site in proposed, signed.encode()))
        self._journal.reconcile(entry)
        return signed

    # Phase 6

    def reveal(self, consents: Iterable[Signed]) -> Signed:
        """This site's shares: of b_j for survivors, of s_j for the rest of U1; again, the same bytes (R6).

        Raises ProtocolViolation: "phase-6" before this site's own consent and on fewer than t distinct signers, "R5"
        on a consent to another ctx or other survivors than its own, "R6" on such a one after it has revealed.
        """
        entry = self._attempt_entry()
        roster = self._roster(entry)
        own = self._ledger.consent(entry.run, entry.round)
        if own is None or own.attempt != entry.attempt:
            raise ProtocolViolation(Rule.REVEAL, "this site has not consented")
        stored = self._get(entry, _REVEAL)
        self._check_quorum(roster, own, consents, revealed=stored is not None)
        if stored is not None:
            return Signed.decode(stored)
        held, survivors = self._held(entry), set(own.survivors)
        body = Reveal(
            ctx=roster.ctx,
            survivors=own.survivors,
            b_shares={peer: held[peer].b for peer in roster.members if peer in survivors},
            s_shares={peer: held[peer].s for peer in roster.members if peer not in survivors},
        )
        signed = self._sign(MessageType.REVEAL, entry, body)
        self._put(entry, {_REVEAL: signed.encode()})
        self._ledger.reach(entry.run, entry.round, Phase.REVEALED)
        return signed

    # Phase 7

    def close(self, outcome: RoundState, reason: str = "", *, round: int | None = None) -> None:
        """Closes or abandons a round and forgets all its secrets, the update and the spool (R7); again, nothing.

        round: for a daemon that restarted and finds the round over, so that there is nothing to begin; otherwise the
        one begun. A round that this site never began, or that a later one has overtaken, is left as it is.
        """
        if outcome is RoundState.OPEN:
            raise ValueError("a round is closed or abandoned")
        last = self._ledger.last_round(self._terms.run)
        if last is not None and last.round == (self._started().round if round is None else round):
            self._open_roster = None
            self._journal.finish(last, outcome, reason)

    # What begin checks

    def _check_acceptance(self) -> None:
        accepted = self._ledger.accepted(self._terms.run)
        if accepted is None:
            raise ProtocolViolation(Rule.PINS, f"run {self._terms.run.hex()[:12]} is not accepted at this site")
        if dict(accepted.participants) != dict(self._terms.participants):
            raise ProtocolViolation(Rule.PINS, "the run's participants are not those that its acceptance pinned")
        if self._terms.participants.get(self._site) != self._key.public_key().public_bytes_raw():
            raise ProtocolViolation(Rule.PINS, f"{self._site} is no participant under the key that it holds")

    def _check_order(self, start: Start) -> RoundEntry | None:
        """R2. Returns the entry that this Start resumes, or None for a new round."""
        if not 1 <= start.round <= self._terms.rounds_max:
            raise ProtocolViolation(Rule.ORDER, f"round {start.round} is not from 1 to the manifest's {self._terms.rounds_max}")
        last = self._ledger.last_round(self._terms.run)
        if last is None or start.round > last.round:
            return None
        if start.round < last.round:
            raise ProtocolViolation(Rule.ORDER, f"round {start.round} is below {last.round}, which this site has begun")
        if last.state is not RoundState.OPEN:
            raise ProtocolViolation(Rule.ORDER, f"round {start.round} is {last.state} at this site")
        for name, known, found in (
            ("kind", last.kind, start.kind.value),
            ("invited set", last.invited, start.invited),
            ("base model", last.base_digest, start.base_digest),
            ("encoding", last.encoding_digest, start.encoding_digest),
        ):
            if known != found:
                raise ProtocolViolation(Rule.ORDER, f"round {start.round} was begun with another {name}")
        return last

    def _check_terms(self, start: Start) -> None:
        if start.encoding.digest() != start.encoding_digest:
            raise ProtocolViolation(Rule.ONE_MODEL, "the encoding is not the one that its digest names")
        self._terms.check_encoding(start.kind, start.encoding)
        self._terms_of(start, attempt=1)  # R1, pins
        if self._site not in start.invited:
            raise ProtocolViolation(Rule.START, f"this site is not invited to round {start.round}")

    def _measured(self, entry: RoundEntry) -> bytes:
        """Digest of the images whose moments this round has; empty in rounds of other kinds."""
        update = self._journal.trained_update(entry.run, entry.round)
        return b"" if update is None else bytes.fromhex(update.data)

    # What the other phases check

    def _check_delivery(self, entry: RoundEntry, roster: Roster, shares: Iterable[Signed]) -> dict[str, Signed]:
        own = Signed.decode(self._need(entry, _SHARES, Rule.SHARES, "share first"))
        messages: dict[str, Signed] = {}
        for signed in shares:
            roster.terms.check_envelope(signed, MessageType.SHARES)
            if signed.site in messages:
                raise ProtocolViolation(Rule.SHARES, f"{signed.site} shares twice")
            messages[signed.site] = signed
        messages.setdefault(self._site, own)
        if set(messages) != set(roster.members):
            odd = sorted(set(messages) ^ set(roster.members))
            raise ProtocolViolation(Rule.SHARES, f"shares are not from exactly the roster: {', '.join(odd[:5])}")
        if messages[self._site] != own:
            raise ProtocolViolation(Rule.SHARES, "this site's own shares are not as it sent them")
        return messages

    def _check_quorum(self, roster: Roster, own: ConsentEntry, consents: Iterable[Signed], *, revealed: bool) -> None:
        signers: set[str] = set()
        for signed in consents:
            roster.terms.check_envelope(signed, MessageType.CONSENT)
            if signed.site not in roster.bodies:
                raise ProtocolViolation(Rule.REVEAL, f"{signed.site} consents, but is not in the roster")
            body = Consent.decode(signed.body)
            if (body.ctx, body.survivors) != (roster.ctx, own.survivors):
                if revealed:
                    raise ProtocolViolation(Rule.ONE_SHARE, f"revealed already; {signed.site} consents to something else")
                raise ProtocolViolation(Rule.ONE_CONSENT, f"{signed.site} consents to another roster or other survivors")
            signers.add(signed.site)
        if len(signers) < roster.terms.threshold:
            raise ProtocolViolation(Rule.REVEAL, f"{len(signers)} sites consent; at least {roster.terms.threshold}")

    def _secure_only(self, rule: Rule) -> None:
        if not self._terms.secure:
            raise ProtocolViolation(rule, "a plain sum has no keys, shares, consents or reveals")

    # The attempt, as the journal has it

    def _started(self) -> Start:
        if self._start is None:
            raise CosiloError("secure aggregation", "no round is begun", "begin with the Assignment's Start")
        return self._start

    def _entry(self) -> RoundEntry:
        """The open round of this role's Start."""
        start = self._started()
        entry = self._ledger.round(self._terms.run, start.round)
        if entry is None or entry.state is not RoundState.OPEN:
            raise ProtocolViolation(Rule.ORDER, f"round {start.round} is not open at this site")
        return entry

    def _attempt_entry(self) -> RoundEntry:
        entry = self._entry()
        if entry.attempt == 0:
            raise ProtocolViolation(Rule.ADVERT, "this site has not adverted in this round")
        return entry

    def _terms_of(self, start: Start, attempt: int) -> Terms:
        return Terms(
            run=self._terms.run,
            round=start.round,
            kind=start.kind,
            attempt=attempt,
            invited=start.invited,
            f=self._terms.f,
            n_min=self._terms.n_min,
            keys=self._terms.participants,
            base_digest=start.base_digest,
            encoding_digest=start.encoding_digest,
            bits=start.encoding.bits,
            length=start.encoding.length,
            secure=self._terms.secure,
        )

    def _attempt_terms(self, attempt: int) -> Terms:
        return self._terms_of(self._started(), attempt)

    def _roster(self, entry: RoundEntry) -> Roster:
        """The roster of the attempt, verified again from the journal after a restart."""
        self._secure_only(Rule.ROSTER)
        if self._open_roster is None or self._open_roster.terms.attempt != entry.attempt:
            stored = self._need(entry, _ROSTER, Rule.ROSTER, "no roster was seen for this attempt")
            adverts = [Signed.decode(data) for data in unlp(stored, SITES_MAX)]
            self._open_roster = Roster.open(self._attempt_terms(entry.attempt), adverts)
        return self._open_roster

    def _held(self, entry: RoundEntry) -> dict[str, DealtShares]:
        """Every share that this site holds, its own too."""
        stored = self._need(entry, _HELD, Rule.SHARES, "not all shares of the roster are held")
        fields = unlp(stored, 3 * SITES_MAX)
        held = {dealer.decode(): DealtShares(b, s) for dealer, b, s in zip(fields[::3], fields[1::3], fields[2::3], strict=True)}
        own_b, own_s = unlp(self._need(entry, _own(self._site), Rule.SHARES, "share first"), 2)
        return held | {self._site: DealtShares(own_b, own_s)}

    def _masks(self, entry: RoundEntry) -> tuple[SignedMask, ...]:
        if not self._terms.secure:
            return ()
        self._need(entry, _HELD, Rule.UPLOAD, "not all shares of the roster are held")
        return site_masks(self._roster(entry), self._site, self._secret(entry, _SELF_SECRET), self._secret(entry, _MASK_KEY))

    def _vector(self, entry: RoundEntry) -> Vector:
        if entry.kind == RoundKind.REHEARSAL.value:
            return REHEARSAL
        update = self._journal.trained_update(entry.run, entry.round)
        if update is None or (entry.kind != RoundKind.STATISTICS.value and not update.has_vector):
            raise CosiloError("secure aggregation", f"round {entry.round}: nothing is trained", "train before adverting")
        path = self._journal.files(entry.run).update if update.has_vector else None
        return Vector(path, update.offset_bytes, update.weight, update.losses)

    # The journal

    def _sign(self, type_: MessageType, entry: RoundEntry, body: Body) -> Signed:
        return sign(self._key, type_, entry.run, entry.round, entry.attempt, self._site, body)

    def _put(self, entry: RoundEntry, secrets: Mapping[str, bytes]) -> None:
        self._vault.put_all(entry.run, entry.round, entry.attempt, secrets, keeps=_UNTIL_SPOOLED)

    def _get(self, entry: RoundEntry, name: str) -> bytes | None:
        return self._vault.get(entry.run, entry.round, entry.attempt, name)

    def _need(self, entry: RoundEntry, name: str, rule: Rule, why: str) -> bytes:
        stored = self._get(entry, name)
        if stored is None:
            raise ProtocolViolation(rule, why)
        return stored

    def _secret(self, entry: RoundEntry, name: str) -> Secret:
        return Secret(self._need(entry, name, Rule.ONE_MASKING, f"the attempt's {name} is gone"))


def _own(site: str) -> str:
    return f"own shares of {site}"


def _joined(messages: Iterable[Signed]) -> bytes:
    return lp(*(message.encode() for message in messages))
