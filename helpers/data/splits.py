"""Which pictures are train, selection and val: as the source says, else carved by groups that show one thing.

A list, or a folder named after a split, is a statement. A word in a longer name is a guess: it decides only where it
tells pictures apart.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet

from helpers.data.schema import SPLIT_NAMES, DataError, empty_split, read_text, read_yaml, refusing

if TYPE_CHECKING:  # they import from here
    from helpers.data.matching import Found, Pictures

UNLISTED = "in no list"
_KNOWN = {
    "val": re.compile("val(id|idation)?(set)?|dev(set)?|eval(uation)?(set)?"),
    "test": re.compile("test(ing)?(set)?"),
    "selection": re.compile("selection"),
    "train": re.compile("train(ing)?(set)?"),
}  # of a picture that is in several lists, the first split here


def split_name(name: str) -> str:
    """`name` of a folder, file or split as this project says it: "Training" becomes "train"; others are kept."""
    return next((split for split, known in _KNOWN.items() if known.fullmatch(name.lower())), name.lower())


def split_of(path: Path, root: Path) -> str:
    """The split that the place of a file or folder below `root` names, or "".

    The name of a folder decides, the nearest first; then a word in a folder's name ("train_images"), then one in the
    last name ("instances_val2017.json").
    """
    *folders, last = path.relative_to(root).parts or ("",)
    whole = [split_name(part) for part in (last, *reversed(folders))]
    words = [_word(part) for part in (*reversed(folders), last)]
    return next((name for name in (*whole, *words) if name in _KNOWN), "")


def _word(name: str) -> str:
    """The split that the first fitting word of a longer name means ("instances_val2017", "TrainImages"), or ""."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return next((split for word in words if (split := split_name(word.rstrip("0123456789"))) in _KNOWN), "")


# --- what lists and names say -----------------------------------------------------------------------------------------


def by_place(found: list[Found], pictures: Pictures) -> dict[str, list[Found]]:
    """`found`, by the split that counts, "" where nothing names one.

    That is the one of a list among the files, else the one that its own file says, else that of the picture's folder,
    else, where every picture has one, that of a word in its name.
    """
    root, lists = pictures.root, _listed(pictures, [one.path for one in found])
    said = set(lists.values())  # splits that are more than a guess
    rest = UNLISTED if "train" in said else "train" if said else ""
    by_name = {split: all(_word(one.path.stem) == split and not split_of(one.path.parent, root) for one in found
                          if one.split == split) for split in {one.split for one in found}}  # fmt: skip
    new: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        given = "" if by_name[one.split] else one.split  # their own names say so, and no folder
        split = lists.get(one.path) or given or split_of(one.path.parent, root)
        said |= {split_name(part) for part in one.path.parent.relative_to(root).parts} & {split}
        new[split or rest].append(one)
    if set(new) == {""}:
        guessed: dict[str, list[Found]] = defaultdict(list)
        for one in found:
            guessed[_word(one.path.stem)].append(one)
        if len(guessed) > 1 and "" not in guessed:
            print(f"data: {' and '.join(sorted(guessed))} are what the names of the pictures say")
            return guessed
    return new if said or len(new) > 1 else {"": found}


def _listed(pictures: Pictures, annotated: list[Path]) -> dict[Path, str]:
    """{picture: split} by a data.yaml and by lists named after a split (ImageSets/Main/val.txt, train.txt)."""
    splits: dict[Path, set[str]] = defaultdict(set)
    others = {*pictures.files} - {*annotated}
    for file in pictures.all:
        for split, place in _statements(file, pictures.root):
            found = [picture for picture in annotated if picture.is_relative_to(place)]
            for line in read_text(place).splitlines() if place.is_file() else ():
                found += pictures.search(line.strip(), place, "", others)[0]
            for picture in found:
                splits[picture].add(split)
    both = [picture for picture, own in splits.items() if {"train", "val"} <= own]
    if both and not any("train" in own and "val" not in own for own in splits.values()):
        print(f"data: {pictures.root} names the same {len(both)} pictures as train and as val: val is carved from them")
        return {picture: "train" if "val" in own else min(own) for picture, own in splits.items()}
    if both:
        print(f"data: {pictures.root}: {len(both)} pictures are in the lists of train and of val, and stay in val "
              "alone")
    order = [*_KNOWN, "trainval"]
    first = {picture: min(own, key=order.index) for picture, own in splits.items()}
    return {picture: "train" if split == "trainval" else split for picture, split in first.items()}


