"""The short form of `make simulate`: seeds whose whole life, faults and all, breaks no invariant, and which replay exactly."""

from __future__ import annotations

import pytest

from tests.simulation.scenario import calm, scenario_of
from tests.simulation.world import simulate


@pytest.mark.parametrize("seed", [1, 2])
def test_a_federation_in_foul_weather_breaks_no_invariant(seed: int) -> None:
    report = simulate(scenario_of(seed))
    assert report.violation is None
    assert report.counts["rounds closed"] > 0
    assert sum(report.faults.values()) > 0


def test_a_seed_replays_exactly() -> None:
    first, second = simulate(calm(1)), simulate(calm(1))
    assert first.violation is None
    assert (first.trace_digest, first.events, first.counts) == (second.trace_digest, second.events, second.counts)
