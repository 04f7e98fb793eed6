"""The short form of `make simulate`: seeds whose whole life, faults and all, breaks no invariant, and which replay exactly."""

from __future__ import annotations

import os

import pytest

from tests.simulation.mutants import MUTANTS, try_one
from tests.simulation.scenario import scenario_of
from tests.simulation.world import simulate


@pytest.mark.parametrize("seed", [2, 4])
def test_a_federation_in_foul_weather_breaks_no_invariant(seed: int) -> None:
    report = simulate(scenario_of(seed))
    assert report.violation is None
    assert report.counts["rounds closed"] > 0
    assert sum(report.faults.values()) > 0


@pytest.mark.parametrize("name", ["a message is acknowledged before it is stored", "a quorum of consents is one fewer"])
def test_a_fault_put_into_the_program_is_found(name: str) -> None:
    """All of them: `python -m tests.simulation --mutants`."""
    [mutant] = [each for each in MUTANTS if each.name == name]
    verdict = try_one(mutant)
    assert verdict.caught, verdict.what


def test_a_seed_replays_exactly_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = simulate(scenario_of(8))
    monkeypatch.setattr(os, "getpid", lambda: 700)  # as in a machine that has just started: what is written of it is shorter
    second = simulate(scenario_of(8))
    assert (first.violation, second.violation) == (None, None)
    assert first.faults["writes torn"] > 0
    assert (first.trace_digest, first.events, first.counts) == (second.trace_digest, second.events, second.counts)
