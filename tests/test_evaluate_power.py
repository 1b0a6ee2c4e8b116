"""The formulas for power against simulated experiments, and the numbers that others quote."""

import numpy as np
import pytest

from helpers.evaluate.power import difference_spread, pictures_needed, power, share_told, simulated_pairs


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_simulated_pairs_have_the_means_and_the_spread_asked_for(rng):
    pairs = simulated_pairs(0.73, 0.83, 0.21, 0.7, 50_000, rng)
    assert pairs.shape == (50_000, 2) and pairs.min() >= 0 and pairs.max() <= 1
    np.testing.assert_allclose(pairs.mean(0), [0.73, 0.83], atol=0.005)
    np.testing.assert_allclose(pairs.std(0), 0.21, atol=0.005)
    correlation = np.corrcoef(pairs.T)[0, 1]
    assert 0.5 < correlation < 0.7
    assert (pairs[:, 1] - pairs[:, 0]).std() == pytest.approx(difference_spread(0.21, correlation), rel=0.02)


def test_a_spread_that_no_share_can_have_is_refused(rng):
    with pytest.raises(ValueError, match="spread 0.6 with means 0.5 and 0.9"):
        simulated_pairs(0.5, 0.9, 0.6, 0.5, 10, rng)


@pytest.mark.parametrize("pictures", [50, 123, 400])
def test_the_formula_says_how_often_experiments_tell(rng, pictures):
    difference = np.subtract(*simulated_pairs(0.8, 0.85, 0.21, 0.7, 50_000, rng).T[::-1])
    told = share_told(difference, pictures, rng)
    assert told == pytest.approx(power(difference.mean(), difference.std(), pictures), abs=0.06)
    assert share_told(difference - difference.mean(), pictures, rng) == pytest.approx(0.05, abs=0.03)


def test_pictures_needed_reach_the_power_that_was_wanted():
    spread = difference_spread(0.21, [0, 0.5, 0.9])
    np.testing.assert_allclose(spread, [0.297, 0.21, 0.0939], atol=1e-4)
    needed = pictures_needed(0.03, spread)
    np.testing.assert_allclose(power(0.03, spread, needed), 0.8, atol=1e-6)
    assert pictures_needed(0.21, 0.21) == pytest.approx(7.85, abs=0.01)  # 2.8 squared
