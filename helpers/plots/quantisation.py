"""Figures of 4-bit weights and of LoRA's rank."""

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image as Shown
from numpy.typing import ArrayLike

from helpers.plots.figure import COLOURS, charts, finish


def codebook(scaled: ArrayLike, levels: ArrayLike) -> Shown:
    """Weights divided by their block's largest (-1 to 1) as a histogram, over the levels that they are rounded to."""
    figure, (axes,) = charts(1, (6.4, 2.6))
    axes.hist(np.asarray(scaled).ravel(), bins=np.linspace(-1, 1, 81), color="0.8", label="weights")
    for i, level in enumerate(np.asarray(levels)):
        axes.axvline(level, color=COLOURS[0], linewidth=1.3, label="NF4's 16 levels" if i == 0 else None)
    even = np.linspace(-1, 1, 16)
    axes.plot(even, np.zeros(16), "^", color=COLOURS[1], markersize=6, clip_on=False, label="16 even steps")
    axes.set(xlabel="weight / largest weight of its block of 64", ylabel="weights", xlim=(-1.02, 1.02))
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9)
    return finish(figure)


def error_by_layer(towers: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str = "relative error") -> Shown:
    """One panel a tower: kind of layer -> its relative error in each block, bottom to top of the tower."""
    figure, panels = charts(len(towers), (4.6 * len(towers), 3.4))
    for axes, (tower, kinds) in zip(panels, towers.items(), strict=True):
        for i, (kind, values) in enumerate(kinds.items()):
            style = {"color": COLOURS[i % 6], "marker": "os^Dv*X"[i % 7], "linestyle": "-" if i < 6 else ":"}
            axes.plot(values, linewidth=1.2, markersize=4, label=kind, **style)
        axes.set(title=tower, xlabel="block", ylabel=ylabel, ylim=(0, None))
        axes.title.set_fontsize(10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower center")
    return finish(figure)


def memory(table: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]) -> Shown:
    """One stacked bar a precision, GiB by tower; `limits`: name -> GiB, drawn as dashed lines."""
    figure, (axes,) = charts(1, (6.6, 0.42 * len(table) + 1.4))
    towers = list(next(iter(table.values())))
    for y, row in enumerate(table.values()):
        start = 0.0
        for i, tower in enumerate(towers):
            style = {"color": COLOURS[i], "hatch": ("", "//", "..")[i % 3], "edgecolor": "white"}
            axes.barh(y, row[tower], left=start, height=0.65, label=tower if y == 0 else None, **style)
            start += row[tower]
        axes.text(start, y, f"  {start:.1f}", va="center", fontsize=8)
    for name, gib in limits.items():
        axes.axvline(gib, color="0.4", linestyle="--", linewidth=1)
        axes.text(gib, -0.45, f" {name}", fontsize=8, color="0.3", va="bottom")
    axes.set_yticks(range(len(table)), list(table), fontsize=9)
    axes.set(xlabel="GiB of weights", ylim=(len(table) - 0.4, -0.95))
    axes.margins(x=0.1)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=len(towers))
    return finish(figure)


def rank_curve(ranks: Sequence[int], scores: Sequence[Mapping], constant: float) -> Shown:
    """Mean IoU with its 95 % interval by LoRA rank, beside the constant box; `scores` are metrics of `score`."""
    figure, (axes,) = charts(1, (4.6, 2.9))
    value = np.array([score["value"] for score in scores])
    ends = np.array([[score["low"], score["high"]] for score in scores])
    axes.errorbar(ranks, value, np.abs(ends.T - value), fmt="o-", color=COLOURS[0], capsize=4, label="fine-tuned")
    axes.axhline(constant, color=COLOURS[1], linestyle="--", linewidth=1.2, label="best constant box")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set(xlabel="LoRA rank", ylabel="mean IoU", ylim=(0, 1))
    axes.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.9)
    return finish(figure)
