"""What is found in photos, and how long callers wait for it, drawn."""

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image as Shown
from PIL.Image import Image

from helpers.plots.figure import COLOURS, charts, finish, new_figure
from helpers.plots.photos import draw_boxes

Found = tuple[Image, Sequence[tuple[tuple[int, int, int, int], str]], Sequence[tuple[Image, str]]]


def waiting(seconds: Mapping[int, Sequence[float]], rates: Mapping[int, float]) -> Shown:
    """Left every request's seconds, right the pictures a second, both by the number of callers at the same time."""
    figure, (left, right) = charts(2, (9, 3.4))
    places = range(len(seconds))
    for place, waited in zip(places, seconds.values(), strict=True):
        spread = np.linspace(-0.18, 0.18, len(waited)) if len(waited) > 1 else [0]
        left.plot(place + np.asarray(spread), waited, "o", color=COLOURS[0], markersize=4, alpha=0.7)
        left.plot([place - 0.28, place + 0.28], [np.median(waited)] * 2, color=COLOURS[1], linewidth=2,
                  label="median" if place == 0 else None)
    left.set_ylabel("seconds until the answer")
    left.set_ylim(0)
    left.legend(frameon=False, loc="upper left")
    right.bar(places, list(rates.values()), color=COLOURS[0], width=0.6)
    right.set_ylabel("pictures a second")
    for axes in (left, right):
        axes.set_xticks(list(places), [str(callers) for callers in seconds])
        axes.set_xlabel("callers at the same time")
        axes.grid(axis="x", visible=False)
    return finish(figure, None)


def found(photos: Sequence[Found], pixels: int = 320) -> Shown:
    """A column for each (picture, [(box in pixels, label)], [(crop, label)]): the picture, below it its first crop."""
    figure, grid = new_figure(2, len(photos), (2 * len(photos), 4.6))
    for (above, below), (picture, boxes, crops) in zip(grid.T, photos, strict=True):
        unit = np.array([box for box, _ in boxes], dtype=float).reshape(-1, 4) / (*picture.size, *picture.size)
        draw_boxes(above, picture, predicted=unit, title="\n".join(label for _, label in boxes) or "no box",
                   pixels=pixels)
        below.set_axis_off()
        if crops:
            small = crops[0][0].copy()
            small.thumbnail((pixels, pixels))
            below.imshow(small, interpolation="nearest")
    return finish(figure, None, photos=True)
