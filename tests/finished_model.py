"""A finished model for tests: the tiny base as a run leaves its merged model, with a prompt that it knows."""

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


def clear(kind: str = "RGBA", size: tuple[int, int] = (64, 64)) -> bytes:
    """Black ink in the middle of a transparent ground, as a file; `kind` is how it says transparent."""
    ink = Image.new("L", size, 0)
    ink.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4))
    black, ground = Image.new("L", size, 0), ink.point(lambda value: 7 if value == 0 else 0)  # 7: black to the eye
    palette = ground.point(lambda value: value // 7).convert("P")
    palette.putpalette([0] * 6)
    picture, options = {
        "RGBA": (Image.merge("RGBA", (black, black, black, ink)), {}), "LA": (Image.merge("LA", (black, ink)), {}),
        "L": (ground, {"transparency": 7}), "RGB": (Image.merge("RGB", [ground] * 3), {"transparency": (7, 7, 7)}),
        "1": (ground.point(lambda value: 255 * (value > 0)).convert("1"), {"transparency": 1}),
        "16 bits": (ground.convert("I;16"), {"transparency": 7}), "P": (palette, {"transparency": 1}),
        "P, a value each": (palette, {"transparency": b"\xff\0"}),
    }[kind]  # fmt: skip
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()
