"""The refusal: which rule of `cosilo-secagg/1` is broken. Must not hold secrets: its text is logged."""

from __future__ import annotations

from enum import StrEnum

from cosilo_common.errors import CosiloError


class Rule(StrEnum):
    """What can be broken, as docs/protocol.md numbers it. Bounded, so that it can be a metric's label."""

    MESSAGE = "message"
    """bytes that are not a message of the protocol"""
    SIGNATURE = "signature"
    """not signed by the pinned key of the site that it names"""
    PINS = "pins"
    """names somebody who is not a participant under the accepted manifest"""
    THRESHOLD = "R1"
    ORDER = "R2"
    ONE_MODEL = "R3"
    ONE_MASKING = "R4"
    ONE_CONSENT = "R5"
    ONE_SHARE = "R6"
    FORGETTING = "R7"
    NO_SECOND_LOOK = "R8"
    ONE_CONTRIBUTION = "R9"
    START = "phase-0"
    ADVERT = "phase-1"
    ROSTER = "phase-2"
    SHARES = "phase-3"
    UPLOAD = "phase-4"
    CONSENT = "phase-5"
    REVEAL = "phase-6"
    CLOSE = "phase-7"


class ProtocolViolation(CosiloError):
    """Somebody broke a rule of the protocol.

    rule: a `Rule`'s value, such as "R2"; detail: who and how, never a secret.
    """

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = str(rule)
        self.detail = detail
        super().__init__("secure aggregation", f"{self.rule}: {detail}")
