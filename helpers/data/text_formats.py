"""Annotations in one file a picture -> rows of the schema: YOLO txt, Pascal VOC XML (contract: json_formats.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from helpers.data.pictures import NAN_BOX, Pictures, Rows, files_below, row, split_of
from helpers.data.schema import DataError, objects_of, read_text, safe_path, split_name

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


def read_yolo(root: Path) -> Rows:
    """YOLO: images/ and labels/ (or .txt beside the picture), `class cx cy w h` in 0-1; data.yaml or classes.txt.

    A picture without a label file has no box; a label file in labels/ without a picture is a row whose picture is
    missing. Class names index the lines; the split is that of data.yaml's `train`, `val`, `test` folders, else of the
    folder's own name.
    """
    file = yolo_files(root)[0]
    config = _parse_yaml(file) if file.suffix != ".txt" else {"names": read_text(file).split("\n")}
    names = config["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict):
        raise DataError(f"{file}: names is {names!r}; expected a list of class names, or a map from number to name")
    folders, splits = _yolo_folders(file, config), {}
    labels = {path: _label_file(path, root) for path in Pictures(root).files}
    for label in files_below(root, "*.txt"):
        parts = label.relative_to(root).parts
        if "labels" in parts[:-1] and label not in labels.values() and label.name != "classes.txt":
            parts = tuple("images" if part == "labels" else part for part in parts)
            labels[root.joinpath(*parts).with_suffix(".jpg")] = label
    for path, label in labels.items():
        within = path.relative_to(root)
        split = next(
            (name for folder, name in folders.items() if within.is_relative_to(folder)), split_of(path.parent, root)
        )
        new = row(safe_path(root, str(within), str(file)))
        new["objects"] = objects_of(*_yolo_objects(label, names))
        splits.setdefault(split, []).append(new)
    return splits


def _yolo_folders(file: Path, config: dict[str, Any]) -> dict[Path, str]:
    """The folders, or pictures of .txt lists, that a data.yaml names for its splits: path below the root -> split."""
    folders = {}
    for name in ("train", "val", "valid", "test"):
        entries = config.get(name) or []
        for entry in [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else [None]:
            if not isinstance(entry, str):
                raise DataError(f"{file}: {name} is {str(entries)[:60]!r}; expected a folder, or a list of folders")
            listed = safe_path(file.parent, str(_below(entry, file.parent)), str(file))
            lines = read_text(listed).split("\n") if listed.suffix == ".txt" else [entry]
            folders |= {_below(line.strip(), file.parent): split_name(name) for line in lines if line.strip()}
    return folders


def _below(entry: str, root: Path) -> Path:
    """A path of a data.yaml as one below `root`: "../train/images" is often written for "train/images"."""
    path = Path(entry)
    path = path.relative_to(root) if path.is_relative_to(root) else path
    return Path(*(part for part in path.parts if part not in (".", "..", "/")))


def _label_file(picture: Path, root: Path) -> Path:
    """labels/…/x.txt for images/…/x.jpg, else x.txt beside the picture."""
    parts = ["labels" if part == "images" else part for part in picture.relative_to(root).parts]
    label = root.joinpath(*parts).with_suffix(".txt")
    return label if label.exists() else picture.with_suffix(".txt")


def _yolo_objects(file: Path, names: dict[int, str]) -> tuple[list[list[float]], list[str]]:
    boxes, found = [], []
    for number, line in enumerate(read_text(file).splitlines() if file.exists() else (), 1):
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
    for file in files_below(root, "ImageSets/Main/*.txt"):
        if split_name(file.stem) not in ("train", "val", "test"):
            continue  # trainval.txt and lists by class
        listed |= {line.split()[0]: split_name(file.stem) for line in read_text(file).splitlines() if line.strip()}
    pictures, splits = Pictures(root), {}
    for file in files_below(root, "*.xml"):
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
