"""Keep each notebook and the .py beside it the same: `python -m helpers.dev.pairs [--take py|ipynb]` (`make sync`).

The pairs are `pipeline` and everything in `notebooks/`. A pair is in step when cell types, sources and tags are equal.
Hashes of the cells at the last sync stand in the notebook's metadata (`pair`), so that file times do not matter: the
side that has changed wins, and where both have, nothing is written and the cells are named.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from helpers.runs import write_text

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PERCENT = "py:percent"
Cell = tuple[str, str, tuple[str, ...]]  # (cell_type, source, tags)


class PairError(Exception):
    """One sentence: the pair, what is wrong with it, what to do."""


def find_pairs(root: Path) -> list[Path]:
    """The scripts of all pairs, `pipeline` first; one of a script and its notebook may be missing."""
    found = [*root.glob("pipeline.*"), *root.glob("notebooks/*.*")]
    scripts = {path.with_suffix(".py") for path in found if path.suffix in (".py", ".ipynb")}
    return sorted(scripts, key=lambda path: (len(path.parts), path))


def cells_of(notebook: NotebookNode) -> list[Cell]:
    """What two sides of a pair are compared by. Blank lines around a cell's source do not count."""
    return [(c.cell_type, c.source.strip("\n"), tuple(c.metadata.get("tags", ()))) for c in notebook.cells]


def hashes(cells: list[Cell]) -> list[str]:
    """One short hash a cell."""
    return [hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:12] for cell in cells]


def read_notebook(path: Path) -> NotebookNode:
    """Read an .ipynb; PairError if it is not one (left with a merge's conflict markers, say)."""
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError):
        raise PairError(f"{path.name} is not a notebook; delete it, and make sync writes it from the .py.") from None


def read_script(path: Path) -> NotebookNode:
    """Read a percent script as a notebook without outputs."""
    return jupytext.read(path, fmt=PERCENT, config=load_jupytext_config(str(path.resolve())))


def state(py: Path) -> tuple[str, str]:
    """(the side that has changed since the last sync: "" for none, "py", "ipynb" or "both"; the changes in words)."""
    ipynb = py.with_suffix(".ipynb")
    if not py.exists() or not ipynb.exists():
        there = py if py.exists() else ipynb
        return there.suffix[1:], f"only {there.name} exists"
    notebook = read_notebook(ipynb)
    sides = {ipynb: cells_of(notebook), py: cells_of(read_script(py))}
    if sides[ipynb] == sides[py]:
        return "", ""
    stored = notebook.metadata.get("pair", {}).get("cells", [])
    changed = {path: cells for path, cells in sides.items() if hashes(cells) != stored}
    words = [f"cell {number} ({source[:50].partition(chr(10))[0]}) in {path.name}" for path, cells in changed.items()
             for number, ((_, source, _), own) in enumerate(zip(cells, hashes(cells), strict=True), 1)
             if own not in stored]
    side = "both" if len(changed) == 2 else next(iter(changed)).suffix[1:]
    return side, ", ".join(words) or "cells moved or removed"


def check(py: Path) -> str:
    """"" for a pair in step, else one sentence."""
    side, why = state(py)
    return f"{py.stem}: the pair is not in step ({why}); run make sync." if side else ""


def with_outputs(script: NotebookNode, notebook: NotebookNode) -> NotebookNode:
    """The script's cells; those that the notebook has too, unchanged, keep their outputs, ids and metadata."""
    made = combine_inputs_with_outputs(script, notebook, fmt=PERCENT)
    known = {(cell.cell_type, cell.source.strip("\n")) for cell in notebook.cells}
    for cell in made.cells:
        if cell.cell_type == "code" and ("code", cell.source.strip("\n")) not in known:
            cell.outputs, cell.execution_count = [], None  # jupytext keeps those of the cell that stood here
    return made


def sync(py: Path, take: str | None = None) -> str:
    """Make both sides the same and record it; returns what was done, "" where both were the same.

    `take` ("py" or "ipynb") settles a pair where both sides have changed; without it that is a PairError.
    """
    ipynb, (side, why) = py.with_suffix(".ipynb"), state(py)
    if side == "both" and take is None:
        raise PairError(f"{py.stem}: both sides may have changed: {why}. Make one side right and take it: "
                        "make sync TAKE=py (or TAKE=ipynb).")
    side = str(take) if side == "both" else side
    notebook = read_notebook(ipynb) if ipynb.exists() else nbformat.v4.new_notebook()
    if side == "py":
        notebook = with_outputs(read_script(py), notebook)
    config = load_jupytext_config(str(py.resolve()))
    text = jupytext.writes(notebook, fmt=PERCENT, config=config)
    if cells_of(jupytext.reads(text, fmt=PERCENT, config=config)) != cells_of(notebook):
        raise PairError(f"{py.name} cannot be written: the percent format would not give back the same cells; does a "
                        "line inside one begin with '# %%'?")
    notebook.metadata.pop("jupytext", None)  # pyproject.toml says it, and run outputs must not inherit it
    notebook.metadata |= {"kernelspec": KERNEL, "pair": {"cells": hashes(cells_of(notebook))}}
    for path, content in ((ipynb, nbformat.writes(notebook).rstrip("\n") + "\n"), (py, text)):
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            write_text(path, content)
    if py.stat().st_mtime < ipynb.stat().st_mtime:
        os.utime(py)  # JupyterLab refuses to open a pair whose script is the older one
    names = (py.name, ipynb.name) if side == "ipynb" else (ipynb.name, py.name)
    return f"{names[0]} written from {names[1]} ({why})" if side else ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("--take", choices=["py", "ipynb"], help="the side to keep where both have changed")
    take, status = parser.parse_args(arguments).take, 0
    for py in find_pairs(Path.cwd()):
        try:
            said = sync(py, take)
        except PairError as error:
            said, status = str(error), 1
        if said:
            print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
