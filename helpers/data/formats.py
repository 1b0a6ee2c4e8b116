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
from helpers.data.schema import DataError, read_text, read_yaml, refusing
from helpers.data.splits import split_name, split_of
from helpers.messages import parse_text

# --- from what a file says to boxes in 0-1 ----------------------------------------------------------------------------


def read(kind: str, pictures: Pictures, files: dict[Path, Any], **options: Any) -> list[Found]:
    """The annotated pictures of `files`, which `annotated` gave for this key of `FORMATS`, with boxes as `settled`."""
    found: list[Found] = []
    for file, content in files.items():
        before = len(found)
        try:
            for one in FORMATS[kind].read(file, content):
                one.file, one.split = file, one.split or split_of(file.parent if one.alone else file, pictures.root)
                found.append(one)
        except Exception as error:  # what a broken entry raises depends on where it is broken
            raise DataError(f"{file}: entry {len(found) - before + 1} cannot be read ({type(error).__name__}: "
                            f"{' '.join(str(error).split())}); expected {kind}: {FORMATS[kind].mark}") from error
    for one, path in zip(found, pictures.find(found), strict=True):
        one.path = path
    found = with_silent(found, pictures) if kind == "YOLO" else found
    ends = []
    for one in found:
        one.image_id, one.content = one.image_id or one.path.stem, completed(one.path)
        ends += [one.path.name] if one.content else []
        if str(one.path) != escaped(str(one.path)) and one.path.is_file():
            one.content = one.content or one.path.read_bytes()
        one.head = head({"path": one.path, "bytes": one.content})
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
    bad = {one: [box for box in one.boxes or [] if numbers_of(box) is None] for one in found}
    for one in found:
        if len(one.boxes or []) != len(one.names):
            bad[one] = [f"{len(one.boxes or [])} boxes and {len(one.names)} names of classes"]
    left_out([f"{one.image_id} ({one.file.name}: {str(boxes[0])[:120] or 'an empty text'})"
              for one, boxes in bad.items() if boxes], len(found), where, "have boxes that cannot be read")
    found = [one for one in found if not bad[one]]
    for kind in dict.fromkeys(one.kind for one in found):
        own = [one for one in found if one.kind == kind]
        for one, boxes in zip(own, to_unit(own, kind, box_format, where), strict=True):
            one.boxes = boxes
    return _once([one for one in found if one.boxes is not None], where)


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

SIGNS = ('"bbox', '"objects"', '"annotations"', '"shapes"', '"regions"', "<annotation")  # of annotations


def annotated(files: Iterable[Path]) -> tuple[dict[str, dict[Path, Any]], list[str]]:
    """{key of `FORMATS`: {file: what it holds}} of the annotation files among `files`, and what the others hold.

    `DataError` for one that is broken; what is no annotation at all is only listed.
    """
    parsers: dict[str, Callable[[Path], Any]] = {
        ".json": _json, ".jsonl": _json, ".ndjson": _json, ".xml": _xml, ".csv": _table, ".parquet": _parquet}
    known: dict[str, dict[Path, Any]] = {}
    others = []
    for file in (file for file in files if file.suffix.lower() in parsers):
        try:
            held = parsers[file.suffix.lower()](file)
            first = [one for one in held[:9] if isinstance(one, dict)] if isinstance(held, list) else [held]
            name = next((name for name, one in FORMATS.items()
                         if isinstance(held, one.holds) and any(map(one.fits, first))), "")  # fmt: skip
        except Exception as error:  # each reader has its own kinds
            if file.suffix.lower() == ".parquet" or any(sign.encode() in file.read_bytes() for sign in SIGNS):
                raise DataError(f"{file}: not whole or not valid ({error}); expected an annotation file") from error
            others.append(f"{file.name} ({error})")
            continue
        if name:
            known.setdefault(name, {})[file] = held
        else:
            said = [one.tag if isinstance(one, ElementTree.Element) else f"has {list(one)[:8]}"
                    for one in first if isinstance(one, dict | ElementTree.Element | pd.DataFrame)]
            others.append(f"{file.name} ({said[0] if said else f'a {type(held).__name__}'})")
    return known, others


