"""Broken rows to fuzz the data's way with (files, audit, messages), and what must hold of what comes out."""

import io
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from helpers.boxes import CATEGORIES
from helpers.data import DataError, audit, clean
from helpers.data.json_formats import read_metadata
from helpers.data.schema import FEATURES
from helpers.messages import parse_text, target_text

TABLE = 100  # rows that are audited together
ODD = (None, True, -1, 0, 7, 2**40, 0.5, 1e308, float("nan"), float("inf"), "", " ", "x", "../x", "\x00", [], {}, [[]],
       {"bbox": None}, [1, 2, 3])
NUMBERS = (0.0, 1.0, -0.2, 1.3, 1e-9, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), None)


def jpeg(draw: random.Random) -> bytes:
    """A small noisy picture, some turned by EXIF, some extremely thin."""
    size = draw.choice(((48, 64), (64, 48), (40, 40), (1, 300)))
    noise = np.random.default_rng(draw.randrange(2**32)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    picture, exif, file = Image.fromarray(noise), Image.Exif(), io.BytesIO()
    exif[0x0112] = draw.choice((1, 1, 1, 3, 6, 8, 0, 99))
    picture.save(file, "JPEG", quality=60, exif=exif)
    return file.getvalue()


def picture(draw: random.Random) -> dict[str, Any] | None:
    whole = jpeg(draw)
    return draw.choice((
        *[{"bytes": whole, "path": None}] * 6, {"bytes": whole[: draw.randrange(len(whole))], "path": None},
        {"bytes": b"", "path": None}, None,
        {"bytes": bytes(255 - byte for byte in whole), "path": None}))


def box(draw: random.Random) -> list[float | None] | None:
    (y0, y1), (x0, x1) = (sorted(round(draw.random(), 4) for _ in "ab") for _ in "yx")
    good: list[float | None] = [y0, x0, y1, x1]
    if draw.random() < 0.6:
        return good
    good[draw.randrange(4)] = draw.choice(NUMBERS)
    return draw.choice((good, good, good[:3], good + [0.5], [], None, good[::-1]))


def row(draw: random.Random, number: int) -> dict[str, Any]:
    """A row of the schema's types, with anything in it."""
    count = draw.choice((0, 1, 1, 2, 5))
    known = (*CATEGORIES, *CATEGORIES, "NUTRITION-TABLE", "", "bread", "no nutrition table", None)
    names = [draw.choice(known) for _ in range(count)]
    ids = [CATEGORIES.index(name) if name in CATEGORIES else draw.choice((-1, 99, None)) for name in names]
    objects: dict[str, Any] = {"bbox": [box(draw) for _ in names], "category_id": ids, "category_name": names}
    if draw.random() < 0.1:
        objects[draw.choice(list(objects))] = draw.choice((None, []))
    meta = {"barcode": draw.choice((None, "", str(draw.randrange(10**6)))), "off_image_id": None, "image_url": ""}
    return {"image_id": draw.choice((str(number), str(number), "", "same")), "image": picture(draw),
            "width": draw.choice((48, 64, 0, -3, 10**9)), "height": draw.choice((64, 48, 0)),
            "meta": draw.choice((meta, meta, None)), "objects": draw.choice((objects,) * 9 + (None,))}


def tables(count: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """`count` rows in lists of 100."""
    draw = random.Random(f"rows {seed}")
    for start in range(0, count, TABLE):
        yield [row(draw, start + number) for number in range(min(TABLE, count - start))]


def check_table(rows: list[dict[str, Any]]) -> str:
    """The rows through audit, cleaning and messages; what is wrong with what is left, or ""."""
    raw = datasets.DatasetDict({"val": datasets.Dataset.from_list(rows, features=FEATURES)})
    try:
        cleaned = clean(raw, audit(raw))["val"]
    except DataError as error:
        return "" if len(rows) < 10 else f"nothing is left of {len(rows)} rows ({error})"
    for kept in cleaned.remove_columns("image").to_list():
        boxes = np.array(kept["objects"]["bbox"]).reshape(-1, 4)
        inside = np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 1).all()
        if not inside or (boxes[:, 2:] <= boxes[:, :2]).any():
            return f"{kept['image_id']!r} keeps the box {boxes.tolist()}"
        parsed = parse_text(target_text(kept["objects"]))
        back = sorted(map(tuple, parsed.boxes_xyxy_unit[:, [1, 0, 3, 2]]))
        if len(back) != len(boxes) or parsed.rejected:
            return f"{kept['image_id']!r}: {len(boxes)} boxes are written and {len(back)} are read"
        if len(boxes) == 1 and np.abs(np.array(back) - boxes).max() > 0.001:
            return f"{kept['image_id']!r}: {boxes.tolist()} is read back as {back}"
    return ""


def lines(count: int, seed: int) -> Iterator[str]:
    """Lines of a metadata.jsonl, each with one to three things that do not belong there."""
    draw = random.Random(f"lines {seed}")
    for _ in range(count):
        found: dict[str, Any] = {"file_name": "0.jpg", "image_id": "a", "width": 48, "height": 64, "meta": {},
                                 "objects": {"bbox": [[0.1, 0.2, 0.5, 0.6]], "category_name": ["nutrition-table"],
                                             "category_id": [0]}}
        for _ in range(draw.randrange(1, 4)):
            place = draw.choice((found, found["objects"] if isinstance(found.get("objects"), dict) else found))
            key = draw.choice(list(place) or ["objects"])
            place[key] = draw.choice(ODD) if draw.random() < 0.6 else [draw.choice(ODD)]
        text = json.dumps(found)
        yield text if draw.random() < 0.8 else text[: draw.randrange(len(text))] + draw.choice(("", "{", "\x00", "]"))


def check_line(line: str) -> str:
    """The line in a folder with its picture: rows or a DataError, and no path that leaves the folder."""
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        root = Path(name).resolve()
        Image.new("RGB", (48, 64)).save(root / "0.jpg")
        (root / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
        try:
            found = [row for rows in read_metadata(root).values() for row in rows]
        except DataError as error:
            return "" if str(error) else "a DataError without words"
        outside = [row["image"]["path"] for row in found if not Path(row["image"]["path"]).is_relative_to(root)]
        if outside:
            return f"{outside} leaves the folder"
        if found:
            datasets.Dataset.from_list(found, features=FEATURES)
        return ""
