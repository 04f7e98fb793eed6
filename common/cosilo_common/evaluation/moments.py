"""First and second moments of a set's features as one float32 vector, which sites can sum under the masks.

Owns the packing and what the pooled Gaussian is. Must not know networks, masks or rounds. A site's vector is an ordinary update: values
that the encoding weighs by W, the number of images. The opened weighted mean is then the pooled set's own moments, exactly but for
rounding, and nobody's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cosilo_common.evaluation.distances import Gaussian
from cosilo_common.manifest import FEATURES_MAX
from cosilo_common.weights import TensorTable, open_vector, read_header

_COUNT, _FIRST, _SECOND = "count", "mean", "second_moment"  # the artifact's tensors; sorted, and so the vector lies behind the count


@dataclass(frozen=True)
class Moments:
    """Of n rows f (n, d): count = n; first = E f, (d,); second = E f f^T in its upper triangle, row by row, (d (d + 1) / 2,); float64."""

    count: int
    first: NDArray[np.float64]
    second: NDArray[np.float64]

    @classmethod
    def of(cls, rows: NDArray[np.floating]) -> Self:
        """The moments of rows (n, d), n >= 1."""
        if rows.ndim != 2 or not len(rows) or not 1 <= rows.shape[1] <= FEATURES_MAX:
            raise ValueError(f"{rows.shape}: one row or more, of 1 to {FEATURES_MAX} features, is needed")
        wide = rows.astype(np.float64)
        product = wide.T @ wide / len(wide)
        return cls(len(wide), wide.mean(axis=0), product[np.triu_indices(wide.shape[1])])

    def vector(self) -> NDArray[np.float32]:
        """first, then second: (packed_size(d),)."""
        return np.concatenate([self.first, self.second]).astype(np.float32)

    @classmethod
    def from_vector(cls, count: int, vector: NDArray[np.floating]) -> Self:
        """The other way. Raises ValueError for a length that no dimension has."""
        dimension = dimension_of(len(vector))
        wide = vector.astype(np.float64)
        return cls(count, wide[:dimension], wide[dimension:])

    def gaussian(self) -> Gaussian:
        """Mean and covariance (divisor n - 1) of the rows; needs two of them."""
        if self.count < 2:
            raise ValueError("a covariance needs two images or more")
        dimension = len(self.first)
        upper = np.zeros((dimension, dimension))
        upper[np.triu_indices(dimension)] = self.second
        product = upper + np.triu(upper, 1).T
        covariance = (product - np.outer(self.first, self.first)) * (self.count / (self.count - 1))
        return Gaussian(self.first, covariance, self.count)


def moments_table(dimension: int) -> TensorTable:
    """The artifact of an opened sum: count (1,), mean (d,), second_moment (d (d + 1) / 2,), the upper triangle row by row; float32."""
    return TensorTable(((_COUNT, (1,)), (_FIRST, (dimension,)), (_SECOND, (packed_size(dimension) - dimension,))))


def read_moments(path: Path) -> Moments:
    """An artifact of `moments_table`. Raises CosiloError on any other file."""
    entries = dict(read_header(path).table.entries)
    dimension = next(iter(entries.get(_FIRST, ())), 1)
    vector = open_vector(path, moments_table(min(dimension, FEATURES_MAX)))
    return Moments.from_vector(int(vector[0]), vector[1:])


def pooled(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts' rows together: what an opened sum says, without its rounding."""
    known = list(parts)
    count = sum(part.count for part in known)
    first = sum((part.count / count * part.first for part in known), np.zeros_like(known[0].first))
    second = sum((part.count / count * part.second for part in known), np.zeros_like(known[0].second))
    return Moments(count, first, second)


def packed_size(dimension: int) -> int:
    """Values of the vector for so many features."""
    return dimension + dimension * (dimension + 1) // 2


def dimension_of(size: int) -> int:
    """The number of features whose vector has this size; raises ValueError where there is none."""
    dimension = (math.isqrt(8 * size + 9) - 3) // 2
    if dimension < 1 or packed_size(dimension) != size:
        raise ValueError(f"{size} values are no packed moments")
    return dimension


def clip_needed(feature_max: float) -> float:
    """The encoding's clip that keeps every moment of features in [-feature_max, feature_max]; `Encoding.error_bound` then says how exact it is."""
    return max(feature_max, feature_max**2)