def _json(file: Path) -> Any:
    """What a JSON file holds, or the list of what each line of one with lines holds."""
    text = read_text(file)
    if file.suffix.lower() == ".json":
        return json.loads(text)
    lines = [line for line in text.split("\n") if line.strip()]
    return json.loads("[" + ",\n".join(lines) + "]")  # at once, so that an error says which line


def _xml(file: Path) -> Any:
    found = file.read_bytes()
    try:
        return ElementTree.fromstring(found)
    except ElementTree.ParseError:
        if found.isascii() or b"encoding=" in found[:100]:
            raise
        return ElementTree.fromstring(found.decode("gb18030", "replace"))  # written on a Chinese Windows


def _table(file: Path) -> Any:
    """A table of text; a list of its lines where it is the metadata of an imagefolder."""
    table = pd.read_csv(file, dtype=str, keep_default_na=False, sep=None, engine="python")
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
    schema = pyarrow.parquet.read_schema(file)
    return pyarrow.parquet.read_table(file).to_pylist() if "file_name" in schema.names else schema


# --- metadata of an imagefolder, and tables ---------------------------------------------------------------------------

_BOX_FIELDS = ("bbox", "bboxes", "boxes", "box")
_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id",
                "classes", "class", "names", "name")  # fmt: skip


def read_metadata(file: Path, lines: list[Any]) -> Iterator[Found]:
    """Hugging Face `imagefolder`: metadata.jsonl, .json, .csv or .parquet, one or one in each split's folder."""
    return (of_columns(line["file_name"], line) for line in lines)


def of_columns(name: str, line: dict[str, Any]) -> Found:
    """A row with a column `objects`, or its fields: lists of boxes and names, or a list of one dict a box.

    Only a row that also has `meta` is surely one of this project's schema, whose boxes are yxyx.
    """
    objects = line.get("objects", line)
    if isinstance(objects, list):
        keys = dict.fromkeys(key for one in objects for key in one.keys()) or ("bbox", "category")
        objects = {key: [one.get(key) for one in objects] for key in keys}
    boxes = next((objects[key] for key in _BOX_FIELDS if isinstance(objects.get(key), list)), None)
    field = next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)
    if boxes is None or field is None:
        raise ValueError(f"objects has {sorted(objects)}; expected the lists bbox and category_name")
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
    def number(item: dict[str, Any], key: str) -> str:
        if not isinstance(item[key], int | str):
            raise TypeError(f"{key} is {item[key]!r}")
        return str(item[key])

    names = {number(category, "id"): str(category["name"]) for category in found.get("categories") or []}
    notes = defaultdict(list)
    for note in found["annotations"]:
        notes[number(note, "image_id")].append(note)
    for picture in found["images"]:
        own = notes.pop(number(picture, "id"), [])
        classes = [number(note, "category_id") for note in own]
        yield Found(picture["file_name"], [_coco_box(note) for note in own] or None, "xywh-pixels",
                    [names.get(one, f"class {one}") for one in classes], _size(picture), meta=picture)
    lost = [note.get("id") for others in notes.values() for note in others]
    if len(lost) * 2 > len(found["annotations"]):
        raise ValueError(f"{len(lost)} annotations, such as {lost[0]}, have an image_id that no picture has")
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
    shapes = found["shapes"]
    boxes = ["a circle" if shape.get("shape_type") == "circle" else around(shape["points"]) for shape in shapes]
    yield Found(found["imagePath"], boxes, "xyxy-pixels", [shape["label"] for shape in shapes],
                _size(found, "imageWidth", "imageHeight"), alone=True)


