"""What `make soak` calls growth: the arithmetic, on figures that are known."""

from __future__ import annotations

import pytest

from tests.system.soak import BOUNDS, MIB, Bound, Sample, growths, slope


def test_the_slope_is_that_of_all_lives_together() -> None:
    assert slope([[(0, 1.0), (10, 3.0)]]) == pytest.approx(0.2)
    assert slope([[(0, 5.0), (10, 5.0)], [(20, 90.0), (30, 90.0)]]) == 0.0  # a fresh start is no growth
    assert slope([[(0, 0.0), (10, 1.0)], [(20, 0.0), (30, 1.0)]]) == pytest.approx(0.1)
    assert slope([[(5, 7.0)]]) == 0.0


def test_growth_is_found_by_its_slope_in_the_second_half() -> None:
    assert BOUNDS["anonymous_bytes"] == Bound(2 * MIB, 6 * MIB)
    rounds = range(0, 301, 10)
    leak = [Sample("site", "anonymous_bytes", "1", n, 70 * MIB + n * MIB / 20) for n in rounds]  # 5 MiB per 100 rounds
    warm = [Sample("coordinator", "anonymous_bytes", "1", n, MIB * min(80.0, 60 + n / 5)) for n in rounds]  # grows, then stands
    files = [Sample("coordinator", "files", "1", n, 29 + n % 3) for n in rounds]
    found = {(growth.who, growth.what): growth for growth in growths([*leak, *warm, *files], 300)}
    assert not found["site", "anonymous_bytes"].ok
    assert found["site", "anonymous_bytes"].per_100_rounds == pytest.approx(5 * MIB)
    assert found["coordinator", "anonymous_bytes"].ok
    assert found["coordinator", "files"].ok
