"""Annotation files -> rows of the schema.

A format is one small function from a file to annotated pictures (`Found`): the picture's name, its boxes as the file
has them, what kind of boxes they are, the names of their classes. Everything after that is done once, in `read`: the
picture is found, unit, order and frame of the boxes are decided for the whole set (`frames`), and what cannot be
read is left out by name or refused. A broken annotation file stops the load with a `DataError`, a broken picture never.
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
import pyarrow
import pyarrow.parquet
import yaml

from helpers.data.frames import ANY, around, left_out, numbers_of, to_unit
from helpers.data.matching import Found, Pictures
from helpers.data.pictures import completed, escaped, head
from helpers.data.schema import DataError, read_text, read_yaml
from helpers.data.splits import split_name, split_of
from helpers.messages import parse_text

# --- from what a file says to boxes in 0-1 ----------------------------------------------------------------------------


def read(kind: str, pictures: Pictures, files: dict[Path, Any], **options: Any) -> list[Found]:
    """The annotated pictures of `files`, which `annotated` gave for this key of `FORMATS`, with boxes as `settled`."""
    found: list[Found] = []
    if kind == "YOLO":
        found += read_yolo(pictures, files)
    for file, content in files.items() if kind != "YOLO" else ():
        for one in FORMATS[kind].read(file, content):
            one.file, one.split = file, one.split or split_of(file.parent if one.stem else file, pictures.root)
            found.append(one)
    ends = []
    for one, path in zip(found, pictures.find(found), strict=True):
        one.path, one.image_id, one.content = path, one.image_id or path.stem, completed(path)
        ends += [path.name] if one.content else []
        if str(path) != escaped(str(path)) and path.is_file():
            one.content = one.content or path.read_bytes()
        one.head = head({"path": path, "bytes": one.content})
    if ends:
        print(f"data: {len(ends)} JPEG files lack a little of their end, which stays grey, such as {escaped(ends[0])}")
    return settled(found, str(pictures.root), **options)


def settled(found: list[Found], where: str, box_format: str | None = None, unlabelled: str | None = None
            ) -> list[Found]:  # fmt: skip
    """`found`, each picture once, with boxes [y0, x0, y1, x1] in 0-1 of the picture as shown; without those whose boxes
    cannot be known. `box_format` and `unlabelled` are those of `load_raw`."""
    silent = [str(one.image_id) for one in found if one.boxes is None]
    if unlabelled is None:
        left_out(silent, len(found), where, "are listed without a box, which may mean no table or not labelled yet; "
                 "give unlabelled='negative' or 'skip'")
    found = [one for one in found if one.boxes is not None or unlabelled == "negative"]
    reasons = {one: why for one in found if (why := _unreadable(one))}
    left_out([f"{one.image_id} ({one.file.name}: {why})" for one, why in reasons.items()], len(found), where,
             "have boxes that cannot be read")
    found = [one for one in found if one not in reasons]
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        for one, boxes in zip(own, to_unit(own, kind, box_format, where), strict=True):
            one.boxes = boxes
    return _once([one for one in found if one.boxes is not None], where)


def _unreadable(one: Found) -> str:
    """Why the boxes of a picture cannot be read, or ""."""
    boxes = one.boxes or []
    if len(boxes) != len(one.names):
        return f"{len(boxes)} boxes and {len(one.names)} names of classes"
    return next((str(box)[:120] or "an empty text" for box in boxes if numbers_of(box) is None), "")


def _once(found: list[Found], where: str) -> list[Found]:
    """The entries to take: of a picture that stands there several times with much the same boxes the first."""
    kept: dict[tuple[str, Path], Found] = {}
    of_path: dict[Path, Found] = {}
    again, differ = 0, {}
    for one in sorted(found, key=lambda one: not one.split):  # a list of all beside those of the splits
        same = kept.get((one.split, one.path)) if one.split else of_path.get(one.path)
        if same is None:
            kept[one.split, one.path] = of_path[one.path] = one
            continue
        again += 1
        if not _agree(same, one) or {*map(str, same.names)} != {*map(str, one.names)}:
            differ[same] = f"{same.image_id} ({same.file.name})"
    left_out(list(differ.values()), len(found), where, "are annotated twice with other boxes or classes; remove one of "
             "the two")
    if again:
        print(f"data: {again} pictures are annotated twice, with the same boxes: the first counts")
    taken = {*kept.values()} - {*differ}
    return [one for one in found if one in taken]


def _agree(one: Found, other: Found) -> bool:
    """Whether the boxes of two entries are much the same."""
    some, others = sorted(one.boxes or []), sorted(other.boxes or [])
    return len(some) == len(others) and bool(np.allclose(some, others, rtol=0, atol=0.05))


def same_pictures(some: list[Found], others: list[Found]) -> bool:
    """Whether two readings of a folder give the same pictures much the same boxes."""
    one, other = ({found.path: found for found in reading} for reading in (some, others))
    return one.keys() == other.keys() and all(_agree(one[path], other[path]) for path in one)


# --- what a file holds ------------------------------------------------------------------------------------------------


def annotated(files: Iterable[Path]) -> tuple[dict[str, dict[Path, Any]], list[str]]:
    """{key of `FORMATS`: {file: what it holds}} of the annotation files among `files`, and what the others hold.

    `DataError` for one that is broken; what is no annotation at all is only listed.
    """
    parsers: dict[str, Callable[[Path], Any]] = {
        ".json": _json, ".jsonl": _json, ".ndjson": _json, ".xml": _xml, ".csv": _table, ".parquet": _parquet}
    known: dict[str, dict[Path, Any]] = {}
    others = []
    for file in files:
        if parse := parsers.get(file.suffix.lower()):
            held = parse(file)
            name = next((name for name, one in FORMATS.items()
                         if isinstance(held, one.holds) and any(map(one.fits, _first(held)))), "")  # fmt: skip
            if name:
                known.setdefault(name, {})[file] = held
            else:
                others.append(f"{file.name} ({_described(held)})")
    return known, others


def _described(held: Any) -> str:
    """In a few words what a file holds that is no annotation."""
    if isinstance(held, ElementTree.Element):
        return f"<{held.tag}>"
    if isinstance(held, pd.DataFrame):
        return f"{len(held)} lines with the columns {list(held)[:8]}"
    keys = next((list(one) for one in _first(held) if isinstance(one, dict)), None)
    return f"has {keys[:8]}" if keys else held if isinstance(held, Broken) else f"a {type(held).__name__}"


def _first(held: Any) -> list[Any]:
    """The first dicts of a list; anything else alone."""
    return [one for one in held[:9] if isinstance(one, dict)] if isinstance(held, list) else [held]


class Broken(str):
    """Why a file cannot be read that shows no sign of annotations."""


def _json(file: Path) -> Any:
    text, where = read_text(file), str(file)
    try:
        if file.suffix.lower() == ".json":
            return json.loads(text)
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{file} line {number}"
            found += [json.loads(line)] if line.strip() else []
        return found
    except (json.JSONDecodeError, RecursionError) as error:
        if any(word in text for word in ('"bbox', '"objects"', '"annotations"', '"shapes"', '"regions"')):
            raise DataError(f"{where}: not valid JSON ({error}); expected a whole file") from None
        return Broken("not valid JSON")


def _xml(file: Path) -> Any:
    found = file.read_bytes()
    try:
        try:
            return ElementTree.fromstring(found)
        except ElementTree.ParseError:
            if found.isascii() or b"encoding=" in found[:100]:
                raise
            return ElementTree.fromstring(found.decode("gb18030", "replace"))  # written on a Chinese Windows
    except ElementTree.ParseError as error:
        if b"<annotation" in found:
            raise DataError(f"{file}: not valid XML ({error}); expected a whole annotation file") from None
        return Broken("not valid XML")


def _table(file: Path) -> Any:
    """A table of text; a list of its lines where it is the metadata of an imagefolder."""
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, sep=None, engine="python")
    except Exception as error:  # pandas and csv raise many kinds
        return Broken(f"no table ({type(error).__name__})")
    if not table.empty and {"file_name", "objects"} <= set(table.columns):
        return [{key: _value(value) for key, value in line.items()} for line in table.to_dict("records")]
    return table


def _value(text: str) -> Any:
    """JSON, or Python's way to write it, in a cell of a table; other text stays."""
    try:
        return yaml.safe_load(text) if text[:1] in ("[", "{") else text  # YAML knows both
    except yaml.YAMLError:
        return text


