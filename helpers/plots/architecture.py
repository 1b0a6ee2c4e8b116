"""What the model makes of a picture: patches, tokens, positions, attention; and shares of a whole."""

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image as Shown
from matplotlib import patheffects
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL.Image import Image

from helpers.plots.figure import COLOURS, charts, finish, new_figure
from helpers.plots.photos import DASHED, PREDICTION, TRUTH

PATCH, MERGE = 14, 2  # pixels; patches that make a token, each way
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
_HALO = [patheffects.withStroke(linewidth=2, foreground="white")]
_BOX_HALO = [patheffects.withStroke(linewidth=3.4, foreground="white"), patheffects.Normal()]


def patch_grid(image: Image, grid: Sequence[int], token: tuple[int, int]) -> Shown:
    """A picture under its grid of patches (thin) and image tokens (thick); beside it one token, its patches numbered.

    `image` has the size that the processor gave it; `grid`: (frames, rows, columns) in patches; `token`: (row, column)
    of the image token that is shown large. The numbers are the patches' places in the processor's sequence.
    """
    rows, columns = int(grid[1]), int(grid[2])
    side = PATCH * MERGE
    figure, ((whole, large),) = new_figure(1, 2, (7.2, 3.8))
    for axes in (whole, large):
        axes.imshow(image, extent=(0, columns * PATCH, rows * PATCH, 0))
        axes.set_axis_off()
        for step, width in ((PATCH, 0.3), (side, 1.1)):
            axes.vlines(np.arange(0, columns * PATCH + 1, step), 0, rows * PATCH, color="white", linewidth=width)
            axes.hlines(np.arange(0, rows * PATCH + 1, step), 0, columns * PATCH, color="white", linewidth=width)
    top, left = token[0] * side, token[1] * side
    for axes in (whole, large):
        axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=COLOURS[1], linewidth=2.5))
    first = (token[0] * (columns // MERGE) + token[1]) * MERGE**2
    for i in range(MERGE**2):
        centre = left + PATCH * (i % MERGE + 0.5), top + PATCH * (i // MERGE + 0.5)
        large.text(*centre, str(first + i), ha="center", va="center", fontsize=12, path_effects=_HALO)
    large.set(xlim=(left - PATCH, left + side + PATCH), ylim=(top + side + PATCH, top - PATCH))
    whole.set_title(f"{rows} × {columns} patches, {rows // MERGE} × {columns // MERGE} image tokens", fontsize=9)
    large.set_title(f"token {first // MERGE**2} and its {MERGE**2} patches", fontsize=9)
    return finish(figure, photos=True)


def positions_on_picture(image: Image, positions: ArrayLike, seen: ArrayLike, shape: tuple[int, int]) -> Shown:
    """M-RoPE positions: on the picture, and along the sequence.

    `positions` int [3, T]: time, height, width of each token of one sequence; `seen` bool [T]: which are image tokens;
    `shape`: their rows and columns. Each cell of the picture shows height above width, where there is room for it.
    """
    positions, seen, (rows, columns) = np.asarray(positions), np.asarray(seen), shape
    figure, ((left, right),) = new_figure(1, 2, (9, 4))
    left.imshow(image, extent=(0, columns, rows, 0), alpha=0.6, aspect=image.height * columns / image.width / rows)
    left.vlines(np.arange(columns + 1), 0, rows, color="white", linewidth=0.8)
    left.hlines(np.arange(rows + 1), 0, columns, color="white", linewidth=0.8)
    if max(shape) <= 16:
        for i, (_, height, width) in enumerate(positions[:, seen].T):
            place = i % columns + 0.5, i // columns + 0.5
            left.text(*place, f"{height}\n{width}", ha="center", va="center", fontsize=6, linespacing=0.9,
                      path_effects=_HALO)  # fmt: skip
    time = positions[0, seen]
    left.set_title(f"height above width of each image token (time: {time.min()})", fontsize=9)
    left.set_axis_off()
    axis_names, styles = ("time", "height", "width"), (".", "-", "-")
    for name, line, colour, style in zip(axis_names, positions, COLOURS, styles, strict=False):
        right.plot(line, style, color=colour, label=name, linewidth=1.2, markersize=3)
    first, last = np.flatnonzero(seen)[[0, -1]]
    right.axvspan(first - 0.5, last + 0.5, color="0.92", zorder=0)
    right.text((first + last) / 2, 0.98 * positions.max(), "picture", ha="center", va="top", fontsize=8, color="0.3")
    right.set(xlabel="place in the sequence", ylabel="position")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8, frameon=False, loc="upper left")
    return finish(figure)


def attention_maps(
    image: Image, maps: Mapping[str, ArrayLike], truth: ArrayLike = (), predicted: ArrayLike = ()
) -> Shown:
    """Attention over a picture, one panel a map [rows, columns] with its own scale; truth solid, answer dashed.

    Boxes are [N, 4] x-first in 0-1. A panel's title ends with the largest share of attention that one token gets.
    """
    figure, (line,) = new_figure(1, len(maps), (2.3 * len(maps), 3.2 * image.height / max(image.size) + 0.4))
    grey = image.convert("L").convert("RGB")
    for axes, (title, values) in zip(line, maps.items(), strict=True):
        values = np.asarray(values, dtype=float)
        rows, columns = values.shape
        extent, aspect = (0, 1, 1, 0), image.height / image.width
        axes.imshow(grey, extent=extent, aspect=aspect)
        axes.imshow(values, extent=extent, aspect=aspect, cmap="inferno", vmin=0,
                    alpha=np.clip(values / values.max() * 0.85 + 0.1, 0, 0.9), interpolation="nearest")  # fmt: skip
        for boxes, colour, dashes in ((truth, TRUTH, "-"), (predicted, PREDICTION, DASHED)):
            for x0, y0, x1, y1 in np.asarray(boxes, dtype=float).reshape(-1, 4):
                style = {"fill": False, "edgecolor": colour, "linestyle": dashes, "linewidth": 1.8}
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, clip_on=False, path_effects=_BOX_HALO, **style))
        axes.set_title(f"{title} (≤ {100 * values.max():.0f} %)", fontsize=9)
        axes.set_axis_off()
    return finish(figure, photos=True)


