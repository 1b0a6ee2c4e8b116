"""Every number of a run, from its truth and predictions alone. The definitions stand in `score`."""

from collections.abc import Callable
from functools import partial

import numpy as np

from helpers.evaluate.confidence import average_precision, has_confidences, reliability, threshold_for_precision
from helpers.evaluate.intervals import RESAMPLES, interval, mean, median, ratio
from helpers.evaluate.match import match_picture, pair_up

SIZES = {"below 10 %": (0.0, 0.1), "10 to 30 %": (0.1, 0.3), "30 % and more": (0.3, np.inf)}  # area of the true box


def score(truth: list[dict], predictions: list[dict], *, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """All metrics of one model's predictions; the result goes into JSON as it is.

    `truth`: rows `{"image_id", "objects": {"bbox" [[y0, x0, y1, x1]] in 0-1, "category_name"}, "rotation"?}`.
    `predictions`: `{"image_id", "boxes" [[x0, y0, x1, y1]] in 0-1, "labels", "confidences", "rejected", "stopped"}`;
    without "boxes" the answer's "text" is parsed. `resamples=0` leaves the intervals out and is fast.

    Returns "summary", "first_50" (the first 50 rows of the truth), "by_category", "by_size", "by_rotation": metric
    -> `{"value", "low", "high", "n"}`, None where undefined; "per_picture", "confidence", "problems", "pictures".

    True and predicted boxes are matched one to one with the greatest sum of IoU, whatever their names.

    - mean_iou, median_iou, iou_over_50, iou_over_70: over pictures with a table; a picture's IoU is the mean over
      its true boxes, 0 for a box without partner. detection_rate: those with at least one parsed box.
    - mean_iou_boxes: the same over true boxes. name_accuracy: right names among found boxes.
    - precision, recall, f1: a box is right when matched at IoU above .5, matched for the most such pairs. A box on
      a picture without a table is wrong. ap, ap50, ap75: see `average_precision`.
    - over all pictures: format_error_rate (any text that was not used, or no prediction), unstopped_rate (ran into
      the token limit), surplus_rate (more boxes than true ones).
    - false_alarm_rate: pictures without a table that got a box.

    Bad input never changes a denominator unseen: see "problems" and `match_picture`.
    """
    pairs, problems = pair_up(truth, predictions)
    records = [match_picture(row, answer, problems) for row, answer in pairs]
    options = {"resamples": resamples, "seed": seed}
    unsure = [r["image_id"] for r in records if r["confidences"] is None]
    if len(unsure) < sum(bool(record["predicted"]) for record in records):
        problems["predictions without confidences (so AP does not rank by them)"] += unsure
    return {
        "pictures": len(records),
        "summary": _summary(records, **options),
        "first_50": _summary(records[:50], **options),
        "by_category": _by_box(records, _category_groups(records), **options),
        "by_size": _by_box(records, _size_groups(records), **options),
        "by_rotation": _by_rotation(records, **options),
        "confidence": {
            "ranks": has_confidences(records),
            "reliability": reliability(records),
            "precision_95": threshold_for_precision(records),
        },
        "problems": {kind: names for kind, names in problems.items() if names},
        "per_picture": records,
    }


def _summary(records: list[dict], resamples: int, seed: int) -> dict:
    """The headline numbers of some pictures."""
    options = {"resamples": resamples, "seed": seed}
    tables = [record for record in records if record["box_ious"]]
    bare = [record for record in records if not record["box_ious"]]
    stopped = [record for record in records if record["stopped"] is not None]
    true_boxes = [np.array(record["true"]).reshape(-1, 4) for record in records]
    rate = partial(_rate, resamples=resamples, seed=seed)
    return {
        **_picture_metrics(tables, **options),
        **_box_metrics(records, **options),
        **average_precision(records, true_boxes, **options),
        "format_error_rate": rate(records, lambda r: r["format_error"]),
        "unstopped_rate": rate(stopped, lambda r: not r["stopped"]),
        "surplus_rate": rate(records, lambda r: r["surplus"] > 0),
        "false_alarm_rate": rate(bare, lambda r: len(r["predicted"]) > 0),
    }


def _rate(records: list[dict], holds: Callable[[dict], bool], resamples: int, seed: int) -> dict:
    return interval(mean, [holds(record) for record in records], rate=True, resamples=resamples, seed=seed)


def _picture_metrics(tables: list[dict], **options) -> dict:
    """The published metrics, over pictures with a table."""
    iou = np.array([record["iou"] for record in tables])
    return {
        "mean_iou": interval(mean, iou, **options),
        "median_iou": interval(median, iou, **options),
        "detection_rate": _rate(tables, lambda r: r["detected"], **options),
        "iou_over_50": _rate(tables, lambda r: r["iou"] > 0.5, **options),
        "iou_over_70": _rate(tables, lambda r: r["iou"] > 0.7, **options),
    }


def _box_metrics(records: list[dict], **options) -> dict:
    """Metrics over boxes, pictures without a table included; resampled by picture."""

    def total(key: str) -> np.ndarray:
        return np.array([np.sum(record[key]) for record in records], dtype=float)

    true = np.array([len(record["box_ious"]) for record in records], dtype=float)
    predicted = np.array([len(record["predicted"]) for record in records], dtype=float)
    found = total("box_found")
    n_true, n_predicted, n_found = int(true.sum()), int(predicted.sum()), int(found.sum())
    return {
        "mean_iou_boxes": interval(ratio, total("box_ious"), true, n=n_true, **options),
        "precision": interval(ratio, found, predicted, n=n_predicted, rate=True, **options),
        "recall": interval(ratio, found, true, n=n_true, rate=True, **options),
        "f1": interval(ratio, 2 * found, true + predicted, n=n_true, rate=True, **options),
        "name_accuracy": interval(ratio, total("box_named"), found, n=n_found, rate=True, **options),
    }


def _by_box(records: list[dict], groups: dict[str, list[list[int]]], **options) -> dict:
    """Mean IoU, recall at .5 and right names for groups of true boxes; a group lists its boxes per picture."""
    result = {}
    for name, members in groups.items():

        def total(key: str, members: list = members) -> np.ndarray:
            picked = zip(records, members, strict=True)
            return np.array([sum(record[key][i] for i in boxes) for record, boxes in picked], dtype=float)

        count = np.array([len(boxes) for boxes in members], dtype=float)
        found = total("box_found")
        n, n_found = int(count.sum()), int(found.sum())
        result[name] = {
            "mean_iou_boxes": interval(ratio, total("box_ious"), count, n=n, **options),
            "recall": interval(ratio, found, count, n=n, rate=True, **options),
            "name_accuracy": interval(ratio, total("box_named"), found, n=n_found, rate=True, **options),
        }
    return result


def _category_groups(records: list[dict]) -> dict[str, list[list[int]]]:
    names = sorted({name for record in records for name in record["box_categories"]})
    return {name: [[i for i, c in enumerate(r["box_categories"]) if c == name] for r in records] for name in names}


def _size_groups(records: list[dict]) -> dict[str, list[list[int]]]:
    return {
        name: [[i for i, share in enumerate(record["box_areas"]) if low <= share < high] for record in records]
        for name, (low, high) in SIZES.items()
    }


def _by_rotation(records: list[dict], **options) -> dict:
    """The per-picture metrics by the turn of the picture in degrees, "unknown" where the truth does not say."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        if record["box_ious"]:
            turn = "unknown" if record["rotation"] is None else str(record["rotation"])
            groups.setdefault(turn, []).append(record)
    return {turn: _picture_metrics(groups[turn], **options) for turn in sorted(groups, key=lambda t: (len(t), t))}
