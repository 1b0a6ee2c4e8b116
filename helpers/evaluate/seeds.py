"""A recipe run with several seeds: its mean over seeds and pictures, and two recipes compared, with intervals.

A run named r4-joint-s1 (`-p run_name r4-joint-s1 -p seed 1`) is a further seed of the run r4-joint; r3's is r3-s1.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from helpers.evaluate.intervals import ALPHA, RESAMPLES

_SEED = re.compile(r"-s\d+(?=$|-stage2$)")
_FREE = ("seed", "run_name", "output_root", "gpus", "report_to", "save_steps", "predict_batch_size", "merge_base")


def group_seeds(runs: list[dict]) -> dict[str, list[dict]]:
    """`find_runs`' runs by name without their seed: `{"r4-joint": [run of r4-joint, of r4-joint-s1, ...]}`.

    Runs of one group share scale, truth and every parameter but the seed, which differs; one that does not (or has no
    fine-tuned score) stands alone under its own name.
    """
    groups: dict[str, list[dict]] = {}
    for run in sorted(runs, key=lambda run: (_SEED.sub("", run["run"]), run["seed"] or 0, run["run"])):
        name = _SEED.sub("", run["run"])
        first = groups.get(name, [run])[0]
        alike = _fixed(run) == _fixed(first) and "fine-tuned" in run["metrics"]["scores"]
        seeds = [other["seed"] for other in groups.get(name, [])]
        groups.setdefault(name if alike and run["seed"] not in seeds else run["run"], []).append(run)
    return groups


def _fixed(run: dict) -> tuple:
    parameters = {name: value for name, value in run["parameters"].items() if name not in _FREE}
    return run["scale"], run["recipe"], run["metrics"]["truth"]["hash"], parameters


def iou_matrix(runs: list[dict], which: str = "fine-tuned") -> tuple[np.ndarray, list[str]]:
    """IoU of each seed and picture [S, P] and the pictures' ids; pictures without a table take no part.

    Raises ValueError where the runs were not scored on the same pictures.
    """
    columns = [{record["image_id"]: record["iou"] for record in run["metrics"]["scores"][which]["per_picture"]
                if record["iou"] is not None} for run in runs]
    if any(column.keys() != columns[0].keys() for column in columns):
        raise ValueError(f"{', '.join(run['run'] for run in runs)} were not scored on the same pictures.")
    ids = list(columns[0])
    return np.array([[column[image_id] for image_id in ids] for column in columns]), ids


def over_seeds(values: np.ndarray) -> dict:
    """`{"value", "low", "high", "n", "seeds"}`: the mean of `values` [S, P] and its 95 % interval.

    Seeds and pictures are both drawn anew (they are crossed: each seed answers every picture), so the interval says
    what another training and other pictures would give. A bootstrap of S seeds sees only (S - 1) / S of their
    variance; deviations from the mean over seeds are stretched to make up for it. One seed: pictures alone.
    """
    seeds, pictures = values.shape
    centre = values.mean(axis=0)
    stretched = centre + (values - centre) * np.sqrt(seeds / max(seeds - 1, 1))
    draw = np.random.default_rng(0)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_pictures = draw.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES) / pictures
    low, high = np.quantile(((of_seeds @ stretched) * of_pictures).sum(axis=1), [ALPHA / 2, 1 - ALPHA / 2])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": pictures, "seeds": seeds}


def difference_over_seeds(a: list[dict], b: list[dict]) -> dict:
    """`over_seeds` of IoU of `a` minus `b` on the same pictures and seeds; its deviation over pictures is `"spread"`.

    Both are runs of one group, as many seeds each; where the numbers differ the first ones are taken.
    Raises ValueError where the pictures differ.
    """
    seeds = min(len(a), len(b))
    (left, ids), (right, others) = iou_matrix(a[:seeds]), iou_matrix(b[:seeds])
    if set(ids) != set(others):
        raise ValueError(f"{a[0]['run']} and {b[0]['run']} were not scored on the same pictures.")
    values = left - right[:, [others.index(image_id) for image_id in ids]]
    return over_seeds(values) | {"spread": float(values.std(axis=1, ddof=1).mean())}


def summary_over_seeds(runs: list[dict], metrics: Iterable[str], which: str = "fine-tuned") -> dict:
    """`{"mean_iou": an interval, over seeds too where there are several runs, metric: its mean over the runs}`.

    A metric that one of the runs has no value for is None.
    """
    summaries = [run["metrics"]["scores"][which]["summary"] for run in runs]
    values = {metric: [summary[metric]["value"] for summary in summaries] for metric in metrics}
    means = {metric: None if None in each else math.fsum(each) / len(each) for metric, each in values.items()}
    several = len(runs) > 1
    return {"mean_iou": over_seeds(iou_matrix(runs, which)[0]) if several else summaries[0]["mean_iou"]} | means
