"""What all figures share: colours, the white ground, and the way out to a file and a notebook."""

import io
from pathlib import Path

import numpy as np
from IPython.display import Image as Shown
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.settings import is_main

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")  # Okabe and Ito's
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
DPI = 80


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """An empty figure of `size` in inches and its axes [rows, columns], on a white ground."""
    return plt.subplots(rows, columns, figsize=size, dpi=DPI, facecolor="white", layout="constrained", squeeze=False)


def charts(columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """One row of empty charts of `size` in inches together, on a white ground with a light grid."""
    figure, grid = new_figure(1, columns, size)
    for axes in grid.flat:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0]


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
