"""Annotation files -> rows of the schema.

A format is one small function from a file to annotated pictures (`Found`): the picture's name, its boxes as the file
has them, what kind of boxes they are, the names of their classes. Everything after that is done once, in `to_rows`: the
picture is found, unit, order and frame of the boxes are decided for the whole set (`frames`), and what cannot be read
is left out by name or refused. A broken annotation file stops the load with a `DataError`, a broken picture never.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import yaml

from helpers.boxes import CATEGORIES
from helpers.data.frames import ANY, Framed, around, left_out, numbers_of, to_unit
from helpers.data.pictures import Head, Pictures, Wanted, completed, escaped, head
from helpers.data.schema import DataError, meta_of, objects_of, read_text, read_yaml
from helpers.data.splits import Rows, split_name, split_of
from helpers.messages import parse_text


class Found(NamedTuple):
    """One annotated picture: its row without boxes, and its boxes and classes as written."""

    row: dict[str, Any]  # of `row`
    boxes: list[Any] | None  # a tuple: corners, whatever the order of `kind`; None: listed, and nothing is said of it
    kind: str  # as `frames.to_unit` takes it
    names: list[Any]  # one a box; a number is a category_id
    split: str = ""  # where the file itself says it
    stem: str = ""  # the file's own name where it belongs to this picture alone
    head: Head | None = None  # of a picture that is no file
    file: Path = Path()


def read(kind: str, pictures: Pictures, files: dict[Path, Any]) -> Iterator[Found]:
    """The annotated pictures of `files`, which `annotated` or `yolo_labels` gave for this key of `READERS`."""
    if kind == "YOLO":
        yield from read_yolo(pictures, files)
        return
    for file, content in files.items():
        for one in READERS[kind][1](file, content):
            said = split_of(file.parent if one.stem else file, pictures.root)
            yield one._replace(file=file, split=one.split or said)


def row(name: str, size: Iterable[Any] = (), image_id: Any = None, meta: dict | None = None) -> dict[str, Any]:
    """A row of the schema without boxes: the picture's name as written, its (width, height) where the file has them."""
    try:
        width, height = (int(float(value or 0)) for value in (*size, None, None)[:2])
        if not 0 <= min(width, height) <= max(width, height) <= 10**6:
            raise ValueError("no picture is as large")
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name}: width and height are {size!r}; expected whole numbers of pixels") from None
    return {"image_id": image_id, "image": {"path": name, "bytes": None}, "width": width, "height": height,
            "meta": meta, "objects": objects_of([], [])}  # fmt: skip


def to_rows(found: Iterable[Found], pictures: Pictures | None, where: str, box_format: str | None = None,
            unlabelled: str | None = None) -> Rows:  # fmt: skip
    """{split, or "" where no file names it: rows of the schema}; `box_format` and `unlabelled` are those of `load_raw`.

    Where `pictures` is None, each `Found` has the head of its own.
    """
    found = list(found)
    found = _labelled(_with_pictures(found, pictures) if pictures else found, where, unlabelled)
    reasons = {number: why for number, one in enumerate(found) if (why := _unreadable(one))}
    left_out([f"{found[n].row['image_id']} ({found[n].file.name}: {why})" for n, why in reasons.items()], len(found),
             where, "have boxes that cannot be read")
    found = [one for number, one in enumerate(found) if number not in reasons]
    boxes: dict[int, list[list[float]] | None] = {}
    for kind in dict.fromkeys(one.kind for one in found):
        own = [number for number, one in enumerate(found) if one.kind == kind]
        sizes = [Framed(one.boxes or [], one.head, (one.row["width"], one.row["height"]))
                 for one in (found[number] for number in own)]  # fmt: skip
        boxes |= dict(zip(own, to_unit(sizes, kind, box_format, where), strict=True))
    splits: Rows = {}
    for number in _once(found, boxes, where):
        one, names = found[number], [escaped(name) for name in map(_name, found[number].names)]
        one.row["image_id"] = escaped(str(one.row["image_id"]))
        one.row["meta"] = meta_of(one.row["meta"])
        one.row["width"], one.row["height"] = one.head.shown if one.head else (one.row["width"], one.row["height"])
        one.row["objects"] = objects_of(boxes[number] or [], names)
        splits.setdefault(one.split, []).append(one.row)
    return splits


