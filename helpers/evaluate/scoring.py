"""Every number of a run, from its truth and predictions alone. The definitions stand in `score`."""

from collections.abc import Iterable

import numpy as np

from helpers.evaluate.confidence import average_precision, has_confidences, reliability, threshold_for_precision
from helpers.evaluate.intervals import RESAMPLES, interval, ratio
from helpers.evaluate.match import by_class, match_picture, pair_up

SIZES = {"below 10 %": (0.0, 0.1), "10 to 30 %": (0.1, 0.3), "30 % and more": (0.3, np.inf)}  # area of the true box


def score(truth: list[dict], predictions: list[dict], *, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """All metrics of one model's predictions; the result goes into JSON as it is.

    `truth`: rows `{"image_id", "objects": {"bbox" [[y0, x0, y1, x1]] in 0-1, "category_name"}, "rotation"?}`.
    `predictions`: `{"image_id", "boxes" [[x0, y0, x1, y1]] in 0-1, "labels", "confidences", "rejected", "stopped"}`;
    without "boxes" the completion's "text" is parsed. `resamples=0` leaves the intervals out and is fast.

    Returns "summary", "first_50" (the first 50 rows of the truth), "by_category", "by_size", "by_rotation": metric
    -> `{"value", "low", "high", "n"}`, None where undefined; "per_picture", "confidence", "problems", "pictures".

    True and predicted boxes are matched one to one with the greatest sum of IoU, whatever their names; where the truth
    has several classes of its own (`by_class`), only boxes of one name.

    - mean_iou, median_iou, iou_over_50, iou_over_70: over pictures with a table; a picture's IoU is the mean over
      its true boxes, 0 for a box without partner. detection_rate: those with at least one parsed box.
    - mean_iou_boxes: the same over true boxes. name_accuracy: right names among found boxes.
    - precision, recall, f1: a box is right when matched at IoU above .5, matched for the most such pairs. A box on
      a picture without a table is wrong. ap, ap50, ap75: see `average_precision`.
    - over all pictures: format_error_rate (any text that was not used, or no prediction), unstopped_rate (ran into
      the token limit), surplus_rate (more boxes than true ones).
    - false_alarm_rate: pictures without a table that got a box.

    Bad input never changes a denominator unnoticed: see "problems" and `match_picture`.
    """
    pairs, problems = pair_up(truth, predictions)
    named = by_class(truth)
    records = [match_picture(row, prediction, problems, named) for row, prediction in pairs]
    options = {"resamples": resamples, "seed": seed}
    unsure = [r["image_id"] for r in records if r["confidences"] is None]
    if len(unsure) < sum(bool(record["predicted"]) for record in records):
        problems["predictions without confidences (so AP does not rank by them)"] += unsure
    turns = {record["rotation"] for record in records if record["true"]}
    return {
        "pictures": len(records),
        "summary": _summary(records, **options),
        "first_50": _summary(records[:50], **options),
        "by_category": {
            name: _over_boxes(records, [[kind == name for kind in r["box_categories"]] for r in records], **options)
            for name in sorted({name for record in records for name in record["box_categories"]})
        },
        "by_size": {
            name: _over_boxes(records, [[low <= area < high for area in r["box_areas"]] for r in records], **options)
            for name, (low, high) in SIZES.items()
        },
        "by_rotation": {  # degrees, "unknown" where the truth does not say
            "unknown" if turn is None else str(turn): _over_pictures(
                [r for r in records if r["true"] and r["rotation"] == turn], **options)
            for turn in sorted(turns, key=lambda turn: (turn is None, turn))
        },
        "confidence": {
            "ranks": has_confidences(records),
            "reliability": reliability(records),
            "precision_95": threshold_for_precision(records),
        },
        "problems": {kind: names for kind, names in problems.items() if names},
        "per_picture": records,
    }  # fmt: skip


def _summary(records: list[dict], **options) -> dict:
    """The headline numbers of some pictures."""
    predicted = np.array([len(record["predicted"]) for record in records], dtype=float)
    true = np.array([len(record["true"]) for record in records], dtype=float)
    found = np.array([sum(record["box_found"]) for record in records], dtype=float)
    return {
        **_over_pictures([record for record in records if record["true"]], **options),
        **_over_boxes(records, [[True] * len(record["true"]) for record in records], **options),
        "precision": interval(ratio, found, predicted, n=int(predicted.sum()), rate=True, **options),
        "f1": interval(ratio, 2 * found, true + predicted, n=int(true.sum()), rate=True, **options),
        **average_precision(records, **options),
        "format_error_rate": _rate((r["format_error"] for r in records), **options),
        "unstopped_rate": _rate((not r["stopped"] for r in records if r["stopped"] is not None), **options),
        "surplus_rate": _rate((r["surplus"] > 0 for r in records), **options),
        "false_alarm_rate": _rate((len(r["predicted"]) > 0 for r in records if not r["true"]), **options),
    }


def _rate(holds: Iterable[bool], **options) -> dict:
    return interval(np.mean, list(holds), rate=True, **options)


def _over_pictures(tables: list[dict], **options) -> dict:
    """The published metrics, over pictures with a table."""
    iou = np.array([record["iou"] for record in tables])
    return {
        "mean_iou": interval(np.mean, iou, **options),
        "median_iou": interval(np.median, iou, **options),
        "detection_rate": _rate((record["detected"] for record in tables), **options),
        "iou_over_50": _rate(iou > 0.5, **options),
        "iou_over_70": _rate(iou > 0.7, **options),
    }


def _over_boxes(records: list[dict], chosen: list[list[bool]], **options) -> dict:
    """Mean IoU, recall at .5 and right names over the chosen true boxes of each picture, resampled by picture."""

    def total(key: str) -> np.ndarray:
        each = [np.compress(boxes, record[key]).sum() for record, boxes in zip(records, chosen, strict=True)]
        return np.array(each, dtype=float)

    count, found = np.array([sum(boxes) for boxes in chosen], dtype=float), total("box_found")
    n = int(count.sum())
    return {
        "mean_iou_boxes": interval(ratio, total("box_ious"), count, n=n, **options),
        "recall": interval(ratio, found, count, n=n, rate=True, **options),
        "name_accuracy": interval(ratio, total("box_named"), found, n=int(found.sum()), rate=True, **options),
    }


def unstopped(scored: dict) -> str:
    """How many completions of a `score` ran into the token limit, such as "8 of 123"; a dash where nothing says so."""
    rate = scored["summary"]["unstopped_rate"]
    return "–" if rate["value"] is None else f"{round(rate['value'] * rate['n'])} of {rate['n']}"


def unstopped_note(scored: dict) -> str:
    """"; 8 of 123 completions never stopped", or nothing where all did."""
    return f"; {unstopped(scored)} completions never stopped" if scored["summary"]["unstopped_rate"]["value"] else ""
