"""How many pictures tell two recipes apart: by formula, and by simulated experiments."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from helpers.evaluate.intervals import ALPHA

Z = stats.norm.ppf(1 - ALPHA / 2)  # 1.96


def simulated_pairs(
    worse: float, better: float, spread: float, likeness: float, pictures: int, rng: np.random.Generator
) -> np.ndarray:
    """IoU of two recipes on the same made-up pictures: float64 [pictures, 2] in 0-1.

    Each recipe's IoU is beta distributed, with the mean `worse` or `better` and the standard deviation `spread`.
    `likeness`, from 0 to 1, says how much a picture that is hard for one is hard for the other: the correlation of the
    two normal variables behind them; that of the IoUs is somewhat smaller. Raises ValueError for a spread that no
    numbers in 0-1 with such a mean can have.
    """
    means = np.array([worse, better])
    weight = means * (1 - means) / spread**2 - 1
    if not (spread > 0 and (weight > 0).all()):
        raise ValueError(f"spread {spread} with means {worse} and {better}: numbers in 0-1 cannot spread that much")
    normal = rng.multivariate_normal([0, 0], [[1, likeness], [likeness, 1]], pictures)
    return stats.beta.ppf(stats.norm.cdf(normal), means * weight, (1 - means) * weight)


def share_told(differences: np.ndarray, pictures: int, rng: np.random.Generator) -> float:
    """Share of 1000 experiments, each on so many of the `differences` [N], whose paired t-test leaves out 0."""
    drawn = rng.choice(differences, (1000, pictures))
    return float((stats.ttest_1samp(drawn, 0, axis=1).pvalue < ALPHA).mean())


def difference_spread(spread: float, correlation: ArrayLike) -> np.ndarray:
    """Standard deviation of the difference of two recipes' IoU on one picture; each has `spread` alone."""
    return spread * np.sqrt(2 * (1 - np.asarray(correlation)))


def power(difference: ArrayLike, spread: ArrayLike, pictures: ArrayLike) -> np.ndarray:
    """How often an experiment finds a true `difference` whose `spread` from picture to picture is known."""
    return stats.norm.cdf(np.asarray(difference) * np.sqrt(pictures) / spread - Z)


def pictures_needed(difference: ArrayLike, spread: ArrayLike) -> np.ndarray:
    """Pictures for a power of 80 %; not rounded."""
    return ((Z + stats.norm.ppf(0.8)) * np.asarray(spread) / np.asarray(difference)) ** 2
