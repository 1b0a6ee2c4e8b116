"""The classes of a data set of one's own: which are trained on, and what they are called in the target text."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import datasets

from helpers.boxes import CATEGORIES
from helpers.data.schema import DataError, categories_of, with_columns
from helpers.messages import target_text

UNNAMED = "object"  # what a box without a class name is called


def take_classes(
    found: dict[str, datasets.Dataset], wanted: str | None, where: str
) -> dict[str, datasets.Dataset]:
    """`found` with the boxes of the classes that `wanted` names, under their new names; None: all, as they are named.

    `wanted`: names with commas between them, `old=new` to rename, such as "Nutrition Facts=nutrition-table, Logo";
    capitals, spaces, - and _ make no difference in the old ones. Numbers become those of `categories_of`. A picture of
    which no box is taken stays, as one without. `DataError` for a class that is not there, or a name that the target
    text cannot carry. What was taken is printed.
    """
    objects = [entry for rows in found.values() for entry in rows["objects"]]
    if not objects:
        raise DataError(f"{where} has no pictures; expected at least one")
    objects = [entry for entry in objects if entry and entry["bbox"]]
    if not objects:
        raise DataError(f"{where}: objects.bbox is empty in all {sum(map(len, found.values()))} pictures; expected "
                        "boxes")
    counts = Counter(name or UNNAMED for entry in objects for name in entry["category_name"])
    new = _chosen(counts, wanted, where) if wanted else {name: _writable(name, where) for name in counts}
    boxes: Counter[str] = Counter()
    for name, target in new.items():
        boxes[target] += counts[name]
    said = ", ".join(f"{name} ({count:,} boxes)" for name, count in boxes.most_common())
    print(f"data: the class is {said}" if len(boxes) == 1 else f"data: {len(boxes)} classes are trained on: {said}")
    left = sum(counts.values()) - sum(boxes.values())
    if left:
        others = ", ".join(sorted(counts.keys() - new))
        print(f"data: {left:,} boxes are left out, of the classes that classes={wanted!r} does not name: {others}")
    categories = categories_of(boxes)
    if categories == CATEGORIES and all(name == target for name, target in new.items()) and not left:
        return found
    return {split: _renamed(rows, new, categories) for split, rows in found.items()}


def _chosen(counts: Counter[str], wanted: str, where: str) -> dict[str, str]:
    """{name in the data: name to train on} as `wanted` says."""
    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", " ", name.strip().casefold())

    chosen = {}
    for part in filter(str.strip, wanted.split(",")):
        old, _, new = (text.strip() for text in part.partition("="))
        same = [old] if old in counts else [name for name in counts if plain(name) == plain(old)]
        if not same:
            there = ", ".join(f"{name} ({count:,} boxes)" for name, count in counts.most_common(12))
            raise DataError(f"classes={wanted!r}: {where} has no class {old!r}; it has {there}")
        chosen |= {name: _writable(new or name, where) for name in same}
    return chosen


def _writable(name: str, where: str) -> str:
    """`name` as a completion can carry it: what is no letter, digit, space or one of /&'-_ becomes a space."""
    new = " ".join(re.sub(r"[^\w /&'-]", " ", name).split()).lstrip("_/&'- ")
    try:
        target_text({"bbox": [[0, 0, 1, 1]], "category_name": [new]})
    except ValueError:
        raise DataError(f"{where}: the class {name!r} cannot be written in a completion; give it another name, such as "
                        f"classes='{name}=table'") from None
    return new


def _renamed(rows: datasets.Dataset, new: dict[str, str], categories: tuple[str, ...]) -> datasets.Dataset:
    """`rows` with the boxes whose name `new` has, under its value."""
    def taken(entry: dict[str, Any] | None) -> dict[str, Any] | None:
        if not entry or len(entry["bbox"] or []) != len(entry["category_name"] or []):
            return entry  # for the audit to name
        names = [new.get(name or UNNAMED) for name in entry["category_name"] or []]
        kept = [(box, name) for box, name in zip(entry["bbox"] or [], names, strict=True) if name]
        return {"bbox": [box for box, _ in kept], "category_id": [categories.index(name) for _, name in kept],
                "category_name": [name for _, name in kept]}

    return with_columns(rows, [{"objects": taken(entry)} for entry in rows["objects"]])
