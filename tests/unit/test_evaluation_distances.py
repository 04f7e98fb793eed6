"""FID, KID, precision and recall, IS: exact values where a closed form exists, and what must not matter."""

from itertools import combinations

import numpy as np
import pytest

from cosilo_common.evaluation.distances import (
    Gaussian,
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
    precision_recall,
    unbiased_mmd2,
)


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_a_set_is_at_no_distance_from_itself_nor_from_itself_in_another_order() -> None:
    x = rows(40, 60, 0)  # fewer rows than dimensions: a singular covariance
    assert frechet_distance(gaussian(x), gaussian(x)) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(gaussian(x), gaussian(x[::-1])) == pytest.approx(0.0, abs=1e-5)


def test_gaussians_with_diagonal_covariances_are_as_far_as_the_closed_form_says() -> None:
    one = Gaussian(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    other = Gaussian(np.array([3.0, 5.0]), np.diag([1.0, 16.0]), 10)
    # |m|^2 = 9 + 16; (2 - 1)^2 + (3 - 4)^2 = 2
    assert frechet_distance(one, other) == pytest.approx(27.0, abs=1e-12)


def test_gaussians_whose_covariances_do_not_commute_agree_with_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    one, other = gaussian(rows(50, 6, 1) @ rows(6, 6, 2)), gaussian(rows(50, 6, 3) @ rows(6, 6, 4) + 1.0)
    gap = one.mean - other.mean
    cross = np.trace(np.real(sqrtm(one.covariance @ other.covariance)))
    expected = gap @ gap + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(float(expected), rel=1e-9)


def test_a_covariance_divides_by_n_minus_one() -> None:
    x = rows(7, 3, 5)
    assert np.allclose(gaussian(x).covariance, np.cov(x, rowvar=False), atol=1e-14)


def test_mmd_by_hand() -> None:
    one, other = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    # k(x, y) = (xy + 1)^3: within one, k(0, 1) = 1; within other, k(1, 2) = 27; across (1 + 1 + 8 + 27) / 4
    assert unbiased_mmd2(one, other) == pytest.approx(1 + 27 - 2 * 37 / 4, abs=1e-12)


def test_kid_is_unbiased_its_mean_over_all_ways_to_part_one_set_is_exactly_zero() -> None:
    x = rows(8, 3, 1)
    halves = [(list(half), [k for k in range(8) if k not in half]) for half in combinations(range(8), 4)]
    estimates = [unbiased_mmd2(x[one], x[other]) for one, other in halves]
    assert np.mean(estimates) == pytest.approx(0.0, abs=1e-12)
    assert min(estimates) < -1e-3 < 1e-3 < max(estimates)  # so it may be negative


def test_kid_does_not_depend_on_the_rows_order_where_a_subset_is_the_whole_set() -> None:
    one, other = rows(30, 4, 1), rows(30, 4, 2) + 1
    shuffled = one[np.random.default_rng(3).permutation(30)]
    values = [kernel_distance(x, other, subsets=1, subset_size=30, random=np.random.default_rng(0)).mean for x in (one, shuffled)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] == pytest.approx(unbiased_mmd2(one, other), rel=1e-12)


def test_kid_over_subsets_is_the_mean_over_them_and_grows_with_the_distance() -> None:
    near, far = (
        kernel_distance(rows(200, 4, 1), rows(200, 4, 2) + gap, subsets=20, subset_size=50, random=np.random.default_rng(0))
        for gap in (0.0, 2.0)
    )
    assert abs(near.mean) < 0.2 < far.mean
    assert near.deviation > 0


def test_precision_and_recall_of_points_made_by_hand() -> None:
    # With k = 1 each real point's ball has radius 1 (the next one's distance); generated points in one ball of four, one far out.
    real = np.array([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]])
    generated = np.array([[0.5, 0.0], [0.6, 0.0], [100.0, 0.0], [100.1, 0.0]])
    found = precision_recall(real, generated, neighbours=1)
    assert found.precision == 0.5  # the first two lie in the real balls
    assert found.recall == 0.0  # the generated balls are 0.1 wide and hold no real point
    wide = precision_recall(real, np.array([[0.0, 0.5], [1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]), neighbours=1)
    assert wide.precision == 0.5
    assert wide.recall == 0.5


def test_precision_and_recall_are_one_for_a_set_and_itself_and_ignore_order() -> None:
    x = rows(50, 3, 1)
    same = precision_recall(x, x[::-1])
    assert (same.precision, same.recall) == (1.0, 1.0)


def test_a_model_that_draws_one_mode_is_precise_and_recalls_half() -> None:
    left, right = rows(100, 2, 1), rows(100, 2, 2) + 100.0
    found = precision_recall(np.concatenate([left, right]), np.concatenate([left, left + 1e-3]))
    assert found.precision > 0.95
    assert found.recall == pytest.approx(0.5, abs=0.05)


def test_the_inception_score_is_one_for_uniform_and_the_number_of_classes_for_certain_and_even_predictions() -> None:
    assert inception_score(np.zeros((8, 5))) == pytest.approx(1.0, abs=1e-12)
    certain = np.eye(5).repeat(3, axis=0) * 1e3
    assert inception_score(certain) == pytest.approx(5.0, rel=1e-9)
    assert inception_score(np.repeat(certain[:1], 4, axis=0)) == pytest.approx(1.0, abs=1e-12)


def test_sets_that_are_too_small_or_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        gaussian(rows(1, 3, 0))
    with pytest.raises(ValueError, match="at least 4 rows"):
        precision_recall(rows(3, 2, 0), rows(9, 2, 0))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(gaussian(rows(9, 3, 0)), gaussian(rows(9, 4, 0)))
