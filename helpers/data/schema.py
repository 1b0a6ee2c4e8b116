"""The one row schema, the error, and what every source shares: columns, classes, texts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import PIL
import yaml
from datasets import Features, Image, List, Value
from datasets.fingerprint import Hasher

from helpers.boxes import CATEGORIES

SPLIT_NAMES = ("train", "selection", "val")

FEATURES = Features(
    {
        "image_id": Value("string"),
        "image": Image(),
        "width": Value("int64"),  # pixels, of the picture as shown
        "height": Value("int64"),
        "meta": {"barcode": Value("string"), "off_image_id": Value("string"), "image_url": Value("string")},
        "objects": {
            "bbox": List(List(Value("float64"))),  # [[y_min, x_min, y_max, x_max]] in 0-1, top-left origin
            "category_id": List(Value("int64")),
            "category_name": List(Value("string")),
        },
    }
)


class DataError(ValueError):
    """A data set that cannot be used: one sentence with the file or field, what was found, what was expected."""


def empty_split() -> datasets.Dataset:
    """A split of the schema without rows."""
    return datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)


def with_columns(split: datasets.Dataset, rows: list[dict[str, Any]]) -> datasets.Dataset:
    """`split` with the columns that `rows` (one dict each) have in place of its own; the pictures are not copied."""
    order = [*FEATURES, *(name for name in split.column_names if name not in FEATURES)]
    split = split.cast_column("image", Image(decode=False))
    for name in rows[0] if rows else []:
        split = split.remove_columns(name) if name in split.column_names else split
        split = split.add_column(name, [row[name] for row in rows], feature=FEATURES[name])
    return split.select_columns(order).cast_column("image", Image())


def workers(rows: int) -> int | None:
    """Processes for work on `rows` pictures; None (no pool) where starting one would cost more than it saves."""
    count = min(os.cpu_count() or 1, 16, rows // 64)
    return count if count > 1 else None


def source_hash(*places: Path) -> str:
    """Hash of the files at `places` (folders with all they hold) and of Pillow's version.

    `datasets` knows a function by its name alone: this in a fingerprint keeps edited code from being served old rows.
    """
    digest = hashlib.sha256(PIL.__version__.encode())
    for place in places:
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def fingerprint(split: datasets.Dataset, *inputs: Any) -> str:
    """Of what is made from `split` by the code in this folder with these `inputs`; for `Dataset.map`."""
    return Hasher.hash([split._fingerprint, source_hash(Path(__file__).parent), inputs])


def categories_of(names: Iterable[str]) -> tuple[str, ...]:
    """The categories of a data set with these names in the order of their ids: the project's own where it has no others
    than these, else its names, sorted."""
    own = {name for name in names if name}
    return CATEGORIES if own <= set(CATEGORIES) else tuple(sorted(own))


def categories_in(splits: Iterable[datasets.Dataset]) -> tuple[str, ...]:
    """The categories of the data set whose splits these are."""
    objects = [entry or {} for split in splits for entry in split["objects"]]
    return categories_of(name for entry in objects for name in entry.get("category_name") or [])


def objects_of(boxes: list[list[float]], names: list[str]) -> dict[str, list]:
    """The `objects` of a row from boxes [y0, x0, y1, x1] in 0-1 and names; an unknown name has the id -1.

    "Nutrition_Table" and "nutrition table" are taken for "nutrition-table".
    """
    plain = [re.sub(r"[\s_]+", "-", name.strip().lower()) for name in names]
    names = [same if same in CATEGORIES else name for same, name in zip(plain, names, strict=True)]
    ids = [CATEGORIES.index(name) if name in CATEGORIES else -1 for name in names]
    return {"bbox": boxes, "category_id": ids, "category_name": names}


@contextmanager
def refusing(where: Any, expected: str) -> Iterator[None]:
    """What goes wrong inside becomes a `DataError`: `where` it was, what happened, what was `expected`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each reader and library has its own kinds
        happened = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(f"{where} cannot be read ({type(error).__name__}: {happened}); expected {expected}") from error


def read_text(file: Path) -> str:
    """The text of an annotation file, UTF-8, or UTF-16 with the mark that Windows puts first."""
    with refusing(file, "UTF-8 text"):
        found = file.read_bytes()
        return found.decode("utf-16" if found[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file holds; nothing for other files and for settings of another program."""
    text = read_text(file) if file.suffix in (".yaml", ".yml") else ""
    with refusing(file, "names: [...]") if "names:" in text else suppress(yaml.YAMLError):
        found = yaml.safe_load(text)
        return found if isinstance(found, dict) else {}
    return {}
