"""Truth and predictions of one picture brought together: bad input named, boxes matched one to one."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from helpers.boxes import CATEGORIES, area, pairwise_iou
from helpers.messages import parse_text

FOUND = 0.5  # a true box is found by a box with IoU above this

Problems = dict[str, list[str]]


def pair_up(truth: Iterable[dict], predictions: Iterable[dict]) -> tuple[list[tuple[dict, dict | None]], Problems]:
    """Each true row with its prediction, in the order of the truth; None where there is none.

    Returns the pairs and the problems: unknown, missing and repeated ids. Of a repeated id the first counts.
    """
    problems: Problems = defaultdict(list)
    by_id: dict[str, dict[str, dict]] = {"truth": {}, "predictions": {}}
    for kind, rows in (("truth", truth), ("predictions", predictions)):
        for row in rows:
            if row["image_id"] in by_id[kind]:
                problems[f"repeated ids in the {kind}"].append(row["image_id"])
            by_id[kind].setdefault(row["image_id"], row)
    true, predicted = by_id.values()
    problems["predictions for unknown ids"] += [image_id for image_id in predicted if image_id not in true]
    problems["pictures without a prediction"] += [image_id for image_id in true if image_id not in predicted]
    if not true:
        problems["no truth"].append("the truth has no pictures; nothing can be scored")
    return [(row, predicted.get(image_id)) for image_id, row in true.items()], problems


def by_class(truth: Iterable[dict]) -> bool:
    """Whether a box counts for its own class alone: where `truth` has several classes other than the project's own,
    which are kinds of one thing."""
    names = {name for row in truth for name in row["objects"]["category_name"]}
    return len(names) > 1 and not names <= set(CATEGORIES)


def match_picture(row: dict, prediction: dict | None, problems: Problems, named: bool = False) -> dict:
    """One picture's record; `problems` grows by what is wrong with its boxes and confidences.

    A box that is no box (not finite, corners swapped, not four numbers) stays in every count with IoU 0. With `named`
    boxes of different names have an IoU of 0.
    """
    image_id, names = row["image_id"], list(row["objects"]["category_name"])
    true_boxes = [[box[i] for i in (1, 0, 3, 2)] for box in row["objects"]["bbox"]]  # y first to x first
    truth = _countable(true_boxes, f"{image_id}, truth", problems)
    given = prediction or {"boxes": []}
    if "boxes" not in given:
        parsed = parse_text(given["text"])
        given = {"labels": parsed.labels, "boxes": parsed.boxes_xyxy_unit.tolist(), "rejected": parsed.rejected} | given
    boxes = _countable(given["boxes"], f"{image_id}, prediction", problems)
    labels = (list(given.get("labels", [])) + [""] * len(boxes))[: len(boxes)]
    iou = pairwise_iou(truth, boxes)  # [true, predicted]
    if named:
        iou *= np.array([[name == label for label in labels] for name in names], float).reshape(iou.shape)
    matched = _assign(iou, iou)
    found = _assign(iou, iou + 10.0 * (iou > FOUND))  # first as many found boxes as can be, then IoU
    partners = {i: j for i, j in found.items() if iou[i, j] > FOUND}
    ious = [float(iou[i, matched[i]]) if i in matched else 0.0 for i in range(len(truth))]
    return {
        "image_id": image_id,
        "iou": float(np.mean(ious)) if ious else None,  # mean over the picture's true boxes; None without a table
        "detected": bool((area(boxes) > 0).any()),
        "box_ious": ious,
        "box_found": [i in partners for i in range(len(truth))],
        "box_named": [i in partners and labels[partners[i]] == name for i, name in enumerate(names)],
        "box_categories": names,
        "box_areas": area(truth).tolist(),  # shares of the picture
        "rotation": row.get("rotation"),
        "true": truth.tolist(),  # x first, unit
        "predicted": boxes.tolist(),
        "predicted_categories": labels,
        "by_class": named,
        "predicted_correct": [j in partners.values() for j in range(len(boxes))],
        "confidences": _confidences(given.get("confidences"), len(boxes), image_id, problems),
        "surplus": max(len(boxes) - len(truth), 0),
        "format_error": prediction is None or bool(given.get("rejected")),
        "stopped": given.get("stopped"),
    }


def _countable(boxes: list, where: str, problems: Problems) -> np.ndarray:
    """Boxes [N, 4]; what is no box becomes a box without area, so that it still counts. All faults are named."""
    found = np.array([box if len(box) == 4 else [np.nan] * 4 for box in boxes], float).reshape(-1, 4)
    finite, sides = np.isfinite(found).all(axis=1), found[:, 2:] - found[:, :2]
    for kind, wrong in {
        "boxes with missing or non-finite numbers": ~finite,
        "boxes with swapped corners": finite & (sides < 0).any(axis=1),
        "boxes without area": finite & (sides >= 0).all(axis=1) & (sides == 0).any(axis=1),
        "boxes outside the picture": finite & ((found < -1e-6) | (found > 1 + 1e-6)).any(axis=1),
    }.items():
        problems[kind] += [f"{where}: {list(boxes[i])}" for i in np.flatnonzero(wrong)]
    return np.where(finite[:, None] & (sides >= 0).all(axis=1, keepdims=True), found, 0)


def _confidences(given: list | None, count: int, image_id: str, problems: Problems) -> list[float] | None:
    """One confidence a box, None where the prediction carries none; NaN counts as 0 and is named."""
    if not given and count:
        return None
    given = list(given or [])
    if len(given) != count:
        problems["confidences that do not fit the boxes"].append(f"{image_id}: {len(given)} for {count} boxes")
        return None
    if any(value is None or not 0 <= value <= 1 for value in given):
        problems["confidences that are NaN or outside 0-1 (count as 0)"].append(f"{image_id}: {given}")
    return [float(value) if value is not None and 0 <= value <= 1 else 0.0 for value in given]


def _assign(iou: np.ndarray, worth: np.ndarray) -> dict[int, int]:
    """Optimal one-to-one matching: true box -> predicted box with the greatest sum of `worth`, IoU above 0."""
    true, predicted = linear_sum_assignment(worth, maximize=True)
    return {int(i): int(j) for i, j in zip(true, predicted, strict=True) if iou[i, j] > 0}
