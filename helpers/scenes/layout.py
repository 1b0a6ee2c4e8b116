"""Where things stand: the panel's place in the photo, the pack's face, the camera, free room on the label."""

import math
import random

import numpy as np

from helpers.scenes.warp import Warp, outline, visible_hull

Rect = tuple[float, float, float, float]
LONG = 512  # pixels of a photo's long side
#: share of the pictures by category of their (first) panel; the rest have none
MIX = {"nutrition-table": 0.795, "nutrition-table-small": 0.08, "nutrition-table-small-energy": 0.055,
       "nutrition-table-text": 0.05, "": 0.02}
ASPECTS = [(3 / 4, 9), (9 / 16, 5), (2 / 3, 2), (4 / 5, 1), (1, 1), (4 / 3, 4), (16 / 9, 1)]


def target_box(rng: random.Random, category: str, aspect: float) -> Rect:
    """Where the panel shall be: x0, y0, x1, y1 in 0-1 of the picture; it may reach over the edges.

    Logit-normal width and height with the quantiles of the real data; aspect is the picture's width over height.
    """
    for _ in range(20):
        common, other = rng.gauss(0, 1), rng.gauss(0, 1)
        w = 1.15 / (1 + math.exp(-(-0.10 + 1.3 * common)))
        h = 1.14 / (1 + math.exp(-(-0.24 + 0.95 * common + 1.05 * other)))
        if rng.random() < 0.06:
            w, h = rng.uniform(0.4, 1.0), rng.uniform(0.07, 0.2)
        if category == "nutrition-table-small-energy":
            w = rng.uniform(0.06, 0.3)
            h = w * aspect * rng.uniform(0.35, 1.5)
        elif category == "nutrition-table-small":
            w, h = 0.75 * w, 0.6 * h
        if 0.3 < w * aspect / h < 8.0 and min(w * aspect, h) > 0.045 * max(1.0, aspect):
            break
    spread = rng.choice([0.05, 0.08, 0.2])
    cx = rng.gauss(0.465, spread) if w < 0.85 else rng.gauss(0.5, 0.03)
    cy = rng.gauss(0.5, 1.15 * spread) if h < 0.85 else rng.gauss(0.5, 0.04)
    if rng.random() < 0.93:
        cx = min(max(cx, w / 2 + 0.02), 0.99 - w / 2) if w < 0.97 else cx
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
    kind = rng.choices(["box", "bag", "can"], [4, 2.5, 3.5])[0]
    angles = (rng.gauss(0, 0.15), rng.gauss(0, 0.15), rng.gauss(0, rng.choice([0.02, 0.05, 0.12])))
    middle = ((target[0] + target[2]) / 2, (target[1] + target[3]) / 2)
    radius, wrinkle = None, (0.0, 0.0, 0.0, 0.0)
    if kind == "can":
        least = 0.56 * (min(face[2], size[0] * 1.1) - max(face[0], -size[0] * 0.1))
        radius = max(0.58 * (target[2] - target[0]), least) * rng.uniform(1.0, 1.6)
        middle = (middle[0] + rng.uniform(-0.15, 0.15) * radius, middle[1])
        angles = (0.0, rng.gauss(0, 0.12), rng.gauss(0, 0.06))
    elif kind == "bag" or rng.random() < 0.1:
        wave = rng.uniform(2, 6) / LONG
        wrinkle = (rng.uniform(0.05, 0.22) / max(2 * wave, 8 / LONG), wave * rng.uniform(-2, 2),
                   wave * rng.uniform(-2, 2), rng.uniform(0, 6.28))
    return Warp(size, middle, radius, angles, rng.uniform(1.3, 3.0) * LONG, wrinkle), kind


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