def _parquet(file: Path) -> Any:
    """The schema of a table; a list of its lines where it is the metadata of an imagefolder."""
    try:
        schema = pyarrow.parquet.read_schema(file)
        return pyarrow.parquet.read_table(file).to_pylist() if "file_name" in schema.names else schema
    except Exception as error:
        raise DataError(f"{file}: not a whole Parquet file ({error}); expected one as the Hub serves it") from error


# --- metadata of an imagefolder, and tables ---------------------------------------------------------------------------

_BOX_FIELDS = ("bbox", "bboxes", "boxes", "box")
_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id",
                "classes", "class", "names", "name")  # fmt: skip


def read_metadata(file: Path, lines: list[Any]) -> Iterator[Found]:
    """Hugging Face `imagefolder`: metadata.jsonl, .json, .csv or .parquet, one or one in each split's folder."""
    for number, line in enumerate(lines, 1):
        where = f"{file} line {number}"
        if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
            raise DataError(f"{where}: found {str(line)[:60]}; expected an object {{...}} with file_name and objects")
        yield of_columns(line["file_name"], line, where)


def of_columns(name: str, line: dict[str, Any], where: str) -> Found:
    """A row with a column `objects`, or its fields: lists of boxes and names, or a list of one dict a box.

    Only a row that also has `meta` is surely one of this project's schema, whose boxes are yxyx.
    """
    objects = line.get("objects", line)
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):
        keys = dict.fromkeys(key for one in objects for key in one) or ("bbox", "category")
        objects = {key: [one.get(key) for one in objects] for key in keys}
    if not isinstance(objects, dict):
        raise DataError(f"{where}: objects is {str(objects)[:60]}; expected a dict")
    boxes = next((objects[key] for key in _BOX_FIELDS if isinstance(objects.get(key), list)), None)
    field = next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)
    if boxes is None or field is None:
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    kind = "" if field != "category_name" else "yxyx-unit" if "meta" in line else ANY
    return Found(name, boxes, kind, objects[field], _size(line), line.get("image_id"), line.get("meta"))


