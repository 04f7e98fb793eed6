"""Accepting a run: the one moment at which a site decides whose keys it will believe (PROTOCOL, Parties and trust).

Owns the checks on a manifest's participants and the writing of the acceptance. The members list and the CA only
propose who belongs; what is accepted here is what every later signature is checked against. Must not know gRPC,
prompts or what a policy allows besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from cosilo_client.ledger import Ledger
from cosilo_common.manifest import Manifest, verify_manifest
from cosilo_common.secagg.violation import ProtocolViolation, Rule


class AcceptedBy(StrEnum):
    """Who accepted a run."""

    PERSON = "person"
    POLICY = "policy"


def accept_run(
    ledger: Ledger,
    manifest: bytes,
    signature: bytes,
    *,
    admin_keys: Mapping[str, bytes],
    federation: str,
    site: str,
    site_key: bytes,
    accepted_by: AcceptedBy,
    accepted_at: str,
) -> Manifest:
    """Verifies a manifest, checks its participants and pins their keys.

    admin_keys: Ed25519 public keys by name; accepted_at: RFC 3339, for people. Raises CosiloError on a manifest that
    no admin signed; ProtocolViolation("pins") on an admin's key among the participants, on a key that is not this
    site's under its name, and, for the policy, on any participant whose key does not stand in the site's own pins.
    """
    parsed, _ = verify_manifest(manifest, signature, dict(admin_keys), federation)
    participants = parsed.participant_keys()
    _check_participants(participants, admin_keys, site, site_key)
    if accepted_by is AcceptedBy.POLICY:
        _check_pins(participants, ledger.pins())
    ledger.accept(parsed.digest(), manifest, signature, participants, accepted_at=accepted_at, accepted_by=accepted_by.value)
    return parsed


def _check_participants(participants: Mapping[str, bytes], admin_keys: Mapping[str, bytes], site: str, site_key: bytes) -> None:
    admins = {key: name for name, key in admin_keys.items()}
    for name, key in participants.items():
        if key in admins:
            raise ProtocolViolation(Rule.PINS, f"participant {name} has the key of admin {admins[key]}")
    if participants.get(site) != site_key:
        raise ProtocolViolation(Rule.PINS, f"this site, {site}, is no participant under the key that it holds")


def _check_pins(participants: Mapping[str, bytes], pins: Mapping[str, bytes]) -> None:
    for name, key in sorted(participants.items()):
        if name not in pins:
            raise ProtocolViolation(Rule.PINS, f"{name} is not pinned at this site; compare fingerprints, then accept by hand")
        if pins[name] != key:
            raise ProtocolViolation(Rule.PINS, f"{name} has another key than the one pinned at this site")
