"""The Makefile's targets, with stand-ins for the programs that would run for minutes."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.dev.gpus import groups_of, take

RECIPES = ["r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint"]
PAPERMILL = """\
#!/bin/sh
echo "start ${CUDA_VISIBLE_DEVICES-unset} $*" >> log
sleep 0.6
echo "end ${CUDA_VISIBLE_DEVICES-unset}" >> log
case "$*" in *r9*) echo "ValueError: no recipe r9" >&2; exit 1;; esac
"""


@pytest.fixture
def checkout(repo: Path, tmp_path: Path) -> Path:
    """The Makefile with an environment that is already made, in which papermill only writes down how it was called."""
    shutil.copy(repo / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in {"python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "papermill": PAPERMILL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    hidden = ("MAKEFLAGS", "MAKELEVEL", "CUDA_VISIBLE_DEVICES")  # the tests may themselves run under make
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=100, env=clean)


def test_help_is_the_default_and_names_every_target(repo, checkout):
    told = make(checkout)
    assert told.returncode == 0 and told.stdout == make(checkout, "help").stdout
    makefile = (repo / "Makefile").read_text().replace("\\\n", " ")  # a long line goes on behind a backslash
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert [line.split()[1] for line in told.stdout.splitlines()] == phony


def test_run_passes_recipe_scale_gpus_and_further_parameters(checkout):
    done = make(checkout, "run", "RECIPE=r1-llm-only", "GPUS=0,1", "SCALE=7b", "ARGS=-p epochs 1")
    assert done.returncode == 0, done.stderr
    start = (checkout / "log").read_text().splitlines()[0]
    assert start.startswith("start 0,1 ")
    assert start.endswith("pipeline.ipynb runs/r1-llm-only.ipynb -p recipe r1-llm-only -p scale 7b -p epochs 1")


def test_run_without_gpus_hides_none_and_a_failure_is_a_failure(checkout):
    done = make(checkout, "run", "RECIPE=r9")
    assert done.returncode != 0 and "no recipe r9" in done.stderr
    assert (checkout / "log").read_text().startswith("start unset ")


def test_recipes_run_one_after_the_other(checkout):
    assert make(checkout, "recipes", "GPUS=0").returncode == 0
    lines = (checkout / "log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["start", "end"] * 4
    assert [re.search(r"recipe (\S+)", line)[1] for line in lines[::2]] == RECIPES


def test_recipes_run_side_by_side_each_on_its_own_gpus(checkout):
    assert make(checkout, "-j2", "recipes", "GPUS=0,1 2,3").returncode == 0
    lines = [line.split()[:2] for line in (checkout / "log").read_text().splitlines()]
    running: set[str] = set()
    most = 0
    for event, group in lines:
        assert (event == "start") == (group not in running)  # never two on one group
        running ^= {group}
        most = max(most, len(running))
    assert most == 2 and {group for _, group in lines} == {"0,1", "2,3"} and len(lines) == 8


def test_more_jobs_than_groups_wait_for_a_free_one(checkout):
    done = make(checkout, "-j4", "recipes", "RECIPES=r1-llm-only r4-joint")
    assert done.returncode == 0 and "waiting for a free group" in done.stderr
    assert [line.split()[0] for line in (checkout / "log").read_text().splitlines()] == ["start", "end"] * 2


def test_demo_pins_the_tiny_scale_and_keeps_its_outputs_in_runs(checkout):
    assert make(checkout, "demo").returncode == 0
    start = (checkout / "log").read_text().splitlines()[0]
    assert "pipeline.ipynb runs/demo/demo.ipynb -p recipe r1-llm-only -p scale tiny -p output_root runs/demo" in start


def test_compare_asks_for_both_runs(checkout):
    assert "A= is missing" in make(checkout, "compare", "B=runs/b").stderr
    assert "B= is missing" in make(checkout, "compare", "A=runs/a").stderr


def test_export_asks_for_a_model_and_pushes_only_when_told(checkout):
    assert "MODEL= is missing" in make(checkout, "export").stderr
    assert "--push" not in make(checkout, "-n", "export", "MODEL=runs/a-merged", "OUTPUT=out").stdout
    assert "--push me/tables" in make(checkout, "-n", "export", "MODEL=runs/a-merged", "PUSH=me/tables").stdout


def test_an_old_python_is_refused_in_one_sentence(checkout):
    (checkout / ".venv" / ".installed").unlink()
    (checkout / "old").write_text("#!/bin/sh\nexit 1\n")
    (checkout / "old").chmod(0o755)
    for choice in (f"PYTHON={checkout}/old", "PYTHON="):
        done = make(checkout, "setup", choice)
        assert done.returncode != 0
        assert "Python 3.11 or newer is needed" in done.stderr


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements.lock"])
def test_setup_is_done_once_and_again_when_the_dependencies_change(checkout, changed):
    assert "pip install" not in make(checkout, "-n", "setup").stdout
    later = time.time() + 10
    os.utime(checkout / changed, (later, later))
    said = make(checkout, "-n", "setup").stdout
    assert "--require-hashes --no-deps --requirement requirements.lock" in said


def test_rerun_asks_for_a_run(checkout):
    assert "RUN= is missing" in make(checkout, "rerun").stderr


def test_clean_keeps_runs_and_the_environment(checkout):
    for name in ("runs/demo/demo.ipynb", "runs/r4-joint.ipynb", "helpers/__pycache__/a.pyc", ".ruff_cache/x"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert make(checkout, "clean").returncode == 0
    left = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    assert left == {"Makefile", "pyproject.toml", "requirements.lock",
                    "runs/r4-joint.ipynb", ".venv/.installed", ".venv/bin/python",
                    ".venv/bin/papermill"}


def test_groups_of_gpus_are_read_and_refused():
    assert groups_of("0,1 2,3") == ["0,1", "2,3"]
    assert groups_of("7") == ["7"] and groups_of(" ") == ["all"]
    for wrong in ("a", "0,", "0;1", "-1"):
        with pytest.raises(ValueError, match="expected GPU numbers"):
            groups_of(wrong)
    with pytest.raises(ValueError, match="names a GPU twice"):
        groups_of("0,1 1,2")


def test_a_group_is_free_again_when_its_lock_is_closed(tmp_path):
    first, lock = take(["0", "1"], tmp_path)
    second, other = take(["0", "1"], tmp_path)
    assert (first, second) == ("0", "1")
    os.close(lock)
    assert take(["0", "1"], tmp_path, pause=0.01)[0] == "0"
    os.close(other)


def test_using_a_model_passes_on_what_is_named_and_asks_for_what_is_missing(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$*" >> log\n')
    for words, command in {
        ("app",): "-m helpers.app --port 7860",
        ("app", "MODEL=runs/x-merged", "PORT=1234"): "-m helpers.app runs/x-merged --port 1234",
        ("serve", "MODEL=runs/x-merged"): "-m helpers.serve runs/x-merged --port 8000",
        ("predict", "INPUT=photos", "OUTPUT=boxes", "MODEL=runs/x-merged", "ARGS=--coco"):
            "-m helpers.many photos boxes --model runs/x-merged --coco",
    }.items():
        done = make(checkout, *words)
        assert done.returncode == 0, done.stderr
        assert (checkout / "log").read_text().splitlines()[-1] == command
    assert "INPUT= is missing" in make(checkout, "predict", "OUTPUT=boxes").stderr
    assert "OUTPUT= is missing" in make(checkout, "predict", "INPUT=photos").stderr


@pytest.mark.parametrize("odd", ["my photos", "it's", 'the "best" ones', "a $b `c` (d) & e; f, g"])
def test_paths_with_spaces_quotes_and_dollars_reach_the_programs_as_they_are(checkout, odd):
    (checkout / ".venv" / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > log\n')
    given = [f"INPUT={odd} in", f"OUTPUT={odd} out", f"MODEL={odd} model", f"RUN={odd} run"]
    for target, words in {
        "predict": ["helpers.many", f"{odd} in", f"{odd} out", "--model", f"{odd} model"],
        "app": ["helpers.app", f"{odd} model", "--port", "7860"],
        "serve": ["helpers.serve", f"{odd} model", "--port", "8000"],
        "export": ["helpers.export", f"{odd} model", "--output", f"{odd} out", "--run", f"{odd} run"],
        "rerun": ["helpers.dev.rerun", f"{odd} run"],
    }.items():
        done = make(checkout, target, *given)
        assert done.returncode == 0, done.stderr
        assert (checkout / "log").read_text().splitlines() == ["-m", *words]
