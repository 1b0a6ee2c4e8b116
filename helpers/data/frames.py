"""What the four numbers of a box mean: their order, unit and frame, decided once for all boxes of a set.

A reading is written `order-unit-frame`. An order is one of `ORDERS`, a unit one of `UNITS`. The frame is what the
numbers are measured in: the picture as `shown` (turned by EXIF), as `stored`, or the size that the file has `declared`.
What a format does not say is found from all boxes together: the one reading in which they lie in their pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from helpers.data.matching import Found
from helpers.data.pictures import SIDEWAYS, Head, turned
from helpers.data.schema import DataError

ORDERS = {
    "xywh": "[x, y, width, height]",
    "xyxy": "[x_min, y_min, x_max, y_max]",
    "cxcywh": "[centre x, centre y, width, height]",
    "yxyx": "[y_min, x_min, y_max, x_max]",
}
UNITS = {"pixels": 0, "unit": 1, "percent": 100, "1000": 1000}  # the number at the picture's far edge
FRAMES = ("shown", "stored", "declared")
USUAL_ORDERS, USUAL_UNITS = ("xywh", "xyxy", "cxcywh"), ("pixels", "unit", "1000")  # tried where nothing is said
ANY = "any order"  # the kind of boxes that may also be this project's own, yxyx
FEW = 0.05  # of the pictures may be left out because their boxes cannot be known; with more the set is refused
MARGIN = 0.02  # of a side: how far a box that lies in its picture may leave it
SAME = 0.005  # of a side: readings that differ by less are one
FAR = 0.8  # of a side: the boxes of a set reach as far in the frame that is theirs
CHANCE = 1e-3  # that all boxes end inside a smaller frame by accident


def left_out(bad: list[str], of: int, where: str, what: str) -> None:
    """Print that these of `of` pictures are not used, and why; `DataError` where they are more than `FEW`."""
    if len(bad) > FEW * of:
        raise DataError(f"{where}: {len(bad)} of {of} pictures {what}; the first is {bad[0]}")
    if bad:
        print(f"data: {len(bad)} of {of} pictures {what}: left out, such as {bad[0]}")


def numbers_of(box: Any) -> list[float] | None:
    """Four finite numbers, perhaps written as text, as floats; None for anything else."""
    try:
        numbers = [float(value) for value in box if not isinstance(value, bool)]
    except (TypeError, ValueError, OverflowError):
        return None
    whole = isinstance(box, list | tuple) and len(box) == len(numbers) == 4 and all(map(math.isfinite, numbers))
    return numbers if whole else None


def around(points: Any) -> tuple[float, ...] | str:
    """The corners of the upright box around [[x, y], …] or [x, y, x, y, …]; the points as text where they are none."""
    try:
        xy = np.array(points, np.float64).reshape(-1, 2)
        if len(xy) > 1 and np.isfinite(xy).all():
            return tuple(np.concatenate([xy.min(0), xy.max(0)]).tolist())
    except (TypeError, ValueError, OverflowError):
        pass
    return f"the points {str(points)[:60]}"


def to_unit(pictures: list[Found], kind: str, box_format: str | None, where: str) -> list[list[list[float]] | None]:
    """The boxes of each picture as [y0, x0, y1, x1] in 0-1 of it as shown; None where they cannot be known.

    `kind`: what the format says of its boxes, `order-unit`, `order`, "" for nothing, or `ANY`. `box_format` (the
    parameter) overrules it. Boxes are converted as they stand: inverted, empty or outside, they stay so for the audit.
    `DataError` where no reading fits, or two fit and more than `FEW` of the pictures depend on it.
    """
    if not any(one.boxes for one in pictures):
        return [[] for _ in pictures]
    boxes = Boxes(pictures)
    index = boxes.index
    pool = _meant(boxes, kind, box_format, where)
    chosen = pool[0]
    unknown = {i for other in pool[1:] for i in index[boxes.differ(chosen, other)]}
    if unknown:
        formats = dict.fromkeys(one.removesuffix("-shown") for one in pool)
        left_out([str((pictures[i].boxes or [])[0]) for i in sorted(unknown)], len(set(index)), where,
                 f"have boxes that may be {' or '.join(map(explained, pool[:3]))}: nothing decides, give box_format, "
                 f"one of {', '.join(formats)}")
    if chosen.endswith("declared") and boxes.swapped.any():
        raise DataError(f"{where}: {len(set(index[boxes.swapped]))} pictures, such as that of the boxes "
                        f"{pictures[index[boxes.swapped][0]].boxes}, lie on another side than when they were labelled; "
                        "turn them back")  # fmt: skip
    order_unit = chosen.rsplit("-", 1)[0]
    if order_unit != kind:
        print(f"data: boxes are read as {order_unit}: {explained(order_unit)}, by box_format" if box_format else
              f"data: boxes are read as {order_unit}: {explained(order_unit)}, found from all {len(index)} boxes")
    boxes.tell_frame(chosen)
    result: list[list[list[float]] | None] = [None if i in unknown else [] for i in range(len(pictures))]
    for i, (x0, y0, x1, y1) in zip(index, boxes.readings[chosen].tolist(), strict=True):
        if (known := result[i]) is not None:
            known.append([y0, x0, y1, x1])
    return result


def _meant(boxes: Boxes, kind: str, box_format: str | None, where: str) -> list[str]:
    """The reading that counts, and those that nothing rules out beside it."""
    order, unit, frame = (*(box_format or kind).split("-"), "", "")[:3] if box_format or kind != ANY else ("", "", "")
    said, others = [], []
    if unit:
        boxes.read(order, unit, [frame] if frame else FRAMES if unit == "pixels" else ["shown"])
        said = list(boxes.readings)
    if not box_format or not unit:
        for other in [order] if order and not unit else ORDERS if kind == ANY else USUAL_ORDERS:
            for scale in USUAL_UNITS[: 2 if unit else 3]:
                boxes.read(other, scale, FRAMES if scale == "pixels" else ["shown"])
        others = [reading for reading in boxes.readings if reading not in said]
    pool = boxes.fitting(said, others, where)
    pool = [one for one in pool if not any(boxes.beats(other, one) for other in pool if other != one)] or pool
    chosen = pool[0]
    if "-unit-" not in chosen and not box_format:  # or of another unit, by where they end
        for scale in ("pixels", "1000", "percent"):
            boxes.read(chosen.split("-")[0], scale, ["shown"])
        same_order = [other for other in boxes.readings if other.split("-")[0] == chosen.split("-")[0]]
        pool += [other for other in same_order if other not in pool and boxes.narrower(other, chosen)]
    if len(pool) == 1 and "-1000-" in chosen and not said and not boxes.far(chosen, boxes.known, 0.9):
        pool.append(f"{chosen.split('-')[0]}-pixels-shown")  # of pictures that have been made smaller
    return pool


def explained(reading: str) -> str:
    """A reading in words."""
    order, unit, frame = (*reading.split("-"), "")[:3]
    frames = {"": "", "shown": " of the picture", "stored": " of the picture before EXIF turns it",
              "declared": " of the size that the file gives"}  # fmt: skip
    return f"{ORDERS[order]} in {f'0-{UNITS[unit]}' if UNITS[unit] else unit}{frames[frame]}"


class Boxes:
    """All boxes of a set [N, 4] and, for each reading, where it puts them: corners in 0-1 of the picture as shown."""

    def __init__(self, pictures: list[Found]) -> None:
        boxes = [(box, i, one) for i, one in enumerate(pictures) for box in one.boxes or []]
        self.index = np.array([i for _, i, _ in boxes])  # of each box's picture
        self.numbers = np.array([numbers_of(box) for box, _, _ in boxes], np.float64)
        self.corners = np.array([isinstance(box, tuple) for box, _, _ in boxes])
        heads = [one.head or Head(one.size, 1) for _, _, one in boxes]
        self.known = np.array([one.head is not None for _, _, one in boxes])  # the others decide nothing
        self.orientation = np.array([one.orientation for one in heads])
        self.shown = np.maximum([one.shown for one in heads], 1).astype(float)
        self.stored = np.maximum([one.stored for one in heads], 1).astype(float)
        declared = np.array([one.size for _, _, one in boxes], float)
        self.as_shown = _alike(declared, self.shown)
        as_stored = ~self.as_shown & _alike(declared, self.stored)
        self.other = (declared > 0).all(axis=1) & ~self.as_shown & ~as_stored
        self.swapped = self.other & _alike(declared[:, ::-1], self.shown)  # a picture that was turned, or a wrong size
        same_side = (declared[:, 0] > declared[:, 1]) == (self.stored[:, 0] > self.stored[:, 1])
        self.by_size = as_stored | (self.other & same_side & np.isin(self.orientation, SIDEWAYS))  # before EXIF
        self.declared = np.select([self.other[:, None], as_stored[:, None]], [declared, self.stored], self.shown)
        self.readings: dict[str, np.ndarray] = {}
        self.sizes: dict[str, np.ndarray] = {}  # width and height of the frame of each box, in the unit of the reading

    def read(self, order: str, unit: str, frames: Iterable[str]) -> None:
        """Add the readings in these frames, but for one that puts every box where an earlier one of them does."""
        a, b, c, d = self.numbers.T
        corners = {"xywh": [a, b, a + c, b + d], "xyxy": [a, b, c, d], "yxyx": [b, a, d, c],
                   "cxcywh": [a - c / 2, b - d / 2, a + c / 2, b + d / 2]}[order]  # fmt: skip
        written = np.where(self.corners[:, None], self.numbers, np.stack(corners, axis=1))
        for frame in frames:
            stored = self.by_size if frame == "declared" else np.full(len(written), frame == "stored")
            size = np.full_like(self.shown, UNITS[unit]) if UNITS[unit] else getattr(self, frame)
            xyxy = written / np.tile(size, 2)
            for orientation in range(2, 9):
                turn = stored & (self.orientation == orientation)
                y0, x0, y1, x1 = turned(xyxy[turn][:, [1, 0, 3, 2]].T, orientation)
                xyxy[turn] = np.stack([x0, y0, x1, y1], axis=1)
            earlier = [r for r in self.readings if r.startswith(f"{order}-{unit}-")]
            if not any((np.abs(self.readings[r] - xyxy) < SAME).all() for r in earlier):
                self.readings[f"{order}-{unit}-{frame}"], self.sizes[f"{order}-{unit}-{frame}"] = xyxy, size

    def fits(self, name: str) -> np.ndarray:
        """Whether each box lies in its picture with two sides longer than nothing: bool [N]."""
        xyxy, unit = self.readings[name], name.split("-")[1]
        inside = np.all((xyxy > -MARGIN) & (xyxy < 1 + MARGIN), axis=1) & np.all(xyxy[:, 2:] > xyxy[:, :2], axis=1)
        return inside & ((self.numbers.max(axis=1) > 1.5) | (unit == "unit"))  # 0.4 is no pixel

    def only(self, one: str, other: str) -> int:
        """How many boxes fit in reading `one` and not in the other."""
        return int((self.fits(one) & ~self.fits(other) & self.differ(one, other) & self.known).sum())

    def differ(self, one: str, other: str) -> np.ndarray:
        """Which boxes the two readings put elsewhere: bool [N]."""
        return np.any(np.abs(self.readings[one] - self.readings[other]) >= SAME, axis=1)

    def fitting(self, said: list[str], others: list[str], where: str) -> list[str]:
        """The readings that may be meant: those that were `said`, unless most boxes fit in another alone."""
        known = max(int(self.known.sum()), 1)
        share = {name: (self.fits(name) & self.known).sum() / known for name in (*said, *others)}
        if not self.known.any():
            return [*said, *others][:1]
        fit = [name for name in others if share[name] >= 1 - FEW]
        stronger = [name for name in fit if all(
            self.only(name, one) > max(0.1 * known, 20 * self.only(one, name)) for one in said)]
        best = max((share[name] for name in said), default=0)
        if said and best >= 0.5 and not stronger:
            return said
        if stronger and best < 0.5:
            return stronger
        box = self.numbers[~self.fits(said[0])][0].tolist() if said else self.numbers[0].tolist()
        expected = explained(said[0]) if said else "boxes in pixels, 0-1 or 0-1000"
        hint = f"; they would fit as {', '.join(name.rsplit('-', 1)[0] for name in stronger)}" if stronger else ""
        raise DataError(f"{where}: too many boxes, such as {box}, do not lie in their pictures; expected {expected}"
                        f"{hint}: correct the files, or give box_format")  # fmt: skip

    def beats(self, one: str, other: str) -> bool:
        """Whether reading `one` is right where it differs from `other`."""
        differ = self.differ(one, other) & self.known
        alone, against = self.only(one, other), self.only(other, one)
        if alone >= max(1, 0.02 * differ.sum(), 20 * against):
            return True
        (order, unit, _), (other_order, other_unit, _) = one.split("-"), other.split("-")
        if order != other_order and unit == other_unit:
            return False
        if one.endswith("shown") and other.endswith("stored"):  # the tool knew how EXIF shows the pictures
            sideways = differ & np.isin(self.orientation, SIDEWAYS)
            return not against and bool(sideways.any() and self.as_shown[sideways].all())
        return self.narrower(one, other)

    def narrower(self, one: str, other: str) -> bool:
        """Whether the boxes fill the frame of `one`, and that of `other` is so much larger that it is no chance."""
        differ = self.differ(one, other) & self.known
        times = self.sizes[one][differ] / self.sizes[other][differ]
        chance = np.log(times[times < FAR]).sum() < math.log(CHANCE)
        return bool(chance and self.far(one, differ, FAR) and self.only(other, one) <= 0.01 * differ.sum())

    def far(self, name: str, boxes: np.ndarray, share: float) -> bool:
        """Whether these boxes reach `share` of the frame on both sides."""
        return bool((self.readings[name][boxes][:, 2:].max(axis=0, initial=0) >= share).all())

    def tell_frame(self, chosen: str) -> None:
        """Print what was decided about pictures that EXIF turns, or whose size is not the one that the file gives."""
        declared = chosen.endswith("declared")
        if exif := len(set(self.index[(self.orientation > 1) & self.known])):
            how = "as the file sizes them" if declared else f"as {chosen.split('-')[2]}"
            print(f"data: EXIF turns {exif} pictures; their boxes are read in the pictures {how}")
        if "-pixels-" in chosen and (other := len(set(self.index[self.other & self.known]))):
            print(f"data: {other} pictures have another size than their annotations say; their boxes are in pixels of "
                  f"{'that size' if declared else 'the picture'}")


def _alike(sizes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which sizes [N, 2] are equal but for rounding: bool [N]."""
    return (np.abs(sizes - others) <= np.maximum(2, 0.005 * others)).all(axis=1)
