"""Every topic notebook runs from its own folder, as papermill does it; a misspelled name is refused."""

import ast
import re
import shutil
import statistics
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.dev.execute import mirror
from helpers.dev.pairs import find_pairs, read_notebook, sync

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [py.with_suffix(".ipynb") for py in find_pairs(ROOT) if py.parent.name == "notebooks"]
# What makes a notebook quick. One that is not named here runs with its defaults.
SMALL = {
    "00_tiny_base": {"checked": 12},
    "01_dataset_exploration": {"train_limit": 48, "val_limit": 24},
    "02_model_understanding": {"pictures": 8},
    "03_data_preprocessing": {"val_limit": 16},
    "04_evaluation_analysis": {"train_pictures": 16, "val_pictures": 12, "selection_pictures": 12,
                               "prompt_pictures": 2},
    "05_debug_dtype_issue": {"pictures": 3, "steps": 5},
    "06_quantization_and_trainable_params": {"ranks": "2", "steps": 3, "pictures": 4},
    "07_performance": {"pictures": 2, "batch_size": 2, "steps": 2},
    "08_deployment": {"steps": 2, "pictures": 4, "callers": "1,2", "requests": 4},
    "09_detector_baseline": {"epochs": 1, "train_limit": 4, "val_limit": 8},  # a single step
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def tagged(path: Path, tag: str) -> list[int]:
    """Where a notebook's cells with this tag stand."""
    return [i for i, cell in enumerate(read_notebook(path).cells) if tag in cell.metadata.get("tags", ())]


def start(path: Path, folder: Path, **values) -> nbformat.NotebookNode:
    """Run a notebook as papermill does, in a copy of its own folder: what it writes stays out of the repository."""
    own = mirror(ROOT, folder, path.parent)
    return papermill.execute_notebook(path, folder / "out.ipynb", values, cwd=str(own), progress_bar=False)


@pytest.mark.slow
@each_notebook
def test_a_topic_notebook_runs_from_its_own_folder(path, tmp_path):
    ran = start(path, tmp_path, **SMALL.get(path.stem, {}))
    assert all(cell.execution_count for cell in ran.cells if cell.cell_type == "code" and cell.source.strip())


@each_notebook
def test_a_misspelled_parameter_is_refused_with_one_sentence(path, tmp_path):
    (cell,) = tagged(path, "parameters")
    right = ast.parse(read_notebook(path).cells[cell].source).body[0].targets[0].id
    with pytest.raises(PapermillExecutionError) as refused:
        start(path, tmp_path, **{right + "s": 1})
    assert refused.value.ename == "ParameterError"
    said = refused.value.evalue
    assert said.startswith(f"{right}s is not a parameter; did you mean {right}? ") and "\n" not in said
    ran = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.get("execution_count")]
    assert len(ran) <= 3  # the parameters, papermill's own, and the cell that checks them: before any work


@each_notebook
def test_a_notebook_is_short_and_its_parameters_are_literals(path):
    cells = read_notebook(path).cells
    (parameters,) = tagged(path, "parameters")
    for node in ast.parse(cells[parameters].source).body:
        ast.literal_eval(node.value)  # literals only: nothing is derived before the values are injected
    assert "opening(globals()," in cells[parameters + 1].source
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    lines = [len(re.findall(r"^ *[^ #\n]", source, re.M)) for source in code]
    assert sum(lines) <= 120 and statistics.median(lines) <= 8 and max(lines[1:]) <= 25
    assert not any("helpers.dev" in source for source in code)
    if path.stem != "00_tiny_base":
        assert 15 <= len(cells) <= 30, f"{len(cells)} cells"
        assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@pytest.mark.parametrize("opened", [".", "notebooks"])
def test_jupyterlab_keeps_the_pair_whichever_folder_it_is_started_in(opened, tmp_path, monkeypatch):
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

    (tmp_path / "notebooks").mkdir()
    for name in ("pyproject.toml", "notebooks/jupytext.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    py = tmp_path / "notebooks/topic.py"
    ipynb = py.with_suffix(".ipynb")
    py.write_text('# %% [markdown]\n# # Topic\n\n# %% tags=["parameters"]\na = 1\n')
    sync(py)
    monkeypatch.chdir(tmp_path / opened)
    manager = build_sync_jupytext_contents_manager_class(LargeFileManager)(root_dir=str(tmp_path / opened))
    name = ipynb.relative_to(tmp_path / opened).as_posix()
    model = manager.get(name)
    model["content"]["cells"][1]["source"] = "a = 2"
    manager.save(model, name)
    assert py.read_text() == '# %% [markdown]\n# # Topic\n\n# %% tags=["parameters"]\na = 2\n'
    assert read_notebook(ipynb).metadata.kernelspec.name == "python3" and sync(py) == ""
