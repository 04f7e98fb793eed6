"""What the parts of a simulated world know of each other: its parties, its weather and its trace.

Owns these names. Must not know what any part does with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from random import Random

from tests.simulation.clock import SimulatedLoop
from tests.simulation.coordinator import CoordinatorParty
from tests.simulation.network import Network
from tests.simulation.process import Process
from tests.simulation.scenario import Scenario
from tests.simulation.site import SiteParty
from tests.simulation.watch import Watch


class WorldShape(ABC):
    """One scenario's federation. calm: no faults any more; away: sites that nobody starts again for now; _silent: died without a word."""

    scenario: Scenario
    random: Random
    loop: SimulatedLoop
    network: Network
    watch: Watch
    coordinator: CoordinatorParty
    sites: dict[str, SiteParty]
    faults: Counter[str]
    calm: bool
    away: set[str]
    _silent: set[Process]

    @abstractmethod
    def trace(self, line: str) -> None:
        """One line of what happened."""
