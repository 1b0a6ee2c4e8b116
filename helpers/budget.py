"""How long sequences get, by arithmetic: without opening a picture."""

import math
from collections.abc import Iterable

import numpy as np
from datasets import Dataset
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from helpers.recipes import IMAGE_TOKEN

UNIT = math.isqrt(IMAGE_TOKEN)  # pixels: an image token's side


def image_tokens(sizes: Iterable[tuple[int, int]], min_pixels: int, max_pixels: int) -> np.ndarray:
    """Image tokens of pictures of these (width, height) in pixels: int64 [N]."""
    resized = [smart_resize(int(height), int(width), UNIT, min_pixels, max_pixels) for width, height in sizes]
    return np.array([height * width // IMAGE_TOKEN for height, width in resized], dtype=np.int64)


def longest(rows: Dataset, count: int, min_pixels: int, max_pixels: int) -> Dataset:
    """The `count` rows whose pictures make most image tokens, by their `width` and `height`."""
    tokens = image_tokens(zip(rows["width"], rows["height"], strict=True), min_pixels, max_pixels)
    return rows.select(np.argsort(-tokens, kind="stable")[:count])
