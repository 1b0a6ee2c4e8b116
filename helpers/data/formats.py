"""Annotations on disk -> rows of the schema: metadata.jsonl of an imagefolder, COCO, YOLO txt, Pascal VOC XML.

A format is one small function from a folder to its annotated pictures (`Found`): where the picture is, its boxes as the
file has them, in which of `KINDS` they are written, the names of their classes. Everything after that is done once, in
`to_rows`. Boxes are converted as they stand: swapped, empty or outside, they stay so for the audit to name. A broken
annotation file stops the load at once with a `DataError`; a broken picture never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

from helpers.boxes import CATEGORIES
from helpers.data.pictures import NAN_BOX, Pictures, files_below, row
from helpers.data.schema import DataError, objects_of, read_text, safe_path
from helpers.data.splits import Rows, split_of

KINDS = {
    "yxyx unit": "[y_min, x_min, y_max, x_max] in 0-1",
    "xywh px": "COCO's [x, y, width, height] in pixels",
    "xyxy px": "[x_min, y_min, x_max, y_max] in pixels",
    "cxcywh unit": "[centre x, centre y, width, height] in 0-1",
}


class Found(NamedTuple):
    """One annotated picture: its row without boxes, its split ("" where none is named), its boxes as written."""

    row: dict[str, Any]
    split: str
    boxes: list[Any]
    kind: str  # of KINDS
    names: list[Any]  # one a box; a number is a category_id
    ids: list[int] | None = None  # category_id where the file gives it beside the name


def to_rows(found: Iterable[Found]) -> Rows:
    """{split: rows of the schema}."""
    splits: Rows = {}
    for one in found:
        names = [CATEGORIES[n] if type(n) is int and 0 <= n < len(CATEGORIES) else str(n) for n in one.names]
        boxes = [_yxyx_unit(box, one.kind, one.row["width"], one.row["height"]) for box in one.boxes]
        one.row["objects"] = objects_of(boxes, names)
        if one.ids is not None:
            one.row["objects"]["category_id"] = one.ids
        splits.setdefault(one.split, []).append(one.row)
    return splits


def _numbers(box: Any) -> list[float] | None:
    """Four numbers as a list of floats; None for anything else."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return None
    try:
        return [float(value) for value in box]
    except OverflowError:  # JSON's whole numbers have no end
        return None


def _yxyx_unit(box: Any, kind: str, width: int, height: int) -> list[float]:
    numbers = _numbers(box)
    if numbers is None or kind.endswith("px") and not (width and height):
        return NAN_BOX
    a, b, c, d = numbers
    if kind == "yxyx unit":
        return numbers
    if kind == "cxcywh unit":
        return [b - d / 2, a - c / 2, b + d / 2, a + c / 2]
    if kind == "xywh px":
        c, d = a + c, b + d
    return [b / height, a / width, d / height, c / width]


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object {{...}}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: found a {type(found).__name__}; expected one object {{...}}")
    return found


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------

_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id")


def read_metadata(root: Path) -> Iterator[Found]:
    """Hugging Face `imagefolder`: one metadata.jsonl, or one in each split's folder.

    `objects` is this project's (`bbox` [y0, x0, y1, x1] in 0-1) or the library's usual one (COCO's xywh in pixels).
    """
    pictures = Pictures(root)
    for file in files_below(root, "metadata.jsonl"):
        lines = enumerate(read_text(file).split("\n"), 1)
        found = [_metadata_line(pictures, file, line, f"{file} line {n}") for n, line in lines if line.strip()]
        kind = _box_kind(found, str(file))
        print(f"data: {file}: boxes read as {KINDS[kind]}")
        if any(type(name) is int for one in found for name in one.names):
            print(f"data: {file}: numbers of categories read as {dict(enumerate(CATEGORIES))}")
        yield from (one._replace(kind=kind) for one in found)


