"""The pairs: which side wins, what is kept, when sync refuses."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from jupytext.config import load_jupytext_config
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from helpers.dev.pairs import PairError, cells_of, check, find_pairs, main, read_notebook, read_script, sync

SCRIPT = """\
# %% [markdown]
# # Title
#
# Text.

# %% tags=["parameters"]
a = 1

# %%
print(a)
"""


@pytest.fixture
def pair(repo: Path, tmp_path: Path) -> Path:
    """A synced pair whose two code cells have run."""
    shutil.copy(repo / "pyproject.toml", tmp_path)
    found = tmp_path / "pipeline.py"
    found.write_text(SCRIPT)
    sync(found)
    notebook = read_notebook(found.with_suffix(".ipynb"))
    for count, cell in enumerate([c for c in notebook.cells if c.cell_type == "code"], start=1):
        cell.execution_count = count
        cell.outputs = [new_output("stream", name="stdout", text=f"output {count}\n")]
    nbformat.write(notebook, found.with_suffix(".ipynb"))
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def printed(pair: Path) -> list[str]:
    cells = read_notebook(pair.with_suffix(".ipynb")).cells
    return ["".join(output.text for output in cell.outputs) for cell in cells if cell.cell_type == "code"]


def test_a_script_alone_gets_a_notebook_that_holds_the_same_cells(pair):
    notebook = read_notebook(pair.with_suffix(".ipynb"))
    assert cells_of(notebook) == [("markdown", "# Title\n\nText.", ()), ("code", "a = 1", ("parameters",)),
                                  ("code", "print(a)", ())]
    assert notebook.metadata.kernelspec.name == "python3" and check(pair) == ""


@pytest.mark.parametrize(("side", "outputs"), [(".py", ["output 1\n", ""]), (".ipynb", ["output 1\n", "output 2\n"])])
def test_the_changed_side_wins_although_it_is_older_and_outputs_of_unchanged_cells_stay(pair, side, outputs):
    edit(pair.with_suffix(side), "print(a)", "print(a + 1)")
    os.utime(pair.with_suffix(side), (1, 1))  # it would lose by time
    assert f"cell 3 (print(a + 1)) in pipeline{side}" in check(pair)
    assert f"written from pipeline{side} (cell 3" in sync(pair)
    for cells in (read_notebook(pair.with_suffix(".ipynb")), read_script(pair)):
        assert cells_of(cells)[2][1] == "print(a + 1)"
    assert printed(pair) == outputs and check(pair) == "" and sync(pair) == ""


def test_both_changed_is_refused_and_the_cells_are_named(pair):
    edit(pair, "a = 1", "a = 7")
    edit(pair.with_suffix(".ipynb"), "print(a)", "print(a, a)")
    before = pair.read_text(), pair.with_suffix(".ipynb").read_text()
    with pytest.raises(PairError, match=r"cell 3 \(print\(a, a\)\) in pipeline.ipynb, cell 2 \(a = 7\) in pipeline.py"):
        sync(pair)
    assert (pair.read_text(), pair.with_suffix(".ipynb").read_text()) == before
    sync(pair, take="py")
    assert check(pair) == ""
    assert [cell[1] for cell in cells_of(read_notebook(pair.with_suffix(".ipynb")))[1:]] == ["a = 7", "print(a)"]


def test_magics_raw_and_empty_cells_survive_and_a_marker_inside_a_cell_is_refused(repo, tmp_path):
    shutil.copy(repo / "pyproject.toml", tmp_path)
    pair, ipynb = tmp_path / "pipeline.py", tmp_path / "pipeline.ipynb"
    cells = [new_markdown_cell("- é “x”"), new_code_cell("%matplotlib inline\n!ls"), new_raw_cell("raw"),
             new_code_cell(""), new_code_cell('"""\n\n\ntext\n"""')]
    nbformat.write(new_notebook(cells=cells), ipynb)
    sync(pair)
    assert cells_of(read_script(pair)) == cells_of(new_notebook(cells=cells))
    assert "# %matplotlib inline" in pair.read_text()  # a comment: the script stays plain Python
    pair.unlink()
    nbformat.write(new_notebook(cells=[new_code_cell("a = 1\n# %%\nb = 2")]), ipynb)
    with pytest.raises(PairError, match="would not give back the same cells"):
        sync(pair)
    assert not pair.exists()


def test_stray_twins_of_run_outputs_are_ignored(pair, tmp_path, capsys):
    for name in ("runs/demo/pipeline.py", "runs/demo/pipeline.ipynb", "other.py", "notebooks/topic.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SCRIPT)
    assert [p.name for p in find_pairs(tmp_path)] == ["pipeline.py", "topic.py"]
    assert main([]) == 0
    assert "topic.ipynb written from topic.py" in capsys.readouterr().out
    assert [check(p) for p in find_pairs(tmp_path)] == ["", ""]
    edit(pair, "a = 1", "a = 7")
    edit(pair.with_suffix(".ipynb"), "a = 1", "a = 8")
    assert main([]) == 1 and "make sync TAKE=py" in capsys.readouterr().out
    assert main(["--take", "ipynb"]) == 0 and "a = 8" in pair.read_text()
    assert (tmp_path / "runs/demo/pipeline.ipynb").read_text() == SCRIPT


def test_jupytext_pairs_the_sources_and_leaves_run_outputs_alone(repo):
    formats = {name: load_jupytext_config(str(repo / name)).default_formats(str(repo / name)) for name in
               ("pipeline.ipynb", "notebooks/topic.ipynb", "runs/r4-joint.ipynb", "runs/demo/demo.ipynb", "out.ipynb")}
    assert formats["pipeline.ipynb"] and formats["notebooks/topic.ipynb"]
    assert not any(formats[name] for name in ("runs/r4-joint.ipynb", "runs/demo/demo.ipynb", "out.ipynb"))
