"""The pairs: which side wins, what is kept, when sync refuses."""

import os
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest
from jupytext.config import load_jupytext_config
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from helpers.dev.pairs import Pair, PairError, cells_of, check, find_pairs, main, read_notebook, read_script, sync

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
def pair(repo: Path, tmp_path: Path) -> Pair:
    """A synced pair whose two code cells have run."""
    shutil.copy(repo / "jupytext.toml", tmp_path)
    found = Pair(tmp_path / "pipeline.ipynb", tmp_path / "pipeline.py")
    found.py.write_text(SCRIPT)
    sync(found)
    notebook = read_notebook(found.ipynb)
    for count, cell in enumerate([c for c in notebook.cells if c.cell_type == "code"], start=1):
        cell.execution_count = count
        cell.outputs = [new_output("stream", name="stdout", text=f"output {count}\n")]
    nbformat.write(notebook, found.ipynb)
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def age(path: Path) -> None:
    """Give a file an old time, so that it would lose by time."""
    os.utime(path, (1, 1))


def printed(pair: Pair) -> list[str]:
    return ["".join(o.text for o in c.outputs) for c in read_notebook(pair.ipynb).cells if c.cell_type == "code"]


def test_the_committed_pairs_are_in_step(repo):
    pairs = find_pairs(repo)
    assert "pipeline" in [pair.name for pair in pairs]
    assert [check(pair) for pair in pairs if check(pair)] == []


def test_a_script_alone_gets_a_notebook_that_holds_the_same_cells(pair):
    notebook = read_notebook(pair.ipynb)
    assert cells_of(notebook) == [
        ("markdown", "# Title\n\nText.", ()),
        ("code", "a = 1", ("parameters",)),
        ("code", "print(a)", ()),
    ]
    assert notebook.metadata.kernelspec.name == "python3"
    assert check(pair) == ""


def test_a_notebook_alone_gets_a_script_without_a_header(pair):
    pair.py.unlink()
    assert "pipeline.py written from pipeline.ipynb" in sync(pair)
    assert pair.py.read_text() == SCRIPT


def test_a_header_that_an_editor_put_into_the_script_goes(pair):
    header = "# ---\n# jupyter:\n#   kernelspec:\n#     display_name: other\n#     name: other\n# ---\n\n"
    pair.py.write_text(header + SCRIPT)
    assert check(pair) == ""
    sync(pair)
    assert pair.py.read_text() == SCRIPT
    assert read_notebook(pair.ipynb).metadata.kernelspec.name == "python3"


def test_the_changed_script_wins_although_it_is_older_and_outputs_of_unchanged_cells_stay(pair):
    edit(pair.py, "print(a)", "print(a + 1)")
    age(pair.py)
    assert "cell 3" in check(pair)
    assert "pipeline.ipynb written from pipeline.py (cell 3 (code: print(a + 1))" in sync(pair)
    assert cells_of(read_notebook(pair.ipynb))[2][1] == "print(a + 1)"
    assert printed(pair) == ["output 1\n", ""]
    assert check(pair) == "" and sync(pair) == ""


def test_the_changed_notebook_wins_although_it_is_older(pair):
    edit(pair.ipynb, "print(a)", "print(a + 2)")
    age(pair.ipynb)
    sync(pair)
    assert "print(a + 2)" in pair.py.read_text()
    assert printed(pair) == ["output 1\n", "output 2\n"]


def test_a_changed_tag_is_a_change_and_keeps_the_output(pair):
    edit(pair.py, "# %%\nprint", '# %% tags=["proof"]\nprint')
    sync(pair)
    assert cells_of(read_notebook(pair.ipynb))[2][2] == ("proof",)
    assert printed(pair) == ["output 1\n", "output 2\n"]


def test_moved_cells_take_their_outputs_with_them(pair):
    pair.py.write_text("# %%\nprint(a)\n\n# %% tags=[\"parameters\"]\na = 1\n")
    sync(pair)
    assert printed(pair) == ["output 2\n", "output 1\n"]


