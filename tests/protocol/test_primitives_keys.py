"""Keys, sharing and messages: properties, and the oracle `shamirs` for the sharing."""

from __future__ import annotations

import copy
import logging
import pickle  # noqa: TID251 - to show that a secret refuses it

import pytest
import shamirs  # type: ignore[import-untyped]  # it ships no types
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cosilo_common.canonical import MalformedBytes, canonical_json, id_set, lp, parse_id_set, u64, unlp
from cosilo_common.secagg import sharing
from cosilo_common.secagg.keys import (
    InsecureFakeRandom,
    Keystream,
    Secret,
    SystemRandomness,
    agree,
    check_public,
    generate_secret,
    pair_seed,
    public_of,
)
from cosilo_common.secagg.messages import (
    SEALED_BYTES,
    Advert,
    Body,
    Complaint,
    ComplaintCode,
    Consent,
    MessageType,
    Reveal,
    RoundKind,
    Shares,
    Signed,
    Upload,
    attempt_context,
    sign,
    threshold,
    verify,
)
from cosilo_common.secagg.roster import Terms
from cosilo_common.secagg.violation import ProtocolViolation
from tests.vectors import reference

SECRETS = st.binary(min_size=32, max_size=32).map(Secret)
NAMES = st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True)
KEY = Ed25519PrivateKey.from_private_bytes(InsecureFakeRandom("signing").token_bytes(32))


# Canonical bytes


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_lp_splits_into_what_was_joined(fields: list[bytes]) -> None:
    assert unlp(lp(*fields), 8) == fields


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=5))
def test_lp_is_injective(first: list[bytes], second: list[bytes]) -> None:
    assert (lp(*first) == lp(*second)) == (first == second)


@pytest.mark.parametrize("data", [b"\x00", b"\x00\x00\x00\x01", b"\x00\x00\x00\x02a", lp(b"a") + b"\x00", lp(b"a", b"b", b"c")])
def test_unlp_is_strict(data: bytes) -> None:
    with pytest.raises(MalformedBytes):
        unlp(data, 2)


def test_sets_are_sorted_and_unique() -> None:
    assert id_set(["b", "a"]) == lp(b"a", b"b")
    assert parse_id_set(lp(b"a", b"b"), 2) == ("a", "b")
    for bad in (lp(b"b", b"a"), lp(b"a", b"a"), lp(b"A"), lp(b""), lp(b"a" * 64), lp(b"a", b"b", b"c"), lp("é".encode())):
        with pytest.raises(MalformedBytes):
            parse_id_set(bad, 2)
    with pytest.raises(MalformedBytes):
        id_set(["a", "a"])


def test_json_has_one_form() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,0.5]}'
    with pytest.raises(MalformedBytes):
        canonical_json(float("nan"))


@pytest.mark.parametrize("n", [-1, 2**64])
def test_integers_have_eight_bytes(n: int) -> None:
    assert u64(258) == b"\x00\x00\x00\x00\x00\x00\x01\x02"
    with pytest.raises(MalformedBytes):
        u64(n)


# Secrets and keys


def test_a_secret_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(b"canary-canary-canary-canary-0123")
    logging.getLogger("test").warning("%s %r", secret, {"secret": secret})
    for text in (repr(secret), str(secret), f"{secret}", caplog.text):
        assert "canary" not in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)
    with pytest.raises(TypeError):
        hash(secret)


@settings(max_examples=20)
@given(SECRETS, SECRETS)
def test_both_ends_derive_one_pair_seed(a: Secret, b: Secret) -> None:
    ctx = b"c" * 32
    assert agree(a, public_of(b)) == agree(b, public_of(a))
    assert pair_seed(ctx, "x", a, "y", public_of(b)) == pair_seed(ctx, "y", b, "x", public_of(a))


@given(st.integers(0, 2**256 - 1))
def test_only_canonical_keys_of_full_order_pass(number: int) -> None:
    """A clamped scalar is a multiple of 8: exactly the points of low order give zero."""
    key = number.to_bytes(32, "little")
    if number < 2**255 - 19 and any(reference.x25519(bytes(32), key)):
        assert check_public(key) == key
    else:
        with pytest.raises(ProtocolViolation) as refused:
            check_public(key)
        assert refused.value.rule == "phase-1"


def test_a_keystream_can_start_anywhere() -> None:
    seed = generate_secret(SystemRandomness())
    whole = Keystream(seed).token_bytes(96)
    assert Keystream(seed, 2).token_bytes(64) == whole[32:]
    first = Keystream(seed)
    assert first.token_bytes(5) + first.token_bytes(91) == whole


def test_the_fake_random_is_told_apart_by_its_seed() -> None:
    assert InsecureFakeRandom(1).token_bytes(32) == InsecureFakeRandom(1).token_bytes(32)
    assert InsecureFakeRandom(1).token_bytes(32) != InsecureFakeRandom(2).token_bytes(32)


# Sharing


def test_the_prime_is_the_next_above_two_to_the_256() -> None:
    def probably_prime(n: int) -> bool:
        return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7, 11))

    above = [n for n in range(2**256 + 1, sharing.PRIME + 1, 2) if probably_prime(n)]
    assert above == [sharing.PRIME]


