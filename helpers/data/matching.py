"""An annotated picture as its file gives it, and which picture file below a folder it means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from helpers.boxes import CATEGORIES
from helpers.data.pictures import ENDINGS, Head, escaped, files_below
from helpers.data.schema import FEATURES, DataError, objects_of, refusing
from helpers.data.splits import split_of

TOOLS = ("runs", "wandb", "mlruns", "lightning_logs", "checkpoints")  # folders of training programs
BESIDE = ("thumb", "vis", "preview", "overlay", "annotated", "mask", "segmentation", "debug", "plots")  # not the photos


@dataclass(eq=False)
class Found:
    """One annotated picture, from what its file says (up to `file`) to a row."""

    name: str  # the picture's path as written, perhaps of another machine or system
    boxes: list[Any] | None  # a tuple: corners, whatever the order of `kind`; None: listed, and nothing is said of it
    kind: str  # as `frames.to_unit` takes it
    names: list[Any]  # one a box; a number is a category_id
    size: Any = (0, 0)  # (width, height) in pixels, zeros where the file does not give them
    image_id: Any = None
    meta: Any = None
    split: str = ""  # where the file itself says it
    alone: bool = False  # whether the file is of this picture alone
    file: Path = Path()  # paths may start at its folder
    path: Path = Path()  # of the picture
    content: bytes | None = None  # the picture, where it is not read from `path`
    head: Head | None = None  # None: the picture cannot be read

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"its picture is {self.name!r}")
        self.size = tuple(int(float(side or 0)) for side in (*self.size, 0, 0)[:2])
        if not 0 <= min(self.size) <= max(self.size) <= 10**6:
            raise ValueError(f"width and height are {self.size}")

    def row(self) -> dict[str, Any]:
        """The row of the schema; `boxes` are [y0, x0, y1, x1] in 0-1 by now."""
        width, height = self.head.shown if self.head else self.size
        meta, path = self.meta if isinstance(self.meta, dict) else {}, str(self.path)
        names = [CATEGORIES[name] if type(name) is int and 0 <= name < len(CATEGORIES) else str(name)
                 for name in self.names]
        by_path = self.content is None and path == escaped(path)  # Arrow stores UTF-8 alone
        return {
            "image_id": escaped(str(self.image_id)),
            "image": {"path": path if by_path else None, "bytes": self.content},
            "width": width,
            "height": height,
            "meta": {key: "" if meta.get(key) is None else str(meta[key]) for key in FEATURES["meta"]},
            "objects": objects_of(self.boxes or [], [escaped(name) for name in names]),
        }


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def _stem(name: str) -> str:
    """`name` without the ending of a picture; other dots belong to the name."""
    path = Path(name)
    return path.stem if path.suffix.lower() in ENDINGS else name


RULES: dict[str, Callable[[str], str]] = {  # how a name may differ from the file's, from strict to loose
    "in another folder": lambda name: name,
    "in another spelling (case, %20, accents)": _plain,
    "with another ending": lambda name: _stem(_plain(name)),
}


class Pictures:
    """The files of a data set below `root`; its pictures are found by the names that annotations use for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        snapshots = [parent for parent in root.resolve().parents if parent.name == "snapshots"]
        self._homes = [root.resolve(), *(parent.parent / "blobs" for parent in snapshots)]  # of the Hub's cache
        self.all = [path for path in files_below(root) if not set(TOOLS) & set(path.relative_to(root).parts)]
        self.files = [path for path in self.all if path.suffix.lower() in ENDINGS]
        self._by: dict[str, dict[str, list[Path]]] = {rule: defaultdict(list) for rule in RULES}
        for path in self.files:
            if not path.is_symlink() or self._inside(path):
                for rule, key in RULES.items():
                    self._by[rule][key(path.name)].append(path)

    def _inside(self, path: Path) -> bool:
        return any(home in path.resolve().parents for home in self._homes)

    def find(self, found: list[Found]) -> list[Path]:
        """The file that each name means; what was not found under the very name is counted in a printed line.

        First the path as it is written, from the annotation's folder or from `root`; then a file of that name below
        `root` by the first of `RULES` that knows one; then one named as the annotation file itself. A picture of
        another split, and one that another annotation names exactly, is never taken. A file that is not there gets the
        path where it should be, and the audit names it. `DataError` where a path leads out of `root` or two files fit.
        """
        paths = [self._exact(one) for one in found]
        taken, said = {path for path in paths if path}, defaultdict(list)
        for number, one in enumerate(found):
            path, rule = paths[number], ""
            if path is None:
                path, rule = self._search_one(one, one.name, taken)
            if one.alone and _stem(re.split(r"[/\\]", one.name)[-1]) != one.file.stem:
                own, _ = self._search_one(one, one.file.stem, taken)
                if own and path and own != path:
                    raise DataError(f"{one.file} names the picture {one.name!r}, which is {path}, but beside it lies "
                                    f"{own}; expected one picture: correct the name in the file")
                path, rule = (path, rule) if path else (own, "named as the annotation file")
            if path and rule:
                said[rule].append(f"{escaped(one.name)} -> {escaped(str(path.relative_to(self.root)))}")
            paths[number] = path or self._missing(one)
        for rule, names in said.items():
            print(f"data: {len(names)} pictures were found {rule}, such as {names[0]}")
        return paths  # type: ignore[return-value]  # none is None any more

    def _exact(self, one: Found) -> Path | None:
        with refusing(f"{one.file}: the picture path {one.name[:60]!r}", "the path of a file"):
            for base in (one.file.parent, self.root):
                path = Path(os.path.normpath(base / one.name.replace("\\", "/")))
                if self._inside(path) and path.is_file():  # the first raises for a zero byte, the second does not
                    return path
        return None

    def _search_one(self, one: Found, name: str, taken: Collection[Path]) -> tuple[Path | None, str]:
        best, rule = self.search(name, one.file, one.split, taken)
        if len(best) > 1:
            raise DataError(f"{one.file}: the picture {name!r} is {best[0]} or {best[1]}; expected one file of that "
                            "name")
        return (best[0], rule) if best else (None, "")

    def search(self, name: str, file: Path, split: str, taken: Collection[Path]) -> tuple[list[Path], str]:
        """The pictures that `name` in `file` may mean by the first of `RULES` that knows one, and that rule.

        Those whose folders are most like the name's; none of `taken`, and none of another split than `split`, if any.
        """
        *parents, last = Path(unquote(name).replace("\\", "/")).parts or ("",)
        beside = file.relative_to(self.root).parts[:-1] if file.is_relative_to(self.root) else ()
        for rule, key in RULES.items():
            ranked: dict[tuple, list[Path]] = defaultdict(list)
            for path in self._by[rule].get(key(last), ()):
                folders = path.relative_to(self.root).parts[:-1]
                if path not in taken and (not split or split_of(path.parent, self.root) in ("", split)):
                    same = len(os.path.commonprefix([[*map(_plain, folders[::-1])], [*map(_plain, parents[::-1])]]))
                    aside = any(part.lower().startswith(BESIDE) for part in folders)
                    ranked[same, not aside, len(set(folders) & set(beside))].append(path)
            if ranked:
                return ranked[max(ranked)], rule
        return [], ""

    def _missing(self, one: Found) -> Path:
        """Where a picture that is not there should be: inside `root`."""
        name = one.name.replace("\\", "/")
        if any((base / name).exists() for base in (one.file.parent, self.root)):
            raise DataError(f"{one.file}: the picture path {one.name!r} leads out of {self.root}; "
                            "expected a path inside that folder")
        return self.root / (Path(name).name or "no name")
