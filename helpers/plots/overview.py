"""The whole of a recipe in one drawing: what is frozen, quantized, trained, and where the loss is computed."""

from collections.abc import Sequence
from pathlib import Path

from IPython.display import Image as Shown
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from helpers.plots.figure import COLOURS, finish
from helpers.recipes import Stage

GREY, ORANGE = "0.85", "#F0B080"


def overview(stages: Sequence[Stage], loss_scope: str = "assistant", path: Path | None = None) -> Shown:
    """One row a stage of a recipe (none: the untrained model), from photo to loss."""
    figure, grid = plt.subplots(max(1, len(stages)), 1, figsize=(9, 2.3 * max(1, len(stages))), squeeze=False)
    for number, axes in enumerate(grid[:, 0]):
        stage = stages[number] if stages else None
        axes.set(xlim=(0, 100), ylim=(0, 24))
        axes.set_axis_off()
        axes.set_title(f"stage {number + 1} of {len(stages)}" if len(stages) > 1 else "", loc="left")
        _box(axes, 1, 13, "photo", "white")
        _tower(axes, 18, 22, "vision tower", stage, "vision", quantized=False)
        _tower(axes, 48, 26, "language model", stage, "language",
               quantized=stage is None or stage.precision == "nf4")
        _box(axes, 48, 26, "text of the prompt", "white", bottom=1, height=4)
        _box(axes, 81, 18, "completion:\nlabel, box, <|im_end|>", "white")
        for start, end, text in ((14, 18, ""), (40, 48, "image\ntokens"), (74, 81, "")):
            axes.annotate("", (end, 14), (start, 14), arrowprops={"arrowstyle": "->"})
            axes.text((start + end) / 2, 15, text, ha="center", va="bottom", fontsize=7)
        axes.annotate("", (61, 8), (61, 5), arrowprops={"arrowstyle": "->"})
        if stage:
            where = "loss on the completion" if loss_scope == "assistant" else "loss on all text"
            where = "rewards of its boxes" if stage.reward else where
            axes.text(90, 5, where, ha="center", color=COLOURS[1], weight="bold", fontsize=9)
    return finish(figure, path)


def _box(axes: Axes, x: float, width: float, text: str, colour: str, bottom: float = 8, height: float = 12,
         hatch: str | None = None) -> None:
    axes.add_patch(FancyBboxPatch((x, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor=colour,
                                  edgecolor="0.3", hatch=hatch))
    axes.text(x + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9,
              bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})


def _tower(axes: Axes, x: float, width: float, name: str, stage: Stage | None, tower: str, quantized: bool) -> None:
    """A tower with what is done to it: orange where all of it trains, an orange strip for LoRA, hatched for NF4."""
    trains = stage.trains if stage and tower in stage.towers else None
    state = "trained, fp32" if trains == "full" else f"frozen, {'NF4' if quantized else 'bf16'}"
    _box(axes, x, width, f"{name}\n{state}", ORANGE if trains == "full" else GREY, hatch="///" if quantized else None)
    if trains == "lora":
        axes.add_patch(Rectangle((x, 20.6), width, 2.6, facecolor=ORANGE, edgecolor="0.3"))
        axes.text(x + width / 2, 21.9, "LoRA, fp32", ha="center", va="center", fontsize=8)
