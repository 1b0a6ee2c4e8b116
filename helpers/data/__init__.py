"""Hub data set, local folder or embedded scenes -> one row schema in train / selection / val, audited and cleaned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets

from helpers.boxes import CATEGORIES
from helpers.data.audit import Audit, Fault, audit, clean
from helpers.data.checks import RULES
from helpers.data.embedded import load_embedded
from helpers.data.pictures import NAN_BOX
from helpers.data.prepare import prepare
from helpers.data.schema import FEATURES, SPLIT_NAMES, DataError, carve, empty_split, split_name
from helpers.data.sources import HUB_ID, HUB_REVISION, check_content, load_hub, load_local


def load_raw(
    dataset_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    limit: dict[str, int] | None = None,
    box_format: str | None = None,
    unlabelled: str | None = None,
) -> datasets.DatasetDict:
    """train / selection / val of the one schema as their source has them, faults included; then `audit` and `clean`.

    `dataset_id`: "embedded" (the rendered scenes), a local file or folder (`FORMATS`), or a Hub id, at `revision`.
    `seed`: which scenes are rendered, which rows become `selection` (and `val`, where there is none).
    `box_format`: what the numbers of a box are (`frames`), where the files do not say it or say it wrongly.
    `unlabelled`: "negative" or "skip", for pictures that are listed and neither labelled nor said to have no table.
    `limit`: at most so many pictures of a split. `cache_dir`: the usual cache of `datasets` where None.
    Raises `DataError`: one sentence with the file or field, what was found, what was expected.
    """
    limit = limit or {}
    if dataset_id == "embedded":
        return datasets.DatasetDict(load_embedded(seed, limit, cache_dir))
    path = Path(dataset_id).expanduser()
    if path.exists():
        found = load_local(path, cache_dir, box_format=box_format, unlabelled=unlabelled)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset_id):
        found = load_hub(dataset_id, revision, cache_dir, box_format=box_format, unlabelled=unlabelled)
    else:
        raise DataError(
            f"dataset_id is {dataset_id!r}, which is no file or folder; expected embedded, an existing path, "
            "or a Hub id such as openfoodfacts/nutrition-table-detection"
        )
    check_content(found, dataset_id)
    splits = _arrange(found, seed, dataset_id)
    return datasets.DatasetDict(
        {name: split.select(range(min(limit.get(name, len(split)), len(split)))) for name, split in splits.items()}
    )


def _arrange(found: dict[str, datasets.Dataset], seed: int, where: str) -> dict[str, datasets.Dataset]:
    """train / selection / val from the splits that a source has; what is decided here is printed."""
    found = {split_name(name): rows for name, rows in found.items() if len(rows)}
    if "" in found and len(found) > 1:
        raise DataError(f"{where}: {len(found['']):,} pictures belong to no split beside {sorted(found)[1:]}; "
                        "expected each in a folder or list of train, val")  # fmt: skip
    if "val" not in found and "test" in found:
        print(f"data: {where} has no val: its test ({len(found['test'])} pictures) is used as val")
        found["val"] = found.pop("test")
    if list(found) == [""]:
        print(f"data: {where} names no splits: all {len(found[''])} pictures are val, train is empty "
              "(to train on them, put them into a folder named train)")  # fmt: skip
        found = {"val": found[""]}
    unused = sorted(found.keys() - set(SPLIT_NAMES))
    if unused:
        print(f"data: {where}: the splits {', '.join(unused)} are not used")
    if "train" not in found and "val" not in found:
        raise DataError(f"{where} has the splits {', '.join(unused)}; expected train and val")
    train, val = found.get("train", empty_split()), found.get("val")
    if val is None:
        train, val = carve(train, _share(train), seed)
        if not len(val):
            raise DataError(f"{where} has no val, and its train has one barcode only; expected pictures of several")
        print(f"data: {where} has no val: {len(val)} pictures are taken from train, whole barcodes, seed {seed}")
    selection = found.get("selection", empty_split())
    if "selection" not in found and len(train):
        train, selection = carve(train, _share(train), seed + 1)
        print(f"data: selection: {len(selection)} pictures taken from train, whole barcodes, seed {seed}")
    return {"train": train, "selection": selection, "val": val}


def _share(train: datasets.Dataset) -> int:
    """How many rows to take from train: a tenth, 100 at most, one at least."""
    return min(100, max(1, round(len(train) / 10)))


def load_splits(dataset_id: str, **source: Any) -> datasets.DatasetDict:
    """train / selection / val of `load_raw`, audited and cleaned; prints one line for each kind of fault."""
    raw = load_raw(dataset_id, **source)
    result = audit(raw)
    for line in result.table().itertuples():
        print(f"audit: {line.count} × {line.fault}: {line.action}")
    return clean(raw, result)


def names_in(split: datasets.Dataset) -> list[str]:
    """What an answer may name: the project's categories and the names of `split`, sorted."""
    return sorted({*CATEGORIES, *(name for objects in split["objects"] for name in objects["category_name"])})


def truth_rows(split: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows of a split without their pictures: what `truth.jsonl` holds."""
    return split.remove_columns("image").to_list()


def raw_truth(split: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows of a raw split without their pictures, in a form that `evaluate.score` can count.

    Each of its boxes stays, empty, swapped or outside as it is; what is not four numbers becomes four NaN.
    """
    rows = truth_rows(split)
    for row in rows:
        objects = row["objects"] or {}
        boxes = [box if box and len(box) == 4 and None not in box else NAN_BOX for box in objects.get("bbox") or []]
        names = [name or "" for name in objects.get("category_name") or []] + [""] * len(boxes)
        row["objects"] = {"bbox": boxes, "category_name": names[: len(boxes)]}
    return rows
