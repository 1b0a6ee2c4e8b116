"""Training pictures with several tables and with none, made by pasting: photos that people took mostly show one.

A model trained on pictures with one table draws one box whatever it is shown. So tables cut out of other pictures are
pasted in (Copy-Paste, https://arxiv.org/abs/2012.07177), or every table is taken away: covered with a piece that shows
none, or painted over, as `predict.look_again` does with the boxes that it found. Pieces without a table are pasted too,
and one or two of several tables painted over, so that no edge and no plain spot says how many tables there are.
"""

import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from PIL import Image

from helpers.boxes import xyxy_px_to_xyxy_unit, xyxy_unit_to_xyxy_px, xyxy_unit_to_yxyx_unit, yxyx_unit_to_xyxy_unit
from helpers.data.pictures import as_rgb, painted_over
from helpers.data.schema import source_hash, workers

EMPTY = 0.4  # of the made pictures lose their tables; the others get more
PARTLY = 0.3  # of the others lose some of them again
MOST = 3  # tables in a made picture: so many completions fit into 128 new tokens, whatever their names
SIDE = (0.12, 0.55)  # of the picture's long side: a pasted piece's
MAGNIFIED = 1.5  # at most: letters of a small piece, made larger, would be blots
TRIES = 20
GREY = (114, 114, 114)

Box = Sequence[float]  # x0, y0, x1, y1 in pixels
Place = tuple[int, int, int, int]  # the same, whole


def with_pasted(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """`rows` and behind them `share` times as many made pictures, each from one of them and pieces of others.

    `rows`: prepared pictures of the project's schema. Each is used as often as any other; the made one has its id with
    "+pasted" and a number. The same for the same (rows, share, seed). Without a table in `rows` nothing is made.
    """
    count = round(share * len(rows))
    if not count or not any(objects["bbox"] for objects in rows["objects"]):
        return rows
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    below = rows.select([order[number % len(rows)] for number in range(count)])
    made = below.map(
        Paste(rows, seed), with_indices=True, features=rows.features, num_proc=workers(count), desc="Pasting tables",
        new_fingerprint=Hasher.hash([rows._fingerprint, source_hash(Path(__file__)), share, seed]))
    return datasets.concatenate_datasets([rows, made])


class Paste:
    """A row of `rows` and a number -> another row of the schema: the picture with more tables, or with none."""

    def __init__(self, rows: datasets.Dataset, seed: int):
        self.rows, self.seed = rows, seed
        self.tables: dict[str, list[tuple[int, int]]] = {}  # category -> the numbers of a row and of a table in it
        for number, objects in enumerate(rows["objects"]):
            for table, name in enumerate(objects["category_name"]):
                self.tables.setdefault(name, []).append((number, table))
        self.categories = sorted(self.tables)

    def __call__(self, row: Mapping, number: int) -> dict:
        rng = random.Random(f"{self.seed} {number} {row['image_id']}")
        picture, boxes = opened(row)
        kinds = list(zip(row["objects"]["category_id"], row["objects"]["category_name"], strict=True))
        empty = rng.random() < EMPTY
        if not empty:
            if free_place(picture.size, boxes, (0.3 * picture.width, 0.3 * picture.height), rng) is None:
                picture, boxes = zoomed_out(picture, boxes, rng)
            for _ in range(min(rng.choice((1, 1, 2, 3)), MOST - len(boxes))):
                piece, kind = self._table(rng)
                if place := stick(picture, boxes, piece, rng):
                    boxes.append(place)
                    kinds.append(kind)
        if rng.random() < 0.5:
            stick(picture, boxes, self._without_table(rng.uniform(0.5, 2), rng), rng)
        gone: Sequence[int] = range(len(boxes) if empty else 0)
        if len(boxes) > 1 and not empty and rng.random() < PARTLY:
            gone = rng.sample(range(len(boxes)), rng.randint(1, len(boxes) - 1))
        if empty and rng.random() < 0.5:
            for box in boxes:
                self._cover(picture, box, rng)
        else:
            found = np.array([unsure(boxes[k], rng) for k in gone]).reshape(-1, 4)
            picture = painted_over(picture, xyxy_px_to_xyxy_unit(found, *picture.size))
        boxes = [box for k, box in enumerate(boxes) if k not in gone]
        kinds = [kind for k, kind in enumerate(kinds) if k not in gone]
        unit = xyxy_px_to_xyxy_unit(np.array(boxes, dtype=float).reshape(-1, 4), *picture.size).clip(0, 1)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95, subsampling=0)
        objects = {"bbox": xyxy_unit_to_yxyx_unit(unit).tolist(), "category_id": [identity for identity, _ in kinds],
                   "category_name": [name for _, name in kinds]}
        return {**row, "image_id": f"{row['image_id']}+pasted{number}", "objects": objects, "width": picture.width,
                "height": picture.height, "image": {"bytes": file.getvalue(), "path": None}}

    def _table(self, rng: random.Random) -> tuple[Image.Image, tuple[int, str]]:
        """A table cut out of a random picture, with its category's id and name: each category as often as any other."""
        number, table = rng.choice(self.tables[rng.choice(self.categories)])
        row = self.rows[number]
        picture, boxes = opened(row)
        x0, y0, x1, y1 = (round(side) for side in boxes[table])
        objects = row["objects"]
        return (picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))),
                (objects["category_id"][table], objects["category_name"][table]))

    def _without_table(self, aspect: float, rng: random.Random) -> Image.Image:
        """A piece of a random picture in which there is no table, of this width over height; grey where none is."""
        picture, boxes = opened(self.rows[rng.randrange(len(self.rows))])
        for share in (0.9, 0.6, 0.4, 0.25, 0.15):
            width = share * min(picture.width, picture.height * aspect)
            if place := free_place(picture.size, boxes, (width, width / aspect), rng):
                return picture.crop(place)
        return Image.new("RGB", (1, 1), GREY)

    def _cover(self, picture: Image.Image, box: Box, rng: random.Random) -> None:
        """Paste a piece without a table over `box`, and beyond it at each side by up to a third of its size."""
        across, down = (rng.uniform(0.03, 0.3) * side for side in (box[2] - box[0], box[3] - box[1]))
        x0, y0, x1, y1 = (round(v) for v in (box[0] - across, box[1] - down, box[2] + across, box[3] + down))
        size = max(1, x1 - x0), max(1, y1 - y0)
        picture.paste(self._without_table(size[0] / size[1], rng).resize(size), (x0, y0))