@settings(max_examples=50)
@given(SECRETS, st.integers(1, 8), st.integers(0, 4), st.randoms(use_true_random=False), st.integers())
def test_any_threshold_of_shares_gives_the_secret(secret: Secret, least: int, more: int, pick: object, seed: int) -> None:
    shares = dict(enumerate(sharing.split(secret, least, least + more, InsecureFakeRandom(seed)), 1))
    chosen = pick.sample(sorted(shares), least)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert sharing.combine({x: shares[x] for x in chosen}, least) == secret
    oracle = shamirs.interpolate([shamirs.share(x, int.from_bytes(shares[x], "big"), sharing.PRIME) for x in chosen], threshold=least)
    assert oracle == int.from_bytes(secret.reveal(), "big")


@settings(max_examples=30)
@given(st.integers(0, 2**256 - 1), st.integers(2, 6))
def test_shares_made_by_the_oracle_combine(number: int, least: int) -> None:
    shares = shamirs.shares(number, quantity=least + 2, modulus=sharing.PRIME, threshold=least)
    ours = {share.index: share.value.to_bytes(33, "big") for share in shares[-least:]}
    assert sharing.combine(ours, least).reveal() == number.to_bytes(32, "big")


def test_fewer_shares_say_nothing() -> None:
    """With one share less than the threshold every secret is still possible: some last share leads to it."""
    shares = dict(enumerate(sharing.split(Secret(bytes(32)), 3, 3, InsecureFakeRandom(0)), 1))
    x1, x2 = (int.from_bytes(shares[x], "big") for x in (1, 2))
    for wanted in (0, 1, 2**256 - 1):
        # the parabola through (0, wanted), (1, x1), (2, x2), at 3
        third = (wanted - 3 * x1 + 3 * x2) % sharing.PRIME
        found = sharing.combine({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}, 3)
        assert found.reveal() == wanted.to_bytes(32, "big")


def test_sharing_refuses_what_the_protocol_refuses() -> None:
    secret, random = Secret(b"\xff" * 32), InsecureFakeRandom(0)
    good = dict(enumerate(sharing.split(secret, 2, 3, random), 1))
    with pytest.raises(ValueError, match="threshold"):
        sharing.split(secret, 4, 3, random)
    with pytest.raises(ValueError, match="not 2"):
        sharing.combine(good, 2)
    with pytest.raises(ValueError, match="33 bytes"):
        sharing.combine({1: good[1], 2: sharing.PRIME.to_bytes(33, "big")}, 2)
    with pytest.raises(ValueError, match="33 bytes"):
        sharing.combine({1: good[1], 2: good[2][1:]}, 2)
    with pytest.raises(ValueError, match="x is from 1"):
        sharing.combine({0: good[1], 2: good[2]}, 2)
    above = (2**256).to_bytes(33, "big")  # a constant polynomial: the secret would have 33 bytes
    with pytest.raises(ValueError, match="no 32-byte secret"):
        sharing.combine({1: above, 2: above}, 2)


def test_coefficients_are_drawn_again_above_the_prime() -> None:
    class Scripted:
        def __init__(self) -> None:
            self.draws = [sharing.PRIME.to_bytes(33, "big"), (2**257 - 1).to_bytes(33, "big"), (5).to_bytes(33, "big")]

        def token_bytes(self, n: int) -> bytes:
            assert n == 33
            return self.draws.pop(0)

    shares = sharing.split(Secret(bytes(32)), 2, 2, Scripted())
    assert [int.from_bytes(share, "big") for share in shares] == [5, 10]


# Messages

BODIES: list[tuple[MessageType, Body, type]] = [
    (MessageType.ADVERT, Advert(RoundKind.TRAIN, b"b" * 32, b"e" * 32, b"c" * 32, b"s" * 32), Advert),
    (MessageType.ADVERT, Advert(RoundKind.REHEARSAL, b"b" * 32, b"e" * 32, b"", b""), Advert),
    (
        MessageType.SHARES,
        Shares({"b": b"x" * SEALED_BYTES}, b"s" * 32, {"a": b"1" * 32, "b": b"2" * 32}, {"a": b"3" * 32, "b": b"4" * 32}),
        Shares,
    ),
    (MessageType.COMPLAINT, Complaint("b", ComplaintCode.SHARE), Complaint),
    (MessageType.UPLOAD, Upload(b"d" * 32, 12345), Upload),
    (MessageType.CONSENT, Consent(b"c" * 32, ("a", "b", "c")), Consent),
    (MessageType.REVEAL, Reveal(b"c" * 32, ("a", "b"), {"a": b"1" * 33, "b": b"2" * 33}, {"c": b"3" * 33}), Reveal),
]


@pytest.mark.parametrize(("type", "body", "cls"), BODIES)
def test_messages_go_round(type: MessageType, body: Body, cls: type) -> None:
    signed = sign(KEY, type, b"r" * 32, 3, 1, "st-anna", body)
    verify(signed, KEY.public_key().public_bytes_raw())
    again = Signed.decode(signed.encode())
    assert again == signed
    assert cls.decode(again.body) == body  # type: ignore[attr-defined]  # every body class has decode
    assert again.encode() == signed.encode()


