"""What befalls a simulated federation: faults by name, and the people who ask things of it all the while.

Owns each fault and what becomes of an admin's call. Must not know when a fault strikes, nor what must hold afterwards.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy.exc import OperationalError

from cosilo_common.errors import CosiloError
from cosilo_common.secagg.messages import RoundKind
from tests.simulation.coordinator import CoordinatorParty
from tests.simulation.process import Process
from tests.simulation.scenario import kinds
from tests.simulation.site import SiteParty
from tests.simulation.world_shape import WorldShape

LOOK_S = 2.0
AWAY_S = 300.0


class Faults(WorldShape):
    """A world's faults: `_` and a fault's name in the scenario is its method."""

    # Faults: each says whether it struck

    async def _site_killed(self) -> bool:
        return self._kill(self._any_site(), powerless=False)

    async def _site_powered_off(self) -> bool:
        return self._kill(self._any_site(), powerless=True)

    async def _coordinator_killed(self) -> bool:
        return self._kill(self.coordinator, powerless=False)

    async def _coordinator_powered_off(self) -> bool:
        return self._kill(self.coordinator, powerless=True)

    async def _both_killed(self) -> bool:
        return self._kill(self._any_site(), powerless=self.random.random() < 0.5) and self._kill(self.coordinator, powerless=False)

    async def _site_stopped(self) -> bool:
        party = self._any_site()
        if party.process is None or not party.process.alive:
            return False
        await party.stop()
        return True

    async def _coordinator_stopped(self) -> bool:
        if not self.coordinator.up or self.coordinator.conductor is None:
            return False
        await self.coordinator.stop()
        return True

    async def _site_away(self) -> bool:
        party = self._any_site()
        self.away.add(party.name)
        self.loop.call_later(AWAY_S * self.random.random(), self.away.discard, party.name)
        return self._kill(party, powerless=False)

    async def _link_down(self) -> bool:
        self._cut_off(self._any_site().name)
        return True

    async def _links_down(self) -> bool:
        for name in self.sites:
            if self.random.random() < 0.7:
                self._cut_off(name)
        return True

    async def _link_slow(self) -> bool:
        link = self.network.link(self._any_site().name)
        link.slow_s = 3.0 * self.random.random()
        self.loop.call_later(60 * self.random.random(), setattr, link, "slow_s", 0.0)
        return True

    async def _connection_cut(self) -> bool:
        return self.network.cut_any(self._any_site().name)

    async def _site_unwilling(self) -> bool:
        party = self._any_site()
        party.policy = party.policy.model_copy(update={"hours": ()})
        return False

    async def _sites_disk_full(self) -> bool:
        return self._fill(self._any_site())

    async def _coordinators_disk_full(self) -> bool:
        return self._fill(self.coordinator)

    async def _cached_weights_rotten(self) -> bool:
        folder = self._any_site().root / "artifacts"
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not files:
            return False
        file = self.random.choice(files)
        data = bytearray(file.read_bytes())
        if not data:
            return False
        data[self.random.randrange(len(data))] ^= 1 + self.random.randrange(255)
        file.write_bytes(data)
        return True

    async def _rounds_ordered(self) -> bool:
        manifest = self.random.choice(self.scenario.manifests)
        await self._order(manifest.digest(), kinds(self.random), self.random.randint(1, 2))
        return True

    async def _run_stopped(self) -> bool:
        """An admin stops a run, and orders more of it later."""
        conductor, process = self.coordinator.conductor, self.coordinator.process
        if not self.coordinator.up or conductor is None or process is None:
            return False
        run = self.random.choice(self.scenario.manifests).digest()
        await self._asked(process, conductor.stop_run(run, self.random.random() < 0.6))
        return True

    async def _model_permitted(self) -> bool:
        self._person_permits()
        return True

    def _kill(self, party: CoordinatorParty | SiteParty, powerless: bool) -> bool:
        """Now, or at one of its next writes or sends."""
        process = party.process
        if process is None or not process.alive:
            return False
        if powerless:
            self._silent.add(process)
        if self.random.random() < 0.15:
            process.die()
        else:
            process.dies_soon(1 + int(80 * self.random.random() ** 2))
        return True

    def _cut_off(self, name: str) -> None:
        self.network.link_down(name)
        duration_s = self.random.choice((2.0, 15.0, 60.0, 150.0)) * self.random.random()
        self.loop.call_later(duration_s, self.network.link_up, name)

    def _fill(self, party: CoordinatorParty | SiteParty) -> bool:
        if party.disk.full:
            return False
        party.disk.full = True
        self.loop.call_later(25 * self.random.random(), setattr, party.disk, "full", False)
        return True

    def _any_site(self) -> SiteParty:
        return self.random.choice(list(self.sites.values()))

    # People

    async def _order(self, run: bytes, kind: RoundKind, rounds: int) -> None:
        """An admin orders rounds, and tries again until the coordinator says that it has them."""
        while True:
            conductor, process = self.coordinator.conductor, self.coordinator.process
            if self.coordinator.up and conductor is not None and process is not None and process.alive:
                if await self._asked(process, conductor.order(run, kind, rounds)):
                    return
            await asyncio.sleep(LOOK_S)

    async def _asked(self, process: Process, question: Any) -> bool:
        """One call of an admin's, which may lose its connection while it is served; whether it was answered."""
        call = process.start(question, name="admin")
        if self.random.random() < 0.3 and not self.calm:
            self.loop.call_later(self.random.random() * 0.02, call.cancel)
        await asyncio.wait({call})
        if call.cancelled() or not process.alive:
            return False
        error = call.exception()
        if isinstance(error, CosiloError):
            self.trace(f"refused to an admin: {error}")
        elif isinstance(error, OperationalError) and process.disk.full:
            self.faults["calls failed by a full disk"] += 1
        elif error is not None:
            self.watch.fail("handler", f"an admin's call raised {error!r}")
        return error is None

    def _person_permits(self) -> None:
        """At each site where R8 stands against the newest base model, a person looks at it and says yes."""
        store = self.coordinator.store
        if store is None:
            return
        for party in self.sites.values():
            for manifest in party.manifests:
                newest = store.newest_checkpoint(manifest.digest())
                if newest is not None:
                    party.permit(newest.weights)
