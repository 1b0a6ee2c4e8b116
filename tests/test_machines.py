"""Several machines, with stand-ins: two launches on this one, each with one process, joined over the network."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest

from helpers import runs, trainer
from helpers.recipes import PARAMETERS

JOB = """
import os, time
import torch
from helpers import processes
processes.together()
count = torch.ones(1)
torch.distributed.all_reduce(count)
with processes.main_first():
    started = time.time()
    time.sleep(0.5)
print("sum", int(count), "of", os.environ["WORLD_SIZE"], "local", os.environ["LOCAL_RANK"], "at", started)
"""


def start(repo, *program) -> list[subprocess.Popen]:
    """A program on two machines, which write machine-0.log and machine-1.log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
             "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [subprocess.Popen([*words, "--machine_rank", str(rank), *program], stderr=subprocess.STDOUT,
                             stdout=Path(f"machine-{rank}.log").open("w"), env=os.environ | {"PYTHONPATH": str(repo)})
            for rank in (0, 1)]


def log_of(rank: int) -> str:
    return Path(f"machine-{rank}.log").read_text()


@pytest.mark.slow
def test_two_machines_are_one_run(repo, tmp_path):
    """The options that README gives; only the machine's number differs."""
    (tmp_path / "job.py").write_text(JOB)
    machines = start(repo, "job.py")
    assert [machine.wait(120) for machine in machines] == [0, 0], log_of(0)[-2000:] + log_of(1)[-2000:]
    lines = [next(line for line in log_of(rank).splitlines() if line.startswith("sum")).split() for rank in (0, 1)]
    assert [line[:6] for line in lines] == [["sum", "2", "of", "2", "local", "0"]] * 2
    assert float(lines[1][-1]) > float(lines[0][-1]) + 0.4, "each machine fills its own cache, the main one first"


@pytest.mark.slow
def test_a_machine_that_is_lost_ends_the_other_with_a_sentence_and_the_same_command_goes_on(repo):
    """Lost: its processes are killed; they hang, as they do where the network is gone. Each time within a minute."""
    program = [str(repo / "pipeline.py"), "recipe=r1-llm-only", "scale=tiny", "train_limit=48", "val_limit=4",
               "epochs=4", "batch_size=4", "save_steps=4", "max_new_tokens=64", "report_to=none"]
    log = Path("runs/qwen2vl-nutrition-detection-r1-llm-only/log.jsonl")
    for lose, at, said in ((psutil.Process.kill, 6, "because another one has"),
                           (psutil.Process.suspend, 14, "because process 1 has been silent for 30 s")):
        machines = start(repo, *program)
        lost = psutil.Process(machines[1].pid)
        while len(trainer.read_log(log)) < at:
            assert machines[0].poll() is None, log_of(0)[-3000:]
            time.sleep(0.1)
        lost = [lost, *lost.children(recursive=True)]
        for process in lost:
            lose(process)
        assert machines[0].wait(60) == 1
        assert said in log_of(0) and "goes on from the last checkpoint" in log_of(0)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        machines[1].wait()
    machines = start(repo, *program)
    assert [machine.wait(300) for machine in machines] == [0, 0], log_of(0)[-3000:]
    assert "goes on from checkpoint-12" in log_of(0)
    assert [line["step"] for line in trainer.read_log(log)] == list(range(1, 49))


def test_an_output_folder_that_another_machine_does_not_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "together", MagicMock())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    values = dict.fromkeys(PARAMETERS)
    run = SimpleNamespace(values=values, given={}, stages=[], folder=Path(tmp_path / "run"), recipe="base", scale="7b",
                          keep="last")
    with pytest.raises(runs.ParameterError, match="not seen by all machines: output_root must be a folder they share"):
        runs.open_folder(run)
    monkeypatch.setenv("RANK", "0")
    runs.open_folder(run)
    monkeypatch.setenv("RANK", "1")
    runs.open_folder(run)
