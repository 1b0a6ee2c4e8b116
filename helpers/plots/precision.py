"""Charts of rounding: what becomes of small steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import Image as Shown

from helpers.plots.figure import COLOURS, LINES, charts, finish


def lost_updates(half_gaps: np.ndarray, rate: float, walks: Mapping[str, Sequence[float]]) -> Shown:
    """Left: half the gap from each bf16 weight to the next, against a step of `rate`. Right: the way they went.

    `half_gaps`: float [N], one for each weight, as `bugs.half_gap` gives them; zeros take no part.
    `walks`: name -> mean way along the gradient after each step, in units of `rate`.
    """
    figure, (left, right) = charts(2, (9, 3.3))
    gaps, counts = np.unique(half_gaps[half_gaps > 0], return_counts=True)  # powers of two: a bar each
    share, swallowed = 100 * counts / counts.sum(), gaps > rate
    for part, colour, hatch, label in ((swallowed, COLOURS[1], "//", "larger: the step is rounded away"),
                                       (~swallowed, COLOURS[0], "", "smaller: the weight moves")):
        left.bar(gaps[part] / 2**0.5, share[part], gaps[part] * 0.65, align="edge", color=colour, hatch=hatch,
                 edgecolor="white", label=label)
    left.axvline(rate, color="black", linewidth=1.4, linestyle="--", label=f"a step of {rate:.0e}")
    left.set(xscale="log", xlabel="half the gap to the next bf16 number", ylabel="weights, %",
             title="how coarse the weights are")
    left.set_xlim(min(max(gaps[0], rate / 50), gaps[-1] / 50) / 2, max(gaps[-1], rate) * 2)
    left.legend(fontsize=8, loc="upper left", framealpha=1, edgecolor="white")
    left.set_ylim(0, 1.45 * share.max())
    for i, (name, distances) in enumerate(walks.items()):
        right.plot(range(1, len(distances) + 1), distances, color=COLOURS[i % 6], linestyle=LINES[i % 6],
                   linewidth=2, label=name)
    right.set(xlabel="steps", ylabel="mean way, in learning rates", title="the way along the gradient", ylim=(0, None))
    right.legend(fontsize=8, frameon=False, loc="upper left")
    return finish(figure)
