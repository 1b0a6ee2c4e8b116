"""Composes one scene: where the panel stands, the camera, the label around it, and the boxes of all of it."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from helpers.scenes import photo
from helpers.scenes.panels import Style, draw_panel
from helpers.scenes.text import WORDS, Color
from helpers.scenes.things import DRAW, SHAPES
from helpers.scenes.warp import Warp, outline, visible_hull

Rect = tuple[float, float, float, float]
#: share of the pictures by category of their (first) panel; the rest have none
MIX = {"nutrition-table": 0.785, "nutrition-table-small": 0.09, "nutrition-table-small-energy": 0.055,
       "nutrition-table-text": 0.05, "": 0.02}
ASPECTS = [(3 / 4, 9), (9 / 16, 5), (2 / 3, 2), (4 / 5, 1), (1, 1), (4 / 3, 4), (16 / 9, 1)]
WEIGHTS = {"barcode": 6, "qr code": 2, "logo": 5, "product name": 5, "ingredient list": 6, "directions": 4,
           "cooking table": 3, "price table": 3, "dosage table": 3, "best-before stamp": 5, "recycling mark": 4,
           "flag": 3, "seal": 3, "food picture": 4}


class Product:
    """The design of one product: languages, colours, style of the tables. Two photos of a product share it."""

    def __init__(self, rng: random.Random):
        self.words = WORDS[rng.choice(["en"] * 3 + ["fr"] * 2 + sorted(WORDS))]
        self.american = rng.random() < 0.4
        hue = [rng.randint(0, 255) for _ in range(3)]
        vivid = photo.shade(tuple(hue), 255 / max(1, max(hue)) * rng.uniform(0.5, 1.0))
        self.paper, self.ink = _paper(rng, vivid)
        self.accent = tuple(rng.randint(0, 230) for _ in range(3))
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
        return photo.shade(vivid, 0.25), rng.choice([(250, 250, 250), (240, 225, 170)])
    dark = 0.3 * vivid[0] + 0.6 * vivid[1] + 0.1 * vivid[2] < 130
    return vivid, ((250, 250, 250) if dark else tuple(rng.randint(0, 50) for _ in range(3)))


@dataclass
class Drawn:
    """What `compose_scene` gives back: size (width, height) as shown, boxes xyxy in 0-1 of it."""

    jpeg: bytes
    size: tuple[int, int]
    rotation: int
    tables: list = field(default_factory=list)
    things: list = field(default_factory=list)


def target_box(rng: random.Random, category: str, aspect: float) -> Rect:
    """Where the panel shall be: x0, y0, x1, y1 in 0-1 of the picture; it may reach over the edges.

    Logit-normal width and height with the quantiles of the real data; aspect is the picture's width over height.
    """
    for _ in range(20):
        common, other = rng.gauss(0, 1), rng.gauss(0, 1)
        w = 1.06 / (1 + math.exp(-(0.05 + 1.15 * common)))
        h = 1.10 / (1 + math.exp(-(-0.50 + 0.85 * common + 0.95 * other)))
        if category == "nutrition-table-small-energy":
            w = rng.uniform(0.06, 0.3)
            h = w * aspect * rng.uniform(0.35, 1.5)
        elif category == "nutrition-table-small":
            w, h = 0.75 * w, 0.6 * h
        if 0.3 < w * aspect / h < 6.0 and min(w * aspect, h) > 0.05 * max(1.0, aspect):
            break
    spread = 0.13 if w < 0.85 else 0.04
    cx = rng.gauss(0.475, spread)
    cy = rng.gauss(0.5, 0.145 if h < 0.85 else 0.04)
    if rng.random() < 0.93:
        cx = min(max(cx, w / 2 + 0.01), 1.0 - w / 2) if w < 0.97 else cx
        cy = min(max(cy, h / 2 + 0.01), 1.0 - h / 2) if h < 0.97 else cy
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def turned(rect: Rect, degrees: int) -> Rect:
    """A box in 0-1 after the picture is turned counter-clockwise by a multiple of 90 degrees."""
    x0, y0, x1, y1 = rect
    return {0: (x0, y0, x1, y1), 90: (y0, 1 - x1, y1, 1 - x0), 180: (1 - x1, 1 - y1, 1 - x0, 1 - y0),
            270: (1 - y1, x0, 1 - y0, x1)}[degrees]


def face_of(rng: random.Random, target: Rect, size: tuple[int, int]) -> Rect:
    """The edges of the pack's face in photo pixels around the panel; an edge may run out of the picture."""
    w, h = size
    close = rng.random() < 0.3
    edges = []
    for near, far, side in ((target[0], 0, w), (target[1], 0, h), (target[2], w, w), (target[3], h, h)):
        sign, room = (1 if far else -1), abs(far - near) if (far - near) * (1 if far else -1) > 0 else 0
        out = close or room < 0.04 * side or rng.random() < 0.3
        edges.append(far + sign * 0.2 * side if out else near + sign * room * rng.uniform(0.15, 0.95))
    return tuple(edges)