def _name(name: Any) -> str:
    return CATEGORIES[name] if type(name) is int and 0 <= name < len(CATEGORIES) else str(name)


def _with_pictures(found: list[Found], pictures: Pictures) -> list[Found]:
    """`found` with the path of each picture, what its head says, and its id."""
    wanted = [Wanted(one.row["image"]["path"], one.file, one.split, one.stem) for one in found]
    placed, ends = [], []
    for one, path in zip(found, pictures.find(wanted), strict=True):
        whole = completed(path)
        ends += [path.name] if whole else []
        one.row["image"] = {"path": str(path), "bytes": whole}
        one.row["image_id"] = one.row["image_id"] or path.stem
        placed.append(one._replace(head=head(one.row["image"])))
    if ends:
        print(f"data: {len(ends)} JPEG files lack a little of their end, which stays grey, such as {escaped(ends[0])}")
    return placed


def _labelled(found: list[Found], where: str, unlabelled: str | None) -> list[Found]:
    """`found` without the pictures that a file lists and says nothing of, or with them as pictures without a table."""
    silent = [one.row["image_id"] for one in found if one.boxes is None]
    if unlabelled == "negative":
        return [one._replace(boxes=one.boxes or []) for one in found]
    if unlabelled is None:
        left_out(silent, len(found), where, "are listed without a box, which may mean no table or not labelled yet; "
                 "give unlabelled='negative' or 'skip'")
    return [one for one in found if one.boxes is not None]


def _unreadable(one: Found) -> str:
    """Why the boxes of a picture cannot be read, or ""."""
    boxes = one.boxes or []
    if len(boxes) != len(one.names):
        return f"{len(boxes)} boxes and {len(one.names)} names of classes"
    return next((str(box)[:120] or "an empty text" for box in boxes if numbers_of(box) is None), "")


def _once(found: list[Found], boxes: dict[int, Any], where: str) -> list[int]:
    """The entries to take: of a picture that stands there several times with much the same boxes the first."""
    first: dict[tuple[str, str], int] = {}
    again, differ = 0, set()
    known: dict[str, int] = {}
    for number in sorted(boxes, key=lambda number: not found[number].split):  # a list of all beside those of the splits
        if boxes[number] is None:
            continue
        one, path = found[number], found[number].row["image"]["path"]
        same = known.setdefault(path, number) if not one.split else first.setdefault((one.split, path), number)
        known[path] = same
        again += same != number
        if not _agree(boxes[same], boxes[number]) or {*map(str, found[same].names)} != {*map(str, one.names)}:
            differ.add(same)
    first |= {("", path): number for path, number in known.items() if not found[number].split}
    left_out([f"{found[n].row['image_id']} ({found[n].file.name})" for n in differ], len(found), where,
             "are annotated twice with other boxes or classes; remove one of the two")
    if again:
        print(f"data: {again} pictures are annotated twice, with the same boxes: the first counts")
    return sorted(number for number in first.values() if number not in differ)


def _agree(some: list[list[float]], others: list[list[float]]) -> bool:
    """Whether two lists of boxes are much the same."""
    return len(some) == len(others) and bool(np.allclose(sorted(some), sorted(others), rtol=0, atol=0.05))


def same_rows(some: Rows, others: Rows) -> bool:
    """Whether two readings of a folder give the same pictures much the same boxes."""
    one, other = ({row["image"]["path"]: row["objects"]["bbox"] for rows in splits.values() for row in rows}
                  for splits in (some, others))  # fmt: skip
    return one.keys() == other.keys() and all(_agree(one[path], other[path]) for path in one)


# --- what a file is ---------------------------------------------------------------------------------------------------