def unsure(box: Box, rng: random.Random) -> list[float]:
    """The box as a model may have found it: each side off by a few hundredths of the box's size."""
    sides = box[2] - box[0], box[3] - box[1]
    return [edge + min(max(rng.gauss(0, 0.05), -0.15), 0.15) * sides[k % 2] for k, edge in enumerate(box)]


def opened(row: Mapping) -> tuple[Image.Image, list[Box]]:
    """The picture of a row and its boxes."""
    picture = as_rgb(row["image"]).copy()
    return picture, xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), *picture.size).tolist()


def stick(picture: Image.Image, boxes: Sequence[Box], piece: Image.Image, rng: random.Random) -> Place | None:
    """Paste `piece`, made smaller or larger, where it touches none of `boxes`; returns the place, None without one.

    It may hang over the picture's edge by up to half of its width and height, as tables do in photos.
    """
    scale = min(rng.uniform(*SIDE) * max(picture.size) / max(piece.size), MAGNIFIED)
    size = max(8, round(scale * piece.width)), max(8, round(scale * piece.height))
    place = free_place(picture.size, boxes, size, rng, over=0.5)
    if place is None:
        return None
    picture.paste(piece.resize(size), place[:2])
    return max(place[0], 0), max(place[1], 0), min(place[2], picture.width), min(place[3], picture.height)


def free_place(canvas: tuple[int, int], boxes: Sequence[Box], size: Box, rng: random.Random,
               over: float = 0) -> Place | None:
    """A random place of this (width, height) in the canvas that touches none of the boxes, or None.

    A share of up to `over` of its width and of its height may lie outside.
    """
    w, h = (max(1, round(side)) for side in size)
    left, up = int(over * w), int(over * h)
    for _ in range(TRIES if w <= canvas[0] and h <= canvas[1] else 0):
        x, y = rng.randint(-left, canvas[0] - w + left), rng.randint(-up, canvas[1] - h + up)
        if all(x >= box[2] or x + w <= box[0] or y >= box[3] or y + h <= box[1] for box in boxes):
            return x, y, x + w, y + h
    return None


def zoomed_out(picture: Image.Image, boxes: Sequence[Box], rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """The picture and its boxes smaller, somewhere on a ground of its mean colour, which has the picture's size."""
    scale = rng.uniform(0.5, 0.75)
    small = picture.resize([max(1, round(scale * side)) for side in picture.size])
    ground = picture.resize((1, 1), Image.Resampling.BOX).resize(picture.size)
    x, y = (rng.randint(0, full - side) for full, side in zip(picture.size, small.size, strict=True))
    ground.paste(small, (x, y))
    return ground, [[box[0] * scale + x, box[1] * scale + y, box[2] * scale + x, box[3] * scale + y] for box in boxes]
