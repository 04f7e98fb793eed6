"""What an accepted manifest and an Assignment's Start fix for the site's role (docs/protocol.md, Phase 0).

Owns the bounds that a Start must keep; whether this site has seen the round or the model before, its role asks the
ledger. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from cosilo_common.clip_ranges import least_clip, round_encoding
from cosilo_common.encoding import Encoding
from cosilo_common.manifest import EncodingTerms, Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation, Rule

ROUNDS_PER_MODEL: Final = 2
"""R8: rounds that a site uploads in for one base model; a run that asks for more needs a person at the site."""
ROUNDS_PER_MODEL_MAX: Final = 100  # as in a manifest


def least_f_by_default(participants: int) -> int:
    """The least f that a site accepts unless its policy names another: max(1, floor(|P| / 3)) (R1)."""
    return max(1, participants // 3)


@dataclass(frozen=True)
class RunTerms:
    """What an accepted manifest fixes for every round.

    run: 32 bytes; participants: Ed25519 public keys by name; encoding: the manifest's bounds; values: those that are summed; losses: loss
    words; moments, moments_key: a moments round's one encoding and what R9 counts it by, where the run has such rounds; least_f: the site's
    policy, None for the default. Raises ProtocolViolation("R1") where f is less than the
    site accepts.
    """

    run: bytes
    participants: Mapping[str, bytes]
    n_min: int
    f: int
    rounds_max: int
    max_rounds_per_model: int
    encoding: EncodingTerms
    values: int
    losses: int
    secure: bool = True
    least_f: int | None = None
    moments: Encoding | None = None
    moments_key: bytes = b""

    def __post_init__(self) -> None:
        least = least_f_by_default(len(self.participants)) if self.least_f is None else self.least_f
        if self.secure and self.f < least:
            raise ProtocolViolation(Rule.THRESHOLD, f"the run's f is {self.f}; this site's policy accepts {least} or more")

    @classmethod
    def of(cls, manifest: Manifest, *, least_f: int | None = None, rounds_per_model: int = ROUNDS_PER_MODEL) -> Self:
        """The terms of a manifest that this site has accepted.

        rounds_per_model: the site's own bound; a manifest may lower it, not raise it (R8).
        """
        return cls(
            run=manifest.digest(),
            participants=manifest.participant_keys(),
            n_min=manifest.n_min,
            f=manifest.f,
            rounds_max=manifest.rounds_max,
            max_rounds_per_model=min(manifest.max_rounds_per_model, rounds_per_model),
            encoding=manifest.encoding,
            values=manifest.split.summed_size,
            losses=manifest.loss_words,
            secure=manifest.secure,
            least_f=least_f,
            moments=None if manifest.evaluation is None else round_encoding(manifest, RoundKind.MOMENTS),
            moments_key=b"" if manifest.evaluation is None else manifest.evaluation.key,
        )

    def check_encoding(self, kind: RoundKind, encoding: Encoding) -> None:
        """Raises ProtocolViolation("phase-0") unless the manifest allows this encoding for this kind of round."""
        if kind is RoundKind.MOMENTS:
            if encoding != self.moments:
                raise ProtocolViolation(Rule.START, "the encoding is not that of a moments round by the manifest's [evaluation]")
            return
        values = 0 if kind is RoundKind.STATISTICS else self.values
        fixed = {
            "bits": (encoding.bits, self.encoding.bits),
            "participants": (encoding.participants, len(self.participants)),
            "cap": (encoding.cap, self.encoding.cap),
            "loss_max": (encoding.loss_max, self.encoding.loss_max),
            "losses": (encoding.losses, self.losses),
            "values": (encoding.size, values),
        }
        for name, (found, due) in fixed.items():
            if found != due:
                raise ProtocolViolation(Rule.START, f"the encoding's {name} is {found}; the manifest says {due}")
        least, most = least_clip(self.encoding.clip), self.encoding.clip
        if not all(least <= section.clip <= most for section in encoding.sections):
            raise ProtocolViolation(Rule.START, f"a clip range is not from {least} to the manifest's {most}")


@dataclass(frozen=True)
class Start:
    """Phase 0 as the coordinator's Assignment gives it. base_digest, encoding_digest: 32 bytes."""

    round: int
    kind: RoundKind
    invited: tuple[str, ...]
    base_digest: bytes
    encoding: Encoding
    encoding_digest: bytes
