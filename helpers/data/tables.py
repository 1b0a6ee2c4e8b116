"""Rows as a table: a line a box, for looking at a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd


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
