"""Moments of features: packed into a vector, pooled, and a Gaussian again."""

import numpy as np
import pytest

from cosilo_common.evaluation.distances import gaussian
from cosilo_common.evaluation.moments import Moments, clip_needed, dimension_of, packed_size, pooled


def features(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, 6.0, (n, d)).astype(np.float32)


def test_the_packed_size_of_lite0_and_back() -> None:
    assert packed_size(1280) == 1280 + 1280 * 1281 // 2 == 821_120
    assert [dimension_of(packed_size(d)) for d in (1, 2, 1280, 2048)] == [1, 2, 1280, 2048]
    with pytest.raises(ValueError, match="821121"):
        dimension_of(821_121)


def test_moments_give_the_gaussian_of_the_rows() -> None:
    x = features(300, 20, 1)
    found, direct = Moments.of(x).gaussian(), gaussian(x.astype(np.float64))
    assert np.allclose(found.mean, direct.mean, atol=1e-12)
    assert np.allclose(found.covariance, direct.covariance, atol=1e-12)
    assert found.count == 300


def test_pooled_moments_are_those_of_all_rows_together_in_any_order() -> None:
    parts = [features(n, 12, k) for k, n in enumerate((50, 7, 30))]
    together = Moments.of(np.concatenate(parts))
    for order in ((0, 1, 2), (2, 0, 1)):
        found = pooled([Moments.of(parts[k]) for k in order])
        assert found.count == 87
        assert np.allclose(found.first, together.first, atol=1e-12)
        assert np.allclose(found.second, together.second, atol=1e-12)


def test_the_clip_holds_the_second_moments_of_relu6_features() -> None:
    assert clip_needed(6.0) == 36.0
    assert clip_needed(0.5) == 0.5


def test_one_image_has_no_covariance_and_no_image_no_moments() -> None:
    with pytest.raises(ValueError, match="two images"):
        Moments.of(features(1, 4, 0)).gaussian()
    with pytest.raises(ValueError, match="one row or more"):
        Moments.of(np.empty((0, 4), np.float32))