def _statements(file: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """(split, a folder or a list of pictures) for each that `file` names, or is."""
    split = file.stem if file.stem == "trainval" else split_name(file.stem)
    other_task = file.parents[1].name == "ImageSets" and file.parent.name != "Main"  # of VOC: Segmentation, Layout
    if file.suffix == ".txt" and split in (*_KNOWN, "trainval") and not other_task:
        yield split, file
    config = read_yaml(file)
    for name in ("train", "val", "valid", "test") if "names" in config else ():
        with refusing(f"{file}: {name}", "a folder, or a list of folders or of pictures"):
            entries = config.get(name) or []
            for entry in [entries] if isinstance(entries, str) else entries:
                place = _below(root, file.parent, config.get("path"), entry)
                if place is None and entry.endswith(".txt"):
                    raise FileNotFoundError(f"{entry!r} is not there")
                if place:
                    yield split_name(name), place


def _below(root: Path, base: Path, path: Any, entry: str) -> Path | None:
    """What a data.yaml in folder `base` calls `entry`: the longest end of it that is there, also of the path of another
    machine; None where nothing is."""
    parts = [part for text in (path or "", entry) for part in PureWindowsPath(str(text)).parts
             if part not in (".", "..") and not part.endswith("\\")]  # fmt: skip
    ends = [folder.joinpath(*parts[start:]) for start in range(len(parts)) for folder in (base, root)]
    ends += [root] if not parts or parts[-1] == root.name else []
    return next((end for end in ends if os.path.exists(end)), None)  # False too for what can be no path


# --- what is carved ---------------------------------------------------------------------------------------------------


def arrange(found: dict[str, datasets.Dataset], where: str, val_share: float, seed: int) -> dict[str, datasets.Dataset]:
    """train / selection / val from the splits that a source has; what is decided here is printed."""
    merged: dict[str, list[datasets.Dataset]] = defaultdict(list)
    for name, rows in found.items():
        merged[split_name(name)] += [rows] if len(rows) else []
    found = {name: datasets.concatenate_datasets(parts) for name, parts in merged.items() if parts}
    if "" in found and len(found) > 1:
        raise DataError(f"{where}: {len(found['']):,} pictures belong to no split beside {sorted(found)[1:]}; "
                        "expected each in a folder or list of train, val")  # fmt: skip
    if "val" not in found and "test" in found:
        print(f"data: {where} has no val: its test ({len(found['test'])} pictures) is used as val")
        found["val"] = found.pop("test")
    found = {name or "train": rows for name, rows in found.items()}
    unused = sorted(found.keys() - set(SPLIT_NAMES))
    if unused:
        print(f"data: {where}: not used: "
              + ", ".join(f"{name} ({len(found[name]):,} pictures)" for name in unused))
    if "train" not in found and "val" not in found:
        raise DataError(f"{where} has the splits {', '.join(unused)}; expected train and val")
    train, val = found.get("train", empty_split()), found.get("val")
    if val is None and val_share == 1:
        train, val = empty_split(), train
        print(f"data: all {len(val)} pictures of {where} are val, as val_share=1 says, and train is empty")
    elif val is None:
        train, val = carve(train, max(1, round(len(train) * val_share)), seed)
        if not len(val):
            raise DataError(f"{where} has one picture, and no val can be taken from it; expected two or more")
        print(f"data: {where} has no val: {len(val)} of its {len(train) + len(val)} pictures become val "
              f"(val_share={val_share:g}), copies and products kept together, seed {seed}")
    selection = found.get("selection", empty_split())
    if "selection" not in found and len(train):
        train, selection = carve(train, min(100, max(1, round(len(train) / 10))), seed + 1)
        print(f"data: selection: {len(selection)} pictures taken from train, copies and products kept together, "
              f"seed {seed}")
    return {"train": train, "selection": selection, "val": val}


def carve(split: datasets.Dataset, count: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(the rest, about `count` rows) of `split`: whole groups (`groups_of`), drawn with `seed`, in the old order.

    Where all of it is one group, single pictures are drawn. The rest is never empty.
    """
    keys = groups_of(split)
    if keys.nunique() == 1:
        keys = pd.Series(range(len(keys)))
    groups, sizes = sorted(set(keys)), keys.value_counts()  # sorted: the draw does not hang on the rows' order
    np.random.default_rng(seed).shuffle(groups)
    small = [group for group in groups if sizes[group] <= max(count, sizes.min())]
    before = sizes[small if len(small) < len(groups) else groups[:-1]].cumsum().shift(fill_value=0)
    taken = keys.isin(before.index[before < count])  # pictures drawn before each group
    return split.select(np.flatnonzero(~taken)), split.select(np.flatnonzero(taken))


def groups_of(split: datasets.Dataset) -> pd.Series:
    """A key for each row; rows of one product, copies of one photo and equal files have the same."""
    rows = zip(split["image_id"], split["meta"], strict=True)
    keys = [(meta or {}).get("barcode") or product_of(image_id) for image_id, meta in rows]
    images = split.select_columns("image").cast_column("image", datasets.Image(decode=False))["image"]
    sizes = [_size(image) for image in images]
    shared = {size for size, count in Counter(sizes).items() if size and count > 1}  # the other files are not read
    groups, first = DisjointSet(keys), {}
    for key, image, size in zip(keys, images, sizes, strict=True):
        if size in shared:
            content = hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).digest()
            groups.merge(key, first.setdefault(content, key))
    return pd.Series([min(groups.subset(key)) for key in keys], dtype=object)


def _size(image: dict[str, Any] | None) -> int:
    """Bytes of a picture's file; 0 where there is none."""
    if not image or (image["bytes"] is None and not Path(image["path"] or "").is_file()):
        return 0
    return len(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).stat().st_size


def product_of(image_id: str) -> str:
    """What a photo's name says it shows: the barcode that it begins with (as Open Food Facts' do), the photo that
    Roboflow made it of ("name.rf.hash"), else the name itself."""
    code = re.match(r"\d*", image_id)[0]  # type: ignore[index]  # matches always
    return code if is_barcode(code) else image_id.partition(".rf.")[0]


def is_barcode(code: str) -> bool:
    """Whether `code` is a GTIN of 8, 12, 13 or 14 digits by its check digit, and no date such as 20260325."""
    if not re.fullmatch(r"\d{8}|\d{12,14}", code) or re.match(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])", code):
        return False
    return sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(reversed(code))) % 10 == 0
