"""What a round's terms must be by its manifest: the site works them out itself and believes no other (PROTOCOL, R3).

Pure. Must not know the journal or the wire.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from cosilo_common.clip_ranges import least_clip, round_encoding
from cosilo_common.encoding import Encoding
from cosilo_common.errors import CosiloError
from cosilo_common.manifest import Manifest
from cosilo_common.secagg.messages import RoundKind
from cosilo_common.secagg.violation import ProtocolViolation, Rule

_LENGTH_BYTES: Final = 8  # before a safetensors header
_FLOAT_BYTES: Final = 4


def check_base_bytes(manifest: Manifest, base_bytes: int) -> None:
    """Raises ProtocolViolation("phase-0") unless a weights artifact of this run has this length: no fetch fills a disk."""
    table = manifest.split.base_table
    due = _LENGTH_BYTES + len(table.header_bytes) + _FLOAT_BYTES * table.size
    if base_bytes != due:
        raise ProtocolViolation(Rule.START, f"the base model has {base_bytes} bytes; by the manifest it has {due}")


def checked_encoding(manifest: Manifest, kind: RoundKind, data: bytes) -> Encoding:
    """The encoding of a round, rebuilt here from the manifest; raises ProtocolViolation("R3") on any other bytes.

    Only the clips of b = 24 are the coordinator's to choose: one for each tensor, from `least_clip` to the manifest's.
    """
    if kind is RoundKind.MOMENTS and manifest.evaluation is None:
        raise ProtocolViolation(Rule.ONE_MODEL, "a moments round is none of this run's: its manifest has no [evaluation]")
    due = round_encoding(manifest, kind)
    if data == due.canonical():
        return due
    if manifest.encoding.bits == 24 and kind not in (RoundKind.STATISTICS, RoundKind.MOMENTS):
        found = _parsed(data)
        least, most = least_clip(manifest.encoding.clip), manifest.encoding.clip
        same = replace(found, sections=due.sections) == due
        sizes = [section.size for section in found.sections] == [section.size for section in due.sections]
        if same and sizes and all(least <= section.clip <= most for section in found.sections):
            return found
    raise ProtocolViolation(Rule.ONE_MODEL, "the round's encoding is not one that the manifest gives")


def _parsed(data: bytes) -> Encoding:
    try:
        return Encoding.parse(data)
    except CosiloError as error:
        raise ProtocolViolation(Rule.ONE_MODEL, error.subject) from None
