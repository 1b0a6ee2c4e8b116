"""Pictures for training the tiny base: scenes rendered once by many processes, kept as bytes, cropped on the device."""

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.ops import roi_align
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from helpers.scenes import SPLITS, render_scene

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Size = tuple[int, int]  # (height, width) of a photo in pixels


@dataclass
class Pool:
    """Scenes sorted by the size of their photos; the three lists of a size run side by side."""

    images: dict[Size, torch.Tensor]  # uint8 [n, 3, height, width]
    things: dict[Size, list]  # n lists of (name, xyxy_unit)
    tables: dict[Size, list]  # n lists of (category, xyxy_unit)

    def __len__(self) -> int:
        return sum(map(len, self.things.values()))


Job = tuple[int, str, int, int, Path]  # seed, split, start, stop, folder


def _file(job: Job) -> Path:
    seed, split, start, stop, folder = job
    return folder / f"{split}-{seed}-{start}-{stop}.pt"


def _render(job: Job) -> None:
    """Render scenes `start` to `stop` of a split into one file."""
    seed, split, start, stop, _ = job
    found = defaultdict(lambda: ([], [], []))
    for index in range(start, stop):
        scene = render_scene(seed, index, split)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(scene.jpeg))).convert("RGB")
        images, things, tables = found[image.height, image.width]
        images.append(np.asarray(image))
        things.append(scene.things)
        tables.append(scene.tables)
    ready = {size: (torch.from_numpy(np.stack(images)), *boxes) for size, (images, *boxes) in found.items()}
    part = _file(job).with_suffix(f".{os.getpid()}")
    torch.save(ready, part)
    part.rename(_file(job))


def load_pool(
    folder: str | Path, split: str = "base", count: int | None = None, *, seed: int = 0, each: Callable = map,
    device: str = "cpu",
) -> Pool:  # fmt: skip
    """The first `count` scenes of a split (all of a pipeline's split by default), rendered once into `folder`.

    The split "base" has no end, and none of its scenes is in the pipeline's splits. `each` maps the rendering over
    files of 100 scenes: give `multiprocessing.Pool.imap` for several processes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = count or SPLITS[split]
    jobs = [(seed, split, i, min(i + 100, count), folder) for i in range(0, count, 100)]
    for _ in each(_render, [job for job in jobs if not _file(job).exists()]):
        pass
    found = defaultdict(lambda: ([], [], []))
    for job in jobs:
        for key, new in torch.load(_file(job), weights_only=True).items():
            found[key][0].append(new[0].to(device).permute(0, 3, 1, 2))
            found[key][1].extend(new[1])
            found[key][2].extend(new[2])
    return Pool(
        images={key: torch.cat(images) for key, (images, _, _) in found.items()},
        things={key: things for key, (_, things, _) in found.items()},
        tables={key: tables for key, (_, _, tables) in found.items()},
    )


def model_size(photo: Size, limits: dict[str, int]) -> Size:
    """(height, width) after the processor's own resize; `limits` is its `size`, in pixels of area."""
    return smart_resize(*photo, 28, limits["shortest_edge"], limits["longest_edge"])


def take(images: torch.Tensor, crops: np.ndarray, size: Size, exact: bool = True) -> torch.Tensor:
    """Crops [B, 4] (x0, y0, x1, y1 in 0-1) of uint8 images [B, 3, H, W], resized to `size`: [B, 3, h, w] in 0-1.

    `exact`: as the processor resizes, for whole pictures only; else by averaging, which is faster.
    """
    images = images.float() / 255
    if exact:
        if (crops != np.array([0, 0, 1, 1])).any():
            raise ValueError("only whole pictures can be resized exactly; give exact=False for crops")
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    height, width = images.shape[2:]
    boxes = np.column_stack([np.arange(len(crops)), crops * [width, height, width, height]])
    boxes = torch.as_tensor(boxes, dtype=torch.float32, device=images.device)
    return roi_align(images, boxes, size, sampling_ratio=2, aligned=True)


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


def patches(images: torch.Tensor) -> torch.Tensor:
    """The processor's patches [B, h * w / 196, 1176] of pictures [B, 3, h, w] in 0-1: 14 x 14, in groups of 2 x 2."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    batch, _, height, width = images.shape
    rows, columns = height // 28, width // 28
    grouped = ((images - mean) / std).reshape(batch, 3, rows, 2, 14, columns, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = grouped[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # the two frames of a still
    return twice.reshape(batch, rows * columns * 4, 3 * 2 * 14 * 14)


def random_crop(rng: np.random.Generator, smallest: float = 0.3) -> np.ndarray:
    """A crop [4] (x0, y0, x1, y1 in 0-1) with sides of `smallest` to 1, its aspect changed by up to 15 %."""
    side, stretch = rng.uniform(smallest, 1), math.exp(rng.uniform(-0.15, 0.15))
    sides = np.minimum(1, [side * stretch, side / stretch])
    corner = rng.uniform(0, 1 - sides)
    return np.concatenate([corner, corner + sides])
