"""Writes the frozen vectors of `cosilo-secagg/1` beside itself: python -m tests.vectors.generate [--check].

Every value follows from InsecureFakeRandom and the formulas in play.py, so that running this again writes the same bytes. A change in
them is a change of the protocol: its version must change with it. tests/protocol/test_primitives_vectors.py compares, and checks the
files against an implementation of its own (reference.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cosilo_common.canonical import lp, sha256, u64
from cosilo_common.encoding import Encoding, Section
from cosilo_common.secagg import sharing
from cosilo_common.secagg.dealing import deal, site_masks
from cosilo_common.secagg.keys import InsecureFakeRandom, Secret, generate_secret, kdf, label_hash
from cosilo_common.secagg.masks import CHUNK_WORDS, WORD, Mask, Words
from cosilo_common.secagg.messages import Complaint, ComplaintCode, Consent, MessageType, RoundKind, Signed, Upload, sign
from cosilo_common.secagg.roster import Terms
from cosilo_server.secagg import SumOpening, reconstruct
from tests.vectors.play import LOSS_MAX, LOSSES, Play, exact_sum, reader, small_encoding, with_body

FOLDER = Path(__file__).parent
SHOWN_WORDS = 64
PROVENANCE = {
    "protocol": "cosilo-secagg/1",
    "generator": "python -m tests.vectors.generate",
    "randomness": "InsecureFakeRandom(seed): AES-256-CTR from counter 0 under SHA-256('InsecureFakeRandom/' || seed)",
    "words": "32-bit little endian, hex, the first 64 of a chunk; b = 24: reduced, still 4 bytes each",
    "updates": "play.value_at(rank, index), rank from 1 in sorted order; weights cap // rank; losses play.LOSSES",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file would change")
    check = parser.parse_args().check
    stale = [name for name, text in files().items() if not _current(FOLDER / name, text)]
    if check:
        sys.exit("stale: " + ", ".join(stale) if stale else 0)
    for name, text in files().items():
        (FOLDER / name).write_text(text)


def files() -> dict[str, str]:
    """Every vector file by name."""
    contents: dict[str, Callable[[], dict[str, Any]]] = {
        "secagg-primitives.json": primitives,
        "secagg-n3-b32.json": lambda: attempt(3, 32, ()),
        "secagg-n3-b24.json": lambda: attempt(3, 24, ()),
        "secagg-n5-drop-b32.json": lambda: attempt(5, 32, ("site-2",)),
        "secagg-n5-drop-b24.json": lambda: attempt(5, 24, ("site-4",)),
        "secagg-refusals.json": refusals,
    }
    return {name: json.dumps({"provenance": PROVENANCE, **make()}, indent=1) + "\n" for name, make in contents.items()}


def primitives() -> dict[str, Any]:
    """H, KDF, sharing, masks and the encoding's canonical form."""
    random = InsecureFakeRandom("primitives")
    secret, ctx = generate_secret(random), sha256(b"ctx")
    shares = sharing.split(secret, 3, 5, InsecureFakeRandom("sharing"))
    all_ones = Secret(b"\xff" * 32)
    encoding = Encoding(32, 3, 4096, (Section(1000, 1.0), Section(24, 0.03125)), LOSS_MAX, 9)
    return {
        "label_hash": {"label": "self", "fields": [b"a".hex(), b"bc".hex()], "digest": label_hash("self", b"a", b"bc").hex()},
        "kdf": {
            "z": secret.reveal().hex(),
            "ctx": ctx.hex(),
            "label": "pair",
            "fields": [b"a".hex(), b"b".hex()],
            "key": kdf(secret, ctx, "pair", b"a", b"b").reveal().hex(),
        },
        "sharing": [
            {"seed": "sharing", "secret": secret.reveal().hex(), "threshold": 3, "shares": [share.hex() for share in shares]},
            {
                "seed": "largest",
                "secret": all_ones.reveal().hex(),
                "threshold": 2,
                "shares": [share.hex() for share in sharing.split(all_ones, 2, 3, InsecureFakeRandom("largest"))],
            },
        ],
        "masks": [
            {
                "seed": secret.reveal().hex(),
                "bits": bits,
                "chunks": {str(chunk): _hex(Mask(secret, bits).words(chunk, SHOWN_WORDS)) for chunk in (0, 1, 2)},
            }
            for bits in (32, 24)
        ],
        "encoding": {"canonical": encoding.canonical().hex(), "digest": encoding.digest().hex(), "wire_bytes": encoding.wire_bytes},
    }