def _size(one: Any, width: str = "width", height: str = "height") -> tuple[Any, Any]:
    return one.get(width), one.get(height)


def _four(one: Any, *keys: str) -> list[Any]:
    """The four values of a box by their keys."""
    return [one.get(key) for key in keys or ("x", "y", "width", "height")]


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
    notes = defaultdict(list)
    for note in found["annotations"]:
        notes[str(note["image_id"])].append(note)
    for picture in found["images"]:
        if not isinstance(picture.get("file_name"), str):
            raise DataError(f"{file}: image {picture['id']!r} has no file_name; expected the picture's path")
        own = notes.pop(str(picture["id"]), [])
        classes = [str(note["category_id"]) for note in own]
        yield Found(picture["file_name"], [_coco_box(note) for note in own] or None, "xywh-pixels",
                    [names.get(number, f"class {number}") for number in classes], _size(picture), meta=picture)
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
    boxes = ["a circle" if shape.get("shape_type") == "circle" else around(shape.get("points")) for shape in shapes]
    yield Found(str(found["imagePath"]), boxes, "xyxy-pixels", [shape.get("label") for shape in shapes],
                _size(found, "imageWidth", "imageHeight"), stem=file.stem)


def _via_entries(found: dict[str, Any]) -> list[dict[str, Any]]:
    entries = found.get("_via_img_metadata", found)
    return [one for one in entries.values() if isinstance(one, dict)] if isinstance(entries, dict) else []


