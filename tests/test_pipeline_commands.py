"""The pipeline as people start it: papermill, a script, several processes; killed and started again."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import numpy as np
import psutil
import pytest
from pipeline_runner import SMALL

from helpers import predict, trainer

PREFIX = "runs/qwen2vl-nutrition-detection-"
BIN = Path(sys.executable).parent


def ended_well(*words: str, **environment: str) -> subprocess.CompletedProcess:
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | environment)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
    return ended


def words_of(*pairs: str) -> list[str]:
    """`name=value` as papermill takes them."""
    return [word for pair in pairs for word in ("-p", *pair.split("="))]


def waits(for_what) -> None:
    deadline = time.time() + 300
    while not for_what():
        assert time.time() < deadline
        time.sleep(0.02)


def losses(folder: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.read_log(Path(folder) / "log.jsonl")]


def test_papermill_runs_the_notebook_with_a_recipe(repo):
    ended_well(BIN / "papermill", repo / "pipeline.ipynb", "out.ipynb", *words_of(*SMALL, "recipe=base"))
    cells = json.loads(Path("out.ipynb").read_text())["cells"]
    pictures = [output for cell in cells for output in cell.get("outputs", []) if "image/" in str(output.get("data"))]
    assert len(pictures) >= 2
    manifest = json.loads(Path(f"{PREFIX}base/manifest.json").read_text())
    assert manifest["command"].startswith("papermill pipeline.ipynb out.ipynb -p scale tiny -p train_limit 32")
    assert json.loads(Path(f"{PREFIX}base/metrics.json").read_text())["scores"]["base"]["pictures"] == 8


def test_papermill_refuses_bad_input_with_one_last_sentence(repo):
    ended = subprocess.run([BIN / "papermill", repo / "pipeline.ipynb", "out.ipynb", "-p", "recpie", "x"],
                           capture_output=True, text=True)
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("ParameterError: recpie is not a parameter; did you mean recipe")
    assert not Path("runs").exists()


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(repo):
    """World size 2 over gloo: the same losses as one process, each picture predicted once, one writer.

    33 pictures leave one for the last update, in which the second process has none. At the end one process goes on from
    the checkpoint of two.
    """
    words = [repo / "pipeline.py", "recipe=r4-joint", *SMALL, "train_limit=33", "batch_size=4", "save_steps=4"]
    ended = ended_well(sys.executable, *words, "output_root=alone")
    alone = losses("alone/" + Path(f"{PREFIX}r4-joint").name)
    ended = ended_well(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29531", *words)
    assert "2 processes share each update (batch_size=4 x accumulation=1): 2 x 1 each." in ended.stdout
    assert "destroy_process_group" not in ended.stderr
    folder = Path(f"{PREFIX}r4-joint")
    np.testing.assert_allclose(losses(str(folder)), alone, rtol=0.02)
    assert len(alone) == 9
    lines = predict.read_jsonl(folder / "predictions.jsonl")
    assert len(lines) == len({line["image_id"] for line in lines}) == 8
    assert not list(folder.glob("*.parts"))
    assert ended.stdout.count("merged minus as trained") == 1  # one of two speaks
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processes"] == 2

    for later in ("steps.json", "adapter", "checkpoint-9"):
        shutil.rmtree(folder / later) if (folder / later).is_dir() else (folder / later).unlink()
    ended = ended_well(sys.executable, *words)
    assert "goes on from checkpoint-8" in ended.stdout
    np.testing.assert_allclose(losses(str(folder)), alone, rtol=0.02)


@pytest.mark.slow
def test_sigterm_to_papermill_saves_before_the_kernel_ends(repo):
    """papermill itself dies at once; its kernel finishes the step, saves and leaves."""
    values = words_of(*SMALL, "batch_size=4", "recipe=r1-llm-only", "epochs=2", "save_steps=50")
    log = Path(f"{PREFIX}r1-llm-only/log.jsonl")
    with subprocess.Popen([BIN / "papermill", repo / "pipeline.ipynb", "out.ipynb", *values],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        waits(lambda: len(trainer.read_log(log)) >= 2 or process.poll() is not None)
        kernels = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    gone, alive = psutil.wait_procs(kernels, timeout=60)
    assert gone and not alive
    step = trainer.read_log(log)[-1]["step"]
    last = trainer.last_checkpoint(log.parent)
    assert 2 <= step < 16 and last and last.endswith(f"checkpoint-{step}")


IN_A_NOTEBOOK = """
import sys
from pathlib import Path
sys.path[:0] = ["{tests}"]
from small_training import build, small_processor, squares
build("r1-llm-only", Path("run"), small_processor(), squares(), num_train_epochs=100, save_steps=1000).train()
"""


@pytest.mark.slow
def test_the_stop_button_of_a_notebook_saves_first_and_leaves_the_kernel(repo):
    """As JupyterLab presses it: the kernel's processes get a SIGINT."""
    manager, client = jupyter_client.manager.start_new_kernel()

    def reply():
        while (message := client.get_shell_msg(timeout=60))["msg_type"] != "execute_reply":
            pass
        return message["content"]

    try:
        client.execute(IN_A_NOTEBOOK.format(tests=repo / "tests"), stop_on_error=False)
        waits(lambda: len(losses("run")) >= 2)
        manager.interrupt_kernel()
        said = reply()
        step = losses("run")[-1][0]
        assert said["ename"] == "Stopped" and f"checkpoint-{step} is saved, and the same" in said["evalue"]
        assert 2 <= step < 400 and trainer.last_checkpoint(Path("run")).endswith(f"checkpoint-{step}")
        client.execute("import time; time.sleep(60)")
        time.sleep(1)
        manager.interrupt_kernel()  # the button is the kernel's own again
        assert reply()["ename"] == "KeyboardInterrupt"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_sigterm_to_a_script_ends_with_a_word_and_the_same_command_goes_on(repo):
    words = (sys.executable, str(repo / "pipeline.py"), *SMALL, "recipe=r1-llm-only", "batch_size=4", "save_steps=50")
    log = Path(f"{PREFIX}r1-llm-only/log.jsonl")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        waits(lambda: len(trainer.read_log(log)) >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    step = trainer.read_log(log)[-1]["step"]
    assert process.returncode == 1
    assert said.strip().splitlines()[-1] == (
        f"SIGTERM at step {step} of 8: checkpoint-{step} is saved, and the same command goes on from there.")
    again = ended_well(*words)
    assert f"goes on from checkpoint-{step}" in again.stdout
    assert [line["step"] for line in trainer.read_log(log)] == list(range(1, 9))

    python, script, *given = shlex.split(json.loads((log.parent / "manifest.json").read_text())["command"])
    assert (python, script) == ("python", "pipeline.py")
    ended_well(sys.executable, str(repo / script), *given, "output_root=repeated")
    assert losses("repeated/" + log.parent.name) == losses(str(log.parent))


@pytest.mark.slow
def test_no_token_reaches_a_file_or_the_output(repo):
    """Planted in the environment, as people have it there; W&B writes offline, papermill keeps the notebook."""
    tokens = {"HF_TOKEN": "hf_PlantedSecret0123456789", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
              "HUGGING_FACE_HUB_TOKEN": "hf_OtherSecret9876543210"}
    values = words_of(*SMALL, "recipe=r1-llm-only", "report_to=wandb")
    ended = ended_well(BIN / "papermill", "--log-output", repo / "pipeline.ipynb", "out.ipynb", *values,
                    WANDB_MODE="offline", **tokens)
    written = [path for path in Path(".").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and Path("out.ipynb") in written
    for token in tokens.values():
        assert token not in ended.stdout + ended.stderr
        assert [path for path in written if token.encode() in path.read_bytes()] == []