_OBJECTS: dict[str, Callable[[dict], bool]] = {  # of a JSON file that is one object
    "COCO": lambda one: isinstance(one.get("images"), list) and isinstance(one.get("annotations"), list),
    "labelme": lambda one: isinstance(one.get("shapes"), list) and "imagePath" in one,
    "VIA": lambda one: any(isinstance(part, dict) and "regions" in part for part in _via_entries(one)[:9]),
}
_LINES: dict[str, Callable[[dict], bool]] = {  # of a list of objects, or of JSON lines
    "metadata": lambda one: "file_name" in one and ("objects" in one or "bbox" in one),
    "CreateML": lambda one: "image" in one and isinstance(one.get("annotations"), list),
    "Label Studio": lambda one: isinstance(one.get("data"), dict) and "annotations" in one,
    "chat": lambda one: any(key in one for key in ("conversations", "messages", "suffix")) and _chat_image(one) != "",
}
_COLUMNS = {  # of a table
    "image": "filename file image imageid imagename img path imagepath imagefile frame".split(),
    "name": "class classname label labelname category categoryname name".split(),
    "x0": "xmin x1 left".split(), "y0": "ymin y1 top".split(), "x1": "xmax x2 right".split(),
    "y1": "ymax y2 bottom".split(), "x": "x bboxx".split(), "y": "y bboxy".split(), "w": "w bboxwidth bboxw".split(),
    "h": "h bboxheight bboxh".split(), "width": "width imagewidth".split(), "height": "height imageheight".split(),
}  # fmt: skip
_CORNERS = {"xyxy": ["x0", "y0", "x1", "y1"], "xywh": ["x", "y", "w", "h"]}


def annotated(files: Iterable[Path]) -> tuple[dict[str, dict[Path, Any]], list[str]]:
    """{format: {file: what it holds}} of the annotation files among `files`, and what the others of their kind hold.

    `DataError` for one that is broken; what is no annotation at all is only listed.
    """
    readers = {".json": _json, ".jsonl": _json, ".ndjson": _json, ".xml": _xml, ".csv": _table}
    known: dict[str, dict[Path, Any]] = {}
    others = []
    for file in files:
        if file.suffix.lower() in readers:
            content, kind = readers[file.suffix.lower()](file)
            if kind:
                known.setdefault(kind, {})[file] = content
            else:
                others.append(f"{file.name} ({content})")
    return known, others


def _json(file: Path) -> tuple[Any, str]:
    text, where = read_text(file), str(file)
    try:
        if file.suffix.lower() == ".json":
            found = json.loads(text)
        else:
            found = []
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{file} line {number}"
                found += [json.loads(line)] if line.strip() else []
    except (json.JSONDecodeError, RecursionError) as error:
        if any(word in text for word in ('"bbox', '"objects"', '"annotations"', '"shapes"', '"regions"')):
            raise DataError(f"{where}: not valid JSON ({error}); expected a whole file") from None
        return "not valid JSON", ""
    first = [one for one in (found[:9] if isinstance(found, list) else [found]) if isinstance(one, dict)]
    kinds = _LINES if isinstance(found, list) else _OBJECTS
    kind = next((name for name, fits in kinds.items() if any(map(fits, first))), "")
    return found if kind else f"has {sorted(first[0])[:8]}" if first else f"a {type(found).__name__}", kind


def _xml(file: Path) -> tuple[Any, str]:
    found = file.read_bytes()
    try:
        try:
            tree = ElementTree.fromstring(found)
        except ElementTree.ParseError:
            if found.isascii() or b"encoding=" in found[:100]:
                raise
            tree = ElementTree.fromstring(found.decode("gb18030", "replace"))  # written on a Chinese Windows
    except ElementTree.ParseError as error:
        if b"<annotation" in found:
            raise DataError(f"{file}: not valid XML ({error}); expected a whole annotation file") from None
        return "not valid XML", ""
    kind = {"annotation": "Pascal VOC", "annotations": "CVAT"}.get(tree.tag, "")
    return tree if kind else f"<{tree.tag}>", kind


def _table(file: Path) -> tuple[Any, str]:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, sep=None, engine="python")
    except Exception as error:  # pandas and csv raise many kinds
        return f"no table ({type(error).__name__})", ""
    if not table.empty and {"file_name", "objects"} <= set(table.columns):
        return [{key: _value(value) for key, value in line.items()} for line in table.to_dict("records")], "metadata"
    plain = {name: re.sub(r"[\W_]", "", str(name).lower()) for name in table.columns}
    table = table.rename(columns={name: key for name, same in plain.items() for key, known in _COLUMNS.items()
                                  if same in known})  # fmt: skip
    fits = not table.empty and any({"image", "name", *corners} <= set(table) for corners in _CORNERS.values())
    return (table, "CSV") if fits else (f"{len(table)} lines with the columns {list(plain)[:8]}", "")


