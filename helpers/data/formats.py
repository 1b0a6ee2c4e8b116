"""Annotation files -> rows of the schema.

A format is one small function from its files to annotated pictures (`Found`): the picture's name, its boxes as the file
has them, what kind of boxes they are, the names of their classes. Everything after that is done once, in `to_rows`: the
picture is found, unit, order and frame of the boxes are decided for the whole set (`frames`), and what cannot be read is
left out by name or refused. A broken annotation file stops the load with a `DataError`; a broken picture never does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import yaml

from helpers.boxes import CATEGORIES
from helpers.data.frames import ANY, Framed, around, left_out, numbers_of, to_unit
from helpers.data.pictures import TOOLS, Head, Pictures, Wanted, completed, escaped, files_below, head
from helpers.data.schema import DataError, meta_of, objects_of, read_text
from helpers.data.splits import Rows, split_name, split_of
from helpers.messages import parse_text


class Found(NamedTuple):
    """One annotated picture: its row without boxes, its split ("" where none is named), its boxes as written."""

    row: dict[str, Any]  # of `row`
    split: str
    boxes: list[Any] | None  # a tuple: corners, whatever the order of `kind`; None: listed, and nothing is said of it
    kind: str  # as `frames.to_unit` takes it
    names: list[Any]  # one a box; a number is a category_id
    file: Path
    stem: str = ""  # the file's own name where it belongs to this picture alone
    ids: list[int] | None = None  # category_id where the file gives it beside the name
    head: Head | None = None  # of a picture that is no file


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


def to_rows(found: Iterable[Found], root: Path | None, where: str, box_format: str | None = None,
            unlabelled: str | None = None) -> Rows:  # fmt: skip
    """{split: rows of the schema}; `box_format` and `unlabelled` are the parameters of `load_raw`.

    The pictures are files below `root`; where it is None, each `Found` has the head of its own.
    """
    found = list(found)
    found = _labelled(_with_pictures(found, root) if root else found, where, unlabelled)
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
        if one.ids is not None:
            one.row["objects"]["category_id"] = one.ids
        splits.setdefault(one.split, []).append(one.row)
    return splits


def _name(name: Any) -> str:
    return CATEGORIES[name] if type(name) is int and 0 <= name < len(CATEGORIES) else str(name)


def _with_pictures(found: list[Found], root: Path) -> list[Found]:
    """`found` with the path of each picture, what its head says, and its id."""
    wanted = [Wanted(one.row["image"]["path"], one.file, one.split, one.stem) for one in found]
    placed, ends = [], []
    for one, path in zip(found, Pictures(root).find(wanted), strict=True):
        whole = completed(path)
        ends += [path.name] if whole else []
        one.row["image"] = {"path": str(path), "bytes": whole}
        one.row["image_id"] = one.row["image_id"] or path.stem
        placed.append(one._replace(head=head(one.row["image"]), split=one.split or split_of(path.parent, root)))
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
    return next((str(box)[:120] for box in boxes if numbers_of(box) is None), "")


def _once(found: list[Found], boxes: dict[int, Any], where: str) -> list[int]:
    """The entries to take: of a picture that stands there several times with much the same boxes the first."""
    first: dict[tuple[str, str], int] = {}
    again, differ = 0, set()
    for number, one in enumerate(found):
        if boxes[number] is None:
            continue
        same = first.setdefault((one.split, one.row["image"]["path"] or str(number)), number)
        again += same != number
        if not _agree(boxes[same], boxes[number]):
            differ.add(same)
    left_out([f"{found[n].row['image_id']} ({found[n].file.name})" for n in differ], len(found), where,
             "are annotated twice with other boxes; remove one of the two")
    if again:
        print(f"data: {again} pictures are annotated twice, with the same boxes: the first counts")
    return [number for number in first.values() if number not in differ]


def _agree(some: list[list[float]], others: list[list[float]]) -> bool:
    """Whether two lists of boxes are much the same."""
    return len(some) == len(others) and bool(np.allclose(sorted(some), sorted(others), rtol=0, atol=0.05))


def same_rows(some: Rows, others: Rows) -> bool:
    """Whether two readings of a folder give the same pictures much the same boxes."""
    one, other = ({row["image"]["path"]: row["objects"]["bbox"] for rows in splits.values() for row in rows}
                  for splits in (some, others))  # fmt: skip
    return one.keys() == other.keys() and all(_agree(one[path], other[path]) for path in one)


# --- what a file is ---------------------------------------------------------------------------------------------------


def annotations(files: Iterable[Path]) -> tuple[dict[str, dict[Path, Any]], list[str]]:
    """{format: {file: what it holds}} of the annotation files among `files`, and what the others of their kind hold.

    `DataError` for one that is broken; what is no annotation at all is only listed.
    """
    known: dict[str, dict[Path, Any]] = {}
    others = []
    for file in files:
        read = _CONTENT.get(file.suffix.lower())
        if read is None:
            continue
        content, kind = read(file)
        if kind:
            known.setdefault(kind, {})[file] = content
        else:
            others.append(f"{file.name} ({content})")
    return known, others


def _json(file: Path) -> tuple[Any, str]:
    text = read_text(file)
    where = str(file)
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
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, dict):
        return f"a {type(found).__name__}", ""
    holds = f"has {sorted(first)[:8]}"
    if isinstance(found, list):
        kinds = [name for name, fits in _LISTS.items() if any(isinstance(one, dict) and fits(one) for one in found[:9])]
        return (found, kinds[0]) if kinds else (holds, "")
    kinds = [name for name, fits in _OBJECTS.items() if fits(found)]
    return (found, kinds[0]) if kinds else (holds, "")


_OBJECTS: dict[str, Callable[[dict], bool]] = {
    "COCO": lambda one: isinstance(one.get("images"), list) and isinstance(one.get("annotations"), list),
    "labelme": lambda one: isinstance(one.get("shapes"), list) and "imagePath" in one,
    "VIA": lambda one: "_via_img_metadata" in one or any(
        isinstance(part, dict) and "regions" in part for part in list(one.values())[:9]),
}
_LISTS: dict[str, Callable[[dict], bool]] = {
    "metadata": lambda one: "file_name" in one and ("objects" in one or "bbox" in one),
    "CreateML": lambda one: "image" in one and isinstance(one.get("annotations"), list),
    "Label Studio": lambda one: bool(_regions(one)) or isinstance(one.get("data"), dict) and "annotations" in one,
    "chat": lambda one: any(key in one for key in ("conversations", "messages", "suffix")) and _chat_image(one) != "",
}


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
    return (tree, kind) if kind else (f"<{tree.tag}>", "")


def _table(file: Path) -> tuple[Any, str]:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, sep=None, engine="python", encoding_errors="replace")
    except Exception as error:  # pandas and csv raise many kinds
        return f"no table ({type(error).__name__})", ""
    names = [str(name) for name in table.columns]
    if table.empty:
        return f"the columns {names[:8]} and no line", ""
    if len(names) == 6 and all(numbers_of([name]) is None and re.fullmatch(r"-?[\d.]+", name) for name in names[1:5]):
        table.loc[-1] = names  # keras-retinanet writes no header
        table = table.sort_index().set_axis(["path", "x1", "y1", "x2", "y2", "class"], axis=1)
    columns = {key: name for key, names in _COLUMNS.items() for name in table.columns
               if re.sub(r"[\W_]", "", str(name).lower()) in names}  # fmt: skip
    if "file_name" in table.columns and ("objects" in table.columns or "bbox" in table.columns):
        return [{key: _value(value) for key, value in line.items()} for line in table.to_dict("records")], "metadata"
    if "image" in columns and "regions" in columns:
        return table.rename(columns={name: key for key, name in columns.items()}), "VIA"
    if "image" in columns and ("box" in columns or any(all(c in columns for c in cs) for cs in _CORNERS.values())):
        return table.rename(columns={name: key for key, name in columns.items()}), "CSV"
    return f"has {names[:8]}", ""


_COLUMNS = {
    "image": "filename file image imageid imagename img path imagepath imagefile frame".split(),
    "name": "class classname label labelname category categoryname name".split(),
    "x0": "xmin x1 left".split(), "y0": "ymin y1 top".split(),
    "x1": "xmax x2 right".split(), "y1": "ymax y2 bottom".split(),
    "x": "x bboxx boxx".split(), "y": "y bboxy boxy".split(),
    "w": "w bboxwidth boxwidth bboxw".split(), "h": "h bboxheight boxheight bboxh".split(),
    "box": "bbox box boundingbox".split(), "width": "width imagewidth".split(), "height": "height imageheight".split(),
    "regions": ["regionshapeattributes"], "attributes": ["regionattributes"],
}  # fmt: skip
_CORNERS = {"xyxy": ("x0", "y0", "x1", "y1"), "xywh": ("x", "y", "w", "h")}


def _value(text: Any) -> Any:
    """JSON, or Python's way to write it, in a cell of a table; other text stays."""
    if not isinstance(text, str) or text[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)  # reads both
    except yaml.YAMLError:
        return text


