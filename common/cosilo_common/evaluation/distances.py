"""Distances between a real and a generated set of feature vectors: FID, KID, precision and recall; and the Inception score.

Pure arithmetic on float64 arrays: no torch, no files, no images. Every function is independent of the order of its rows, but for what a
generator that is passed in draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]

NEIGHBOURS = 3  # Kynkaanniemi et al., arXiv 1904.06991, section 3.1: k = 3 throughout
BLOCK_ROWS = 1024  # distances of so many rows at once: 8 bytes x 1024 x 50,000 is 0.4 GB, the most that stands in memory


@dataclass(frozen=True)
class Gaussian:
    """mean: (d,); covariance: (d, d), symmetric, with the n - 1 divisor; count: n rows that it was taken from."""

    mean: Rows
    covariance: Rows
    count: int


@dataclass(frozen=True)
class Kid:
    """Kernel distance: the mean over subsets, and the standard deviation between them (0 for one subset)."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of generated rows inside the real set's manifold; recall: the other way round. Both 0 to 1."""

    precision: float
    recall: float


def gaussian(rows: Rows) -> Gaussian:
    """Mean and covariance of rows (n, d), n >= 2."""
    _check(rows, 2)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Gaussian(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance; the FID where rows are Inception's.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no complex parts, and
    eigenvalues that rounding made negative count as 0. Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of {one.mean.size} and {other.mean.size} dimensions cannot be compared")
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = root @ other.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum()
    gap = one.mean - other.mean
    return float(gap @ gap + np.trace(one.covariance) + np.trace(other.covariance) - 2.0 * cross)


def kernel_distance(one: Rows, other: Rows, *, subsets: int, subset_size: int, random: np.random.Generator) -> Kid:
    """KID: the unbiased squared MMD under the kernel (x.y / d + 1)^3, averaged over subsets.

    one, other: (n, d), (m, d). Each subset draws min(subset_size, n, m) rows of both without replacement. An unbiased estimate of 0 is
    negative half of the time. Source: Binkowski et al., arXiv 1801.01401, section 4.
    """
    size = min(subset_size, len(one), len(other))
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs 2 rows of each set and 1 subset, not {size} and {subsets}")
    draws = [(random.choice(len(one), size, replace=False), random.choice(len(other), size, replace=False)) for _ in range(subsets)]
    values = np.array([unbiased_mmd2(one[a], other[b]) for a, b in draws])
    return Kid(float(values.mean()), float(values.std()))


def unbiased_mmd2(one: Rows, other: Rows) -> float:
    """The unbiased estimate of squared MMD under KID's kernel; rows (n, d) and (m, d), n, m >= 2."""
    n, m = len(one), len(other)
    within_one, within_other = _cubic(one, one), _cubic(other, other)
    first = (within_one.sum() - np.trace(within_one)) / (n * (n - 1))
    second = (within_other.sum() - np.trace(within_other)) / (m * (m - 1))
    return float(first + second - 2.0 * _cubic(one, other).mean())


def precision_recall(real: Rows, generated: Rows, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall: a manifold is the union of balls around a set's rows, each as wide as its k-th neighbour is far.

    real: (n, d), generated: (m, d), each more than k rows; sets of one size make the two comparable. Source: Kynkaanniemi et al.,
    arXiv 1904.06991, equations 1 and 2.
    """
    _check(real, neighbours + 1)
    _check(generated, neighbours + 1)
    return PrecisionRecall(_share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours))


def inception_score(logits: Rows) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y): 1 to the number of classes; logits: (n, classes).

    One score over all rows, as splits only lower it. Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))


def _cubic(one: Rows, other: Rows) -> Rows:
    """(x.y / d + 1)^3 of all pairs: (n, m)."""
    return np.asarray((one @ other.T / one.shape[1] + 1.0) ** 3, dtype=np.float64)


def _share_inside(points: Rows, manifold: Rows, neighbours: int) -> float:
    # The nearest row of a set to each of its own rows is itself, hence the k-th *other* one at index k.
    radii = np.concatenate([np.partition(block, neighbours, axis=1)[:, neighbours] for block in _squared_distances(manifold, manifold)])
    inside = [(block <= radii).any(axis=1) for block in _squared_distances(points, manifold)]
    return float(np.concatenate(inside).mean())


def _squared_distances(one: Rows, other: Rows) -> Iterator[Rows]:
    """Squared distances of one's rows to other's, in blocks of rows."""
    norms = (other * other).sum(axis=1)
    for start in range(0, len(one), BLOCK_ROWS):
        part = one[start : start + BLOCK_ROWS]
        squared = (part * part).sum(axis=1)[:, None] + norms - 2.0 * part @ other.T
        yield np.maximum(squared, 0.0)


def _check(rows: Rows, least: int) -> None:
    if rows.ndim != 2 or len(rows) < least:
        raise ValueError(f"{rows.shape}: at least {least} rows of features are needed")
