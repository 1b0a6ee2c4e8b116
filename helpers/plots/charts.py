"""Charts of scores and losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown
from matplotlib import pyplot as plt

from helpers.evaluate import score
from helpers.plots.figure import COLOURS, LINES, finish


def iou_curves(runs: Mapping[str, Sequence[dict]], truth: Sequence[dict], *, path: Path | None = None) -> Shown:
    """IoU of each picture by run: histogram, and the share of pictures that reach at least an IoU.

    `runs`: name -> predictions for `truth`. Pictures without a table take no part.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
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
    left.legend(*right.get_legend_handles_labels(), loc="upper center")  # its middle is free: most IoUs are near 0 or 1
    return finish(figure, path)


def loss_curves(logs: Mapping[str, Sequence[dict]], *, smooth: int = 1, path: Path | None = None) -> Shown:
    """Training loss by step for each run or stage.

    `logs`: name -> lines such as `trainer.state.log_history` holds; those without "loss" are passed over. `smooth` > 1
    draws the running mean over that many lines, where there are so many, above the pale curve itself.
    """
    figure, axes = plt.subplots(figsize=(5, 3))
    for i, (name, log) in enumerate(logs.items()):
        steps, loss = np.array([(line["step"], line["loss"]) for line in log if "loss" in line]).T
        style = {"color": COLOURS[i % 6], "linestyle": LINES[i % 6]}
        if 1 < smooth <= len(loss):
            axes.plot(steps, loss, alpha=0.35, linewidth=1, **style)
            loss = np.convolve(loss, np.ones(smooth) / smooth, mode="valid")
            steps = steps[(smooth - 1) // 2 :][: len(loss)]
        axes.plot(steps, loss, linewidth=1.6, label=name, **style)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    return finish(figure, path)
