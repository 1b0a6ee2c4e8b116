"""Keep each notebook and the .py beside it the same: `python -m helpers.dev.pairs sync|check`.

The pairs are `pipeline` and everything in `notebooks/`. A pair holds the same cells when cell types, sources and tags
are equal. The cells' hashes at the last sync stand in the notebook's metadata (`pair`), so that a change on one side is
told from a change on the other without file times: the changed side wins, and where both have changed nothing is
written and the cells are named.
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from helpers.files import write_text

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PERCENT = "py:percent"
Cell = tuple[str, str, tuple[str, ...]]  # (cell_type, source, tags)


class PairError(Exception):
    """One sentence: the pair, what is wrong with it, what to do."""


@dataclass(frozen=True)
class Pair:
    """A notebook and its script; one of the two may be missing."""

    ipynb: Path
    py: Path

    @property
    def name(self) -> str:
        """`pipeline`, `00_tiny_base`."""
        return self.py.stem


def find_pairs(root: Path) -> list[Pair]:
    """`pipeline` and `notebooks/*` of the repository at `root`; nothing under `runs/` is a pair."""
    found = [*root.glob("pipeline.py"), *root.glob("pipeline.ipynb")]
    found += [*root.glob("notebooks/*.py"), *root.glob("notebooks/*.ipynb")]
    stems = dict.fromkeys(path.with_suffix("") for path in sorted(found, key=lambda path: (len(path.parts), path)))
    return [Pair(stem.with_name(stem.name + ".ipynb"), stem.with_name(stem.name + ".py")) for stem in stems]


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
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        why = str(error).strip().splitlines()[0][:80]
        raise PairError(f"{path.name} is not a notebook ({why}); delete it, and sync writes it from the .py.") from None


def read_script(path: Path) -> NotebookNode:
    """Read a percent script as a notebook without outputs."""
    return jupytext.read(path, fmt=PERCENT, config=load_jupytext_config(str(path.resolve())))


def write_notebook(path: Path, notebook: NotebookNode) -> None:
    """Write an .ipynb, all of it or nothing."""
    _write(path, nbformat.writes(notebook).rstrip("\n") + "\n")


def write_script(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook's cells as a percent script; PairError if they would not be read back the same."""
    config = load_jupytext_config(str(path.resolve()))
    text = jupytext.writes(notebook, fmt=PERCENT, config=config)
    before, after = cells_of(notebook), cells_of(jupytext.reads(text, fmt=PERCENT, config=config))
    if before != after:
        lost = ", ".join(_changed(hashes(after), before)) or "the last"
        raise PairError(f"{path.name} cannot be written: the percent format would not give back {lost}; "
                        "does a line in it begin with '# %%'?")
    _write(path, text)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def merge_outputs(script: NotebookNode, notebook: NotebookNode) -> NotebookNode:
    """The script's cells in the notebook's place: an unchanged cell keeps its outputs, id and metadata."""
    old: dict[tuple[str, str], list[NotebookNode]] = {}
    for cell in notebook.cells:
        old.setdefault((cell.cell_type, cell.source.strip("\n")), []).append(cell)
    cells = []
    for new in script.cells:
        same = old.get((new.cell_type, new.source.strip("\n")))
        cell, tags = same.pop(0) if same else new, new.metadata.get("tags")
        cell.metadata.pop("tags", None)
        if tags:
            cell.metadata["tags"] = tags
        cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells})


def _changed(old: list[str], cells: list[Cell]) -> list[str]:
    """`cell 3 (code: x = 1)` for each of `cells` that is new against the `old` hashes, and how many are gone."""
    matcher = difflib.SequenceMatcher(None, old, hashes(cells), autojunk=False)
    named, gone = [], 0
    for _, i0, i1, j0, j1 in (code for code in matcher.get_opcodes() if code[0] != "equal"):
        gone += max(0, (i1 - i0) - (j1 - j0))
        for j in range(j0, j1):
            first = (cells[j][1].splitlines() or [""])[0][:50]
            named.append(f"cell {j + 1} ({cells[j][0]}: {first})")
    return named + ([f"{gone} removed"] if gone else [])


