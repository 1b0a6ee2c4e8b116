"""The Makefile's targets, with stand-ins for the programs that would run for minutes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTE = f"""\
#!{sys.executable}
import json, sys
with open("log", "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
if "r9" in sys.argv:
    sys.exit("ValueError: no recipe r9")
"""


@pytest.fixture
def checkout(repo: Path, tmp_path: Path) -> Path:
    """The Makefile with an environment that is already made, whose programs only write down how they were called."""
    folder = tmp_path / "a checkout"
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(repo / "Makefile", folder)
    for name in ("pyproject.toml", "requirements.lock"):
        (folder / name).touch()
    for name in ("python", "papermill"):
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    return folder


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    hidden = ("MAKEFLAGS", "MAKELEVEL")  # the tests may themselves run under make
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=100, env=clean)


def calls(folder: Path, *words: str) -> list[list[str]]:
    """The words that each program was called with by `make *words`, but for the calls of `make sync`."""
    (folder / "log").unlink(missing_ok=True)
    done = make(folder, *words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [line for line in lines if line[:2] != ["-m", "helpers.dev.pairs"]]


def test_help_is_the_default_and_names_every_target(repo, checkout):
    told = make(checkout)
    assert told.returncode == 0 and told.stdout == make(checkout, "help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (repo / "Makefile").read_text(), re.M)[1].split()
    assert [line.split()[1] for line in told.stdout.splitlines()] == phony and len(phony) <= 20


def test_run_passes_recipe_scale_gpus_and_further_parameters(checkout):
    (words,) = calls(checkout, "run", "RECIPE=r1-llm-only", "GPUS=0,1", "SCALE=7b", "ARGS=-p epochs 1 -p hf_home 'a b'")
    assert words[words.index("pipeline.ipynb"):] == [
        "pipeline.ipynb", "runs/r1-llm-only.ipynb", "-p", "recipe", "r1-llm-only", "-p", "scale", "7b", "-p", "gpus",
        "0,1", "-p", "epochs", "1", "-p", "hf_home", "a b"]
    assert "gpus" not in calls(checkout, "run")[0]


def test_a_failed_run_is_a_failure_and_ends_the_recipes(checkout):
    done = make(checkout, "run", "RECIPE=r9")
    assert done.returncode != 0 and "no recipe r9" in done.stderr
    done = make(checkout, "recipes", "RECIPES=r9 r4-joint")
    assert done.returncode != 0 and "r4-joint" not in (checkout / "log").read_text()


def test_paths_with_spaces_quotes_and_dollars_reach_the_programs_as_they_are(checkout):
    odd = """it's "a" $b `c` (d) & e; f, g"""
    given = [f"{name}={odd} {name.lower()}" for name in ("INPUT", "OUTPUT", "MODEL", "RUN", "A", "B")]
    for target, words in {
        "predict": [f"{odd} input", f"{odd} output", "--model", f"{odd} model"],
        "app": [f"{odd} model", "--port", "7860"],
        "serve": [f"{odd} model", "--port", "8000"],
        "export": [f"{odd} model", "--output", f"{odd} output", "--run", f"{odd} run"],
        "compare": ["compare", f"{odd} a", f"{odd} b"],
    }.items():
        assert calls(checkout, target, *given)[0][2:] == words


def test_test_and_test_all_differ_by_the_long_ones(checkout):
    ruff = checkout / ".venv/bin/ruff"
    for name in ("ruff", "mypy"):
        shutil.copy(checkout / ".venv/bin/python", ruff.with_name(name))
    short = calls(checkout, "test", "PYTEST_ARGS=-k boxes")
    assert [words[:2] for words in short] == [["check", "."], [], ["-m", "pytest"]]
    assert short[-1][-4:] == ["-m", "not slow", "-k", "boxes"]
    assert "not slow" not in calls(checkout, "test-all")[-1]


def test_clean_keeps_runs_and_the_environment(checkout):
    for name in ("runs/demo/demo.ipynb", "runs/r4-joint.ipynb", "helpers/__pycache__/a.pyc", ".ruff_cache/x"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert make(checkout, "clean").returncode == 0
    left = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "requirements.lock", "runs/r4-joint.ipynb", ".venv/.installed",
                    ".venv/bin/python", ".venv/bin/papermill"}
