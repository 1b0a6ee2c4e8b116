"""Box-aware augmentation: each epoch changes every picture, and its boxes with it. For training alone."""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from transformers import TrainerCallback

from helpers.boxes import xyxy_px_to_xyxy_unit, xyxy_unit_to_xyxy_px, xyxy_unit_to_yxyx_unit, yxyx_unit_to_xyxy_unit
from helpers.data.audit import MOST_ASPECT
from helpers.data.pictures import as_rgb

GREY = 114  # what lies beyond the edge of a turned or moved picture
LEAST_SIDE = 2.0  # pixels: a draw that leaves a box thinner than this is drawn again
TRIES = 5
MOST_CROPPED = 0.3  # of a side, at each edge
MOST_TILT = math.radians(6)


class Tilt(v2.Transform):
    """A turn by at most `MOST_TILT` to either side, on a ground so large that nothing is cut. (RandomRotation gives
    picture and boxes canvases that differ by a pixel now and then.)"""

    def make_params(self, flat_inputs: list) -> dict:
        height, width = functional.get_size(flat_inputs[0])
        angle = MOST_TILT * (2 * float(torch.rand(())) - 1)
        across, down = math.cos(angle), abs(math.sin(angle))
        sides = [max(0, math.ceil((width * across + height * down - width) / 2)),
                 max(0, math.ceil((height * across + width * down - height) / 2))]
        return {"angle": math.degrees(angle), "padding": sides}

    def transform(self, inpt, params: dict):
        padded = functional.pad(inpt, params["padding"], fill=GREY)
        return functional.rotate(padded, params["angle"], v2.InterpolationMode.BILINEAR, fill=GREY)


class CropAroundTables(v2.Transform):
    """A random crop that keeps every box whole; each edge moves in by at most `MOST_CROPPED`."""

    def make_params(self, flat_inputs: list) -> dict:
        height, width = functional.get_size(flat_inputs[0])
        x0, y0, x1, y1 = width, height, 0, 0  # where there is no box, all is free
        for boxes in flat_inputs[1:]:
            (x0, y0), (x1, y1) = boxes.amin(0)[:2].tolist(), boxes.amax(0)[2:].tolist()
        free, most = torch.tensor([x0, y0, width - x1, height - y1]), torch.tensor([width, height] * 2) * MOST_CROPPED
        left, top, right, bottom = (torch.rand(4) * torch.minimum(free, most)).int().tolist()
        return {"top": top, "left": left, "height": height - top - bottom, "width": width - left - right}

    def transform(self, inpt, params: dict):
        return functional.crop(inpt, **params)


# One warp at most: the hull of a turned box is tight, the hull of that hull after a second warp would not be.
GEOMETRY = v2.Compose([
    v2.RandomApply([v2.RandomChoice([v2.RandomRotation((by, by), expand=True) for by in (90, 180, 270)])], p=0.15),
    v2.RandomApply([v2.RandomChoice([Tilt(), v2.RandomPerspective(0.15, p=1, fill=GREY)])], p=0.5),
    v2.RandomZoomOut(fill=GREY, side_range=(1, 1.4), p=0.2),
    v2.RandomApply([CropAroundTables()], p=0.5),
])
LOOK = v2.Compose([  # no change of hue: it takes longer than a turn, light and JPEG together
    v2.RandomApply([v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)], p=0.8),
    v2.RandomGrayscale(p=0.05),
    v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.5))], p=0.15),
    v2.RandomApply([v2.JPEG((40, 90))], p=0.3),
])


class Augment(TrainerCallback):
    """A row of the project's schema -> the row as this epoch shows it: `image`, `width`, `height`, `objects` are new.

    What happens to a picture depends on (seed, epoch, image_id) alone: not on the worker that does it, on the order of
    the pictures or on where a run was killed. As a callback of the trainer it learns the epoch before the first batch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, row: Mapping) -> dict:
        name = f"{self.seed} {self.epoch} {row['image_id']}"
        with torch.random.fork_rng(devices=[]):  # the training's own random numbers go on as if nothing were drawn
            # not torch.manual_seed: that would also reset the GPU's
            torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
            picture, boxes = warp(tv_tensors.Image(as_rgb(row["image"])), row["objects"]["bbox"])
            picture = functional.to_pil_image(LOOK(picture))
        unit = xyxy_unit_to_yxyx_unit(xyxy_px_to_xyxy_unit(boxes, *picture.size).clip(0, 1))
        objects = {**row["objects"], "bbox": unit.tolist()}
        return {**row, "image": picture, "width": picture.width, "height": picture.height, "objects": objects}


def warp(picture: tv_tensors.Image, yxyx_unit: list[list[float]]) -> tuple[tv_tensors.Image, np.ndarray]:
    """`picture` [3, H, W] after `GEOMETRY` and the tight hulls of its boxes [N, 4] in its new pixels, x first.

    Drawn again where the picture gets too thin for the model or a box too thin to be seen; unchanged after `TRIES`.
    """
    height, width = picture.shape[-2:]
    boxes = xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(yxyx_unit), width, height)
    before = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width))
    for _ in range(TRIES):
        # alone where there are no boxes: torchvision would leave their canvas as it was
        warped, after = GEOMETRY(picture, before) if len(boxes) else (GEOMETRY(picture), before)
        short, long = sorted(warped.shape[-2:])
        if long <= MOST_ASPECT * short and (after[:, 2:] - after[:, :2] >= LEAST_SIDE).all():
            return warped, after.numpy()
    return picture, boxes
