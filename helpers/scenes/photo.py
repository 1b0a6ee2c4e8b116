"""What the camera does to the label: background, shadow, light, hand, blur, noise, JPEG."""

import io
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from helpers.scenes.text import Color

_TILE = 640


@lru_cache(maxsize=8)
def _noise(kind: int) -> Image.Image:
    """A tile of noise about 128 (kinds: 0, 1 fine grey and coloured, 2, 3 coarse), the same in every process."""
    rng = np.random.default_rng(kind)
    coarse, coloured = kind >= 2, kind % 2
    side = _TILE // 2 if coarse else _TILE
    values = rng.normal(128, 12, (side, side, 3 if coloured else 1))
    values = np.broadcast_to(np.clip(values, 0, 255), (side, side, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((_TILE, _TILE), Image.Resampling.BILINEAR)


def _tile(rng: random.Random, kind: int, size: tuple[int, int]) -> Image.Image:
    tile = _noise(kind)
    if size[0] > _TILE or size[1] > _TILE:
        return tile.resize(size)
    x, y = rng.randint(0, _TILE - size[0]), rng.randint(0, _TILE - size[1])
    return tile.crop((x, y, x + size[0], y + size[1]))


def shade(color: Color, factor: float) -> Color:
    """`color` made lighter or darker."""
    return tuple(max(0, min(255, int(v * factor))) for v in color)


def gradient(size: tuple[int, int], corners: list[Color]) -> Image.Image:
    """A picture that runs between four colours: top left, top right, bottom left, bottom right."""
    return Image.fromarray(np.array(corners, dtype=np.uint8).reshape(2, 2, 3)).resize(size, Image.Resampling.BICUBIC)


def background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A table-top, a shelf of other packs, a cloth or a kitchen, out of focus; painted small and enlarged."""
    w, h = max(8, size[0] // 4), max(8, size[1] // 4)
    base = rng.choice([(120, 84, 56), (190, 160, 120), (225, 222, 215), (70, 70, 75), (150, 155, 160), (40, 32, 30),
                       (200, 205, 210), (90, 110, 130), (160, 120, 90), (235, 235, 235), (105, 120, 95)])
    small = gradient((w, h), [shade(base, rng.uniform(0.7, 1.2)) for _ in range(4)])
    draw, kind = ImageDraw.Draw(small), rng.randrange(5)
    if kind == 0:  # planks
        step, upright = rng.randint(10, 40), rng.random() < 0.5
        for k in range(0, max(w, h), step):
            line = (k, 0, k, h) if upright else (0, k, w, k)
            draw.line(line, fill=shade(base, 0.5), width=1)
            for _ in range(3):
                a = k + rng.randint(1, step)
                draw.line((a, 0, a, h) if upright else (0, a, w, a), fill=shade(base, rng.uniform(0.8, 1.15)), width=1)
    elif kind == 1:  # shelf with packs
        y = 0
        while y < h:
            tall, x = rng.randint(h // 4, h // 2), 0
            while x < w:
                wide = rng.randint(6, 22)
                top = y + rng.randint(0, tall // 3)
                fill = tuple(rng.randint(20, 235) for _ in range(3))
                draw.rectangle((x, top, x + wide - 2, y + tall - 3), fill=fill)
                draw.rectangle((x + 1, top + tall // 4, x + wide - 4, top + tall // 2), fill=shade(fill, 1.5))
                x += wide
            draw.rectangle((0, y + tall - 3, w, y + tall), fill=shade(base, 0.8))
            y += tall
    elif kind == 2:  # things on a table
        for _ in range(rng.randint(2, 7)):
            x, y, r = rng.randint(0, w), rng.randint(0, h), rng.randint(5, 40)
            fill = tuple(rng.randint(15, 240) for _ in range(3))
            rng.choice([draw.ellipse, draw.rectangle])((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=fill)
    elif kind == 3:  # tiles or checked cloth
        step, fill = rng.randint(8, 30), shade(base, rng.choice([0.75, 1.25]))
        for k in range(0, max(w, h), step):
            draw.line((k, 0, k + rng.randint(-3, 3), h), fill=fill, width=rng.choice([1, 1, step // 2]))
            draw.line((0, k, w, k + rng.randint(-3, 3)), fill=fill, width=1)
    small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))
    image = small.resize(size, Image.Resampling.BICUBIC)
    return ImageChops.add(image, _tile(rng, rng.randrange(4), size), 1, -128)


def compose(rng: random.Random, ground: Image.Image, pack: Image.Image, mask: Image.Image) -> Image.Image:
    """The pack before the background, with its shadow."""
    w, h = ground.size
    small = mask.resize((max(1, w // 4), max(1, h // 4)))
    small = ImageChops.offset(small, rng.randint(-6, 6), rng.randint(-2, 8)).filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))
    depth = rng.uniform(0.3, 0.8)
    shadow = small.point(lambda v: int(v * depth)).resize((w, h), Image.Resampling.BILINEAR)
    ground.paste((8, 8, 10), (0, 0), shadow)
    ground.paste(pack, (0, 0), mask)
    return ground


def hand(rng: random.Random, image: Image.Image, face: tuple[float, float, float, float], keep: list) -> None:
    """Finger tips over a side of the pack, where they cover no box of `keep` (xyxy pixels)."""
    side, w = rng.choice([0, 2]), image.size[0]
    edge, reach = face[side], rng.uniform(0.05, 0.16) * w
    skin = rng.choice([(224, 172, 140), (198, 134, 100), (141, 85, 60), (240, 200, 175), (90, 56, 40)])
    thick = rng.uniform(0.06, 0.12) * w
    y = rng.uniform(face[1], max(face[1] + 1, face[3] - 3 * thick))
    for _ in range(rng.choice([1, 3, 4])):
        inner = edge + reach * rng.uniform(0.6, 1.1) * (1 if side == 0 else -1)
        outer = edge - 2.5 * w * (1 if side == 0 else -1)
        box = (min(inner, outer), y, max(inner, outer), y + thick)
        if not any(box[0] < k[2] and box[2] > k[0] and box[1] < k[3] and box[3] > k[1] for k in keep):
            patch = Image.new("L", image.size, 0)
            ImageDraw.Draw(patch).rounded_rectangle(box, radius=thick / 2, fill=255)
            tones = [shade(skin, f) for f in (1.08, 1.0, 0.8, 0.72)]
            image.paste(gradient(image.size, tones), (0, 0), patch.filter(ImageFilter.GaussianBlur(1)))
        y += thick * rng.uniform(0.95, 1.15)


def light(rng: random.Random, image: Image.Image, round_at: tuple[float, float] | None) -> Image.Image:
    """Uneven light, colour cast, vignette, the shading of a cylinder at (middle x, radius), glare and cast shadow."""
    w, h = image.size
    x, y = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 40))
    angle, slope = rng.uniform(0, 6.28), rng.uniform(0, 0.25)
    gain = 1 + slope * (np.cos(angle) * x + np.sin(angle) * y) - rng.uniform(0, 0.22) * (x * x + y * y)
    if round_at:
        across = np.clip(((x + 1) / 2 * w - round_at[0]) / round_at[1], -1, 1)
        gain = gain * (0.45 + 0.55 * np.sqrt(1 - 0.96 * across**2))
    if rng.random() < 0.25:
        edge = np.cos(angle + 1) * x + np.sin(angle + 1) * y - rng.uniform(-0.5, 0.5)
        gain = gain * (1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-edge * rng.uniform(4, 30))))
    cast = np.array([rng.uniform(0.82, 1.0), rng.uniform(0.88, 1.0), rng.uniform(0.75, 1.0)])
    gain = gain[:, :, None] * cast * rng.uniform(0.6, 1.05)
    multiply = Image.fromarray((255 * np.clip(gain, 0, 1)).astype(np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    image = ImageChops.multiply(image, multiply)
    if rng.random() < 0.45:
        glare = np.zeros((40, 40))
        for _ in range(rng.randint(1, 3)):
            gx, gy, turn = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0, 3.14)
            along = (x - gx) * np.cos(turn) + (y - gy) * np.sin(turn)
            across = -(x - gx) * np.sin(turn) + (y - gy) * np.cos(turn)
            spot = np.exp(-((along / rng.uniform(0.15, 0.9)) ** 2 + (across / rng.uniform(0.05, 0.2)) ** 2))
            glare += rng.uniform(0.2, 0.8) * spot
        flare = Image.fromarray((255 * np.clip(glare, 0, 0.9)).astype(np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        image = ImageChops.screen(image, Image.merge("RGB", (flare, flare, flare)))
    return image


def develop(rng: random.Random, image: Image.Image) -> Image.Image:
    """Focus, movement, contrast and sensor noise."""
    draw = rng.random()
    if draw < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    elif draw < 0.45:
        shift = rng.choice([(2, 0), (0, 2), (2, 2), (3, 0)])
        image = Image.blend(image, ImageChops.offset(image, *shift), 0.5)
    if rng.random() < 0.7:
        low, high, gamma = rng.uniform(0, 35), rng.uniform(215, 255), rng.uniform(0.75, 1.3)
        curve = [int(low + (high - low) * (v / 255) ** gamma) for v in range(256)]
        image = image.point(curve * 3)
    if rng.random() < 0.75:
        image = ImageChops.add(image, _tile(rng, rng.randrange(4), image.size), rng.choice([1, 1, 1]), -128) \
            if rng.random() < 0.4 else Image.blend(image, ImageChops.add(image, _tile(rng, 1, image.size), 1, -128), 0.5)
    return image


def to_jpeg(rng: random.Random, image: Image.Image, orientation: int = 1) -> bytes:
    """JPEG bytes at a quality of 45 to 92, with an EXIF orientation tag where it is not 1."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if orientation != 1 else {}
    image.save(buffer, "JPEG", quality=rng.randint(45, 92), **options)
    return buffer.getvalue()
