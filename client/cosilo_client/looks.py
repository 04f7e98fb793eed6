"""R8 and R9: what this site has let be looked at before, in any run, and whether it may be looked at again.

Owns the question to the ledger, and R8's answer; R9's is `contributions`. Must not know files, messages or keys: the site role asks as it
begins, uploads and consents, and writes down what `counted` says.
"""

from __future__ import annotations

from collections.abc import Iterable

from cosilo_client.contributions import Contribution, check_invited, check_same_sum
from cosilo_client.ledger import Ledger, ModelUpload
from cosilo_client.run_terms import RunTerms, Start
from cosilo_common.canonical import lp, sha256
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation, Rule


class Looks:
    """One site in one run. Every check raises ProtocolViolation("R8") or ("R9"), and says what a person may do about it."""

    def __init__(self, terms: RunTerms, ledger: Ledger) -> None:
        self._terms = terms
        self._ledger = ledger

    def check_begin(self, start: Start) -> None:
        """Before a round is begun. A rehearsal's vector is zero by this site's own construction and tells nothing, so it does not count."""
        if start.kind is RoundKind.MOMENTS:  # no model stands behind it: R9 counts it
            check_invited(self._contributions(start), self._keys(start.invited), self._person(start))
        elif start.kind is not RoundKind.REHEARSAL:
            self._check_model(start)

    def check_upload(self, start: Start, members: Iterable[str], data: bytes) -> None:
        """Before an upload is made, and again as it is written down. members: U1; data: digest of what was measured, for moments."""
        self.check_begin(start)
        if start.kind is RoundKind.MOMENTS:
            check_same_sum(self._contributions(start), self._keys(members), data, self._person(start))

    def check_consent(self, start: Start, survivors: Iterable[str]) -> None:
        """Before a consent: what was uploaded has gone out, and the sum is still to be opened."""
        if start.kind is RoundKind.MOMENTS:
            check_same_sum(self._contributions(start), self._keys(survivors), None, self._person(start))

    def counted(self, start: Start, data: bytes) -> tuple[bytes, bytes]:
        """(what the ledger counts the upload by, what it remembers beside): the base model and R8's "same I" across runs, names and the keys
        that stand behind them; of moments the extractor and the images."""
        return self._key(start), data if start.kind is RoundKind.MOMENTS else self._cohort(start)

    def _check_model(self, start: Start) -> None:
        others, most = self._others(start), self._terms.max_rounds_per_model
        model = start.base_digest.hex()[:12]
        if len(others) >= most:
            raise ProtocolViolation(
                Rule.NO_SECOND_LOOK,
                f"uploaded in {len(others)} rounds for base model {model}; at most {most}; {self._person(start)}",
            )
        cohort = self._cohort(start)
        if any(upload.cohort != cohort for upload in others):
            raise ProtocolViolation(
                Rule.NO_SECOND_LOOK, f"uploaded before for base model {model}, among other invited sites; {self._person(start)}"
            )

    def _contributions(self, start: Start) -> tuple[Contribution, ...]:
        """What R9 compares with. A plain sum hides nothing that a second one could show."""
        return tuple(self._contribution(upload) for upload in self._others(start)) if self._terms.secure else ()

    def _contribution(self, upload: ModelUpload) -> Contribution:
        consent, accepted = self._ledger.consent(upload.run, upload.round), self._ledger.accepted(upload.run)
        if consent is None or accepted is None:
            return Contribution(upload.run, upload.round, None, upload.cohort)
        keys = {name: accepted.participants[name] for name in consent.survivors}
        return Contribution(upload.run, upload.round, keys, upload.cohort)

    def _others(self, start: Start) -> tuple[ModelUpload, ...]:
        """Earlier uploads for the same; none where a person at this site looked at it and said so."""
        key, here = self._key(start), (self._terms.run, start.round)
        others = tuple(upload for upload in self._ledger.model_uploads(key) if (upload.run, upload.round) != here)
        return () if len(others) < self._ledger.permitted_rounds(key) else others

    def _key(self, start: Start) -> bytes:
        return self._terms.moments_key if start.kind is RoundKind.MOMENTS else start.base_digest

    def _keys(self, sites: Iterable[str]) -> dict[str, bytes]:
        return {name: self._terms.participants[name] for name in sites}

    def _cohort(self, start: Start) -> bytes:
        return sha256(lp(*(part for name in start.invited for part in (name.encode(), self._terms.participants[name]))))

    def _person(self, start: Start) -> str:
        return f"a person may allow more: cosilo-site permit {self._terms.run.hex()[:12]} --base {self._key(start).hex()[:12]}"
