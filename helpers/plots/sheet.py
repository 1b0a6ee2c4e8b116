"""`make data`: a data set on one page, to look at before a training: its pictures and boxes, guesses and findings.

    python -m helpers.plots.sheet dataset_id=path/to/export classes=table val_share=0.2 page=audit.html
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ImageOps

from helpers import data
from helpers.data.pictures import as_rgb, open_picture
from helpers.plots.figure import COLOURS
from helpers.recipes import PARAMETERS, Parameter, text
from helpers.settings import ParameterError, check, choose_cache, read_given

GIVEN: dict[str, Any] = {"dataset_id": None, "dataset_revision": None, **dict.fromkeys(data.OPTIONS), "val_share": 0.1,
                         "hf_home": None, "page": "audit.html"}  # fmt: skip
SIDE = 400  # pixels of a picture's longer side on the page
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } table { border-collapse: collapse }
td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
.pictures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start } figure { margin: 0; max-width: 250px }
.photo { position: relative; display: inline-block } .photo img { display: block; max-width: 250px; max-height: 250px }
.box { position: absolute; box-sizing: border-box; border: 2px solid; outline: 1px solid #fffc }
.box b { position: absolute; left: -2px; bottom: 100%; font: 11px system-ui; color: #fff; padding: 0 3px;
  white-space: nowrap } .raw { border-style: dashed; border-color: #E69F00 }
.none { width: 200px; padding: 60px 10px; background: #e4e4e4; text-align: center; box-sizing: border-box }
figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere } .class { color: #fff; padding: 0 6px }
"""


def write_sheet(path: Path, where: str, raw: datasets.DatasetDict, audit: data.Audit, cleaned: datasets.DatasetDict,
                said: Sequence[str], *, most: int = 24, each: int = 4) -> None:  # fmt: skip
    """Write the page for the data set `where` to `path`, one file with all that is in it.

    The first `most` pictures of each split of `cleaned`, as the model gets them; up to `each` with each fault that
    `audit` found in `raw`; and `said`, the lines that loading printed.
    """
    colours = _colours(cleaned)
    counts = [[name, f"{len(rows):,}", f"{sum(len(one['bbox']) for one in rows['objects']):,}",
               f"{sum(not one['bbox'] for one in rows['objects']):,}"] for name, rows in cleaned.items()]  # fmt: skip
    found = [[str(line.fault), str(line.meaning), str(line.action), f"{line.count:,}", ", ".join(line.ids[:6])]
             for line in audit.table().itertuples()]  # fmt: skip
    classes = " ".join(f'<span class="class" style="background:{colour}">{html.escape(name)}</span>'
                       for name, colour in colours.items())  # fmt: skip
    parts = [f"<h1>{html.escape(where)}</h1><p>Are these the boxes that a model should learn? {classes}</p>",
             _table(["split", "pictures", "boxes", "pictures without a box"], counts),
             "<h2>How it was read</h2><ul>", *(f"<li>{html.escape(line)}</li>" for line in said), "</ul>",
             "<h2>What the audit found</h2>",
             _table(["finding", "what it is", "what is done", "how many", "such as"], found) if found else "Nothing."]
    for name, rows in cleaned.items():
        few = rows.select(range(min(most, len(rows)))).cast_column("image", datasets.Image(decode=False))
        figures = [_figure(row["image"], _boxes(row["objects"], colours), f"{row['image_id']} · {row['width']} × "
                           f"{row['height']} px") for row in few]  # fmt: skip
        title = f"{name}: {len(few)} of {len(rows):,} pictures, with the boxes as trained on"
        parts += [f'<h2>{title}</h2><div class="pictures">', *figures, "</div>"] if len(few) else []
    if found:
        parts += ['<h2>Pictures with a finding</h2><p>Dashed: a box as it came in. Solid: as it is trained on.</p>'
                  '<div class="pictures">', *_findings(raw, audit, colours, each), "</div>"]  # fmt: skip
    page = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(where)}</title>'
    path.write_text(f"{page}<style>{STYLE}</style>{''.join(parts)}</html>\n", encoding="utf-8")


