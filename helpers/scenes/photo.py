"""What the camera does to the label: background, shadow, light, hand, blur, noise, JPEG."""

import io
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from helpers.scenes.text import Color

_TILE = 640
_BILINEAR = Image.Resampling.BILINEAR
SKINS = [(224, 172, 140), (198, 134, 100), (141, 85, 60), (240, 200, 175), (90, 56, 40)]


@lru_cache(maxsize=32)
def _noise(level: int, coarse: bool, coloured: bool) -> Image.Image:
    """A tile of noise about 128 with a standard deviation of `level`, the same in every process."""
    rng = np.random.default_rng(level)
    side = _TILE // 2 if coarse else _TILE
    values = rng.normal(128, level, (side, side, 3 if coloured else 1))
    values = np.broadcast_to(np.clip(values, 0, 255), (side, side, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((_TILE, _TILE), _BILINEAR)


@lru_cache(maxsize=4)
def _crinkle(number: int) -> Image.Image:
    """A tile of sharp random folds about 128, as in film and foil, the same in every process."""
    rng, total = np.random.default_rng(number), np.zeros((320, 320))
    for cells, weight in ((4, 1.0), (7, 0.7), (13, 0.4)):
        field = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        wave = np.asarray(field.resize((320, 320), Image.Resampling.BICUBIC))
        total += weight * (np.abs(wave) < 0.9) * np.sin(2.5 * wave) * np.exp(-np.abs(wave))
    return Image.fromarray(np.clip(128 + 150 * total, 0, 255).astype(np.uint8))


def crumple(rng: random.Random, pack: Image.Image) -> Image.Image:
    """The pack's film with light on its sharp folds."""
    side, x, y, strength = rng.randint(100, 300), rng.random(), rng.random(), rng.uniform(0.3, 1)
    left, top = int(x * (320 - side)), int(y * (320 - side))
    folds = _crinkle(rng.randrange(4)).crop((left, top, left + side, top + side)).resize(pack.size, _BILINEAR)
    folds = folds.point([int(128 + strength * (v - 128)) for v in range(256)])
    return ImageChops.soft_light(pack, Image.merge("RGB", (folds, folds, folds)))


def add_noise(rng: random.Random, image: Image.Image, levels: list[int]) -> Image.Image:
    """Grey or coloured, fine or coarse noise of one of the `levels` (standard deviation of 255)."""
    tile, (w, h) = _noise(rng.choice(levels), rng.random() < 0.4, rng.random() < 0.5), image.size
    x, y = int(rng.random() * (_TILE - w)), int(rng.random() * (_TILE - h))
    return ImageChops.add(image, tile.crop((x, y, x + w, y + h)), 1, -128)


def shade(color: Color, factor: float) -> Color:
    """`color` made lighter or darker."""
    return tuple(max(0, min(255, int(v * factor))) for v in color)


def gradient(size: tuple[int, int], corners: list[Color]) -> Image.Image:
    """A picture that runs between four colours: top left, top right, bottom left, bottom right."""
    return Image.fromarray(np.array(corners, dtype=np.uint8).reshape(2, 2, 3)).resize(size, _BILINEAR)


def _shelf(rng: random.Random, draw: ImageDraw.ImageDraw, w: int, h: int, board: Color) -> None:
    y = rng.randint(-h // 4, 0)
    while y < h:
        tall, x = rng.randint(h // 4, h // 2), rng.randint(-10, 0)
        while x < w:
            wide, fill = rng.randint(6, 26), tuple(rng.randint(20, 235) for _ in range(3))
            for _ in range(rng.choice([1, 1, 2, 3])):
                top = y + rng.randint(0, tall // 5)
                draw.rectangle((x, top, x + wide - 2, y + tall - 3), fill=fill)
                draw.rectangle((x + 1, top + tall // 4, x + wide - 4, top + tall // 2), fill=shade(fill, 1.5))
                draw.line((x + wide - 2, top, x + wide - 2, y + tall - 3), fill=shade(fill, 0.5))
                x += wide
        draw.rectangle((0, y + tall - 3, w, y + tall), fill=board)
        draw.line((0, y + tall - 3, w, y + tall - 3), fill=(235, 235, 230))
        y += tall


def _planks(rng: random.Random, draw: ImageDraw.ImageDraw, w: int, h: int, base: Color) -> None:
    step, upright = rng.randint(10, 45), rng.random() < 0.5
    for k in range(-rng.randint(0, 9), max(w, h), step):
        tone = shade(base, rng.uniform(0.85, 1.15))
        draw.rectangle((k, 0, k + step, h) if upright else (0, k, w, k + step), fill=tone)
        for _ in range(step // 3):
            a, grain = k + rng.randint(1, step), shade(tone, rng.uniform(0.85, 1.1))
            draw.line((a, 0, a + rng.randint(-2, 2), h) if upright else (0, a, w, a + rng.randint(-2, 2)), fill=grain)
        draw.line((k, 0, k, h) if upright else (0, k, w, k), fill=shade(base, 0.45))


def background(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A table-top, a shelf of other packs, a cloth or a kitchen, out of focus; painted small and enlarged."""
    w, h = max(8, size[0] // 4), max(8, size[1] // 4)
    base = rng.choice([(120, 84, 56), (190, 160, 120), (225, 222, 215), (70, 70, 75), (150, 155, 160), (40, 32, 30),
                       (200, 205, 210), (90, 110, 130), (160, 120, 90), (240, 240, 238), (105, 120, 95)])
    small = gradient((w, h), [shade(base, rng.uniform(0.7, 1.2)) for _ in range(4)])
    draw, kind = ImageDraw.Draw(small), rng.randrange(6)
    if kind == 0:
        _planks(rng, draw, w, h, base)
    elif kind == 1:
        _shelf(rng, draw, w, h, shade(base, 0.8))
    elif kind == 2:  # things on a table
        for _ in range(rng.randint(2, 7)):
            x, y, r = rng.randint(0, w), rng.randint(0, h), rng.randint(5, 40)
            fill = tuple(rng.randint(15, 240) for _ in range(3))
            box = (x - r, y - r * 0.7, x + r, y + r * 0.7)
            shape = rng.choice([draw.ellipse, draw.rectangle])
            shape((box[0] + 2, box[1] + 3, box[2] + 2, box[3] + 3), fill=shade(base, 0.6))
            shape(box, fill=fill)
    elif kind == 3:  # tiles or checked cloth
        step, fill = rng.randint(8, 30), shade(base, rng.choice([0.75, 1.25]))
        thick = rng.choice([1, 1, step // 2])
        for k in range(0, max(w, h), step):
            draw.line((k, 0, k + rng.randint(-3, 3), h), fill=fill, width=thick)
            draw.line((0, k, w, k + rng.randint(-3, 3)), fill=fill, width=1)
    elif kind == 4:  # a wall behind a table's edge
        y = rng.randint(h // 3, h)
        small.paste(gradient((w, h), [shade(base, rng.uniform(0.4, 0.8)) for _ in range(4)]), (0, y))
    else:  # a forearm that reaches behind the pack
        skin = rng.choice(SKINS)
        x, y, wide = rng.choice([0, w]), rng.randint(h // 3, h), rng.randint(w // 5, w // 2)
        for k in range(4):
            end = (w / 2, h * rng.uniform(0.4, 0.6))
            draw.line((x, y, *end), fill=shade(skin, 0.75 + 0.08 * k), width=wide - k * wide // 6)
        draw.ellipse((w * 0.2, h * 0.3, w * 0.8, h * 0.72), fill=shade(skin, 0.9))
    image = small.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))).resize(size, _BILINEAR)
    return add_noise(rng, image, [4, 6, 9]) if rng.random() < 0.5 else image


def compose(rng: random.Random, ground: Image.Image, pack: Image.Image, mask: Image.Image,
            side: tuple[list, Color] | None) -> Image.Image:
    """The pack before the background with its shadow and, where given, its side: a polygon (points, colour)."""
    w, h = ground.size
    small = mask.resize((max(1, w // 4), max(1, h // 4)), Image.Resampling.BOX)
    small = ImageChops.offset(small, rng.randint(-6, 6), rng.randint(-2, 8))
    depth = rng.uniform(0.3, 0.8)
    shadow = small.filter(ImageFilter.GaussianBlur(rng.uniform(2, 6))).point(lambda v: int(v * depth))
    ground.paste((8, 8, 10), (0, 0), shadow.resize((w, h), _BILINEAR))
    if side:
        ImageDraw.Draw(ground).polygon(side[0], fill=side[1])
    ground.paste(pack, (0, 0), mask)
    return ground


def hand(rng: random.Random, image: Image.Image, face: tuple[float, float, float, float], keep: list) -> None:
    """Fingers over the left or right edge of the pack's face, where they cover no box of `keep` (xyxy pixels)."""
    side, w = rng.choice([0, 2]), image.size[0]
    skin = rng.choice(SKINS)
    thick, slope = rng.uniform(0.07, 0.13) * w, rng.uniform(-14, 14)
    y = rng.uniform(max(0, face[1]), max(1, min(image.size[1], face[3]) - 3 * thick))
    for _ in range(rng.choice([1, 3, 4])):
        size = int(1.1 * w), max(6, int(thick))
        tones = np.interp(np.linspace(0, 1, 24), [0, 0.35, 1], [0.92, 1.06, 0.62])[:, None] * np.array(skin)
        finger = Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8)[:, None, :]).resize(size, _BILINEAR)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((1, 1, size[0] - 2, size[1] - 2), radius=size[1] / 2, fill=255)
        nail = (size[0] - 0.7 * size[1], 0.2 * size[1], size[0] - 0.12 * size[1], 0.8 * size[1])
        ImageDraw.Draw(finger).ellipse(nail, fill=shade(skin, 1.12))
        if side == 2:
            finger, mask = ImageOps.mirror(finger), ImageOps.mirror(mask)
        finger, mask = (part.rotate(slope, _BILINEAR, expand=True) for part in (finger, mask))
        reach = face[side] + rng.uniform(0.04, 0.15) * w * (1 if side == 0 else -1)
        x = int(reach - finger.size[0] if side == 0 else reach)
        box = (x, y, x + finger.size[0], y + finger.size[1])
        if not any(box[0] < k[2] and box[2] > k[0] and box[1] < k[3] and box[3] > k[1] for k in keep):
            image.paste(finger, (x, int(y)), mask.filter(ImageFilter.BoxBlur(1)))
        y += thick * rng.uniform(0.95, 1.15)


def _gain(rng: random.Random, size: tuple[int, int], can: tuple[float, float] | None, crumpled: bool) -> np.ndarray:
    """How much light falls where [40, 40, 3]."""
    x, y = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 40))
    angle, slope = rng.uniform(0, 6.28), rng.uniform(0, 0.25)
    gain = 1.02 + slope * (np.cos(angle) * x + np.sin(angle) * y) - rng.uniform(0, 0.2) * (x * x + y * y)
    if can:
        across = np.clip(((x + 1) / 2 * size[0] - can[0]) / can[1], -1, 1)
        gain = gain * (0.4 + 0.62 * np.sqrt(1 - 0.96 * np.clip(across + rng.uniform(-0.2, 0.2), -1, 1) ** 2))
    if crumpled:
        for _ in range(4):
            turn, often = rng.uniform(0, 3.14), rng.uniform(2, 9)
            fold = np.sin(often * (np.cos(turn) * x + np.sin(turn) * y) + rng.uniform(0, 6) + np.sin(3 * y + 2 * x))
            gain = gain * (1 + rng.uniform(0.02, 0.14) * np.sign(fold) * np.abs(fold) ** 3)
    if rng.random() < 0.25:
        edge = np.cos(angle + 1) * x + np.sin(angle + 1) * y - rng.uniform(-0.5, 0.5)
        gain = gain * (1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-edge * rng.uniform(4, 30))))
    cast = np.array([rng.uniform(0.86, 1.0), rng.uniform(0.9, 1.0), rng.uniform(0.76, 1.0)])
    cast = cast if rng.random() < 0.7 else np.ones(3)
    return gain[:, :, None] * cast * rng.choice([rng.uniform(0.6, 1), 0.95, 1.05])


def light(rng: random.Random, image: Image.Image, can: tuple[float, float] | None, crumpled: bool) -> Image.Image:
    """Uneven light, colour cast, vignette, the shading of a can at (middle x, radius), folds, glare, a cast shadow."""
    multiply = Image.fromarray((255 * np.clip(_gain(rng, image.size, can, crumpled), 0, 1)).astype(np.uint8))
    image = ImageChops.multiply(image, multiply.resize(image.size, _BILINEAR))
    if rng.random() < 0.4:
        x, y = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48))
        glare = np.zeros((48, 48))
        for _ in range(rng.randint(1, 3)):
            gx, gy = rng.uniform(-1, 1), rng.uniform(-1, 1)
            turn = rng.gauss(1.57, 0.12) if can else rng.uniform(0, 3.14)
            along = (x - gx) * np.cos(turn) + (y - gy) * np.sin(turn)
            across = -(x - gx) * np.sin(turn) + (y - gy) * np.cos(turn)
            spot = np.exp(-((along / rng.uniform(0.15, 0.9)) ** 2 + (across / rng.uniform(0.05, 0.2)) ** 2))
            glare += rng.uniform(0.2, 0.75) * spot
        flare = Image.fromarray((255 * np.clip(glare, 0, 0.88)).astype(np.uint8)).resize(image.size, _BILINEAR)
        image = ImageChops.screen(image, Image.merge("RGB", (flare, flare, flare)))
    return image


def develop(rng: random.Random, image: Image.Image) -> Image.Image:
    """Focus, movement, contrast and sensor noise."""
    kind = rng.random()
    if kind < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 1.5)))
    elif kind < 0.35:
        less = rng.uniform(0.5, 0.8)
        few = int(image.size[0] * less), int(image.size[1] * less)
        image = image.resize(few, _BILINEAR).resize(image.size, _BILINEAR)
    elif kind < 0.43:
        image = Image.blend(image, ImageChops.offset(image, *rng.choice([(2, 0), (0, 2), (2, 2), (3, 0)])), 0.5)
    if rng.random() < 0.7:
        low, high, gamma = rng.uniform(0, 30), rng.uniform(225, 255), rng.uniform(0.65, 1.2)
        image = image.point([int(low + (high - low) * (v / 255) ** gamma) for v in range(256)] * 3)
    return add_noise(rng, image, [2, 4, 4, 7, 11]) if rng.random() < 0.7 else image


def to_jpeg(rng: random.Random, image: Image.Image, orientation: int = 1) -> bytes:
    """JPEG bytes at a quality of 45 to 92, with an EXIF orientation tag where it is not 1."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", quality=rng.randint(45, 92), **({"exif": exif} if orientation != 1 else {}))
    return buffer.getvalue()
