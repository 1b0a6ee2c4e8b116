"""Every fault of a data set found, named, and fixed or dropped by a rule that can be shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
from datasets import Image

from helpers.data.pictures import FACTS, Head, picture_facts, turned
from helpers.data.schema import DataError, categories_in, fingerprint, with_columns, workers

SMALLEST_SIDE = 1e-3  # of the picture: one step of the completion's 0-1000 grid
EDGE = 1e-6  # how far float32 rounding may carry a coordinate out of 0-1
MOST_ASPECT = 200  # what Qwen2-VL's processor refuses
SAME_PICTURE = 3.0  # root mean square difference of two 16 x 16 thumbnails, in 0-255 levels
BLOCK = 512  # thumbnails that are compared at once
Faults = list[tuple[str, str]]  # (a Rule's name, what was found)


class Rule(NamedTuple):
    """A kind of fault: its name, how it is recognised, what is done."""

    fault: str
    meaning: str
    action: str


RULES = (
    Rule("unreadable-picture", "the picture is missing or does not decode to its end", "row dropped"),
    Rule("too-thin-picture", f"one side over {MOST_ASPECT} times the other: the model takes none", "row dropped"),
    Rule("exif-as-shown", "EXIF turns the picture; width and height are those as shown", "kept, turned on reading"),
    Rule("exif-as-stored", "EXIF turns the picture; width and height are those as stored", "boxes turned with it"),
    Rule("exif-undecided", "EXIF turns the picture; width and height fit either way", "boxes taken as shown"),
    Rule("wrong-size", "width and height are not those of the picture", "replaced by the picture's"),
    Rule("not-a-box", "not four finite numbers", "box dropped"),
    Rule("inverted-box", "second corner before the first", "corners sorted"),
    Rule("out-of-range-box", "a coordinate outside 0-1", "clipped to the picture"),
    Rule("empty-box", f"a side under {SMALLEST_SIDE} of the picture, after clipping", "box dropped"),
    Rule("repeated-box", "the same box and category twice in a picture", "second dropped"),
    Rule("unknown-category", "the box has no class", "box dropped"),
    Rule("category-mismatch", "category_id and category_name disagree", "the name counts"),
    Rule("missing-id", "image_id is empty", "split and row number taken for it"),
    Rule("repeated-id", "an image_id for the second time", "'#2', '#3' … added to the id"),
    Rule("barcode-in-two-splits", "the same barcode in two splits", "row stays in val, then selection, then train"),
    Rule("picture-in-two-splits", "the same picture in two splits", "row stays in val, then selection, then train"),
    Rule("no-box-left", "its boxes cannot be read or lie outside: whether it shows a table is unknown", "row dropped"),
    Rule("no-table", "no box, or only empty ones", "kept: a picture without a table"),
)


class Fault(NamedTuple):
    """One finding: which rule, where, and what was found."""

    fault: str  # a Rule's name
    split: str
    index: int  # type: ignore[assignment]  # row number in the raw split; hides tuple's own `index`
    image_id: str
    found: str


@dataclass
class Audit:
    """What `audit` found. `keep` and `fixed` say how `clean` makes the cleaned splits of the raw ones."""

    faults: list[Fault] = field(default_factory=list)
    keep: dict[str, list[int]] = field(default_factory=dict)  # split -> row numbers that stay
    fixed: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # split -> row -> changed fields
    statistics: pd.DataFrame = field(default_factory=pd.DataFrame)  # one column a split, of the cleaned rows

    def table(self) -> pd.DataFrame:
        """One line a kind of fault that was found: fault, meaning, what is done, how many, which pictures."""
        lines = []
        for rule in RULES:
            found = [fault for fault in self.faults if fault.fault == rule.fault]
            if found:
                ids = list(dict.fromkeys(fault.image_id for fault in found))
                lines.append({**rule._asdict(), "count": len(found), "ids": ids})
        return pd.DataFrame(lines, columns=[*Rule._fields, "count", "ids"])

    def write(self, path: Path) -> None:
        """Every finding as a JSON line: fault, split, row number, image_id, what was found, what is done."""
        action = {rule.fault: rule.action for rule in RULES}
        lines = [json.dumps({**fault._asdict(), "action": action[fault.fault]}) + "\n" for fault in self.faults]
        path.write_text("".join(lines))


# --- one row ----------------------------------------------------------------------------------------------------------


def _check_size(row: dict[str, Any], facts: dict[str, Any]) -> tuple[Faults, tuple[int, int], int]:
    """Faults of width and height: ([(fault, found)], size as shown, the EXIF orientation by which boxes must turn)."""
    stored, orientation = tuple(facts["stored"]), facts["orientation"]
    shown, declared, faults = Head(stored, orientation).shown, (row["width"], row["height"]), []
    fault = "exif-as-shown" if declared == shown else "exif-as-stored" if declared == stored else "exif-undecided"
    if orientation > 1:
        fault = fault if shown != stored else "exif-undecided"
        faults.append((fault, f"orientation {orientation}, stored {stored[0]}x{stored[1]}, row says "
                              f"{declared[0]}x{declared[1]}"))
    if declared not in (shown, stored):
        faults.append(("wrong-size", f"row says {declared[0]}x{declared[1]}, the picture is {shown[0]}x{shown[1]}"))
    return faults, shown, orientation if fault == "exif-as-stored" else 1


def _check_box(box: list[float]) -> tuple[Faults, list[float] | None]:
    """Faults of one box [y0, x0, y1, x1] and the box that remains, or None."""
    found = str([round(value, 4) if isinstance(value, float) else value for value in box or []])
    if box is None or len(box) != 4 or not all(value is not None and math.isfinite(value) for value in box):
        return [("not-a-box", found)], None
    faults = []
    y0, x0, y1, x1 = box
    if y1 < y0 or x1 < x0:
        faults.append(("inverted-box", found))
        y0, x0, y1, x1 = min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)
    if min(y0, x0) < -EDGE or max(y1, x1) > 1 + EDGE:
        faults.append(("out-of-range-box", found))
    y0, x0, y1, x1 = (min(max(float(value), 0.0), 1.0) for value in (y0, x0, y1, x1))
    if min(y1 - y0, x1 - x0) < SMALLEST_SIDE:
        return [*faults, ("empty-box", found)], None
    return faults, [y0, x0, y1, x1]


def _check_objects(objects: dict[str, list], turn: int, categories: tuple[str, ...]) -> tuple[Faults, dict[str, list]]:
    """Faults of a row's boxes and categories, and the `objects` that remain; `turn` is an EXIF orientation or 1."""
    faults, kept = [], []
    boxes, ids, names = (objects.get(key) or [] for key in ("bbox", "category_id", "category_name"))
    if not len(boxes) == len(ids) == len(names):
        faults.append(("not-a-box", f"{len(boxes)} boxes, {len(ids)} category_id, {len(names)} category_name"))
    for box, number, name in zip(boxes, ids, names, strict=False):
        found, fixed = _check_box(box)
        faults += found
        if name not in categories:
            faults.append(("unknown-category", f"{name!r} (id {number})"))
            continue
        if number != categories.index(name):
            faults.append(("category-mismatch", f"id {number}, name {name!r}"))
        if fixed is not None:
            entry = (turned(fixed, turn), categories.index(name), name)
            faults += [("repeated-box", str(box))] if entry in kept else []
            kept += [] if entry in kept else [entry]
    if not kept:
        unknown = any(fault in ("not-a-box", "out-of-range-box", "unknown-category") for fault, _ in faults)
        faults.append(("no-box-left" if unknown else "no-table", f"{len(boxes)} boxes in the raw row"))
    columns = list(zip(*kept, strict=True)) or [(), (), ()]
    return faults, {key: list(col) for key, col in zip(("bbox", "category_id", "category_name"), columns, strict=True)}


