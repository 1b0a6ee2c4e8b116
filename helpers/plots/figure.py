"""What all figures share: colours, the white ground, and the way out to a file and a notebook.

Importing it sets matplotlib's defaults, so that a chart which a notebook draws by itself looks like the others.
"""

import io
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from helpers.processes import is_main

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
plt.rcParams.update({
    "figure.dpi": 80, "figure.figsize": (6, 3.4), "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "legend.fontsize": 8, "legend.framealpha": 0.85, "legend.edgecolor": "none",
})  # fmt: skip


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """An empty figure of `size` in inches and its axes [rows, columns], for pictures: no ticks, no frame."""
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def finish(figure: Figure, path: Path | None = None, photos: bool = False) -> Shown:
    """Write the figure to `path` (from the first process alone), close it, and return it as a picture to show."""
    if path is not None and is_main():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    kind, options = ("jpeg", {"quality": 80, "optimize": True}) if photos else ("png", {"optimize": True})
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, pil_kwargs=options)
    plt.close(figure)
    return Shown(data=buffer.getvalue(), format=kind)
