"""What preprocessing does to a picture and to a batch: image tokens, pixel budgets, padding."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from IPython.display import Image as Shown
from matplotlib.patches import Patch
from numpy.typing import ArrayLike
from PIL import Image

from helpers.budget import UNIT
from helpers.plots.figure import COLOURS, LINES, charts, finish, new_figure
from helpers.plots.photos import draw_boxes


def seen_picture(pixel_values: torch.Tensor, grid_thw: Sequence[int], image_processor) -> Image.Image:
    """The picture that the model is given, put together again from its patches.

    `pixel_values` [patches, 1176] and `grid_thw` (1, rows, columns of patches) of one picture, as Qwen2-VL's processor
    returns them: 2 x 2 patches that become one image token stand next to each other, colours are normalised, and each
    patch holds the picture twice, for a video's two frames.
    """
    _, rows, columns = (int(count) for count in grid_thw)
    side, merge = image_processor.patch_size, image_processor.merge_size
    patches = pixel_values.float().view(rows // merge, columns // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
    picture = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)
    colours = picture * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return Image.fromarray((colours * 255).round().clamp(0, 255).byte().numpy())


def token_grids(pictures: Sequence[tuple[str, Image.Image, ArrayLike]]) -> Shown:
    """Pictures as the model sees them, (title, picture, true boxes) each, with the grid of their image tokens.

    Boxes are [N, 4], x first, in 0-1.
    """
    tallest = max(picture.height / picture.width for _, picture, _ in pictures)
    figure, grid = new_figure(1, len(pictures), (3 * len(pictures), 3 * min(tallest, 1.5) + 0.3))
    for axes, (title, picture, boxes) in zip(grid.flat, pictures, strict=True):
        draw_boxes(axes, picture, boxes, title=title, pixels=max(picture.size))
        lines = {"color": "white", "linewidth": 0.5, "alpha": 0.7}
        axes.vlines(np.arange(UNIT, picture.width, UNIT) - 0.5, -0.5, picture.height - 0.5, **lines)
        axes.hlines(np.arange(UNIT, picture.height, UNIT) - 0.5, -0.5, picture.width - 0.5, **lines)
    return finish(figure, photos=True)


def budget_curves(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], marks: Mapping[str, float]) -> Shown:
    """Image tokens of a photo by its size: (megapixels, tokens) for each budget. `marks`: named sizes, megapixels."""
    figure, (axes,) = charts(1, (6, 3.4))
    for i, (name, (megapixels, tokens)) in enumerate(curves.items()):
        axes.plot(megapixels, tokens, color=COLOURS[i % 6], linestyle=LINES[i % 6], label=name)
    for name, size in marks.items():
        axes.axvline(size, color="0.6", linewidth=0.8, zorder=0)
        axes.text(size, 1.02, name, ha="center", fontsize=8, color="0.3", transform=axes.get_xaxis_transform())
    axes.set(xscale="log", yscale="log", xlabel="size of the photo, megapixels", ylabel="image tokens")
    axes.legend(fontsize=8, frameon=False)
    return finish(figure)


def padded_batches(orders: Mapping[str, Sequence[Sequence[tuple[int, int]]]]) -> Shown:
    """Batches as they lie in memory: for each order its batches of (image tokens, text tokens), a bar a sequence."""
    empty = {"facecolor": "white", "edgecolor": "0.5", "hatch": "///"}
    figure, axes = charts(len(orders), (3.6 * len(orders), 2.8))
    for number, (ax, (name, batches)) in enumerate(zip(axes, orders.items(), strict=True)):
        place = 0
        for batch in batches:
            longest = max(image + text for image, text in batch)
            for image, text in batch:
                ax.barh(place, image, color=COLOURS[0])
                ax.barh(place, text, left=image, color=COLOURS[1])
                ax.barh(place, longest - image - text, left=image + text, **empty)
                place += 1
            place += 0.7
        ax.set(xlabel="tokens", yticks=[], ylabel="batches" if number == 0 else "")
        ax.set_title(name, fontsize=9)
        ax.locator_params(axis="x", nbins=4)
        ax.invert_yaxis()
    kinds = [Patch(color=COLOURS[0]), Patch(color=COLOURS[1]), Patch(**empty)]
    figure.legend(kinds, ["image", "text", "padding"], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return finish(figure)
