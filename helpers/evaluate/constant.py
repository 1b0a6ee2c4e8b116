"""The simplest detector: one box, the same for every picture. A model that is not above it has learned nothing."""

from collections import Counter

import numpy as np
from scipy.optimize import minimize

from helpers.boxes import CATEGORIES, pairwise_iou, xyxy_unit_to_yxyx_unit, yxyx_unit_to_xyxy_unit
from helpers.evaluate.match import by_class
from helpers.messages import parse_text, target_text


def best_constant_box(truth: list[dict]) -> np.ndarray:
    """The box [x0, y0, x1, y1] in 0-1, float64 [4], with the greatest mean IoU over the pictures of `truth`.

    To be fitted on `train`. The objective is `mean_iou` as `score` defines it: where boxes count by class, only those
    of the commonest one can be hit. Starts from the best of the true boxes and climbs with Nelder-Mead; deterministic.
    Raises `ValueError` when no picture has a box.
    """
    chosen = commonest_class(truth) if by_class(truth) else None
    rows = [(place, len(row["objects"]["bbox"]), *box) for place, row in enumerate(truth) for box, name in
            zip(row["objects"]["bbox"], row["objects"]["category_name"], strict=True) if chosen in (None, name)]
    if not rows:
        raise ValueError("no picture has a box; the best constant box needs at least one")
    places, counts = np.array(rows).T[:2]
    starts = np.flatnonzero(np.diff(places, prepend=-1))  # of each picture with a box
    stacked = yxyx_unit_to_xyxy_unit(np.array(rows)[:, 2:])  # [all boxes, 4]

    def mean_iou(candidates: np.ndarray) -> np.ndarray:
        iou = pairwise_iou(candidates, stacked)  # [candidates, all boxes]
        return (np.maximum.reduceat(iou, starts, axis=1) / counts[starts]).mean(axis=1)

    def loss(box: np.ndarray) -> float:
        if (box[2:] <= box[:2]).any() or (box < 0).any() or (box > 1).any():
            return 1.0
        return 1.0 - float(mean_iou(box[None])[0])

    start = stacked[np.argmax(mean_iou(stacked))]
    simplex = start + np.vstack([np.zeros(4), 0.05 * np.diag([1, 1, -1, -1])])
    found = minimize(loss, start, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-4})
    return found.x


def commonest_class(truth: list[dict]) -> str:
    """The class of most boxes of `truth`; of several the first by name."""
    counts = Counter(name for row in truth for name in row["objects"]["category_name"])
    return min(counts, key=lambda name: (-counts[name], name), default=CATEGORIES[0])


def constant_predictions(box: np.ndarray, truth: list[dict]) -> list[dict]:
    """The same box, of the commonest class, for every picture, in the form of predictions (rounded as text is)."""
    text = target_text({"bbox": xyxy_unit_to_yxyx_unit([box]), "category_name": [commonest_class(truth)]})
    parsed = parse_text(text)
    line = {"text": text, "labels": parsed.labels, "boxes": parsed.boxes_xyxy_unit.tolist(), "confidences": [],
            "rejected": [], "stopped": True, "new_tokens": 0}  # fmt: skip
    return [{"image_id": row["image_id"]} | line for row in truth]
