"""What an audit found, as pictures: on one figure, and for the page of `make data`."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from IPython.display import Image as Shown
from PIL import Image, ImageDraw, ImageOps

from helpers.data import RULES, Audit, Fault, raw_truth
from helpers.data.pictures import as_rgb, open_picture
from helpers.plots.photos import panels

SIDE = 400  # pixels of a shown picture's longer side


def examples(raw: datasets.DatasetDict, audit: Audit, each: int) -> Iterator[tuple[Fault, str, dict, np.ndarray]]:
    """Of each kind of fault the first `each`: the fault, "2 of 7", its raw row with the picture undecoded, and those of
    the row's boxes that can be drawn, float [N, 4] y first."""
    for rule in RULES:
        found = [fault for fault in audit.faults if fault.fault == rule.fault]
        for number, fault in enumerate(found[:each], 1):
            row = raw[fault.split].select([fault.index]).cast_column("image", datasets.Image(decode=False))
            boxes = np.array(raw_truth(row)[0]["objects"]["bbox"], float).reshape(-1, 4)
            yield fault, f"{number} of {len(found)}", row[0], boxes[np.isfinite(boxes).all(axis=1)]


def shown(image: dict[str, Any] | None) -> Image.Image:
    """An undecoded picture as EXIF shows it, small. Raises what Pillow's readers raise: many kinds."""
    with open_picture(image or {"bytes": b"", "path": None}) as picture:
        picture.draft("RGB", (SIDE, SIDE))
        small = ImageOps.exif_transpose(as_rgb(picture))
    small.thumbnail((SIDE, SIDE))
    return small


def audit_sheet(raw: datasets.DatasetDict, audit: Audit, *, each: int = 3) -> Shown:
    """For each kind of fault the first `each` pictures that have it, with the boxes of the raw rows.

    A picture that cannot be read is a grey field. A caption says the fault, its number among all of its kind, the
    split and the picture's id.
    """
    pictures = []
    for fault, number, row, boxes in examples(raw, audit, each):
        try:
            picture = shown(row["image"])
        except Exception:  # the audit has named this picture
            picture, boxes = Image.new("RGB", (120, 90), "#e1e1e1"), boxes[:0]
            ImageDraw.Draw(picture).text((60, 45), "cannot be read", "black", anchor="mm")
        name = fault.image_id if len(fault.image_id) <= 20 else f"…{fault.image_id[-19:]}"
        caption = f"{fault.fault} {number}\n{fault.split} {name}"
        pictures.append((caption, picture, boxes[:, [1, 0, 3, 2]].clip(-0.05, 1.05), []))
    nothing = ("the audit found nothing", Image.new("RGB", (120, 20), "white"), [], [])
    return panels(pictures or [nothing], columns=6, names=("", ""))
