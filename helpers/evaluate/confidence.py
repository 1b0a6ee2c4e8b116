"""What a confidence is worth: average precision, reliability, and the threshold for a wanted precision."""

import contextlib
import io

import numpy as np
import pandas as pd
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.evaluate.intervals import ends

AP_RESAMPLES = 500  # at most: each runs COCO's accumulate


def average_precision(records: list[dict], *, resamples: int, seed: int = 0) -> dict:
    """COCO's AP (mean over IoU .50 to .95), AP50 and AP75 by pycocotools, each with an interval over pictures.

    One class, whatever the names, unless the records were matched by class: then boxes of all classes are ranked in
    one list, and each is right for its own class alone. All pictures take part, also those without a table. `records`
    are `match_picture`'s. Boxes are ranked by confidence where every record has them, else by their place in the file.
    Returns `{"ap", "ap50", "ap75"}`, each `{"value", "low", "high", "n"}`, n the number of true boxes.
    """
    names = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of the 10 IoU thresholds
    n = sum(len(record["true"]) for record in records)
    if n == 0:
        return {name: {"value": None, "low": None, "high": None, "n": 0} for name in names}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = _coco_eval(records)
        pictures = list(coco.evalImgs)
        value = _precision(coco, pictures)
        draw = np.random.default_rng(seed).integers(len(pictures), size=(min(resamples, AP_RESAMPLES), len(pictures)))
        drawn = [_precision(coco, [pictures[i] for i in np.sort(some)]) for some in draw]
    result = {}
    for name, rows in names.items():
        low, high = ends([some[rows].mean() for some in drawn]) if drawn and len(pictures) > 1 else (None, None)
        result[name] = {"value": float(value[rows].mean()), "low": low, "high": high, "n": n}
    return result


def _coco_eval(records: list[dict]) -> COCOeval:
    """pycocotools' evaluation of one class over all sizes; `evalImgs` has one entry a picture.

    Boxes matched by class are moved so far apart, class by class, that those of two never overlap.
    """
    ranked, names = has_confidences(records), {"true": "box_categories", "predicted": "predicted_categories"}
    known = sorted({name for record in records if record["by_class"] for key in names.values() for name in record[key]})
    truth, found = COCO(), COCO()
    images = [{"id": picture} for picture in range(1, len(records) + 1)]  # id 0 would read as "no match"
    for coco, boxes in ((truth, "true"), (found, "predicted")):
        coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": []}
        for picture, record in enumerate(records, 1):
            for i, (x0, y0, x1, y1) in enumerate(record[boxes]):
                apart = 10 * known.index(record[names[boxes]][i]) if record["by_class"] else 0
                coco.dataset["annotations"].append({
                    "id": len(coco.dataset["annotations"]) + 1, "image_id": picture, "category_id": 1, "iscrowd": 0,
                    "bbox": [x0 + apart, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                    "score": record["confidences"][i] if ranked and coco is found else 1.0,
                })  # fmt: skip
        coco.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    return evaluation


def _precision(coco: COCOeval, pictures: list) -> np.ndarray:
    """COCO's AP at each IoU threshold [10] of these entries of `evalImgs`; 0 where they hold no true box."""
    coco.evalImgs = pictures
    coco.accumulate()
    return np.maximum(coco.eval["precision"][:, :, 0, 0, 0].mean(axis=1), 0)


def has_confidences(records: list[dict]) -> bool:
    """Whether every picture's boxes carry a confidence, and there is a box at all."""
    return any(record["predicted"] for record in records) and all(r["confidences"] is not None for r in records)


def _confident_boxes(records: list[dict]) -> pd.DataFrame:
    """A row a predicted box: its confidence, and whether it is right, 0 or 1."""
    return pd.DataFrame({name: np.concatenate([record[key] for record in records]).astype(float) for name, key in
                         (("confidence", "confidences"), ("right", "predicted_correct"))})


def reliability(records: list[dict]) -> dict | None:
    """Confidence against the share of right boxes (IoU above .5): the data of a reliability diagram.

    Returns `{"bins": [{"confidence", "right", "n"}], "ece"}`, ten bins of equal width and only those that hold a box;
    `ece` is the expected calibration error, the mean gap weighted by n. None without confidences.
    """
    if not has_confidences(records):
        return None
    boxes = _confident_boxes(records)
    grouped = boxes.groupby(np.minimum((boxes.confidence * 10).astype(int), 9))
    bins = grouped.mean().assign(n=grouped.size())
    gap = (bins.confidence - bins.right).abs() * bins.n
    return {"bins": bins.to_dict("records"), "ece": float(gap.sum() / len(boxes))}


def threshold_for_precision(records: list[dict], precision: float = 0.95) -> dict | None:
    """The lowest confidence at which the boxes kept (at or above it) reach the wanted precision at IoU .5.

    To be chosen on `selection` and used on `val`. Returns `{"threshold", "precision", "recall", "kept"}`;
    None without confidences or where no threshold reaches it.
    """
    if not has_confidences(records):
        return None
    boxes, true = _confident_boxes(records), sum(len(record["true"]) for record in records)
    for threshold in np.unique(boxes.confidence):
        right = boxes.right[boxes.confidence >= threshold]
        if right.mean() >= precision:
            return {"threshold": float(threshold), "precision": float(right.mean()),
                    "recall": float(right.sum() / true) if true else None, "kept": len(right)}
    return None


def keep_confident(predictions: list[dict], threshold: float) -> list[dict]:
    """The predictions without the boxes whose confidence is under the threshold."""
    kept = []
    for line in predictions:
        keep = [i for i, value in enumerate(line["confidences"]) if value >= threshold]
        kept.append(line | {name: [line[name][i] for i in keep] for name in ("labels", "boxes", "confidences")})
    return kept
