"""A run's steps: done with the same inputs, done again with others, never done by halves."""

import subprocess

import pytest

from helpers import runs
from helpers.settings import ParameterError


def done(folder, made, **inputs):
    """Whether the step had to be done."""
    with runs.step(folder, "merge", inputs, made=made) as todo:
        if todo:
            made.write_text("made")
    return todo


@pytest.fixture
def folder(tmp_path):
    runs.write_json(tmp_path / "manifest.json", {"timings": {}, "peak_memory": {}})
    return tmp_path


def test_a_step_is_done_once_with_the_same_inputs(folder, capsys):
    made = folder / "model"
    assert done(folder, made, weights="a") and not done(folder, made, weights="a")
    assert done(folder, made, weights="b") and not done(folder, made, weights="b")
    made.unlink()
    assert done(folder, made, weights="b"), "what it made is gone"
    assert capsys.readouterr().out.count("merge: ") == 3
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["timings"]["merge"] >= 0 and manifest["peak_memory"]["host"] > 0


def test_a_step_that_fails_is_not_done(folder):
    made = folder / "model"
    made.write_text("from before")
    with pytest.raises(OSError), runs.step(folder, "merge", {}, made=made) as todo:
        assert todo
        raise OSError("the disk is full")
    assert done(folder, made) and not done(folder, made)


def test_a_step_that_another_process_does_is_refused_or_waited_for(folder):
    with runs.exclusive(folder / "train"), pytest.raises(ParameterError, match="another process is at work on"):
        with runs.step(folder, "train", {}, wait=False):
            raise AssertionError("not while another does it")


def test_a_commit_is_marked_where_code_differs_and_not_where_results_were_written(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    names = ("helpers/runs.py", "README.md", "results.json", "notebooks/a.ipynb")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "helpers" / "runs.py"))
    clean = runs.git_revision()
    for name in names[1:]:
        (tmp_path / name).write_text("after")
    assert len(clean) == 10 and runs.git_revision() == clean
    (tmp_path / "helpers" / "runs.py").write_text("after")
    assert runs.git_revision() == clean + "+"