def _metadata_line(pictures: Pictures, file: Path, line: str, where: str) -> Found:
    found = _parse_json(line, where)
    for key, kind in (("file_name", str), ("objects", dict)):
        if not isinstance(found.get(key), kind):
            raise DataError(f"{where}: {key} is {found.get(key)!r}; expected a {kind.__name__}")
    objects = found["objects"]
    field = next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)
    if not isinstance(objects.get("bbox"), list) or field is None:
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    if not isinstance(found.get("meta") or {}, dict):
        raise DataError(f"{where}: meta is {found['meta']!r}; expected an object with barcode, off_image_id, image_url")
    path = pictures.find(found["file_name"], file.parent, split_of(file.parent, pictures.root), where)
    new = row(path, found.get("image_id"), found.get("meta"), (found.get("width"), found.get("height")))
    ids = objects.get("category_id")
    given = field == "category_name" and isinstance(ids, list) and all(type(n) is int and abs(n) < 2**31 for n in ids)
    split = split_of(path.parent, pictures.root)
    return Found(new, split, objects["bbox"], "", objects[field], ids if given else None)


def _box_kind(found: list[Found], where: str) -> str:
    """The kind of box of a metadata.jsonl by what most of its values can be; `DataError` where they fit neither."""
    boxes = [(box, one.row["width"], one.row["height"]) for one in found for box in one.boxes if _numbers(box)]
    if sum(max(box) <= 1.5 for box, _, _ in boxes) * 2 >= len(boxes):
        kind, fits = "yxyx unit", sum(box[2] >= box[0] and box[3] >= box[1] for box, _, _ in boxes)
    else:
        fits = sum(box[0] + box[2] <= 1.01 * w and box[1] + box[3] <= 1.01 * h for box, w, h in boxes)
        kind = "xywh px"
    if fits * 2 < len(boxes):
        raise DataError(f"{where}, objects.bbox: most boxes, such as {boxes[0][0]}, are neither {KINDS['yxyx unit']} "
                        f"nor {KINDS['xywh px']} inside the picture; expected one of these")
    return kind


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco_files(root: Path, sure: bool) -> list[Path]:
    """The JSON files of `root`; where `sure` only those with the lists of COCO, for other formats have JSON too."""
    keys = (b'"images"', b'"annotations"') if sure else ()
    return [file for file in files_below(root, "*.json") if all(key in file.read_bytes() for key in keys)]


def read_coco(root: Path, file: Path | None = None) -> Iterator[Found]:
    """COCO JSON (`images`, `annotations`, `categories`): one file, or one a split; pictures anywhere below `root`."""
    pictures, others, read = Pictures(root), [], False
    for path in [file] if file else coco_files(root, sure=False):
        found = _parse_json(read_text(path), str(path))
        found.setdefault("categories", [])  # the classes are then named by their ids
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(found.get(key), list)]
        if missing:
            others.append(f"{path} (has {sorted(found)[:8]}, lacks the lists {', '.join(missing)})")
        else:
            read = True
            yield from _coco_pictures(pictures, path, found)
    if not read:
        raise DataError(f"no COCO file in {root}: {'; '.join(others)}; expected images, annotations and categories")


def _coco_pictures(pictures: Pictures, file: Path, found: dict[str, Any]) -> Iterator[Found]:
    for kind, ids in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        for number, item in enumerate(found[kind]):
            if not isinstance(item, dict):
                raise DataError(f"{file}: {kind}[{number}] is {str(item)[:40]!r}; expected an object {{...}}")
            for key in ids:
                if not isinstance(item.get(key), (int, str)):
                    found_id = str(item.get(key))[:40]
                    raise DataError(f"{file}: {key} of {kind}[{number}] is {found_id!r}; expected a number")
    names = {category["id"]: str(category.get("name")) for category in found["categories"]}
    notes: dict[Any, list[dict[str, Any]]] = {picture["id"]: [] for picture in found["images"]}
    for note in found["annotations"]:
        if note["image_id"] not in notes:
            raise DataError(
                f"{file}: annotation {note.get('id')} has image_id {note['image_id']!r}; expected an id of images"
            )
        notes[note["image_id"]].append(note)
    split = split_of(file, pictures.root)
    for picture in found["images"]:
        if not isinstance(picture.get("file_name"), str):
            raise DataError(f"{file}: image {picture['id']!r} has no file_name; expected the picture's path")
        path = pictures.find(picture["file_name"], file.parent, split, str(file))
        new = row(path, None, picture, (picture.get("width"), picture.get("height")))
        own = notes[picture["id"]]
        yield Found(new, split, [note.get("bbox") for note in own], "xywh px",
                    [names.get(note["category_id"], f"id {note['category_id']}") for note in own])


