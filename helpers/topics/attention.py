"""Where Qwen2-VL looks in a picture while it writes the coordinates of a box."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from IPython.display import Image as Shown
from PIL.Image import Image
from torch import nn

from helpers.boxes import area, yxyx_unit_to_xyxy_unit
from helpers.messages import parse_text
from helpers.plots.figure import finish, new_figure
from helpers.plots.photos import draw_boxes
from helpers.scenes import render_scene

COORDINATES = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, eq=False)
class Look:
    """One completion, and where the model looked while it wrote the first box."""

    text: str
    boxes: np.ndarray  # float64 [N, 4] x-first in 0-1
    maps: np.ndarray  # float32 [layers, 4, rows, columns]: attention to each image token, mean of the heads
    # for each of x0, y0, x1, y1; a map sums to the share of all attention that goes to the picture


@torch.inference_mode()
def look(model: nn.Module, processor, image: Image, prompt: str) -> Look | None:
    """Generate for one picture and read the attention of the tokens that choose a coordinate; None without a box.

    A number's first digit is chosen at the token before it, "(" or ","; its attention is taken, in a second pass over
    prompt and completion. The model must have been loaded with `attn_implementation="eager"`: others give no weights.
    """
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image.convert("RGB")], text=[text], return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    pieces = [processor.tokenizer.decode([token]) for token in ids[0].tolist()]
    places, text = coordinate_places(pieces, length)[:4], "".join(pieces[length:])
    boxes = parse_text(text).boxes_xyxy_unit
    if len(places) < 4 or not len(boxes):
        return None
    on_picture = ids == model.config.image_token_id
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": on_picture.int()}
    attentions = model(**inputs, output_attentions=True, logits_to_keep=1).attentions  # layers x [1, heads, T, T]
    maps = torch.stack([layer[0, :, places].float().mean(0)[:, on_picture[0]] for layer in attentions])
    rows, columns = (inputs["image_grid_thw"][0, 1:] // 2).tolist()
    return Look(text, boxes, maps.reshape(len(maps), 4, rows, columns).cpu().numpy())


def coordinate_places(pieces: list[str], start: int) -> list[int]:
    """Where each number is chosen: the place before its first digit, from the first "(" in `pieces[start:]` on."""
    opened = next((i for i in range(start, len(pieces)) if "(" in pieces[i]), len(pieces))
    digit = [re.search(r"\d", piece) is not None for piece in pieces]
    return [i - 1 for i in range(opened + 1, len(pieces)) if digit[i] and not digit[i - 1]]


def lift(look: Look, box: np.ndarray) -> np.ndarray:
    """float [layers, 4]: how much more attention a token of `box` (x-first, 0-1) gets than an average one."""
    cover = [np.clip(high * n - np.arange(n), 0, 1) - np.clip(low * n - np.arange(n), 0, 1)
             for low, high, n in zip(box[[1, 0]], box[[3, 2]], look.maps.shape[2:], strict=True)]  # fmt: skip
    inside = np.outer(*cover)  # [rows, columns]: the share of each token that the box covers
    return (look.maps * inside).sum((2, 3)) / look.maps.sum((2, 3)) / inside.mean()


def distance_to_edge(look: Look, layer: int, coordinate: str, edge: str) -> float:
    """From the centre of attention while `coordinate` was written to an `edge` that was written, in 0-1."""
    i, j = COORDINATES.index(coordinate), COORDINATES.index(edge)
    along = look.maps[layer, i].sum(j % 2)  # over rows for x, over columns for y
    centre = (along * (np.arange(len(along)) + 0.5)).sum() / along.sum() / len(along)
    return float(abs(centre - look.boxes[0, j]))


def attention_maps(image: Image, look: Look, layer: int, truth: np.ndarray) -> Shown:
    """One panel a coordinate: attention over the picture (brighter is more), truth solid, prediction dashed."""
    figure, (line,) = new_figure(1, 4, (9.2, 3.2 * image.height / max(image.size) + 0.4))
    grey = image.convert("L")
    grey.thumbnail((256, 256))
    for axes, name, values in zip(line, COORDINATES, look.maps[layer], strict=True):
        draw_boxes(axes, grey, truth, look.boxes, title=f"writing {name}")
        across, down = grey.size
        axes.imshow(values, extent=(-0.5, across - 0.5, down - 0.5, -0.5), cmap="inferno", vmin=0,
                    alpha=np.clip(values / values.max(), 0.1, 0.9))  # fmt: skip
    return finish(figure, photos=True)


def boxes_of(row: Mapping, name: str) -> np.ndarray:
    """True boxes [N, 4] (x first, 0-1) of `nutrition table`, or of another thing in an embedded row.

    A row knows its tables alone; what else stands on an embedded picture is known to the scene that it was drawn from.
    """
    if name == "nutrition table":
        return yxyx_unit_to_xyxy_unit(row["objects"]["bbox"])
    seed, split, index = row["meta"]["image_url"].removeprefix("embedded://scenes/").split("/")
    things = render_scene(int(seed), int(index), split).things
    found = np.array([box for thing, box in things if thing == name], dtype=float).reshape(-1, 4)
    return found[area(found) > 0]
