"""The coordinator's half of `cosilo-secagg/1`: verify each message, reconstruct what opens the sum, open it in chunks.

Sans I/O but for the callbacks that read an upload. Must not know grpc, the store, where files lie, or when a phase
ends: every function says whether a message may be taken, given what was settled before. Refusals are ProtocolViolation
and name the rule. `verify_advert` needs the attempt's Terms; everything later needs the Roster that
`Roster.open(terms, adverts)` makes of U1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cosilo_common.encoding import Encoding, OpenedTail, SumRefused
from cosilo_common.secagg import sharing
from cosilo_common.secagg.dealing import (
    b_commitment,
    check_shape,
    s_commitment,
    self_commitment,
    unmasking_masks,
)
from cosilo_common.secagg.keys import Secret, public_of
from cosilo_common.secagg.masks import (
    CHUNK_WORDS,
    WORD,
    SignedMask,
    Words,
    Workspace,
    apply_masks,
    chunk_count,
    chunk_words,
    reduce,
    unpack24,
    wire_size,
)
from cosilo_common.secagg.messages import Advert, Complaint, Consent, MessageType, Reveal, Shares, Signed, Upload
from cosilo_common.secagg.roster import Roster, Terms
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_server.early_sum import EarlySum, ReadUpload
from cosilo_server.lanes import Lanes, check_workers

WORKERS_DEFAULT: Final = 2  # the smallest machine that is worth a coordinator has two cores


# Verify


def verify_advert(signed: Signed, terms: Terms) -> Advert:
    """Phase 1: envelope, signature under the pinned key, kind, digests (R3), canonical keys."""
    return terms.open_advert(signed)


def verify_shares(signed: Signed, roster: Roster) -> Shares:
    """Phase 3: speaks to exactly U1. What is sealed, only its recipient can check."""
    _from_roster(signed, roster, MessageType.SHARES)
    body = Shares.decode(signed.body)
    check_shape(roster, signed.site, body)
    return body


def verify_complaint(signed: Signed, roster: Roster) -> Complaint:
    """Phase 3: about another dealer of U1."""
    _from_roster(signed, roster, MessageType.COMPLAINT)
    body = Complaint.decode(signed.body)
    if body.dealer not in roster.members or body.dealer == signed.site:
        raise ProtocolViolation(Rule.SHARES, f"{signed.site} complains of {body.dealer}, who is no other dealer of the roster")
    return body


def verify_upload(signed: Signed, roster: Roster) -> Upload:
    """Phase 4: the statement of an upload, whose length follows from the encoding."""
    _from_roster(signed, roster, MessageType.UPLOAD)
    body = Upload.decode(signed.body)
    expected = wire_size(roster.terms.length, roster.terms.bits)
    if body.size_bytes != expected:
        raise ProtocolViolation(Rule.UPLOAD, f"{signed.site} states {body.size_bytes} bytes; the encoding has {expected}")
    return body


def verify_consent(signed: Signed, roster: Roster, survivors: tuple[str, ...]) -> Consent:
    """Phase 5: a member of U1 consents to exactly these survivors of exactly this attempt."""
    _from_roster(signed, roster, MessageType.CONSENT)
    body = Consent.decode(signed.body)
    roster.check_survivors(survivors)
    if body.ctx != roster.ctx:
        raise ProtocolViolation(Rule.CONSENT, f"{signed.site} consents under another context")
    if body.survivors != survivors:
        raise ProtocolViolation(Rule.ONE_CONSENT, f"{signed.site} consents to other survivors")
    return body


def verify_reveal(signed: Signed, roster: Roster, survivors: tuple[str, ...], shares: Mapping[str, Shares]) -> Reveal:
    """Phase 6: one share for each of U1, the right one of the two (R6), each as its dealer committed to it.

    shares: every dealer's verified body.
    """
    _from_roster(signed, roster, MessageType.REVEAL)
    body = Reveal.decode(signed.body)
    if body.ctx != roster.ctx or body.survivors != survivors:
        raise ProtocolViolation(Rule.REVEAL, f"{signed.site} reveals for another context or other survivors")
    dropped = set(roster.members) - set(survivors)
    if set(body.b_shares) != set(survivors) or set(body.s_shares) != dropped:
        raise ProtocolViolation(Rule.ONE_SHARE, f"{signed.site} does not reveal exactly one share, the due one, for each site")
    for dealer, share in body.b_shares.items():
        _check_revealed(signed.site, share, b_commitment, roster.ctx, dealer, shares[dealer].b_commitments[signed.site])
    for dealer, share in body.s_shares.items():
        _check_revealed(signed.site, share, s_commitment, roster.ctx, dealer, shares[dealer].s_commitments[signed.site])
    return body


# Reconstruct


@dataclass(frozen=True)
class UnmaskKeys:
    """What opens one sum and no other: the masks that U3's vectors have left in it. Shows no secret in its repr."""

    survivors: tuple[str, ...]
    masks: tuple[SignedMask, ...]


