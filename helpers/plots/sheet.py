"""`make data`: a data set on one page, to look at before a training: its pictures and boxes, guesses and findings.

    python -m helpers.plots.sheet dataset_id=path/to/export classes=table val_share=0.2 page=audit.html
"""

import base64
import contextlib
import io
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import jinja2

from helpers import data
from helpers.plots.audit import examples, shown
from helpers.plots.figure import COLOURS
from helpers.recipes import PARAMETERS, Parameter, text
from helpers.settings import ParameterError, check, choose_cache, read_given

GIVEN: dict[str, Any] = {"dataset_id": None, "dataset_revision": None, **dict.fromkeys(data.OPTIONS), "val_share": 0.1,
                         "hf_home": None, "page": "audit.html"}
RAW = ("dashed", "", "#E69F00")  # a box as it came in: its line, name and colour


def write_sheet(path: Path, where: str, raw: datasets.DatasetDict, audit: data.Audit, cleaned: datasets.DatasetDict,
                said: Sequence[str], *, most: int = 24, each: int = 4) -> None:
    """Write the page for the data set `where` to `path`, one file with all that is in it.

    The first `most` pictures of each split of `cleaned`, as the model gets them; up to `each` with each fault that
    `audit` found in `raw`; and `said`, the lines that loading printed.
    """
    names = sorted({name for rows in cleaned.values() for one in rows["objects"] for name in one["category_name"]})
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))

    def trained_on(objects: dict[str, list]) -> list[tuple]:
        pairs = zip(objects["bbox"], objects["category_name"], strict=True)
        return [(box, "solid", name, colours[name]) for box, name in pairs]

    splits, findings = [], []
    for name, rows in cleaned.items():
        few = rows.select(range(min(most, len(rows)))).cast_column("image", datasets.Image(decode=False))
        boxes = [len(one["bbox"]) for one in rows["objects"]]
        splits.append({"name": name, "rows": f"{len(rows):,}", "boxes": f"{sum(boxes):,}",
                       "empty": f"{boxes.count(0):,}", "figures": [
                           figure(row["image"], trained_on(row["objects"]),
                                  f"{row['image_id']} · {row['width']} × {row['height']} px") for row in few]})
    actions = {rule.fault: rule.action for rule in data.RULES}
    for fault, _, row, came in examples(raw, audit, each):
        boxes = [(box, *RAW) for box in came]
        if fault.index in audit.keep[fault.split]:
            boxes += trained_on((row | audit.fixed[fault.split].get(fault.index, {}))["objects"])
        caption = f"{fault.fault}: {fault.found} · {fault.image_id} in {fault.split} · {actions[fault.fault]}"
        findings.append(figure(row["image"], boxes, caption))
    page = jinja2.Template(Path(__file__).with_name("sheet.html").read_text(encoding="utf-8"), autoescape=True)
    path.write_text(page.render(where=where, colours=colours, splits=splits, said=said, findings=findings,
                                found=[*audit.table().itertuples()]), encoding="utf-8")


def figure(image: dict[str, Any] | None, boxes: Iterable[tuple], caption: str) -> dict[str, Any]:
    """What the page shows of an undecoded picture: its small copy as a data URL, and each box's place in per cent.

    A box is [y0, x0, y1, x1] in 0-1, with its line, name and colour.
    """
    try:
        file = io.BytesIO()
        shown(image).save(file, "JPEG", quality=80)
    except Exception as error:  # Pillow's readers raise many kinds
        return {"caption": caption, "error": str(error)[:120] or type(error).__name__}
    places = []
    for box, *style in boxes:
        y0, x0, y1, x1 = (min(max(100 * value, -5), 105) for value in box)
        size = f"width:{max(x1 - x0, 0):.2f}%;height:{max(y1 - y0, 0):.2f}%"
        places.append((f"left:{x0:.2f}%;top:{y0:.2f}%;{size}", *style))
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"caption": caption, "source": source, "boxes": places}


def main() -> None:
    """Load, audit, write the page; a fault in what was given ends in one sentence and exit status 1."""
    start, values = time.monotonic(), dict(GIVEN)
    rules = {name: PARAMETERS[name] for name in GIVEN if name != "page"} | {"page": Parameter(text("a file"))}
    try:
        read_given(values, rules)
        check(values, rules)
        if values["dataset_id"] is None:
            raise ParameterError("dataset_id is missing; name a folder or file, such as dataset_id=path/to/export.")
        choose_cache(values["hf_home"])
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            raw = data.load_raw(**data.source_of(values))
            audit = data.audit(raw)
            cleaned = data.clean(raw, audit)
        print(said.getvalue(), *(f"audit: {line.count} × {line.fault}: {line.action}\n"
                                 for line in audit.table().itertuples()), sep="", end="")
        lines = [line.removeprefix("data: ") for line in said.getvalue().splitlines() if line]
        write_sheet(Path(values["page"]), values["dataset_id"], raw, audit, cleaned, lines)
    except (ParameterError, data.DataError, OSError) as error:
        sys.exit(str(error))
    print(f"{values['page']}: open it and look at the boxes ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
