"""R9: a site's moments stand in one opened sum of an extractor, or in the same one again (docs/protocol.md, Moments).

Owns the judgement. Two sums over sets that differ by a site differ by exactly that site's features: no training blurs them, so nothing but
this rule keeps them apart. Pure: what the ledger knows goes in. Must not know files or the ledger's tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cosilo_common.secagg.violation import ProtocolViolation, Rule

Keys = Mapping[str, bytes]


@dataclass(frozen=True)
class Contribution:
    """An earlier round, of any run, in which this site signed an upload of moments for the extractor that is asked for.

    survivors: those that it consented to, with the keys that stood behind their names then; None where it consented to none, so that it
    cannot know whose sum was opened, if any. data: digest of what it had measured, 32 bytes.
    """

    run: bytes
    round: int
    survivors: Keys | None
    data: bytes

    @property
    def label(self) -> str:
        """As people read it."""
        return f"round {self.round} of run {self.run.hex()[:12]}"


def check_invited(earlier: Iterable[Contribution], invited: Keys, person: str) -> None:
    """Before anything is measured: raises ProtocolViolation("R9") where the earlier sums cannot be had again.

    invited: keys by name. person: what a person at the site may do about it, in words.
    """
    for contribution in earlier:
        if contribution.survivors is None:
            raise _refused(f"it uploaded in {contribution.label} and does not know which sum was opened", person)
        if any(invited.get(name) != key for name, key in contribution.survivors.items()):
            raise _refused(f"its moments stand in the sum of {contribution.label}, of sites that are not all invited", person)


def check_same_sum(earlier: Iterable[Contribution], sites: Keys, data: bytes | None, person: str) -> None:
    """Before an upload (sites: the roster) and before a consent (sites: the survivors; data: None, it has gone out): raises
    ProtocolViolation("R9") unless that sum would be of the same sites, with the same images here, as every earlier one."""
    for contribution in earlier:
        if contribution.survivors is None or dict(contribution.survivors) != dict(sites):
            raise _refused(f"its moments stand in the sum of {contribution.label}, of other sites than {', '.join(sorted(sites))}", person)
        if data is not None and data != contribution.data:
            raise _refused(f"its images have changed since {contribution.label}: the difference of two sums would tell how", person)


def _refused(why: str, person: str) -> ProtocolViolation:
    return ProtocolViolation(Rule.ONE_CONTRIBUTION, f"{why}; {person}")
