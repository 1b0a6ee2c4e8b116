"""Local annotation formats -> rows of the schema: metadata.jsonl, COCO JSON, YOLO txt, Pascal VOC XML.

Each reader takes a folder and gives {split, or "" where none is named: [row]}. Boxes are converted as they stand:
swapped, empty or outside, they stay so for the audit to name. A broken annotation file stops the load at once with a
`DataError`; a broken picture never does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from helpers.boxes import CATEGORIES
from helpers.data.pictures import Pictures, row, split_of
from helpers.data.schema import DataError, objects_of, safe_path, split_name

Rows = dict[str, list[dict[str, Any]]]
NAN_BOX = [float("nan")] * 4  # stands for a box that cannot be read, until the audit names it
_NAME_FIELDS = ("category_name", "category_names", "categories", "category", "labels", "label", "category_id")


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object {{...}}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: found a {type(found).__name__}; expected one object {{...}}")
    return found


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)


def _xywh_px_to_yxyx_unit(box: Any, width: int, height: int) -> list[float]:
    if not _is_box(box) or not width or not height:
        return NAN_BOX
    x, y, w, h = box
    return [y / height, x / width, (y + h) / height, (x + w) / width]


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------


def bbox_style(rows: list[dict[str, Any]], where: str) -> str:
    """ "unit" ([y0, x0, y1, x1] in 0-1) or "coco" ([x0, y0, width, height] in pixels), by what most values can be.

    `DataError` where most boxes fit neither.
    """
    boxes = [(box, item["width"], item["height"]) for item in rows for box in item["objects"]["bbox"] if _is_box(box)]
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


def _metadata_row(pictures: Pictures, file: Path, found: dict[str, Any], where: str) -> dict[str, Any]:
    for key, kind in (("file_name", str), ("objects", dict)):
        if not isinstance(found.get(key), kind):
            raise DataError(f"{where}: {key} is {found.get(key)!r}; expected a {kind.__name__}")
    objects = found["objects"]
    field = next((key for key in _NAME_FIELDS if isinstance(objects.get(key), list)), None)
    if not isinstance(objects.get("bbox"), list) or field is None:
        raise DataError(f"{where}: objects has {sorted(objects)}; expected the lists bbox and category_name")
    path = pictures.find(found["file_name"], file.parent, "", where)
    new = row(path, found.get("image_id"), found.get("meta"), (found.get("width"), found.get("height")))
    names = [CATEGORIES[n] if isinstance(n, int) and 0 <= n < len(CATEGORIES) else str(n) for n in objects[field]]
    new["objects"] = objects_of(objects["bbox"], names)
    ids = objects.get("category_id")
    if field == "category_name" and isinstance(ids, list) and all(isinstance(number, int) for number in ids):
        new["objects"]["category_id"] = ids
    return new


def read_metadata(root: Path) -> Rows:
    """Hugging Face `imagefolder`: one metadata.jsonl, or one in each split's folder.

    `objects` is this project's (`bbox` [y0, x0, y1, x1] in 0-1) or the library's usual one (COCO's xywh in pixels).
    """
    pictures, splits = Pictures(root), {}
    for file in sorted(root.rglob("metadata.jsonl")):
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        places = [(f"{file} line {number}", line) for number, line in lines if line.strip()]
        rows = [_metadata_row(pictures, file, _parse_json(line, where), where) for where, line in places]
        style = bbox_style(rows, str(file))
        said = "[y_min, x_min, y_max, x_max] in 0-1" if style == "unit" else "COCO's [x, y, width, height] in pixels"
        print(f"data: {file}: boxes read as {said}")
        for item in rows:
            boxes = item["objects"]["bbox"]
            if style == "coco":
                boxes = [_xywh_px_to_yxyx_unit(box, item["width"], item["height"]) for box in boxes]
            item["objects"]["bbox"] = [box if _is_box(box) else NAN_BOX for box in boxes]
            splits.setdefault(split_of(Path(item["image"]["path"]).parent, root), []).append(item)
    return splits


# --- COCO -------------------------------------------------------------------------------------------------------------


def read_coco(root: Path, file: Path | None = None) -> Rows:
    """COCO JSON (`images`, `annotations`, `categories`): one file, or one a split; pictures anywhere below `root`."""
    pictures, splits, others = Pictures(root), {}, []
    for path in [file] if file else sorted(root.rglob("*.json")):
        found = _parse_json(path.read_text(encoding="utf-8"), str(path))
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(found.get(key), list)]
        if missing:
            others.append(f"{path} (has {sorted(found)[:8]}, lacks the lists {', '.join(missing)})")
        else:
            splits.setdefault(split_of(path, root), []).extend(_coco_rows(pictures, path, found))
    if not splits:
        raise DataError(f"no COCO file in {root}: {'; '.join(others)}; expected images, annotations and categories")
    return splits


def _coco_rows(pictures: Pictures, file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
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


# --- YOLO -------------------------------------------------------------------------------------------------------------


def yolo_files(root: Path) -> list[Path]:
    """The files that name YOLO's classes: a YAML file with `names`, or classes.txt."""
    yamls = [path for path in sorted(root.glob("*.y*ml")) if "names" in (_parse_yaml(path) or {})]
    return yamls or sorted(root.rglob("classes.txt"))


def _parse_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}); expected names: [...]") from None


