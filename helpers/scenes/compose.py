"""One scene from end to end: camera, label, photo, boxes."""

import random

import numpy as np
from PIL import Image

from helpers.scenes import layout, photo
from helpers.scenes.label import Label, Product
from helpers.scenes.layout import Rect
from helpers.scenes.warp import Warp, outline

#: what stands where a nutrition panel would, in the scenes of the tiny base: thing -> how often
STAND_INS = {"drug facts": 7, "cooking table": 4, "price table": 4, "dosage table": 4, "ingredient list": 2,
             "directions": 1}


def compose_scene(key: str, index: int, product_index: int, digits: str, *, stored_turned: bool = False,
                  needs_panel: bool = False, stand_ins: bool = False, panels: list[str] | None = None,
                  ) -> tuple[bytes, tuple[int, int], list, list, int]:
    """Draw one scene; `key` names seed and split, `product_index` the design, `index` the photo.

    `stand_ins`: in most pictures a thing of STAND_INS takes the place and the style of the nutrition panel. `panels`:
    names of what is printed as panels, in place of a draw; the first where the camera looks ("": nothing). Returns the
    JPEG, its (width, height) as shown, tables and things with boxes xyxy in 0-1 of it, and the rotation.
    """
    product = Product(random.Random(f"{key}/product/{product_index}"))
    rng = random.Random(f"{key}/photo/{index}")
    aspect = rng.choices([a for a, _ in layout.ASPECTS], [n for _, n in layout.ASPECTS])[0]
    category = rng.choices(list(layout.MIX), list(layout.MIX.values()))[0]
    category = category or ("nutrition-table" if needs_panel else "")
    if stand_ins and rng.random() < 0.65:
        category = rng.choices(list(STAND_INS), list(STAND_INS.values()))[0]
    category = panels[0] if panels else category
    turn = rng.choice([90, 180, 270]) if rng.random() < 0.1 else 0
    shown = (layout.LONG, round(layout.LONG / aspect)) if aspect > 1 else (round(layout.LONG * aspect), layout.LONG)
    size = shown[::-1] if turn in (90, 270) else shown
    box = layout.turned(layout.target_box(rng, category, aspect), (360 - turn) % 360)
    target = (box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1])
    face = layout.face_of(rng, target, size)
    warp, kind = layout.camera(rng, size, face, target)
    label = print_label(rng, product, digits, warp, kind, face, target if category else None, category,
                        panels[1:] if panels else None)
    tables = layout.shown_boxes(label.tables, warp, turn, 0.1)
    things = layout.shown_boxes(label.things, warp, turn, 0.35)
    image = photograph(rng, label, warp, kind, face)
    orientation = rng.choice([3, 6, 8]) if stored_turned else 1
    image = image.rotate(turn + {1: 0, 3: 180, 6: 90, 8: 270}[orientation], expand=True)
    return photo.to_jpeg(rng, image, orientation), shown, tables, things, turn


def print_label(rng: random.Random, product: Product, digits: str, warp: Warp, kind: str, face: Rect,
                target: Rect | None, category: str, more: list[str] | None = None) -> Label:
    """The flat label: the panel where the camera will show it at `target`, things and `more` panels around it."""
    w, h = warp.size
    seen = warp.inverse(outline((0, 0, w, h), 24))
    seen = (*(seen.min(0) - 12), *(seen.max(0) + 12))
    flat = layout.unwarped(warp, face)
    if warp.radius:
        flat = (max(flat[0], -warp.rim()), flat[1], min(flat[2], warp.rim()), flat[3])
    panel = layout.unwarped(warp, target) if target else None
    if panel:
        panel = tuple(min(max(v, 1.5 * seen[i % 2]), 1.5 * seen[2 + i % 2]) for i, v in enumerate(panel))
    label = Label(rng, product, flat, seen, digits)
    flat = label.decorate(kind, panel)
    draw = rng.random()
    extra = [] if not category or category in STAND_INS or draw > 0.055 else [category] * (2 if draw < 0.009 else 1)
    extra = extra if more is None else more
    inner = (max(flat[0], seen[0] - 40) + 4, max(flat[1], seen[1] - 40) + 4,
             min(flat[2], seen[2] + 40) - 4, min(flat[3], seen[3] + 40) - 4)
    label.fill(layout.around(rng, inner, panel), extra)
    if panel:
        label.panel(panel, category)
    return label


def side_of(rng: random.Random, label: Label, warp: Warp) -> tuple[list, tuple]:
    """A box seen a little from the side: the polygon of its left or right face, and its colour."""
    x0, y0, x1, y1 = label.face
    x = rng.choice([x0, x1])
    (ax, ay), (bx, by) = warp.forward(np.array([[x, y0], [x, y1]])).tolist()
    deep = rng.uniform(0.04, 0.25) * warp.size[0] * (1 if x == x1 else -1)
    lift = rng.uniform(-0.03, 0.03) * warp.size[1]
    points = [(ax, ay), (ax + deep, ay + lift + 5), (bx + deep, by + lift - 5), (bx, by)]
    return points, photo.shade(label.product.paper, rng.uniform(0.45, 0.75))


def photograph(rng: random.Random, label: Label, warp: Warp, kind: str, face: Rect) -> Image.Image:
    """The label before a background, lit, held, blurred."""
    seen = warp.apply(Image.merge("RGBX", (*label.image.split(), label.mask(kind))), label.origin).split()
    pack = Image.merge("RGB", seen[:3])
    if kind == "bag" and rng.random() < 0.7:
        pack = photo.crumple(rng, pack)
    side = side_of(rng, label, warp) if kind == "box" and rng.random() < 0.5 else None
    image = photo.compose(rng, photo.background(rng, warp.size), pack, seen[3], side)
    if rng.random() < 0.3:
        keep = [warp.forward(outline(rect)) for _, rect in label.tables + label.things]
        photo.hand(rng, image, face, [(*points.min(0), *points.max(0)) for points in keep])
    can = (warp.middle[0], warp.radius) if warp.radius else None
    return photo.develop(rng, photo.light(rng, image, can, kind == "bag"))