def camera(rng: random.Random, size: tuple[int, int], face: Rect, target: Rect) -> tuple[Warp, str]:
    """A camera that sees a flat pack, a bag or a can or bottle."""
    long = max(size)
    kind = rng.choices(["box", "bag", "can"], [4, 2.5, 3.5])[0]
    angles = (rng.gauss(0, 0.13), rng.gauss(0, 0.13), rng.gauss(0, 0.05))
    middle = ((target[0] + target[2]) / 2, (target[1] + target[3]) / 2)
    radius, wrinkle = None, (0.0, 0.0, 0.0, 0.0)
    if kind == "can":
        least = 0.56 * (min(face[2], size[0] * 1.1) - max(face[0], -size[0] * 0.1))
        radius = max(0.58 * (target[2] - target[0]), least) * rng.uniform(1.0, 1.6)
        middle = (middle[0] + rng.uniform(-0.15, 0.15) * radius, middle[1])
        angles = (0.0, rng.gauss(0, 0.12), rng.gauss(0, 0.06))
    elif kind == "bag" or rng.random() < 0.1:
        wave = rng.uniform(2, 9) / long
        wrinkle = (rng.uniform(0.05, 0.22) / max(wave, 12 / long), wave * rng.uniform(-2, 2), wave * rng.uniform(-2, 2),
                   rng.uniform(0, 6.28))
    return Warp(size, middle, radius, angles, rng.uniform(1.3, 3.0) * long, wrinkle), kind


def unwarped(warp: Warp, rect: Rect) -> Rect:
    """The label's rectangle whose edges pass through the middles of a photo rectangle's edges."""
    x0, y0, x1, y1 = rect
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    uv = warp.inverse(np.array([[x0, cy], [cx, y0], [x1, cy], [cx, y1]]))
    return uv[0, 0], uv[1, 1], uv[2, 0], uv[3, 1]


def cells(rng: random.Random, rect: Rect, most: float, least: float) -> list[Rect]:
    """Cuts a rectangle again and again until no side is longer than `most`; drops what is thinner than `least`."""
    x0, y0, x1, y1 = rect
    w, h = x1 - x0, y1 - y0
    if min(w, h) < least:
        return []
    if max(w, h) <= most * rng.uniform(0.7, 1.6):
        return [rect]
    cut = rng.uniform(0.3, 0.7)
    if w > h * rng.uniform(0.7, 1.4):
        x = x0 + cut * w
        return cells(rng, (x0, y0, x, y1), most, least) + cells(rng, (x, y0, x1, y1), most, least)
    y = y0 + cut * h
    return cells(rng, (x0, y0, x1, y), most, least) + cells(rng, (x0, y, x1, y1), most, least)


def around(rng: random.Random, face: Rect, panel: Rect | None) -> list[Rect]:
    """The free rectangles of the face beside the panel."""
    if panel is None:
        return [face]
    (a, b, c, d), (x0, y0, x1, y1) = face, panel
    if rng.random() < 0.5:
        return [(a, b, x0, d), (x1, b, c, d), (x0, b, x1, y0), (x0, y1, x1, d)]
    return [(a, b, c, y0), (a, y1, c, d), (a, y0, x0, y1), (x1, y0, c, y1)]


