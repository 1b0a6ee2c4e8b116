"""Picture files of a local folder: where they are, how large, which split; shared by the annotation formats."""

from __future__ import annotations

import io
import mimetypes
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import List, Value
from PIL import Image as PILImage
from PIL import ImageOps

from helpers.data.schema import DataError, meta_of, objects_of, safe_path
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
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
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


def shown_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as EXIF shows the picture, from the file's head; (0, 0) where it cannot be read."""
    try:
        with open_picture({"bytes": None, "path": path}) as picture:
            width, height, orientation = _stored(picture)
            return (height, width) if orientation in SIDEWAYS else (width, height)
    except Exception:  # the audit reads every picture to its end and names what it finds
        return 0, 0


def escaped(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are not UTF-8 as \\udc80 to \\udcff."""
    return name.encode(errors="backslashreplace").decode()


class Pictures:
    """The picture files below `root`, found by the names that annotations use for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [path for path in files_below(root) if path.suffix.lower() in ENDINGS]
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.files:
            self._by_name[path.name].append(path)

    def find(self, name: str, base: Path, split: str, where: str) -> Path:
        """The file that `name` means: beside the annotation (`base`), else the one below `root` that ends in `name`.

        A picture of another split is never taken. A file that is not there gets the path where it should be, and the
        audit names it. `DataError` where `name` leads out of `root` or two files have it.
        """
        name = name.replace("\\", "/")  # written on Windows
        direct = safe_path(self.root, name, where, base)
        if direct.exists():
            return direct
        parts = Path(name).parts
        found = [path for path in self._by_name[direct.name] if path.parts[-len(parts) :] == parts]
        found = [path for path in found if not split or split_of(path.parent, self.root) in ("", split)]
        if len(found) > 1:
            raise DataError(
                f"{where}: the picture {name!r} is {found[0]} or {found[1]}; expected one file of that name"
            )
        return safe_path(self.root, str(found[0]), where) if found else direct


def row(path: Path, image_id: Any = None, meta: dict | None = None, size: tuple[Any, Any] = (0, 0)) -> dict[str, Any]:
    """A row of the schema without boxes; a size that is not given is read from the picture."""
    image_id = str(image_id or path.stem)
    try:
        width, height = (int(value or 0) for value in size)
        if max(width, height) > 10**6:
            raise ValueError("no picture is as large")
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path.name}: width and height are {size!r}; expected whole numbers of pixels") from None
    if width <= 0 or height <= 0:
        width, height = shown_size(path)
    image = {"path": str(path), "bytes": None}
    return {
        "image_id": image_id,
        "image": image,
        "width": width,
        "height": height,
        "meta": meta_of(meta),
        "objects": objects_of([], []),
    }


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
