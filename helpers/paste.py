"""Training pictures with several tables, and with none: made by pasting, because people's photos show mostly one.

A model that has only met pictures with one table draws one box whatever it is shown. So pieces of other pictures are
pasted in: a piece with a table where there is none yet (as in Copy-Paste, https://arxiv.org/abs/2012.07177), or a piece
without one over each table. As both are pasted, an edge of a piece says nothing about what is in it.
"""

import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from PIL import Image

from helpers.boxes import xyxy_px_to_xyxy_unit, xyxy_unit_to_xyxy_px, xyxy_unit_to_yxyx_unit, yxyx_unit_to_xyxy_unit
from helpers.data.pictures import as_rgb
from helpers.data.schema import source_hash, workers

MORE = 0.6  # of the pasted pictures get more tables; the others lose theirs
TABLES = (1, 1, 2, 2, 3)  # how many more
SIDE = (0.15, 0.5)  # of the picture's long side: a pasted table's
COVER = 0.04  # of a table's sides: how far a cover reaches beyond it
TRIES = 20
GREY = (114, 114, 114)

Box = Sequence[float]  # x0, y0, x1, y1 in pixels


def with_pasted(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """`rows`, and behind them `share` as many pictures more, each made of one of them and pieces of others.

    `rows`: prepared pictures of the project's schema. A made picture has the id of the one below it and "+pasted". The
    same for the same (rows, share, seed); rows without a table anywhere come back as they are.
    """
    count = round(share * len(rows))
    if not count or not any(objects["bbox"] for objects in rows["objects"]):
        return rows
    below = rows.select(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    made = below.map(_pasted, fn_kwargs={"paste": Paste(rows), "seed": seed}, num_proc=workers(count),
                     desc="Pasting tables",
                     new_fingerprint=Hasher.hash([below._fingerprint, source_hash(Path(__file__)), share, seed]))
    return datasets.concatenate_datasets([rows, made])


def _pasted(row: Mapping, paste: "Paste", seed: int) -> dict:
    return paste(row, random.Random(f"{seed} {row['image_id']}"))


class Paste:
    """Makes a picture with more tables, or with none, out of one of `rows` and pieces of others."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows
        self.with_table = [number for number, objects in enumerate(rows["objects"]) if objects["bbox"]]

    def __call__(self, row: Mapping, rng: random.Random) -> dict[str, Any]:
        picture, boxes = self._opened(row)
        names = list(row["objects"]["category_name"])
        if rng.random() > MORE:
            for box in boxes:
                self._cover(picture, box, rng)
            return _row(row, picture, [], [])
        if free_place(picture.size, boxes, (0.3 * picture.width, 0.3 * picture.height), rng) is None:
            picture, boxes = zoomed_out(picture, boxes, rng)
        for _ in range(rng.choice(TABLES)):
            piece, name = self._table(rng)
            scale = rng.uniform(*SIDE) * max(picture.size) / max(piece.size)
            size = [max(8, round(scale * side)) for side in piece.size]
            if place := free_place(picture.size, boxes, size, rng):
                picture.paste(piece.resize(size), place[:2])
                boxes.append(place)
                names.append(name)
        return _row(row, picture, boxes, names)

    @staticmethod
    def _opened(row: Mapping) -> tuple[Image.Image, list[Box]]:
        picture = as_rgb(row["image"]).copy()
        return picture, xyxy_unit_to_xyxy_px(yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), *picture.size).tolist()

    def _table(self, rng: random.Random) -> tuple[Image.Image, str]:
        """A table cut out of a random picture, and its name."""
        row = self.rows[rng.choice(self.with_table)]
        picture, boxes = self._opened(row)
        number = rng.randrange(len(boxes))
        x0, y0, x1, y1 = (round(side) for side in boxes[number])
        return picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))), row["objects"]["category_name"][number]

    def _cover(self, picture: Image.Image, box: Box, rng: random.Random) -> None:
        """Paste a piece of a random picture, in which there is no table, over `box` and a little more; else grey."""
        other, tables = self._opened(self.rows[rng.randrange(len(self.rows))])
        across, down = COVER * (box[2] - box[0]), COVER * (box[3] - box[1])
        x0, y0, x1, y1 = (round(v) for v in (box[0] - across, box[1] - down, box[2] + across, box[3] + down))
        width, height = max(1, x1 - x0), max(1, y1 - y0)
        places = (free_place(other.size, tables, (scale * width, scale * height), rng) for scale in
                  (share * min(other.width / width, other.height / height) for share in (0.9, 0.6, 0.4, 0.25, 0.15)))
        place = next((place for place in places if place), None)
        piece = other.crop(place) if place else Image.new("RGB", (1, 1), GREY)
        picture.paste(piece.resize((width, height)), (x0, y0))


def free_place(canvas: tuple[int, int], boxes: Sequence[Box], size: Box, rng: random.Random) -> list[int] | None:
    """A random place [x0, y0, x1, y1] of this (width, height) in the canvas that touches none of the boxes, or None."""
    w, h = (max(1, round(side)) for side in size)
    for _ in range(TRIES if w <= canvas[0] and h <= canvas[1] else 0):
        x, y = rng.randint(0, canvas[0] - w), rng.randint(0, canvas[1] - h)
        if all(x >= box[2] or x + w <= box[0] or y >= box[3] or y + h <= box[1] for box in boxes):
            return [x, y, x + w, y + h]
    return None


def zoomed_out(picture: Image.Image, boxes: Sequence[Box], rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """The picture and its boxes smaller, somewhere on a ground of its mean colour, which has the picture's size."""
    scale = rng.uniform(0.5, 0.7)
    small = picture.resize([max(1, round(scale * side)) for side in picture.size])
    ground = picture.resize((1, 1), Image.Resampling.BOX).resize(picture.size)
    x, y = (rng.randint(0, full - side) for full, side in zip(picture.size, small.size, strict=True))
    ground.paste(small, (x, y))
    return ground, [[box[0] * scale + x, box[1] * scale + y, box[2] * scale + x, box[3] * scale + y] for box in boxes]


def _row(row: Mapping, picture: Image.Image, boxes: Sequence[Box], names: list[str]) -> dict[str, Any]:
    """`row` with another picture, and other boxes in its pixels."""
    known = dict(zip(row["objects"]["category_name"], row["objects"]["category_id"], strict=True))
    unit = xyxy_px_to_xyxy_unit(np.array(boxes, dtype=float).reshape(-1, 4), *picture.size).clip(0, 1)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    objects = {"bbox": xyxy_unit_to_yxyx_unit(unit).tolist(), "category_name": names,
               "category_id": [known.get(name, 0) for name in names]}
    return {**row, "image_id": f"{row['image_id']}+pasted", "image": {"bytes": file.getvalue(), "path": None},
            "width": picture.width, "height": picture.height, "objects": objects}