def state(pair: Pair) -> tuple[str, str]:
    """Where a pair stands: ("same" | "unrecorded" | "py" | "ipynb" | "both" | "unknown", the changed cells in words).

    "py" and "ipynb" name the side that has changed (or the only one there is), "unrecorded" is a pair that holds the
    same cells and whose stored hashes are older, "unknown" is two differing sides that were never synced.
    """
    if not pair.ipynb.exists() or not pair.py.exists():
        there = pair.py if pair.py.exists() else pair.ipynb
        return there.suffix[1:], f"only {there.name} exists"
    notebook = read_notebook(pair.ipynb)
    left, right = cells_of(notebook), cells_of(read_script(pair.py))
    stored = notebook.metadata.get("pair", {}).get("cells")
    if left == right:
        return ("same", "") if stored == hashes(left) else ("unrecorded", "the record of the last sync is older")
    if stored is None:
        return "unknown", f"they differ in {', '.join(_changed(hashes(left), right))} of the .py"
    in_notebook, in_script = _changed(stored, left), _changed(stored, right)
    words = [f"{', '.join(changed)} changed in {path.name}"
             for changed, path in ((in_notebook, pair.ipynb), (in_script, pair.py)) if changed]
    return ("both" if len(words) == 2 else "ipynb" if in_notebook else "py"), "; ".join(words)


def sync(pair: Pair, take: str | None = None) -> str:
    """Make both sides the same and record it; returns what was done, "" where nothing was.

    `take` ("py" or "ipynb") settles a pair where both sides have changed; without it that is a PairError.
    """
    side, why = state(pair)
    if side in ("both", "unknown") and take is None:
        raise PairError(f"{pair.name}: both sides may have changed: {why}. Make one side right and take it: "
                        "make sync TAKE=py (or TAKE=ipynb).")
    winner = take if side in ("both", "unknown") else side
    script = read_script(pair.py) if pair.py.exists() else None
    notebook = read_notebook(pair.ipynb) if pair.ipynb.exists() else nbformat.v4.new_notebook()
    if winner == "py" and script is not None:
        notebook = merge_outputs(script, notebook)
    write_script(pair.py, notebook)  # also where it won: without the header that an editor may have put there
    if winner != "same":
        notebook.metadata.pop("jupytext", None)  # jupytext.toml says it, and run outputs must not inherit it
        notebook.metadata["kernelspec"] = KERNEL
        notebook.metadata["pair"] = {"cells": hashes(cells_of(notebook))}
        write_notebook(pair.ipynb, notebook)
    if pair.py.stat().st_mtime < pair.ipynb.stat().st_mtime:
        os.utime(pair.py)  # JupyterLab refuses to open a pair whose script is the older one
    done = {"py": f"{pair.ipynb.name} written from {pair.py.name}",
            "ipynb": f"{pair.py.name} written from {pair.ipynb.name}", "unrecorded": "recorded", "same": ""}
    words = done[winner or side]
    return words and f"{pair.name}: {words} ({why})"


def check(pair: Pair) -> str:
    """"" for a pair in step, else one sentence."""
    side, why = state(pair)
    return "" if side == "same" else f"{pair.name}: the pair is not in step ({why}); run make sync."


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.pairs", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["sync", "check"])
    parser.add_argument("--take", choices=["py", "ipynb"], help="the side to keep where both have changed")
    chosen = parser.parse_args(arguments)
    pairs, failed = find_pairs(Path.cwd()), False
    for pair in pairs:
        try:
            said = sync(pair, chosen.take) if chosen.action == "sync" else check(pair)
            failed |= chosen.action == "check" and bool(said)
        except PairError as error:
            said, failed = str(error), True
        if said:
            print(said)
    if not failed:
        print(f"{len(pairs)} pairs in step")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
