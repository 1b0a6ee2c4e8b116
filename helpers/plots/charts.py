"""Charts of scores, confidences and losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown

from helpers.evaluate import score
from helpers.plots.figure import COLOURS, LINES, charts, finish


def iou_curves(runs: Mapping[str, Sequence[dict]], truth: Sequence[dict], *, path: Path | None = None) -> Shown:
    """IoU of each picture by run: histogram, and the share of pictures that reach at least an IoU.

    `runs`: name -> predictions for `truth`. Pictures without a table take no part.
    """
    figure, (left, right) = charts(2, (9, 3.2))
    for i, (name, predictions) in enumerate(runs.items()):
        records = score(truth, predictions, resamples=0)["per_picture"]
        iou = np.sort([r["iou"] for r in records if r["iou"] is not None])
        style = {"color": COLOURS[i % 6], "linestyle": LINES[i % 6], "linewidth": 1.8}
        left.hist(iou, bins=np.linspace(0, 1, 21), histtype="step", **style)
        steps = np.concatenate([[1.0], 1 - np.arange(1, len(iou) + 1) / len(iou)])
        right.step(np.concatenate([[0.0], iou]), steps, where="post", label=f"{name} (n = {len(iou)})", **style)
    left.set(xlabel="IoU of a picture", ylabel="pictures", xlim=(0, 1))
    right.set(xlabel="IoU at least", ylabel="share of pictures", xlim=(0, 1), ylim=(0, 1.02))
    for threshold in (0.5, 0.7):
        right.axvline(threshold, color="0.6", linewidth=0.8, zorder=0)
    right.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="lower left")
    return finish(figure, path)


def errors_by(runs: Mapping[str, dict], group: str = "by_size") -> Shown:
    """Mean IoU with its 95 % interval for each size, rotation or category of the true boxes, by run.

    `runs`: name -> result of `score`; `group`: "by_size", "by_rotation" or "by_category".
    """
    labels = {"by_size": "area of the table", "by_rotation": "turn of the picture, degrees", "by_category": "category"}
    if group not in labels:
        raise ValueError(f"group {group!r}; the groups are {', '.join(labels)}")
    metric = "mean_iou" if group == "by_rotation" else "mean_iou_boxes"
    names = list(dict.fromkeys(name for result in runs.values() for name in result[group]))
    figure, (axes,) = charts(1, (1.5 + 1.6 * max(len(names), 2), 3.2))
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
    return finish(figure)


def reliability_diagram(reliability: dict) -> Shown:
    """Confidence against the share of right boxes; the area of a point grows with its number of boxes.

    Takes `score(...)["confidence"]["reliability"]`.
    """
    figure, (axes,) = charts(1, (3.8, 3.6))
    rows = reliability["bins"]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as confident as right")
    count = np.array([row["n"] for row in rows])
    x, y = [row["confidence"] for row in rows], [row["right"] for row in rows]
    axes.plot(x, y, color=COLOURS[0], linewidth=1)
    axes.scatter(x, y, s=15 + 250 * count / count.sum(), color=COLOURS[0], label=f"boxes (n = {count.sum()})")
    axes.set(xlabel="confidence", ylabel="share with IoU > .5", xlim=(0, 1.02), ylim=(-0.02, 1.04))
    axes.set_title(f"mean gap {reliability['ece']:.2f}", fontsize=10)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="lower right")
    return finish(figure)


def loss_curves(logs: Mapping[str, Sequence[dict]], *, smooth: int = 1, path: Path | None = None) -> Shown:
    """Training loss by step for each run or stage, and its loss on held-out rows where that was logged.

    `logs`: name -> lines such as `trainer.state.log_history` holds, with "step" and "loss" or "eval_loss"; other
    lines are passed over. `smooth` > 1 draws the running mean over that many lines, where there are so many, above
    the pale curve itself.
    """
    figure, (axes,) = charts(1, (5, 3))
    for i, (name, log) in enumerate(logs.items()):
        logged = [(line["step"], line["loss"]) for line in log if "loss" in line]
        if not logged:
            raise ValueError(f"the log of {name} has no line with 'loss'; train with logging_steps above 0")
        steps, loss = np.array(logged).T
        style = {"color": COLOURS[i % 6], "linestyle": LINES[i % 6]}
        if 1 < smooth <= len(loss):
            axes.plot(steps, loss, alpha=0.35, linewidth=1, **style)
            loss = np.convolve(loss, np.ones(smooth) / smooth, mode="valid")
            steps = steps[(smooth - 1) // 2 :][: len(loss)]
        axes.plot(steps, loss, linewidth=1.6, label=name, **style)
        held_out = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
        if held_out:
            axes.plot(*np.array(held_out).T, "s", color=style["color"], markersize=4, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    return finish(figure, path)
