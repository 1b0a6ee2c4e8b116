"""Box formats: round trips, empty input, IoU against a pixel count, refusals."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import boxes as bx


def corner_boxes(low=0.0, high=1.0, max_boxes=5):
    """Valid corner boxes [N, 4] with coordinates in [low, high], N from 0."""
    shape = st.integers(0, max_boxes).map(lambda n: (n, 2, 2))
    corners = hnp.arrays(np.float64, shape, elements=st.floats(low, high, allow_subnormal=False))
    return corners.map(lambda c: np.sort(c, axis=1).reshape(-1, 4))


sizes = st.integers(1, 8000)


@given(corner_boxes(), sizes, sizes)
def test_every_conversion_comes_back(boxes, width, height):
    np.testing.assert_array_equal(bx.xyxy_unit_to_yxyx_unit(bx.yxyx_unit_to_xyxy_unit(boxes)), boxes)
    pixels = bx.xyxy_unit_to_xyxy_px(boxes, width, height)
    np.testing.assert_allclose(bx.xyxy_px_to_xyxy_unit(pixels, width, height), boxes, atol=1e-12)
    whole = bx.xyxy_unit_to_xyxy_1000(boxes)  # at most half a thousandth off
    assert whole.dtype == np.int64
    np.testing.assert_allclose(whole / 1000, boxes, atol=0.0005 + 1e-12)


def test_each_format_by_hand():
    np.testing.assert_allclose(bx.yxyx_unit_to_xyxy_unit([[0.1, 0.2, 0.3, 0.4]]), [[0.2, 0.1, 0.4, 0.3]])
    np.testing.assert_allclose(bx.xyxy_unit_to_xyxy_px([[0.2, 0.1, 0.4, 0.3]], 100, 200), [[20, 20, 40, 60]])
    assert bx.xyxy_unit_to_xyxy_1000([[0.2784, 0.4951, 0.7256, 1.0]]).tolist() == [[278, 495, 726, 1000]]


@pytest.mark.parametrize("empty", [[], np.zeros((0, 4)), [[]]])
def test_empty_input_stays_empty(empty):
    for convert in (bx.yxyx_unit_to_xyxy_unit, bx.xyxy_unit_to_yxyx_unit, bx.xyxy_unit_to_xyxy_1000):
        assert convert(empty).shape == (0, 4), convert.__name__
    assert bx.xyxy_unit_to_xyxy_px(empty, 10, 20).shape == bx.xyxy_px_to_xyxy_unit(empty, 10, 20).shape == (0, 4)
    assert bx.area(empty).shape == bx.reading_order(empty).shape == (0,)
    assert bx.pairwise_iou(empty, [[0, 0, 1, 1]]).shape == (0, 1)
    assert bx.pairwise_iou([[0, 0, 1, 1]], empty).shape == (1, 0)


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=2, max_size=2))
def test_iou_equals_a_count_of_pixels(corners):
    grids, boxes = [], []
    for x0, x1, y0, y1 in corners:
        (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
        grid = np.zeros((12, 12), bool)
        grid[y0:y1, x0:x1] = True
        grids.append(grid)
        boxes.append([x0, y0, x1, y1])
    union = (grids[0] | grids[1]).sum()
    expected = (grids[0] & grids[1]).sum() / union if union else 0.0
    assert bx.pairwise_iou(boxes[:1], boxes[1:])[0, 0] == pytest.approx(expected)


def test_boxes_without_area_have_iou_zero():
    assert bx.pairwise_iou([[0.5, 0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 0.5]])[0, 0] == 0


def test_a_box_that_is_drawn_again_is_not_distinct():
    box, near, far = [0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.5, 0.52], [0.4, 0.4, 0.9, 0.9]
    assert bx.distinct([box, far, near, far], ["table"] * 4) == [0, 1]
    assert bx.distinct([box, near], ["nutrition-table", "nutrition-table-small"]) == [0]  # kinds of one thing
    assert bx.distinct([box, near], ["table", "logo"]) == [0, 1]
    assert bx.distinct([], []) == []


def test_reading_order_goes_line_by_line():
    left, right = [0.1, 0.12, 0.4, 0.3], [0.5, 0.10, 0.9, 0.3]  # one line, though the right one begins higher
    below = [0.0, 0.5, 0.9, 0.7]
    assert bx.reading_order([below, right, left]).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: bx.area([[0.1, 0.2, 0.3]]), "shape"),
    (lambda: bx.area([[0.1, 0.2, float("nan"), 0.4]]), "not finite"),
    (lambda: bx.yxyx_unit_to_xyxy_unit([[0.5, 0.2, 0.3, 0.4]]), "swapped corners"),
    (lambda: bx.xyxy_unit_to_xyxy_1000([[0.5, 0.2, 1.3, 0.4]]), "leaves the picture"),
])
def test_invalid_boxes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
