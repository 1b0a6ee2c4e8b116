"""Charts of the benchmark: where a step's time goes, and how time grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from IPython.display import Image as Shown
from matplotlib.ticker import NullLocator

from helpers.plots.figure import COLOURS, LINES, charts, finish

HATCHES = ("", "//", "..", "xx", "", "--")


def splits(rows: Sequence[Mapping], pictures: int, *, path: Path | None = None) -> Shown:
    """Milliseconds a picture by part, a bar a variant.

    `rows`: of `bench_steps.measure`, with "name" and "split_s" (seconds by part for `pictures` pictures).
    """
    figure, (axes,) = charts(1, (9, 0.8 + 0.36 * len(rows)))
    left = [0.0] * len(rows)
    for number, part in enumerate(rows[0]["split_s"]):
        widths = [1000 * row["split_s"][part] / pictures for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=COLOURS[number % 6], hatch=HATCHES[number % 6],
                  edgecolor="white", label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in enumerate(left):
        axes.annotate(f" {end:.0f}", (end, place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms a picture", xlim=(0, 1.08 * max(left)))
    axes.grid(visible=False, axis="y")
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=6)
    return finish(figure, path)


def growth(lines: Mapping[str, tuple[str, Sequence[float], Mapping[str, Sequence[float]]]], *, path: Path | None = None
           ) -> Shown:
    """Seconds against sizes, both logarithmic, a chart each, with the straight line through the first point.

    `lines`: title -> (label of x, sizes, {name: seconds}).
    """
    figure, panels = charts(len(lines), (4.5 * len(lines), 3.3))
    for axes, (title, (label, sizes, curves)) in zip(panels, lines.items(), strict=True):
        for i, (name, seconds) in enumerate(curves.items()):
            axes.plot(sizes, seconds, color=COLOURS[i % 6], linestyle=LINES[i % 6], marker="os^D"[i % 4], label=name)
            axes.plot(sizes, [seconds[0] * size / sizes[0] for size in sizes], color="0.6", linewidth=0.9, zorder=0,
                      label="in proportion" if i == 0 else None)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds", title=title)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    return finish(figure, path)