_CONTENT: dict[str, Callable[[Path], tuple[Any, str]]] = {
    ".json": _json, ".jsonl": _json, ".ndjson": _json, ".xml": _xml, ".csv": _table
}  # fmt: skip


# --- metadata of an imagefolder ---------------------------------------------------------------------------------------

_BOX_FIELDS = ("bbox", "bboxes", "boxes", "box")
_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id", "classes",
                "class", "names", "name")  # fmt: skip


def _names_field(objects: dict[str, Any]) -> str | None:
    return next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)


def read_metadata(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """Hugging Face `imagefolder`: metadata.jsonl, .json, .csv or .parquet, one or one in each split's folder."""
    for file, lines in files.items():
        for number, line in enumerate(lines, 1):
            where = f"{file} line {number}"
            if not isinstance(line, dict):
                raise DataError(f"{where}: found a {type(line).__name__}; expected one object {{...}}")
            name, split = line.get("file_name"), split_of(file.parent, root)
            if not isinstance(name, str):
                raise DataError(f"{where}: file_name is {name!r}; expected a str")
            new = row(name, (line.get("width"), line.get("height")), line.get("image_id"), line.get("meta"))
            yield of_objects(Found(new, split, [], "", [], file), line.get("objects", line), where, "meta" in line)


def of_objects(found: Found, objects: Any, where: str, own: bool) -> Found:
    """`found` with the boxes of a column `objects`: lists of boxes and names, or a list of one dict a box.

    Only a row that also has `meta` (`own`) is surely one of this project's schema, whose boxes are yxyx.
    """
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):
        objects = {key: [one.get(key) for one in objects] for key in dict.fromkeys(k for one in objects for k in one)}
        objects = objects or {"bbox": [], "category": []}
    if not isinstance(objects, dict):
        raise DataError(f"{where}: objects is {str(objects)[:60]}; expected a dict")
    boxes = next((objects[key] for key in _BOX_FIELDS if isinstance(objects.get(key), list)), None)
    field = _names_field(objects)
    if boxes is None or (field is None and boxes):
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    ids = objects.get("category_id")
    given = field == "category_name" and isinstance(ids, list) and all(type(n) is int and abs(n) < 2**31 for n in ids)
    kind = "" if field != "category_name" else "yxyx-unit" if own else ANY
    return found._replace(boxes=boxes, names=objects[field] if field else [], kind=kind, ids=ids if given else None)


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """COCO JSON (`images`, `annotations`, `categories`): one file, or one a split; [x, y, width, height] in pixels."""
    for file, found in files.items():
        categories = found.get("categories") or []
        for kind, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
            for number, item in enumerate(found.get(kind) or []):
                if not isinstance(item, dict):
                    raise DataError(f"{file}: {kind}[{number}] is {str(item)[:40]!r}; expected an object {{...}}")
                for key in ids:
                    if not isinstance(item.get(key), (int, str)):
                        found_id = str(item.get(key))[:40]
                        raise DataError(f"{file}: {key} of {kind}[{number}] is {found_id!r}; expected a number")
        names = {str(category["id"]): str(category.get("name")) for category in categories}
        notes: dict[str, list[dict[str, Any]]] = {str(picture["id"]): [] for picture in found["images"]}
        for note in found["annotations"]:
            notes.setdefault(str(note["image_id"]), []).append(note)
        for picture in found["images"]:
            if not isinstance(picture.get("file_name"), str):
                raise DataError(f"{file}: image {picture['id']!r} has no file_name; expected the picture's path")
            own = notes.pop(str(picture["id"]), [])
            new = row(picture["file_name"], (picture.get("width"), picture.get("height")), None, picture)
            yield Found(new, split_of(file, root), [_coco_box(note) for note in own] or None, "xywh-pixels",
                        [names.get(n, f"class {n}") for n in (str(note["category_id"]) for note in own)], file)
        lost = [note.get("id") for others in notes.values() for note in others]
        if len(lost) * 2 > len(found["annotations"]):
            raise DataError(f"{file}: {len(lost)} annotations, such as {lost[0]}, have an image_id that no picture has; "
                            "expected an id of images")
        if lost:
            print(f"data: {file}: {len(lost)} annotations belong to no picture of images, such as {lost[0]}: not used")


