"""Annotations in JSON -> rows of the schema: metadata.jsonl of an imagefolder, COCO.

Each reader, here and in text_formats.py, takes a folder and gives {split, or "" where none is named: [row]}. Boxes are
converted as they stand: swapped, empty or outside, they stay so for the audit to name. A broken annotation file stops
the load at once with a `DataError`; a broken picture never does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.boxes import CATEGORIES
from helpers.data.pictures import NAN_BOX, Pictures, Rows, files_below, row, split_of
from helpers.data.schema import DataError, objects_of, read_text

_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id")


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object {{...}}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: found a {type(found).__name__}; expected one object {{...}}")
    return found


def _numbers(box: Any) -> list[float] | None:
    """Four numbers as a list of floats; None for anything else."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return None
    try:
        return [float(value) for value in box]
    except OverflowError:  # JSON's whole numbers have no end
        return None


def _xywh_px_to_yxyx_unit(box: Any, width: int, height: int) -> list[float]:
    numbers = _numbers(box)
    if numbers is None or not width or not height:
        return NAN_BOX
    x, y, w, h = numbers
    return [y / height, x / width, (y + h) / height, (x + w) / width]


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------


def bbox_style(rows: list[dict[str, Any]], where: str) -> str:
    """ "unit" ([y0, x0, y1, x1] in 0-1) or "coco" ([x0, y0, width, height] in pixels), by what most values can be.

    `DataError` where most boxes fit neither.
    """
    boxes = [(box, item["width"], item["height"]) for item in rows for box in item["objects"]["bbox"] if _numbers(box)]
    if sum(max(box) <= 1.5 for box, _, _ in boxes) * 2 >= len(boxes):
        style, fits = "unit", sum(box[2] >= box[0] and box[3] >= box[1] for box, _, _ in boxes)
    else:
        fits = sum(box[0] + box[2] <= 1.01 * w and box[1] + box[3] <= 1.01 * h for box, w, h in boxes)
        style = "coco"
    if fits * 2 < len(boxes):
        raise DataError(
            f"{where}, objects.bbox: most boxes, such as {boxes[0][0]}, are neither [y_min, x_min, y_max, x_max] in "
            "0-1 nor COCO's [x, y, width, height] in pixels inside the picture; expected one of these"
        )
    return style


