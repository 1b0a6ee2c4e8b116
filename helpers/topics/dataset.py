"""A data set looked at: its boxes as a table; and faults put there on purpose, to see that the audit finds each."""

import io
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

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


# One fault put there on purpose: the rule that should find it, where, and what was done.
Planted = namedtuple("Planted", "fault split index done")


def plant_each(sound: dict[str, Any]) -> tuple[datasets.DatasetDict, list[Planted]]:
    """Splits whose rows are copies of `sound`, each with another fault, and the list of what was planted.

    `sound` is a row of the schema whose picture can be read, undecoded ({"bytes", "path"}). The last row of val is
    left sound; two rows of train share its picture or its barcode.
    """
    with open_picture(sound["image"]) as opened:
        picture = as_rgb(ImageOps.exif_transpose(opened))
    sound = {name: sound[name] for name in FEATURES} | _saved(picture) | _boxed(BOX)
    sound["meta"] = sound["meta"] | {"barcode": sound["meta"]["barcode"] or "0000000000000"}
    splits: dict[str, list[dict]] = {"train": [], "selection": [], "val": []}
    planted = []
    for split, fault, done, change in _faults(picture, sound["meta"]):
        index = len(splits[split])
        own = {"train": {"image_id": f"planted-train-{index}"},
               "val": {"image_id": f"planted-{index}", "meta": sound["meta"] | {"barcode": str(index)}}}[split]
        splits[split].append(sound | own | change)
        planted.append(Planted(fault, split, index, done))
    splits["val"].append(sound)
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows, features=FEATURES) if rows else empty_split()
                                 for name, rows in splits.items()}), planted


def _faults(picture: Image.Image, meta: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(split, the rule, what is done, the fields that change) for each fault; those of train lie between the splits."""
    half = _saved(picture)["image"]["bytes"]
    half = {"bytes": half[: len(half) // 2], "path": None}
    return [
        ("val", "unreadable-picture", "the file ends half-way", {"image": half}),
        ("val", "too-thin-picture", "804 x 4 pixels", _saved(picture.resize((804, 4)))),
        ("val", "exif-as-shown", "stored lying, width and height as shown", _saved(picture, 6, as_shown=True)),
        ("val", "exif-as-stored", "stored lying, width and height as stored", _saved(picture, 6)),
        ("val", "exif-undecided", "stored upside down", _saved(picture, 3)),
        ("val", "wrong-size", "width one pixel too large", {"width": picture.width + 1}),
        ("val", "not-a-box", "a coordinate that is no number", _boxed(BOX, [0.1, 0.2, float("nan"), 0.6])),
        ("val", "inverted-box", "top and bottom swapped", _boxed([0.5, 0.2, 0.1, 0.6])),
        ("val", "out-of-range-box", "right edge at 1.3", _boxed([0.1, 0.2, 0.5, 1.3])),
        ("val", "empty-box", "top and bottom both at .1", _boxed(BOX, [0.1, 0.2, 0.1, 0.6])),
        ("val", "no-box-left", "its only box lies outside", _boxed([1.1, 0.2, 1.4, 0.6])),
        ("val", "repeated-box", "the same box twice", _boxed(BOX, BOX)),
        ("val", "unknown-category", "a box without a name", _boxed(BOX, BOX, names=["nutrition-table", ""])),
        ("val", "category-mismatch", "the id of another name",
         {"objects": _boxed(BOX)["objects"] | {"category_id": [3]}}),
        ("val", "repeated-id", "the id of the first that can be read", {"image_id": "planted-2"}),
        ("val", "no-table", "no box", _boxed()),
        ("val", "missing-id", "an empty id", {"image_id": ""}),
        ("train", "barcode-in-two-splits", "barcode of val, picture of its own", _saved(ImageOps.mirror(picture))),
        ("train", "picture-in-two-splits", "picture of val, barcode of its own",
         {"meta": meta | {"barcode": "of its own"}}),
    ]


def _saved(picture: Image.Image, orientation: int = 1, as_shown: bool = False) -> dict[str, Any]:
    """The fields of a row for `picture` as a JPEG with this EXIF orientation; its size as stored, or as shown."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, "JPEG", exif=exif)
    width, height = picture.size[::-1] if as_shown and orientation in SIDEWAYS else picture.size
    return {"image": {"bytes": file.getvalue(), "path": None}, "width": width, "height": height}


def _boxed(*yxyx: list[float], names: Sequence[str] = ()) -> dict[str, Any]:
    """The field `objects` with these boxes alone, nutrition tables without `names`."""
    return {"objects": objects_of(list(yxyx), list(names) or ["nutrition-table"] * len(yxyx))}
