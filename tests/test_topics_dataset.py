"""Faults of every kind, planted: the audit finds each where it was put; and boxes as a table."""

import datasets
import numpy as np
import pytest

from helpers import data
from helpers.data import embedded
from helpers.topics.dataset import box_table, plant_each


@pytest.mark.parametrize("barcode", ["4006381333931", ""])
def test_every_rule_of_the_audit_is_planted_once_and_found_there_and_the_sound_row_stays(barcode):
    sound = next(embedded.scene_rows([0], 0, "val"))
    sound["meta"]["barcode"] = barcode
    raw, planted = plant_each(sound)
    places = {fault[:3] for fault in planted}
    assert {fault for fault, _, _ in places} == {rule.fault for rule in data.RULES} and len(places) == len(data.RULES)
    audit = data.audit(raw)
    found = {(fault.fault, fault.split, fault.index) for fault in audit.faults}
    assert places <= found
    assert {fault for fault, _, _ in found - places} == {"empty-box", "out-of-range-box"}  # of one that lies outside
    unusable = [index for fault, split, index in places
                if fault in ("unreadable-picture", "too-thin-picture", "no-box-left")]
    assert set(audit.keep["val"]) == set(range(len(raw["val"]))) - set(unusable) and not audit.keep["train"]
    val = datasets.DatasetDict(val=raw["val"])
    again = data.audit(data.clean(val, data.audit(val)))
    assert {fault.fault for fault in again.faults} == {"exif-as-shown", "exif-undecided", "no-table"}  # nothing else
    assert raw["val"][-1]["image_id"] == sound["image_id"] and raw["val"].features == data.FEATURES


def test_a_line_a_box():
    objects = {"bbox": [[0.1, 0.2, 0.5, 0.4], [0, 0, 1, 1]], "category_name": ["nutrition-table", "x"]}
    rows = [{"image_id": "a", "width": 200, "height": 100, "objects": objects},
            {"image_id": "b", "width": 9, "height": 9, "objects": {"bbox": [], "category_name": []}}]
    table = box_table({"train": rows, "val": []})
    assert len(table) == 2 and list(table["split"]) == ["train", "train"]
    first = table.iloc[0]
    columns = ["x0", "y0", "width", "height", "area", "width / height", "width px", "height px"]
    np.testing.assert_allclose(first[columns].astype(float), [0.2, 0.1, 0.2, 0.4, 0.08, 0.5, 40, 40])
    assert box_table({"val": []}).empty