class Label:
    """The flat printed face of a pack, with everything on it and where it is (label points)."""

    def __init__(self, rng: random.Random, product: Product, face: Rect, seen: Rect, digits: str):
        self.rng, self.product, self.digits, self.face = rng, product, digits, face
        self.bounds = tuple(int(math.floor(v)) for v in (max(face[0], seen[0]), max(face[1], seen[1]),
                                                         min(face[2], seen[2]), min(face[3], seen[3])))
        self.origin = self.bounds[:2]
        self.size = (max(16, self.bounds[2] - self.bounds[0]), max(16, self.bounds[3] - self.bounds[1]))
        low, high = photo.shade(product.paper, 0.93), photo.shade(product.paper, 1.05)
        self.image = photo.gradient(self.size, [rng.choice([low, high, product.paper]) for _ in range(4)])
        self.tables: list[tuple[str, Rect]] = []
        self.things: list[tuple[str, Rect]] = []

    def decorate(self) -> None:
        """Bands, discs and stripes below the print."""
        rng, draw, (w, h) = self.rng, ImageDraw.Draw(self.image), self.size
        tones = [self.product.accent, photo.shade(self.product.paper, 0.8), photo.shade(self.product.paper, 1.2)]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            x, y, tone = rng.uniform(-0.2, 1) * w, rng.uniform(-0.2, 1) * h, rng.choice(tones)
            kind = rng.randrange(4)
            if kind == 0:
                draw.rectangle((0, y, w, y + rng.uniform(0.03, 0.3) * h), fill=tone)
            elif kind == 1:
                draw.ellipse((x, y, x + 0.6 * w, y + 0.6 * w), fill=tone)
            elif kind == 2:
                draw.rectangle((x, 0, x + rng.uniform(0.03, 0.3) * w, h), fill=tone)
            else:
                draw.polygon([(x, 0), (x + 0.3 * w, 0), (w - x, h), (w - x - 0.3 * w, h)], fill=tone)

    def paint(self, rect: Rect, draw, ground: Color | None = None, quarter: int = 0) -> Rect | None:
        """Let `draw` paint into `rect` (label points); returns the tight hull of what changed, in label points."""
        x0, y0, x1, y1 = (round(v) for v in rect)
        if x1 - x0 < 6 or y1 - y0 < 6:
            return None
        box = (x0 - self.origin[0], y0 - self.origin[1], x1 - self.origin[0], y1 - self.origin[1])
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
        return (x0 + ink[0], y0 + ink[1], x0 + ink[2], y0 + ink[3]) if ink else None

    def panel(self, rect: Rect, category: str) -> None:
        """Print a nutrition panel over `rect`."""
        rng, product = self.rng, self.product
        ground = product.panel_style.paper if product.inset or rng.random() < 0.6 else None
        framed = category == "nutrition-table-text" or not product.inset
        if ground and framed:  # the ground is not part of an unframed panel: give it a margin
            grow = rng.uniform(1, 6)
            self.paint((rect[0] - grow, rect[1] - grow, rect[2] + grow, rect[3] + grow), lambda image: None, ground)
            ground = None
        hull = self.paint(rect, lambda image: draw_panel(rng, image, product.panel_style, product.words, category,
                                                         product.american), ground)
        if hull:
            self.tables.append((category, hull))

    def fill(self, rects: list[Rect], extra: list[str], long: float) -> None:
        """Print things, and the panels of `extra` categories, into free rectangles of the face."""
        rng = self.rng
        most = rng.uniform(0.16, 0.42) * long
        free = [cell for rect in rects for cell in cells(rng, rect, most, 0.035 * long)]
        free = [c for c in free if c[0] < self.bounds[2] and c[2] > self.bounds[0] and c[1] < self.bounds[3]
                and c[3] > self.bounds[1]]
        free.sort(key=lambda c: -min(c[2] - c[0], c[3] - c[1]))
        for category in extra:
            if free and min(free[0][2] - free[0][0], free[0][3] - free[0][1]) > 0.08 * long:
                x0, y0, x1, y1 = free.pop(0)
                self.panel((x0 + 4, y0 + 4, x1 - 4, y1 - 4), category)
        weights = dict(WEIGHTS)
        decoy = rng.choice(["cooking table", "price table", "dosage table"]) if rng.random() < 0.6 else None
        for number, cell in enumerate(free):
            if number and rng.random() < 0.12:
                continue
            name = decoy if decoy and number == 0 else rng.choices(list(weights), list(weights.values()))[0]
            if self.thing(name, cell, long):
                weights[name] = weights[name] * (0.0 if name in ("barcode", "qr code") else 0.25)

    def thing(self, name: str, cell: Rect, long: float) -> bool:
        """Print one thing into a cell at a shape that suits it; False where there is no room."""
        rng, (low, high) = self.rng, SHAPES[name]
        quarter = rng.choice([Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270]) if rng.random() < 0.1 else 0
        low, high = (1 / high, 1 / low) if quarter else (low, high)
        room = 0.94 * (cell[2] - cell[0]) - 3, 0.94 * (cell[3] - cell[1]) - 3
        if min(room) < 0.03 * long:
            return False
        ratio = min(max(room[0] / room[1], low), high)
        w = min(room[0], room[1] * ratio) * rng.uniform(0.75, 1)
        h = w / ratio
        if min(w, h) < 0.025 * long:
            return False
        x = cell[0] + rng.uniform(0.2, 0.8) * (cell[2] - cell[0] - w)
        y = cell[1] + rng.uniform(0.2, 0.8) * (cell[3] - cell[1] - h)
        hull = self.paint((x, y, x + w, y + h), lambda image: DRAW[name](rng, image, self.product.style,
                                                                          self.product.words, self.digits), None, quarter)
        if hull:
            self.things.append((name, hull))
        return hull is not None

    def mask(self, kind: str) -> Image.Image:
        """Where the pack is: its rounded or crimped edge."""
        mask, rng = Image.new("L", self.size, 0), self.rng
        x0, y0, x1, y1 = (v - self.origin[i % 2] for i, v in enumerate(self.face))
        radius = 0 if kind == "can" else rng.uniform(0, 0.05) * min(x1 - x0, y1 - y0)
        ImageDraw.Draw(mask).rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=radius, fill=255)
        return mask


