"""Box formats, each named in full, and the few operations that detection needs.

A set of boxes is a float64 array `[N, 4]`; none at all is `[0, 4]`. A name such as `yxyx_unit` says the
order of the four numbers and their unit:

- `unit`: shares of the picture's width and height, 0 to 1, origin top left
- `px`: pixels of the picture as shown (after EXIF), as edges: 0 to width, 0 to height
- `1000`: whole thousandths of width and height, 0 to 1000, the numbers that Qwen2-VL reads and writes

Every function takes lists or arrays and raises `ValueError` for another shape, for NaN or infinity, and for
boxes whose corners are swapped. A box without area is valid here: whether to keep it is the data's question.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

CATEGORIES = ("nutrition-table", "nutrition-table-small", "nutrition-table-small-energy",
              "nutrition-table-text")  # the order is that of category_id, 0 to 3


def _checked(boxes: ArrayLike) -> np.ndarray:
    """`boxes` as a new float64 array [N, 4] of finite corner boxes; an empty list becomes [0, 4]."""
    array = np.array(boxes, dtype=np.float64)
    if array.size == 0 and array.ndim < 3 and array.shape[-1] in (0, 4):
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes have shape {array.shape}; expected [N, 4], one row of four numbers a box")
    for wrong, why in ((~np.isfinite(array).all(axis=1), "a coordinate that is not finite"),
                       ((array[:, 2:] < array[:, :2]).any(axis=1), "swapped corners; expected the smaller one first")):
        if wrong.any():
            raise ValueError(f"box {array[wrong][0].tolist()} has {why}")
    return array


def yxyx_unit_to_xyxy_unit(boxes: ArrayLike) -> np.ndarray:
    """[y0, x0, y1, x1] to [x0, y0, x1, y1], both in 0-1: the data set's order to the model's. [N, 4] -> [N, 4]."""
    return _checked(boxes)[:, [1, 0, 3, 2]]


def xyxy_unit_to_yxyx_unit(boxes: ArrayLike) -> np.ndarray:
    """[x0, y0, x1, y1] to [y0, x0, y1, x1], both in 0-1. [N, 4] -> [N, 4]."""
    return _checked(boxes)[:, [1, 0, 3, 2]]


def xyxy_unit_to_xyxy_px(boxes: ArrayLike, width: float, height: float) -> np.ndarray:
    """0-1 to pixel edges of a picture of `width` x `height`; not rounded. [N, 4] -> [N, 4]."""
    return _checked(boxes) * [width, height, width, height]


def xyxy_px_to_xyxy_unit(boxes: ArrayLike, width: float, height: float) -> np.ndarray:
    """Pixel edges of a picture of `width` x `height` to 0-1; not clipped. [N, 4] -> [N, 4]."""
    return _checked(boxes) / [width, height, width, height]


def xyxy_unit_to_xyxy_1000(boxes: ArrayLike) -> np.ndarray:
    """0-1 to whole thousandths, rounded to the nearest: int64 [N, 4] in 0-1000.

    Raises `ValueError` for a coordinate outside 0-1 (by more than 1e-6).
    """
    array = _checked(boxes)
    outside = ((array < -1e-6) | (array > 1 + 1e-6)).any(axis=1)
    if outside.any():
        raise ValueError(f"box {array[outside][0].tolist()} leaves the picture; expected 0 to 1")
    return np.rint(array * 1000).astype(np.int64)


def area(boxes: ArrayLike) -> np.ndarray:
    """Width times height of corner boxes, [N], in the square of their unit (for unit boxes: share of the picture)."""
    array = _checked(boxes)
    return (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])


def pairwise_iou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Intersection over union of each box of `a` [N, 4] with each of `b` [M, 4]: float64 [N, M] in 0-1.

    Corner boxes of one order and unit. Two boxes without area have IoU 0, not NaN.
    """
    import torch  # here, so that reading and rendering data does not wait for torch
    from torchvision.ops import box_iou

    return np.nan_to_num(box_iou(torch.from_numpy(_checked(a)), torch.from_numpy(_checked(b))).numpy(), nan=0.0)


def distinct(boxes: ArrayLike, labels: Sequence[str]) -> list[int]:
    """Which of N corner boxes [N, 4] are not drawn again, that is have no IoU above .5 with a kept one before: indices,
    ascending.

    Non-maximum suppression with the first box as the best. Boxes with two of the N `labels` are one thing only where
    both labels are kinds of nutrition table (CATEGORIES).
    """
    import torch  # here, as above
    from torchvision.ops import batched_nms

    names = ["" if label in CATEGORIES else label for label in labels]
    kinds = torch.tensor([names.index(name) for name in names], dtype=torch.int64)
    first = torch.arange(len(names), 0, -1, dtype=torch.float64)
    return batched_nms(torch.from_numpy(_checked(boxes)), first, kinds, 0.5).tolist()


def reading_order(xyxy: ArrayLike) -> np.ndarray:
    """Indices [N] that sort corner boxes (x first) line by line, left to right within a line.

    A box stands on the current line when its top is above the middle of the line's topmost box.
    """
    array = _checked(xyxy)
    lines: list[list[int]] = []
    for index in np.lexsort(array[:, [2, 3, 0, 1]].T).tolist():  # by y0, then x0, y1, x1
        if lines and array[index, 1] < array[lines[-1][0], [1, 3]].mean():
            lines[-1].append(index)
        else:
            lines.append([index])
    in_lines = [sorted(line, key=lambda i: tuple(array[i])) for line in lines]
    return np.array([index for line in in_lines for index in line], dtype=np.int64)
