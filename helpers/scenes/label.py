"""The printed label of a product, flat: its design, the panels and the things on it."""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw

from helpers.scenes.layout import LONG, Rect, cells
from helpers.scenes.panels import draw_panel
from helpers.scenes.photo import gradient, shade
from helpers.scenes.text import WORDS, Color, Style, luma
from helpers.scenes.things import DRAW, SHAPES

#: colours of lids, rims and glass
STUFFS = [(190, 192, 196), (60, 62, 66), (222, 180, 90), (120, 40, 30), (230, 232, 235), (70, 90, 60)]
#: how often a thing is drawn, before it has been drawn once
WEIGHTS = {"barcode": 6, "qr code": 2, "logo": 5, "product name": 5, "ingredient list": 6, "directions": 4,
           "cooking table": 3, "price table": 3, "dosage table": 3, "best-before stamp": 5, "recycling mark": 4,
           "flag": 3, "seal": 3, "food picture": 4}


def bilingual(words: dict, other: dict) -> dict:
    """The vocabulary of a pack for two countries: titles and nutrients in both languages."""
    both = {key: [f"{a} / {b}" for a, b in zip(words[key], other[key], strict=False)] for key in ("title", "rows")}
    return {**words, **both}


class Product:
    """The design of one product: languages, colours, style of the tables. Two photos of a product share it."""

    def __init__(self, rng: random.Random):
        self.words = WORDS[rng.choice(["en"] * 3 + ["fr"] * 2 + sorted(WORDS))]
        if rng.random() < 0.12:
            self.words = bilingual(self.words, WORDS[rng.choice(sorted(WORDS))])
        self.american = rng.random() < 0.4
        hue = [rng.randint(0, 255) for _ in range(3)]
        vivid = shade(tuple(hue), 255 / max(1, max(hue)) * rng.uniform(0.5, 1.0))
        self.paper, self.ink = _paper(rng, vivid)
        self.accent = tuple(rng.randint(0, 230) for _ in range(3))
        for _ in range(9):
            if abs(luma(self.accent) - luma(self.paper)) < 60:
                self.accent = tuple(rng.randint(0, 255) for _ in range(3))
        self.style = Style(rng, self.paper, self.ink, self.accent)
        inset = rng.random() < (0.75 if self.american else 0.4)
        paper, ink = rng.choice([((252, 252, 250), (12, 12, 14)), ((252, 252, 250), (12, 12, 14)),
                                 _paper(rng, vivid), (self.ink, self.paper)]) if inset else (self.paper, self.ink)
        self.inset, self.panel_style = inset, Style(rng, paper, ink, self.accent)


def _paper(rng: random.Random, vivid: Color) -> tuple[Color, Color]:
    """Colours of a ground and of the print on it, far enough apart to be read."""
    kind = rng.random()
    if kind < 0.4:
        return tuple(rng.randint(225, 255) for _ in range(3)), tuple(rng.randint(0, 60) for _ in range(3))
    if kind < 0.55:
        return shade(vivid, 0.25), rng.choice([(250, 250, 250), (240, 225, 170)])
    dark = 0.3 * vivid[0] + 0.6 * vivid[1] + 0.1 * vivid[2] < 130
    return vivid, ((250, 250, 250) if dark else tuple(rng.randint(0, 50) for _ in range(3)))


