"""What a split promises: a partition, the least size, the same sites for the same seed, and skew that alpha governs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.federation.splitting import class_counts, dirichlet_label_skew, dirichlet_quantity_skew

LABELS = np.repeat(np.arange(10), 180)


@settings(max_examples=50, deadline=None)
@given(sites=st.integers(1, 8), alpha=st.floats(0.3, 100), seed=st.integers(0, 2**32), least=st.integers(0, 20))
def test_every_image_is_at_exactly_one_site(sites: int, alpha: float, seed: int, least: int) -> None:
    for split in (
        dirichlet_label_skew(LABELS, sites, alpha=alpha, least=least, seed=seed),
        dirichlet_quantity_skew(len(LABELS), sites, alpha=alpha, least=least, seed=seed),
    ):
        assert len(split) == sites
        assert np.array_equal(np.sort(np.concatenate(split)), np.arange(len(LABELS)))
        assert min(map(len, split)) >= least
        assert all(np.array_equal(part, np.sort(part)) for part in split)


def test_a_seed_is_a_split() -> None:
    first, again, other = (dirichlet_label_skew(LABELS, 4, alpha=0.5, least=100, seed=seed) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    def unevenness(alpha: float) -> float:
        counts = class_counts(LABELS, dirichlet_label_skew(LABELS, 4, alpha=alpha, least=50, seed=1))
        return float(np.abs(counts / counts.sum(axis=0) - 0.25).mean())

    assert unevenness(0.3) > 0.15
    assert unevenness(1000.0) < 0.02


def test_quantity_skew_leaves_classes_alone() -> None:
    split = dirichlet_quantity_skew(len(LABELS), 3, alpha=1.0, least=300, seed=5)
    counts = class_counts(LABELS, split)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(shares - 0.1).max() < 0.06
    assert len({len(part) for part in split}) > 1


@pytest.mark.parametrize(
    ("sites", "alpha", "least", "message"),
    [
        (0, 1.0, 0, "impossible split"),
        (4, 0.0, 0, "impossible split"),
        (4, float("nan"), 0, "impossible split"),
        (4, 1.0, 451, "too few for 4 sites"),
    ],
)
def test_an_impossible_split_is_refused(sites: int, alpha: float, least: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dirichlet_label_skew(LABELS, sites, alpha=alpha, least=least, seed=0)
    with pytest.raises(ValueError, match=message):
        dirichlet_quantity_skew(len(LABELS), sites, alpha=alpha, least=least, seed=0)


def test_a_least_size_that_skew_cannot_give_ends() -> None:
    with pytest.raises(ValueError, match="larger alpha"):
        dirichlet_label_skew(LABELS, 4, alpha=0.01, least=440, seed=0)
