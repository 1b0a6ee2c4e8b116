"""Charts of a data set: sizes of pictures and boxes, where boxes lie, and how many pictures tell two recipes apart."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image as Shown
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from helpers.plots.figure import COLOURS, LINES, charts, finish, new_figure


def picture_sizes(splits: Mapping[str, Sequence[tuple[int, int]]]) -> Shown:
    """Sizes (width, height) in px of each split's pictures: which there are, and how wide they are for their height."""
    figure, (left, right) = charts(2, (9, 3.2))
    for i, (name, sizes) in enumerate(splits.items()):
        many = Counter(sizes)
        points = np.array(list(many), dtype=float).reshape(-1, 2)
        area = 500 * np.array(list(many.values())) / max(len(sizes), 1)
        left.scatter(*points.T, s=np.maximum(area, 6), facecolor="none", edgecolor=COLOURS[i % 6], label=name)
        shares = np.sort([width / height for width, height in sizes])
        if len(shares):
            steps = np.arange(1, len(shares) + 1) / len(shares)
            style = {"color": COLOURS[i % 6], "linestyle": LINES[i % 6]}
            right.step(shares, steps, where="post", label=f"{name} (n = {len(shares)})", **style)
    left.set(xlabel="width, px (circle: share of the split)", ylabel="height, px")
    left.set_aspect("equal", "datalim")
    right.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    right.set(xlabel="width / height (1: square)", ylabel="share of pictures below", xscale="log", ylim=(0, 1.02))
    right.set_xticks([0.5, 0.75, 1, 1.33, 2], ["0.5", "0.75", "1", "1.33", "2"])
    right.set_xticks([], minor=True)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    return finish(figure)


def spreads(
    measured: Mapping[str, ArrayLike],
    reference: Mapping[str, Mapping[float, float]] | None = None,
    *,
    log: Sequence[str] = (),
    names: tuple[str, str] = ("measured", "reference"),
) -> Shown:
    """For each quantity the share of values below, and a reference's quantiles {share: value} as points beside it.

    `log`: the quantities on a logarithmic axis.
    """
    figure, grid = charts(len(measured), (2.7 * len(measured), 2.9))
    for axes, (quantity, values) in zip(grid, measured.items(), strict=True):
        values = np.sort(np.asarray(values, dtype=float))
        shares = np.arange(1, len(values) + 1) / len(values)
        axes.step(values, shares, where="post", color=COLOURS[0], label=names[0])
        points = (reference or {}).get(quantity, {})
        axes.plot(list(points.values()), list(points), "o", color=COLOURS[1], markerfacecolor="white", label=names[1])
        axes.set(xlabel=quantity, ylim=(0, 1.02))
        if quantity in log:
            low, high = axes.get_xlim()
            axes.set_xscale("log", base=2)
            axes.set_xlim(max(low, values[0] / 1.1), high)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    grid[0].set_ylabel("share of boxes below")
    handles, labels = grid[0].get_legend_handles_labels()
    wanted = 2 if reference else 1
    figure.legend(handles[:wanted], labels[:wanted], loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return finish(figure)


def position_maps(groups: Mapping[str, ArrayLike], marked: ArrayLike = ()) -> Shown:
    """Where boxes lie: for each group of boxes [N, 4] (x first, 0-1) the share of them that covers a place.

    `marked`: boxes drawn into every map, dashed. All maps share one scale of colours and are drawn square.
    """
    maps = {name: coverage(boxes) for name, boxes in groups.items()}
    figure, grid = new_figure(1, len(maps), (2.6 * len(maps) + 0.6, 2.9))
    highest = max(map_.max() for map_ in maps.values())
    for axes, (name, map_) in zip(grid.flat, maps.items(), strict=True):
        shown = axes.imshow(map_, extent=(0, 1, 1, 0), cmap="cividis", vmin=0, vmax=highest)
        for x0, y0, x1, y1 in np.asarray(marked, dtype=float).reshape(-1, 4):
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linestyle="--"))
        axes.set_title(f"{name}\nn = {len(groups[name])}", fontsize=9)
        axes.set(xlabel="x, share of width", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    grid[0, 0].set_ylabel("y, share of height")
    figure.colorbar(shown, ax=grid[0].tolist(), label="share of boxes here", shrink=0.85)
    return finish(figure)


def coverage(boxes: ArrayLike, cells: int = 100) -> np.ndarray:
    """For each of `cells` x `cells` places the share of `boxes` [N, 4] (x first, 0-1) that cover its centre."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    places = (np.arange(cells) + 0.5) / cells
    across = (boxes[:, None, 0] <= places) & (places < boxes[:, None, 2])  # [N, cells]
    down = (boxes[:, None, 1] <= places) & (places < boxes[:, None, 3])
    return np.einsum("ny,nx->yx", down.astype(float), across.astype(float)) / max(len(boxes), 1)


def power_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    simulated: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    marks: Mapping[str, int] | None = None,
) -> Shown:
    """How often so many pictures tell two recipes apart: lines by formula, points simulated, (n, power) each.

    `marks`: named numbers of pictures, drawn as vertical lines.
    """
    figure, (axes,) = charts(1, (6.4, 3.6))
    for i, (name, (n, power)) in enumerate(curves.items()):
        axes.plot(n, power, color=COLOURS[i % 6], linestyle=LINES[i % 6], label=name)
        axes.plot(*(simulated or {}).get(name, ((), ())), "osD^vP"[i % 6], color=COLOURS[i % 6], markersize=5)
    axes.axhline(0.8, color="0.6", linewidth=0.8)
    for name, n in (marks or {}).items():
        axes.axvline(n, color="0.6", linewidth=0.8, zorder=0)
        axes.text(n, 1.03, name, ha="center", fontsize=8, color="0.3")
    axes.set(xscale="log", xlabel="pictures", ylabel="share of experiments that tell", ylim=(0, 1.1))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    return finish(figure)