def _via_entries(found: dict[str, Any]) -> list[dict[str, Any]]:
    entries = found.get("_via_img_metadata", found)
    return [one for one in entries.values() if isinstance(one, dict)]


def read_via(file: Path, found: dict[str, Any]) -> Iterator[Found]:
    """VGG Image Annotator: JSON of a project or an export, rectangles and polygons in pixels."""
    for entry in _via_entries(found):
        regions = entry.get("regions") or []
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        first = [next(iter(region["region_attributes"].values()), "") for region in regions]
        names = [next(iter(name), "") if isinstance(name, dict) else name for name in first]  # a checkbox is a dict
        shapes = [region["shape_attributes"] for region in regions]
        boxes = [around(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
                 if "all_points_x" in shape else _four(shape) for shape in shapes]
        yield Found(entry["filename"], boxes or None, "xywh-pixels", names)


def read_createml(file: Path, entries: list[Any]) -> Iterator[Found]:
    """CreateML JSON: [centre x, centre y, width, height] in pixels."""
    for entry in entries:
        notes = entry["annotations"]
        yield Found(entry["image"], [_four(note["coordinates"]) for note in notes] or None, "cxcywh-pixels",
                    [note["label"] for note in notes])


def read_labelstudio(file: Path, tasks: list[Any]) -> Iterator[Found]:
    """Label Studio's JSON: rectangles and polygons in percent of the picture as shown; the first annotation counts."""
    for task in tasks:
        name = next(value for value in task["data"].values() if isinstance(value, str) and "." in value)
        done = [one for one in task["annotations"] if not one.get("was_cancelled")]
        labelled = [(one, labels[0]) for one in (done[0]["result"] if done else [])
                    for key, labels in one.get("value", {}).items() if key.endswith("labels") and labels]
        size = _size(labelled[0][0], "original_width", "original_height") if labelled else ()
        boxes = [_labelstudio_box(one) for one, _ in labelled] if done else None
        yield Found(name.split("?d=")[-1], boxes, "xywh-percent",  # local files are served as /data/local-files/?d=path
                    [label for _, label in labelled], size)


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
    contents = [turn.get("content") for turn in item.get("messages") or []]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    for found in (item.get("image"), item.get("images"), *(part.get("image") for part in parts)):
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        found = found.get("path") if isinstance(found, dict) else found
        if isinstance(found, str):
            return found
    return ""


def read_chats(file: Path, items: list[Any]) -> Iterator[Found]:
    """Lines to fine-tune a model on, as LLaVA, Qwen, ms-swift and Florence-2 take them: boxes in the completion."""
    for item in items:
        name, objects = _chat_image(item), item.get("objects")
        if not name:
            raise ValueError("it names no picture, or several; expected one")
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
    for turn in turns:
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
                [thing.findtext("name") or "" for thing in things], size, alone=True)


def _voc_box(thing: ElementTree.Element) -> Any:
    if thing.find("bndbox") is None and (polygon := thing.find("polygon")) is not None:
        points = [[one.text for one in polygon.iter() if re.fullmatch(rf"{axis}\d*", one.tag)] for axis in "xy"]
        return around(list(zip(*points, strict=False)))  # x1, y1, x2 …, or pt/x, pt/y
    return [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]


