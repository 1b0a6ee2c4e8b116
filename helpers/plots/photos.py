"""Pictures with boxes drawn on them: truth solid blue, prediction dashed orange."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL.Image import Image

from helpers.data.pictures import as_rgb
from helpers.evaluate.match import by_class, match_picture, pair_up
from helpers.plots.figure import finish, new_figure

TRUTH, PREDICTION = "#0072B2", "#E69F00"
DASHED = (0, (3, 2))
BOTH = ("truth", "prediction")
_HALO = [patheffects.withStroke(linewidth=3.2, foreground="white"), patheffects.Normal()]


def draw_boxes(axes: Axes, image: Image, truth: ArrayLike = (), predicted: ArrayLike = (), *, title: str = "") -> None:
    """One picture with its true and predicted boxes, both [N, 4] x-first in 0-1; longest side scaled to 256.

    A box without area is a cross.
    """
    small = as_rgb(image)
    small.thumbnail((256, 256))
    axes.imshow(small, interpolation="nearest")
    for boxes, colour, line in ((truth, TRUTH, "-"), (predicted, PREDICTION, DASHED)):
        for x0, y0, x1, y1 in np.asarray(boxes, dtype=float).reshape(-1, 4) * (*small.size, *small.size) - 0.5:
            style = {"fill": False, "edgecolor": colour, "linestyle": line, "linewidth": 1.6}
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, clip_on=False, path_effects=_HALO, **style))
            if (x1 - x0) * (y1 - y0) == 0:
                axes.scatter((x0 + x1) / 2, (y0 + y1) / 2, 40, PREDICTION, "x", clip_on=False)
    axes.set_title(title, fontsize=8 if "\n" in title else 9)
    axes.set_axis_off()


def panels(pictures: Sequence[tuple[str, Image, ArrayLike, ArrayLike]], *, columns: int = 4,
           names: tuple[str, str] = ("truth", ""), title: str = "", path: Path | None = None) -> Shown:
    """Pictures with boxes of one's own: (title, picture, boxes in solid blue, boxes in dashed orange) each.

    Boxes are [N, 4], x first, in 0-1. `names` are the legend's words for the two kinds; "" leaves one out.
    """
    rows, columns = -(-len(pictures) // columns), min(columns, len(pictures))
    tallest = max(image.height / image.width for _, image, _, _ in pictures)
    figure, grid = new_figure(rows, columns, (max(2.2 * columns, 4.2), rows * (2.1 * min(tallest, 1.2) + 0.2) + 0.4))
    for axes, (caption, image, solid, dashed) in zip(grid.flat, pictures, strict=False):
        draw_boxes(axes, image, solid, dashed, title=caption)
    styles = zip(names, (TRUTH, PREDICTION), ("-", DASHED), strict=True)
    lines = [Line2D([], [], color=colour, lw=2, ls=line, label=name) for name, colour, line in styles if name]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return finish(figure, path, photos=True)


def gallery(rows: Iterable[dict], truth: Sequence[dict], predictions: Sequence[dict] | None = None, *,
            title: str = "") -> Shown:
    """The pictures of `rows` with their true boxes, and with predictions their boxes and IoU.

    `rows` have "image_id" and "image"; `truth` and `predictions` are those of `score` and may hold more pictures.
    """
    names = BOTH if predictions is not None else (BOTH[0], "")
    return panels(_captioned(rows, truth, predictions), columns=6, names=names, title=title)


def before_after(rows: Iterable[dict], truth: Sequence[dict], before: Sequence[dict], after: Sequence[dict], *,
                 title: str = "before (above) and after (below)", path: Path | None = None) -> Shown:
    """The pictures of `rows` twice: above with the boxes predicted before, below with those after."""
    rows = list(rows)
    both = _captioned(rows, truth, before) + _captioned(rows, truth, after)
    return panels(both, columns=len(rows), names=BOTH, title=title, path=path)


def _captioned(rows: Iterable[dict], truth: Sequence[dict], predictions: Sequence[dict] | None
               ) -> list[tuple[str, Image, ArrayLike, ArrayLike]]:
    """What `panels` takes for each row: IoU as its caption where there are predictions."""
    rows = list(rows)
    ids = {row["image_id"] for row in rows}
    pairs, problems = pair_up([line for line in truth if line["image_id"] in ids], predictions or [])
    named = by_class(truth)
    records = {line["image_id"]: match_picture(line, found, problems, named) for line, found in pairs}
    pictures = []
    for row in rows:
        record = records[row["image_id"]]
        caption = ", ".join(record["box_categories"]) if record["by_class"] else ""
        if record["iou"] is None:
            caption = "no table" + (", false alarm" if record["predicted"] else "")
        elif predictions is not None:
            found = ", ".join(record["predicted_categories"]) + " " if record["by_class"] else ""
            caption = f"{found}IoU {record['iou']:.2f}" if record["predicted"] else "no box"
        pictures.append((caption, row["image"], record["true"], record["predicted"]))
    return pictures