def check_row(
    row: dict[str, Any], facts: dict[str, Any], categories: tuple[str, ...]
) -> tuple[Faults, dict[str, Any] | None]:
    """All faults of a row, and its fields as they should be; None where the row is to be dropped.

    `facts`: what `picture_facts` saw. `categories`: the names of the data set's classes, in the order of their ids.
    """
    if facts["error"] is not None:
        return [("unreadable-picture", facts["error"])], None
    if max(facts["stored"]) > MOST_ASPECT * min(facts["stored"]):
        return [("too-thin-picture", f"{facts['stored'][0]}x{facts['stored'][1]} px")], None
    faults, (width, height), turn = _check_size(row, facts)
    box_faults, objects = _check_objects(row["objects"] or {}, turn, categories)
    if any(fault == "no-box-left" for fault, _ in box_faults):
        return faults + box_faults, None
    return faults + box_faults, {"width": width, "height": height, "objects": objects}


# --- all rows ---------------------------------------------------------------------------------------------------------


def _picture_facts(split: datasets.Dataset, name: str) -> list[dict[str, Any]]:
    undecoded = split.select_columns("image").cast_column("image", Image(decode=False))
    facts = undecoded.map(
        picture_facts,
        input_columns="image",
        remove_columns="image",
        features=FACTS,
        new_fingerprint=fingerprint(undecoded, "facts"),
        num_proc=workers(len(split)),
        desc=f"Reading pictures ({name})",
    )
    return facts.to_list()


