"""Figures of the detector."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown
from PIL import Image

from helpers.boxes import cxcywh_unit_to_xyxy_unit, yxyx_unit_to_xyxy_unit
from helpers.plots.figure import finish, new_figure
from helpers.plots.photos import draw_boxes


def as_seen(rows: Sequence[Mapping], batch: Mapping, *, path: Path | None = None) -> Shown:
    """Each row's photo with its boxes, and beside it the square that the detector sees with the boxes of its label.

    `batch` is what `detector.Collator` made of `rows`: "pixel_values" [B, 3, H, W] in 0-1 and "labels".
    """
    figure, grid = new_figure(1, 2 * len(rows), (2.3 * 2 * len(rows), 2.6))
    together = zip(rows, batch["pixel_values"], batch["labels"], grid[0][::2], grid[0][1::2], strict=True)
    for row, pixels, label, photo, seen in together:
        image = Image.fromarray((255 * pixels.permute(1, 2, 0).clamp(0, 1).numpy()).astype(np.uint8))
        draw_boxes(photo, row["image"], yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]),
                   title=f"{row['width']} × {row['height']} px")
        draw_boxes(seen, image, cxcywh_unit_to_xyxy_unit(label["boxes"].numpy()),
                   title=f"seen: {image.width} × {image.height} px")
    return finish(figure, path, photos=True)
