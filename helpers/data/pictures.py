"""Picture files: those of a folder, what the head of one says, its pixels in RGB."""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import List, Value
from numpy.typing import ArrayLike
from PIL import Image as PILImage
from PIL import ImageOps

from helpers.boxes import xyxy_unit_to_xyxy_px
from helpers.data.schema import DataError

KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]  # EPS starts programs
try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    KINDS.append("HEIF")
except ImportError:
    pass
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")  # the brands of such files
LEFTOVERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")  # folders of systems and their programs
ENDINGS = {".heic", ".heif"} | {end for end, kind in PILImage.registered_extensions().items() if kind in KINDS}
SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that swap width and height


def files_below(root: Path, *, links: bool = False, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below `root` in the order of their names; with `links` those of linked folders too, but none that leads
    to one of its own parents (`above`).

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
                yield from files_below(path, links=links, above=above)
        elif path.is_file() or not path.exists():  # a link to nothing too, but no pipe
            yield path


def escaped(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are not UTF-8 as \\udc80 to \\udcff."""
    return name.encode(errors="backslashreplace").decode()


# --- the head of a picture --------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """What the head of a picture file says: (width, height) in pixels, and how EXIF turns the picture, 1 to 8."""

    stored: tuple[int, int]
    orientation: int  # 1, upright, also where there is none or another value

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) as EXIF shows the picture."""
        return self.stored[::-1] if self.orientation in SIDEWAYS else self.stored


def _head_of(picture: PILImage.Image) -> Head:
    value = picture.getexif().get(0x0112, 1)
    orientation = value if value in range(2, 9) else 1
    as_shown = picture.format == "TIFF" and orientation in SIDEWAYS  # Pillow gives its size as shown
    return Head(picture.size[::-1] if as_shown else picture.size, orientation)


def head(image: dict[str, Any]) -> Head | None:
    """The head of an undecoded picture; None where it cannot be read."""
    try:
        with open_picture(image) as picture:
            return _head_of(picture)
    except Exception:  # the audit reads every picture to its end and names what it finds
        return None


def turned(box: Any, orientation: int) -> Any:
    """A corner box [y0, x0, y1, x1] in 0-1 of the picture as stored, in the picture as EXIF `orientation` 1-8 shows it.

    The four may be arrays of equal length.
    """
    y0, x0, y1, x1 = box
    if orientation in SIDEWAYS:
        y0, x0, y1, x1 = x0, y0, x1, y1
    if orientation in (2, 3, 6, 7):
        x0, x1 = 1 - x1, 1 - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = 1 - y1, 1 - y0
    return [y0, x0, y1, x1]


# --- its pixels -------------------------------------------------------------------------------------------------------


def open_picture(image: dict[str, Any]) -> PILImage.Image:
    """A picture of an undecoded `Image` column ({"bytes", "path"}), opened but not yet decoded, EXIF not applied."""
    stored = image["bytes"]
    try:
        picture = PILImage.open(io.BytesIO(stored) if stored is not None else image["path"], formats=KINDS)
        picture.filename = ""  # or Pillow 12.3 maps an uncompressed TIFF on its side with width and height swapped
        return picture
    except PILImage.UnidentifiedImageError:
        with io.BytesIO(stored) if stored is not None else Path(image["path"]).open("rb") as file:
            start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in HEIC:
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


def painted_over(picture: PILImage.Image, boxes: ArrayLike) -> PILImage.Image:
    """A copy of the picture in RGB whose boxes [[x0, y0, x1, y1]] in 0-1 are filled with its mean colour."""
    picture = as_rgb(picture).copy()
    mean = tuple(np.asarray(picture.resize((1, 1), PILImage.Resampling.BOX))[0, 0].tolist())
    for box in xyxy_unit_to_xyxy_px(boxes, *picture.size).round().astype(int).tolist():
        picture.paste(mean, tuple(box))
    return picture


FACTS = datasets.Features(
    {"error": Value("string"), "stored": List(Value("int64")), "orientation": Value("int64"), "thumb": Value("binary")}
)


def picture_facts(image: dict[str, Any] | None) -> dict[str, Any]:
    """Decode a picture once: its error or its stored size, EXIF orientation and 16 x 16 RGB thumbnail as shown."""
    try:
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError("the row has no picture")
        with open_picture(image) as picture:
            stored, orientation = _head_of(picture)
            small = ImageOps.exif_transpose(draft_resize(picture, (64, 64)).resize((16, 16), PILImage.Resampling.BOX))
        return {"error": None, "stored": list(stored), "orientation": orientation, "thumb": small.tobytes()}
    except Exception as error:  # Pillow's readers raise many kinds; one bad picture must not end the run
        return {"error": f"{type(error).__name__}: {error}", "stored": [0, 0], "orientation": 1, "thumb": b""}


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
        if picture_facts({"bytes": found, "path": None})["error"] is None:
            return None  # whole, with something behind its end
        with open_picture({"bytes": found + b"\xff\xd9", "path": None}) as picture:
            grey = (np.asarray(picture.convert("RGB")) == 128).all(axis=2).mean()
    except Exception:  # as in `head`
        return None
    return found + b"\xff\xd9" if grey <= 0.02 else None
