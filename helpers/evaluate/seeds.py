"""A recipe run with several seeds: its runs as one group, two groups compared on the same pictures."""

import numpy as np

from helpers.evaluate.intervals import over_seeds
from helpers.recipes import TRAINING

SAME = {*TRAINING, "keep", "constrained"} - {"seed"}  # parameters in which the seeds of one recipe agree


def group_seeds(runs: list[dict]) -> dict[str, list[dict]]:
    """`find_runs`' runs by the name of the first: `{"r4-joint": [run of r4-joint, of r4-joint-s1, ...]}`.

    Fine-tuned runs of one group share scale, truth and every parameter but the seed (`-p seed 1 -p run_name ...`).
    """
    groups: list[list[dict]] = []
    for run in sorted(runs, key=lambda run: (run["seed"], run["run"])):
        fitting = [group for group in groups if "fine-tuned" in run["metrics"]["scores"]
                   and _fixed(run) == _fixed(group[0]) and run["seed"] not in [other["seed"] for other in group]]
        if fitting:
            fitting[0].append(run)
        else:
            groups.append([run])
    return {group[0]["run"]: group for group in groups}


def _fixed(run: dict) -> tuple:
    parameters = {name: value for name, value in run["parameters"].items() if name in SAME}
    return run["scale"], run["recipe"], run["metrics"]["truth"]["hash"], parameters


def iou_matrix(runs: list[dict], which: str = "fine-tuned") -> np.ndarray:
    """IoU of each run and picture [S, P]; pictures without a table take no part.

    Raises ValueError where the runs were not scored on the same pictures.
    """
    columns = [{record["image_id"]: record["iou"] for record in run["metrics"]["scores"][which]["per_picture"]
                if record["iou"] is not None} for run in runs]
    if any(column.keys() != columns[0].keys() for column in columns):
        raise ValueError(f"{', '.join(run['run'] for run in runs)} were not scored on the same pictures.")
    return np.array([[column[image_id] for image_id in columns[0]] for column in columns])


def difference_over_seeds(a: list[dict], b: list[dict]) -> dict:
    """`over_seeds` of IoU of `a` minus `b` on the same pictures and seeds; its deviation over pictures is `"spread"`.

    Both are runs of one group, as many seeds each; where the numbers differ the first ones are taken.
    Raises ValueError where the pictures differ.
    """
    seeds = min(len(a), len(b))
    both = iou_matrix([*a[:seeds], *b[:seeds]])
    values = both[:seeds] - both[seeds:]
    return over_seeds(values) | {"spread": float(values.std(axis=1, ddof=1).mean())}
