"""How sure a number is: bootstrap intervals over pictures and seeds, and two runs compared on the same pictures."""

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 2000
ALPHA = 0.05  # 1 - confidence level of every interval


def interval(statistic: Callable, *columns: ArrayLike, n: int | None = None, rate: bool = False,
             resamples: int = RESAMPLES, seed: int = 0) -> dict:  # fmt: skip
    """`{"value", "low", "high", "n"}`: a statistic of per-picture columns and its 95 % bootstrap interval.

    `statistic(*columns, axis=-1)` is vectorised; the columns are resampled together, picture by picture
    (percentile method). With `rate`, a value of exactly 0 or 1, which leaves nothing to resample, gets Wilson's
    interval for n trials. `n` is what the number is said to rest on; the number of pictures if not given.
    None stands for "not known".
    """
    arrays = tuple(np.asarray(column, dtype=float) for column in columns)
    pictures = len(arrays[0])
    n = pictures if n is None else n
    if pictures == 0 or n == 0:
        return {"value": None, "low": None, "high": None, "n": n}
    value, low, high = float(statistic(*arrays, axis=-1)), None, None
    if resamples and pictures > 1:
        if rate and value in (0.0, 1.0):
            low, high = map(float, stats.binomtest(round(value * n), n).proportion_ci(1 - ALPHA, method="wilson"))
        else:
            with warnings.catch_warnings():  # no spread at all is a result here: low = high
                warnings.simplefilter("ignore", stats.DegenerateDataWarning)
                low, high = ends(stats.bootstrap(
                    arrays, statistic, paired=True, vectorized=True, n_resamples=resamples, method="percentile",
                    rng=np.random.default_rng(seed)).bootstrap_distribution)
    return {"value": value, "low": low, "high": high, "n": n}


def ends(drawn: np.ndarray | list[float]) -> list[float]:
    """Low and high end of the 95 % interval of bootstrap results [R]; NaN (a ratio without a box) is left out."""
    return np.nanquantile(drawn, [ALPHA / 2, 1 - ALPHA / 2]).tolist()


def ratio(over: np.ndarray, under: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum over sum, as precision, recall and mean IoU over boxes are; NaN where there is nothing to divide by."""
    over, under = np.sum(over, axis=axis), np.sum(under, axis=axis)
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 0)


def over_seeds(values: np.ndarray) -> dict:
    """`{"value", "low", "high", "n", "seeds"}`: the mean of `values` [S seeds, P pictures] and its 95 % interval.

    Seeds and pictures are both drawn anew (they are crossed: each seed has every picture), so the interval says what
    another training and other pictures would give. A bootstrap of S seeds shows only (S - 1) / S of their variance;
    deviations from the mean over seeds are stretched to make up for it. One seed: pictures alone.
    """
    seeds, pictures = values.shape
    centre = values.mean(axis=0)
    stretched = centre + (values - centre) * np.sqrt(seeds / max(seeds - 1, 1))
    draw = np.random.default_rng(0)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_pictures = draw.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES) / pictures
    low, high = ends(((of_seeds @ stretched) * of_pictures).sum(axis=1))
    return {"value": float(values.mean()), "low": low, "high": high, "n": pictures, "seeds": seeds}


def paired_bootstrap(per_picture_a: list[dict], per_picture_b: list[dict]) -> dict:
    """Two runs on the same pictures: mean of a - b with its 95 % interval, and what these pictures can say about it.

    Takes the `per_picture` lists of two `score` results; pictures without a table take no part. Returns
    `{"difference": {"value", "low", "high", "n"}, "verdict", "pictures_needed", "left_out"}`:

    - `verdict`: a sentence: which of the two is better, or that the difference is not significant
    - `pictures_needed`: pictures for a power of 80 % if the difference is as measured; None where it is 0
    - `left_out`: ids that only one of the two runs has

    Raises `ValueError` when the runs share no picture with a table.
    """
    a, b = ({record["image_id"]: record["iou"] for record in records if record["iou"] is not None}
            for records in (per_picture_a, per_picture_b))
    shared = [image_id for image_id in a if image_id in b]
    if not shared:
        raise ValueError("the two runs share no picture with a table; compare runs scored on the same pictures")
    difference = np.array([a[image_id] - b[image_id] for image_id in shared])
    result = interval(np.mean, difference)
    if result["low"] is None:
        verdict = "one picture has no interval"
    elif result["low"] > 0 or result["high"] < 0:
        verdict = f"the {'first' if result['low'] > 0 else 'second'} is better, by {abs(result['value']):.3f}"
    else:
        verdict = f"{significance(result)}: the interval contains 0"
    needed = None
    if len(shared) > 1 and result["value"] != 0:  # by normal approximation
        both = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(0.8)
        needed = max(1, math.ceil((both * difference.std(ddof=1) / result["value"]) ** 2))
    return {"difference": result, "verdict": verdict, "pictures_needed": needed, "left_out": sorted(set(a) ^ set(b))}


def significance(difference: dict) -> str:
    """"significant at 95 %" where the interval of a difference leaves out 0, else "not significant at 95 %"."""
    return f"{'' if difference['low'] > 0 or difference['high'] < 0 else 'not '}significant at 95 %"


def number(value: float | None, percent: bool = False) -> str:
    """A metric as text: `.712`, `71 %`, or `–` for None."""
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if percent else f"{value:z.3f}".replace("0.", ".", 1)  # z: no minus before .000


def with_interval(metric: dict) -> str:
    """A metric or difference with its interval as text: `.712 (.671 to .750)`."""
    return f"{number(metric['value'])} ({number(metric['low'])} to {number(metric['high'])})"
