"""Picture files of a local folder: where they are, how large, which split; shared by the annotation formats."""

from __future__ import annotations

import io
import mimetypes
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import datasets
import numpy as np
from datasets import List, Value
from PIL import Image as PILImage
from PIL import ImageOps

from helpers.data.schema import DataError
from helpers.data.splits import split_of

KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]  # EPS starts programs
try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    KINDS.append("HEIF")
except ImportError:
    pass
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")  # the brands of such files
LEFTOVERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")  # folders of systems and their programs
TOOLS = ("runs", "wandb", "mlruns", "lightning_logs", "checkpoints")  # folders of training programs
BESIDE = ("thumb", "vis", "preview", "overlay", "annotated", "mask", "segmentation", "debug", "plots")  # not the photos
ENDINGS = {".heic", ".heif"} | {end for end, kind in PILImage.registered_extensions().items() if kind in KINDS}
SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that swap width and height
NAN_BOX = [float("nan")] * 4  # stands for a box that cannot be read, until the audit names it


def files_below(root: Path, pattern: str = "*", *, links: bool = False, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below `root` whose path ends in `pattern`, in the order of their names; with `links` those of linked
    folders too, but none that leads to one of its own parents (`above`).

    What is hidden or in a folder of `LEFTOVERS` is never data. `DataError` for a folder that may not be read.
    """
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error.strerror}); check its rights") from None
    above = (*above, root.resolve())
    for path in entries:
        if path.name.startswith(".") or path.name in LEFTOVERS:
            continue
        if path.is_dir():
            if not path.is_symlink() or (links and path.resolve() not in above):
                yield from files_below(path, pattern, links=links, above=above)
        elif path.match(pattern) and (path.is_file() or not path.exists()):  # a link to nothing too, but no pipe
            yield path


def _stored(picture: PILImage.Image) -> tuple[int, int, int]:
    """Width and height as stored, and EXIF orientation: 1 (upright, also where there is none or another value) to 8."""
    value = picture.getexif().get(0x0112, 1)
    orientation = value if value in range(2, 9) else 1
    turned = picture.format == "TIFF" and orientation in SIDEWAYS  # Pillow gives its size as shown
    return (*(picture.size[::-1] if turned else picture.size), orientation)


class Head(NamedTuple):
    """What the head of a picture file says: (width, height) in pixels, and how EXIF turns the picture, 1 to 8."""

    stored: tuple[int, int]
    orientation: int

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) as EXIF shows the picture."""
        return self.stored[::-1] if self.orientation in SIDEWAYS else self.stored


def head(image: dict[str, Any]) -> Head | None:
    """The head of an undecoded picture; None where it cannot be read."""
    try:
        with open_picture(image) as picture:
            *stored, orientation = _stored(picture)
            return Head((stored[0], stored[1]), orientation)
    except Exception:  # the audit reads every picture to its end and names what it finds
        return None


def completed(path: Path) -> bytes | None:
    """The bytes of a JPEG of which only the end is lost, with an end, so that it decodes; None for any other file.

    What is lost is grey: at most 2 % of the pixels here.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(max(file.seek(0, io.SEEK_END) - 64, 0))
            if start != b"\xff\xd8" or b"\xff\xd9" in file.read():
                return None
        found = path.read_bytes()
        with suppress(OSError), open_picture({"bytes": found, "path": None}) as picture:
            picture.load()
            return None  # whole, with something behind its end
        found += b"\xff\xd9"
        with open_picture({"bytes": found, "path": None}) as picture:
            grey = (np.asarray(picture.convert("RGB")) == 128).all(axis=2).mean()
    except Exception:  # as in `head`
        return None
    return found if grey <= 0.02 else None


def escaped(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are not UTF-8 as \\udc80 to \\udcff."""
    return name.encode(errors="backslashreplace").decode()


class Wanted(NamedTuple):
    """A picture as an annotation names it."""

    name: str  # a path as written, perhaps of another machine or system
    file: Path  # the annotation file: paths may start at its folder
    split: str  # "" where the annotation names none
    stem: str = ""  # the annotation file's own name, where it belongs to one picture


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold()


RULES: dict[str, Callable[[str], str]] = {  # how a name may differ from the file's, from strict to loose
    "in another folder": lambda name: name,
    "in another spelling (case, %20, accents)": _plain,
    "with another ending": lambda name: _stem(_plain(name)),
}


def _stem(name: str) -> str:
    """`name` without the ending of a picture; other dots belong to the name."""
    path = Path(name)
    return path.stem if path.suffix.lower() in ENDINGS else name


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

    def find(self, wanted: list[Wanted]) -> list[Path]:
        """The file that each name means; what was not found under the very name is counted in a printed line.

        First the path as it is written, from the annotation's folder or from `root`; then a file of that name below
        `root` by the first of `RULES` that knows one; then one named as the annotation file itself. A picture of
        another split, and one that another annotation names exactly, is never taken. A file that is not there gets the
        path where it should be, and the audit names it. `DataError` where a path leads out of `root` or two files fit.
        """
        found = [self._exact(one) for one in wanted]
        taken, said = set(found), defaultdict(list)
        for number, one in enumerate(wanted):
            if found[number] is None or (one.stem and _stem(one.name) != one.stem):
                path, rule = self._search(one, one.name, taken)
                if one.stem and _stem(one.name) != one.stem:
                    own, _ = self._search(one, one.stem, taken)
                    first = found[number] or path
                    if own and first and own != first:
                        raise DataError(f"{one.file} names the picture {one.name!r}, which is {first}, but beside it "
                                        f"lies {own}; expected one picture: correct the name in the file")
                    path, rule = (path, rule) if path else (own, "named as the annotation file")
                if found[number] is None and path:
                    found[number] = path
                    said[rule].append(f"{escaped(one.name)} -> {escaped(str(path.relative_to(self.root)))}")
        for rule, names in said.items():
            print(f"data: {len(names)} pictures were found {rule}, such as {names[0]}")
        return [path or self._missing(one) for path, one in zip(found, wanted, strict=True)]

    def _exact(self, one: Wanted) -> Path | None:
        try:
            for base in (one.file.parent, self.root):
                path = base / one.name.replace("\\", "/")
                if path.is_file() and self._inside(path):
                    return path
        except (OSError, ValueError) as error:  # too long, or with a zero byte
            reason = f"the picture path {one.name[:60]!r} cannot be one ({error})"
            raise DataError(f"{one.file}: {reason}; expected the path of a file") from None
        return None

    def _search(self, one: Wanted, name: str, taken: set[Path | None]) -> tuple[Path | None, str]:
        """The file for `name` by the first rule that knows one, and the rule."""
        parts = Path(unquote(name).replace("\\", "/")).parts or ("",)
        beside = one.file.relative_to(self.root).parts[:-1] if one.file.is_relative_to(self.root) else ()
        for rule, key in RULES.items():
            ranked: dict[tuple, list[Path]] = defaultdict(list)
            for path in self._by[rule].get(key(parts[-1]), ()):
                folders = path.relative_to(self.root).parts[:-1]
                if path not in taken and (not one.split or split_of(path.parent, self.root) in ("", one.split)):
                    same = sum(1 for _ in _equal(folders[::-1], parts[-2::-1]))
                    aside = any(part.lower().startswith(BESIDE) for part in folders)
                    ranked[same, not aside, len(set(folders) & set(beside))].append(path)
            if ranked:
                best = ranked[max(ranked)]
                if len(best) > 1:
                    raise DataError(f"{one.file}: the picture {name!r} is {best[0]} or {best[1]}; "
                                    "expected one file of that name")
                return best[0], rule
        return None, ""

    def _missing(self, one: Wanted) -> Path:
        """Where a picture that is not there should be: inside `root`."""
        name = one.name.replace("\\", "/")
        if any((base / name).exists() for base in (one.file.parent, self.root)):
            raise DataError(f"{one.file}: the picture path {one.name!r} leads out of {self.root}; "
                            "expected a path inside that folder")
        return self.root / (Path(name).name or "no name")


def _equal(some: tuple[str, ...], others: tuple[str, ...]) -> Iterator[str]:
    """What two paths have in common, from their starts on."""
    for one, other in zip(some, others, strict=False):
        if _plain(one) != _plain(other):
            return
        yield one


FACTS = datasets.Features(
    {"error": Value("string"), "stored": List(Value("int64")), "orientation": Value("int64"), "thumb": Value("binary")}
)


def open_picture(image: dict[str, Any]) -> PILImage.Image:
    """A picture of an undecoded `Image` column ({"bytes", "path"}), opened but not yet decoded, EXIF not applied."""
    stored = image["bytes"]
    try:
        picture = PILImage.open(io.BytesIO(stored) if stored is not None else image["path"], formats=KINDS)
        picture.filename = ""  # or Pillow 12.3 maps an uncompressed TIFF on its side with width and height swapped
        return picture
    except PILImage.UnidentifiedImageError:
        with io.BytesIO(stored) if stored is not None else Path(image["path"]).open("rb") as file:
            head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in HEIC:
        raise ValueError("a HEIC, which Python reads with pillow-heif alone: pip install pillow-heif")
    raise PILImage.UnidentifiedImageError("its content is no picture")


def is_picture(file: Path) -> bool:
    """Whether a file is a picture by its name or, whatever its name, by its content."""
    if (mimetypes.guess_type(file.name, strict=False)[0] or "").startswith("image/"):
        return True
    try:
        open_picture({"bytes": None, "path": file}).close()
    except PILImage.UnidentifiedImageError:
        return False
    except Exception:  # one that cannot be read: whoever opens it says why
        return True
    return True


def as_rgb(picture: PILImage.Image) -> PILImage.Image:
    """A picture in RGB, on white where it is transparent, of 16 bits the upper 8.

    ValueError where nobody can say which values are black and white.
    """
    if picture.mode.startswith("I;16"):  # convert would show all that is lighter than 1 % as white
        values, info = np.asarray(picture), dict(picture.info)  # with EXIF, and the value that means transparent
        values = np.where(values == info.pop("transparency", None), 0xFFFF, values)
        picture = PILImage.fromarray((values >> 8).astype(np.uint8))
        picture.info = info
    elif picture.mode in ("I", "F"):
        numbers = "32-bit" if picture.mode == "I" else "floating point"
        raise ValueError(f"its pixels are {numbers} numbers of no known range; expected 8 or 16 bits, save it anew")
    if picture.has_transparency_data:
        clear = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", clear.size, "white"), clear)
        picture.info = clear.info  # EXIF
    return picture.convert("RGB")


def draft_resize(picture: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    """An opened picture as RGB of `size` (as stored); a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough."""
    drafted = picture.draft("RGB", size)
    box = drafted[1] if drafted else None  # the part that is picture: a drafted side is rounded up
    return as_rgb(picture).resize(size, PILImage.Resampling.BICUBIC, box=box)


def picture_facts(image: dict[str, Any] | None) -> dict[str, Any]:
    """Decode a picture once: its error or its stored size, EXIF orientation and 16 x 16 RGB thumbnail as shown."""
    try:
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError("the row has no picture")
        with open_picture(image) as picture:
            *stored, orientation = _stored(picture)
            small = ImageOps.exif_transpose(draft_resize(picture, (64, 64)).resize((16, 16), PILImage.Resampling.BOX))
        return {"error": None, "stored": stored, "orientation": orientation, "thumb": small.tobytes()}
    except Exception as error:  # Pillow's readers raise many kinds; one bad picture must not end the run
        return {"error": f"{type(error).__name__}: {error}", "stored": [0, 0], "orientation": 1, "thumb": b""}