def _value(text: str) -> Any:
    """JSON, or Python's way to write it, in a cell of a table; other text stays."""
    try:
        return yaml.safe_load(text) if text[:1] in ("[", "{") else text  # YAML knows both
    except yaml.YAMLError:
        return text


# --- metadata of an imagefolder ---------------------------------------------------------------------------------------

_BOX_FIELDS = ("bbox", "bboxes", "boxes", "box")
_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id",
                "classes", "class", "names", "name")  # fmt: skip


def read_metadata(file: Path, lines: list[Any]) -> Iterator[Found]:
    """Hugging Face `imagefolder`: metadata.jsonl, .json, .csv or .parquet, one or one in each split's folder."""
    for number, line in enumerate(lines, 1):
        where = f"{file} line {number}"
        if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
            raise DataError(f"{where}: found {str(line)[:60]}; expected an object {{...}} with file_name and objects")
        new = row(line["file_name"], (line.get("width"), line.get("height")), line.get("image_id"), line.get("meta"))
        yield of_objects(Found(new, [], "", []), line.get("objects", line), where, "meta" in line)


def of_objects(found: Found, objects: Any, where: str, own: bool) -> Found:
    """`found` with the boxes of a column `objects`: lists of boxes and names, or a list of one dict a box.

    Only a row that also has `meta` (`own`) is surely one of this project's schema, whose boxes are yxyx.
    """
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):
        keys = dict.fromkeys(key for one in objects for key in one) or ("bbox", "category")
        objects = {key: [one.get(key) for one in objects] for key in keys}
    if not isinstance(objects, dict):
        raise DataError(f"{where}: objects is {str(objects)[:60]}; expected a dict")
    boxes = next((objects[key] for key in _BOX_FIELDS if isinstance(objects.get(key), list)), None)
    field = next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)
    if boxes is None or field is None:
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    kind = "" if field != "category_name" else "yxyx-unit" if own else ANY
    return found._replace(boxes=boxes, names=objects[field], kind=kind)


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(file: Path, found: dict[str, Any]) -> Iterator[Found]:
    """COCO JSON (`images`, `annotations`, `categories`): one file, or one a split; [x, y, width, height] in pixels."""
    for kind, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        for number, item in enumerate(found.get(kind) or []):
            if not isinstance(item, dict):
                raise DataError(f"{file}: {kind}[{number}] is {str(item)[:40]!r}; expected an object {{...}}")
            for key in ids:
                if not isinstance(item.get(key), (int, str)):
                    found_id = str(item.get(key))[:40]
                    raise DataError(f"{file}: {key} of {kind}[{number}] is {found_id!r}; expected a number")
    names = {str(category["id"]): str(category.get("name")) for category in found.get("categories") or []}
    notes: dict[str, list[dict[str, Any]]] = {str(picture["id"]): [] for picture in found["images"]}
    for note in found["annotations"]:
        notes.setdefault(str(note["image_id"]), []).append(note)
    for picture in found["images"]:
        if not isinstance(picture.get("file_name"), str):
            raise DataError(f"{file}: image {picture['id']!r} has no file_name; expected the picture's path")
        own = notes.pop(str(picture["id"]), [])
        new = row(picture["file_name"], (picture.get("width"), picture.get("height")), None, picture)
        yield Found(new, [_coco_box(note) for note in own] or None, "xywh-pixels",
                    [names.get(n, f"class {n}") for n in (str(note["category_id"]) for note in own)])
    lost = [note.get("id") for others in notes.values() for note in others]
    if len(lost) * 2 > len(found["annotations"]):
        raise DataError(f"{file}: {len(lost)} annotations, such as {lost[0]}, have an image_id that no picture has; "
                        "expected an id of images")  # fmt: skip
    if lost:
        print(f"data: {file}: {len(lost)} annotations belong to no picture of images, such as {lost[0]}: not used")


def _coco_box(note: dict[str, Any]) -> Any:
    """The bbox of an annotation, else the box around its polygons or its mask."""
    mask = note.get("segmentation")
    if numbers_of(note.get("bbox")) is not None or not mask:
        return note.get("bbox")
    if isinstance(mask, list):
        return around([number for part in mask for number in (part if isinstance(part, list) else [part])])
    try:
        from pycocotools import mask as coco_mask

        packed = mask if isinstance(mask["counts"], str | bytes) else coco_mask.frPyObjects(mask, *mask["size"])
        return coco_mask.toBbox(packed).tolist()
    except Exception:  # pycocotools raises many kinds
        return f"the mask {str(mask)[:60]}"


