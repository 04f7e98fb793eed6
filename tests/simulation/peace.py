"""What must be so of a simulated federation when the weather has been fair for a while: all that was ordered is done, and nothing is left behind.

Owns the checks that need peace. Must not know the faults, nor the rules on messages.
"""

from __future__ import annotations

from cosilo_client.ledger import RoundState
from cosilo_common.secagg.messages import RoundKind
from tests.simulation.process import Process
from tests.simulation.world_shape import WorldShape


class PeaceChecks(WorldShape):
    """A world's checks on every party, its store, ledger, disk and descriptors."""

    # What peace must bring

    def _left_to_do(self) -> dict[str, int]:
        store = self.coordinator.store
        if store is None or not self.coordinator.up:
            return {"coordinator": 1}
        left = {}
        for manifest in self.scenario.manifests:
            order = store.open_order(manifest.digest())
            state = self.coordinator.conductor.round(manifest.digest()) if self.coordinator.conductor else None
            if order is not None or (state is not None and not state.ended):
                left[manifest.name] = order.wanted - order.closed if order is not None else 1
        return left

    def _notes(self) -> str:
        conductor = self.coordinator.conductor
        if conductor is None:
            return "the coordinator is down"
        return "; ".join(conductor.note(m.digest()) or "no note" for m in self.scenario.manifests)

    def _check_nothing_left(self) -> None:
        """No spool, no secret, no unmasked update, no message outlives its round; no descriptor its use (R7)."""
        self._check_coordinator()
        for party in self.sites.values():
            journal = party.journal
            if journal is None or party.process is None:
                self.watch.fail("progress", f"{party.name} is down in peace")
                continue
            open_rounds = {entry.run for entry in journal.ledger.open_rounds()}
            for manifest in party.manifests:
                last = journal.ledger.last_round(manifest.digest())
                real = last is not None and last.round <= self._newest(manifest.digest())  # above it stands only a liar's round
                if last is not None and real and last.state is RoundState.OPEN:
                    self.watch.fail("R7", f"{party.name} still holds round {last.round} open")
            left = [path.name for path in (party.root / "rounds").iterdir() if bytes.fromhex(path.name) not in open_rounds]
            if left:
                self.watch.fail("R7", f"{party.name} keeps files of rounds that are over: {left}")
            with journal._engine.connect() as connection:
                runs = connection.exec_driver_sql("SELECT run FROM sealed_secrets").scalars().all()
            sealed = sum(bytes(run) not in open_rounds for run in runs)  # an open round that is left is a liar's: see above
            if sealed:
                self.watch.fail("R7", f"{party.name} keeps {sealed} sealed secrets of rounds that are over")
            self._check_descriptors(party.process, allowed=("journal.lock",))

    def _newest(self, run: bytes) -> int:
        state = self.coordinator.conductor.round(run) if self.coordinator.conductor else None
        return state.number if state else 0

    def _check_coordinator(self) -> None:
        party = self.coordinator
        assert party.store is not None
        assert party.process is not None
        spools = [str(path.relative_to(party.root)) for path in party.root.glob("spool/*/*")]
        if spools:
            self.watch.fail("leak", f"the coordinator keeps spools of rounds that are over: {spools[:3]}")
        with party.store.engine.connect() as connection:
            messages = connection.exec_driver_sql("SELECT count(*) FROM messages").scalar_one()
        if messages:
            self.watch.fail("leak", f"the store keeps {messages} messages of rounds that are over")
        if list((party.root / "artifacts" / "scratch").iterdir()):
            self.watch.fail("leak", "scratch files are left among the artifacts")
        self._check_descriptors(party.process, allowed=())
        self._check_checkpoints()

    def _check_checkpoints(self) -> None:
        """Every closed training round made one checkpoint, and nothing else did."""
        store = self.coordinator.store
        assert store is not None
        for manifest in self.scenario.manifests:
            run = manifest.digest()
            closed = [r.state for r in store.rounds(run) if r.state.phase == "closed" and r.state.kind is RoundKind.TRAIN]
            made = store.checkpoints(run)
            if [c.round for c in made] != [0, *(state.number for state in closed)]:
                self.watch.fail("counted", f"checkpoints of rounds {[c.round for c in made]}, closed {[s.number for s in closed]}")
            for state, base, checkpoint in zip(closed, made, made[1:], strict=False):
                if (state.base_digest, state.checkpoint) != (base.weights, checkpoint.weights):
                    self.watch.fail("counted", f"round {state.number} did not step from the checkpoint before it")

    def _check_descriptors(self, process: Process, allowed: tuple[str, ...]) -> None:
        left = [name for name in process.files.values() if not name.endswith(allowed or ("/nothing",))]
        if left:
            self.watch.fail("leak", f"{process.name} has {len(left)} files open in peace: {left[:3]}")