def test_both_changed_is_refused_and_the_cells_are_named(pair):
    edit(pair.py, "a = 1", "a = 7")
    edit(pair.ipynb, "print(a)", "print(a, a)")
    before = pair.py.read_text(), pair.ipynb.read_text()
    with pytest.raises(PairError) as refused:
        sync(pair)
    assert "cell 2 (code: a = 7) changed in pipeline.py" in str(refused.value)
    assert "cell 3 (code: print(a, a)) changed in pipeline.ipynb" in str(refused.value)
    assert (pair.py.read_text(), pair.ipynb.read_text()) == before
    sync(pair, take="py")
    assert check(pair) == "" and "a = 7" in pair.ipynb.read_text() and "print(a, a)" not in pair.ipynb.read_text()


def test_both_changed_alike_is_no_conflict_and_is_recorded(pair):
    edit(pair.py, "print(a)", "print(-a)")
    edit(pair.ipynb, "print(a)", "print(-a)")
    assert "older" in check(pair)
    assert "recorded" in sync(pair)
    assert check(pair) == ""


def test_two_sides_that_were_never_synced_are_refused(pair):
    notebook = read_notebook(pair.ipynb)
    del notebook.metadata["pair"]
    nbformat.write(notebook, pair.ipynb)
    edit(pair.py, "a = 1", "a = 7")
    with pytest.raises(PairError, match=r"they differ in cell 2 \(code: a = 7\)"):
        sync(pair)


def test_removed_cells_are_seen(pair):
    edit(pair.py, "\n# %%\nprint(a)\n", "")
    assert "1 removed changed in pipeline.py" in check(pair)
    sync(pair)
    assert len(read_notebook(pair.ipynb).cells) == 2


def test_a_notebook_with_conflict_markers_is_named(pair):
    pair.ipynb.write_text("<<<<<<< HEAD\n" + pair.ipynb.read_text())
    with pytest.raises(PairError, match="pipeline.ipynb is not a notebook"):
        sync(pair)


def test_magics_raw_and_empty_cells_survive_and_a_marker_inside_a_cell_is_refused(repo, tmp_path):
    shutil.copy(repo / "jupytext.toml", tmp_path)
    pair = Pair(tmp_path / "pipeline.ipynb", tmp_path / "pipeline.py")
    cells = [new_markdown_cell("- é “x”"), new_code_cell("%matplotlib inline\n!ls"), new_raw_cell("raw"),
             new_code_cell(""), new_code_cell('"""\n\n\ntext\n"""')]
    nbformat.write(new_notebook(cells=cells), pair.ipynb)
    sync(pair)
    assert cells_of(read_script(pair.py)) == cells_of(new_notebook(cells=cells))
    assert "# %matplotlib inline" in pair.py.read_text()  # a comment: the script stays plain Python
    pair.py.unlink()
    nbformat.write(new_notebook(cells=[new_code_cell("a = 1\n# %%\nb = 2")]), pair.ipynb)
    with pytest.raises(PairError, match="would not give back cell 1"):
        sync(pair)
    assert not pair.py.exists()


def test_stray_twins_of_run_outputs_are_ignored(pair, tmp_path, capsys):
    for name in ("runs/demo/pipeline.py", "runs/demo/pipeline.ipynb", "other.py", "notebooks/topic.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SCRIPT)
    assert [p.name for p in find_pairs(tmp_path)] == ["pipeline", "topic"]
    assert main(["check"]) == 1
    assert main(["sync"]) == 0
    assert main(["check"]) == 0
    assert "2 pairs in step" in capsys.readouterr().out
    assert (tmp_path / "runs/demo/pipeline.ipynb").read_text() == SCRIPT


def test_jupyterlab_pairs_the_sources_and_leaves_run_outputs_alone(repo):
    formats = {name: load_jupytext_config(str(repo / name)).default_formats(str(repo / name)) for name in
               ("pipeline.ipynb", "notebooks/topic.ipynb", "runs/r4-joint.ipynb", "runs/demo/demo.ipynb", "out.ipynb")}
    assert formats["pipeline.ipynb"] and formats["notebooks/topic.ipynb"]
    assert not any(formats[name] for name in ("runs/r4-joint.ipynb", "runs/demo/demo.ipynb", "out.ipynb"))
    for name in ("jupytext.toml", "notebooks/jupytext.toml"):
        settings = tomllib.loads((repo / name).read_text())
        assert (settings["notebook_metadata_filter"], settings["cell_metadata_filter"]) == ("-all", "tags,-all")
