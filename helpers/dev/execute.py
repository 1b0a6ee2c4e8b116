"""Run notebooks and commit what they show: `python -m helpers.dev.execute [NOTEBOOK ...]` (default: every pair).

Each runs with its default parameters, offline, without a GPU and without any earlier run in reach, so that it shows
what a reader with a laptop sees. Its outputs go into the committed .ipynb; a run that fails leaves that file as it was.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from helpers.dev.freshness import MAX_BYTES, fingerprint, outputs_hash
from helpers.dev.pairs import KERNEL, Pair, PairError, check, find_pairs, read_notebook, write_notebook

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
}
REMOVED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MPLBACKEND", "WANDB_API_KEY")
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_SHOWN = {"runs", ".git", ".venv"}


class ExecutionError(Exception):
    """The failing cell and its traceback; the last line is the error itself."""


def execute(pair: Pair, root: Path) -> str:
    """Run a pair's notebook and write its outputs into the .ipynb; returns one line: seconds and size.

    Raises PairError when the two sides differ, ExecutionError when a cell fails, prints a path of this machine or shows
    more than MAX_BYTES; the .ipynb then stays as it was.
    """
    out_of_step = check(pair)
    if out_of_step:
        raise PairError(out_of_step)
    notebook = read_notebook(pair.ipynb)
    before = fingerprint(notebook, root)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        folder = mirror(root, Path(scratch).resolve(), pair.ipynb.resolve().parent)
        run(notebook, folder, pair.ipynb.name)
        tidy(notebook, {str(Path(scratch).resolve()): ".", str(root.resolve()): ".", sys.prefix: ".venv",
                        str(Path.home()): "~"})
    if fingerprint(notebook, root) != before:
        raise ExecutionError(f"{pair.ipynb.name}: helpers/ changed while it ran; run it again.")
    notebook.metadata["executed"] = {"fingerprint": before, "outputs": outputs_hash(notebook)}
    size = len(nbformat.writes(notebook).encode())
    if size > MAX_BYTES:
        raise ExecutionError(f"{pair.ipynb.name} would be {size / 1e6:.2f} MB, and {MAX_BYTES / 1e6} is the limit; "
                             "make its figures smaller.")
    write_notebook(pair.ipynb, notebook)
    os.utime(pair.py)  # keep the script the newer side: JupyterLab refuses the pair otherwise
    return f"{pair.name}: ran in {time.perf_counter() - start:.0f} s, {size / 1e3:.0f} kB"


def mirror(root: Path, scratch: Path, folder: Path) -> Path:
    """Make `scratch` look like the repository without its runs (links); returns where `folder` lies in it."""
    inside = scratch / folder.relative_to(root.resolve())
    inside.mkdir(parents=True, exist_ok=True)
    for source, target in ((root.resolve(), scratch), (folder, inside)):
        for entry in source.iterdir():
            if entry.name not in NOT_SHOWN and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return inside


def run(notebook: NotebookNode, folder: Path, name: str) -> None:
    """Execute all cells in place, in a fresh kernel that starts in `folder`; ExecutionError where one fails."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    environment = {key: value for key, value in os.environ.items() if key not in REMOVED} | SETTINGS
    client = NotebookClient(
        notebook, kernel_name=KERNEL["name"], timeout=None, record_timing=False, store_widget_state=False,
        coalesce_streams=True, resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        failed = next(i for i, cell in enumerate(notebook.cells, start=1)
                      if any(output.output_type == "error" for output in cell.get("outputs", [])))
        raise ExecutionError(f"{name}, cell {failed}: {str(error).rstrip()}") from None
    except DeadKernelError:
        raise ExecutionError(f"{name}: the kernel died; was there enough memory?") from None
    notebook.metadata["kernelspec"] = KERNEL
    notebook.metadata["language_info"] = {"name": "python"}


def tidy(notebook: NotebookNode, paths: dict[str, str]) -> None:
    """Leave what a reader came for: no stderr, no widgets, of a progress bar its last state, no path of this machine.

    `paths` maps folders to what stands for them, such as "~". Raises ExecutionError if one is left.
    """
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr" and WIDGET not in
                output.get("data", {})]
        cell.outputs = [_scrubbed(output, paths, f"cell {number}") for output in kept]


def _scrubbed(value: Any, paths: dict[str, str], where: str) -> Any:
    """`value` (an output or a part of it) with paths, kernel file names and addresses replaced, pictures left alone."""
    if isinstance(value, dict):
        return type(value)({key: item if str(key).startswith("image/") and key != "image/svg+xml"
                            else _scrubbed(item, paths, where) for key, item in value.items()})
    if isinstance(value, list):
        return [_scrubbed(item, paths, where) for item in value]
    if not isinstance(value, str):
        return value
    folders = sorted((path for path in paths if path != "/"), key=len, reverse=True)
    for path in folders:
        value = re.sub(rf"(?<![\w.]){re.escape(path)}(?![\w-])", paths[path].replace("\\", r"\\"), value)
    for path in folders:
        if path in value:
            raise ExecutionError(f"{where} shows {path}, a folder of this machine, inside another word.")
    value = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", value)
    value = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x…", value)
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in value.split("\n"))


def chosen_pairs(root: Path, notebooks: list[Path]) -> list[Pair]:
    """The pairs that `notebooks` (.ipynb or .py paths) name, or all; PairError for a path that is none."""
    pairs = find_pairs(root)
    for path in notebooks:
        if not any(path.resolve() in (pair.ipynb.resolve(), pair.py.resolve()) for pair in pairs):
            names = ", ".join(str(pair.ipynb.relative_to(root)) for pair in pairs)
            raise PairError(f"{path} is none of the notebooks; they are {names}.")
    wanted = {path.resolve().with_suffix("") for path in notebooks}
    return [pair for pair in pairs if not wanted or pair.py.resolve().with_suffix("") in wanted]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    chosen, root = parser.parse_args(arguments), Path.cwd()
    try:
        for pair in chosen_pairs(root, chosen.notebooks):
            print(f"{pair.name}: running", flush=True)
            print(execute(pair, root), flush=True)
    except (PairError, ExecutionError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
