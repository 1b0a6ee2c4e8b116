"""The threshold is chosen on selection and applied to val."""

import pytest
from test_evaluate import A, B, true_row
from test_evaluate_confidence import answer

from helpers.evaluate import trusted_boxes, trusted_table


def split(name, right, wrong):
    """A picture with the true box A for each confidence: the answers `right` say A, the answers `wrong` say B."""
    truth = [true_row(f"{name}{i}", A) for i in range(len(right) + len(wrong))]
    boxes = [(A, c) for c in right] + [(B, c) for c in wrong]
    return truth, [answer(row["image_id"], *box) for row, box in zip(truth, boxes, strict=True)]


def test_the_threshold_of_selection_is_used_on_val():
    selection = split("s", right=[0.5, 0.7, 0.8, 0.9], wrong=[0.3, 0.6])
    val = split("v", right=[0.65, 0.7, 0.95], wrong=[0.2, 0.75])
    result = trusted_boxes(selection, val)
    assert result["threshold"] == 0.7
    assert result["selection"] == {"threshold": 0.7, "precision": 1.0, "recall": 0.5, "kept": 3}
    assert result["all"]["precision"]["value"] == result["all"]["recall"]["value"] == 3 / 5
    assert result["kept"]["precision"]["value"] == pytest.approx(2 / 3) and result["kept"]["precision"]["n"] == 3
    assert result["kept"]["recall"]["value"] == 2 / 5
    assert [len(line["boxes"]) for line in result["predictions"]] == [0, 1, 1, 0, 1]
    assert trusted_boxes(selection, val, precision=0.6)["threshold"] == 0.3
    assert list(trusted_table(result).index) == ["all boxes", "confidence >= 0.700"]
    assert trusted_table(result).loc["confidence >= 0.700", "boxes"] == 3


def test_a_precision_that_is_not_reached_keeps_nothing():
    result = trusted_boxes(split("s", right=[0.5], wrong=[0.9]), split("v", right=[0.99], wrong=[]))
    assert result["threshold"] is result["selection"] is None and result["kept"]["recall"]["value"] == 0
    assert result["kept"]["precision"]["n"] == 0 and not result["predictions"][0]["boxes"]
    assert list(trusted_table(result).index) == ["all boxes", "none can be trusted"]


def test_splits_that_share_a_picture_are_refused():
    with pytest.raises(ValueError, match="'s0' stands in both splits"):
        trusted_boxes(split("s", [0.5], []), split("s", [0.5], []))