# --- other tools' JSON and tables -------------------------------------------------------------------------------------


def read_labelme(file: Path, found: dict[str, Any]) -> Iterator[Found]:
    """labelme: a JSON a picture, points in pixels."""
    shapes = [shape for shape in found["shapes"] if isinstance(shape, dict)]
    boxes = [around(shape.get("points")) if shape.get("shape_type") != "circle" else
             "a circle" for shape in shapes]  # fmt: skip
    new = row(str(found["imagePath"]), (found.get("imageWidth"), found.get("imageHeight")))
    yield Found(new, boxes, "xyxy-pixels", [shape.get("label") for shape in shapes], stem=file.stem)


def _via_entries(found: dict[str, Any]) -> list[Any]:
    entries = found.get("_via_img_metadata", found)
    return list(entries.values()) if isinstance(entries, dict) else []


def read_via(file: Path, found: dict[str, Any]) -> Iterator[Found]:
    """VGG Image Annotator: JSON of a project or an export, rectangles and polygons in pixels."""
    for entry in (one for one in _via_entries(found) if isinstance(one, dict)):
        regions = entry.get("regions") or []
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        named = [list((region.get("region_attributes") or {}).values()) for region in regions]
        names = [next(iter(first[0]), "") if first and isinstance(first[0], dict) else (first or [""])[0]
                 for first in named]  # a checkbox is {choice: true}
        boxes = [_via_box(region.get("shape_attributes") or {}) for region in regions]
        yield Found(row(str(entry.get("filename"))), boxes or None, "xywh-pixels", names)


def _via_box(shape: dict[str, Any]) -> Any:
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys):
        return around(list(zip(xs, ys, strict=True)))
    return [shape.get(key) for key in ("x", "y", "width", "height")]


def read_createml(file: Path, entries: list[Any]) -> Iterator[Found]:
    """CreateML JSON: [centre x, centre y, width, height] in pixels."""
    for entry in entries:
        notes = [note for note in entry.get("annotations") or [] if isinstance(note, dict)]
        places = [note.get("coordinates") or {} for note in notes]
        boxes = [[place.get(key) for key in ("x", "y", "width", "height")] for place in places]
        yield Found(row(str(entry.get("image"))), boxes or None, "cxcywh-pixels", [note.get("label") for note in notes])


def read_labelstudio(file: Path, tasks: list[Any]) -> Iterator[Found]:
    """Label Studio's JSON: rectangles and polygons in percent of the picture as shown; the first annotation counts."""
    for task in tasks:
        texts = [value for value in task["data"].values() if isinstance(value, str) and "." in value]
        name = (texts or [""])[0].split("?d=")[-1]  # local files are served as /data/local-files/?d=path
        done = [one for one in task["annotations"] if isinstance(one, dict) and not one.get("was_cancelled")]
        regions = [one for one in (done[0].get("result") or [] if done else []) if isinstance(one.get("value"), dict)]
        labels = [next((v for key, v in one["value"].items() if key.endswith("labels")), None) for one in regions]
        regions, labels = [r for r, v in zip(regions, labels, strict=True) if v], [v[0] for v in labels if v]
        size = [regions[0].get(f"original_{side}") for side in ("width", "height")] if regions else []
        boxes = [_labelstudio_box(one) for one in regions] if done else None
        yield Found(row(name, size), boxes, "xywh-percent", labels)


def _labelstudio_box(region: dict[str, Any]) -> Any:
    value = region["value"]
    box = [value.get(key) for key in ("x", "y", "width", "height")]
    if "points" in value:
        return around(value["points"])
    numbers, size = numbers_of(box), [region.get(f"original_{side}") for side in ("width", "height")]
    if not value.get("rotation") or numbers is None or not all(size):
        return box
    scale = np.array(size) / 100  # turned around its upper left corner, in pixels
    start, side = numbers[:2] * scale, numbers[2:] * scale
    corners = _turned(start, [[0, 0], [side[0], 0], [0, side[1]], side], value["rotation"])
    return around(corners / scale)