def reconstruct(roster: Roster, survivors: tuple[str, ...], shares: Mapping[str, Shares], reveals: Mapping[str, Reveal]) -> UnmaskKeys:
    """Phase 6: b_j of each survivor and s_j of the rest of U1 from verified reveals, at least t, each secret checked.

    Raises ProtocolViolation("phase-6") naming the dealer whose shares give a b_j that is not the one committed to, or
    an s_j that is not the private key of S_j: it shared a secret of its own making, and the round must be abandoned.
    """
    roster.check_survivors(survivors)
    threshold = roster.terms.threshold
    if len(reveals) < threshold:
        raise ProtocolViolation(Rule.REVEAL, f"{len(reveals)} reveals; {threshold} are needed")
    answers = {roster.x_of(site): reveals[site] for site in sorted(reveals)[:threshold]}
    b = {site: _combine(site, {x: answer.b_shares[site] for x, answer in answers.items()}, threshold) for site in survivors}
    for site, secret in b.items():
        if self_commitment(roster.ctx, site, secret) != shares[site].self_commitment:
            raise ProtocolViolation(Rule.REVEAL, f"the shares of {site} give another b than it committed to")
    dropped = [site for site in roster.members if site not in survivors]
    privates = {site: _combine(site, {x: answer.s_shares[site] for x, answer in answers.items()}, threshold) for site in dropped}
    for site, secret in privates.items():
        if public_of(secret) != roster.bodies[site].mask_key:
            raise ProtocolViolation(Rule.REVEAL, f"the shares of {site} do not give the private key of its advert")
    return UnmaskKeys(survivors, unmasking_masks(roster, survivors, b, privates))


# Open


class SumOpening:
    """The sum of whole uploads, opened chunk by chunk in O(chunk) memory. One use: iterate once, to the end.

    sources, digests: by survivor; digests are the signed ones. masks: `UnmaskKeys.masks`, or none for the plain sum. early: the sum of the
    survivors that are in neither, added up before.

        opening = SumOpening(encoding, sources, digests, keys.masks)
        weight = opening.provisional_tail().total_weight
        for start, words in opening: ...      # into a file that nobody sees yet
        tail = opening.tail                   # only now may the file be used

    The iteration hashes every upload as it reads, and its *end* raises ProtocolViolation("phase-6") unless all digests,
    the zeros and the count are right. Whoever stops early has verified nothing.
    """

    def __init__(
        self,
        encoding: Encoding,
        sources: Mapping[str, ReadUpload],
        digests: Mapping[str, bytes],
        masks: Sequence[SignedMask] = (),
        workers: int = WORKERS_DEFAULT,
        early: EarlySum | None = None,
    ) -> None:
        before = early.digests if early is not None else {}
        if set(sources) != set(digests) or not before.keys().isdisjoint(sources) or not (before or sources):
            raise ValueError("one source and one digest for each survivor that is not in the early sum")
        self._encoding, self._digests = encoding, {**digests, **before}
        sites, workers = sorted(sources), min(check_workers(workers), len(self._digests))
        self._shares = [
            _Share(encoding, {site: sources[site] for site in sites[lane::workers]}, masks[lane::workers]) for lane in range(workers)
        ]
        if before:
            self._shares[-1].early = early  # it has the fewest uploads
        self._tail: OpenedTail | None = None

    @property
    def tail(self) -> OpenedTail:
        """The verified tail. Raises RuntimeError before the iteration has ended."""
        if self._tail is None:
            raise RuntimeError("the sum is not verified before its iteration has ended")
        return self._tail

    def provisional_tail(self) -> OpenedTail:
        """The tail before any digest was checked: fit for dequantising into a file that nobody sees yet."""
        first = self._encoding.size // CHUNK_WORDS
        workspace, parts = Workspace(), []
        for chunk in range(first, chunk_count(self._encoding.length)):
            total = np.zeros(chunk_words(self._encoding.length, chunk), dtype=WORD)
            partial = np.empty(CHUNK_WORDS, dtype=WORD)
            for share in self._shares:
                share.fill(chunk, partial, workspace, hashing=False)
                np.add(total, partial[: len(total)], out=total)
            reduce(total, self._encoding.bits)
            parts.append(total)
        return self._open_tail(np.concatenate(parts)[self._encoding.size - first * CHUNK_WORDS :])

    def __iter__(self) -> Generator[tuple[int, Words]]:
        """(start, opened words) of the values, without the tail; valid until the next is taken.

        Raises ProtocolViolation at the end.
        """
        if any(share.used for share in self._shares):
            raise RuntimeError("an opening is iterated once")
        length, size = self._encoding.length, self._encoding.size
        chunks, tail_parts = range(chunk_count(length)), []
        with Lanes([chunks] * len(self._shares), [share.fill for share in self._shares]) as lanes:
            for chunk in chunks:
                start, count = chunk * CHUNK_WORDS, chunk_words(length, chunk)
                total = lanes.take(0)[:count]
                for lane in range(1, len(self._shares)):
                    np.add(total, lanes.take(lane)[:count], out=total)
                reduce(total, self._encoding.bits)
                if start + count > size:
                    tail_parts.append(total[max(0, size - start) :].copy())
                if start < size:
                    yield start, total[: size - start]
        self._check_digests()
        self._tail = self._open_tail(np.concatenate(tail_parts))

    def _check_digests(self) -> None:
        for share in self._shares:
            for site, digest in share.digests().items():
                if digest != self._digests[site]:
                    raise ProtocolViolation(Rule.REVEAL, f"the upload of {site} is not the one it signed: it changed on the disk")

    def _open_tail(self, words: Words) -> OpenedTail:
        try:
            return self._encoding.open_tail(words, len(self._digests))
        except SumRefused as error:
            raise ProtocolViolation(Rule.REVEAL, error.subject) from None


