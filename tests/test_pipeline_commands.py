"""The pipeline as people start it: papermill, a script, several processes; killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
from pipeline_runner import SMALL

from helpers import predict, trainer

PREFIX = "runs/qwen2vl-nutrition-detection-"
BIN = Path(sys.executable).parent


def command(repo: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | environment)


def losses(folder: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.read_log(Path(folder) / "log.jsonl")]


def test_papermill_runs_the_notebook_with_a_recipe(repo):
    small = dict(word.split("=") for word in SMALL)
    values = {name: int(value) if value.isdigit() else value for name, value in small.items()}
    papermill.execute_notebook(repo / "pipeline.ipynb", "out.ipynb", parameters=values | {"recipe": "r1-llm-only"},
                               progress_bar=False)
    cells = json.loads(Path("out.ipynb").read_text())["cells"]
    pictures = [output for cell in cells for output in cell.get("outputs", []) if "image/" in str(output.get("data"))]
    assert len(pictures) >= 3
    manifest = json.loads(Path(f"{PREFIX}r1-llm-only/manifest.json").read_text())
    assert manifest["command"].startswith("papermill pipeline.ipynb out.ipynb -p scale tiny -p train_limit 32")
    assert Path(f"{PREFIX}r1-llm-only-merged/model.safetensors").exists()


@pytest.mark.parametrize(
    "name, value, words",
    [("recpie", "x", "did you mean recipe"), ("epochs", "three", "number above 0"), ("scale", "7b", "no GPU")],
)
def test_papermill_refuses_bad_input_with_one_last_sentence(repo, name, value, words):
    started = time.time()
    ended = command(repo, BIN / "papermill", repo / "pipeline.ipynb", "out.ipynb", "-p", name, value)
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ParameterError: ") and name in last and words in last
    assert time.time() - started < 120 and not Path("runs").exists() or not list(Path("runs").iterdir())


def test_two_processes_share_the_work(repo):
    """World size 2 over gloo: half the steps, each picture asked once, one writer."""
    ended = command(repo, BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29531", repo / "pipeline.py",
                    "recipe=r4-joint", *SMALL, "batch_size=4")
    assert ended.returncode == 0, ended.stderr[-3000:]
    folder = Path(f"{PREFIX}r4-joint")
    assert losses(str(folder))[-1][0] == 32 // (4 * 2)
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["max_steps"] == 4
    lines = predict.read_jsonl(folder / "predictions.jsonl")
    assert len(lines) == len({line["image_id"] for line in lines}) == 8
    assert not list(folder.glob("*.parts"))
    assert ended.stdout.count("merged minus as trained") == 1  # one of two speaks
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processes"] == 2


@pytest.mark.parametrize("recipe", ["r4-joint", "r2-vision-only"])
def test_sigkill_in_training_and_the_same_command_again(repo, recipe):
    words = (sys.executable, str(repo / "pipeline.py"), f"recipe={recipe}", *SMALL, "batch_size=4", "save_steps=2")
    whole = command(repo, *words, "output_root=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]

    folder = Path(f"{PREFIX}{recipe}")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 300
        while not list(folder.glob("checkpoint-*/complete")) and time.time() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "predictions.jsonl").exists(), "the kill came too late to test anything"
    again = command(repo, *words)
    assert again.returncode == 0, again.stderr[-3000:]
    undisturbed = f"whole/qwen2vl-nutrition-detection-{recipe}"
    assert losses(str(folder)) == losses(undisturbed)
    assert (folder / "predictions.jsonl").read_text() == Path(undisturbed, "predictions.jsonl").read_text()
