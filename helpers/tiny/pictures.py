"""Pictures for training the tiny base: scenes rendered by many processes, cropped and disturbed on the device."""

import io
import math
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.ops import roi_align

from helpers.scenes import render_scene

Size = tuple[int, int]  # (height, width) in pixels


@dataclass
class Pool:
    """Scenes sorted by the size of their photos; the three lists of a size run side by side."""

    images: dict[Size, torch.Tensor]  # uint8 [n, 3, height, width]
    things: dict[Size, list]  # n lists of (name, xyxy_unit)
    tables: dict[Size, list]  # n lists of (category, xyxy_unit)


def load_pool(split: str, count: int, workers: int = 1) -> Pool:
    """The first `count` scenes of a split, rendered by `workers` processes (about 20 scenes a second each).

    The split "base" has no end, and none of its scenes is in the pipeline's splits.
    """
    pool = Pool(defaultdict(list), defaultdict(list), defaultdict(list))
    with multiprocessing.Pool(workers) as crew:
        for scene in crew.imap(partial(render_scene, 0, split=split), range(count), chunksize=20):
            image = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(scene.jpeg))).convert("RGB"))
            pool.images[image.shape[:2]].append(torch.from_numpy(image).permute(2, 0, 1))
            pool.things[image.shape[:2]].append(scene.things)
            pool.tables[image.shape[:2]].append(scene.tables)
    return Pool({size: torch.stack(images) for size, images in pool.images.items()}, pool.things, pool.tables)


def random_crop(rng: np.random.Generator, smallest: float = 0.3) -> np.ndarray:
    """A crop [4] (x0, y0, x1, y1 in 0-1) with sides of `smallest` to 1, its aspect changed by up to 15 %."""
    side, stretch = rng.uniform(smallest, 1), math.exp(rng.uniform(-0.15, 0.15))
    sides = np.minimum(1, [side * stretch, side / stretch])
    corner = rng.uniform(0, 1 - sides)
    return np.concatenate([corner, corner + sides])


def take(images: torch.Tensor, crops: np.ndarray, size: Size) -> torch.Tensor:
    """Crops [B, 4] (x0, y0, x1, y1 in 0-1) of uint8 images [B, 3, H, W], resized to `size`: [B, 3, h, w] in 0-1."""
    height, width = images.shape[2:]
    boxes = np.column_stack([np.arange(len(crops)), crops * [width, height, width, height]])
    boxes = torch.as_tensor(boxes, dtype=torch.float32, device=images.device)
    return roi_align(images.float() / 255, boxes, size, sampling_ratio=2, aligned=True)


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random blur, brightness, contrast, colour cast, greyness, noise, each picture its own; [B, 3, h, w] in 0-1."""
    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(len(images), *shape, generator=generator, device=images.device) * (high - low) + low

    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, blurred, draw(-1, 1, 1, 1, 1).clamp(min=0))
    images = images ** draw(-0.5, 0.5, 1, 1, 1).exp()
    images = (images - 0.5) * draw(0.6, 1.3, 1, 1, 1) + 0.5 + draw(-0.15, 0.15, 1, 1, 1) + draw(-0.08, 0.08, 3, 1, 1)
    grey = draw(-1.0, 1.0, 1, 1, 1).clamp(min=0) ** 2
    images = images * (1 - grey) + images.mean(1, keepdim=True) * grey
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * draw(-0.05, 0.06, 1, 1, 1).clamp(min=0)).clamp(0, 1)
