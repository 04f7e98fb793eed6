"""The frozen vectors: written by this code, and read by another implementation (tests/vectors/reference.py)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding
from cosilo_common.secagg.messages import Advert, Consent, Reveal, Shares, Signed, verify
from tests.vectors import generate, play, reference

CASES = ("secagg-n3-b32", "secagg-n3-b24", "secagg-n5-drop-b32", "secagg-n5-drop-b24")
NAMES = (*CASES, "secagg-primitives", "secagg-refusals")


@cache
def frozen(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((generate.FOLDER / f"{name}.json").read_text())
    return content


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def words(text: str) -> list[int]:
    data = raw(text)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return generate.files()


@pytest.mark.parametrize("name", NAMES)
def test_the_code_still_writes_the_frozen_vectors(name: str, generated: dict[str, str]) -> None:
    assert generated[f"{name}.json"] == (generate.FOLDER / f"{name}.json").read_text()


def test_every_vector_file_has_its_generator(generated: dict[str, str]) -> None:
    assert {path.name for path in generate.FOLDER.glob("secagg-*.json")} == set(generated)


def test_reference_reads_the_primitives() -> None:
    vectors = frozen("secagg-primitives")
    label = vectors["label_hash"]
    assert reference.h(label["label"], *map(raw, label["fields"])) == raw(label["digest"])
    derived = vectors["kdf"]
    key = reference.kdf(raw(derived["z"]), raw(derived["ctx"]), derived["label"], *map(raw, derived["fields"]))
    assert key == raw(derived["key"])
    for case in vectors["sharing"]:
        shares = {x: raw(share) for x, share in enumerate(case["shares"], 1)}
        for first in range(1, len(shares) - case["threshold"] + 2):
            some = {x: shares[x] for x in range(first, first + case["threshold"])}
            assert reference.combine(some) == int(case["secret"], 16)
    for case in vectors["masks"]:
        for chunk, text in case["chunks"].items():
            first = int(chunk) * reference.CHUNK_WORDS
            expected = [reference.mask_word(raw(case["seed"]), first + at, case["bits"]) for at in range(64)]
            assert words(text) == expected
    assert sha256(raw(vectors["encoding"]["canonical"])) == raw(vectors["encoding"]["digest"])


@pytest.mark.parametrize("name", CASES)
def test_reference_derives_ctx_keys_and_seeds(name: str) -> None:
    case = frozen(name)
    sites, ctx = case["sites"], raw(case["ctx"])
    threshold = (len(sites) + case["terms"]["f"]) // 2 + 1
    assert ctx == reference.context(case["terms"], threshold, {site: raw(it["advert"]) for site, it in sites.items()})
    for site, it in sites.items():
        body = Advert.decode(Signed.decode(raw(it["advert"])).body)
        assert body.share_key == reference.public(raw(it["share_private"]))
        assert body.mask_key == reference.public(raw(it["mask_private"]))
        assert raw(it["seeds"]["self"]) == reference.kdf(raw(it["b"]), ctx, "self", site.encode())
        for peer, other in sites.items():
            if peer != site:
                low, high = sorted((site, peer))
                z = reference.x25519(raw(it["mask_private"]), reference.public(raw(other["mask_private"])))
                assert raw(it["seeds"][peer]) == reference.kdf(z, ctx, "pair", low.encode(), high.encode())


@pytest.mark.parametrize("name", CASES)
def test_reference_opens_the_shares(name: str) -> None:
    case = frozen(name)
    sites, ctx = case["sites"], raw(case["ctx"])
    threshold = (len(sites) + case["terms"]["f"]) // 2 + 1
    bodies = {site: Shares.decode(Signed.decode(raw(it["shares"])).body) for site, it in sites.items()}
    for dealer, body in bodies.items():
        assert body.self_commitment == reference.h("self", ctx, dealer.encode(), raw(sites[dealer]["b"]))
        held = {}
        for recipient in sites:
            pair = sites[recipient]["held"][dealer]
            held[recipient] = (raw(pair["b"]), raw(pair["s"]))
            who = (dealer.encode(), recipient.encode())
            assert body.b_commitments[recipient] == reference.h("cb", ctx, *who, held[recipient][0])
            assert body.s_commitments[recipient] == reference.h("cs", ctx, *who, held[recipient][1])
            if recipient != dealer:
                z = reference.x25519(raw(sites[recipient]["share_private"]), reference.public(raw(sites[dealer]["share_private"])))
                key = reference.kdf(z, ctx, "share", *who)
                assert held[recipient] == reference.open_seal(key, ctx, dealer, recipient, body.ciphertexts[recipient])
        ranks = dict(enumerate(sorted(sites), 1))
        some = list(ranks)[-threshold:]
        assert reference.combine({x: held[ranks[x]][0] for x in some}) == int(sites[dealer]["b"], 16)
        assert reference.combine({x: held[ranks[x]][1] for x in some}) == int(sites[dealer]["mask_private"], 16)


@pytest.mark.parametrize("name", CASES)
def test_reference_makes_the_same_words(name: str) -> None:
    """q, then y = q + self + pairs, for the first 64 words of each of three chunks; then the opened sum of the survivors."""
    case = frozen(name)
    sites, encoding = case["sites"], Encoding.parse(raw(case["encoding"]))
    bits, ranks = encoding.bits, {site: rank for rank, site in enumerate(sorted(case["sites"]), 1)}
    ends = (encoding.sections[0].size, encoding.size)
    for chunk in (0, 1, 2):
        total = [0] * 64
        for site in case["survivors"]:
            it = sites[site]
            plain, masked = words(it["plain"]["first_words"][str(chunk)]), words(it["masked"]["first_words"][str(chunk)])
            for at in range(64):
                index = chunk * reference.CHUNK_WORDS + at
                clip = encoding.sections[0 if index < ends[0] else 1].clip
                uniform = reference.mask_word(raw(it["rounding"]), index, 32) / 2**32
                value = play.value_at(ranks[site], index)
                q = reference.quantised(value, clip, it["weight"], encoding.cap, encoding.participants, bits, uniform)
                assert plain[at] == q
                mask = reference.mask_word(raw(it["seeds"]["self"]), index, bits)
                for peer in sites:
                    if peer != site:
                        word = reference.mask_word(raw(it["seeds"][peer]), index, bits)
                        mask += word if peer > site else -word
                assert masked[at] == (q + mask) % 2**bits
                total[at] = (total[at] + q) % 2**bits
        assert words(case["opened"]["first_words"][str(chunk)]) == total


@pytest.mark.parametrize("name", CASES)
def test_reference_reads_the_tail(name: str) -> None:
    case = frozen(name)
    tail, survivors = words(case["opened"]["tail"]), case["survivors"]
    weight = sum(case["sites"][site]["weight"] for site in survivors)
    assert tail[0] == weight == case["opened"]["total_weight"]
    assert tail[5] == len(survivors)
    assert tail[6:] == [0] * 64
    encoding = Encoding.parse(raw(case["encoding"]))
    q = (2 ** (encoding.bits - 1) - 1) // encoding.participants
    losses = [word * 16.0 * encoding.cap / (q * weight) for word in tail[1:4]]
    assert losses == case["opened"]["losses"]
    assert losses == pytest.approx([0.25, 1.5, 16.0], rel=1e-2 if encoding.bits == 24 else 1e-6)
    assert tail[4] / (q * len(survivors)) == case["opened"]["clip_ratio"]
    # |value| is even over [0, 0.25]: a fifth of the first section is above 0.2, four fifths of the second are above 0.05
    assert case["opened"]["clip_ratio"] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_reference_verifies_consents_and_reveals(name: str) -> None:
    case = frozen(name)
    ctx, survivors = raw(case["ctx"]), case["survivors"]
    for site in survivors:
        key = raw(case["terms"]["keys"][site])
        consent, reveal = Signed.decode(raw(case["consents"][site])), Signed.decode(raw(case["reveals"][site]))
        verify(consent, key)
        verify(reveal, key)
        named = reference.names(survivors)
        assert reference.unlp(consent.body) == [ctx, named, reference.h("consent", ctx, named)]
        assert Consent.decode(consent.body).survivors == tuple(survivors)
        body, held = Reveal.decode(reveal.body), case["sites"][site]["held"]
        assert body.b_shares == {peer: raw(held[peer]["b"]) for peer in survivors}
        assert body.s_shares == {peer: raw(held[peer]["s"]) for peer in case["sites"] if peer not in survivors}
