"""The evaluator against numbers that another project published, from that project's raw outputs.

The file is a CSV with a line a picture: image_id, iou (that project's), prediction (raw text), pred_boxes
([[x0, y0, x1, y1]] in 0-1, that project's parsing), gt_boxes ([[y0, x0, y1, x1]] in 0-1).

How the definitions differ. There, the IoU of a true box is that with its best prediction, and one prediction may serve
several true boxes; the iou column is its mean over a picture's true boxes, and the published mean (.590 for the
zero-shot model) is over all 130 true boxes of 123 pictures, so that the column's own mean is another (.607). Here a
prediction serves one true box at most (.589 over boxes, .606 over pictures). Surplus boxes lower neither mean.
F1 at .5 is the same in both (.654).
"""

import csv
import json
from pathlib import Path

import numpy as np

from helpers.boxes import pairwise_iou, yxyx_unit_to_xyxy_unit
from helpers.evaluate.scoring import score


def read_reference(path: str | Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Truth rows, predictions with nothing but the raw text, and the file's own columns, line by line."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"image_id", "iou", "prediction", "pred_boxes", "gt_boxes"} <= lines[0].keys():
        raise ValueError(f"{path}: expected the columns image_id, iou, prediction, pred_boxes, gt_boxes")
    truth, predictions, published = [], [], []
    for line in lines:
        boxes = json.loads(line["gt_boxes"])
        objects = {"bbox": boxes, "category_id": [0] * len(boxes), "category_name": ["nutrition-table"] * len(boxes)}
        truth.append({"image_id": line["image_id"], "objects": objects})
        predictions.append({"image_id": line["image_id"], "text": line["prediction"]})
        published.append({"iou": float(line["iou"]), "boxes": json.loads(line["pred_boxes"])})
    return truth, predictions, published


def best_iou_with_reuse(truth_yxyx: list, boxes_xyxy: list) -> list[float]:
    """That project's IoU of each true box: its best prediction, and one prediction may serve several true boxes."""
    iou = pairwise_iou(yxyx_unit_to_xyxy_unit(truth_yxyx), boxes_xyxy)
    return (iou.max(axis=1) if iou.shape[1] else np.zeros(len(iou))).tolist()


def check_reference(path: str | Path) -> dict:
    """This evaluator and that project's definitions, both from the raw text, beside the file's own columns."""
    truth, predictions, published = read_reference(path)
    result = score(truth, predictions, resamples=0)
    records = result["per_picture"]
    per_box = [
        best_iou_with_reuse(row["objects"]["bbox"], record["predicted"])
        for row, record in zip(truth, records, strict=True)
    ]
    per_picture = np.array([np.mean(ious) for ious in per_box])
    column = np.array([line["iou"] for line in published])
    same = sum(r["predicted"] == line["boxes"] for r, line in zip(records, published, strict=True))
    ours = {name: metric["value"] for name, metric in result["summary"].items()}
    return {
        "pictures": len(truth),
        "true boxes": sum(map(len, per_box)),
        "pictures parsed to the file's boxes": same,
        "pictures with text that was not used": sum(record["format_error"] for record in records),
        "file's iou column, mean over pictures": float(column.mean()),
        "theirs: best prediction of each true box, mean over pictures": float(per_picture.mean()),
        "theirs, greatest distance to the column": float(np.abs(per_picture - column).max()),
        "theirs, mean over true boxes": float(np.mean(np.concatenate(per_box))),
        "ours: one to one, mean over pictures": ours["mean_iou"],
        "ours, mean over true boxes": ours["mean_iou_boxes"],
        "ours, median over pictures": ours["median_iou"],
        "precision at .5": ours["precision"],
        "recall at .5": ours["recall"],
        "F1 at .5": ours["f1"],
        "AP / AP50 / AP75, boxes not ranked": [ours["ap"], ours["ap50"], ours["ap75"]],
    }
