"""Where Qwen2-VL looks in a picture while it writes the coordinates of a box."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from IPython.display import Image as Shown
from PIL.Image import Image
from torch import nn

from helpers import predict
from helpers.boxes import area, pairwise_iou, yxyx_unit_to_xyxy_unit
from helpers.messages import parse_text
from helpers.plots.figure import finish, new_figure
from helpers.plots.photos import draw_boxes
from helpers.scenes import render_scene

COORDINATES = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, eq=False)
class Look:
    """One picture, the box that was written for it, and where the model looked meanwhile."""

    image: Image
    box: np.ndarray  # float64 [4] x-first in 0-1
    true: np.ndarray  # the same of the true box nearest to it
    iou: float  # of the two
    maps: np.ndarray  # float32 [layers, 4, rows, columns]: attention to each image token, mean of the heads
    # for each of x0, y0, x1, y1; a map sums to the share of all attention that goes to the picture


def looks(model: nn.Module, processor, rows: Iterable[dict], thing: str) -> list[Look]:
    """Detects `thing` on each of the rows that shows one; those for which a box is written.

    The model must have been loaded with `attn_implementation="eager"`: others give no weights. Raises ValueError where
    no box is written at all.
    """
    shown = ((row, boxes_of(row, thing)) for row in rows)
    found = [one for row, true in shown if len(true) and (one := look(model, processor, row, true, thing))]
    if not found:
        raise ValueError(f"find={thing!r}: no box was written for it; take another thing, or more pictures.")
    return found


@torch.inference_mode()
def look(model: nn.Module, processor, row: dict, true: np.ndarray, thing: str) -> Look | None:
    """The first box that is written for a row's picture, which shows `thing` in the boxes `true`; None where none is.

    A number's first digit is chosen at the token before it, "(" or ","; its attention is taken, in a second pass over
    prompt and completion.
    """
    batch = predict.model_inputs([row], processor, f"Detect the bounding box of the {thing}.")
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "image_id"}
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    pieces = [processor.tokenizer.decode([token]) for token in ids[0].tolist()]
    places, boxes = coordinate_places(pieces, length)[:4], parse_text("".join(pieces[length:])).boxes_xyxy_unit
    if len(places) < 4 or not len(boxes):
        return None
    on_picture = ids == model.config.image_token_id
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": on_picture.int()}
    attentions = model(**inputs, output_attentions=True, logits_to_keep=1).attentions  # layers x [1, heads, T, T]
    maps = torch.stack([layer[0, :, places].float().mean(0)[:, on_picture[0]] for layer in attentions])
    grid, iou = (inputs["image_grid_thw"][0, 1:] // 2).tolist(), pairwise_iou(true, boxes[:1])[:, 0]
    return Look(row["image"], boxes[0], true[iou.argmax()], iou.max(), maps.unflatten(2, grid).cpu().numpy())


def coordinate_places(pieces: list[str], start: int) -> list[int]:
    """Where each number is chosen: the place before its first digit, from the first "(" in `pieces[start:]` on."""
    opened = next((i for i in range(start, len(pieces)) if "(" in pieces[i]), len(pieces))
    digit = [re.search(r"\d", piece) is not None for piece in pieces]
    return [i - 1 for i in range(opened + 1, len(pieces)) if digit[i] and not digit[i - 1]]


def lift(look: Look) -> np.ndarray:
    """float [layers, 4]: how much more attention a token of the true box gets than an average one."""
    x0, y0, x1, y1 = look.true
    rows, columns = look.maps.shape[2:]
    cover = [np.clip(high * n - np.arange(n), 0, 1) - np.clip(low * n - np.arange(n), 0, 1)
             for low, high, n in ((y0, y1, rows), (x0, x1, columns))]  # fmt: skip
    inside = np.outer(*cover)  # [rows, columns]: the share of each token that the box covers
    return (look.maps * inside).sum((2, 3)) / look.maps.sum((2, 3)) / inside.mean()


def distances(looks: list[Look], layer: int) -> pd.DataFrame:
    """Mean distance (0-1) from the centre of attention, while a coordinate is written, to each edge of its axis."""
    far = np.full((len(looks), 4, 4), np.nan)  # [looks, coordinate that is written, edge]
    for n, i in np.ndindex(len(looks), 4):
        along = looks[n].maps[layer, i].sum(i % 2)  # over rows for x, over columns for y
        centre = (along * (np.arange(len(along)) + 0.5)).sum() / along.sum() / len(along)
        far[n, i, i % 2 :: 2] = np.abs(centre - looks[n].box[i % 2 :: 2])
    names = [f"writing {name}" for name in COORDINATES], [f"to {name}" for name in COORDINATES]
    return pd.DataFrame(far.mean(axis=0), *names)


def attention_maps(look: Look, layer: int) -> Shown:
    """One panel a coordinate: attention over the picture (brighter is more), truth solid, prediction dashed."""
    figure, (line,) = new_figure(1, 4, (9.2, 3.2 * look.image.height / max(look.image.size) + 0.4))
    for axes, name, values in zip(line, COORDINATES, look.maps[layer], strict=True):
        draw_boxes(axes, look.image.convert("L"), [look.true], [look.box], title=f"writing {name}")
        left, right, bottom, top = axes.images[0].get_extent()
        axes.imshow(values, extent=(left, right, bottom, top), cmap="inferno", vmin=0,
                    alpha=np.clip(values / values.max(), 0.1, 0.9))  # fmt: skip
    return finish(figure, photos=True)


def boxes_of(row: Mapping, name: str) -> np.ndarray:
    """True boxes [N, 4] (x first, 0-1) of `nutrition table`, or of another thing in an embedded row.

    A row knows its tables alone; what else stands on an embedded picture is known to the scene that it was drawn from.
    """
    if name == "nutrition table":
        return yxyx_unit_to_xyxy_unit(row["objects"]["bbox"])
    url = row["meta"]["image_url"]
    if not url.startswith("embedded://scenes/"):
        raise ValueError(f"find={name!r} is known on the embedded pictures alone; elsewhere take 'nutrition table'.")
    seed, split, index = url.removeprefix("embedded://scenes/").split("/")
    things = render_scene(int(seed), int(index), split).things
    found = np.array([box for thing, box in things if thing == name], dtype=float).reshape(-1, 4)
    return found[area(found) > 0]
