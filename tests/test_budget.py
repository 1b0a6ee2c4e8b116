"""Lengths by arithmetic against the processor's own."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers.budget import image_tokens
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE


@pytest.mark.parametrize("scale", SCALES)
def test_image_tokens_are_those_of_the_processor(scale):
    budget = {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
    images = Qwen2VLProcessor.from_pretrained(TINY_BASE).image_processor
    sizes = [(300, 400), (1000, 90), (60, 50), (1280, 960)]
    grids = [images(Image.new("RGB", size), **budget, return_tensors="pt")["image_grid_thw"] for size in sizes]
    assert image_tokens(sizes, **budget).tolist() == (torch.cat(grids).prod(1) // 4).tolist()
    assert image_tokens([], **budget).tolist() == []