def shares(rows: Mapping[str, Mapping[str, float]]) -> Shown:
    """One bar a row, split into the shares of its parts; the row's total stands under its name.

    `rows`: name (with the unit of its amounts) -> {part: amount}; the same parts in the same order in all rows.
    """
    figure, ((axes,),) = new_figure(1, 1, (7.6, 0.42 * len(rows) + 1.2))
    parts = list(next(iter(rows.values())))
    for y, amounts in enumerate(rows.values()):
        total, start = sum(amounts.values()), 0.0
        for i, part in enumerate(parts):
            share = 100 * amounts[part] / total
            style = {"color": COLOURS[i % 6] if i % 6 != 4 else "0.75", "hatch": HATCHES[i % 7], "edgecolor": "white"}
            axes.barh(y, share, left=start, height=0.7, label=part if y == 0 else None, **style)
            if share >= 6:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
                axes.text(start + share / 2, y, f"{share:.0f} %", ha="center", va="center", fontsize=7.5, bbox=box)
            start += share
    totals = [sum(amounts.values()) for amounts in rows.values()]
    names = [f"{name}: {total:,.0f}" if total >= 100 else f"{name}: {total:.3g}"
             for name, total in zip(rows, totals, strict=True)]  # fmt: skip
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set(xlim=(0, 100), xlabel="share, %")
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=3)
    return finish(figure)


def by_layer(lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, *, level: float | None = None) -> Shown:
    """One line a name over the layers, 0 first; `level` draws a grey line to compare with."""
    figure, (axes,) = charts(1, (5, 2.8))
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(values, "os^Dv*"[i % 6] + "-", color=COLOURS[i % 6], markersize=4, linewidth=1.4, label=name)
    if level is not None:
        axes.axhline(level, color="0.6", linewidth=0.9, zorder=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    return finish(figure)
