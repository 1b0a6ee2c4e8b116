"""`make data`: how a data set is read, what the audit finds, and its pictures with their boxes, in one page.

    python -m helpers.data dataset_id=path/to/export classes=table val_share=0.2 page=audit.html
"""

import contextlib
import io
import sys
import time
from pathlib import Path

import datasets

from helpers import data
from helpers.data.sheet import write_sheet
from helpers.recipes import PARAMETERS, Parameter, text
from helpers.settings import ParameterError, check, choose_cache, read_given

GIVEN = {"dataset_id": None, "dataset_revision": None, "classes": None, "val_share": 0.1, "hf_home": None,
         "page": "audit.html"}  # fmt: skip


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
