"""What an audit found, as pictures."""

import datasets
import numpy as np
from IPython.display import Image as Shown
from PIL import ImageOps
from PIL.Image import Image

from helpers.data import RULES, Audit, Fault, raw_truth
from helpers.data.pictures import as_rgb, open_picture
from helpers.plots.figure import finish, new_figure
from helpers.plots.photos import PREDICTION, draw_boxes


def audit_sheet(raw: datasets.DatasetDict, audit: Audit, *, each: int = 3) -> Shown:
    """For each kind of fault the first `each` pictures that have it, with the boxes of the raw rows.

    A picture that cannot be read is a grey field, a box without area a cross. A caption says the fault, its number
    among all of its kind, the split and the picture's id.
    """
    kinds = [[fault for fault in audit.faults if fault.fault == rule.fault] for rule in RULES]
    picked = [(fault, f"{n} of {len(kind)}") for kind in kinds for n, fault in enumerate(kind[:each], 1)]
    rows, columns = max(1, -(-len(picked) // 6)), max(1, min(6, len(picked)))
    figure, grid = new_figure(rows, columns, (max(2.1 * columns, 4.2), 2.7 * rows))
    for axes, (fault, number) in zip(grid.flat, picked, strict=False):
        title = f"{fault.fault} {number}\n{fault.split} {_short(fault.image_id)}"
        picture, boxes = _raw_picture(raw, fault)
        if picture is None:
            axes.imshow(np.full((3, 4, 3), 225, np.uint8))
            axes.text(1.5, 1, "cannot be read", ha="center", va="center", fontsize=8)
            axes.set_title(title, fontsize=7)
        else:
            draw_boxes(axes, picture, boxes)
            axes.set_title(title, fontsize=7)
            middles = boxes.reshape(-1, 2, 2).mean(axis=1)[np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) == 0]
            axes.scatter(middles[:, 0], 1 - middles[:, 1], 40, PREDICTION, "x", transform=axes.transAxes, clip_on=False)
    if not picked:
        figure.suptitle("the audit found nothing", fontsize=11)
    return finish(figure, photos=True)


def _short(image_id: str) -> str:
    return image_id if len(image_id) <= 20 else f"…{image_id[-19:]}"


def _raw_picture(raw: datasets.DatasetDict, fault: Fault) -> tuple[Image | None, np.ndarray]:
    """The picture as shown, None where it cannot be read; its boxes x first that can be drawn, [N, 4] in 0-1."""
    row = raw[fault.split].select([fault.index]).cast_column("image", datasets.Image(decode=False))
    boxes = np.array(raw_truth(row)[0]["objects"]["bbox"]).reshape(-1, 4)[:, [1, 0, 3, 2]]
    try:
        picture = ImageOps.exif_transpose(as_rgb(open_picture(row[0]["image"])))
    except Exception:  # Pillow's readers raise many kinds; the audit has named this picture
        return None, boxes
    return picture, boxes[np.isfinite(boxes).all(axis=1)].clip(-0.05, 1.05)