def _turned(centre: Any, points: Any, degrees: Any) -> np.ndarray:
    """`points` [N, 2], relative to `centre`, turned clockwise around it, in pixels."""
    turn = math.radians(float(degrees))
    matrix = [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    return np.asarray(centre) + np.asarray(points, float) @ np.array(matrix)


def read_csv(file: Path, table: pd.DataFrame) -> Iterator[Found]:
    """A table with a line a box (TensorFlow, OpenImages and others): corners, or x, y, width and height."""
    order = next(order for order, corners in _CORNERS.items() if set(corners) <= set(table))
    for name, lines in table.groupby("image", sort=False):
        size = [lines[side].iloc[0] for side in ("width", "height") if side in lines]
        lines = lines[lines[_CORNERS[order]].ne("").any(axis=1)]
        boxes = lines[_CORNERS[order]].to_numpy().tolist()
        yield Found(row(str(name), size), boxes or None, order, lines["name"].tolist())


# --- chats ------------------------------------------------------------------------------------------------------------

_LOC = re.compile(r"([^<>]*)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>")  # Florence-2


def _chat_image(item: dict[str, Any]) -> str:
    """The name of the picture of a chat, or ""."""
    turns = [turn for turn in item.get("messages") or [] if isinstance(turn, dict)]
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    for found in (item.get("image"), item.get("images"), *(part.get("image") for part in parts)):
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        found = found.get("path") if isinstance(found, dict) else found
        if isinstance(found, str):
            return found
    return ""


def read_chats(file: Path, items: list[Any]) -> Iterator[Found]:
    """Lines to fine-tune a model on, as LLaVA, Qwen, ms-swift and Florence-2 take them: boxes in the completion."""
    for number, item in enumerate(items, 1):
        name = _chat_image(item) if isinstance(item, dict) else ""
        if not name:
            raise DataError(f"{file}: entry {number} names no picture, or several; expected one each")
        objects = item.get("objects")
        if isinstance(objects, dict) and isinstance(objects.get("bbox"), list):  # ms-swift
            names = objects.get("ref") or [""]
            kind = {"norm1": "xyxy-unit", "real": "xyxy-pixels"}.get(objects.get("bbox_type", ""), "xyxy")
            names = names * len(objects["bbox"]) if len(names) == 1 else names
            yield Found(row(name), objects["bbox"], kind, names)
        else:
            yield Found(row(name), *_of_text(_completion(item)))


def _completion(item: dict[str, Any]) -> str:
    """What the model shall write."""
    turns = item.get("conversations") or item.get("messages") or [{"role": "assistant", "content": item.get("suffix")}]
    texts = []
    for turn in (turn for turn in turns if isinstance(turn, dict)):
        if turn.get("from", turn.get("role")) in ("gpt", "assistant"):
            said = turn.get("value", turn.get("content"))
            texts += [part.get("text") for part in said] if isinstance(said, list) else [said]
    return "\n".join(str(text) for text in texts if text)


def _of_text(text: str) -> tuple[list[Any] | None, str, list[str]]:
    """Boxes, kind and names in a completion: Qwen2-VL's form, JSON with bbox_2d, or Florence-2's tokens."""
    if tokens := _LOC.findall(text):
        names = [name for name, *_ in tokens]  # a name stands before the first of its boxes
        names = [next(name for name in names[i::-1] if name or not i) for i in range(len(names))]
        return [numbers for _, *numbers in tokens], "xyxy-1000", names
    if "bbox" in text or text.strip() == "[]":
        try:
            found = json.JSONDecoder().raw_decode(text[re.search(r"[\[{]", text).start() :])[0]  # type: ignore[union-attr]
        except (json.JSONDecodeError, AttributeError):
            return [text[:60]], "xyxy", [""]
        found = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]
        return [one.get("bbox_2d", one.get("bbox")) for one in found], "xyxy", [one.get("label", "") for one in found]
    read = parse_text(text)
    if read.rejected and "box" in text:
        return read.rejected[:1], "xyxy-1000", [""]
    known = len(read.labels) or read.empty_answer
    return (1000 * read.boxes_xyxy_unit).tolist() if known else None, "xyxy-1000", read.labels


# --- XML: Pascal VOC and CVAT -----------------------------------------------------------------------------------------


