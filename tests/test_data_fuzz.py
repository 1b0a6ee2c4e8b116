"""Broken annotations and rows: a `DataError` of one line or rows that the audit can clean, and nothing else."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import test_data_formats as formats
from test_data import row

from helpers import data, evaluate
from helpers.data.schema import FEATURES

ODD = [None, True, -1, 0, 1e308, float("nan"), "", "x", "../x.jpg", ".", [], {}, [[]], [None], {"a": 1}, 2**70, 10**400,
       "\0", [1, 2, 3], [[1, 2, 3, 4]], "a.jpg", ["nutrition-table"], "é" * 400]  # fmt: skip
BYTES = [b"", b"7", b"nan", b"-", b"<", b">", b"\n", b"[", b"1e999", b"\0", b" 0.5", b"\xe9", b"\xff\xfe"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


def broken(value: Any, draw: random.Random) -> Any:
    """A copy of `value` with one to three of its parts removed or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        if not places(value):
            break
        *way, last = draw.choice(places(value))
        inner = value
        for key in way:
            inner = inner[key]
        if draw.random() < 0.25:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(draw.choice(ODD))
    return value


def broken_bytes(value: bytes, draw: random.Random) -> bytes:
    """`value` with something put in, or in the place of one or eight bytes."""
    at = draw.randrange(len(value) + 1)
    return value[:at] + draw.choice(BYTES) + value[at + draw.choice([0, 0, 1, 8]) :]


def accepted_or_refused(root: Path) -> bool:
    """Whether the folder loads; it may be refused, in one line."""
    try:
        raw = data.load_raw(str(root))
        data.clean(raw, data.audit(raw))
        evaluate.score(data.raw_truth(raw["val"]), [], resamples=0)
    except data.DataError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("kind", ["metadata", "COCO boxes in metadata", "COCO"])
def test_broken_json_is_refused_in_one_line_or_read(kind, tmp_path):
    draw, root = random.Random(kind), tmp_path / "set"
    if kind == "COCO":
        formats.write_coco(root)
        file, good = root / "annotations.json", [formats.coco()]
    else:
        (formats.write_own_metadata if kind == "metadata" else formats.write_hf_metadata)(root)
        file = root / "metadata.jsonl"
        good = [json.loads(line) for line in file.read_text().splitlines()]
    read = 0
    for _ in range(60):
        file.write_text("\n".join(json.dumps(line) for line in broken(good, draw)))
        read += accepted_or_refused(root)
    assert 2 < read < 58


@pytest.mark.parametrize("kind", ["YOLO", "VOC"])
def test_broken_text_is_refused_in_one_line_or_read(kind, tmp_path):
    draw, root = random.Random(kind), tmp_path / "set"
    (formats.write_yolo if kind == "YOLO" else formats.write_voc)(root)
    files = [file for ending in ("txt", "yaml", "xml") for file in sorted(root.rglob(f"*.{ending}"))]
    good, read = {file: file.read_bytes() for file in files}, 0
    for _ in range(60):
        file = draw.choice(files)
        file.write_bytes(broken_bytes(good[file], draw))
        read += accepted_or_refused(root)
        file.write_bytes(good[file])
    assert 2 < read < 58


def odd_row(number: int, draw: random.Random) -> dict:
    """A row of the schema with values that its types allow and its meaning does not."""
    number_or = [None, float("nan"), float("inf"), -1e300, 0.0, 0.5, 2.0]
    boxes = [draw.choice([None, [draw.choice(number_or) for _ in range(draw.choice([0, 3, 4, 4, 5]))],
                          [0.1, 0.1, 0.5, 0.5]]) for _ in range(draw.randint(0, 3))]  # fmt: skip
    names = [draw.choice([None, "", "logo", "nutrition-table"]) for _ in range(draw.randint(0, 3))]
    ids = [draw.choice([None, -(2**40), 0, 7]) for _ in range(draw.randint(0, 3))]
    objects = {"bbox": boxes, "category_id": ids, "category_name": names}
    return row(number) | {
        "objects": draw.choice([None, objects, objects, objects, {**objects, "bbox": None}]),
        "image": draw.choice([None, {"bytes": b"", "path": None}, {"bytes": b"\xff\xd8\xff", "path": None},
                              *[row(number)["image"]] * 5]),  # fmt: skip
        "meta": draw.choice([None, row(number)["meta"], {"barcode": None, "off_image_id": None, "image_url": None}]),
        "width": draw.choice([None, -3, 0, 64, 2**40]),
        "image_id": draw.choice([None, "", "a", f"{number}"]),
    }


def test_odd_rows_come_out_clean_and_can_be_scored():
    draw = random.Random(0)
    rows = [odd_row(number, draw) for number in range(600)]
    raw = datasets.DatasetDict(val=datasets.Dataset.from_list(rows, features=FEATURES))
    evaluate.score(data.raw_truth(raw["val"]), [], resamples=0)
    after = data.clean(raw, data.audit(raw))["val"]
    assert 100 < len(after) < 600
    for clean in data.truth_rows(after):
        objects = clean["objects"]
        assert len(objects["bbox"]) == len(objects["category_name"]) == len(objects["category_id"])
        assert all(len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1 for box in objects["bbox"])
        assert clean["width"] == 64 and clean["image_id"]
    assert len(set(after["image_id"])) == len(after)
    assert data.audit(datasets.DatasetDict(val=after)).table()["fault"].isin(["no-table"]).all()
