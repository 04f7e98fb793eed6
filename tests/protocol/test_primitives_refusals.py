"""The failing vectors: each input is refused, by the rule that its vector names."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding, SumRefused
from cosilo_common.secagg.dealing import BadDealing, open_dealt
from cosilo_common.secagg.keys import InsecureFakeRandom, check_public, generate_secret
from cosilo_common.secagg.messages import (
    Advert,
    Complaint,
    Consent,
    MessageType,
    Reveal,
    RoundKind,
    Shares,
    Signed,
    Upload,
)
from cosilo_common.secagg.roster import Roster, Terms
from cosilo_common.secagg.violation import ProtocolViolation, Rule
from cosilo_server import secagg
from tests.vectors.generate import FOLDER
from tests.vectors.play import Play, reader, small_encoding

BODIES = {
    MessageType.ADVERT: Advert.decode,
    MessageType.SHARES: Shares.decode,
    MessageType.COMPLAINT: Complaint.decode,
    MessageType.UPLOAD: Upload.decode,
    MessageType.CONSENT: Consent.decode,
    MessageType.REVEAL: Reveal.decode,
}
VECTORS: dict[str, Any] = json.loads((FOLDER / "secagg-refusals.json").read_text())
TRANSCRIPT: dict[str, Any] = VECTORS["transcript"]


def signed(text: str) -> Signed:
    return Signed.decode(bytes.fromhex(text))


def terms(fields: dict[str, Any]) -> Terms:
    binary = {name: bytes.fromhex(fields[name]) for name in ("run", "base_digest", "encoding_digest")}
    keys = {name: bytes.fromhex(key) for name, key in fields["keys"].items()}
    rest = {"kind": RoundKind(fields["kind"]), "invited": tuple(fields["invited"]), "keys": keys}
    return Terms(**{**fields, **binary, **rest})


@cache
def roster() -> Roster:
    return Roster.open(terms(TRANSCRIPT["terms"]), [signed(text) for text in TRANSCRIPT["adverts"].values()])


def survivors(case: dict[str, Any]) -> tuple[str, ...]:
    return tuple(case.get("survivors", TRANSCRIPT["survivors"]))


def dealt(texts: dict[str, str]) -> dict[str, Shares]:
    return {name: secagg.verify_shares(signed(text), roster()) for name, text in texts.items()}


def perform(case: dict[str, Any]) -> object:
    """Does what the vector's check says. The good transcript passes every one of these."""
    message = case.get("message", "")
    match case["check"]:
        case "public":
            return check_public(bytes.fromhex(case["key"]))
        case "terms":
            return terms(case["terms"])
        case "message":
            whole = signed(message)
            return BODIES[whole.type](whole.body)
        case "advert":
            return secagg.verify_advert(signed(message), roster().terms)
        case "roster":
            own = signed(case["own"]) if "own" in case else None
            return Roster.open(roster().terms, [signed(text) for text in case["adverts"]], own)
        case "shares":
            return secagg.verify_shares(signed(message), roster())
        case "complaint":
            return secagg.verify_complaint(signed(message), roster())
        case "upload":
            return secagg.verify_upload(signed(message), roster())
        case "consent":
            return secagg.verify_consent(signed(message), roster(), survivors(case))
        case "reveal":
            return secagg.verify_reveal(signed(message), roster(), survivors(case), dealt(TRANSCRIPT["shares"]))
        case "reconstruct":
            shares = dealt(case["shares"])
            reveals = {
                name: secagg.verify_reveal(signed(text), roster(), survivors(case), shares) for name, text in case["reveals"].items()
            }
            return secagg.reconstruct(roster(), survivors(case), shares, reveals)
        case "tail":
            words = np.frombuffer(bytes.fromhex(case["words"]), dtype="<u4")
            try:
                return encoding().open_tail(words, len(survivors(case)))
            except SumRefused as error:
                raise ProtocolViolation(Rule.REVEAL, error.subject) from None
        case "open":
            return opened(case)
    raise AssertionError(f"unknown check {case['check']}")


def encoding() -> Encoding:
    return Encoding.parse(bytes.fromhex(TRANSCRIPT["encoding"]))


def opened(case: dict[str, Any]) -> object:
    uploads = {name: bytearray.fromhex(data) for name, data in TRANSCRIPT["uploads"].items()}
    digests = {name: sha256(bytes(data)) for name, data in uploads.items()}
    if case.get("missing"):
        del uploads[case["site"]], digests[case["site"]]
    elif "byte" in case:
        uploads[case["site"]][case["byte"]] ^= case["xor"]
    keys = perform({"check": "reconstruct", "shares": TRANSCRIPT["shares"], "reveals": TRANSCRIPT["reveals"]})
    assert isinstance(keys, secagg.UnmaskKeys)
    sources = {name: reader(bytes(data)) for name, data in uploads.items()}
    return list(secagg.SumOpening(encoding(), sources, digests, keys.masks))


def test_the_good_transcript_passes_every_check() -> None:
    for check, kind in (("advert", "adverts"), ("shares", "shares"), ("upload", "statements"), ("consent", "consents")):
        for text in TRANSCRIPT[kind].values():
            perform({"check": check, "message": text})
            perform({"check": "message", "message": text})
    for text in TRANSCRIPT["reveals"].values():
        perform({"check": "reveal", "message": text})
    perform({"check": "terms", "terms": TRANSCRIPT["terms"]})
    perform({"check": "roster", "adverts": list(TRANSCRIPT["adverts"].values()), "own": TRANSCRIPT["adverts"]["site-2"]})
    assert opened({})


@pytest.mark.parametrize("case", VECTORS["refused"], ids=lambda case: case["name"].replace(" ", "-"))
def test_refused_by_the_rule_that_the_vector_names(case: dict[str, Any]) -> None:
    if case["check"] == "dealing":
        play = Play(tuple(TRANSCRIPT["adverts"]), 1, small_encoding(32, 5, size=20), ("site-3",), "secagg-refusals")
        message = signed(case["message"])
        with pytest.raises(BadDealing) as found:
            private = play.sites[case["recipient"]].share_private
            open_dealt(roster(), case["recipient"], private, message.site, Shares.decode(message.body))
        assert f"complaint {found.value.code}" == case["rule"]
        return
    with pytest.raises(ProtocolViolation) as refused:
        perform(case)
    assert refused.value.rule == case["rule"]


def test_names_of_the_vectors_are_unique() -> None:
    names = [case["name"] for case in VECTORS["refused"]]
    assert len(set(names)) == len(names)


def test_a_violation_names_its_rule_and_shows_no_secret() -> None:
    secret = generate_secret(InsecureFakeRandom("canary"))
    error = ProtocolViolation(Rule.ONE_SHARE, "both shares for site-1")
    assert str(error) == "secure aggregation: R6: both shares for site-1"
    assert secret.reveal().hex() not in f"{error!r} {secret!r} {secret}"