def _twins(thumbs: Any, others: Any) -> np.ndarray:
    """For each thumbnail [N, 768] the row of `others` [M, 768] that shows the same picture, or -1. int64 [N]."""
    if not len(thumbs) or not len(others):
        return np.full(len(thumbs), -1)
    thumbs, others, found = np.asarray(thumbs, np.float64), np.asarray(others, np.float64), []
    for some in np.split(thumbs, range(BLOCK, len(thumbs), BLOCK)):  # N x M distances at once would not fit
        squares = (some**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * some @ others.T
        distance = np.sqrt(np.maximum(squares.min(axis=1), 0) / some.shape[1])
        found.append(np.where(distance <= SAME_PICTURE, squares.argmin(axis=1), -1))
    return np.concatenate(found)


def _check_rows(
    result: Audit, name: str, rows: list[dict], facts: list[dict], categories: tuple[str, ...]
) -> dict[int, dict[str, Any]]:
    """{row number: row} of those rows of a split that can stay, as they should be; their faults go into `result`."""
    sound, copies, result.fixed[name] = {}, Counter(), {}
    for index, row in enumerate(rows):
        faults, after = check_row(row, facts[index], categories)
        image_id = row["image_id"] or f"{name}-{index}"
        if not row["image_id"]:
            faults.append(("missing-id", f"row {index}"))
        if after is not None:
            copies[image_id] += 1
            if copies[image_id] > 1:
                faults.append(("repeated-id", f"copy {copies[image_id]}"))
            after["image_id"] = f"{image_id}#{copies[image_id]}" if copies[image_id] > 1 else image_id
            result.fixed[name][index] = {key: value for key, value in after.items() if value != row[key]}
            sound[index] = row | after
        result.faults += [Fault(fault, name, index, image_id, found) for fault, found in faults]
    return sound


def _check_across(
    result: Audit, name: str, rows: dict[int, dict], facts: list[dict], seen: list[tuple[str, str, np.ndarray]]
) -> list[int]:
    """The numbers of those `rows` that show nothing of what is in `seen`: (barcode, place, thumbnail) of each picture
    of the earlier splits, to which they are added."""
    thumbs = [np.frombuffer(facts[index]["thumb"], np.uint8) for index in rows]
    twins = _twins(thumbs, [thumb for _, _, thumb in seen])
    barcodes = {barcode: place for barcode, place, _ in reversed(seen) if barcode}
    kept = {}
    for (index, row), thumb, twin in zip(rows.items(), thumbs, twins, strict=True):
        barcode, faults = (row["meta"] or {}).get("barcode") or "", []
        if barcode in barcodes:
            faults.append(("barcode-in-two-splits", f"{barcode}, also {barcodes[barcode]}"))
        if twin >= 0:
            faults.append(("picture-in-two-splits", f"also {seen[twin][1]}"))
        if not faults:
            kept[index] = (barcode, f"{row['image_id']} in {name}", thumb)
        result.faults += [Fault(fault, name, index, row["image_id"], found) for fault, found in faults]
    seen += kept.values()
    return list(kept)


def audit(raw: datasets.DatasetDict) -> Audit:
    """Look at every picture and box of `raw` (rows of the schema): what is wrong, and what `clean` will do about it.

    Pictures are decoded once; `datasets` caches what was found. Nothing is changed here.
    """
    result, seen, statistics = Audit(), [], {}
    categories = categories_in(raw.values())
    for name in sorted(raw, key=("val", "selection", "train").index):  # what val has, the others may not have
        rows, facts = raw[name].remove_columns("image").to_list(), _picture_facts(raw[name], name)
        sound = _check_rows(result, name, rows, facts, categories)
        result.keep[name] = _check_across(result, name, sound, facts, seen)
        statistics[name] = _statistics([sound[index] for index in result.keep[name]], categories)
    result.statistics = pd.DataFrame({name: statistics[name] for name in raw})
    return result


def _statistics(rows: list[dict[str, Any]], categories: tuple[str, ...]) -> pd.Series:
    """Counts and sizes of a split's rows."""
    counts = [len(row["objects"]["bbox"]) for row in rows]
    names = [name for row in rows for name in row["objects"]["category_name"]]
    boxes = np.array([box for row in rows for box in row["objects"]["bbox"]]).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)

    def spread(values: Any, digits: int = 0) -> str:
        if not len(values):
            return "-"
        return " / ".join(f"{value:.{digits}f}" for value in np.quantile(values, [0, 0.5, 1]))

    lines = {
        "pictures": len(rows),
        "barcodes": len({(row["meta"] or {}).get("barcode") for row in rows} - {"", None}),
        "pictures without a table": counts.count(0),
        **{f"pictures with {number} box{'es' * (number > 1)}": counts.count(number) for number in (1, 2)},
        "pictures with 3 or more boxes": sum(count > 2 for count in counts),
        **{name: names.count(name) for name in categories},
        "width, px: least / median / most": spread([row["width"] for row in rows]),
        "height, px: least / median / most": spread([row["height"] for row in rows]),
        "box area, share of the picture: least / median / most": spread(areas, 2),
    }
    return pd.Series(lines, dtype=object)