# --- YOLO -------------------------------------------------------------------------------------------------------------


def yolo_files(root: Path) -> list[Path]:
    """The files that name YOLO's classes: a YAML file with `names`, or classes.txt."""
    found = {path: _parse_yaml(path) for path in sorted(root.glob("[!.]*.y*ml"))}
    yamls = [path for path, config in found.items() if isinstance(config, dict) and "names" in config]
    return yamls or list(files_below(root, "classes.txt"))


def _parse_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}); expected names: [...]") from None


def read_yolo(root: Path) -> Iterator[Found]:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or classes.txt.

    A picture without a label file has no box; a label file in labels/ without a picture is a row whose picture is
    missing. Class names index the lines.
    """
    file = yolo_files(root)[0]
    config = _parse_yaml(file) if file.suffix != ".txt" else {"names": read_text(file).split("\n")}
    names = config["names"]
    names = names.split(",") if isinstance(names, str) else names
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict):
        raise DataError(f"{file}: names is {names!r}; expected a list of class names, or a map from number to name")
    labels = {path: _label_file(path, root) for path in Pictures(root).files}
    for label in files_below(root, "*.txt"):
        parts = label.relative_to(root).parts
        if "labels" in parts[:-1] and label not in labels.values() and label.name != "classes.txt":
            parts = tuple("images" if part == "labels" else part for part in parts)
            labels[root.joinpath(*parts).with_suffix(".jpg")] = label
    for path, label in labels.items():
        within = path.relative_to(root)
        boxes, classes = _yolo_boxes(label)
        yield Found(row(safe_path(root, str(within), str(file))), split_of(path.parent, root), boxes, "cxcywh unit", [
                    str(names.get(kind, f"class {kind}")).strip() for kind in classes])


def _label_file(picture: Path, root: Path) -> Path:
    """labels/…/x.txt for images/…/x.jpg, else x.txt beside the picture."""
    parts = ["labels" if part == "images" else part for part in picture.relative_to(root).parts]
    label = root.joinpath(*parts).with_suffix(".txt")
    return label if label.exists() else picture.with_suffix(".txt")


def _yolo_boxes(file: Path) -> tuple[list[list[float]], list[int]]:
    boxes, classes = [], []
    for number, line in enumerate(read_text(file).splitlines() if file.exists() else (), 1):
        words = line.split()
        try:
            kind, (cx, cy, w, h) = int(words[0]), map(float, words[1:])
        except (ValueError, IndexError):
            raise DataError(f"{file} line {number}: {line[:60]!r}; expected: class cx cy width height") from None
        boxes.append([cx, cy, w, h])
        classes.append(kind)
    return boxes, classes


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def read_voc(root: Path) -> Iterator[Found]:
    """Pascal VOC: an XML a picture. Corners in pixels."""
    pictures = Pictures(root)
    for file in files_below(root, "*.xml"):
        try:
            found = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{file}: not valid XML ({error}); expected a Pascal VOC annotation") from None
        name = found.findtext("filename")
        if found.tag != "annotation" or not name:
            raise DataError(f"{file}: found <{found.tag}> without a filename; expected <annotation><filename>")
        split = split_of(file.parent, root)
        size = found.findtext("size/width"), found.findtext("size/height")
        things = list(found.iter("object"))
        yield Found(row(pictures.find(name, file.parent, split, str(file)), None, None, size), split,
                    [_voc_box(thing) for thing in things], "xyxy px",
                    [thing.findtext("name") or "" for thing in things])


def _voc_box(thing: ElementTree.Element) -> list[float] | None:
    try:
        return [float(thing.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return None
