"""A finished model for tests: the tiny base as a run leaves its merged model, asked for something that it knows."""

import io
import shutil
from pathlib import Path

from PIL import Image
from transformers import Qwen2VLProcessor

from helpers import parity
from helpers.recipes import SCALES
from helpers.scenes import render_scene
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the barcode."
BUDGET = {name: SCALES["tiny"][name] for name in ("min_pixels", "max_pixels")}


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE, **BUDGET)
    processor.save_pretrained(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(TINY_BASE / name, folder)
    parity.write(folder, parity.record(processor, PROMPT))
    return folder


def scene(number: int) -> bytes:
    return render_scene(0, number, "val").jpeg


def turned(jpeg: bytes) -> bytes:
    """The same picture stored on its side, with the EXIF tag that shows it upright."""
    with Image.open(io.BytesIO(jpeg)) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        file = io.BytesIO()
        picture.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()