def read_yolo(root: Path) -> Rows:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or classes.txt.

    A picture without a label file has no box. Class names index the lines; the split is that of data.yaml's `train`,
    `val`, `test` folders, else of the folder's own name.
    """
    file = yolo_files(root)[0]
    config = _parse_yaml(file) if file.suffix != ".txt" else {"names": file.read_text(encoding="utf-8").split("\n")}
    names = config["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    folders = {}
    for name in ("train", "val", "valid", "test"):
        for entry in [config[name]] if isinstance(config.get(name), str) else config.get(name) or []:
            parts = [part for part in Path(entry).parts if part not in (".", "..", "/")]
            folders[Path(*parts)] = split_name(name)
    splits: Rows = {}
    for path in Pictures(root).files:
        within = path.relative_to(root)
        split = next(
            (name for folder, name in folders.items() if within.is_relative_to(folder)), split_of(path.parent, root)
        )
        new = row(safe_path(root, str(within), str(file)))
        new["objects"] = objects_of(*_yolo_objects(_label_file(path, root), names))
        splits.setdefault(split, []).append(new)
    return splits


def _label_file(picture: Path, root: Path) -> Path:
    """labels/…/x.txt for images/…/x.jpg, else x.txt beside the picture."""
    parts = ["labels" if part == "images" else part for part in picture.relative_to(root).parts]
    label = root.joinpath(*parts).with_suffix(".txt")
    return label if label.exists() else picture.with_suffix(".txt")


def _yolo_objects(file: Path, names: dict[int, str]) -> tuple[list[list[float]], list[str]]:
    boxes, found = [], []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        words = line.split()
        try:
            kind, (cx, cy, w, h) = int(words[0]), map(float, words[1:])
        except (ValueError, IndexError):
            raise DataError(f"{file} line {number}: {line[:60]!r}; expected: class cx cy width height") from None
        boxes.append([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2])
        found.append(str(names.get(kind, f"class {kind}")).strip())
    return boxes, found


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def read_voc(root: Path) -> Rows:
    """Pascal VOC: an XML a picture; splits by folder or by ImageSets/Main/{train,val}.txt. Corners in pixels."""
    listed = {}
    for file in sorted(root.rglob("ImageSets/Main/*.txt")):
        if split_name(file.stem) not in ("train", "val", "test"):
            continue  # trainval.txt and lists by class
        listed |= {line.split()[0]: split_name(file.stem) for line in file.read_text().splitlines() if line.strip()}
    pictures, splits = Pictures(root), {}
    for file in sorted(root.rglob("*.xml")):
        try:
            found = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{file}: not valid XML ({error}); expected a Pascal VOC annotation") from None
        name = found.findtext("filename")
        if found.tag != "annotation" or not name:
            raise DataError(f"{file}: found <{found.tag}> without a filename; expected <annotation><filename>")
        split = listed.get(file.stem, split_of(file, root))
        size = found.findtext("size/width"), found.findtext("size/height")
        new = row(pictures.find(name, file.parent, split, str(file)), None, None, size)
        new["objects"] = objects_of(
            [_voc_box(thing, new["width"], new["height"]) for thing in found.iter("object")],
            [thing.findtext("name") or "" for thing in found.iter("object")],
        )
        splits.setdefault(split, []).append(new)
    return splits


def _voc_box(thing: ElementTree.Element, width: int, height: int) -> list[float]:
    try:
        x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
        return [y0 / height, x0 / width, y1 / height, x1 / width]
    except (ValueError, ZeroDivisionError):
        return NAN_BOX
