"""A federation in memory: real journals in folders, real site roles, the coordinator's real half; only the network is left out.

`Coordinator` is honest and drives the phases; tests that attack call the sites' roles themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from cosilo_client.journal import Journal, TrainedUpdate
from cosilo_client.ledger import RoundState
from cosilo_client.masking import write_spool
from cosilo_client.secagg import RunTerms, SiteRole, Start
from cosilo_common.canonical import sha256
from cosilo_common.encoding import Encoding, OpenedTail, Section
from cosilo_common.manifest import EncodingTerms
from cosilo_common.secagg.keys import InsecureFakeRandom, Secret
from cosilo_common.secagg.messages import Reveal, RoundKind, Shares, Signed, Upload
from cosilo_common.secagg.roster import Roster, Terms
from cosilo_common.secagg.violation import ProtocolViolation
from cosilo_server.rounds import machine, state
from cosilo_server.secagg import (
    SumOpening,
    reconstruct,
    verify_advert,
    verify_complaint,
    verify_consent,
    verify_reveal,
    verify_shares,
    verify_upload,
)

RUN = sha256(b"the manifest")
BASE = sha256(b"the base model")
CLIP = 1.0
CAP = 64


def names(count: int) -> tuple[str, ...]:
    """site-01, site-02, ..."""
    return tuple(f"site-{i:02d}" for i in range(1, count + 1))


def barred_by(complaints: Iterable[tuple[str, str]], f: int) -> frozenset[str]:
    """Whom the coordinator's round machine leaves out of the next attempt. complaints: (complainer, dealer)."""
    pairs = list(complaints)
    sites = {name: state.Site(complaints=tuple(dealer for who, dealer in pairs if who == name)) for pair in pairs for name in pair}
    terms = state.Terms(tuple(sorted(sites)), True, 3, f, 0, state.Deadlines(1, 1, 1, 1, 1, 1))
    return machine.barred(state.Round(RUN, 1, RoundKind.TRAIN, terms, BASE, 0, b"", bytes(32), 0.0, sites=sites))


def signing_key(name: str) -> Ed25519PrivateKey:
    """The same key for the same name."""
    return Ed25519PrivateKey.from_private_bytes(sha256(f"signing key of {name}".encode()))


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


class RecordingRandom(InsecureFakeRandom):
    """Deterministic bytes, and a list of all that were given out: what a search for secrets looks for."""

    def __init__(self, seed: int | str) -> None:
        super().__init__(seed)
        self.given: list[bytes] = []

    def token_bytes(self, n: int) -> bytes:
        data = super().token_bytes(n)
        self.given.append(data)
        return data


def make_encoding(participants: int, values: int, bits: int = 32, losses: int = 2) -> Encoding:
    sections = (Section(values, CLIP),) if values else ()
    return Encoding(bits, participants, CAP, sections, 16.0, losses)


