"""Run notebooks and commit what they show: `python -m helpers.dev.execute [NOTEBOOK ...]` (`make notebooks`).

Each runs with its default parameters, offline, without a GPU and without any earlier run in reach, as on a reader's
laptop. Its outputs go into the committed .ipynb, with commit, date and machine; a run that fails leaves the file as it
was.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from helpers import runs
from helpers.dev.pairs import KERNEL, PairError, check, find_pairs, read_notebook
from helpers.runs import write_text

SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
REMOVED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MPLBACKEND", "WANDB_API_KEY")
NOT_SHOWN = {"runs", ".git", ".venv"}


def execute(py: Path, root: Path) -> str:
    """Run a pair's notebook and write its outputs into the .ipynb; returns one line: seconds, size.

    Raises PairError when the two sides differ, CellExecutionError when a cell fails.
    """
    ipynb = py.with_suffix(".ipynb")
    if out_of_step := check(py):
        raise PairError(out_of_step)
    notebook, commit, start = read_notebook(ipynb), runs.git_revision(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="notebook-") as name:
        scratch = Path(name).resolve()
        client = NotebookClient(
            notebook, kernel_name=KERNEL["name"], timeout=None, record_timing=False, store_widget_state=False,
            coalesce_streams=True, resources={"metadata": {"path": str(mirror(root, scratch, py.parent.resolve()))}})
        client.execute(env={key: value for key, value in os.environ.items() if key not in REMOVED} | SETTINGS)
        tidy(notebook, {str(scratch): ".", str(root.resolve()): ".", sys.prefix: ".venv", str(Path.home()): "~"})
    made = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": runs.machine()}
    notebook.metadata |= {"kernelspec": KERNEL, "language_info": {"name": "python"}, "executed": made}
    write_text(ipynb, nbformat.writes(notebook).rstrip("\n") + "\n")
    os.utime(py)  # keep the script the newer side: JupyterLab refuses the pair otherwise
    return f"{py.stem}: ran in {time.perf_counter() - start:.0f} s, {ipynb.stat().st_size / 1e3:.0f} kB"


def mirror(root: Path, scratch: Path, folder: Path) -> Path:
    """Make `scratch` look like the repository without its runs (links); returns where `folder` lies in it."""
    inside = scratch / folder.relative_to(root.resolve())
    inside.mkdir(parents=True, exist_ok=True)
    for source, target in ((root.resolve(), scratch), (folder, inside)):
        for entry in source.iterdir():
            if entry.name not in NOT_SHOWN and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return inside


def tidy(notebook: NotebookNode, paths: dict[str, str]) -> None:
    """Leave what a reader came for: no stderr, no widgets, of a progress bar its last state, no path of this machine.

    `paths` maps folders to what stands for them, such as "~". Pictures are left alone.
    """
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"
                        and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
        for holder in [holder for output in cell.outputs for holder in (output, output.get("data", {}))]:
            for kind, text in holder.items():
                if isinstance(text, str) and kind not in ("image/png", "image/jpeg"):
                    holder[kind] = scrub(text, paths)


def scrub(text: str, paths: dict[str, str]) -> str:
    """The text with paths and addresses replaced, and of each line what stands behind its last carriage return."""
    for path in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(path)}(?![\w-])", lambda _, path=path: paths[path], text)
    text = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x…", re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text))
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="all where not given")
    root, pairs = Path.cwd(), find_pairs(Path.cwd())
    wanted = [path.resolve().with_suffix(".py") for path in parser.parse_args(arguments).notebooks] or pairs
    try:
        for py in wanted:
            if py not in pairs:
                raise PairError(f"{py.stem} is none of the notebooks: {', '.join(pair.stem for pair in pairs)}.")
            print(f"{py.stem}: running", flush=True)
            print(execute(py, root), flush=True)
    except (PairError, CellExecutionError, DeadKernelError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
