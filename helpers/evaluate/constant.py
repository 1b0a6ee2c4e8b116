"""The simplest detector: one box, the same for every picture. A model that is not above it has learned nothing."""

import numpy as np
from scipy.optimize import minimize

from helpers.boxes import pairwise_iou, xyxy_unit_to_yxyx_unit, yxyx_unit_to_xyxy_unit
from helpers.messages import parse_text, target_text


def best_constant_box(truth: list[dict]) -> np.ndarray:
    """The box [x0, y0, x1, y1] in 0-1, float64 [4], with the greatest mean IoU over the pictures of `truth`.

    To be fitted on `train`. The objective is `mean_iou` as `score` defines it. Starts from the best of the true
    boxes and climbs with Nelder-Mead; deterministic. Raises `ValueError` when no picture has a box.
    """
    boxes = [yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]) for row in truth if len(row["objects"]["bbox"])]
    if not boxes:
        raise ValueError("no picture has a box; the best constant box needs at least one")
    stacked = np.concatenate(boxes)  # [all boxes, 4]
    starts = np.cumsum([0] + [len(b) for b in boxes[:-1]])
    counts = np.array([len(b) for b in boxes])

    def mean_iou(candidates: np.ndarray) -> np.ndarray:
        iou = pairwise_iou(candidates, stacked)  # [candidates, all boxes]
        return (np.maximum.reduceat(iou, starts, axis=1) / counts).mean(axis=1)

    def loss(box: np.ndarray) -> float:
        if (box[2:] <= box[:2]).any() or (box < 0).any() or (box > 1).any():
            return 1.0
        return 1.0 - float(mean_iou(box[None])[0])

    start = stacked[np.argmax(mean_iou(stacked))]
    simplex = start + np.vstack([np.zeros(4), 0.05 * np.diag([1, 1, -1, -1])])
    found = minimize(loss, start, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-4})
    return found.x


def constant_predictions(box: np.ndarray, truth: list[dict]) -> list[dict]:
    """The same box for every picture, in the form of a model's predictions (rounded as text is)."""
    text = target_text({"bbox": xyxy_unit_to_yxyx_unit([box]), "category_name": ["nutrition-table"]})
    parsed = parse_text(text)
    line = {"text": text, "labels": parsed.labels, "boxes": parsed.boxes_xyxy_unit.tolist(), "confidences": [],
            "rejected": [], "stopped": True, "new_tokens": 0}  # fmt: skip
    return [{"image_id": row["image_id"]} | line for row in truth]