def make_terms(sites: Sequence[str], values: int, *, bits: int = 32, f: int | None = None, **changes: object) -> RunTerms:
    """A run of these sites. f: the default policy's least, unless given."""
    fields: dict[str, object] = {
        "run": RUN,
        "participants": {name: public_bytes(signing_key(name)) for name in sites},
        "n_min": 3,
        "f": max(1, len(sites) // 3) if f is None else f,
        "rounds_max": 100,
        "max_rounds_per_model": 2,
        "encoding": EncodingTerms(bits=24 if bits == 24 else 32, clip=CLIP, cap=CAP, loss_max=16.0),
        "values": values,
        "losses": 2,
    }
    return RunTerms(**{**fields, **changes})  # type: ignore[arg-type]  # a test's table of fields


def make_start(
    terms: RunTerms,
    round_: int = 1,
    *,
    kind: RoundKind = RoundKind.TRAIN,
    invited: Iterable[str] | None = None,
    base_digest: bytes = BASE,
) -> Start:
    encoding = make_encoding(
        len(terms.participants),
        0 if kind is RoundKind.STATISTICS else terms.values,
        terms.encoding.bits,
        terms.losses,
    )
    everybody = tuple(sorted(terms.participants if invited is None else invited))
    return Start(round_, kind, everybody, base_digest, encoding, encoding.digest())


class Site:
    """One site: a folder, a key, and a role that can be killed and built anew at any moment."""

    def __init__(self, folder: Path, name: str, terms: RunTerms) -> None:
        self.folder = folder
        self.name = name
        self.terms = terms
        self.key = signing_key(name)
        self.random = RecordingRandom(name)
        self.start: Start | None = None
        self.journal = self._open()
        self.journal.ledger.accept(
            terms.run,
            b"the manifest",
            b"its signature",
            terms.participants,
            accepted_at="2026-03-01T00:00:00Z",
            accepted_by="person",
        )
        self.role = self._role()

    def begin(self, start: Start) -> None:
        self.role.begin(start)
        self.start = start

    def train(self, values: NDArray[np.float32], weight: int, losses: tuple[float, ...] = (1.0, 2.0)) -> None:
        """What the trainer leaves: an update file with 16 bytes of header before the vector."""
        assert self.start is not None
        self.journal.files(self.terms.run).update.write_bytes(b"16 header bytes!" + values.astype("<f4").tobytes())
        self.journal.trained(self.terms.run, TrainedUpdate(self.start.round, 16, weight, losses))

    def restart(self) -> None:
        """Killed, and started again from what is on the disk."""
        self.journal.close()
        self.journal = self._open()
        self.role = self._role()
        if self.start is not None:
            entry = self.journal.ledger.round(self.terms.run, self.start.round)
            if entry is None or entry.state is RoundState.OPEN:
                self.role.begin(self.start)

    def close(self) -> None:
        self.journal.close()

    def spool_bytes(self, attempt: int = 1) -> bytes:
        return self.journal.files(self.terms.run).spool(attempt).read_bytes()

    def plain_words(self, attempt: int = 1) -> NDArray[np.uint32]:
        """The integers that this site is about to mask; to be asked before it masks."""
        assert self.start is not None
        entry = self.journal.ledger.round(self.terms.run, self.start.round)
        assert entry is not None
        rounding = self.journal.vault.get(self.terms.run, self.start.round, attempt, "rounding")
        assert rounding is not None
        path = self.folder / "oracle"
        write_spool(path, self.start.encoding, (), self.role._vector(entry), Secret(rounding))
        words = unpack(path.read_bytes(), self.start.encoding.bits)
        path.unlink()
        return words

    def _open(self) -> Journal:
        return Journal.open(self.folder, site_key=public_bytes(self.key), randomness=self.random)

    def _role(self) -> SiteRole:
        return SiteRole(self.terms, self.name, self.key, self.journal, self.random)


def unpack(data: bytes, bits: int) -> NDArray[np.uint32]:
    """Wire bytes as words, written without the library's own unpacking."""
    if bits == 32:
        return np.frombuffer(data, dtype="<u4")
    triples = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3).astype(np.uint32)
    words: NDArray[np.uint32] = triples[:, 0] | (triples[:, 1] << 8) | (triples[:, 2] << 16)
    return words


@dataclass
class Opened:
    """What the honest coordinator has at the end: the words of the sum, its tail, and who is in it."""

    survivors: tuple[str, ...]
    words: NDArray[np.uint32]
    tail: OpenedTail


