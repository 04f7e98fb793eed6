"""How the coordinator steps the global model along the mean update: arithmetic on blocks, nothing else.

Owns FedAvg, FedAvgM, FedAdam, FedYogi, the moving average (EMA) of the global weights, and the layout of the
optimiser's state as one vector. The mean update D is the negative pseudo-gradient (Reddi et al. 2021, section 2), so a
step adds along it. Must not know files, sums or sites.

Sources: McMahan et al. 2017 (FedAvg); Hsu, Qi and Brown 2019, arXiv 1909.06335 (FedAvgM); Reddi et al. 2021, arXiv
2003.00295, algorithm 2 (FedAdam, FedYogi: no bias correction, second moments from tau^2).
"""

from dataclasses import dataclass

import numpy as np

from cosilo_common.manifest import ServerOptimiserTerms
from cosilo_common.weights import TensorTable, Vector

STEPS_MAX = 1 << 24
"""Up to here float32 counts exactly, and the state's count is one of its words; far above a manifest's rounds."""

_MOMENTS = {"fedavg": "", "fedavgm": "m", "fedadam": "mv", "fedyogi": "mv"}
_EMA_WARM_UP = 10.0


@dataclass(frozen=True)
class ServerOptimiser:
    """One run's optimiser; its settings are the manifest's."""

    terms: ServerOptimiserTerms

    @property
    def moments(self) -> str:
        """The names of its moment vectors, in the order in which `step` takes them: "", "m" or "mv"."""
        return _MOMENTS[self.terms.kind]

    @property
    def initial_moments(self) -> tuple[float, ...]:
        """What every element of each moment is before the first step: 0 for m, tau^2 for v."""
        return tuple(0.0 if name == "m" else self.terms.tau**2 for name in self.moments)

    def step(self, mean: Vector, weights: Vector, moments: tuple[Vector, ...]) -> None:
        """Step one block in place; all arrays are float32 (n,), and `mean` is used up.

        FedAvg: x += lr D. FedAvgM: m = beta m + D; x += lr m. FedAdam: m = b1 m + (1 - b1) D; v = b2 v + (1 - b2) D^2;
        x += lr m / (sqrt(v) + tau). FedYogi: as FedAdam, but v -= (1 - b2) D^2 sign(v - D^2).
        """
        terms = self.terms
        if terms.kind == "fedavg":
            direction = mean
        elif terms.kind == "fedavgm":
            (direction,) = moments
            direction *= _f32(terms.momentum)
            direction += mean
        else:
            direction = self._adaptive_direction(mean, *moments)
        if terms.learning_rate != 1.0:
            direction = direction * _f32(terms.learning_rate)
        weights += direction

    def _adaptive_direction(self, mean: Vector, first: Vector, second: Vector) -> Vector:
        terms = self.terms
        first *= _f32(terms.momentum)
        first += _f32(1 - terms.momentum) * mean
        square = np.square(mean, out=mean)
        if terms.kind == "fedadam":
            second *= _f32(terms.beta2)
            second += _f32(1 - terms.beta2) * square
        else:
            sign = np.sign(second - square)
            sign *= square
            second -= _f32(1 - terms.beta2) * sign
        root: Vector = np.sqrt(second, out=square)
        root += _f32(terms.tau)
        return np.divide(first, root, out=root)


def state_table(table: TensorTable, moments: str) -> TensorTable:
    """The table of the optimiser's file: `count`, the steps made so far, then each moment in the order of the model's
    own table.

    So the state is one vector: count at 0, moment k of d elements from 1 + k d.
    """
    named = [(f"{moment}/{name}", shape) for moment in moments for name, shape in table.entries]
    return TensorTable((("count", ()), *named))


def ema_decay_at(decay: float, steps: int) -> float:
    """The decay of the step after `steps` steps: min(decay, (1 + n) / (10 + n)), n = steps.

    The warm-up (TensorFlow's ExponentialMovingAverage, num_updates) lets the average leave the untrained weights within
    a few rounds.
    """
    return min(decay, (1.0 + steps) / (_EMA_WARM_UP + steps))


def step_ema(average: Vector, weights: Vector, decay: float) -> None:
    """average += (1 - decay) (weights - average), in place; float32 (n,)."""
    difference = weights - average
    difference *= _f32(1.0 - decay)
    average += difference


def _f32(value: float) -> np.float32:
    return np.float32(value)
