"""From an order to a round as it begins, or to why it cannot begin yet.

Owns what a round needs: sites that are connected, room on the disk, a number, an encoding, the checkpoint that it starts from. Must not know
when it is asked, nor write what it makes down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cosilo_common.canonical import sha256
from cosilo_common.clip_ranges import round_encoding
from cosilo_common.manifest import Participant
from cosilo_common.secagg.messages import RoundKind
from cosilo_server.closing import RoundOutcome
from cosilo_server.live_run import LiveRun
from cosilo_server.rounds.machine import begin
from cosilo_server.rounds.state import Round
from cosilo_server.spool import Spool
from cosilo_server.store import Store, terms_of

_FLOAT_BYTES = 4
_CHECKPOINT_FILES = 5  # weights, the step to them, ema and two moments at most


class RoundStarter:
    """Makes the first states of rounds. now: UTC seconds."""

    def __init__(self, store: Store, spool: Spool, now: Callable[[], float]) -> None:
        self._store = store
        self._spool = spool
        self._now = now

    async def next_round(
        self, record: LiveRun, kind: RoundKind, connected: set[str], may_come: Callable[[Participant], bool]
    ) -> Round | None:
        """The run's next round as it begins; None where it cannot yet, and the run's note says why.

        connected: sites; may_come: whether a participant is a member still. Raises CosiloError where the disk has no room.
        """
        terms = terms_of(record.manifest)
        present = connected & set(terms.participants)
        if len(present) < terms.least_invited:
            record.note = f"waiting: {len(present)} of the {terms.least_invited} sites that a round needs are connected"
            return None
        encoding = round_encoding(record.manifest, kind, await self._tensor_peaks(record))
        upload_bytes, model_bytes = encoding.wire_bytes, _FLOAT_BYTES * record.manifest.tensor_table.size
        self._spool.require_room(len(present) * upload_bytes + _FLOAT_BYTES * encoding.length + _CHECKPOINT_FILES * model_bytes)
        number = record.floor + 1
        if number > record.manifest.rounds_max:
            record.note = f"the manifest's {record.manifest.rounds_max} rounds are spent"
            return None
        base = await asyncio.to_thread(self._store.newest_checkpoint, record.run)
        assert base is not None  # a run is stored together with its untrained checkpoint
        state, effects = begin(
            run=record.run,
            number=number,
            kind=kind,
            terms=terms,
            base_digest=base.weights,
            base_bytes=base.bytes,
            encoding=encoding.canonical(),
            seed=sha256(bytes.fromhex(record.manifest.nonce) + number.to_bytes(8, "big")),
            connected=present,
            now=self._now(),
            gone=[p.name for p in record.manifest.participants if not may_come(p)],
            step=base.step,
        )
        assert not effects or state.ended
        return state

    async def _tensor_peaks(self, record: LiveRun) -> tuple[float, ...]:
        """What the run's last closed training round moved in each tensor, at most; none before it, and at b = 32."""
        outcome = await asyncio.to_thread(self._store.last_training_outcome, record.run)
        return RoundOutcome.from_json(outcome).tensor_peaks if outcome else ()