def read_voc(file: Path, found: ElementTree.Element) -> Iterator[Found]:
    """Pascal VOC: an XML a picture, corners in pixels; of a polygon the box around it."""
    things = list(found.iter("object"))
    new = row(found.findtext("filename") or file.stem, [found.findtext(f"size/{side}") for side in ("width", "height")])
    yield Found(new, [_voc_box(thing) for thing in things], "xyxy-pixels",
                [thing.findtext("name") or "" for thing in things], stem=file.stem)


def _voc_box(thing: ElementTree.Element) -> Any:
    if thing.find("bndbox") is None and (polygon := thing.find("polygon")) is not None:
        points = [[one.text for one in polygon.iter() if re.fullmatch(rf"{axis}\d*", one.tag)] for axis in "xy"]
        return around(list(zip(*points, strict=False)))  # x1, y1, x2 …, or pt/x, pt/y
    return [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]


def read_cvat(file: Path, found: ElementTree.Element) -> Iterator[Found]:
    """CVAT for images 1.1: one XML, corners or points in pixels of the picture as shown."""
    if found.find("track") is not None:
        raise DataError(f"{file}: has tracks of a video; expected an export as CVAT for images, or COCO, with frames")
    for image in found.iter("image"):
        shapes = [shape for shape in image if shape.get("label")]
        split = split_name(image.get("subset") or "")
        yield Found(row(image.get("name") or "", (image.get("width"), image.get("height"))),
                    [_cvat_box(shape) for shape in shapes] or None, "xyxy-pixels",
                    [shape.get("label") for shape in shapes], split if split in ("train", "val", "test") else "")