def _colours(splits: datasets.DatasetDict) -> dict[str, str]:
    """{class: its colour on the page}."""
    names = sorted({name for rows in splits.values() for one in rows["objects"] for name in one["category_name"]})
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _findings(raw: datasets.DatasetDict, audit: data.Audit, colours: dict[str, str], each: int) -> Iterator[str]:
    """The first pictures of each fault, with the boxes that came in and those that stay."""
    for rule in data.RULES:
        for fault in [fault for fault in audit.faults if fault.fault == rule.fault][:each]:
            rows = raw[fault.split].select([fault.index]).cast_column("image", datasets.Image(decode=False))
            row, kept = rows[0], fault.index in audit.keep[fault.split]
            after = (row | audit.fixed[fault.split].get(fault.index, {}))["objects"] if kept else None
            came = [box for box in (row["objects"] or {}).get("bbox") or [] if box and len(box) == 4]
            boxes = [_box(box, "", "") for box in came if np.isfinite(np.array(box, float)).all()]
            caption = f"{rule.fault}: {fault.found} · {fault.image_id} in {fault.split} · {rule.action}"
            yield _figure(row["image"], boxes + _boxes(after, colours), caption)


def _boxes(objects: dict[str, list] | None, colours: dict[str, str]) -> list[str]:
    objects = objects or {"bbox": [], "category_name": []}
    return [_box(box, name, colours.get(name, COLOURS[0]))
            for box, name in zip(objects["bbox"] or [], objects["category_name"] or [], strict=False)]  # fmt: skip


def _box(box: Sequence[float], name: str, colour: str) -> str:
    """A box [y0, x0, y1, x1] in 0-1 over its picture; dashed and without a name where it has no `colour`."""
    y0, x0, y1, x1 = (min(max(100 * value, -5), 105) for value in box)
    place = f"left:{x0:.2f}%;top:{y0:.2f}%;width:{max(x1 - x0, 0):.2f}%;height:{max(y1 - y0, 0):.2f}%"
    label = f'<b style="background:{colour}">{html.escape(name)}</b>' if name else ""
    style = f"{place};border-color:{colour}" if colour else place
    return f'<span class="box{"" if colour else " raw"}" style="{style}">{label}</span>'


def _figure(image: dict[str, Any] | None, boxes: list[str], caption: str) -> str:
    """A picture of the undecoded `image` as EXIF shows it, with `boxes` over it and `caption` below."""
    try:
        with open_picture(image or {"bytes": b"", "path": None}) as picture:
            picture.draft("RGB", (SIDE, SIDE))
            small = ImageOps.exif_transpose(as_rgb(picture))
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        photo = f'<span class="photo"><img src="{source}" alt="">{"".join(boxes)}</span>'
    except Exception as error:  # Pillow's readers raise many kinds
        photo = f'<div class="none">cannot be read: {html.escape(str(error)[:120])}</div>'
    return f"<figure>{photo}<figcaption>{html.escape(caption)}</figcaption></figure>"


class Heard(io.StringIO):
    """What is printed, kept, and printed all the same."""

    def write(self, written: str) -> int:
        sys.__stdout__.write(written)  # type: ignore[union-attr]
        return super().write(written)


def main() -> None:
    """Load, audit, write the page; a fault in what was given ends in one sentence and exit status 1."""
    start, values, heard = time.monotonic(), dict(GIVEN), Heard()
    rules = {name: PARAMETERS[name] for name in GIVEN if name != "page"} | {"page": Parameter(text("a file"))}
    try:
        read_given(values, rules)
        check(values, rules)
        if values["dataset_id"] is None:
            raise ParameterError("dataset_id is missing; name a folder or file, such as dataset_id=path/to/export.")
        choose_cache(values["hf_home"])
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(heard):
            raw = data.load_raw(**data.source_of(values))
            audit = data.audit(raw)
            cleaned = data.clean(raw, audit)
        for line in audit.table().itertuples():
            print(f"audit: {line.count} × {line.fault}: {line.action}")
        said = [line.removeprefix("data: ") for line in heard.getvalue().splitlines() if line]
        write_sheet(Path(values["page"]), values["dataset_id"], raw, audit, cleaned, said)
    except (ParameterError, data.DataError, OSError) as error:
        sys.exit(str(error))
    print(f"{values['page']}: open it and look at the boxes ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