def read_via(file: Path, found: dict[str, Any]) -> Iterator[Found]:
    """VGG Image Annotator: JSON of a project or an export, rectangles and polygons in pixels."""
    for entry in _via_entries(found):
        regions = entry.get("regions") or []
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        named = [list((region.get("region_attributes") or {}).values()) for region in regions]
        names = [next(iter(first[0]), "") if first and isinstance(first[0], dict) else (first or [""])[0]
                 for first in named]  # a checkbox is {choice: true}
        boxes = [_via_box(region.get("shape_attributes") or {}) for region in regions]
        yield Found(str(entry.get("filename")), boxes or None, "xywh-pixels", names)


def _via_box(shape: dict[str, Any]) -> Any:
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys):
        return around(list(zip(xs, ys, strict=True)))
    return _four(shape)


def read_createml(file: Path, entries: list[Any]) -> Iterator[Found]:
    """CreateML JSON: [centre x, centre y, width, height] in pixels."""
    for entry in entries:
        notes = [note for note in entry.get("annotations") or [] if isinstance(note, dict)]
        boxes = [_four(note.get("coordinates") or {}) for note in notes]
        yield Found(str(entry.get("image")), boxes or None, "cxcywh-pixels", [note.get("label") for note in notes])


def read_labelstudio(file: Path, tasks: list[Any]) -> Iterator[Found]:
    """Label Studio's JSON: rectangles and polygons in percent of the picture as shown; the first annotation counts."""
    for task in tasks:
        texts = [value for value in task["data"].values() if isinstance(value, str) and "." in value]
        name = (texts or [""])[0].split("?d=")[-1]  # local files are served as /data/local-files/?d=path
        done = [one for one in task["annotations"] if isinstance(one, dict) and not one.get("was_cancelled")]
        regions = [one for one in (done[0].get("result") or [] if done else []) if isinstance(one.get("value"), dict)]
        labelled = [(one, labels[0]) for one in regions for key, labels in one["value"].items()
                    if key.endswith("labels") and labels]  # fmt: skip
        size = _size(labelled[0][0], "original_width", "original_height") if labelled else ()
        boxes = [_labelstudio_box(one) for one, _ in labelled] if done else None
        yield Found(name, boxes, "xywh-percent", [label for _, label in labelled], size)


def _labelstudio_box(region: dict[str, Any]) -> Any:
    value, size = region["value"], _size(region, "original_width", "original_height")
    if "points" in value:
        return around(value["points"])
    box = numbers_of(_four(value))
    if box is None or not value.get("rotation") or not all(size):
        return _four(value)
    x, y, width, height = np.array(box) * np.tile(size, 2) / 100  # turned around its upper left corner, in pixels
    return around(_turned((x, y, x + width, y + height), (x, y), value["rotation"]) / size * 100)


def _turned(box: Iterable[float], pivot: tuple[float, float], degrees: Any) -> np.ndarray:
    """The corners [4, 2] of a box (x0, y0, x1, y1) in pixels that is turned clockwise around `pivot`."""
    x0, y0, x1, y1 = box
    turn = math.radians(float(degrees))
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return pivot + (np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - pivot) @ matrix