def clean(raw: datasets.DatasetDict, result: Audit) -> datasets.DatasetDict:
    """`raw` with the rows dropped and the fields fixed that `result` names; a split without faults is `raw`'s own.

    `DataError` where nothing is left of a split, but for `selection`, which may be one picture taken from train: it is
    then empty, and a line says so.
    """
    cleaned = {}
    for name, split in raw.items():
        keep, fixed = result.keep[name], result.fixed[name]
        if len(split) and not keep:
            dropping = {rule.fault for rule in RULES if rule.action.startswith("row")}
            first = next(fault for fault in result.faults if fault.split == name and fault.fault in dropping)
            none = (f"none of the {len(split)} pictures of {name} can be used, such as {first.image_id} "
                    f"({first.fault}: {first.found})")
            if name != "selection":
                raise DataError(f"{none}; expected at least one that passes the audit")
            print(f"data: {none}: selection is empty")
        if len(keep) < len(split):
            split = split.select(keep)
        fixes = [fixed.get(index, {}) for index in keep]
        if columns := sorted({column for fix in fixes for column in fix}):
            rows = split.select_columns(columns).to_list()
            split = with_columns(split, [row | fix for row, fix in zip(rows, fixes, strict=True)])
        cleaned[name] = split
    return datasets.DatasetDict(cleaned)
