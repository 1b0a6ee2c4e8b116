"""What a confidence is worth: average precision, reliability, and the threshold for a wanted precision."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.evaluate.intervals import interval

_RECALLS = np.linspace(0, 1, 101)  # COCO's 101 points


def average_precision(records: list[dict], true_boxes: list[np.ndarray], *, resamples: int, seed: int = 0) -> dict:
    """COCO's AP (mean over IoU .50 to .95), AP50 and AP75 with pycocotools, each with an interval over pictures.

    One class, whatever the names; all pictures take part, also those without a table. `records` are
    `match_picture`'s; `true_boxes` the x-first unit boxes [N, 4] of the same pictures. Boxes are ranked by
    confidence where every record has them, else by their place in the file alone.
    Returns `{"ap", "ap50", "ap75"}`, each `{"value", "low", "high", "n"}`, n the number of true boxes.
    """
    n = int(sum(len(boxes) for boxes in true_boxes))
    if n == 0:
        return {name: interval(np.mean, [], n=0) for name in ("ap", "ap50", "ap75")}
    coco = _coco_eval(records, true_boxes)
    precision = coco.eval["precision"][:, :, 0, 0, 0].mean(axis=1)  # [10 thresholds]
    values = {"ap": float(precision.mean()), "ap50": float(precision[0]), "ap75": float(precision[5])}
    spread = None
    if resamples and len(records) > 1:
        fair = np.full(len(records), 1 / len(records))
        spread = _resampled(coco, np.random.default_rng(seed).multinomial(len(records), fair, size=resamples))
    result = {}
    for name, rows in (("ap", slice(None)), ("ap50", slice(0, 1)), ("ap75", slice(5, 6))):
        low, high = (
            (None, None) if spread is None else np.quantile(spread[:, rows].mean(axis=1), [0.025, 0.975]).tolist()
        )
        result[name] = {"value": values[name], "low": low, "high": high, "n": n}
    return result


def _coco_eval(records: list[dict], true_boxes: list[np.ndarray]) -> COCOeval:
    """pycocotools' evaluation of one class over all sizes, accumulated."""
    ranked = has_confidences(records)
    truth = [(picture, box) for picture, boxes in enumerate(true_boxes, 1) for box in np.asarray(boxes).tolist()]
    found = [
        (picture, box, record["confidences"][i] if ranked else 1.0)
        for picture, record in enumerate(records, 1)
        for i, box in enumerate(record["predicted"])
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "images": [{"id": picture} for picture in range(1, len(records) + 1)],  # id 0 would read as "no match"
            "categories": [{"id": 1}],
            "annotations": [_annotation(i, picture, box) for i, (picture, box) in enumerate(truth, 1)],
        }
        coco.createIndex()
        detections = COCO()
        detections.dataset = coco.dataset | {
            "annotations": [_annotation(i, p, box) | {"score": score} for i, (p, box, score) in enumerate(found, 1)]
        }
        detections.createIndex()
        evaluation = COCOeval(coco, detections, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _annotation(number: int, picture: int, box: list[float]) -> dict:
    x0, y0, x1, y1 = box
    wide, high = x1 - x0, y1 - y0
    size = {"bbox": [x0, y0, wide, high], "area": wide * high}
    return {"id": number, "image_id": picture, "category_id": 1, "iscrowd": 0} | size


def _resampled(coco: COCOeval, drawn: np.ndarray) -> np.ndarray:
    """AP at each threshold [R, 10] when each picture counts as often as `drawn` [R, pictures] says."""
    found = [(i, e) for i, e in enumerate(coco.evalImgs) if e is not None]
    picture = np.array([i for i, e in found for _ in e["dtScores"]], dtype=int)  # [detections]
    scores = np.array([score for _, e in found for score in e["dtScores"]])
    hits = np.concatenate([np.zeros((10, 0)), *[e["dtMatches"] > 0 for _, e in found]], axis=1)  # [10, detections]
    true = np.zeros(len(coco.evalImgs))
    for i, e in found:
        true[i] = len(e["gtIds"])
    order = np.argsort(-scores, kind="mergesort")
    picture, hits = picture[order], hits[:, order]
    return np.array([_precision_at_recalls(hits, times[picture], times @ true) for times in drawn])


def _precision_at_recalls(hits: np.ndarray, times: np.ndarray, true: float) -> np.ndarray:
    """Interpolated AP at each threshold [10]; detections count as often as their picture was drawn."""
    if true == 0 or not len(times):
        return np.zeros(len(hits))
    right = np.cumsum(hits * times, axis=1)
    precision = right / np.maximum(np.cumsum(times), 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(hits), 1))], axis=1)  # recall that is never reached
    return np.array([p[np.searchsorted(r, _RECALLS)].mean() for p, r in zip(precision, right / true, strict=True)])


def has_confidences(records: list[dict]) -> bool:
    """Whether every picture's boxes carry a confidence, and there is a box at all."""
    return any(record["predicted"] for record in records) and all(r["confidences"] is not None for r in records)


def _confident_boxes(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence [D] and whether the box is right [D] for every predicted box."""
    pairs = [pair for r in records for pair in zip(r["confidences"], r["predicted_correct"], strict=True)]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)


def reliability(records: list[dict]) -> dict | None:
    """Confidence against the share of right boxes (IoU above .5): the data of a reliability diagram.

    Returns `{"bins": [{"low", "high", "confidence", "right", "n"}], "ece"}`, ten bins of equal width and only those
    that hold a box; `ece` is the expected calibration error, the mean gap weighted by n. None without confidences.
    """
    if not has_confidences(records):
        return None
    confidence, right = _confident_boxes(records)
    place = np.minimum((confidence * 10).astype(int), 9)
    rows = [
        {
            "low": i / 10,
            "high": (i + 1) / 10,
            "confidence": float(confidence[place == i].mean()),
            "right": float(right[place == i].mean()),
            "n": int((place == i).sum()),
        }
        for i in np.unique(place)
    ]
    gaps = [abs(row["confidence"] - row["right"]) * row["n"] for row in rows]
    return {"bins": rows, "ece": sum(gaps) / len(confidence)}


def threshold_for_precision(records: list[dict], precision: float = 0.95) -> dict | None:
    """The lowest confidence at which the boxes kept (at or above it) reach the wanted precision at IoU .5.

    To be chosen on `selection` and used on `val`. Returns `{"threshold", "precision", "recall", "kept"}`;
    None without confidences or where no threshold reaches it.
    """
    if not has_confidences(records):
        return None
    confidence, right = _confident_boxes(records)
    true = sum(len(record["box_ious"]) for record in records)
    for threshold in np.unique(confidence):
        kept = confidence >= threshold
        if right[kept].mean() >= precision:
            recall = float(right[kept].sum() / true) if true else None
            measured = {"precision": float(right[kept].mean()), "recall": recall, "kept": int(kept.sum())}
            return {"threshold": float(threshold)} | measured
    return None


def keep_confident(predictions: list[dict], threshold: float) -> list[dict]:
    """The predictions without the boxes whose confidence is under the threshold (or not a number)."""
    kept = []
    for answer in predictions:
        keep = [i for i, value in enumerate(answer["confidences"]) if value is not None and value >= threshold]
        fields = {name: [answer[name][i] for i in keep] for name in ("labels", "boxes", "confidences")}
        kept.append(answer | fields)
    return kept
