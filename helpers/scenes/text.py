"""Words and letters for the scenes: fonts, vocabulary of twelve languages, text painted from cached masks.

Text is laid out with Pillow's own basic layout engine, so that no library of the system changes the picture.
"""

import json
import random
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

WORDS: dict[str, dict] = json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))
_SHIPPED = Path(__file__).parent / "fonts"
_DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
#: family -> (regular file, bold file); every family draws Latin, Cyrillic and Greek
FAMILIES = {
    "liberation": (_SHIPPED / "LiberationSans-Regular.ttf", _SHIPPED / "LiberationSans-Bold.ttf"),
    "roboto-condensed": (_SHIPPED / "RobotoCondensed-Regular.ttf", _SHIPPED / "RobotoCondensed-Bold.ttf"),
    "dejavu": (_DEJAVU / "DejaVuSans.ttf", _DEJAVU / "DejaVuSans-Bold.ttf"),
    "dejavu-serif": (_DEJAVU / "DejaVuSerif.ttf", _DEJAVU / "DejaVuSerif-Bold.ttf"),
    "dejavu-oblique": (_DEJAVU / "DejaVuSans-Oblique.ttf", _DEJAVU / "DejaVuSans-BoldOblique.ttf"),
    "dejavu-serif-italic": (_DEJAVU / "DejaVuSerif-Italic.ttf", _DEJAVU / "DejaVuSerif-BoldItalic.ttf"),
    "dejavu-mono": (_DEJAVU / "DejaVuSansMono.ttf", _DEJAVU / "DejaVuSansMono-Bold.ttf"),
}
Color = tuple[int, int, int]


def luma(color: Color) -> float:
    """How bright a colour looks, 0 to 255 (ITU-R BT.601)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


@lru_cache(maxsize=512)
def _font(family: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FAMILIES[family][bold]), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=50_000)
def width(text: str, family: str, bold: bool, size: int) -> float:
    """Advance width of `text` in pixels at font size `size` (pixels per em)."""
    return _font(family, bold, size).getlength(text)


@lru_cache(maxsize=50_000)
def _mask(text: str, family: str, bold: bool, size: int) -> tuple[Image.Image, int, int]:
    font = _font(family, bold, size)
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    mask = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))), 0)
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font, anchor="ls")
    return mask, int(left), int(top)


def fit(text: str, family: str, bold: bool, max_width: float, max_size: float) -> int:
    """The largest font size (pixels, at least 4) at which `text` is no wider than `max_width`."""
    return max(4, int(min(max_size, 20 * max_width / max(1.0, width(text, family, bold, 20)))))


def put(image: Image.Image, x: float, baseline: float, text: str, face: tuple[str, bool, int], fill: Color,
        align: str = "l") -> float:
    """Paint `text` with `face` = (family, bold, size); align is l, c or r about `x`. Returns the width in pixels."""
    if not text:
        return 0.0
    length = width(text, *face)
    start = x - {"l": 0.0, "c": 0.5, "r": 1.0}[align] * length
    mask, left, top = _mask(text, *face)
    image.paste(fill, (round(start) + left, round(baseline) + top), mask)
    return length


def paragraph(image: Image.Image, rect: tuple[float, float, float, float], words: list[tuple[str, bool]], family: str,
              fill: Color, max_size: float = 40) -> int:
    """Fill `rect` (x0, y0, x1, y1) with flowing `words`, each (text, bold), at the size that fits; returns the size."""
    x0, y0, x1, y1 = rect
    if x1 <= x0 or y1 <= y0:
        return 0
    letters = sum(len(word) + 1 for word, _ in words)
    size = max(4, int(min(max_size, (2.05 * (x1 - x0) * (y1 - y0) / (1.2 * letters)) ** 0.5)))
    x, baseline, gap = x0, y0 + 0.95 * size, 0.27 * size
    for word, bold in words:
        length = width(word, family, bold, size)
        if x > x0 and x + length > x1:
            x, baseline = x0, baseline + 1.2 * size
        if baseline > y1:
            break
        if x + length <= x1 + 2:
            put(image, x, baseline, word, (family, bold, size), fill)
        x += length + gap
    return size


class Style:
    """How the tables of one product look: family, colours, lines. Drawn once a product, so its tables are alike."""

    def __init__(self, rng: random.Random, paper: Color, ink: Color, accent: Color):
        self.family = rng.choice(["liberation"] * 4 + ["roboto-condensed"] * 4 + ["dejavu"] * 2 + ["dejavu-serif"])
        self.paper, self.ink, self.accent = paper, ink, accent
        self.frame = rng.choice([0, 0, 1, 1, 1, 2, 3])
        self.rules = rng.choice(["rows", "rows", "rows", "grid", "none", "head", "none"])
        self.zebra = rng.random() < 0.22
        self.head_fill = rng.random() < 0.3
        self.bold_title = rng.random() < 0.8
        self.upper = rng.random() < 0.15
        self.comma = rng.random() < 0.6
        self.tint = tuple(int(0.86 * p + 0.14 * i) for p, i in zip(paper, ink, strict=True))

    def number(self, rng: random.Random, high: float, digits: int = 1) -> str:
        text = f"{rng.random() * high:.{digits}f}"
        return text.replace(".", ",") if self.comma else text
