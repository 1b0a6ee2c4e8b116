"""Figures. A leaf: only notebooks import it.

Truth and prediction differ in line and colour: truth solid blue, prediction dashed orange, both with a white edge, so
that they are told apart by the colour-blind and on any photo. Figures have a white ground of their own, for light
and dark themes. Pictures are scaled down; `compact` makes a gallery small enough for a committed notebook.
"""

import html
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike
from PIL.Image import Image

if TYPE_CHECKING:
    from IPython.display import Image as ShownImage

TRUTH, PREDICTION = "#0072B2", "#E69F00"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
DPI = 80
_HALO = [patheffects.withStroke(linewidth=3.2, foreground="white")]


def draw_boxes(
    axes: Axes, image: Image, truth: ArrayLike = (), predicted: ArrayLike = (), *, title: str = "", pixels: int = 256
) -> None:
    """One picture with its true and predicted boxes, both [N, 4] x-first in 0-1; longest side scaled to `pixels`."""
    small = image.convert("RGB")
    small.thumbnail((pixels, pixels))
    axes.imshow(small, interpolation="nearest")
    for boxes, colour, line in ((truth, TRUTH, "-"), (predicted, PREDICTION, (0, (3, 2)))):
        for x0, y0, x1, y1 in np.asarray(boxes, dtype=float).reshape(-1, 4) * (*small.size, *small.size):
            style = {"fill": False, "edgecolor": colour, "linestyle": line, "linewidth": 1.6}
            axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, clip_on=False, **style))
            axes.patches[-1].set_path_effects([*_HALO, patheffects.Normal()])
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def gallery(images: Mapping[str, Image], per_picture: Sequence[dict], *, columns: int = 6, title: str = "") -> Figure:
    """A sheet of pictures with both kinds of boxes and the IoU above each.

    `images`: picture by image_id; `per_picture`: records of `score`, in the order to show; see `worst` and `best`.
    """
    rows = -(-len(per_picture) // columns)
    figure, grid = _sheet(rows, min(columns, len(per_picture)), title)
    for axes, record in zip(grid.flat, per_picture, strict=False):
        draw_boxes(axes, images[record["image_id"]], record["true"], record["predicted"], title=_caption(record))
    return figure


def worst(per_picture: Sequence[dict], n: int = 12) -> list[dict]:
    """The n records with the lowest IoU, the lowest first; pictures without a table take no part."""
    return sorted((r for r in per_picture if r["iou"] is not None), key=lambda r: r["iou"])[:n]


def best(per_picture: Sequence[dict], n: int = 12) -> list[dict]:
    """The n records with the highest IoU, the highest first; pictures without a table take no part."""
    return sorted((r for r in per_picture if r["iou"] is not None), key=lambda r: -r["iou"])[:n]


def before_after(
    images: Mapping[str, Image], before: Sequence[dict], after: Sequence[dict], image_ids: Sequence[str]
) -> Figure:
    """The same pictures twice: above with the boxes of `before`, below with those of `after` (records of `score`)."""
    figure, grid = _sheet(2, len(image_ids), "before (above) and after (below)")
    for row, records in zip(grid, (before, after), strict=True):
        by_id = {record["image_id"]: record for record in records}
        for axes, image_id in zip(row, image_ids, strict=True):
            record = by_id[image_id]
            draw_boxes(axes, images[image_id], record["true"], record["predicted"], title=_caption(record))
    return figure


def _sheet(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """Empty axes in rows and columns, with the legend of the two kinds of boxes below them."""
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(2.1 * columns, 4.2), 2.3 * rows + 0.5),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    lines = [Line2D([], [], color=TRUTH, lw=2), Line2D([], [], color=PREDICTION, lw=2, ls=(0, (3, 2)))]
    figure.legend(lines, ["truth", "prediction"], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, grid


def _caption(record: dict) -> str:
    if record["iou"] is None:
        return "no table" + (", false alarm" if record["predicted"] else "")
    return f"IoU {record['iou']:.2f}" if record["predicted"] else "no box"


def iou_curves(runs: Mapping[str, Sequence[dict]]) -> Figure:
    """IoU of each picture by run: histogram, and the share of pictures that reach at least an IoU.

    `runs`: name -> records of `score`. Pictures without a table take no part.
    """
    figure, (left, right) = _charts(2, (9, 3.2))
    for i, (name, records) in enumerate(runs.items()):
        iou = np.sort([r["iou"] for r in records if r["iou"] is not None])
        style = {"color": COLOURS[i % 6], "linestyle": LINES[i % 6], "linewidth": 1.8}
        left.hist(iou, bins=np.linspace(0, 1, 21), histtype="step", **style)
        steps = np.concatenate([[1.0], 1 - np.arange(1, len(iou) + 1) / len(iou)])
        right.step(np.concatenate([[0.0], iou]), steps, where="post", label=f"{name} (n = {len(iou)})", **style)
    left.set(xlabel="IoU of a picture", ylabel="pictures", xlim=(0, 1))
    right.set(xlabel="IoU at least", ylabel="share of pictures", xlim=(0, 1), ylim=(0, 1.02))
    for threshold in (0.5, 0.7):
        right.axvline(threshold, color="0.6", linewidth=0.8, zorder=0)
    right.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def errors_by(runs: Mapping[str, dict], group: str = "by_size") -> Figure:
    """Mean IoU with its 95 % interval for each size, rotation or category of the true boxes, by run.

    `runs`: name -> result of `score`; `group`: "by_size", "by_rotation" or "by_category".
    """
    labels = {"by_size": "area of the table", "by_rotation": "turn of the picture, degrees", "by_category": "category"}
    if group not in labels:
        raise ValueError(f"group {group!r}; the groups are {', '.join(labels)}")
    metric = "mean_iou" if group == "by_rotation" else "mean_iou_boxes"
    names = list(dict.fromkeys(name for result in runs.values() for name in result[group]))
    figure, (axes,) = _charts(1, (1.5 + 1.6 * max(len(names), 2), 3.2))
    for i, (run, result) in enumerate(runs.items()):
        known = [(x, result[group][n][metric]) for x, n in enumerate(names) if n in result[group]]
        known = [(x, m) for x, m in known if m["value"] is not None]
        place = [x + (i - (len(runs) - 1) / 2) * 0.6 / len(runs) for x, _ in known]
        value = np.array([m["value"] for _, m in known])
        ends = np.array([[m["value"] if m[e] is None else m[e] for e in ("low", "high")] for _, m in known])
        spread = np.abs(ends.reshape(-1, 2).T - value)
        axes.errorbar(place, value, spread, fmt="osD^vP"[i % 6], color=COLOURS[i % 6], capsize=3, label=run)
    first = next(iter(runs.values()))[group]
    ticks = [f"{n}\nn = {first[n][metric]['n']}" if n in first else n for n in names]
    axes.set_xticks(range(len(names)), ticks, fontsize=8)
    axes.set(xlabel=labels[group], ylabel="mean IoU", ylim=(0, 1.02))
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=len(runs))
    return figure


def reliability_diagram(reliability: dict) -> Figure:
    """Confidence against the share of right boxes; the area of a point grows with its number of boxes.

    Takes `score(...)["confidence"]["reliability"]`.
    """
    figure, (axes,) = _charts(1, (3.8, 3.6))
    rows = reliability["bins"]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as confident as right")
    count = np.array([row["n"] for row in rows])
    x, y = [row["confidence"] for row in rows], [row["right"] for row in rows]
    axes.plot(x, y, color=TRUTH, linewidth=1)
    axes.scatter(x, y, s=15 + 250 * count / count.sum(), color=TRUTH, label=f"boxes (n = {count.sum()})")
    axes.set(xlabel="confidence", ylabel="share with IoU > .5", xlim=(0, 1.02), ylim=(-0.02, 1.04))
    axes.set_title(f"mean gap {reliability['ece']:.2f}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def loss_curve(log_history: Sequence[dict], *, smooth: int = 1) -> Figure:
    """Training loss by step, and evaluation loss where it was logged, from `trainer.state.log_history`.

    `smooth` > 1 adds a running mean over that many log lines.
    """
    figure, (axes,) = _charts(1, (5, 3))
    logged = [(line["step"], line["loss"]) for line in log_history if "loss" in line]
    if not logged:
        raise ValueError("the log has no line with 'loss'; train with logging_steps above 0")
    steps, loss = np.array(logged).T
    axes.plot(steps, loss, color=COLOURS[0], linewidth=1.5, alpha=0.4 if smooth > 1 else 1, label="training")
    if smooth > 1:
        mean = np.convolve(loss, np.ones(smooth) / smooth, mode="valid")
        axes.plot(
            steps[(smooth - 1) // 2 :][: len(mean)], mean, color=COLOURS[0], linewidth=2, label=f"mean of {smooth}"
        )
    held_out = [(line["step"], line["eval_loss"]) for line in log_history if "eval_loss" in line]
    if held_out:
        axes.plot(*np.array(held_out).T, "s--", color=COLOURS[1], markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    return figure


def label_mask_html(tokens: Sequence[str], trained: Sequence[bool]) -> str:
    """Token by token what the loss sees: trained tokens blue and underlined, masked ones grey. HTML to display.

    `tokens`: each token's text; `trained`: whether its label is not -100. Runs of one token are shown once, counted.
    """
    pieces = []
    for (token, seen), run in groupby(zip(tokens, trained, strict=True)):
        count = len(list(run))
        text = html.escape(token).replace("\n", "⏎<br>").replace(" ", "&nbsp;") + (f" × {count}" if count > 1 else "")
        colours = "background:#cfe8f7;color:#003a5d;border-bottom:2px solid #0072B2" if seen else _MASKED
        pieces.append(f'<span style="{colours};padding:0 2px;margin:1px;display:inline-block">{text}</span>')
    share = f"{sum(map(bool, trained))} of {len(tokens)} tokens are trained on"
    body = "".join(piece.replace("<br></span>", "</span><br>") for piece in pieces)
    return f'<div style="font-family:monospace;font-size:12px;line-height:1.7">{body}<p>{share}</p></div>'


_MASKED = "background:#eeeeee;color:#666666"


def _charts(columns: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    """One row of empty charts on a white ground with a light grid."""
    figure, grid = plt.subplots(
        1, columns, figsize=size, dpi=DPI, facecolor="white", layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0]


def compact(figure: Figure, quality: int = 80) -> "ShownImage":
    """A figure as a JPEG for display, a fraction of the PNG's size for photos; the figure is closed."""
    from IPython.display import Image as ShownImage

    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=DPI, pil_kwargs={"quality": quality, "optimize": True})
    plt.close(figure)
    return ShownImage(data=buffer.getvalue(), format="jpeg")
