"""The study of variants: its numbers on made-up completions, and three real runs made small."""

import json

import numpy as np
import pytest

from helpers.dev import study


def test_an_expected_iou_is_that_of_the_boxes_that_the_digits_spell():
    """Digits that are sure give the box itself; a first digit that is 1 or 3 at one place gives two boxes in turn."""
    sure = [np.eye(10)[[int(digit) for digit in f"{1000 * number:.0f}"]] for number in (0.1, 0.02, 0.3, 0.06)]
    box = np.array([0.1, 0.02, 0.3, 0.06])
    assert study.expected_iou(sure, box, np.random.default_rng(0)) == pytest.approx(1)
    sure[2][0] = (np.eye(10)[1] + np.eye(10)[3]) / 2  # x1 is .1, which leaves nothing, or .3
    assert 0.3 < study.expected_iou(sure, box, np.random.default_rng(0)) < 0.7


def test_digits_of_a_box_that_was_broken_off_do_not_count():
    """As in "(200,324),(small-facts<|box_start|>(36,535),(501,59)", where each character is a token."""
    text = "(200,324),(small-facts<(36,535),(501,59)>"
    found = study.last_four([i for i, letter in enumerate(text) if letter.isdigit()])
    assert ["".join(text[i] for i in number) for number in found] == ["36", "535", "501", "59"]


def test_confidence_is_judged_by_how_it_ranks_right_boxes():
    def picture(name, right):
        return {"image_id": name, "true": [[0, 0, 1, 1]], "predicted": [[0, 0, 1, 1]], "predicted_correct": [right]}

    names, right = [f"{i}" for i in range(40)], [i % 4 > 0 for i in range(40)]
    scored = {split: {"per_picture": [picture(*one) for one in zip(names, right, strict=True)]}
              for split in (*study.MEASURED, "selection", "calibration")}
    boxes = {name: {"boxes": [{"digits": 0.9 if good else 0.3, "start": 0.5, "expected IoU": 0.1}]}
             for name, good in zip(names, right, strict=True)}
    found = study.confidence([scored], [{"splits": dict.fromkeys(scored, boxes)}])
    assert (found["boxes"], found["wrong"]) == ([120], [30])
    assert found["auroc"]["digits"] == [1.0] and found["auroc"]["start"] == [0.5]
    assert found["auroc on calibration"]["confidence"] == [1.0]
    (fitted,) = found["calibrated"]
    assert fitted["precision"] == 1 and fitted["recall"] == 0.75 and fitted["ece"] < 0.1


def test_boxes_are_counted_by_their_size():
    records = [{"box_areas": [0.1, 0.2], "box_ious": [0.0, 0.5]}, {"box_areas": [0.3, 0.4], "box_ious": [1.0, 1.0]}]
    one = {"val-multi": {"per_picture": records}}
    found = study.by_size([one], [one, one])
    assert found["iou"] == [[0.0, 0.5, 1.0, 1.0]] * 2 and found["edges"][0] == 0.1 and found["edges"][-1] == 0.4


@pytest.mark.slow
def test_three_variants_are_run_and_compared(tmp_path):
    words = ["--folder", str(tmp_path), "--limit", "8", "--seeds", "1", "--at-once", "2", "--only", "r1", "r1, DoRA",
             "r1, pasted"]
    assert study.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report["variants"]] == ["r1", "r1, pasted", "r1, DoRA"] and report["pictures"]["val-none"] == 100
    dora = report["variants"]["r1, DoRA"]
    assert dora["minus_plain"]["val-none"]["n"] == 100 and dora["updates"] == 2
    pasted = report["variants"]["r1, pasted"]
    assert pasted["passes"]["val-multi"]["value"] >= pasted["scores"]["val-multi"]["value"] and "passes" not in dora
    assert len(report["variants"]["r1"]["decisions"]["table"]["val-none"]) == 100
    assert len(pasted["by_size"]["iou"]) == 2 and pasted["confidence"]["auroc"].keys() == study.KINDS.keys()
