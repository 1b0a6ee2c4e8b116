"""Average precision against an independent computation; reliability and thresholds by hand."""

import numpy as np
import pytest
from test_evaluate import A, B, predicted, true_row, values

from helpers.boxes import pairwise_iou
from helpers.evaluate import constant_predictions, keep_confident, score
from helpers.evaluate.confidence import average_precision


def sure(image_id, box, confidence):
    return predicted(image_id, box, confidences=[confidence])


def plain_ap(true_boxes, boxes, scores, threshold):
    """COCO's AP at one threshold, written as a loop: greedy by score, precision at 101 recalls."""
    ranked = sorted(((s, p, b) for p in boxes for s, b in zip(scores[p], boxes[p], strict=True)), key=lambda x: -x[0])
    taken, right = {p: set() for p in true_boxes}, []
    for _, picture, box in ranked:
        iou = pairwise_iou([box], true_boxes[picture])[0]
        free = [j for j in range(len(iou)) if j not in taken[picture] and iou[j] >= threshold]
        best = max(free, key=lambda j: iou[j], default=None)
        right.append(best is not None)
        if best is not None:
            taken[picture].add(best)
    total = sum(map(len, true_boxes.values()))
    hits = np.cumsum(right)
    points = [(hits[i] / total, hits[i] / (i + 1)) for i in range(len(hits))]
    return np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)])


def random_detections(seed, pictures=25):
    rng = np.random.default_rng(seed)
    true, found, scores = {}, {}, {}
    for picture in range(pictures):
        low = rng.uniform(0, 0.6, (rng.integers(0, 4), 2))
        true[picture] = np.concatenate([low, low + rng.uniform(0.05, 0.4, low.shape)], axis=1)
        shaken = true[picture] + rng.normal(0, 0.02, true[picture].shape)
        strays = rng.uniform(0, 0.5, (rng.integers(0, 3), 2))
        strays = np.concatenate([strays, strays + 0.2], axis=1)
        found[picture] = np.concatenate([shaken[rng.random(len(shaken)) < 0.8], strays])
        scores[picture] = rng.random(len(found[picture])).tolist()
    return true, found, scores


def records_of(true, found, scores):
    return [{"true": true[p].tolist(), "predicted": found[p].tolist(), "confidences": scores[p], "by_class": False}
            for p in found]


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_an_independent_computation(seed):
    true, found, scores = random_detections(seed)
    result = values(average_precision(records_of(true, found, scores), resamples=0))
    each = {t: plain_ap(true, found, scores, t) for t in np.linspace(0.5, 0.95, 10)}
    assert result["ap"] == pytest.approx(np.mean(list(each.values())), abs=1e-6)
    assert result["ap50"] == pytest.approx(each[0.5], abs=1e-6)
    assert result["ap75"] == pytest.approx(each[0.75], abs=1e-6)
    assert 0.1 < result["ap"] < 0.95


def test_ap_counts_boxes_on_pictures_without_a_table_and_reads_confidence():
    truth = [true_row("a", A), true_row("b")]
    sure_of_the_wrong = [sure("a", A, 0.2), sure("b", A, 0.9)]
    sure_of_the_right = [sure("a", A, 0.9), sure("b", A, 0.2)]
    assert values(score(truth, sure_of_the_wrong, resamples=0)["summary"])["ap"] == pytest.approx(0.5)
    assert values(score(truth, sure_of_the_right, resamples=0)["summary"])["ap"] == pytest.approx(1.0)


def test_reliability_threshold_and_filter():
    truth = [true_row(str(i), A) for i in range(20)]
    predictions = [sure(str(i), A if i >= 5 else B, (i + 0.5) / 20) for i in range(20)]
    confidence = score(truth, predictions, resamples=0)["confidence"]
    expected = {"threshold": 5.5 / 20, "precision": 1.0, "recall": 0.75, "kept": 15}
    assert confidence["ranks"] and confidence["precision_95"] == pytest.approx(expected)
    bins = confidence["reliability"]["bins"]
    assert len(bins) == 10 and sum(row["n"] for row in bins) == 20 and bins[0]["right"] == 0 and bins[9]["right"] == 1
    gaps = [abs(row["confidence"] - row["right"]) for row in bins]
    assert confidence["reliability"]["ece"] == pytest.approx(np.mean(gaps))
    kept = keep_confident(predictions, 5.5 / 20)
    assert sum(len(line["boxes"]) for line in kept) == 15 and len(kept) == 20
    unranked = score(truth, constant_predictions(np.array(A), truth), resamples=0)["confidence"]
    assert unranked == {"ranks": False, "reliability": None, "precision_95": None}
