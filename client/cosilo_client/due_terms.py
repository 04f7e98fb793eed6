"""What a round's terms must be by its manifest: the site works them out itself and believes no other (PROTOCOL, R3).

Pure. Must not know the journal or the wire.
"""

from __future__ import annotations

import math
from typing import Final

from cosilo_common.encoding import Encoding, Section
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation, Rule

_LENGTH_BYTES: Final = 8  # before a safetensors header
_FLOAT_BYTES: Final = 4


def check_base_bytes(manifest: Manifest, base_bytes: int) -> None:
    """Raises ProtocolViolation("phase-0") unless a weights artifact of this run has this length: no fetch fills a disk."""
    table = manifest.tensor_table
    due = _LENGTH_BYTES + len(table.header_bytes) + _FLOAT_BYTES * table.size
    if base_bytes != due:
        raise ProtocolViolation(Rule.START, f"the base model has {base_bytes} bytes; by the manifest it has {due}")


def checked_encoding(manifest: Manifest, kind: RoundKind, data: bytes) -> Encoding:
    """The encoding of a round, rebuilt here from the manifest; raises ProtocolViolation("R3") on any other bytes.

    Only at b = 24 may the coordinator choose: one clip a tensor, within (0, the manifest's].
    """
    terms, table = manifest.encoding, manifest.tensor_table
    due = Encoding(
        bits=terms.bits,
        participants=len(manifest.participants),
        cap=terms.cap,
        sections=() if kind is RoundKind.STATISTICS else (Section(table.size, terms.clip),),
        loss_max=terms.loss_max,
        losses=manifest.loss_words,
    )
    if data == due.canonical():
        return due
    if terms.bits == 24 and kind is RoundKind.TRAIN:
        found = Encoding.parse(data)
        sizes = [section.size for section in found.sections]
        fixed = (found.bits, found.participants, found.cap, found.loss_max, found.losses)
        if (
            fixed == (due.bits, due.participants, due.cap, due.loss_max, due.losses)
            and sizes == [math.prod(shape) for _, shape in table.entries]
            and all(0 < section.clip <= terms.clip for section in found.sections)
        ):
            return found
    raise ProtocolViolation(Rule.ONE_MODEL, "the round's encoding is not the one that the manifest gives")