def _coco_box(note: dict[str, Any]) -> Any:
    """The bbox of an annotation, else the box around its polygons or its mask."""
    mask = note.get("segmentation")
    if numbers_of(note.get("bbox")) is not None or not mask:
        return note.get("bbox")
    if isinstance(mask, list):
        return around([point for part in mask for point in (part if isinstance(part, list) else [part])])
    try:
        from pycocotools import mask as coco_mask

        height, width = mask["size"]
        packed = mask if isinstance(mask["counts"], str | bytes) else coco_mask.frPyObjects(mask, height, width)
        return coco_mask.toBbox(packed).tolist()
    except Exception:  # pycocotools raises many kinds
        return f"the mask {str(mask)[:60]}"


# --- labelme, VIA, CreateML, Label Studio, CSV: a list of shapes a picture --------------------------------------------


def read_labelme(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """labelme: a JSON a picture, points in pixels."""
    for file, found in files.items():
        shapes = [shape for shape in found["shapes"] if isinstance(shape, dict)]
        new = row(str(found["imagePath"]), (found.get("imageWidth"), found.get("imageHeight")))
        boxes = [_around_labelme(shape) for shape in shapes]
        yield Found(new, split_of(file.parent, root), boxes, "xyxy-pixels", [shape.get("label") for shape in shapes], file,
                    file.stem)


def _around_labelme(shape: dict[str, Any]) -> Any:
    if shape.get("shape_type") == "circle" and (box := around(shape.get("points"))) and not isinstance(box, str):
        (x, y), (x1, y1) = shape["points"]  # the centre, and a point of the circle
        radius = math.hypot(x1 - x, y1 - y)
        return (x - radius, y - radius, x + radius, y + radius)
    return around(shape.get("points"))


def read_via(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """VGG Image Annotator: JSON (a project or an export) or CSV, shapes in pixels."""
    for file, found in files.items():
        if isinstance(found, pd.DataFrame):
            entries = [{"filename": name, "regions": [
                {"shape_attributes": _value(line.regions), "region_attributes": _value(getattr(line, "attributes", ""))}
                for line in lines.itertuples() if line.regions not in ("", "{}")]} for name, lines in found.groupby("image")]
        else:
            entries = [one for one in found.get("_via_img_metadata", found).values() if isinstance(one, dict)]
        for entry in entries:
            regions = entry.get("regions") or []
            regions = list(regions.values()) if isinstance(regions, dict) else regions
            names = [next(iter(_texts(region.get("region_attributes"))), "") for region in regions]
            yield Found(row(str(entry.get("filename"))), split_of(file, root),
                        [_via_box(region.get("shape_attributes") or {}) for region in regions] or None, "xywh-pixels", names,
                        file)


def _texts(found: Any) -> list[str]:
    """The texts in the values of a dict, where a value may itself be {choice: True}."""
    values = found.values() if isinstance(found, dict) else [found]
    return [text for value in values for text in (list(value) if isinstance(value, dict) else [value]) if text]


def _via_box(shape: dict[str, Any]) -> Any:
    if "all_points_x" in shape:
        return around(list(zip_longest(shape["all_points_x"], shape.get("all_points_y") or [])))
    if "cx" in shape:
        rx, ry = (shape.get(key, shape.get("r")) for key in ("rx", "ry"))
        box = numbers_of([shape["cx"], shape.get("cy"), rx, ry])
        return tuple([box[0] - box[2], box[1] - box[3], box[0] + box[2], box[1] + box[3]]) if box else str(shape)
    return [shape.get(key) for key in ("x", "y", "width", "height")]


def read_createml(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """CreateML JSON: [centre x, centre y, width, height] in pixels."""
    for file, entries in files.items():
        for entry in entries:
            notes = [note for note in entry.get("annotations") or [] if isinstance(note, dict)]
            boxes = [[(note.get("coordinates") or {}).get(key) for key in ("x", "y", "width", "height")] for note in notes]
            yield Found(row(str(entry.get("image") or entry.get("imagefilename"))), split_of(file, root), boxes or None,
                        "cxcywh-pixels", [note.get("label") for note in notes], file)


def _regions(task: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The regions of a Label Studio task, in its full or its short JSON; None where nobody has annotated it."""
    done = [one for one in task.get("annotations") or task.get("completions") or [] if isinstance(one, dict)]
    done = [one for one in done if not one.get("was_cancelled")]
    if done:
        return [one for one in done[0].get("result") or [] if isinstance(one.get("value"), dict)
                and any(key.endswith("labels") for key in one["value"])]
    short = [value for value in task.values() if isinstance(value, list)]
    return next(([{"value": one} for one in value] for value in short if value and all(
        isinstance(one, dict) and any(key.endswith("labels") for key in one) for one in value)), None)


def read_labelstudio(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """Label Studio's own JSON: shapes in percent of the picture as shown."""
    for file, tasks in files.items():
        for task in tasks:
            named = [value for value in (task.get("data") or task).values() if isinstance(value, str) and "." in value]
            regions = _regions(task)
            values = [region["value"] for region in regions or []]
            names = [next((value[key][0] for key in value if key.endswith("labels") and value[key]), "") for value in values]
            size = next(((one.get("original_width"), one.get("original_height")) for one in regions or []), ())
            name = (named or [""])[0].split("?d=")[-1]  # local files are served as /data/local-files/?d=path
            yield Found(row(name, size), split_of(file, root), [_labelstudio_box(one, *size) for one in values]
                        if regions is not None else None, "xywh-percent", names, file)


def _labelstudio_box(value: dict[str, Any], width: Any = None, height: Any = None) -> Any:
    box = [value.get(key) for key in ("x", "y", "width", "height")]
    if "points" in value:
        return around(value["points"])
    if not value.get("rotation") or (numbers := numbers_of(box)) is None or not (width and height):
        return box if not value.get("rotation") else f"the rotated box {box}"
    x, y, w, h = numbers  # turned around its upper left corner, in pixels
    turn, aspect = math.radians(float(value["rotation"])), height / width
    return around([[x + dx * math.cos(turn) - dy * aspect * math.sin(turn),
                    y + dx / aspect * math.sin(turn) + dy * math.cos(turn)] for dx in (0, w) for dy in (0, h)])


def read_csv(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """A table with a line a box (TensorFlow, OpenImages, keras-retinanet and others): corners, or x, y, w, h."""
    for file, table in files.items():
        order = next((order for order, names in _CORNERS.items() if set(names) <= set(table.columns)), "")
        if "name" not in table.columns:
            raise DataError(f"{file} has the columns {list(table.columns)}; expected one named class or label too")
        for name, lines in table.groupby("image", sort=False):
            size = [lines[side].iloc[0] for side in ("width", "height") if side in lines.columns]
            boxes = lines[list(_CORNERS[order])].to_numpy().tolist() if order else [_value(box) for box in lines["box"]]
            boxes, names = [box for box in boxes if any(box)], lines["name"].tolist()
            yield Found(row(str(name), size), split_of(file, root), boxes or None, order, names[: len(boxes)], file)


# --- chats ------------------------------------------------------------------------------------------------------------

_LOC = re.compile(r"([^<>;]*)((?:<loc_?\d+>){4,})([^<>;]*)")


def _chat_image(item: dict[str, Any]) -> str:
    """The name of the picture of a chat."""
    parts = [part for turn in item.get("messages") or [] if isinstance(turn, dict) and isinstance(turn.get("content"), list)
             for part in turn["content"] if isinstance(part, dict)]  # fmt: skip
    for found in (item.get("image"), item.get("images"), *(part.get("image") for part in parts)):
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        found = found.get("path") if isinstance(found, dict) else found
        if isinstance(found, str):
            return found
    return ""


def read_chats(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """Lines to fine-tune a model on, as LLaVA, Qwen, ms-swift, Florence-2 and PaliGemma take them: boxes in the text."""
    for file, items in files.items():
        for number, item in enumerate(items, 1):
            name = _chat_image(item) if isinstance(item, dict) else ""
            if not name:
                raise DataError(f"{file}: entry {number} names no picture, or several; expected one each")
            new = Found(row(name), split_of(file, root), None, "", [], file)
            objects = item.get("objects")
            if isinstance(objects, dict) and isinstance(objects.get("bbox"), list):  # ms-swift
                names = objects.get("ref") or [""]
                names = names * len(objects["bbox"]) if len(names) == 1 else names
                kind = {"norm1": "xyxy-unit", "real": "xyxy-pixels"}.get(objects.get("bbox_type"), "xyxy")
                yield new._replace(boxes=objects["bbox"], names=names, kind=kind)
            else:
                yield _of_text(new, _completion(item))


def _completion(item: dict[str, Any]) -> str:
    """What the model shall write."""
    turns = item.get("conversations") or item.get("messages") or [{"role": "assistant", "content": item.get("suffix")}]
    texts = []
    for turn in (turn for turn in turns if isinstance(turn, dict)):
        said = turn.get("value", turn.get("content"))
        if turn.get("from", turn.get("role")) in ("gpt", "assistant", "model"):
            texts += [part.get("text", "") for part in said if isinstance(part, dict)] if isinstance(said, list) else [said]
    return "\n".join(str(text) for text in texts if text)


def _of_text(new: Found, text: str) -> Found:
    """`new` with the boxes that a text names: Qwen2-VL's form, `<loc>` tokens or JSON with bbox_2d."""
    if tokens := _LOC.findall(text):
        paligemma = "<loc_" not in text
        groups = [(before.strip() or after.strip(), re.findall(r"\d+", numbers)) for before, numbers, after in tokens]
        boxes = [(name, numbers[i : i + 4]) for name, numbers in groups for i in range(0, len(numbers), 4)]
        return new._replace(boxes=[box for _, box in boxes], names=[name for name, _ in boxes],
                            kind="yxyx-1024" if paligemma else "xyxy-1000")
    if "bbox" in text or text.strip() == "[]":
        start = min((at for at in map(text.find, "[{") if at >= 0), default=0)
        try:
            found = json.JSONDecoder().raw_decode(text[start:])[0]
        except json.JSONDecodeError:
            return new._replace(boxes=[text[:60]], names=[""], kind="xyxy")
        found = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict)]
        return new._replace(boxes=[one.get("bbox_2d", one.get("bbox")) for one in found], kind="xyxy",
                            names=[one.get("label", "") for one in found])
    read = parse_text(text)
    if read.rejected and "box" in text:
        return new._replace(boxes=read.rejected[:1], names=[""], kind="xyxy-1000")
    known = len(read.labels) or read.empty_answer
    return new._replace(boxes=[[1000 * n for n in box] for box in read.boxes_xyxy_unit.tolist()] if known else None,
                        names=read.labels, kind="xyxy-1000")


# --- XML: Pascal VOC and CVAT -----------------------------------------------------------------------------------------


def read_voc(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """Pascal VOC: an XML a picture, corners in pixels."""
    for file, found in files.items():
        size = found.findtext("size/width"), found.findtext("size/height")
        things = list(found.iter("object"))
        yield Found(row(found.findtext("filename") or file.stem, size), split_of(file.parent, root), [_voc_box(thing) for thing in things],
                    "xyxy-pixels", [thing.findtext("name") or "" for thing in things], file, file.stem)


def _voc_box(thing: ElementTree.Element) -> Any:
    if thing.find("bndbox") is not None:
        return [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    if (turned := thing.find("robndbox")) is not None:  # roLabelImg
        return _rotated([turned.findtext(key) for key in ("cx", "cy", "w", "h")], turned.findtext("angle"), 1)
    points = [(one.tag, one.text) for one in thing.find("polygon") or []]  # x1, y1, x2 … or pt/x, pt/y
    points = points if any(text and text.strip() for _, text in points) else [(p.tag, p.text) for p in thing.iter()]
    return around([[text for tag, text in points if tag[:1] == axis and tag[1:].isdigit() or tag == axis] for axis in "xy"]
                  and list(zip_longest(*[[text for tag, text in points if re.fullmatch(rf"{axis}\d*", tag)]
                                         for axis in "xy"])))


def _rotated(box: list[Any], angle: Any, unit: float) -> Any:
    """The box around [centre x, centre y, width, height] turned by `angle` (times `unit` radians)."""
    numbers, turn = numbers_of(box), numbers_of([angle, 0, 0, 0])
    if numbers is None or turn is None:
        return f"the rotated box {box}"
    x, y, w, h = numbers
    cos, sin = math.cos(turn[0] * unit), math.sin(turn[0] * unit)
    return around([[x + dx * cos - dy * sin, y + dx * sin + dy * cos] for dx in (-w / 2, w / 2) for dy in (-h / 2, h / 2)])


def read_cvat(root: Path, files: dict[Path, Any]) -> Iterator[Found]:
    """CVAT for images 1.1: one XML, corners or points in pixels of the picture as shown."""
    for file, found in files.items():
        if found.find("track") is not None:
            raise DataError(f"{file}: has tracks of a video; expected an export as CVAT for images, or COCO, with the frames")
        for image in found.iter("image"):
            shapes = [shape for shape in image if shape.get("label")]
            split = split_name(image.get("subset") or "")
            split = split if split in ("train", "val", "test") else split_of(file, root)
            yield Found(row(image.get("name") or "", (image.get("width"), image.get("height"))), split,
                        [_cvat_box(shape) for shape in shapes] or None, "xyxy-pixels",
                        [shape.get("label") for shape in shapes], file)


def _cvat_box(shape: ElementTree.Element) -> Any:
    if points := shape.get("points"):
        return around(re.split("[;,]", points))
    if shape.tag == "ellipse":
        box = numbers_of([shape.get(key) for key in ("cx", "cy", "rx", "ry")])
        return tuple([box[0] - box[2], box[1] - box[3], box[0] + box[2], box[1] + box[3]]) if box else "an ellipse"
    if shape.tag == "mask":
        box = numbers_of([shape.get(key) for key in ("left", "top", "width", "height")])
        return (box[0], box[1], box[0] + box[2], box[1] + box[3]) if box else "a mask"
    box = [shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")]
    corners = numbers_of(box)
    if corners is None or not shape.get("rotation"):
        return box
    x0, y0, x1, y1 = corners
    return _rotated([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], shape.get("rotation"), math.pi / 180)


# --- YOLO -------------------------------------------------------------------------------------------------------------

_NAME_FILES = ("classes.txt", "obj.names", "*.names", "_darknet.labels")
_SIDES = ("images", "labels", "labeltxt", "jpegimages", "annotations")  # folders that labels and pictures differ by


def yolo_names(root: Path) -> Path | None:
    """The file that names YOLO's classes: a YAML file with `names`, or a list of names."""
    configs = (path for pattern in ("*.yaml", "*.yml") for path in files_below(root, pattern))
    yamls = [path for path in configs if isinstance(config := _parse_yaml(path), dict) and "names" in config]
    lists = [path for pattern in _NAME_FILES for path in files_below(root, pattern)]
    return min(yamls, key=lambda path: len(path.parts), default=next(iter(lists), None))


def _parse_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        if "names:" not in read_text(path):
            return None
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}); expected names: [...]") from None


def _key(path: Path, root: Path) -> tuple[str, ...]:
    """What a picture and its label file have in common."""
    parts = path.relative_to(root).with_suffix("").parts
    return tuple(part for part in parts if part.lower() not in _SIDES)


def yolo_labels(root: Path, pictures: Pictures) -> dict[Path, list[Path]]:
    """The label files below `root`, each with the pictures that lie where its own should."""
    of_key: dict[tuple[str, ...], list[Path]] = {}
    for path in pictures.files:
        of_key.setdefault(_key(path, root), []).append(path)
    labels = {}
    for label in files_below(root, "*.txt"):
        within = label.relative_to(root).parts
        own = of_key.get(_key(label, root), [])
        in_labels = any(part.lower() in ("labels", "labeltxt") for part in within[:-1]) and label.name != "classes.txt"
        if (own or in_labels) and not set(TOOLS) & set(within):
            labels[label] = own
    return labels


def is_yolo(labels: Iterable[Path]) -> bool:
    """Whether the label files hold lines of numbers."""
    for label in labels:
        words = next((line.split() for line in _lines(label) if line.split()), [])
        if words:
            return len(words) >= 5 and all(re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) for word in words[1:5])
    return False


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def read_yolo(root: Path, files: dict[Path, list[Path]]) -> Iterator[Found]:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or a list of names.

    Also polygons and oriented boxes (the box around them), a confidence after the box, and DOTA's labelTxt in pixels.
    A picture without a label file, beside others with one, has no box. Class names index the lines.
    `files`: of `yolo_labels`.
    """
    file = yolo_names(root)
    config = _parse_yaml(file) if file and file.suffix in (".yaml", ".yml") else {}
    names = _yolo_names(file, config)
    pictures = Pictures(root)
    lost = [label for label, own in files.items() if not own]
    wanted = [Wanted(str(Path(*_key(label, root))), label, split_of(label.parent, root)) for label in lost]
    of_label = {label: own[0] for label, own in files.items() if own} | dict(zip(lost, pictures.find(wanted), strict=True))
    double = next((f"{label}: the picture is {own[0]} or {own[1]}" for label, own in files.items() if len(own) > 1), None)
    if double:
        raise DataError(f"{double}; expected one file of that name")
    labelled = set(of_label.values())
    places = {path.parent for path in labelled}
    silent = [path for path in pictures.files if path not in labelled and path.parent in places]
    negative = len(silent) <= len(labelled) and all(path.exists() for path in labelled)
    if silent and negative:
        print(f"data: {len(silent)} pictures have no label file beside labelled ones, such as {escaped(silent[0].name)}: "
              "read as pictures without a table")  # fmt: skip
    entries = {path: (label, _yolo_boxes(label, names, "kpt_shape" in config)) for label, path in of_label.items()}
    entries |= dict.fromkeys(silent, (file or root / "labels", ([] if negative else None, [], "cxcywh-unit")))
    for path, (label, (boxes, classes, kind)) in sorted(entries.items()):
        yield Found(row(str(path.relative_to(root))), split_of(path.parent, root), boxes, kind, classes, label)


def _yolo_names(file: Path | None, config: dict[str, Any]) -> dict[int, str] | None:
    """{number: name} of the classes; None where no file names them."""
    names = config.get("names") if config else [line.strip() for line in read_text(file).splitlines()] if file else None
    names = names.split(",") if isinstance(names, str) else names
    try:
        if names is not None:
            named = enumerate(names) if isinstance(names, list) else names.items()
            return {int(number): str(name).strip() for number, name in named}
    except (AttributeError, ValueError, TypeError):
        raise DataError(f"{file}: names is {names!r}; expected a list of class names, or a map from number to name") from None
    return None


def _yolo_boxes(file: Path, names: dict[int, str] | None, poses: bool) -> tuple[list[Any], list[str], str]:
    """The boxes of a label file, their classes, and their kind."""
    boxes: list[Any] = []
    classes, kind = [], "cxcywh-unit"
    for number, line in enumerate(_lines(file), 1):
        words = line.split()
        if not words or words[0].startswith(("imagesource:", "gsd:")):
            continue
        where = f"line {number}: {line[:60]!r}"
        try:
            if len(words) > 8 and not _is_number(words[8]):  # DOTA: four corners in pixels, the name, how difficult
                kind, name = "xyxy-pixels", words[8]
                boxes.append(around(list(map(float, words[:8]))))
            else:
                number_of_class, numbers = float(words[0]), list(map(float, words[1:]))
                name = names.get(int(number_of_class), "") if names else f"class {int(number_of_class)}"
                if not name or number_of_class != int(number_of_class):
                    boxes.append(f"{where} is of class {words[0]}, which has no name among {list((names or {}).values())}")
                elif len(numbers) in (4, 5) or poses:
                    boxes.append(numbers[:4])
                elif len(numbers) % 2 or len(numbers) < 6:
                    raise ValueError
                else:
                    boxes.append(around(numbers))
            classes.append(name)
        except ValueError:
            boxes.append(f"{where}; expected: class cx cy width height")
            classes.append("")
    return boxes, classes, kind


def _is_number(word: str) -> bool:
    return numbers_of([word, 0, 0, 0]) is not None


READERS: dict[str, tuple[str, Callable[[Path, dict[Path, Any]], Iterator[Found]]]] = {
    "COCO": ("*.json with images, annotations, categories", read_coco),
    "YOLO": (".txt files of class cx cy width height, and a .yaml with names or classes.txt", read_yolo),
    "Pascal VOC": ("*.xml with <annotation>", read_voc),
    "metadata": ("metadata.jsonl, .json, .csv or .parquet of a Hugging Face imagefolder", read_metadata),
    "CVAT": ("*.xml of CVAT for images", read_cvat),
    "Label Studio": ("its JSON", read_labelstudio),
    "labelme": ("a .json a picture", read_labelme),
    "VIA": ("JSON or CSV of the VGG Image Annotator", read_via),
    "CreateML": ("*.json with image and annotations", read_createml),
    "CSV": ("a line a box with the picture, the class and corners", read_csv),
    "chat": (".json or .jsonl to fine-tune Qwen, LLaVA, ms-swift, Florence-2 or PaliGemma on", read_chats),
}