class Label:
    """The flat printed face of a pack, with everything on it and where it is (label points)."""

    def __init__(self, rng: random.Random, product: Product, face: Rect, seen: Rect, digits: str):
        self.rng, self.product, self.digits, self.face = rng, product, digits, face
        self.bounds = tuple(int(math.floor(v)) for v in (max(face[0], seen[0]), max(face[1], seen[1]),
                                                         min(face[2], seen[2]), min(face[3], seen[3])))
        self.origin = self.bounds[:2]
        self.size = (max(16, self.bounds[2] - self.bounds[0]), max(16, self.bounds[3] - self.bounds[1]))
        low, high = shade(product.paper, 0.93), shade(product.paper, 1.05)
        self.image = gradient(self.size, [rng.choice([low, high, product.paper]) for _ in range(4)])
        self.shoulder = face[1]
        self.tables: list[tuple[str, Rect]] = []
        self.things: list[tuple[str, Rect]] = []

    def decorate(self, kind: str, panel: Rect | None) -> Rect:
        """Bands, discs and stripes below the print, a can's lid and foot; returns the face that is left to print on."""
        rng, draw, (w, h) = self.rng, ImageDraw.Draw(self.image), self.size
        tones = [self.product.accent, shade(self.product.paper, 0.8), shade(self.product.paper, 1.2)]
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            x, y, tone = rng.uniform(-0.2, 1) * w, rng.uniform(-0.2, 1) * h, rng.choice(tones)
            shape = rng.randrange(4)
            if shape == 0:
                draw.rectangle((0, y, w, y + rng.uniform(0.03, 0.3) * h), fill=tone)
            elif shape == 1:
                draw.ellipse((x, y, x + 0.6 * w, y + 0.6 * w), fill=tone)
            elif shape == 2:
                draw.rectangle((x, 0, x + rng.uniform(0.03, 0.3) * w, h), fill=tone)
            else:
                draw.polygon([(x, 0), (x + 0.3 * w, 0), (w - x, h), (w - x - 0.3 * w, h)], fill=tone)
        x0, y0, x1, y1 = self.face
        ends = rng.uniform(0.5, 1) if (kind == "can" and rng.random() < 0.6) or rng.random() < 0.1 else 0
        top = ends * min(0.2 * (y1 - y0), (panel[1] if panel else y1) - y0)
        foot = ends * min(0.15 * (y1 - y0), y1 - (panel[3] if panel else y0))
        stuff = rng.choice(STUFFS)
        for a, b in ((y0, y0 + top), (y1 - foot, y1)):
            a, b = a - self.origin[1], b - self.origin[1]
            if b - a > 3:
                draw.rectangle((0, a, w, b), fill=stuff)
                for k in range(rng.randint(1, 6)):
                    line = a + (b - a) * (k + 1) / 7
                    draw.line((0, line, w, line), fill=shade(stuff, rng.choice([0.7, 1.25])), width=2)
        self.shoulder = y0 + max(0.0, top)
        return x0, self.shoulder, x1, y1 - max(0.0, foot)

    def clear(self, box: tuple[int, int, int, int], style: Style) -> None:
        """Lay plain paper where the ink of `style` would not stand out."""
        mean = self.image.crop(box).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        if abs(luma(mean) - luma(style.ink)) < 85:
            self.image.paste(style.paper, (box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2))

    def paint(self, rect: Rect, draw: Callable, ground: Color | None = None, quarter: int = 0,
              clear: Style | None = None) -> Rect | None:
        """Let `draw` paint into `rect` (label points); returns the tight hull of what changed, in label points.

        ground: painted first and part of the hull. quarter: a transpose of Pillow's, for print that stands on its side.
        clear: a style whose ink must stand out there.
        """
        x0, y0, x1, y1 = (round(v) for v in rect)
        if min(x1 - x0, y1 - y0) < 12:
            return None
        box = (x0 - self.origin[0], y0 - self.origin[1], x1 - self.origin[0], y1 - self.origin[1])
        if clear:
            self.clear(box, clear)
        before = self.image.crop(box)
        after = Image.new("RGB", before.size, ground) if ground else before.copy()
        if quarter:
            after = after.transpose(quarter)
        draw(after)
        if quarter:
            back = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
                    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
            after = after.transpose(back[quarter])
        ink = (0, 0, *before.size) if ground else ImageChops.difference(before, after).getbbox()
        self.image.paste(after, box[:2])
        if not ink:
            return None
        hull = (max(x0 + ink[0], self.face[0]), max(y0 + ink[1], self.face[1]),
                min(x0 + ink[2], self.face[2]), min(y0 + ink[3], self.face[3]))
        return hull if hull[2] - hull[0] > 1 and hull[3] - hull[1] > 1 else None

    def panel(self, rect: Rect, name: str) -> None:
        """Print over `rect` a nutrition panel (`name` is its category), or a thing in the style of a panel."""
        rng, product, style = self.rng, self.product, self.product.panel_style
        ground = style.paper if product.inset or rng.random() < 0.85 else None
        framed = name == "nutrition-table-text" or not product.inset
        if ground and framed:  # the ground is not part of an unframed panel: give it a margin
            grow = rng.uniform(1, 6)
            self.paint((rect[0] - grow, rect[1] - grow, rect[2] + grow, rect[3] + grow), lambda image: None, ground)
            ground = None
        if name in DRAW:
            found, draw = self.things, lambda image: DRAW[name](rng, image, style, product.words, self.digits)
        else:
            found = self.tables
            draw = lambda image: draw_panel(rng, image, style, product.words, name, product.american)  # noqa: E731
        if hull := self.paint(rect, draw, ground, 0, style):
            found.append((name, hull))

    def fill(self, rects: list[Rect], extra: list[str]) -> None:
        """Print things, and the panels of `extra` categories, into free rectangles of the face."""
        rng = self.rng
        most = rng.uniform(0.18, 0.5) * LONG
        free = [cell for rect in rects for cell in cells(rng, rect, most, 0.035 * LONG)]
        free = [c for c in free if c[0] < self.bounds[2] and c[2] > self.bounds[0] and c[1] < self.bounds[3]
                and c[3] > self.bounds[1]]
        free.sort(key=lambda c: -min(c[2] - c[0], c[3] - c[1]))
        for category in extra:
            if free and min(free[0][2] - free[0][0], free[0][3] - free[0][1]) > 0.08 * LONG:
                x0, y0, x1, y1 = free.pop(0)
                self.panel((x0 + 4, y0 + 4, x1 - 4, y1 - 4), category)
        weights = dict(WEIGHTS)
        decoy = rng.choice(["cooking table", "price table", "dosage table"]) if rng.random() < 0.6 else None
        for number, cell in enumerate(free):
            if number and rng.random() < 0.12:
                continue
            name = decoy if decoy and number == 0 else rng.choices(list(weights), list(weights.values()))[0]
            if self.thing(name, cell):
                weights[name] = weights[name] * (0.0 if name in ("barcode", "qr code") else 0.25)

    def thing(self, name: str, cell: Rect) -> bool:
        """Print one thing into a cell at a shape that suits it; False where there is no room."""
        rng, (low, high) = self.rng, SHAPES[name]
        quarter = rng.choice([Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270]) if rng.random() < 0.1 else 0
        low, high = (1 / high, 1 / low) if quarter else (low, high)
        room = 0.94 * (cell[2] - cell[0]) - 3, 0.94 * (cell[3] - cell[1]) - 3
        if min(room) < 0.03 * LONG:
            return False
        ratio = min(max(room[0] / room[1], low), high)
        dense = name.endswith(("table", "list")) or name == "directions"
        w = min(room[0], room[1] * ratio) * (rng.uniform(0.9, 1) if dense else rng.uniform(0.55, 1))
        h = w / ratio
        if min(w, h) < 0.025 * LONG:
            return False
        x = cell[0] + rng.uniform(0.2, 0.8) * (cell[2] - cell[0] - w)
        y = cell[1] + rng.uniform(0.2, 0.8) * (cell[3] - cell[1] - h)
        style, words = self.product.style, self.product.words
        hull = self.paint((x, y, x + w, y + h), lambda image: DRAW[name](rng, image, style, words, self.digits), None,
                          quarter, style)
        if hull:
            self.things.append((name, hull))
        return hull is not None

    def mask(self, kind: str) -> Image.Image:
        """Where the pack is: its rounded or crimped edge."""
        mask, rng = Image.new("L", self.size, 0), self.rng
        x0, y0, x1, y1 = (v - self.origin[i % 2] for i, v in enumerate(self.face))
        draw, radius = ImageDraw.Draw(mask), 0 if kind == "can" else rng.uniform(0, 0.05) * min(x1 - x0, y1 - y0)
        shoulder = self.shoulder - y0 - self.origin[1]
        if kind == "can" and shoulder > 12 and rng.random() < 0.6:
            neck, mid = rng.uniform(0.2, 0.4) * (x1 - x0), (x0 + x1) / 2
            bend = [(x, y0 + shoulder * y) for x, y in ((mid + neck, 0.0), (mid + neck, 0.35), (x1, 0.97))]
            draw.polygon([*bend, (x1, y1), (x0, y1)] + [(2 * mid - x, y) for x, y in bend[::-1]], fill=255)
            return mask
        if kind != "bag" or rng.random() < 0.4:
            draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=radius, fill=255)
            return mask
        tooth = rng.uniform(4, 9)
        teeth = [(x0 + k * tooth, y0 + tooth * (k % 2) * 0.6) for k in range(int((x1 - x0) / tooth) + 1)]
        draw.polygon([*teeth, (x1, y0)] + [(x, y1 - (y - y0)) for x, y in [(x1, y0), *teeth[::-1]]], fill=255)
        return mask
