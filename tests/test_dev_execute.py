"""Committed outputs: made by the executor, from the source beside them, with nothing of this machine in them."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from nbformat.v4 import new_output

from helpers.dev import execute as executor
from helpers.dev.execute import ExecutionError, chosen_pairs, execute, main, tidy
from helpers.dev.freshness import fingerprint, imported_files, inputs, problems
from helpers.dev.pairs import Pair, PairError, find_pairs, read_notebook, sync, write_notebook

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
def small(repo: Path, tmp_path: Path) -> Path:
    """A small repository: a pair, two helpers that it imports, one that it does not, tiny weights, an old run."""
    texts = {
        "helpers/__init__.py": "",
        "helpers/first.py": "def double(x):\n    from .second import factor\n\n    return factor * x\n",
        "helpers/second/__init__.py": "from helpers.second.inner import factor\n",
        "helpers/second/inner.py": "factor = 2\n",
        "helpers/second/table.json": "{}",
        "helpers/other.py": "",
        "helpers/tiny/model.safetensors": "weights",
        "runs/old/metrics.json": "{}",
        "pipeline.py": SCRIPT,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(repo / "jupytext.toml", tmp_path)
    sync(find_pairs(tmp_path)[0])
    return tmp_path


def pair_of(root: Path) -> Pair:
    return find_pairs(root)[0]


def shown(root: Path) -> str:
    return json.dumps([cell.get("outputs") for cell in read_notebook(pair_of(root).ipynb).cells])


def rewrite(root: Path, old: str, new: str) -> None:
    """Change the script and sync, as a developer would."""
    text = pair_of(root).py.read_text()
    assert old in text
    pair_of(root).py.write_text(text.replace(old, new))
    sync(pair_of(root))


def test_the_committed_outputs_are_fresh(repo):
    assert [problem for pair in find_pairs(repo) for problem in problems(pair, repo)] == []


def test_a_run_shows_what_a_reader_sees_and_nothing_of_this_machine(small, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert "ran in" in execute(pair_of(small), small)
    notebook = read_notebook(pair_of(small).ipynb)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3]
    first, last = notebook.cells[2].outputs, notebook.cells[3].outputs
    assert [output.text for output in first] == ["4 disabled None 1\nin . at home ~ False True\n"]
    assert last[0].text == "100 %"
    assert last[1].data["text/plain"] == "<object at 0x…>"
    assert str(small) not in shown(small) and str(Path.home()) not in shown(small)
    assert notebook.metadata.language_info == {"name": "python"}
    assert os.listdir(small / "runs") == ["old"]  # a run of the executor leaves nothing behind
    assert problems(pair_of(small), small) == []
    assert pair_of(small).py.stat().st_mtime >= pair_of(small).ipynb.stat().st_mtime


def test_outputs_are_stale_when_the_code_a_helper_or_the_weights_change(small):
    pair = pair_of(small)
    assert "holds no outputs" in problems(pair, small)[0]
    execute(pair, small)
    for name in ("helpers/first.py", "helpers/second/inner.py", "helpers/second/table.json",
                 "helpers/tiny/model.safetensors"):
        before = (small / name).read_text()
        (small / name).write_text(before + " ")
        assert "have changed since it ran" in problems(pair, small)[0], name
        (small / name).write_text(before)
    (small / "helpers/other.py").write_text("not = imported")
    rewrite(small, "# # A notebook", "# # A notebook, with a better title")
    assert problems(pair, small) == []
    rewrite(small, "times = 2", "times = 3")
    assert "have changed since it ran" in problems(pair, small)[0]
    pair.py.write_text(SCRIPT)
    assert "not in step" in problems(pair, small)[0]


def test_outputs_edited_by_hand_are_found(small):
    pair = pair_of(small)
    execute(pair, small)
    notebook = read_notebook(pair.ipynb)
    notebook.cells[2].outputs[0].text = "5\n"
    write_notebook(pair.ipynb, notebook)
    assert "that the executor did not write" in problems(pair, small)[0]
    notebook.cells[3].execution_count = 7
    write_notebook(pair.ipynb, notebook)
    assert "once each from top to bottom" in problems(pair, small)[1]


def test_a_failing_cell_leaves_the_file_and_is_shown(small, capsys):
    rewrite(small, "object()", 'raise ValueError("recpie is not a parameter")')
    before = pair_of(small).ipynb.read_text()
    assert main([]) == 1
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err.rstrip())
    assert "pipeline.ipynb, cell 4" in said
    assert said.endswith("ValueError: recpie is not a parameter")
    assert pair_of(small).ipynb.read_text() == before


def test_a_pair_out_of_step_is_not_run(small):
    pair_of(small).py.write_text(SCRIPT.replace("times = 2", "times = 4"))
    with pytest.raises(PairError, match="not in step"):
        execute(pair_of(small), small)


def test_outputs_that_are_too_large_are_refused(small, monkeypatch):
    before = pair_of(small).ipynb.read_text()
    monkeypatch.setattr(executor, "MAX_BYTES", 500)
    with pytest.raises(ExecutionError, match="would be 0.00 MB"):
        execute(pair_of(small), small)
    assert pair_of(small).ipynb.read_text() == before


def test_only_notebooks_of_the_repository_can_be_named(small):
    assert main([str(small / "pipeline.py")]) == 0 and problems(pair_of(small), small) == []
    assert chosen_pairs(small, []) == chosen_pairs(small, [small / "pipeline.ipynb"]) == [pair_of(small)]
    with pytest.raises(PairError, match=r"out.ipynb is none of the notebooks; they are pipeline.ipynb"):
        chosen_pairs(small, [small / "out.ipynb"])


def test_imports_are_followed_through_packages_and_relative_names(small):
    names = {path.relative_to(small).as_posix() for path in imported_files("from helpers import first", small)}
    assert names == {"helpers/__init__.py", "helpers/first.py", "helpers/second/__init__.py",
                     "helpers/second/inner.py"}
    assert imported_files("import os, numpy.linalg\nfrom numpy import linalg", small) == set()
    notebook = read_notebook(pair_of(small).ipynb)
    assert {path.name for path in inputs(notebook, small)} >= {"table.json", "model.safetensors"}
    notebook.cells[2].source += "\n%matplotlib inline\n!ls"
    assert len(fingerprint(notebook, small)) == 16  # magics do not break the reading of imports


def test_a_path_inside_another_word_stops_the_run_and_pictures_are_left_alone(small):
    notebook = read_notebook(pair_of(small).ipynb)
    notebook.cells[1].outputs = [new_output("display_data", {"image/png": "iVBOR/home/me/w", "text/plain": "x"})]
    tidy(notebook, {"/home/me": "~"})
    assert notebook.cells[1].outputs[0].data["image/png"] == "iVBOR/home/me/w"
    notebook.cells[1].outputs[0].data["text/plain"] = "cache_/home/me/x"
    with pytest.raises(ExecutionError, match="cell 2 shows /home/me"):
        tidy(notebook, {"/home/me": "~"})