def shown_boxes(found: list[tuple[str, Rect]], warp: Warp, turn: int, least: float) -> list[tuple[str, Rect]]:
    """Label rectangles -> boxes in 0-1 of the picture as shown; what shows less than `least` of itself is left out."""
    boxes, (w, h) = [], warp.size
    for name, rect in found:
        points = warp.forward(outline(rect))
        hull, whole = visible_hull(points, w, h), np.concatenate([points.min(0), points.max(0)])
        if hull is None or min(hull[2] - hull[0], hull[3] - hull[1]) < 5:
            continue
        share = np.prod(hull[2:] - hull[:2]) / np.prod(whole[2:] - whole[:2])
        if share >= least:
            boxes.append((name, tuple(float(v) for v in turned(tuple(hull / (w, h, w, h)), turn))))
    return boxes


def compose_scene(key: str, index: int, product_index: int, digits: str, long: int, stored_turned: bool,
                  needs_panel: bool) -> Drawn:
    """Draw one scene; `key` names seed and split, `product_index` the design, `index` the photo."""
    product = Product(random.Random(f"{key}/product/{product_index}"))
    rng = random.Random(f"{key}/photo/{index}")
    aspect = rng.choices([a for a, _ in ASPECTS], [n for _, n in ASPECTS])[0]
    category = rng.choices(list(MIX), list(MIX.values()))[0]
    category = category or ("nutrition-table" if needs_panel else "")
    turn = rng.choice([90, 180, 270]) if rng.random() < 0.1 else 0
    shown = (long, round(long / aspect)) if aspect > 1 else (round(long * aspect), long)
    size = shown[::-1] if turn in (90, 270) else shown
    box = turned(target_box(rng, category, aspect), (360 - turn) % 360)
    target = (box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1])
    face = face_of(rng, target, size)
    warp, kind = camera(rng, size, face, target)
    label = print_label(rng, product, digits, warp, kind, face, target if category else None, category, long)
    mesh = warp.mesh(label.origin)
    tables = shown_boxes(label.tables, warp, turn, 0.1)
    things = shown_boxes(label.things, warp, turn, 0.35)
    image = photograph(rng, label, warp, kind, face, mesh)
    if turn:
        image = image.transpose({90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180,
                                 270: Image.Transpose.ROTATE_270}[turn])
    orientation = rng.choice([3, 6, 8]) if stored_turned else 1
    if stored_turned:
        image = image.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
                                 8: Image.Transpose.ROTATE_270}[orientation])
    return Drawn(photo.to_jpeg(rng, image, orientation), shown, turn, tables, things)


def print_label(rng: random.Random, product: Product, digits: str, warp: Warp, kind: str, face: Rect,
                target: Rect | None, category: str, long: int) -> Label:
    """The flat label: the panel where the camera will show it at `target`, things around it."""
    w, h = warp.size
    seen = warp.inverse(outline((0, 0, w, h), 24))
    seen = (*(seen.min(0) - 12), *(seen.max(0) + 12))
    flat = unwarped(warp, face)
    if warp.radius:
        flat = (max(flat[0], -1.25 * warp.radius), flat[1], min(flat[2], 1.25 * warp.radius), flat[3])
    panel = unwarped(warp, target) if target else None
    if panel:
        panel = tuple(min(max(v, 1.5 * seen[i % 2]), 1.5 * seen[2 + i % 2]) for i, v in enumerate(panel))
    label = Label(rng, product, flat, seen, digits)
    label.decorate()
    draw = rng.random()
    extra = [] if not category or draw > 0.10 else [category] * (2 if draw < 0.02 else 1)
    inner = (max(flat[0], seen[0] - 40) + 4, max(flat[1], seen[1] - 40) + 4,
             min(flat[2], seen[2] + 40) - 4, min(flat[3], seen[3] + 40) - 4)
    label.fill(around(rng, inner, panel), extra, long)
    if panel:
        label.panel(panel, category)
    return label


def photograph(rng: random.Random, label: Label, warp: Warp, kind: str, face: Rect, mesh: list) -> Image.Image:
    """The label before a background, lit, held, blurred."""
    mask = warp.apply(label.mask(kind), mesh)
    image = photo.compose(rng, photo.background(rng, warp.size), warp.apply(label.image, mesh), mask)
    if rng.random() < 0.3:
        keep = [warp.forward(outline(rect)) for _, rect in label.tables + label.things]
        photo.hand(rng, image, face, [(*points.min(0), *points.max(0)) for points in keep])
    image = photo.light(rng, image, (warp.middle[0], warp.radius) if warp.radius else None)
    return photo.develop(rng, image)
