"""Several machines, with stand-ins: two launches on this one, each with one process, joined over the network."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from helpers import runs
from helpers.recipes import PARAMETERS

JOB = """
import os, time
import torch
from helpers import runs
processes = runs._processes()
count = torch.ones(1)
torch.distributed.all_reduce(count)
with runs.main_first():
    started = time.time()
    time.sleep(0.5)
print("sum", int(count), "of", os.environ["WORLD_SIZE"], "local", os.environ["LOCAL_RANK"], "at", started)
"""


@pytest.mark.slow
def test_two_machines_are_one_run(repo, tmp_path):
    """The options that README gives; only the machine's number differs."""
    (tmp_path / "job.py").write_text(JOB)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
             "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29547"]
    machines = [subprocess.Popen([*words, "--machine_rank", str(rank), "job.py"], stdout=subprocess.PIPE, text=True,
                                 stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(repo)}) for rank in (0, 1)]
    ended = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ended[0][1][-2000:] + ended[1][1][-2000:]
    lines = [out.strip().split() for out, _ in ended]
    assert [line[:6] for line in lines] == [["sum", "2", "of", "2", "local", "0"]] * 2
    assert float(lines[1][-1]) > float(lines[0][-1]) + 0.4, "each machine fills its own cache, the main one first"


def test_an_output_folder_that_another_machine_does_not_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "_processes", MagicMock())
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
