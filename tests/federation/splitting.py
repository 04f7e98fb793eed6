"""How one data set is divided over sites, as unequally as hospitals are: by label and by size.

Owns the splits only: labels in, indices out. Must not know images, files or federations. Every split is a partition (each image at exactly
one site) and a function of its arguments, so the same seed gives the same sites on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

DRAWS_MAX = 1000  # at alpha = 0.1 and 4 sites of 1,797 images about one draw in three passes; a least size that needs more is a mistake


def dirichlet_label_skew(labels: NDArray[np.int64], sites: int, *, alpha: float, least: int, seed: int) -> tuple[Indices, ...]:
    """Divides images so that each class is spread over the sites in Dirichlet(alpha) proportions of its own.

    labels: (n,) classes; alpha: above 0, small is unequal, 1 is mild, 100 is nearly even; least: images that every site has at the very
    least. Returns one sorted array of indices a site. Raises ValueError where no draw gives every site `least`.
    Source: Hsu, Qi and Brown, arXiv 1909.06335, section 3; redrawn until the least size holds, as in Li et al., arXiv 2102.02079.
    """
    _check(len(labels), sites, alpha, least)
    random = np.random.default_rng(seed)
    for _ in range(DRAWS_MAX):
        parts: list[list[Indices]] = [[] for _ in range(sites)]
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            for part, piece in zip(parts, _cut(members, random.dirichlet(np.full(sites, alpha))), strict=True):
                part.append(piece)
        if min(sum(map(len, part)) for part in parts) >= least:
            return tuple(np.sort(np.concatenate(part)).astype(np.int64) for part in parts)
    raise ValueError(
        f"no split of {len(labels)} images over {sites} sites at alpha {alpha} leaves {least} at each; ask for fewer, or a larger alpha"
    )


def dirichlet_quantity_skew(count: int, sites: int, *, alpha: float, least: int, seed: int) -> tuple[Indices, ...]:
    """Divides `count` images so that the sites' sizes are Dirichlet(alpha), and each site's classes are a fair draw.

    Returns one sorted array of indices a site; every site has `least` or more. Raises ValueError where that is impossible.
    """
    _check(count, sites, alpha, least)
    random = np.random.default_rng(seed)
    spare = count - sites * least  # `least` are given out first, the rest is what is skewed
    sizes = least + np.diff(_bounds(spare, random.dirichlet(np.full(sites, alpha))))
    order = random.permutation(count)
    return tuple(np.sort(part).astype(np.int64) for part in np.split(order, np.cumsum(sizes)[:-1]))


def class_counts(labels: NDArray[np.int64], split: tuple[Indices, ...]) -> NDArray[np.int64]:
    """Images by site and class: (sites, classes)."""
    classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part], minlength=classes) for part in split])


def _cut(members: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    return list(np.split(members, _bounds(len(members), shares)[1:-1]))


def _bounds(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """0 = b_0 <= b_1 <= ... <= b_sites = count, rounded from the cumulated shares."""
    bounds = np.rint(np.concatenate(([0.0], np.cumsum(shares))) * count).astype(np.int64)
    bounds[-1] = count  # the shares' sum is one only to rounding
    return np.asarray(np.minimum(bounds, count), dtype=np.int64)


def _check(count: int, sites: int, alpha: float, least: int) -> None:
    if sites < 1 or least < 0 or not alpha > 0:
        raise ValueError(f"impossible split: {sites} sites, alpha {alpha}, least {least}")
    if sites * least > count:
        raise ValueError(f"{count} images are too few for {sites} sites of at least {least}")