def attempt(count: int, bits: int, dropped: tuple[str, ...]) -> dict[str, Any]:
    """One whole attempt over three chunks."""
    cap = 4096 if bits == 32 else 60
    encoding = Encoding(bits, count, cap, (Section(CHUNK_WORDS + 77, 0.2), Section(CHUNK_WORDS + 923, 0.05)), LOSS_MAX, len(LOSSES))
    names = tuple(f"site-{index}" for index in range(1, count + 1))
    seed = f"secagg-n{count}-b{bits}"
    play = Play(names, f=1, encoding=encoding, dropped=dropped, seed=seed)
    roster = play.roster
    sites = {name: _site(play, name) for name in names}
    keys = reconstruct(roster, play.survivors, play.share_bodies, play.reveals())
    opening = SumOpening(
        encoding,
        {name: reader(data) for name, data in play.uploads.items()},
        {name: sha256(data) for name, data in play.uploads.items()},
        keys.masks,
    )
    opened = {str(start // CHUNK_WORDS): _hex(words[:SHOWN_WORDS]) for start, words in opening}
    total = exact_sum(play)
    return {
        "seed": seed,
        "terms": _terms(play.terms),
        "encoding": encoding.canonical().hex(),
        "ctx": roster.ctx.hex(),
        "sites": sites,
        "survivors": list(play.survivors),
        "consents": {name: play.consent(name).encode().hex() for name in play.survivors},
        "reveals": {name: play.reveal(name).encode().hex() for name in play.survivors},
        "opened": {
            "first_words": opened,
            "tail": _hex(total[encoding.size :]),
            "digest": sha256(total.tobytes()).hex(),
            "total_weight": opening.tail.total_weight,
            "losses": list(opening.tail.losses),
            "clip_ratio": opening.tail.clip_ratio,
        },
    }


def _site(play: Play, name: str) -> dict[str, Any]:
    site, peers = play.sites[name], [peer for peer in play.names if peer != name]
    masks = site_masks(play.roster, name, site.b, site.mask_private)
    shown: dict[str, Any] = {
        "signing_private": site.signing.private_bytes_raw().hex(),
        "share_private": site.share_private.reveal().hex(),
        "mask_private": site.mask_private.reveal().hex(),
        "b": site.b.reveal().hex(),
        "rounding": site.rounding.reveal().hex(),
        "weight": site.weight,
        "advert": play.adverts[name].encode().hex(),
        "shares": play.shares[name].encode().hex(),
        "held": {dealer: {"b": pair.b.hex(), "s": pair.s.hex()} for dealer, pair in play.held(name).items()},
        "seeds": {key: mask.mask.seed.reveal().hex() for key, mask in zip(["self", *peers], masks, strict=True)},
        "self_mask": {str(chunk): _hex(masks[0].mask.words(chunk, SHOWN_WORDS)) for chunk in (0, 1, 2)},
    }
    if name in play.survivors:
        plain, masked = play.plain_words(name), play.masked_words(name)
        shown["plain"] = {"first_words": _first(plain), "digest": sha256(plain.tobytes()).hex()}
        shown["masked"] = {"first_words": _first(masked), "digest": sha256(masked.tobytes()).hex()}
        shown["upload"] = play.statement(name).encode().hex()
    return shown


# What must fail


def refusals() -> dict[str, Any]:
    """Inputs that must be refused, each with the rule that it breaks. The good attempt that they depart from is `transcript`."""
    play = _small()
    return {
        "transcript": {
            "terms": _terms(play.terms),
            "encoding": play.encoding.canonical().hex(),
            "adverts": {name: signed.encode().hex() for name, signed in play.adverts.items()},
            "shares": {name: signed.encode().hex() for name, signed in play.shares.items()},
            "uploads": {name: data.hex() for name, data in play.uploads.items()},
            "statements": {name: play.statement(name).encode().hex() for name in play.survivors},
            "survivors": list(play.survivors),
            "consents": {name: play.consent(name).encode().hex() for name in play.survivors},
            "reveals": {name: play.reveal(name).encode().hex() for name in play.survivors},
        },
        "refused": [
            *_refused_keys(),
            *_refused_terms(play),
            *_refused_adverts(play),
            *_refused_rosters(play),
            *_refused_dealings(play),
            *_refused_answers(play),
            *_refused_bytes(play),
            *_refused_sums(play),
        ],
    }


def _case(name: str, rule: str, check: str, **given: Any) -> dict[str, Any]:
    return {"name": name, "rule": rule, "check": check, **given}


def _small() -> Play:
    return Play(
        tuple(f"site-{index}" for index in range(1, 6)),
        f=1,
        encoding=small_encoding(32, 5, size=20),
        dropped=("site-3",),
        seed="secagg-refusals",
    )


def _refused_keys() -> list[dict[str, Any]]:
    prime = 2**255 - 19
    order_eight = 325606250916557431795983626356110631294008115727848805560023387167927233504
    numbers = {
        "the neutral element": 0,
        "order 4, u = 1": 1,
        "order 8": order_eight,
        "order 2, u = p - 1": prime - 1,
        "0 written as p": prime,
        "9, the base point, written as p + 9": prime + 9,
        "9 with the bit that X25519 ignores": 9 + 2**255,
    }
    return [_case(f"public key: {name}", "phase-1", "public", key=number.to_bytes(32, "little").hex()) for name, number in numbers.items()]


def _refused_terms(play: Play) -> list[dict[str, Any]]:
    base = _terms(play.terms)
    return [
        _case("a smaller invited set to lower the threshold", "R1", "terms", terms={**base, "invited": base["invited"][:2]}),
        _case(
            "n_min below 3 does not lower the least invited set",
            "R1",
            "terms",
            terms={**base, "invited": base["invited"][:2], "n_min": 2, "f": 0},
        ),
        _case("f above what the invited set bears", "R1", "terms", terms={**base, "f": 4}),
        _case("an invited site that is no participant", "pins", "terms", terms={**base, "invited": [*base["invited"], "sybil"]}),
        _case("a sixth attempt", "phase-2", "terms", terms={**base, "attempt": 6}),
        _case("an invited set that is not sorted", "phase-0", "terms", terms={**base, "invited": base["invited"][::-1]}),
    ]


def _refused_adverts(play: Play) -> list[dict[str, Any]]:
    good, body = play.adverts["site-1"], play.advert_body("site-1")
    key = play.sites["site-1"].signing
    stranger = Ed25519PrivateKey.from_private_bytes(sha256(b"an admin's key"))

    def resigned(**changes: Any) -> Signed:
        fields: dict[str, Any] = {"private": key, "run": good.run, "round": good.round, "attempt": good.attempt, "site": good.site}
        return sign(type=MessageType.ADVERT, **{**fields, "body": body, **changes})

    def with_fields(**changes: Any) -> Signed:
        return resigned(body=replace(body, **changes))

    twin = bytes([*body.mask_key[:-1], body.mask_key[-1] | 0x80])
    cases = [
        ("forged: signed by another key", "signature", resigned(private=stranger)),
        ("forged: one bit of the body changed", "signature", with_body(good, body=bytes([*good.body[:-1], good.body[-1] ^ 1]))),
        ("an admin's key as participant", "pins", resigned(private=stranger, site="admin")),
        ("replayed from another run", "R2", resigned(run=sha256(b"another run"))),
        ("replayed from another round", "R2", resigned(round=6)),
        ("replayed from another attempt", "phase-2", resigned(attempt=2)),
        ("another base model", "R3", with_fields(base_digest=sha256(b"another model"))),
        ("another encoding", "R3", with_fields(encoding_digest=sha256(b"another encoding"))),
        ("another kind of round", "phase-1", with_fields(kind=RoundKind.REHEARSAL)),
        ("a bit twin of its own mask key", "phase-1", with_fields(mask_key=twin)),
        ("a share key of low order", "phase-1", with_fields(share_key=bytes(32))),
        ("no keys, as in a plain sum", "phase-1", with_fields(share_key=b"", mask_key=b"")),
        ("an upload statement in its place", "message", play.statement("site-1")),
    ]
    return [{"name": f"advert: {name}", "rule": rule, "check": "advert", "message": signed.encode().hex()} for name, rule, signed in cases]


def _refused_rosters(play: Play) -> list[dict[str, Any]]:
    good = [signed.encode().hex() for signed in play.adverts.values()]
    copied = replace(play.advert_body("site-2"), mask_key=play.advert_body("site-1").mask_key)
    copy = play.sign("site-2", MessageType.ADVERT, copied)
    other = Play(play.names, f=1, encoding=play.encoding, seed="another")
    mine = play.sign("site-1", MessageType.ADVERT, other.advert_body("site-1"))
    return [
        _case("roster: fewer than the threshold", "phase-2", "roster", adverts=good[:3]),
        _case("roster: a site stands twice", "phase-2", "roster", adverts=[*good, good[0]]),
        _case("roster: a swapped advert, another's mask key", "phase-2", "roster", adverts=[good[0], copy.encode().hex(), *good[2:]]),
        _case("roster: the reader's own advert replaced", "phase-2", "roster", adverts=good, own=mine.encode().hex()),
    ]


def _refused_dealings(play: Play) -> list[dict[str, Any]]:
    body = play.share_bodies["site-1"]

    def shares(**changes: Any) -> str:
        return play.sign("site-1", MessageType.SHARES, replace(body, **changes)).encode().hex()

    without = {name: value for name, value in body.ciphertexts.items() if name != "site-5"}
    stranger = {**body.b_commitments, "stranger": bytes(32)}
    swapped = {**body.ciphertexts, "site-2": body.ciphertexts["site-3"], "site-3": body.ciphertexts["site-2"]}
    wrong = {**body.b_commitments, "site-2": bytes(32)}
    return [
        _case("shares: one peer left out", "phase-3", "shares", message=shares(ciphertexts=without)),
        _case("shares: a commitment to a stranger", "phase-3", "shares", message=shares(b_commitments=stranger)),
        _case("dealing: a share for somebody else", "complaint seal", "dealing", recipient="site-2", message=shares(ciphertexts=swapped)),
        _case(
            "dealing: a share that was not committed to",
            "complaint share",
            "dealing",
            recipient="site-2",
            message=shares(b_commitments=wrong),
        ),
        _case(
            "complaint: of oneself",
            "phase-3",
            "complaint",
            message=play.sign("site-1", MessageType.COMPLAINT, Complaint("site-1", ComplaintCode.SEAL)).encode().hex(),
        ),
        _case(
            "complaint: of a stranger",
            "phase-3",
            "complaint",
            message=play.sign("site-1", MessageType.COMPLAINT, Complaint("stranger", ComplaintCode.SEAL)).encode().hex(),
        ),
        _case(
            "upload: another length than the encoding's",
            "phase-4",
            "upload",
            message=play.sign("site-1", MessageType.UPLOAD, Upload(bytes(32), 7)).encode().hex(),
        ),
    ]


def _refused_answers(play: Play) -> list[dict[str, Any]]:
    ctx, survivors, held = play.roster.ctx, play.survivors, play.held("site-1")
    reveal = play.reveal_body("site-1")

    def consent(*names: str, ctx: bytes = ctx) -> str:
        return play.sign("site-1", MessageType.CONSENT, Consent(ctx, names)).encode().hex()

    def answer(**changes: Any) -> str:
        return play.sign("site-1", MessageType.REVEAL, replace(reveal, **changes)).encode().hex()

    both = lp(
        ctx,
        lp(*(name.encode() for name in survivors)),
        _map({**reveal.b_shares, "site-3": held["site-3"].b}),
        _map(dict(reveal.s_shares)),
    )
    b_for_dropped = {**reveal.b_shares, "site-3": held["site-3"].b}
    wrong = {**reveal.b_shares, "site-2": held["site-4"].b}
    inconsistent = _inconsistent(play)
    return [
        _case(
            "consent: to other survivors",
            "R5",
            "consent",
            survivors=list(survivors),
            message=consent("site-1", "site-2", "site-3", "site-4"),
        ),
        _case(
            "consent: under another context", "phase-5", "consent", survivors=list(survivors), message=consent(*survivors, ctx=bytes(32))
        ),
        _case(
            "consent: fewer survivors than the threshold",
            "phase-5",
            "consent",
            survivors=list(survivors[:3]),
            message=consent(*survivors[:3]),
        ),
        _case(
            "consent: a survivor outside the roster",
            "phase-5",
            "consent",
            survivors=[*survivors, "zeta"],
            message=consent(*survivors, "zeta"),
        ),
        _case("reveal: both shares for one site", "R6", "reveal", message=play.sign("site-1", MessageType.REVEAL, both).encode().hex()),
        _case("reveal: b of a dropped site", "R6", "reveal", message=answer(b_shares=b_for_dropped, s_shares={})),
        _case("reveal: a site forgotten", "R6", "reveal", message=answer(s_shares={})),
        _case("reveal: a share that its dealer did not commit to", "phase-6", "reveal", message=answer(b_shares=wrong)),
        _case("reveal: for other survivors", "phase-6", "reveal", message=answer(survivors=play.names)),
        _case("reveal: for another context", "phase-6", "reveal", message=answer(ctx=bytes(32))),
        inconsistent,
    ]


def _inconsistent(play: Play) -> dict[str, Any]:
    """A dealer shares another b than it committed to, consistently: only reconstruction can see it."""
    liar, other = play.sites["site-1"], generate_secret(InsecureFakeRandom("another b"))
    body, own = deal(play.roster, "site-1", other, liar.mask_private, liar.share_private, InsecureFakeRandom("liar"))
    body = replace(body, self_commitment=play.share_bodies["site-1"].self_commitment)
    again = Play(play.names, f=1, encoding=play.encoding, dropped=play.dropped, seed=play.seed)
    _ = again.shares
    again.shares["site-1"] = again.sign("site-1", MessageType.SHARES, body)
    again.sites["site-1"].own = own
    return {
        "name": "reconstruct: a dealer shared another b than it committed to",
        "rule": "phase-6",
        "check": "reconstruct",
        "shares": {name: signed.encode().hex() for name, signed in again.shares.items()},
        "reveals": {name: again.reveal(name).encode().hex() for name in again.survivors},
    }


def _refused_bytes(play: Play) -> list[dict[str, Any]]:
    good = play.consent("site-1").encode()
    advert = play.adverts["site-1"]
    unsorted = lp(play.roster.ctx, lp(b"site-2", b"site-1"), label_hash("consent", play.roster.ctx, lp(b"site-2", b"site-1")))
    name = lp(b"advert", advert.run, u64(7), u64(1), b"Site_1", advert.body, advert.signature)
    return [
        _case("bytes: one too many", "message", "message", message=(good + b"\x00").hex()),
        _case("bytes: one too few", "message", "message", message=good[:-1].hex()),
        _case("bytes: empty", "message", "message", message=""),
        _case("bytes: an unknown type", "message", "message", message=good.replace(b"consent", b"dissent").hex()),
        _case("bytes: a site's name in capitals", "message", "message", message=name.hex()),
        _case("bytes: unsorted survivors", "message", "message", message=play.sign("site-1", MessageType.CONSENT, unsorted).encode().hex()),
        _case(
            "bytes: a field more in an advert",
            "message",
            "message",
            message=play.sign("site-1", MessageType.ADVERT, advert.body + lp(b"")).encode().hex(),
        ),
    ]


def _refused_sums(play: Play) -> list[dict[str, Any]]:
    tail = exact_sum(play)[play.encoding.size :].copy()

    def changed(index: int, value: int) -> str:
        words = tail.copy()
        words[index] = value
        return words.tobytes().hex()

    contributors = play.encoding.losses + 2
    return [
        _case("sum: a zero that is not zero", "phase-6", "tail", words=changed(len(tail) - 1, 1)),
        _case("sum: one contributor too many", "phase-6", "tail", words=changed(contributors, len(play.survivors) + 1)),
        _case("sum: more weight than the cap allows", "phase-6", "tail", words=changed(0, len(play.survivors) * play.encoding.cap + 1)),
        _case("sum: a negative loss", "phase-6", "tail", words=changed(1, 2**32 - 1)),
        _case("sum: a spool's byte changed, which the zeros cannot see", "phase-6", "open", site="site-2", byte=5, xor=1),
        _case("sum: one upload missing", "phase-6", "open", site="site-2", missing=True),
    ]


def _map(values: dict[str, bytes]) -> bytes:
    return lp(*(part for name in sorted(values) for part in (name.encode(), values[name])))


def _terms(terms: Terms) -> dict[str, Any]:
    return {
        "run": terms.run.hex(),
        "round": terms.round,
        "kind": terms.kind.value,
        "attempt": terms.attempt,
        "invited": list(terms.invited),
        "f": terms.f,
        "n_min": terms.n_min,
        "keys": {name: key.hex() for name, key in terms.keys.items()},
        "base_digest": terms.base_digest.hex(),
        "encoding_digest": terms.encoding_digest.hex(),
        "bits": terms.bits,
        "length": terms.length,
    }


def _first(words: Words) -> dict[str, str]:
    return {str(start // CHUNK_WORDS): _hex(words[start : start + SHOWN_WORDS]) for start in range(0, len(words), CHUNK_WORDS)}


def _hex(words: Words) -> str:
    return words.astype(WORD).tobytes().hex()


def _current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    main()
