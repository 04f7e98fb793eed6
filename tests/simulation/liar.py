"""A coordinator that lies to single sites, and sites that lie to their peers: what is on the wire is not what the round is.

Owns the lies, which are made on the way out, so that the real coordinator behind them stays honest and every rule that a site keeps
(R1 to R8) can be watched on what the site sends in return; and what some sites deal and say of one another. A round may fail of
either; what a site contributed may not come out of one, and no sum may be wrong. Must not know what others make of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import cosilo_client.secagg
from cosilo_common.rpc.v1 import site_pb2
from cosilo_common.secagg.dealing import DealtShares, deal
from cosilo_common.secagg.messages import Complaint, ComplaintCode, MessageType, Shares, Signed, sign
from cosilo_server.rounds.state import Phase, Round
from tests.simulation.site import signing_key
from tests.simulation.watch import ATTEND

REMEMBERED = 40  # assignments that may be told again
LIES_TRIED = 3  # until one fits the phase

LATE = 3.0  # who has bided its time lies more: fewer assignments are left

_TO_LIE_IN = (
    site_pb2.ROUND_PHASE_TRAINING,
    site_pb2.ROUND_PHASE_TRAINING,
    site_pb2.ROUND_PHASE_SHARING,
    site_pb2.ROUND_PHASE_UPLOADING,
    site_pb2.ROUND_PHASE_CONSENTING,
    site_pb2.ROUND_PHASE_REVEALING,
)
_KNOWN = (site_pb2.ROUND_PHASE_CONSENTING, site_pb2.ROUND_PHASE_REVEALING)


class Liar:
    """Twists some of the assignments that leave the coordinator. share: of them.

    In each round it is honest up to a phase of its own: a round that is ruined as it begins shows nothing of what a lie does later.
    """

    def __init__(self, random: Random, share: float) -> None:
        self.faults: Counter[str] = Counter()
        self._random = random
        self._share = share
        self._told: list[site_pb2.Assignment] = []
        self._to = ""
        self._honest_until: dict[tuple[bytes, int], int] = {}
        self._lies: list[Callable[[site_pb2.Assignment], None]] = [
            self._other_survivors,
            self._other_survivors,
            self._fewer_invited,
            self._other_roster,
            self._other_model,
            self._another_attempt,
            self._another_phase,
            self._next_round,
            self._other_kind,
            self._fewer_consents,
            self._upload_after_all,
            self._upload_after_all,
            self._other_model_in_another_attempt,
        ]

    def twist(self, site: str, method: str, data: bytes) -> bytes:
        """What the site is told instead."""
        if method != ATTEND:
            return data
        response = site_pb2.AttendResponse.FromString(data)
        for owed in response.owed:
            self._told = [*self._told[-REMEMBERED:], site_pb2.Assignment.FromString(owed.SerializeToString())]
            first = self._honest_until.setdefault((owed.run, owed.round), self._random.choice(_TO_LIE_IN))
            if owed.phase >= first and self._random.random() < LATE * self._share:
                self._lie(site, owed)
        return response.SerializeToString()

    def _lie(self, site: str, owed: site_pb2.Assignment) -> None:
        if self._random.random() < 0.2:
            self.faults["lies: an old assignment"] += 1
            owed.CopyFrom(self._random.choice(self._told))
            owed.delivered = False
            return
        if owed.delivered and (owed.phase == site_pb2.ROUND_PHASE_REVEALING or self._random.random() < 0.5):
            self.faults["lies: asked again"] += 1
            owed.delivered = False
            return
        self._to = site
        before = owed.SerializeToString()
        for lie in self._random.sample(self._lies, LIES_TRIED):
            lie(owed)
            if owed.SerializeToString() != before:
                owed.delivered = False
                self.faults[f"lies: {lie.__name__.strip('_').replace('_', ' ')}"] += 1
                return

    def _other_survivors(self, owed: site_pb2.Assignment) -> None:
        if owed.phase in _KNOWN and owed.survivors:
            owed.phase = site_pb2.ROUND_PHASE_CONSENTING
            del owed.survivors[self._random.randrange(len(owed.survivors))]

    def _fewer_invited(self, owed: site_pb2.Assignment) -> None:
        others = [name for name in owed.invited_sites if name != self._to]
        if len(others) < len(owed.invited_sites):
            owed.invited_sites[:] = sorted([self._to, *self._random.sample(others, self._random.randint(0, len(others)))])

    def _other_roster(self, owed: site_pb2.Assignment) -> None:
        if owed.roster:
            del owed.roster[self._random.randrange(len(owed.roster))]
            owed.phase = site_pb2.ROUND_PHASE_SHARING

    def _other_model(self, owed: site_pb2.Assignment) -> None:
        owed.base_digest = self._random.choice(self._told).base_digest

    def _another_attempt(self, owed: site_pb2.Assignment) -> None:
        owed.attempt = self._random.randint(1, 5)
        owed.phase = site_pb2.ROUND_PHASE_TRAINING

    def _another_phase(self, owed: site_pb2.Assignment) -> None:
        owed.phase = self._random.choice(site_pb2.RoundPhase.values()[1:])

    def _next_round(self, owed: site_pb2.Assignment) -> None:
        owed.round += 1
        owed.phase = site_pb2.ROUND_PHASE_TRAINING

    def _other_kind(self, owed: site_pb2.Assignment) -> None:
        owed.kind = self._random.choice(site_pb2.RoundKind.values()[1:])

    def _upload_after_all(self, owed: site_pb2.Assignment) -> None:
        """The round has its survivors, and a site that came too late for that is asked for its upload."""
        if owed.phase not in (*_KNOWN, site_pb2.ROUND_PHASE_OPENING):
            return
        for told in reversed(self._told):
            same = (told.run, told.round, told.attempt) == (owed.run, owed.round, owed.attempt)
            if same and told.phase == site_pb2.ROUND_PHASE_UPLOADING:
                owed.CopyFrom(told)
                owed.invited = True
                return

    def _other_model_in_another_attempt(self, owed: site_pb2.Assignment) -> None:
        owed.base_digest = self._random.randbytes(len(owed.base_digest))
        owed.attempt += 1
        owed.phase = site_pb2.ROUND_PHASE_TRAINING

    def _fewer_consents(self, owed: site_pb2.Assignment) -> None:
        if owed.consents:
            owed.consents.append(owed.consents[0])
            del owed.consents[0 : len(owed.consents) // 2]


class BadPeers:
    """Sites that deal a peer wrong shares, or complain of one that dealt right. share: of the chances; striking: whether they do so now."""

    def __init__(self, random: Random, share: float, striking: Callable[[], bool]) -> None:
        self.faults: Counter[str] = Counter()
        self._random = random
        self._share = share
        self._striking = striking

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Where they stand in the site role: (module, name, what stands there)."""
        return [(cosilo_client.secagg, "deal", self._deal)] if self._share else []

    def accusation(self, state: Round | None) -> Signed | None:
        """A complaint without cause, while others upload."""
        if state is None or state.phase is not Phase.UPLOADING or not self._strikes("complaints without cause"):
            return None
        accuser, dealer = self._random.sample(state.roster, 2)
        body = Complaint(dealer, ComplaintCode.SHARE)
        return sign(signing_key(accuser), MessageType.COMPLAINT, state.run, state.number, state.attempt, accuser, body)

    def _deal(self, *arguments: Any) -> tuple[Shares, DealtShares]:
        body, kept = deal(*arguments)
        if not body.ciphertexts or not self._strikes("wrong shares dealt"):
            return body, kept
        peer = self._random.choice(sorted(body.ciphertexts))
        sealed = body.ciphertexts[peer]
        return replace(body, ciphertexts={**body.ciphertexts, peer: sealed[:-1] + bytes([sealed[-1] ^ 1])}), kept

    def _strikes(self, fault: str) -> bool:
        if not self._share or not self._striking() or self._random.random() >= self._share:
            return False
        self.faults[fault] += 1
        return True