_COLUMNS = {
    "image": "filename file image imageid imagename img path imagepath imagefile frame".split(),
    "name": "class classname label labelname category categoryname name".split(),
    "x0": "xmin x1 left".split(), "y0": "ymin y1 top".split(), "x1": "xmax x2 right".split(),
    "y1": "ymax y2 bottom".split(), "x": "x bboxx".split(), "y": "y bboxy".split(), "w": "w bboxwidth bboxw".split(),
    "h": "h bboxheight bboxh".split(), "width": "width imagewidth".split(), "height": "height imageheight".split(),
}  # fmt: skip
_CORNERS = {"xyxy": ["x0", "y0", "x1", "y1"], "xywh": ["x", "y", "w", "h"]}


def _boxed(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the names of `_COLUMNS`; empty where it has no picture, class or corners."""
    plain = {name: re.sub(r"[\W_]", "", str(name).lower()) for name in table.columns}
    table = table.rename(columns={name: key for name, same in plain.items() for key, known in _COLUMNS.items()
                                  if same in known})  # fmt: skip
    return table if any({"image", "name", *corners} <= set(table) for corners in _CORNERS.values()) else table[:0]


def read_csv(file: Path, table: pd.DataFrame) -> Iterator[Found]:
    """A table with a line a box (TensorFlow, OpenImages and others): corners, or x, y, width and height."""
    table = _boxed(table)
    order = next(order for order, corners in _CORNERS.items() if set(corners) <= set(table))
    for name, lines in table.groupby("image", sort=False):
        size = [lines[side].iloc[0] for side in ("width", "height") if side in lines]
        lines = lines[lines[_CORNERS[order]].ne("").any(axis=1)]
        boxes = lines[_CORNERS[order]].to_numpy().tolist()
        yield Found(str(name), boxes or None, order, lines["name"].tolist(), size)


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
            yield Found(name, objects["bbox"], kind, names * len(objects["bbox"]) if len(names) == 1 else names)
        else:
            yield Found(name, *_of_text(_completion(item)))


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
    size = [found.findtext(f"size/{side}") for side in ("width", "height")]
    yield Found(found.findtext("filename") or file.stem, [_voc_box(thing) for thing in things], "xyxy-pixels",
                [thing.findtext("name") or "" for thing in things], size, stem=file.stem)


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
        yield Found(image.get("name") or "", [_cvat_box(shape) for shape in shapes] or None, "xyxy-pixels",
                    [shape.get("label") for shape in shapes], _size(image),
                    split=split if split in ("train", "val", "test") else "")


def _cvat_box(shape: ElementTree.Element) -> Any:
    if points := shape.get("points"):
        return around(re.split("[;,]", points))
    box = _four(shape, "xtl", "ytl", "xbr", "ybr")
    corners = numbers_of(box)
    if corners is None or not shape.get("rotation"):
        return box if shape.tag == "box" else f"a {shape.tag}"
    x0, y0, x1, y1 = corners
    return around(_turned(corners, ((x0 + x1) / 2, (y0 + y1) / 2), shape.get("rotation")))


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
    words = next((words for words in _lines(label) if len(words) > 4), ["", "no box"])
    return all(map(_is_number, words[1:5]))


def _lines(label: Path) -> list[list[str]]:
    return [line.split() for line in label.read_text(encoding="utf-8-sig", errors="replace").splitlines()]


def _is_number(word: str) -> bool:
    return numbers_of([word, 0, 0, 0]) is not None


def read_yolo(pictures: Pictures, labels: dict[Path, list[Path]]) -> Iterator[Found]:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or a list of names.

    Also polygons and oriented boxes (the box around them), a confidence after the box, and DOTA's labelTxt in pixels.
    A picture without a label file, beside others with one, has no box. `labels`: of `yolo_labels`.
    """
    file, root = yolo_names(pictures.all), pictures.root
    config = (read_yaml(file) if file else None) or {}
    names = _class_names(file, config) if file else None
    found = []
    for label, own in labels.items():
        boxes, classes, kind = _yolo_boxes(label, names, "kpt_shape" in config)
        name = str(own[0] if len(own) == 1 else Path(*_key(label, root)))
        found.append(Found(name, boxes, kind, classes, split=split_of(label.parent, root), file=label))
    for one, path in zip(found, pictures.find(found), strict=True):
        one.name, one.path, one.split = str(path), path, ""  # the picture's place says it
    labelled = {one.path for one in found}
    places = {path.parent for path in labelled}
    near = (path for path in pictures.files if path.parent in places or "images" in path.relative_to(root).parts)
    silent = sorted(set(near) - labelled)
    known = len(silent) <= len(found) and all(path.exists() for path in labelled) and all(
        path.parent in places for path in silent)  # else not labelled yet, or the names were changed
    if silent and known:
        print(f"data: {len(silent)} pictures have no label file beside labelled ones, such as "
              f"{escaped(silent[0].name)}: read as pictures without a table")  # fmt: skip
    found += [Found(str(path), [] if known else None, "cxcywh-unit", [], file=root / "labels", path=path)
              for path in silent]  # fmt: skip
    yield from sorted(found, key=lambda one: one.path)


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


def _yolo_boxes(label: Path, names: dict[int, str] | None, poses: bool) -> tuple[list[Any], list[str], str]:
    """The boxes of a label file, their classes, and their kind."""
    boxes: list[Any] = []
    classes, kind = [], "cxcywh-unit"
    for number, words in enumerate(_lines(label), 1):
        if not words or words[0].startswith(("imagesource:", "gsd:")):
            continue
        name = ""
        box: Any = f"line {number}: {' '.join(words)[:60]!r}; expected: class cx cy width height"
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


class Format(NamedTuple):
    """How a format of annotations is recognised and read."""

    mark: str  # in words
    holds: Any = ()  # the type of what its file holds, see `annotated`; () for a format that is no single file
    fits: Callable[[Any], bool] = bool  # whether that, or one of the first entries of a list, is of this format
    read: Callable[..., Iterator[Found]] = read_yolo


FORMATS = {
    "Parquet": Format("*.parquet files with pictures, as the Hub serves them", pyarrow.Schema),
    "save_to_disk": Format("state.json or dataset_dict.json, written by datasets"),
    "COCO": Format("*.json with images, annotations, categories", dict, lambda one:
                   isinstance(one.get("images"), list) and isinstance(one.get("annotations"), list), read_coco),
    "YOLO": Format("*.txt with class cx cy width height, and a .yaml with names or classes.txt"),
    "Pascal VOC": Format("*.xml with <annotation>", ElementTree.Element, lambda one: one.tag == "annotation", read_voc),
    "metadata": Format("metadata.jsonl, .json, .csv or .parquet of a Hugging Face imagefolder", list, lambda one:
                       "file_name" in one and ("objects" in one or "bbox" in one), read_metadata),
    "CVAT": Format("*.xml of CVAT for images", ElementTree.Element, lambda one: one.tag == "annotations", read_cvat),
    "Label Studio": Format("its JSON", list, lambda one:
                           isinstance(one.get("data"), dict) and "annotations" in one, read_labelstudio),
    "labelme": Format("a .json a picture", dict, lambda one:
                      isinstance(one.get("shapes"), list) and "imagePath" in one, read_labelme),
    "VIA": Format("JSON of the VGG Image Annotator", dict, lambda one:
                  any("regions" in part for part in _via_entries(one)[:9]), read_via),
    "CreateML": Format("*.json with image and annotations", list, lambda one:
                       "image" in one and isinstance(one.get("annotations"), list), read_createml),
    "CSV": Format("a line a box with the picture, the class and corners", pd.DataFrame,
                  lambda one: not _boxed(one).empty, read_csv),
    "chat": Format(".json or .jsonl to fine-tune Qwen, LLaVA, ms-swift or Florence-2 on", list, lambda one:
                   any(key in one for key in ("conversations", "messages", "suffix")) and _chat_image(one) != "",
                   read_chats),
}  # fmt: skip