@settings(max_examples=60)
@given(st.sampled_from(BODIES), st.integers(0, 2000), st.integers(1, 255))
def test_a_changed_byte_never_passes(case: tuple[MessageType, Body, type], at: int, flip: int) -> None:
    signed = sign(KEY, case[0], b"r" * 32, 3, 1, "st-anna", case[1])
    data = bytearray(signed.encode())
    data[at % len(data)] ^= flip
    with pytest.raises(ProtocolViolation) as refused:
        verify(Signed.decode(bytes(data)), KEY.public_key().public_bytes_raw())
    assert refused.value.rule in ("message", "signature")


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_as_no_message(data: bytes) -> None:
    for decode in (Signed.decode, Advert.decode, Shares.decode, Complaint.decode, Upload.decode, Consent.decode, Reveal.decode):
        with pytest.raises(ProtocolViolation) as refused:
            decode(data)
        assert refused.value.rule == "message"


@settings(max_examples=60)
@given(st.sampled_from(BODIES), st.integers(0, 400), st.booleans())
def test_a_cut_or_longer_body_is_refused(case: tuple[MessageType, Body, type], at: int, cut: bool) -> None:
    data = case[1].encode()
    changed = data[: at % len(data)] if cut else data + b"\x00" * (1 + at)
    with pytest.raises(ProtocolViolation) as refused:
        case[2].decode(changed)  # type: ignore[attr-defined]  # every body class has decode
    assert refused.value.rule == "message"


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolViolation, match="at most"):
        Signed.decode(bytes(1 << 20))


def test_r6_both_shares_for_one_peer_are_neither_written_nor_read() -> None:
    both = Reveal(b"c" * 32, ("a",), {"a": b"1" * 33}, {"a": b"2" * 33})
    with pytest.raises(ProtocolViolation) as refused:
        both.encode()
    assert refused.value.rule == "R6"


def test_ctx_changes_with_every_field() -> None:
    advert = sign(KEY, MessageType.ADVERT, b"r" * 32, 3, 1, "a", b"body")
    base = {
        "run": b"r" * 32,
        "round": 3,
        "kind": RoundKind.TRAIN,
        "attempt": 1,
        "invited": ("a", "b", "c"),
        "threshold": 3,
        "base_digest": b"m" * 32,
        "encoding_digest": b"e" * 32,
        "bits": 32,
        "length": 100,
        "adverts": [advert],
    }
    other = {
        "run": b"s" * 32,
        "round": 4,
        "kind": RoundKind.REHEARSAL,
        "attempt": 2,
        "invited": ("a", "b", "d"),
        "threshold": 2,
        "base_digest": b"n" * 32,
        "encoding_digest": b"f" * 32,
        "bits": 24,
        "length": 101,
        "adverts": [sign(KEY, MessageType.ADVERT, b"r" * 32, 3, 1, "a", b"bodz")],
    }
    contexts = {attempt_context(**{**base, name: other[name]}) for name in base}  # type: ignore[arg-type]  # mixed values
    assert len(contexts | {attempt_context(**base)}) == len(base) + 1  # type: ignore[arg-type]  # the same


# R1

TABLE = {
    3: (1, 3, 2),
    4: (1, 3, 2),
    5: (1, 4, 3),
    6: (2, 5, 3),
    7: (2, 5, 3),
    8: (2, 6, 4),
    9: (3, 7, 4),
    10: (3, 7, 4),
    11: (3, 8, 5),
    12: (4, 9, 5),
}  # N: f, t, least honest sites in a sum


@pytest.mark.parametrize("sites", [*TABLE, 50, 100])
def test_r1_the_table_of_thresholds(sites: int) -> None:
    f, expected, _ = {**TABLE, 50: (16, 34, 18), 100: (33, 67, 34)}[sites]
    assert f == max(1, sites // 3)
    assert threshold(sites, f) == expected


@pytest.mark.parametrize("sites", TABLE)
def test_r1_no_two_survivor_sets_of_one_invited_set_can_open(sites: int) -> None:
    """Each opening needs t consents; honest sites consent once, f may consent twice: 2 t <= honest + 2 f must be false."""
    f, least, honest = TABLE[sites]
    assert 2 * least > (sites - f) + 2 * f
    assert least <= sites
    assert least - f == honest


@pytest.mark.parametrize("n_min", [0, 1, 3, 5])
def test_r1_a_smaller_invited_set_never_lowers_the_threshold_of_a_larger(n_min: int) -> None:
    def terms(invited: int) -> Terms:
        names = tuple(f"s{index}" for index in range(invited))
        return Terms(
            b"r" * 32, 1, RoundKind.TRAIN, 1, names, 2, n_min, dict.fromkeys(names, b""), b"", b"", 32, 100
        )  # fmt: skip

    with pytest.raises(ProtocolViolation) as refused:
        terms(max(n_min, 4) - 1)
    assert refused.value.rule == "R1"
    assert terms(max(n_min, 4)).quorum >= max(n_min, 4)
