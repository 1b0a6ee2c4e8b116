"""Every topic notebook: what is committed, and that it runs from its own folder, as papermill and JupyterLab do it."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from helpers.dev import thumbnails
from helpers.dev.execute import mirror
from helpers.dev.freshness import MAX_BYTES
from helpers.dev.pairs import Pair, check, find_pairs, read_notebook, sync
from helpers.dev.thumbnails import ThumbnailError, picture_of, problem, shrink, topics

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [pair.ipynb for pair in topics(ROOT)]
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
def test_a_committed_notebook_is_paired_executed_small_and_short(path):
    assert check(Pair(path, path.with_suffix(".py"))) == ""
    cells = read_notebook(path).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert path.stat().st_size <= MAX_BYTES
    (parameters,) = tagged(path, "parameters")
    for node in ast.parse(cells[parameters].source).body:
        ast.literal_eval(node.value)  # literals only: nothing is derived before the values are injected
    assert "opening(globals()," in cells[parameters + 1].source
    if path.stem != "00_tiny_base":
        assert 15 <= len(cells) <= 30, f"{len(cells)} cells"
        assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


def test_a_kernel_that_starts_in_the_folder_finds_the_helpers():
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", "import helpers.parameters"], cwd=ROOT / "notebooks", env=clean, check=True)


@pytest.mark.parametrize("opened", [".", "notebooks"])
def test_jupyterlab_keeps_the_pair_whichever_folder_it_is_started_in(opened, tmp_path, monkeypatch):
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

    (tmp_path / "notebooks").mkdir()
    for name in ("jupytext.toml", "notebooks/jupytext.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    pair = Pair(tmp_path / "notebooks/topic.ipynb", tmp_path / "notebooks/topic.py")
    pair.py.write_text('# %% [markdown]\n# # Topic\n\n# %% tags=["parameters"]\na = 1\n')
    sync(pair)
    monkeypatch.chdir(tmp_path / opened)
    manager = build_sync_jupytext_contents_manager_class(LargeFileManager)(root_dir=str(tmp_path / opened))
    name = pair.ipynb.relative_to(tmp_path / opened).as_posix()
    model = manager.get(name)
    model["content"]["cells"][1]["source"] = "a = 2"
    manager.save(model, name)
    assert pair.py.read_text() == '# %% [markdown]\n# # Topic\n\n# %% tags=["parameters"]\na = 2\n'
    assert read_notebook(pair.ipynb).metadata.kernelspec.name == "python3" and "recorded" in sync(pair)


def test_every_notebook_has_a_fresh_thumbnail():
    assert [said for pair in topics(ROOT) if (said := problem(pair))] == []


def test_the_readme_shows_every_notebook_with_its_thumbnail_and_no_other():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r'^\| \[`(\w+)`\]\(notebooks/(\w+)\.ipynb\) \| (.+?) \| '
                      r'<img src="notebooks/thumbnails/(\w+)\.png"', text, re.M)
    assert [row[0] for row in rows] == [path.stem for path in NOTEBOOKS]
    assert all(name == link == picture and line for name, link, line, picture in rows)


def png(size=(900, 500), kind="png", noise=False) -> str:
    image = Image.effect_noise(size, 90).convert("RGB") if noise else Image.new("RGB", size, "teal")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return thumbnails.base64.b64encode(buffer.getvalue()).decode()


def shows(*pictures: str, tags=()) -> nbformat.NotebookNode:
    """A code cell that shows pictures."""
    outputs = [new_output("display_data", {"image/png": picture}) for picture in pictures]
    return new_code_cell("1", outputs=outputs, metadata={"tags": list(tags)})


def test_the_tagged_cell_gives_the_thumbnail_and_else_the_last_picture():
    small, large, other = (png((width, 10)) for width in (10, 20, 30))
    decode = thumbnails.base64.b64decode
    assert picture_of(new_notebook(cells=[shows(small, large), shows(other)]), "x") == decode(other)
    assert picture_of(new_notebook(cells=[shows(small, large, tags=["thumbnail"]), shows(other)]), "x") == decode(large)
    with pytest.raises(ThumbnailError, match="x.ipynb has no thumbnail: it shows no picture"):
        picture_of(new_notebook(cells=[shows()]), "x.ipynb")
    with pytest.raises(ThumbnailError, match="its cell tagged thumbnail shows no picture"):
        picture_of(new_notebook(cells=[shows(small), shows(tags=["thumbnail"])]), "x.ipynb")


@pytest.mark.parametrize("noise", [False, True])
def test_a_thumbnail_is_small_whatever_the_picture(noise):
    made = shrink(thumbnails.base64.b64decode(png((2400, 1400), noise=noise)))
    with Image.open(io.BytesIO(made)) as image:
        assert image.format == "PNG" and image.width in thumbnails.WIDTHS
        assert abs(image.width / image.height - 2400 / 1400) < 0.02
    assert len(made) <= thumbnails.MAX_BYTES


def test_thumbnails_that_are_missing_stale_or_left_over_are_told_and_made_again(tmp_path, capsys):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    pair = Pair(notebooks / "topic.ipynb", notebooks / "topic.py")
    nbformat.write(new_notebook(cells=[shows(png())]), pair.ipynb)
    assert "topic.png is missing" in problem(pair)
    assert thumbnails.main() == 0 and "1 thumbnails" in capsys.readouterr().out
    assert problem(pair) == ""
    nbformat.write(new_notebook(cells=[shows(png((40, 30)))]), pair.ipynb)
    assert "made of another picture" in problem(pair)
    shutil.copy(notebooks / "thumbnails/topic.png", notebooks / "thumbnails/gone.png")
    assert thumbnails.main() == 0 and problem(pair) == "" and not (notebooks / "thumbnails/gone.png").exists()
    nbformat.write(new_notebook(cells=[shows()]), pair.ipynb)
    assert thumbnails.main() == 1 and "has no thumbnail" in capsys.readouterr().out


def test_make_notebooks_makes_the_thumbnails_after_the_outputs(repo):
    recipe = re.search(r"^notebooks:.*\n((?:\t.*\n)+)", (repo / "Makefile").read_text(), re.M)[1]
    commands = re.findall(r"-m (helpers\.dev\.\w+)", recipe)
    assert commands == ["helpers.dev.execute", "helpers.dev.thumbnails"]
    assert find_pairs(repo)[0].name == "pipeline" and "pipeline" not in [pair.name for pair in topics(repo)]