def _cvat_box(shape: ElementTree.Element) -> Any:
    if points := shape.get("points"):
        return around(re.split("[;,]", points))
    box = [shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")]
    corners = numbers_of(box)
    if corners is None or not shape.get("rotation"):
        return box if shape.tag == "box" else f"a {shape.tag}"
    (x0, y0), (x1, y1) = corners[:2], corners[2:]
    half = np.array([[x0 - x1, y0 - y1], [x1 - x0, y0 - y1], [x0 - x1, y1 - y0], [x1 - x0, y1 - y0]]) / 2
    return around(_turned([(x0 + x1) / 2, (y0 + y1) / 2], half, shape.get("rotation")))


# --- YOLO -------------------------------------------------------------------------------------------------------------

_SIDES = ("images", "labels", "labeltxt", "jpegimages", "annotations")  # folders that labels and pictures differ by


def yolo_names(files: list[Path]) -> Path | None:
    """The file that names YOLO's classes: a YAML file with `names`, or a list of names."""
    yamls = [path for path in files if "names" in (read_yaml(path) or {})]
    lists = [path for path in files if path.suffix == ".names" or path.name in ("classes.txt", "_darknet.labels")]
    return min(yamls or lists, key=lambda path: len(path.parts), default=None)


def _key(path: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its label file have in common."""
    parts = path.relative_to(root).with_suffix("").parts
    return tuple(part for part in parts if part.lower() not in _SIDES)


def yolo_labels(pictures: Pictures) -> dict[Path, list[Path]]:
    """The label files, each with the pictures that lie where its own should; none where none has a box."""
    of_key, labels = defaultdict(list), {}
    for path in pictures.files:
        of_key[_key(path, pictures.root)].append(path)
    places = {path.parent for path in pictures.files}
    for label in (path for path in pictures.all if path.suffix.lower() == ".txt" and path.name != "classes.txt"):
        folders = {part.lower() for part in label.relative_to(pictures.root).parts[:-1]}
        own = of_key.get(_key(label, pictures.root), [])
        if own or folders & {"labels", "labeltxt"} or (label.parent in places and _has_box(label)):
            labels[label] = own
    return labels if any(map(_has_box, labels)) or yolo_names(pictures.all) else {}


def _has_box(label: Path) -> bool:
    """Whether the first line that is long enough has the numbers of a box."""
    words = next((words for line in _lines(label) if len(words := line.split()) > 4), [])
    return bool(words) and all(map(_is_number, words[1:5]))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _is_number(word: str) -> bool:
    return numbers_of([word, 0, 0, 0]) is not None


def read_yolo(pictures: Pictures, labels: dict[Path, list[Path]]) -> Iterator[Found]:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or a list of names.

    Also polygons and oriented boxes (the box around them), a confidence after the box, and DOTA's labelTxt in pixels.
    A picture without a label file, beside others with one, has no box. `labels`: of `yolo_labels`.
    """
    file, root = yolo_names(pictures.all), pictures.root
    config = read_yaml(file) or {} if file else {}
    names = _class_names(file, config) if file else None
    named = [str(own[0] if len(own) == 1 else Path(*_key(label, root))) for label, own in labels.items()]
    paths = pictures.find([Wanted(name, label, split_of(label.parent, root))
                           for name, label in zip(named, labels, strict=True)])  # fmt: skip
    places = {path.parent for path in paths}
    near = (path for path in pictures.files if path.parent in places or "images" in path.relative_to(root).parts)
    silent = sorted(set(near) - set(paths))
    known = len(silent) <= len(paths) and all(path.exists() for path in paths) and all(
        path.parent in places for path in silent)  # else not labelled yet, or the names were changed
    if silent and known:
        print(f"data: {len(silent)} pictures have no label file beside labelled ones, such as "
              f"{escaped(silent[0].name)}: read as pictures without a table")  # fmt: skip
    for path, label in sorted({**dict.fromkeys(silent), **dict(zip(paths, labels, strict=True))}.items()):
        boxes, classes, kind = _yolo_boxes(label, names, "kpt_shape" in config) if label else ([], [], "cxcywh-unit")
        yield Found(row(str(path)), boxes if label or known else None, kind, classes, file=label or root / "labels")


def _class_names(file: Path, config: dict[str, Any]) -> dict[int, str]:
    """{number: name} of the classes."""
    names: Any = config.get("names") if config else [line.strip() for line in read_text(file).splitlines()]
    names = names.split(",") if isinstance(names, str) else names
    try:
        named = enumerate(names) if isinstance(names, list) else names.items()
        return {int(number): str(name).strip() for number, name in named}
    except (AttributeError, ValueError, TypeError):
        raise DataError(f"{file}: names is {names!r}; expected a list of class names, or a map from number to name"
                        ) from None  # fmt: skip


def _yolo_boxes(file: Path, names: dict[int, str] | None, poses: bool) -> tuple[list[Any], list[str], str]:
    """The boxes of a label file, their classes, and their kind."""
    boxes: list[Any] = []
    classes, kind = [], "cxcywh-unit"
    for number, line in enumerate(_lines(file), 1):
        words = line.split()
        if not words or words[0].startswith(("imagesource:", "gsd:")):
            continue
        box: Any = f"line {number}: {line[:60]!r}; expected: class cx cy width height"
        name = ""
        if len(words) > 8 and not _is_number(words[8]):  # DOTA: four corners in pixels, the name, how difficult
            kind, name, box = "xyxy-pixels", words[8], around(words[:8])
        elif len(words) > 4 and all(map(_is_number, words)):
            name = names.get(int(float(words[0])), "") if names else f"class {words[0]}"
            if not name:
                box = f"line {number} is of class {words[0]}, which is not among {list((names or {}).values())}"
            elif len(words) < 7 or poses:
                box = words[1:5]
            elif len(words) % 2:
                box = around(words[1:])
        boxes.append(box)
        classes.append(name)
    return boxes, classes, kind


READERS: dict[str, tuple[str, Callable[..., Iterator[Found]]]] = {
    "COCO": ("*.json with images, annotations, categories", read_coco),
    "YOLO": ("*.txt with class cx cy width height, and a .yaml with names or classes.txt", read_yolo),
    "Pascal VOC": ("*.xml with <annotation>", read_voc),
    "metadata": ("metadata.jsonl, .json, .csv or .parquet of a Hugging Face imagefolder", read_metadata),
    "CVAT": ("*.xml of CVAT for images", read_cvat),
    "Label Studio": ("its JSON", read_labelstudio),
    "labelme": ("a .json a picture", read_labelme),
    "VIA": ("JSON of the VGG Image Annotator", read_via),
    "CreateML": ("*.json with image and annotations", read_createml),
    "CSV": ("a line a box with the picture, the class and corners", read_csv),
    "chat": (".json or .jsonl to fine-tune Qwen, LLaVA, ms-swift or Florence-2 on", read_chats),
}
