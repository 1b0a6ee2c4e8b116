"""The embedded photos: rendered packaging with nutrition tables, a function of (seed, split, index) alone.

`render_scene` draws one; `SPLITS` and `EXTRA_SPLITS` say how many there are; `THINGS` are the names of everything else
on the packs; `planted_faults` says where the audit has something to find.
"""

import random
import zlib
from dataclasses import dataclass

from helpers.scenes.compose import compose_scene
from helpers.scenes.layout import MIX
from helpers.scenes.things import SHAPES

SPLITS = {"train": 1083, "selection": 100, "val": 123}
#: what `val` has too few of, for measuring alone: pictures with two to four nutrition tables, each at least LEAST of
#: the picture wide and high; and pictures without one, every other of these with a table of another kind
EXTRA_SPLITS = {"val-multi": 100, "val-none": 100}
THINGS = tuple(SHAPES)
TABLES = ("cooking table", "price table", "dosage table", "drug facts")  # tables of another kind
LEAST = 0.08  # about the side of an image token
_MOST = 10**8


@dataclass
class Scene:
    """One photo and what is in it. Boxes are xyxy in 0-1 of the picture as shown (after the EXIF orientation).

    tables: (category name of `boxes.CATEGORIES`, box), one per nutrition panel. things: (name of `THINGS`, box). Every
    box is the tight axis-aligned hull of what is visible. rotation: degrees by which the pack stands turned
    counter-clockwise in the picture as shown.
    """

    image_id: str
    jpeg: bytes
    width: int
    height: int
    meta: dict[str, str]
    tables: list[tuple[str, tuple[float, float, float, float]]]
    things: list[tuple[str, tuple[float, float, float, float]]]
    rotation: int


def planted_faults(seed: int, split: str) -> dict[str, list]:
    """What is wrong on purpose, as often as in the real data: indices in `split` (none outside of SPLITS).

    zero_area: one box there has no area. exif: stored unrotated with an EXIF orientation tag; width, height and boxes
    follow the picture as shown. same_product: pairs (first, second), two photos of one barcode.
    """
    if split not in SPLITS:
        return {"zero_area": [], "exif": [], "same_product": []}
    empty, turned, pairs = (2, 3, 2) if split == "train" else (1, 1, 1)
    indices = random.Random(f"{seed}/{split}/faults").sample(range(SPLITS[split]), empty + turned + 2 * pairs)
    twins = indices[empty + turned:]
    return {"zero_area": sorted(indices[:empty]), "exif": sorted(indices[empty:empty + turned]),
            "same_product": sorted(tuple(sorted(twins[i:i + 2])) for i in range(0, 2 * pairs, 2))}


def barcode_of(seed: int, split: str, product: int) -> str:
    """The 13 digits of a product: different for every product of every split of SPLITS (a product is an index)."""
    code = list(SPLITS).index(split) if split in SPLITS else 3 + zlib.crc32(split.encode()) % 9997
    number = ((code * _MOST + product) * 387_420_489_007 + zlib.crc32(str(seed).encode()) * 1_000_003) % 10**12
    digits = f"{number:012d}"
    total = sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits))
    return digits + str(-total % 10)


def render_scene(seed: int, index: int, split: str) -> Scene:
    """Draw scene `index` of `split`, 512 pixels on its long side: the same bytes in any process, in any order.

    index: below the split's size, or below 10**8 for a split of another name (such as "base"); ValueError otherwise.
    """
    if split in EXTRA_SPLITS:
        return _drawn_until(seed, index, split)
    count = SPLITS.get(split, _MOST)
    if not 0 <= index < count:
        raise ValueError(f"scenes: index {index} is outside of split {split!r}, whose scenes are 0 to {count - 1}.")
    faults = planted_faults(seed, split)
    product = next((a for a, b in faults["same_product"] if b == index), index)
    digits, number = barcode_of(seed, split, product), 1 if product == index else 2
    jpeg, (width, height), tables, things, rotation = compose_scene(
        f"{seed}/{split}", index, product, digits, stored_turned=index in faults["exif"],
        needs_panel=index in faults["zero_area"], stand_ins=split not in SPLITS)
    if index in faults["zero_area"]:
        name, (x0, y0, _, y1) = tables.pop() if tables else ("nutrition-table", (0.3, 0.3, 0.7, 0.6))
        tables.append((name, (x0, y0, x0, y1)))
    meta = {"barcode": digits, "off_image_id": str(number), "image_url": f"embedded://scenes/{seed}/{split}/{index}"}
    return Scene(f"{digits}_{number}", jpeg, width, height, meta, tables, things, rotation)


def _drawn_until(seed: int, index: int, split: str) -> Scene:
    """A scene of EXTRA_SPLITS: drawn again and again until it shows what its split is for."""
    if not 0 <= index < EXTRA_SPLITS[split]:
        raise ValueError(f"scenes: index {index} is outside of split {split!r}, whose scenes are 0 to "
                         f"{EXTRA_SPLITS[split] - 1}.")
    for attempt in range(index * 1000, index * 1000 + 1000):
        rng = random.Random(f"{seed}/{split}/{attempt}/panels")
        stand_in = rng.choice(TABLES) if index % 2 else ""
        panels = [rng.choice(list(MIX)[:1] * 3 + list(MIX)[1:-1]) for _ in range(rng.choice([2, 2, 3, 4]))]
        digits = barcode_of(seed, split, attempt)
        jpeg, (width, height), tables, things, rotation = compose_scene(
            f"{seed}/{split}", attempt, attempt, digits, panels=panels if split == "val-multi" else [stand_in])
        other = sum(name in TABLES for name, _ in things)
        if split == "val-multi":
            fits = 2 <= len(tables) <= 4 and min(min(x1 - x0, y1 - y0) for _, (x0, y0, x1, y1) in tables) >= LEAST
        else:
            fits = not tables and (other > 0) == (index % 2 > 0)
        if fits:
            meta = {"barcode": digits, "off_image_id": "1", "image_url": f"embedded://scenes/{seed}/{split}/{index}"}
            return Scene(f"{digits}_1", jpeg, width, height, meta, tables, things, rotation)
    raise AssertionError(f"no scene {index} of {split} in 1000 draws")
