"""What the coordinator's checks cost: one signature check for each advert of an attempt, whatever else comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.manifest import Manifest
from cosilo_common.secagg import roster as roster_module
from cosilo_common.secagg.keys import SystemRandomness, generate_secret, public_of
from cosilo_common.secagg.messages import Advert, MessageType, RoundKind, Signed, Upload, sign
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_server import verification
from cosilo_server.rounds.events import AdvertReceived, SharesReceived
from cosilo_server.rounds.machine import begin, step
from cosilo_server.rounds.state import Phase, Round
from cosilo_server.store import terms_of
from cosilo_server.verification import ROSTERS_KEPT, roster_of, verified_event, verified_upload
from tests.integration.memory_rounds import manifest_of, signing_key

NAMES = tuple(f"site-{i:02d}" for i in range(12))


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sites whose signatures were checked, in order."""
    seen: list[str] = []
    verify: Callable[[Signed, bytes], None] = roster_module.verify

    def counting(signed: Signed, key: bytes) -> None:
        seen.append(f"{signed.site} {signed.type}")
        verify(signed, key)

    monkeypatch.setattr(roster_module, "verify", counting)
    verification._opened.cache_clear()
    return seen


def advert(manifest: Manifest, name: str, number: int) -> Signed:
    """A site's, with fresh keys."""
    keys = (public_of(generate_secret(SystemRandomness())) for _ in range(2))
    body = Advert(RoundKind.TRAIN, sha256(b"base"), round_encoding(manifest, RoundKind.TRAIN).digest(), *keys)
    return sign(signing_key(name), MessageType.ADVERT, manifest.digest(), number, 1, name, body)


def shared(manifest: Manifest, number: int = 1) -> Round:
    """A round in which all have adverted and shared."""
    state, _ = begin(
        run=manifest.digest(), number=number, kind=RoundKind.TRAIN, terms=terms_of(manifest), base_digest=sha256(b"base"), base_bytes=192,
        encoding=round_encoding(manifest, RoundKind.TRAIN).canonical(), seed=bytes(32), connected=NAMES, now=0.0,
    )  # fmt: skip
    for name in NAMES:
        event = verified_event(manifest, state, advert(manifest, name, number))
        assert isinstance(event, AdvertReceived)
        state, _ = step(state, event, 0.0)
    for name in NAMES:
        state, _ = step(state, SharesReceived(name, 1, b"shares of " + name.encode()), 0.0)
    assert state.phase is Phase.UPLOADING
    return state


def upload(manifest: Manifest, name: str) -> Signed:
    body = Upload(sha256(name.encode()), round_encoding(manifest, RoundKind.TRAIN).wire_bytes)
    return sign(signing_key(name), MessageType.UPLOAD, manifest.digest(), 1, 1, name, body)


def test_a_phase_costs_n_signature_checks_and_not_n_squared(checks: list[str]) -> None:
    manifest = manifest_of(NAMES, f=4)
    state = shared(manifest)
    assert sorted(checks) == [f"{name} advert" for name in NAMES]
    checks.clear()
    for name in NAMES:
        verified_upload(manifest, state, upload(manifest, name))
    assert sorted(checks) == sorted(f"{name} {what}" for name in NAMES for what in ("advert", "upload"))
    checks.clear()
    again = replace(state, sites={name: replace(site, tenths=9) for name, site in state.sites.items()})
    assert roster_of(manifest, again) is roster_of(manifest, state)
    assert checks == []


def test_a_kept_roster_answers_only_for_the_same_adverts_and_terms(checks: list[str]) -> None:
    """Another advert, attempt, invited set, model, encoding or pinned key is checked anew."""
    manifest = manifest_of(NAMES, f=4)
    state = shared(manifest)
    roster_of(manifest, state)
    first = NAMES[0]
    other = advert(manifest, first, 1)
    swapped = replace(state, sites={**state.sites, first: replace(state.sites[first], advert=other.encode())})
    found = roster_of(manifest, swapped)
    assert (found.adverts[first], found.ctx == roster_of(manifest, state).ctx) == (other, False)

    forged = replace(other, site=NAMES[1])
    lied = replace(state, sites={**state.sites, first: replace(state.sites[first], advert=forged.encode())})
    for wrong in (
        lied,
        replace(state, attempt=2),
        replace(state, base_digest=sha256(b"another base")),
        replace(state, invited=NAMES[1:]),
        replace(state, kind=RoundKind.STATISTICS),
    ):
        for _ in range(2):  # a refusal is not kept
            with pytest.raises(ProtocolViolation):
                roster_of(manifest, wrong)
    stranger = manifest.participants[0].model_copy(update={"key": signing_key("somebody").public_key().public_bytes_raw().hex()})
    with pytest.raises(ProtocolViolation):
        roster_of(manifest.model_copy(update={"participants": (stranger, *manifest.participants[1:])}), state)


def test_few_rosters_are_kept(checks: list[str]) -> None:
    manifest = manifest_of(NAMES, f=4)
    states = [shared(manifest, number) for number in range(1, ROSTERS_KEPT + 3)]
    for state in states:
        roster_of(manifest, state)
    assert verification._opened.cache_info().currsize == ROSTERS_KEPT
    checks.clear()
    roster_of(manifest, states[0])
    assert len(checks) == len(NAMES)
