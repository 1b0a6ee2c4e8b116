"""The rules of the audit, and what is wrong with one row: its picture's size, its boxes, its categories."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

SMALLEST_SIDE = 1e-3  # of the picture: one step of the answer's 0-1000 grid
EDGE = 1e-6  # how far float32 rounding may carry a coordinate out of 0-1
MOST_ASPECT = 200  # what Qwen2-VL's processor refuses
Found = list[tuple[str, str]]  # (a Rule's name, what was found)


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
    Rule("exif-undecided", "EXIF turns the picture; width and height do not tell", "boxes taken as shown"),
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
    Rule("no-box-left", "its boxes cannot be read or lie outside: nobody knows what it shows", "row dropped"),
    Rule("no-table", "no box, or empty ones alone", "kept: a picture without a table"),
)


def turned(box: Any, orientation: int) -> Any:
    """A corner box [y0, x0, y1, x1] in 0-1 of the picture as stored, in the picture as EXIF `orientation` 1-8 shows it.

    The four may be arrays of equal length.
    """
    y0, x0, y1, x1 = box
    if orientation in (5, 6, 7, 8):
        y0, x0, y1, x1 = x0, y0, x1, y1
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    return [y0, x0, y1, x1]


def _check_size(row: dict[str, Any], facts: dict[str, Any]) -> tuple[Found, tuple[int, int], bool]:
    """Faults of width and height: ([(fault, found)], size as shown, whether the boxes follow the stored picture)."""
    stored, orientation = tuple(facts["stored"]), facts["orientation"]
    shown = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    declared = (row["width"], row["height"])
    says = f"orientation {orientation}, stored {stored[0]}x{stored[1]}, row says {declared[0]}x{declared[1]}"
    faults = []
    if orientation in range(2, 9):
        if shown == stored or declared not in (shown, stored):
            faults.append(("exif-undecided", says))
        else:
            faults.append(("exif-as-shown" if declared == shown else "exif-as-stored", says))
    if declared not in (shown, stored):
        faults.append(("wrong-size", f"row says {declared[0]}x{declared[1]}, the picture is {shown[0]}x{shown[1]}"))
    return faults, shown, any(name == "exif-as-stored" for name, _ in faults)


def _check_box(box: list[float]) -> tuple[Found, list[float] | None]:
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


def _check_objects(objects: dict[str, list], turn: int, categories: tuple[str, ...]) -> tuple[Found, dict[str, list]]:
    """Faults of a row's boxes and categories, and the `objects` that remain; `turn` is an EXIF orientation or 1."""
    faults, kept = [], []
    boxes, ids, names = objects["bbox"] or [], objects["category_id"] or [], objects["category_name"] or []
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
) -> tuple[Found, dict[str, Any] | None]:
    """All faults of a row, and its fields as they should be; None where the row is to be dropped.

    `facts`: what `picture_facts` saw. `categories`: the names of the data set's classes, in the order of their ids.
    """
    if facts["error"] is not None:
        return [("unreadable-picture", facts["error"])], None
    if max(facts["stored"]) > MOST_ASPECT * min(facts["stored"]):
        return [("too-thin-picture", f"{facts['stored'][0]}x{facts['stored'][1]} px")], None
    faults, (width, height), stored = _check_size(row, facts)
    objects = row["objects"] or {"bbox": [], "category_id": [], "category_name": []}
    box_faults, objects = _check_objects(objects, facts["orientation"] if stored else 1, categories)
    if any(fault == "no-box-left" for fault, _ in box_faults):
        return faults + box_faults, None
    return faults + box_faults, {"width": width, "height": height, "objects": objects}
