"""How long to wait before trying again. Must not know what is tried."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Waits between attempts: drawn from the upper half of a bound that doubles from min_s to max_s.

    Jittered, so that a hundred sites do not come back to a restarted coordinator in one second.
    """

    min_s: float
    max_s: float
    random: random.Random

    def wait_s(self, failures: int) -> float:
        """After so many failures in a row, from 1."""
        bound = min(self.max_s, self.min_s * 2.0 ** min(failures - 1, 40))
        return self.random.uniform(bound / 2, bound)
