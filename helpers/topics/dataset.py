"""A data set looked at: its boxes as a table; and faults put there on purpose, to see that the audit finds each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import pandas as pd
from PIL import Image, ImageOps

from helpers.data.pictures import SIDEWAYS, as_rgb, open_picture
from helpers.data.schema import FEATURES, empty_split, objects_of

BOX = [0.1, 0.2, 0.5, 0.6]


def box_table(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """A line for each box of `splits` (name -> rows without pictures, as `truth_rows` gives them).

    Columns: split, image_id, class, x0, y0, x1, y1, width, height, area and width / height, all in shares of the
    picture; width px and height px in its own pixels.
    """
    lines = [
        (split, row["image_id"], name, x0, y0, x1, y1, row["width"], row["height"])
        for split, rows in splits.items()
        for row in rows
        for name, (y0, x0, y1, x1) in zip(row["objects"]["category_name"], row["objects"]["bbox"], strict=True)
    ]
    table = pd.DataFrame(lines, columns=["split", "image_id", "class", "x0", "y0", "x1", "y1", "across", "down"])
    width, height = table["x1"] - table["x0"], table["y1"] - table["y0"]
    sizes = {"width": width, "height": height, "area": width * height, "width / height": width / height}
    pixels = {"width px": width * table.pop("across"), "height px": height * table.pop("down")}
    return table.assign(**sizes, **pixels)


class Planted(NamedTuple):
    """One fault put there on purpose: the rule that should find it, where, and what was done."""

    fault: str
    split: str
    index: int  # type: ignore[assignment]  # hides the method of tuples, as Fault does
    done: str


def plant_each(sound: dict[str, Any]) -> tuple[datasets.DatasetDict, list[Planted]]:
    """Splits whose rows are copies of `sound`, each with another fault, and the list of what was planted.

    `sound` is a row of the schema whose picture can be read, undecoded ({"bytes", "path"}). The last row of val is
    left sound; two rows of train share its picture or its barcode.
    """
    with open_picture(sound["image"]) as opened:
        picture = as_rgb(ImageOps.exif_transpose(opened))
    sound = {name: sound[name] for name in FEATURES} | _saved(picture) | _boxed(BOX)
    sound["meta"] = sound["meta"] | {"barcode": sound["meta"]["barcode"] or "0000000000000"}
    val, train = _faults_in_a_row(picture), _faults_between_splits(picture, sound)
    rows = [sound | {"image_id": f"planted-{i}", "meta": sound["meta"] | {"barcode": str(i)}} for i in range(len(val))]
    rows = [row | change for row, (_, _, change) in zip(rows, val, strict=True)]
    across = [sound | {"image_id": f"planted-train-{i}"} | change for i, (_, _, change) in enumerate(train)]
    splits = {"train": across, "selection": [], "val": [*rows, sound]}
    planted = [Planted(fault, split, index, done) for split, faults in (("val", val), ("train", train))
               for index, (fault, done, _) in enumerate(faults)]
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows, features=FEATURES) if rows else empty_split()
         for name, rows in splits.items()}
    ), planted


def _faults_in_a_row(picture: Image.Image) -> list[tuple[str, str, dict[str, Any]]]:
    """(the rule, what is done, the fields that change) for each fault that one row alone can have."""
    half = _saved(picture)["image"]["bytes"]
    half = {"bytes": half[: len(half) // 2], "path": None}
    return [
        ("unreadable-picture", "the file ends half-way", {"image": half}),
        ("too-thin-picture", "804 x 4 pixels", _saved(picture.resize((804, 4)))),
        ("exif-as-shown", "stored lying, width and height as shown", _saved(picture, 6, as_shown=True)),
        ("exif-as-stored", "stored lying, width and height as stored", _saved(picture, 6)),
        ("exif-undecided", "stored upside down", _saved(picture, 3)),
        ("wrong-size", "width one pixel too large", {"width": picture.width + 1}),
        ("not-a-box", "a coordinate that is no number", _boxed(BOX, [0.1, 0.2, float("nan"), 0.6])),
        ("inverted-box", "top and bottom swapped", _boxed([0.5, 0.2, 0.1, 0.6])),
        ("out-of-range-box", "right edge at 1.3", _boxed([0.1, 0.2, 0.5, 1.3])),
        ("empty-box", "top and bottom both at .1", _boxed(BOX, [0.1, 0.2, 0.1, 0.6])),
        ("no-box-left", "its only box lies outside", _boxed([1.1, 0.2, 1.4, 0.6])),
        ("repeated-box", "the same box twice", _boxed(BOX, BOX)),
        ("unknown-category", "a box without a name", {"objects": objects_of([BOX, BOX], ["nutrition-table", ""])}),
        ("category-mismatch", "the id of another name", {"objects": _boxed(BOX)["objects"] | {"category_id": [3]}}),
        ("repeated-id", "the id of the first that can be read", {"image_id": "planted-2"}),
        ("no-table", "no box", _boxed()),
        ("missing-id", "an empty id", {"image_id": ""}),
    ]


def _faults_between_splits(picture: Image.Image, sound: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The same for faults that a row of train has because of the sound one in val."""
    own = sound["meta"] | {"barcode": "of its own"}
    return [
        ("barcode-in-two-splits", "barcode of val, picture of its own", _saved(ImageOps.mirror(picture))),
        ("picture-in-two-splits", "picture of val, barcode of its own", {"meta": own}),
    ]


def _saved(picture: Image.Image, orientation: int = 1, as_shown: bool = False) -> dict[str, Any]:
    """The fields of a row for `picture` as a JPEG with this EXIF orientation; its size as stored, or as shown."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, "JPEG", exif=exif)
    width, height = picture.size[::-1] if as_shown and orientation in SIDEWAYS else picture.size
    return {"image": {"bytes": file.getvalue(), "path": None}, "width": width, "height": height}


def _boxed(*yxyx: list[float], name: str = "nutrition-table") -> dict[str, Any]:
    """The field `objects` with these boxes alone."""
    return {"objects": objects_of(list(yxyx), [name] * len(yxyx))}