def read_cvat(file: Path, found: ElementTree.Element) -> Iterator[Found]:
    """CVAT for images 1.1: one XML, corners or points in pixels of the picture as shown."""
    if found.find("track") is not None:
        raise ValueError("it has tracks of a video; export it as CVAT for images, or COCO, with frames")
    for image in found.iter("image"):
        shapes = [shape for shape in image if shape.get("label")]
        split = split_name(image.get("subset") or "")
        yield Found(image.attrib["name"], [_cvat_box(shape) for shape in shapes] or None, "xyxy-pixels",
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


def yolo_labels(pictures: Pictures) -> dict[Path, tuple]:
    """The label files, those beside a picture or where its own should lie; none where none has a box.

    Each with its picture's name, the names of the classes (None without a file of them), and whether it has poses.
    """
    of_key, labels, root = defaultdict(list), {}, pictures.root
    for path in pictures.files:
        of_key[_key(path, root)].append(path)
    places = {path.parent for path in pictures.files}
    names, poses = _class_names(pictures.all)
    for label in (path for path in pictures.all if path.suffix.lower() == ".txt" and path.name != "classes.txt"):
        folders = {part.lower() for part in label.relative_to(root).parts[:-1]}
        own = of_key.get(_key(label, root), [])
        if own or folders & {"labels", "labeltxt"} or (label.parent in places and _has_box(label)):
            labels[label] = str(own[0] if len(own) == 1 else Path(*_key(label, root))), names, poses
    return labels if names is not None or any(map(_has_box, labels)) else {}


def _key(path: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its label file have in common."""
    parts = path.relative_to(root).with_suffix("").parts
    return tuple(part for part in parts if part.lower() not in _SIDES)


def _class_names(files: list[Path]) -> tuple[dict[int, str] | None, bool]:
    """{number: name} of the classes by a YAML file with `names`, else by a list of names; whether there are poses."""
    configs = {path: config for path in files if "names" in (config := read_yaml(path))}
    lists = [path for path in files if path.suffix == ".names" or path.name in ("classes.txt", "_darknet.labels")]
    file = min(configs or lists, key=lambda path: len(path.parts), default=None)
    if file is None:
        return None, False
    config = configs.get(file) or {"names": read_text(file).splitlines()}
    names = config["names"].split(",") if isinstance(config["names"], str) else config["names"]
    with refusing(file, "names: a list of class names, or a map from number to name"):
        named = names.items() if isinstance(names, dict) else enumerate(names)
        names = {int(number): str(name).strip() for number, name in named}
    return names, "kpt_shape" in config


def _has_box(label: Path) -> bool:
    """Whether the first line that is long enough has the numbers of a box."""
    words = next((words for words in _lines(label) if len(words) > 4), ["", "no box"])
    return all(map(_is_number, words[1:5]))


def _lines(label: Path) -> list[list[str]]:
    return [line.split() for line in label.read_text(encoding="utf-8-sig", errors="replace").splitlines()]


def _is_number(word: str) -> bool:
    return numbers_of([word, 0, 0, 0]) is not None


def read_yolo(label: Path, known: tuple) -> Iterator[Found]:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or a list of names.

    Also polygons and oriented boxes (the box around them), a confidence after the box, and DOTA's labelTxt in pixels.
    """
    picture, names, poses = known
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
                box = f"line {number} is of class {words[0]}, which is not among {list(names.values())}"
            elif len(words) < 7 or poses:
                box = words[1:5]
            elif len(words) % 2:
                box = around(words[1:])
        boxes.append(box)
        classes.append(name)
    yield Found(picture, boxes, kind, classes, alone=True)


def with_silent(found: list[Found], pictures: Pictures) -> list[Found]:
    """What YOLO's labels say, and the pictures without a label file: beside others with one, these have no box."""
    labelled = {one.path for one in found}
    places = {path.parent for path in labelled}
    near = (path for path in pictures.files
            if path.parent in places or "images" in path.relative_to(pictures.root).parts)
    silent = sorted(set(near) - labelled)
    known = len(silent) <= len(found) and all(path.exists() for path in labelled) and all(
        path.parent in places for path in silent)  # else not labelled yet, or the names were changed
    if silent and known:
        print(f"data: {len(silent)} pictures have no label file beside labelled ones, such as "
              f"{escaped(silent[0].name)}: read as pictures without a table")  # fmt: skip
    found = found + [Found(str(path), [] if known else None, "cxcywh-unit", [], path=path) for path in silent]
    return sorted(found, key=lambda one: one.path)


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
    "Label Studio": Format("the JSON of Label Studio", list, lambda one:
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
