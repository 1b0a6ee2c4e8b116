"""Metrics from truth and predictions: by hand, against independent computations, and with bad input."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.boxes import pairwise_iou
from helpers.evaluate import best_constant_box, constant_predictions, interval, paired_bootstrap, score
from helpers.evaluate.intervals import ratio

A, B = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]  # x first


def true_row(image_id, *boxes, names=None, **more):
    objects = {"bbox": [[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes], "category_id": [0] * len(boxes),
               "category_name": list(names or ["nutrition-table"] * len(boxes))}
    return {"image_id": image_id, "width": 100, "height": 80, "meta": {}, "objects": objects} | more


def predicted(image_id, *boxes, **more):
    labels, confidences = ["nutrition-table"] * len(boxes), [0.9] * len(boxes)
    return {"image_id": image_id, "text": "", "labels": labels, "boxes": list(boxes), "confidences": confidences,
            "rejected": [], "stopped": True, "new_tokens": 20} | more


def values(summary):
    return {name: metric["value"] for name, metric in summary.items()}


def test_every_metric_by_hand():
    truth = [
        true_row("right", A, rotation=0),
        true_row("half", A, rotation=90, names=["nutrition-table-small"]),
        true_row("one of two", A, B, rotation=90),
        true_row("nothing", A, rotation=0),
        true_row("no table"),
        true_row("no table either"),
    ]
    predictions = [
        predicted("right", A),
        predicted("half", [0.1, 0.1, 0.5, 0.35], B),  # IoU .625 with A, and a box too many
        predicted("one of two", B),
        predicted("nothing", rejected=["'nonsense': neither name nor box"], stopped=False),
        predicted("no table", A),
        predicted("no table either"),
    ]
    result = score(truth, predictions, resamples=200)
    assert result["problems"] == {} and result["pictures"] == 6
    got = values(result["summary"])
    expected = {
        "mean_iou": (1 + 0.625 + 0.5 + 0) / 4, "median_iou": (0.625 + 0.5) / 2, "detection_rate": 3 / 4,
        "iou_over_50": 2 / 4, "iou_over_70": 1 / 4, "mean_iou_boxes": (1 + 0.625 + 0 + 1 + 0) / 5,
        "precision": 3 / 5, "recall": 3 / 5, "f1": 3 / 5, "name_accuracy": 2 / 3, "format_error_rate": 1 / 6,
        "unstopped_rate": 1 / 6, "surplus_rate": 2 / 6, "false_alarm_rate": 1 / 2,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    counts = {name: metric["n"] for name, metric in result["summary"].items()}
    assert counts["mean_iou"] == 4 and counts["precision"] == 5 and counts["false_alarm_rate"] == 2
    assert values(result["by_category"]["nutrition-table-small"])["mean_iou_boxes"] == pytest.approx(0.625)
    assert result["by_size"]["10 to 30 %"]["recall"]["n"] == 4 and result["by_size"]["below 10 %"]["recall"]["n"] == 1
    assert values(result["by_rotation"]["90"])["mean_iou"] == pytest.approx((0.625 + 0.5) / 2)
    json.dumps(result, allow_nan=False)


def test_a_box_of_ones_own_classes_counts_for_its_own_class_alone():
    """Two classes in one place, the names swapped in one picture; kinds of nutrition table have any of their names."""
    names, swapped = ["logo", "price"], ["price", "logo"]
    truth = [true_row("right", A, B, names=names), true_row("swapped", A, B, names=names),
             true_row("same place", A, A, names=names)]  # fmt: skip
    predictions = [predicted("right", A, B, labels=names), predicted("swapped", A, B, labels=swapped),
                   predicted("same place", A, [0.1, 0.1, 0.5, 0.4], labels=swapped)]  # IoU .75 for the logo
    got = values(score(truth, predictions, resamples=0)["summary"])
    assert got["mean_iou"] == pytest.approx((1 + 0 + (1 + 0.75) / 2) / 3) and got["recall"] == got["precision"] == 4 / 6
    assert values(score(truth[:1], predictions[:1], resamples=0)["summary"])["ap"] == pytest.approx(1)
    assert values(score(truth[1:2], predictions[1:2], resamples=0)["summary"])["ap"] == 0
    kinds = [true_row("swapped", A, B, names=["nutrition-table", "nutrition-table-text"])]
    assert values(score(kinds, predictions[1:2], resamples=0)["summary"])["ap"] == pytest.approx(1)
    box = best_constant_box([true_row("a", A, names=["logo"]), true_row("b", A, B, B, names=["logo", "price", "price"]),
                             true_row("c", A, names=["logo"])])
    assert box == pytest.approx(A, abs=1e-3)
    (line,) = constant_predictions(box, [true_row("a", A, A, B, names=["logo", "logo", "price"])])
    assert line["labels"] == ["logo"]


unit_boxes = st.tuples(*[st.floats(0, 1)] * 4).map(
    lambda c: [min(c[0], c[1]), min(c[2], c[3]), max(c[0], c[1]), max(c[2], c[3])]
)


@settings(deadline=None, max_examples=50)
@given(st.lists(unit_boxes, min_size=1, max_size=3), st.lists(unit_boxes, min_size=1, max_size=3))
def test_matching_is_the_best_of_all_one_to_one_matchings(true, found):
    iou = pairwise_iou(true, found)
    if len(true) > len(found):
        iou = iou.T
    pairings = [
        [iou[i, j] for i, j in enumerate(columns)] for columns in itertools.permutations(range(iou.shape[1]), len(iou))
    ]
    record = score([true_row("a", *true)], [predicted("a", *found)], resamples=0)["per_picture"][0]
    assert sum(record["box_ious"]) == pytest.approx(max(map(sum, pairings)))
    assert sum(record["box_found"]) == max(sum(value > 0.5 for value in pairing) for pairing in pairings)
    assert record["box_found"].count(True) == record["predicted_correct"].count(True)


def test_bad_input_is_named_and_stays_in_the_denominator():
    nan = float("nan")
    truth = [*(true_row(name, A) for name in "abcd"), true_row("flat", [0.2, 0.2, 0.2, 0.4])]
    predictions = [
        predicted("a", A),
        predicted("a", B),
        predicted("stranger", A),
        predicted("c", [0.3, 0.3, 0.3, 0.6], [nan, 0, 1, 1], [0.9, 0.1, 0.2, 0.5], [0.5, 0.5, 1.2, 0.9]),
        predicted("d", A, confidences=[nan]),
        predicted("flat", A, confidences=[]),
    ]
    result = score(truth, predictions, resamples=50)
    problems = result["problems"]
    assert problems["repeated ids in the predictions"] == ["a"]
    assert problems["predictions for unknown ids"] == ["stranger"]
    assert problems["pictures without a prediction"] == ["b"]
    assert [line.split(":")[0] for line in problems["boxes without area"]] == ["c, prediction", "flat, truth"]
    assert "nan" in problems["boxes with missing or non-finite numbers"][0]
    assert "0.9" in problems["boxes with swapped corners"][0]
    assert "1.2" in problems["boxes outside the picture"][0]
    assert any("d: [nan]" in line for kind, lines in problems.items() if "NaN" in kind for line in lines)
    assert any("without confidences" in kind and lines == ["flat"] for kind, lines in problems.items())
    summary = result["summary"]
    assert summary["mean_iou"]["n"] == 5 and summary["mean_iou"]["value"] == pytest.approx(2 / 5)
    assert summary["precision"]["n"] == 7 and summary["precision"]["value"] == pytest.approx(2 / 7)
    assert summary["format_error_rate"]["value"] == pytest.approx(1 / 5)
    json.dumps(result, allow_nan=False)


def test_intervals():
    x = np.random.default_rng(0).normal(0.6, 0.2, 123)
    first = interval(np.mean, x)
    assert first == interval(np.mean, x)
    assert (first["high"] - first["low"]) / 2 == pytest.approx(1.96 * x.std() / np.sqrt(123), rel=0.1)
    certain = interval(np.mean, np.ones(50), rate=True)
    assert certain["value"] == 1 and certain["low"] == pytest.approx(0.929, abs=0.001)
    assert interval(np.mean, [], n=0) == {"value": None, "low": None, "high": None, "n": 0}
    assert interval(ratio, [0, 1, 0], [0, 1, 0], n=1)["value"] == 1  # a resample may hold no box at all
    assert interval(np.mean, x, resamples=0)["low"] is None


def per_picture(ious):
    return [{"image_id": str(i), "iou": iou} for i, iou in enumerate(ious)]


def test_paired_comparison_decides_what_pairs_can_decide():
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.9, 123)
    clear = paired_bootstrap(per_picture(base + 0.1 + rng.normal(0, 0.1, 123)), per_picture(base))
    assert clear["verdict"].startswith("the first is better") and clear["pictures_needed"] < 20
    assert clear["difference"]["low"] < 0.1 < clear["difference"]["high"] and clear["difference"]["n"] == 123
    small = paired_bootstrap(per_picture(base + 0.03 + rng.normal(0, 0.1, 123)), per_picture(base))
    assert 50 < small["pictures_needed"] < 250
    same = paired_bootstrap(per_picture(base), per_picture(base))
    assert same["verdict"] == "not significant at 95 %: the interval contains 0" and same["pictures_needed"] is None
    assert paired_bootstrap(per_picture(base), per_picture(base + 0.1))["verdict"].startswith("the second is better")


def test_best_constant_box_beats_its_neighbours_and_every_true_box():
    rng = np.random.default_rng(2)
    low = rng.uniform(0.05, 0.4, (80, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.2, 0.5, (80, 2))], axis=1)
    truth = [true_row(str(i), box) for i, box in enumerate(boxes)] + [true_row("two", A, B), true_row("none")]
    best = best_constant_box(truth)
    np.testing.assert_array_equal(best, best_constant_box(truth))

    def mean_iou(box):
        return values(score(truth, constant_predictions(box, truth), resamples=0)["summary"])["mean_iou"]

    reached = mean_iou(best)
    assert all(mean_iou(box) <= reached + 1e-3 for box in boxes[::8])
    assert all(mean_iou(best + step * side) < reached for side in np.eye(4) for step in (-0.03, 0.03))
    np.testing.assert_allclose(best_constant_box([true_row("a", A), true_row("b", A)]), A, atol=1e-3)
    pairs = [true_row(f"pair {i}", A, [0.9, 0.9, 1, 1]) for i in range(3)]  # each half worth a single box
    np.testing.assert_allclose(best_constant_box([*pairs, true_row("a", B), true_row("b", B)]), B, atol=1e-3)
    with pytest.raises(ValueError, match="no picture has a box"):
        best_constant_box([true_row("none")])
