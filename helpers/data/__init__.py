"""Hub data set, local folder or embedded scenes -> one row schema in train / selection / val, audited and cleaned."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import datasets

from helpers.data.audit import RULES, Audit, Fault, audit, clean
from helpers.data.classes import take_classes
from helpers.data.embedded import load_embedded, load_extra
from helpers.data.prepare import prepare
from helpers.data.schema import FEATURES, SPLIT_NAMES, DataError, categories_in
from helpers.data.sources import HUB_ID, HUB_REVISION, load_hub, load_local
from helpers.data.splits import arrange

OPTIONS = ("classes", "val_share", "box_format", "unlabelled")  # arguments of `load_raw` that are parameters of a run


def load_raw(
    dataset_id: str,
    *,
    revision: str | None = None,
    classes: str | None = None,
    val_share: float = 0.1,
    box_format: str | None = None,
    unlabelled: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    limit: dict[str, int] | None = None,
) -> datasets.DatasetDict:
    """train / selection / val of the one schema as their source has them, faults included; then `audit` and `clean`.

    `dataset_id`: "embedded" (the rendered scenes), a local file or folder (`FORMATS`), or a Hub id, at `revision`.
    `classes`: which classes to train on, and under which names (`take_classes`); None: all, as they are named.
    `val_share`: where the source names no val, the share of its pictures that become val; 1: all, and train is empty.
    `box_format`: what the numbers of a box are (`frames`), where the files do not say it or say it wrongly.
    `unlabelled`: "negative" or "skip", for pictures that are listed and neither labelled nor said to have no table.
    `seed`: which scenes are rendered, which rows become `selection` (and `val`, where there is none).
    `limit`: at most so many pictures of a split. `cache_dir`: the usual cache of `datasets` where None.
    Raises `DataError`: one sentence with the file or field, what was found, what was expected.
    """
    limit = limit or {}
    if dataset_id == "embedded":
        embedded = load_embedded(seed, limit, cache_dir)
        return datasets.DatasetDict(take_classes(embedded, classes, dataset_id) if classes else embedded)
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
    splits = arrange(take_classes(found, classes, dataset_id), dataset_id, val_share, seed)
    return datasets.DatasetDict(
        {name: split.select(range(min(limit.get(name, len(split)), len(split)))) for name, split in splits.items()}
    )


def load_splits(dataset_id: str, **source: Any) -> datasets.DatasetDict:
    """train / selection / val of `load_raw`, audited and cleaned; prints one line for each kind of fault."""
    raw = load_raw(dataset_id, **source)
    result = audit(raw)
    for line in result.table().itertuples():
        print(f"audit: {line.count} × {line.fault}: {line.action}")
    return clean(raw, result)


def source_of(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `load_raw` in a run's parameters; those of an older manifest may lack some."""
    names = {"dataset_id": "dataset_id", "dataset_revision": "revision", **dict(zip(OPTIONS, OPTIONS, strict=True))}
    return {argument: values[name] for name, argument in names.items() if name in values}


def names_in(*splits: datasets.Dataset) -> list[str]:
    """What a completion may name: the classes of the data set whose `splits` these are, sorted."""
    return sorted(categories_in(splits))


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
        boxes = [box if box and len(box) == 4 and None not in box else [math.nan] * 4
                 for box in objects.get("bbox") or []]
        names = [name or "" for name in objects.get("category_name") or []] + [""] * len(boxes)
        row["objects"] = {"bbox": boxes, "category_name": names[: len(boxes)]}
    return rows
