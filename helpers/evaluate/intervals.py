"""How sure a number is: bootstrap intervals over pictures, and two runs compared on the same pictures."""

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 2000
ALPHA = 0.05  # 1 - confidence level of every interval


def interval(
    statistic: Callable,
    *columns: ArrayLike,
    n: int | None = None,
    rate: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
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
    value = float(statistic(*arrays, axis=-1))
    result = {"value": value, "low": None, "high": None, "n": n}
    if resamples and pictures > 1:
        low, high = _bootstrap(statistic, arrays, resamples, seed)
        if rate and value in (0.0, 1.0):
            bounds = stats.binomtest(round(value * n), n).proportion_ci(1 - ALPHA, method="wilson")
            low, high = float(bounds.low), float(bounds.high)
        result |= {"low": low, "high": high}
    return result


def _bootstrap(statistic: Callable, columns: tuple, resamples: int, seed: int) -> tuple[float | None, float | None]:
    with warnings.catch_warnings():  # no spread at all is an answer here: low = high
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=1 - ALPHA,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    drawn = result.bootstrap_distribution
    drawn = drawn[np.isfinite(drawn)]  # a resample may hold no box at all, where a ratio has no value
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2]) if len(drawn) else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else (None, None)


def mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(x, axis=axis)


def median(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(x, axis=axis)


def ratio(over: np.ndarray, under: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum over sum, as precision, recall and mean IoU over boxes are; NaN where there is nothing to divide by."""
    over, under = np.sum(over, axis=axis), np.sum(under, axis=axis)
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 0)


def paired_bootstrap(per_picture_a: list[dict], per_picture_b: list[dict]) -> dict:
    """Two runs on the same pictures: mean of a - b with its 95 % interval, and what can be told from it.

    Takes the `per_picture` lists of two `score` results; pictures without a table take no part. Returns
    `{"difference": {"value", "low", "high", "n"}, "verdict", "power_50", "pictures_needed", "left_out"}`:

    - `verdict`: a sentence: which of the two is better, or that these pictures cannot tell
    - `power_50`: share of samples of 50 pictures, drawn with replacement from these, whose own 95 %
      interval (paired t) leaves out 0: how often 50 pictures would have told the two apart
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
    result = interval(mean, difference)
    drawn = np.random.default_rng(0).choice(difference, (RESAMPLES, 50))
    margin = stats.t.ppf(1 - ALPHA / 2, 49) * drawn.std(axis=1, ddof=1) / np.sqrt(50)
    told = np.abs(drawn.mean(axis=1)) > margin
    return {
        "difference": result,
        "verdict": _verdict(result),
        "power_50": float(told.mean()),
        "pictures_needed": _pictures_needed(difference),
        "left_out": sorted(set(a) ^ set(b)),
    }


def _verdict(difference: dict) -> str:
    if difference["low"] is None:
        return "one picture cannot tell"
    if difference["low"] > 0:
        return f"the first is better, by {difference['value']:.3f}"
    if difference["high"] < 0:
        return f"the second is better, by {-difference['value']:.3f}"
    return f"{difference['n']} pictures cannot tell them apart"


def told_apart(difference: dict) -> str:
    """"told apart" where the interval of a difference leaves out 0, else "not told apart"."""
    return "told apart" if difference["low"] > 0 or difference["high"] < 0 else "not told apart"


def _pictures_needed(difference: np.ndarray) -> int | None:
    """Normal approximation: ((z_.975 + z_.80) * spread / difference) squared."""
    if len(difference) < 2 or difference.mean() == 0:
        return None
    z = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(0.8)
    return int(np.ceil((z * difference.std(ddof=1) / abs(difference.mean())) ** 2)) or 1