class _Share:
    """One lane's part of the work: some uploads and some masks, every chunk in order, as a hash needs its bytes."""

    def __init__(self, encoding: Encoding, sources: Mapping[str, ReadUpload], masks: Sequence[SignedMask]) -> None:
        self._encoding, self._sources, self._masks = encoding, sources, masks
        self._hashes = {site: hashlib.sha256() for site in sources}
        self._raw = np.empty(CHUNK_WORDS * (encoding.bits // 8), dtype=np.uint8)
        self._words = np.empty(CHUNK_WORDS, dtype=WORD)
        self.used = False
        self.early: EarlySum | None = None

    def fill(self, chunk: int, out: Words, workspace: Workspace, hashing: bool = True) -> None:
        """out = sum of this lane's uploads' chunk, with this lane's masks applied; not reduced."""
        bits, count = self._encoding.bits, chunk_words(self._encoding.length, chunk)
        offset, raw = wire_size(chunk * CHUNK_WORDS, bits), self._raw[: wire_size(count, bits)]
        total = out[:count]
        if self.early is None:
            total[:] = 0
        else:
            self.early.load(chunk, total)
        self.used = self.used or hashing
        for site, read in self._sources.items():
            read(offset, raw.data)
            if hashing:
                self._hashes[site].update(raw.data)
            np.add(total, raw.view(WORD) if bits == 32 else unpack24(raw, self._words), out=total)
        apply_masks(self._masks, chunk, total, workspace)

    def digests(self) -> dict[str, bytes]:
        return {site: digest.digest() for site, digest in self._hashes.items()}


def _from_roster(signed: Signed, roster: Roster, type: MessageType) -> None:
    roster.terms.check_envelope(signed, type)
    if signed.site not in roster.members:
        raise ProtocolViolation(Rule.ROSTER, f"{signed.site} is not in the roster of attempt {roster.terms.attempt}")


def _check_revealed(
    site: str,
    share: bytes,
    commitment: Callable[[bytes, str, str, bytes], bytes],
    ctx: bytes,
    dealer: str,
    committed: bytes,
) -> None:
    if commitment(ctx, dealer, site, share) != committed:
        raise ProtocolViolation(Rule.REVEAL, f"{site} reveals a share that {dealer} did not commit to")


def _combine(site: str, shares: Mapping[int, bytes], threshold: int) -> Secret:
    try:
        return sharing.combine(shares, threshold)
    except ValueError:
        raise ProtocolViolation(Rule.REVEAL, f"the shares of {site} give no secret") from None
