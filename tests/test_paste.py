"""Pasted pictures: true boxes lie where the pieces are, covered tables are gone, and a draw can be repeated."""

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers.data.paste import MOST, with_pasted
from helpers.data.schema import FEATURES

GREY, TABLE = 40, 250  # in these pictures nothing is as light as a table


def rows(count: int, tables: int = 1) -> datasets.Dataset:
    """Grey pictures of 100 x 80 pixels, each with so many white tables of 30 x 16."""
    made = []
    for number in range(count):
        pixels = np.full((80, 100, 3), GREY + number % 20, np.uint8)
        boxes = [[0.1 + 0.3 * place, 0.2, 0.3 + 0.3 * place, 0.5] for place in range(tables)]
        for y0, x0, y1, x1 in boxes:
            pixels[round(80 * y0) : round(80 * y1), round(100 * x0) : round(100 * x1)] = TABLE
        names = ["nutrition-table-small"] * tables
        made.append({"image_id": str(number), "image": Image.fromarray(pixels), "width": 100, "height": 80,
                     "meta": {"barcode": "1", "off_image_id": "", "image_url": ""},
                     "objects": {"bbox": boxes, "category_id": [1] * tables, "category_name": names}})
    return datasets.Dataset.from_list(made, features=FEATURES)


@pytest.fixture(scope="module")
def made() -> datasets.Dataset:
    return with_pasted(rows(20), 3, seed=0).select(range(20, 80))


def light(row: dict) -> np.ndarray:
    return np.asarray(row["image"])[..., 1] > (GREY + TABLE) / 2


def test_a_table_is_where_a_box_is_and_nowhere_else(made):
    for row in made:
        inside = np.zeros((80, 100), bool)
        for y0, x0, y1, x1 in row["objects"]["bbox"]:
            edges = np.round(np.array([y0, y1, x0, x1]) * [80, 80, 100, 100]).astype(int)
            inside[edges[0] : edges[1], edges[2] : edges[3]] = True
        assert (light(row) != inside).mean() < 0.03, row["image_id"]  # edges are soft after a resize
    counts = {len(objects["bbox"]) for objects in made["objects"]}
    assert counts == {0, 1, 2, MOST}  # 1: another was painted over again
    widths = [100 * (x1 - x0) for objects in made["objects"] for _, x0, _, x1 in objects["bbox"]]
    assert 0 < max(widths) <= 1.5 * 30 + 1  # a table of 30 pixels
    assert {name for objects in made["objects"] for name in objects["category_name"]} == {"nutrition-table-small"}
    assert all(len(set(map(len, objects.values()))) == 1 for objects in made["objects"])


def test_as_many_as_wanted_are_made_each_with_its_own_id_and_the_same_again(made):
    again, other = (with_pasted(rows(20), 3, seed).select(range(20, 80)) for seed in (0, 1))
    assert len(set(made["image_id"])) == 60 and with_pasted(rows(4), 0.5, 0)["image_id"][:4] == ["0", "1", "2", "3"]
    assert [row["objects"] for row in again] == [row["objects"] for row in made] != [row["objects"] for row in other]
    assert len(with_pasted(rows(20), 0.25, 0)) == 25


def test_nothing_is_made_without_a_table_or_where_none_is_wanted():
    assert len(with_pasted(rows(3, tables=0), 2, 0)) == len(with_pasted(rows(3), 0, 0)) == 3


def test_pictures_that_a_table_fills_and_that_have_many_stay_whole():
    for row in with_pasted(rows(6, tables=3), 4, 0):
        assert len(row["objects"]["bbox"]) <= MOST and row["image"].size == (100, 80)


def test_some_pieces_hang_over_the_edge_and_each_category_is_pasted_as_often():
    two = rows(12)
    rare = two.map(lambda row: {"objects": row["objects"] | {"category_name": ["rare"], "category_id": [7]}})
    made = with_pasted(datasets.concatenate_datasets([two, rare.select([0])]), 8, seed=0).select(range(13, 117))
    boxes = np.array([box for row in made for box in row["objects"]["bbox"]])
    assert ((boxes == 0) | (boxes == 1)).any(1).sum() > 10 and (boxes >= 0).all() and (boxes <= 1).all()
    names = [name for row in made for name in row["objects"]["category_name"]]
    assert names.count("rare") > 0.15 * len(names)  # one of thirteen pictures has it
