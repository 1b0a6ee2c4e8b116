"""The parts of a large job's answers as one file, and as COCO results."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from helpers.boxes import CATEGORIES
from helpers.files import write_text


def join(output: Path, parts: list[Path], coco: bool) -> dict[str, int]:
    """All `parts` (JSON lines) as `output/predictions.jsonl`, and with `coco` as COCO results; counts what is in them.

    An answer that never stopped was cut off at the limit of tokens: it may lack boxes.

    `coco_images.json` numbers pictures and categories as COCO's `loadRes` wants them, and `coco_results.json` has the
    boxes, [x, y, width, height] in pixels, with the confidence as score; boxes of other names than `CATEGORIES` are
    left out of it.
    """
    counts = {"pictures": 0, "with a box": 0, "without": 0, "unreadable": 0, "never stopped": 0}
    images, results = [], []
    joined = output / f"predictions.jsonl.part-{os.getpid()}"
    try:
        with joined.open("w") as file:
            for part in parts:
                text = part.read_text()
                file.write(text)
                for line in (json.loads(written) for written in text.split("\n") if written):
                    counts["pictures"] += 1
                    counts["unreadable" if "error" in line else "with a box" if line["boxes"] else "without"] += 1
                    counts["never stopped"] += "error" not in line and not line["stopped"]
                    if coco:
                        images.append({"id": counts["pictures"], "file_name": line["image_id"],
                                       "width": line["width"], "height": line["height"]})
                        results += _coco_results(line, counts["pictures"])
        joined.replace(output / "predictions.jsonl")
    except OSError:
        joined.unlink(missing_ok=True)
        raise
    if coco:
        categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES)]
        write_text(output / "coco_images.json",
                   json.dumps({"images": images, "annotations": [], "categories": categories}))
        write_text(output / "coco_results.json", json.dumps(results))
    return counts


def _coco_results(line: dict, number: int) -> Iterator[dict]:
    width, height = line["width"], line["height"]
    for label, (x0, y0, x1, y1), score in zip(line["labels"], line["boxes"], line["confidences"], strict=True):
        if label in CATEGORIES:
            box = [round(value, 2) for value in (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)]
            yield {"image_id": number, "category_id": CATEGORIES.index(label), "bbox": box, "score": score}
