"""A small picture of each topic notebook for the README: `python -m helpers.dev.thumbnails`.

It is the last picture of the cell tagged `thumbnail`; without such a cell, the last picture of the notebook. It is read
out of the committed outputs, so it is as fresh as they are, and written to notebooks/thumbnails/NAME.png. The file
notes which picture it was made of, so that a test can tell a thumbnail that is missing or stale.
"""

import base64
import hashlib
import io
import sys
from pathlib import Path

from nbformat import NotebookNode
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.dev.pairs import Pair, PairError, find_pairs, read_notebook

TAG = "thumbnail"
WIDTHS = (480, 400, 320)  # pixels, the first that fits; the README shows them at 320
MAX_BYTES = 40_000
MADE_OF = "made of"  # the key of the note in the PNG


class ThumbnailError(Exception):
    """One sentence: the notebook, and what its thumbnail lacks."""


def picture_of(notebook: NotebookNode, name: str) -> bytes:
    """The PNG or JPEG that stands for the notebook. Raises ThumbnailError where it shows none."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if TAG in cell.metadata.get("tags", ())]
    pictures = [output.data[kind] for cell in tagged or cells for output in cell.outputs
                for kind in ("image/png", "image/jpeg") if kind in output.get("data", {})]
    if not pictures:
        where = f"its cell tagged {TAG} shows" if tagged else "it shows"
        raise ThumbnailError(f"{name} has no thumbnail: {where} no picture; run make notebooks, or tag another cell.")
    return base64.b64decode(pictures[-1])


def shrink(picture: bytes) -> bytes:
    """A PNG of at most MAX_BYTES, on white, noting what it was made of; a photo gets fewer pixels and colours."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    note = PngInfo()
    note.add_text(MADE_OF, hashlib.sha256(picture).hexdigest()[:16])
    for width, colours in ((width, colours) for width in WIDTHS for colours in (256, 64, 16)):
        small, buffer = image.copy(), io.BytesIO()
        small.thumbnail((width, width), Image.Resampling.LANCZOS)
        small.quantize(colours).save(buffer, "png", optimize=True, pnginfo=note)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()


def topics(root: Path) -> list[Pair]:
    """The pairs in notebooks/: the pipeline has no thumbnail."""
    return [pair for pair in find_pairs(root) if pair.ipynb.parent.name == "notebooks"]


def path_of(pair: Pair) -> Path:
    """notebooks/thumbnails/NAME.png."""
    return pair.ipynb.parent / "thumbnails" / f"{pair.name}.png"


def problem(pair: Pair) -> str:
    """"" for a fresh thumbnail, else one sentence."""
    path = path_of(pair)
    try:
        picture = picture_of(read_notebook(pair.ipynb), pair.ipynb.name)
    except (ThumbnailError, PairError) as error:
        return str(error)
    if not path.is_file():
        return f"notebooks/thumbnails/{path.name} is missing; run make notebooks."
    with Image.open(path) as image:
        if image.info.get(MADE_OF) != hashlib.sha256(picture).hexdigest()[:16]:
            return f"notebooks/thumbnails/{path.name} was made of another picture than {pair.ipynb.name} shows now; " \
                   "run make notebooks."
    return ""


def main() -> int:
    """Write the thumbnails of this folder's notebooks; returns 1 where one of them shows no picture."""
    pairs, failed = topics(Path.cwd()), False
    for pair in pairs:
        try:
            small = shrink(picture_of(read_notebook(pair.ipynb), pair.ipynb.name))
        except (ThumbnailError, PairError) as error:
            print(error)
            failed = True
            continue
        path_of(pair).parent.mkdir(exist_ok=True)
        path_of(pair).write_bytes(small)
    for old in set(Path("notebooks/thumbnails").resolve().glob("*.png")) - {path_of(pair) for pair in pairs}:
        old.unlink()
    print(f"{len(pairs)} thumbnails")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