class Abandoned(Exception):
    """The round ended without a sum. reason: which phase fell short."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Phases = ("advert", "shares", "upload", "consent", "reveal")


@dataclass
class Coordinator:
    """The honest one. drops: the phase in which a site stops answering; before: called with (site, phase) before each call."""

    terms: RunTerms
    start: Start
    sites: Mapping[str, Site]
    drops: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[Site, str], None] = lambda site, phase: None
    plain: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    attempt: int = 0
    roster: Roster | None = None

    def run(self) -> Opened:
        """Every phase, with new attempts where a site of U1 does not share."""
        candidates = list(self.start.invited)
        while True:
            self.attempt += 1
            terms = self.round_terms(self.attempt)
            adverts = [message for message in self.ask("advert", candidates, self._advert) if message]
            for advert in adverts:
                verify_advert(advert, terms)
            if len(adverts) < terms.quorum:
                raise Abandoned("phase-2")
            roster = self.roster = Roster.open(terms, adverts)
            shares = [message for message in self.ask("shares", roster.members, self._share) if message]
            if len(shares) < len(roster.members):
                candidates = [message.site for message in shares]
                continue
            bodies = {message.site: verify_shares(message, roster) for message in shares}
            complaints = [message for message in self.ask("deliver", roster.members, self._deliver(shares)) if message]
            if complaints:
                pairs = [(message.site, verify_complaint(message, roster).dealer) for message in complaints]
                candidates = [name for name in roster.members if name not in barred_by(pairs, terms.f)]
                continue
            return self._finish(roster, bodies)

    def _finish(self, roster: Roster, shares: Mapping[str, Shares]) -> Opened:
        statements = [message for message in self.ask("upload", roster.members, self._upload) if message]
        uploads: dict[str, Upload] = {message.site: verify_upload(message, roster) for message in statements}
        survivors = tuple(sorted(uploads))
        if len(survivors) < roster.terms.quorum:
            raise Abandoned("phase-5")
        consents = [m for m in self.ask("consent", roster.members, lambda site: site.role.consent(survivors)) if m]
        for message in consents:
            verify_consent(message, roster, survivors)
        if len(consents) < roster.terms.threshold:
            raise Abandoned("phase-5")
        asked = [message.site for message in consents]
        answers = [m for m in self.ask("reveal", asked, lambda site: site.role.reveal(consents)) if m]
        reveals: dict[str, Reveal] = {m.site: verify_reveal(m, roster, survivors, shares) for m in answers}
        if len(reveals) < roster.terms.threshold:
            raise Abandoned("phase-6")
        keys = reconstruct(roster, survivors, shares, reveals)
        spools = {name: self.sites[name].spool_bytes(self.attempt) for name in survivors}
        return open_sum(self.start.encoding, spools, {n: u.digest for n, u in uploads.items()}, keys.masks)

    def round_terms(self, attempt: int) -> Terms:
        start = self.start
        return Terms(
            run=self.terms.run,
            round=start.round,
            kind=start.kind,
            attempt=attempt,
            invited=start.invited,
            f=self.terms.f,
            n_min=self.terms.n_min,
            keys=self.terms.participants,
            base_digest=start.base_digest,
            encoding_digest=start.encoding_digest,
            bits=start.encoding.bits,
            length=start.encoding.length,
            secure=self.terms.secure,
        )

    def ask(self, phase: str, asked: Iterable[str], call: Callable[[Site], Signed | None]) -> list[Signed | None]:
        """The answers of those who still answer. A site that drops in a phase answers none from there on."""
        answers = []
        order = [*Phases[:2], "deliver", *Phases[2:]]
        for name in asked:
            drop = self.drops.get(name)
            if drop is not None and order.index(drop) <= order.index(phase):
                continue
            self.before(self.sites[name], phase)
            if phase == "upload":
                self.plain[name] = self.sites[name].plain_words(self.attempt)
            answers.append(call(self.sites[name]))
        return answers

    def _advert(self, site: Site) -> Signed:
        return site.role.advert(self.attempt)

    def _share(self, site: Site) -> Signed:
        assert self.roster is not None
        return site.role.roster(list(self.roster.adverts.values()))

    @staticmethod
    def _deliver(shares: list[Signed]) -> Callable[[Site], Signed | None]:
        return lambda site: site.role.deliver(shares)

    @staticmethod
    def _upload(site: Site) -> Signed:
        return site.role.mask_chunks()


def open_sum(encoding: Encoding, spools: Mapping[str, bytes], digests: Mapping[str, bytes], masks: Sequence[object] = ()) -> Opened:
    """The coordinator's opening of spools held in memory."""

    def source(data: bytes) -> Callable[[int, memoryview], None]:
        def read(offset: int, out: memoryview) -> None:
            out[:] = data[offset : offset + len(out)]

        return read

    opening = SumOpening(
        encoding,
        {name: source(data) for name, data in spools.items()},
        {name: digests[name] for name in spools},
        masks,  # type: ignore[arg-type]  # SignedMask; not named here, so that plain callers pass nothing
        workers=1,
    )
    words = np.zeros(encoding.size, dtype=np.uint32)
    for start, part in opening:
        words[start : start + len(part)] = part
    return Opened(tuple(sorted(spools)), words, opening.tail)


def federation(
    folder: Path, terms: RunTerms, start: Start, updates: Mapping[str, tuple[NDArray[np.float32], int]] | None = None
) -> dict[str, Site]:
    """Every invited site, begun, and trained with these (values, weight)."""
    sites = {name: Site(folder / name, name, terms) for name in start.invited}
    for i, site in enumerate(sites.values()):
        site.begin(start)
        if start.kind is RoundKind.TRAIN:
            values, weight = (updates or {}).get(site.name, some_update(terms.values, i))
            site.train(values, weight)
    return sites


def some_update(values: int, seed: int) -> tuple[NDArray[np.float32], int]:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.4, values).astype(np.float32), int(generator.integers(1, CAP + 1))


def close_all(sites: Mapping[str, Site], outcome: RoundState = RoundState.CLOSED, reason: str = "") -> None:
    for site in sites.values():
        site.role.close(outcome, reason)


def refused(call: Callable[[], object]) -> ProtocolViolation:
    """The violation that a call raises."""
    try:
        call()
    except ProtocolViolation as violation:
        return violation
    raise AssertionError("nothing was refused")
