"""A coordinator that lies to single sites: what is on the wire is not what the round is.

Owns the lies, which are made on the way out, so that the real coordinator behind them stays honest and every rule that a site keeps
(R1 to R8) can be watched on what the site sends in return. A round may fail of a lie; what a site contributed may not come out of one.
Must not know what sites make of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from cosilo_common.rpc.v1 import site_pb2
from tests.simulation.watch import ATTEND

REMEMBERED = 40  # assignments that may be told again

_KNOWN = (site_pb2.ROUND_PHASE_CONSENTING, site_pb2.ROUND_PHASE_REVEALING)


class Liar:
    """Twists some of the assignments that leave the coordinator. share: of them."""

    def __init__(self, random: Random, share: float) -> None:
        self.faults: Counter[str] = Counter()
        self._random = random
        self._share = share
        self._told: list[site_pb2.Assignment] = []
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
        ]

    def twist(self, site: str, method: str, data: bytes) -> bytes:
        """What the site is told instead."""
        if method != ATTEND:
            return data
        response = site_pb2.AttendResponse.FromString(data)
        for owed in response.owed:
            self._told = [*self._told[-REMEMBERED:], site_pb2.Assignment.FromString(owed.SerializeToString())]
            if self._random.random() < self._share:
                self._lie(owed)
        return response.SerializeToString()

    def _lie(self, owed: site_pb2.Assignment) -> None:
        if self._random.random() < 0.2:
            self.faults["lies: an old assignment"] += 1
            owed.CopyFrom(self._random.choice(self._told))
            return
        lie = self._random.choice(self._lies)
        before = owed.SerializeToString()
        lie(owed)
        if owed.SerializeToString() != before:
            owed.delivered = False
            self.faults[f"lies: {lie.__name__.strip('_').replace('_', ' ')}"] += 1

    def _other_survivors(self, owed: site_pb2.Assignment) -> None:
        if owed.phase in _KNOWN and owed.survivors:
            owed.phase = site_pb2.ROUND_PHASE_CONSENTING
            del owed.survivors[self._random.randrange(len(owed.survivors))]

    def _fewer_invited(self, owed: site_pb2.Assignment) -> None:
        keep = self._random.randint(1, max(1, len(owed.invited_sites)))
        names = sorted(self._random.sample(list(owed.invited_sites), keep)) if owed.invited_sites else []
        owed.invited_sites[:] = names

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

    def _fewer_consents(self, owed: site_pb2.Assignment) -> None:
        if owed.consents:
            owed.consents.append(owed.consents[0])
            del owed.consents[0 : len(owed.consents) // 2]
