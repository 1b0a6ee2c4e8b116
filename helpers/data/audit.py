"""Every fault of a data set found, named, and fixed or dropped by a rule that can be shown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
from datasets import Image

from helpers.data.checks import RULES, Rule, check_row
from helpers.data.pictures import FACTS, picture_facts
from helpers.data.schema import DataError, categories_of, fingerprint, workers

SAME_PICTURE = 3.0  # root mean square difference of two 16 x 16 thumbnails, in 0-255 levels
BLOCK = 512  # thumbnails that are compared at once


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


def _twins(thumbs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each thumbnail [N, 768] the row of `others` [M, 768] that shows the same picture, or -1. int64 [N]."""
    if not len(thumbs) or not len(others):
        return np.full(len(thumbs), -1)
    found = []
    for some in np.split(thumbs, range(BLOCK, len(thumbs), BLOCK)):  # N x M distances at once would not fit
        squares = (some**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * some @ others.T
        distance = np.sqrt(np.maximum(squares.min(axis=1), 0) / some.shape[1])
        found.append(np.where(distance <= SAME_PICTURE, squares.argmin(axis=1), -1))
    return np.concatenate(found)


def _check_across(
    result: Audit, name: str, rows: list[dict], facts: list[dict], readable: list[int], seen: dict[str, Any]
) -> list[int]:
    """Those of `readable` that no earlier split has by barcode or picture; what they show is added to `seen`."""
    thumbs = np.array([np.frombuffer(facts[i]["thumb"], np.uint8) for i in readable], np.float64).reshape(-1, 768)
    twins = _twins(thumbs, np.concatenate(seen["thumbs"]) if seen["thumbs"] else thumbs[:0])
    kept, kept_positions = [], []
    for position, index in enumerate(readable):
        barcode, where = (rows[index]["meta"] or {}).get("barcode"), []
        if barcode and seen["barcodes"].get(barcode):
            where.append(("barcode-in-two-splits", f"{barcode}, also {seen['barcodes'][barcode]}"))
        if twins[position] >= 0:
            where.append(("picture-in-two-splits", f"also {seen['pictures'][twins[position]]}"))
        result.faults += [Fault(fault, name, index, rows[index]["image_id"], found) for fault, found in where]
        if not where:
            kept.append(index)
            kept_positions.append(position)
    for index in kept:
        place = f"{rows[index]['image_id']} in {name}"
        seen["barcodes"].setdefault((rows[index]["meta"] or {}).get("barcode"), place)
        seen["pictures"].append(place)
    seen["thumbs"].append(thumbs[kept_positions])
    return kept


def _check_rows(
    result: Audit, name: str, rows: list[dict], facts: list[dict], categories: tuple[str, ...]
) -> dict[int, dict[str, Any]]:
    """The rows of a split one by one: faults into `result`, `rows` as they should be, {row: what changed} back."""
    fixed, copies = {}, Counter()
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
            fixed[index] = {key: value for key, value in after.items() if value != row[key]}
            rows[index] = row | after
        result.faults += [Fault(fault, name, index, image_id, found) for fault, found in faults]
    return fixed


def audit(raw: datasets.DatasetDict) -> Audit:
    """Look at every picture and box of `raw` (rows of the schema): what is wrong, and what `clean` will do about it.

    Pictures are decoded once; `datasets` caches what was seen. Nothing is changed here.
    """
    result, seen, statistics = Audit(), {"barcodes": {}, "pictures": [], "thumbs": []}, {}
    objects = [entry or {} for split in raw.values() for entry in split["objects"]]
    categories = categories_of(name for entry in objects for name in entry.get("category_name") or [])
    for name in sorted(raw, key=("val", "selection", "train").index):  # what val has, the others may not have
        rows, facts = raw[name].remove_columns("image").to_list(), _picture_facts(raw[name], name)
        fixed = _check_rows(result, name, rows, facts, categories)
        keep = _check_across(result, name, rows, facts, [index for index in range(len(rows)) if index in fixed], seen)
        result.keep[name] = keep
        result.fixed[name] = {index: fixed[index] for index in keep if fixed[index]}
        statistics[name] = _statistics([rows[index] for index in keep], categories)
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


def _fix(row: dict[str, Any], index: int, fixes: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return row | fixes.get(index, {})


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
        if fixed:
            fixes = {position: fixed[index] for position, index in enumerate(keep) if index in fixed}
            undecoded = split.cast_column("image", Image(decode=False))
            undecoded = undecoded.map(
                _fix,
                with_indices=True,
                fn_kwargs={"fixes": fixes},
                features=undecoded.features,
                new_fingerprint=fingerprint(undecoded, fixes),
                desc=f"Fixing {name}",
            )
            split = undecoded.cast_column("image", Image())
        cleaned[name] = split
    return datasets.DatasetDict(cleaned)
