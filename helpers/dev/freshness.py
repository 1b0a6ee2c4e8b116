"""Were a notebook's committed outputs made by the source beside them?

The executor stores two hashes in the notebook (`executed`): one over what the outputs depend on (the code cells, the
files of `helpers/` that they import, directly or not, the data files of those packages, the tiny base in
`helpers/tiny/`) and one over the outputs themselves.
"""

import ast
import hashlib
import json
from pathlib import Path

import jupytext
from nbformat import NotebookNode

from helpers.dev.pairs import PERCENT, Pair, cells_of, check, read_notebook

MAX_BYTES = 1_500_000


def imported_files(code: str, root: Path) -> set[Path]:
    """The .py files below `root`/helpers that `code` imports, and those that they import."""
    found: set[Path] = set()
    waiting = _modules(code, package=())
    seen: set[tuple[str, ...]] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or module[0] != "helpers":
            continue
        seen.add(module)
        waiting.append(module[:-1] or module)  # importing a.b.c runs a and a.b first
        for path in (root.joinpath(*module, "__init__.py"), root.joinpath(*module).with_suffix(".py")):
            if path.is_file():
                found.add(path)
                waiting += _modules(path.read_text(), module if path.name == "__init__.py" else module[:-1])
    return found


def _modules(code: str, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every dotted name in `code`'s imports; `from a import b` gives a and a.b, for b may be a module."""
    names: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names += [base, *(base + (alias.name,) for alias in node.names)]
    return [name for name in names if name]


def inputs(notebook: NotebookNode, root: Path) -> list[Path]:
    """Every file of the repository that the notebook's outputs depend on."""
    code = NotebookNode(notebook, cells=[cell for cell in notebook.cells if cell.cell_type == "code"])
    files = imported_files(jupytext.writes(code, fmt=PERCENT), root)  # as a script: magics are comments there
    folders = {path.parent for path in files if path.name == "__init__.py"} - {root / "helpers"}
    for folder in folders | {root / "helpers" / "tiny"}:
        files |= {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
                  and path.suffix not in (".py", ".pyc")}
    return sorted(files)


def fingerprint(notebook: NotebookNode, root: Path) -> str:
    """A hash over the notebook's code cells and `inputs`. Text cells may be edited without running it again."""
    digest = hashlib.sha256()
    for cell in cells_of(notebook):
        if cell[0] == "code":
            digest.update(repr(cell).encode())
    for path in inputs(notebook, root):
        digest.update(f"\n{path.relative_to(root).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def outputs_hash(notebook: NotebookNode) -> str:
    """A hash over all outputs and execution counts, to tell the executor's from those of a hand-run cell."""
    shown = [(cell.execution_count, cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def problems(pair: Pair, root: Path) -> list[str]:
    """What is wrong with a pair's committed outputs, each in one sentence; [] when they are fresh."""
    out_of_step = check(pair)
    if out_of_step:
        return [out_of_step]
    notebook, name = read_notebook(pair.ipynb), pair.ipynb.name
    stored = notebook.metadata.get("executed")
    if stored is None:
        return [f"{name} holds no outputs of the executor; run make notebooks."]
    found = []
    if stored["fingerprint"] != fingerprint(notebook, root):
        found.append(f"{name}: the code, the helpers or the tiny base have changed since it ran; run make notebooks.")
    if stored["outputs"] != outputs_hash(notebook):
        found.append(f"{name} shows outputs that the executor did not write; run make notebooks.")
    ran = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in ran] != list(range(1, len(ran) + 1)):
        found.append(f"{name}: its cells did not run once each from top to bottom; run make notebooks.")
    if pair.ipynb.stat().st_size > MAX_BYTES:
        found.append(f"{name} is larger than {MAX_BYTES / 1e6} MB; make its figures smaller.")
    return found
