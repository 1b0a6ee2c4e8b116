"""The executor: what it commits was made by the source beside it, and holds nothing of this machine."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.dev.execute import execute, main, tidy
from helpers.dev.pairs import read_notebook, sync

SCRIPT = """\
# %% [markdown]
# # A notebook

# %% tags=["parameters"]
times = 2

# %%
import os, sys
from pathlib import Path
from helpers.first import double

print(double(times), os.environ["WANDB_MODE"], os.environ.get("WANDB_API_KEY"), os.environ["HF_HUB_OFFLINE"])
print("in", Path.cwd(), "at home", Path.home(), Path("runs").exists(), Path("helpers/first.py").exists())
print("noise", file=sys.stderr)

# %%
print("10 %\\r100 %", end="")
Path("runs").mkdir()
object()
"""


@pytest.fixture
def small(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository's pipeline.py: a helper that it imports, and an old run."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # its helpers are meant
    texts = {"helpers/__init__.py": "", "helpers/first.py": "def double(x):\n    return 2 * x\n",
             "runs/old/metrics.json": "{}", "pipeline.py": SCRIPT}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(repo / "pyproject.toml", tmp_path)
    sync(tmp_path / "pipeline.py")
    return tmp_path / "pipeline.py"


def notebook(small: Path) -> nbformat.NotebookNode:
    return read_notebook(small.with_suffix(".ipynb"))


def rewrite(small: Path, old: str, new: str) -> None:
    """Change the script and sync, as a developer would."""
    assert old in small.read_text()
    small.write_text(small.read_text().replace(old, new))
    sync(small)


def test_a_run_shows_what_a_reader_sees_and_nothing_of_this_machine(small, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    root = small.parent
    assert "ran in" in execute(small, root)
    cells = notebook(small).cells
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == [1, 2, 3]
    first, last = cells[2].outputs, cells[3].outputs
    assert [output.text for output in first] == ["4 disabled None 1\nin . at home ~ False True\n"]
    assert last[0].text == "100 %"
    assert last[1].data["text/plain"] == "<object at 0x…>"
    text = small.with_suffix(".ipynb").read_text()
    assert str(root) not in text and str(Path.home()) not in text
    assert notebook(small).metadata.language_info == {"name": "python"}
    assert set(notebook(small).metadata.executed) == {"commit", "date", "machine"}
    assert os.listdir(root / "runs") == ["old"]  # a run of the executor leaves nothing behind
    assert small.stat().st_mtime >= small.with_suffix(".ipynb").stat().st_mtime
    assert sync(small) == ""


def test_a_failing_cell_leaves_the_file_and_is_shown(small, capsys):
    rewrite(small, "object()", 'raise ValueError("recpie is not a parameter")')
    before = small.with_suffix(".ipynb").read_text()
    assert main([]) == 1
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err.rstrip())
    assert said.endswith("ValueError: recpie is not a parameter")
    assert small.with_suffix(".ipynb").read_text() == before


def test_pictures_are_left_alone_where_paths_are_replaced():
    shown = new_output("display_data", {"image/png": "iVBOR/home/me/w", "text/plain": "/home/me/x, /home/meg"})
    made = new_notebook(cells=[new_code_cell("1", outputs=[shown])])
    tidy(made, {"/home/me": "~"})
    assert made.cells[0].outputs[0].data == {"image/png": "iVBOR/home/me/w", "text/plain": "~/x, /home/meg"}