def _categories(objects: dict[str, Any]) -> tuple[str, list] | None:
    """The field with the boxes' categories, and what it holds; None without one."""
    return next(((key, objects[key]) for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)


def _metadata_row(pictures: Pictures, file: Path, found: dict[str, Any], where: str) -> dict[str, Any]:
    for key, kind in (("file_name", str), ("objects", dict)):
        if not isinstance(found.get(key), kind):
            raise DataError(f"{where}: {key} is {found.get(key)!r}; expected a {kind.__name__}")
    objects = found["objects"]
    categories = _categories(objects)
    if not isinstance(objects.get("bbox"), list) or categories is None:
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    if not isinstance(found.get("meta") or {}, dict):
        raise DataError(f"{where}: meta is {found['meta']!r}; expected an object with barcode, off_image_id, image_url")
    path = pictures.find(found["file_name"], file.parent, split_of(file.parent, pictures.root), where)
    new = row(path, found.get("image_id"), found.get("meta"), (found.get("width"), found.get("height")))
    field, named = categories
    names = [CATEGORIES[n] if type(n) is int and 0 <= n < len(CATEGORIES) else str(n) for n in named]
    new["objects"] = objects_of(objects["bbox"], names)
    ids = objects.get("category_id")
    if field == "category_name" and isinstance(ids, list) and all(type(n) is int and abs(n) < 2**31 for n in ids):
        new["objects"]["category_id"] = ids
    return new


def read_metadata(root: Path) -> Rows:
    """Hugging Face `imagefolder`: one metadata.jsonl, or one in each split's folder.

    `objects` is this project's (`bbox` [y0, x0, y1, x1] in 0-1) or the library's usual one (COCO's xywh in pixels).
    """
    pictures, splits = Pictures(root), {}
    for file in files_below(root, "metadata.jsonl"):
        lines = enumerate(read_text(file).split("\n"), 1)
        places = [(f"{file} line {number}", line) for number, line in lines if line.strip()]
        parsed = [(where, _parse_json(line, where)) for where, line in places]
        rows = [_metadata_row(pictures, file, found, where) for where, found in parsed]
        style = bbox_style(rows, str(file))
        said = "[y_min, x_min, y_max, x_max] in 0-1" if style == "unit" else "COCO's [x, y, width, height] in pixels"
        print(f"data: {file}: boxes read as {said}")
        if any(type(number) is int for _, found in parsed for number in (_categories(found["objects"]) or ("", []))[1]):
            print(f"data: {file}: numbers of categories read as {dict(enumerate(CATEGORIES))}")
        for item in rows:
            boxes = item["objects"]["bbox"]
            if style == "coco":
                boxes = [_xywh_px_to_yxyx_unit(box, item["width"], item["height"]) for box in boxes]
            item["objects"]["bbox"] = [_numbers(box) or NAN_BOX for box in boxes]
            splits.setdefault(split_of(Path(item["image"]["path"]).parent, root), []).append(item)
    return splits


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco_files(root: Path, sure: bool) -> list[Path]:
    """The JSON files of `root`; where `sure` only those with the lists of COCO, for other formats have JSON too."""
    keys = (b'"images"', b'"annotations"') if sure else ()
    return [file for file in files_below(root, "*.json") if all(key in file.read_bytes() for key in keys)]


def read_coco(root: Path, file: Path | None = None) -> Rows:
    """COCO JSON (`images`, `annotations`, `categories`): one file, or one a split; pictures anywhere below `root`."""
    pictures, splits, others = Pictures(root), {}, []
    for path in [file] if file else coco_files(root, sure=False):
        found = _parse_json(read_text(path), str(path))
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(found.get(key), list)]
        if missing:
            others.append(f"{path} (has {sorted(found)[:8]}, lacks the lists {', '.join(missing)})")
        else:
            splits.setdefault(split_of(path, root), []).extend(_coco_rows(pictures, path, found))
    if not splits:
        raise DataError(f"no COCO file in {root}: {'; '.join(others)}; expected images, annotations and categories")
    return splits


def _check_coco(file: Path, found: dict[str, Any]) -> None:
    """`DataError` for an entry of COCO's lists that is no object, or whose ids are not numbers or text."""
    for kind, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        for number, item in enumerate(found[kind]):
            if not isinstance(item, dict):
                raise DataError(f"{file}: {kind}[{number}] is {str(item)[:40]!r}; expected an object {{...}}")
            for key in ids:
                if not isinstance(item.get(key), (int, str)):
                    found_id = str(item.get(key))[:40]
                    raise DataError(f"{file}: {key} of {kind}[{number}] is {found_id!r}; expected a number")


def _coco_rows(pictures: Pictures, file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    _check_coco(file, found)
    names = {category.get("id"): str(category.get("name")) for category in found["categories"]}
    notes: dict[Any, list[dict[str, Any]]] = {picture.get("id"): [] for picture in found["images"]}
    for note in found["annotations"]:
        if note.get("image_id") not in notes:
            raise DataError(
                f"{file}: annotation {note.get('id')} has image_id {note.get('image_id')!r}; expected an id of images"
            )
        notes[note["image_id"]].append(note)
    rows, split = [], split_of(file, pictures.root)
    for picture in found["images"]:
        if not isinstance(picture.get("file_name"), str):
            raise DataError(f"{file}: image {picture.get('id')!r} has no file_name; expected the picture's path")
        path = pictures.find(picture["file_name"], file.parent, split, str(file))
        new = row(path, None, picture, (picture.get("width"), picture.get("height")))
        own = notes[picture.get("id")]
        new["objects"] = objects_of(
            [_xywh_px_to_yxyx_unit(note.get("bbox"), new["width"], new["height"]) for note in own],
            [names.get(note.get("category_id"), f"id {note.get('category_id')}") for note in own],
        )
        rows.append(new)
    return rows
