"""Checkpoints hold what trains, a killed run equals an undisturbed one, and whatever happens to it ends in words."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from accelerate import Accelerator
from datasets import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_training import StopAt, build
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from helpers import data, speed, trainer
from helpers.collate import IGNORED
from helpers.runs import read_json, write_json


class At(TrainerCallback):
    """Do something once, as a step begins (steps count from 0)."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def losses(folder):
    return [(line["step"], line["loss"]) for line in trainer.read_log(folder / "log.jsonl")]


def weights_of(sft):
    return {name: weight.detach().clone() for name, weight in sft._trainable().items()}


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def undisturbed(processor, rows, tmp_path_factory):
    """The weights, losses and folder of a run of r1 to which nothing happened; checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    sft = build("r1-llm-only", folder, processor, rows)
    sft.train()
    return weights_of(sft), losses(folder), folder


@pytest.fixture
def from_3(undisturbed, tmp_path):
    """The checkpoint of step 3, copied into `tmp_path`: what happens later need not wait for the same three steps."""
    shutil.copytree(undisturbed[2] / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(undisturbed[2] / "log.jsonl", tmp_path)
    return str(tmp_path / "checkpoint-3")


@pytest.fixture
def sft(tmp_path, processor, rows):
    return build("r1-llm-only", tmp_path, processor, rows)


@pytest.fixture
def goes_on(tmp_path, processor, rows, undisturbed):
    def resume(at):
        """The same run again continues from checkpoint `at` and ends as if nothing had happened."""
        checkpoint = trainer.last_checkpoint(tmp_path)
        assert checkpoint.endswith(f"checkpoint-{at}")
        again = build("r1-llm-only", tmp_path, processor, rows)
        again.train(resume_from_checkpoint=checkpoint)
        assert same(weights_of(again), undisturbed[0]) and losses(tmp_path) == undisturbed[1]

    return resume


# --- checkpoints


@pytest.mark.parametrize("recipe", ["r2-vision-only", "r4-joint"])
def test_a_killed_run_goes_on_and_equals_an_undisturbed_one(recipe, tmp_path, processor, rows):
    whole = build(recipe, tmp_path / "whole", processor, rows)
    whole.train()

    folder, at_start = tmp_path / "killed", {}
    killed = build(recipe, folder, processor, rows)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    (folder / "checkpoint-4").mkdir()  # a checkpoint that was being written: no `complete` file
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    checkpoint = trainer.last_checkpoint(folder)
    assert checkpoint.endswith("checkpoint-3") and [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5]

    resumed = build(recipe, folder, processor, rows)
    resumed.add_callback(At(3, lambda: at_start.update(weights_of(resumed))))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert not (folder / "checkpoint-4").exists()
    saved = load_file(f"{checkpoint}/{trainer.WEIGHTS}")
    assert same(saved, at_start) and all(weight.dtype == torch.float32 for weight in saved.values())
    assert same(weights_of(resumed), weights_of(whole))
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == 8


def test_a_checkpoint_of_other_weights_is_refused(tmp_path, processor, rows, from_3):
    other = build("r4-joint", tmp_path, processor, rows)
    with pytest.raises(ValueError, match="has other weights than the ones that train here"):
        other.train(resume_from_checkpoint=from_3)


def test_the_last_checkpoint_is_the_newest_whose_files_are_whole(tmp_path):
    assert trainer.last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whole")
        write_json(tmp_path / f"checkpoint-{step}" / trainer.COMPLETE, {"weights": 5})
    (tmp_path / "checkpoint-11" / "weights").write_text("")  # a crash of the machine: the name is there, not the bytes
    assert trainer.last_checkpoint(tmp_path).endswith("checkpoint-10")


def test_a_process_without_a_row_of_the_last_update_gets_a_filler_without_labels(sft, rows, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    sft.train_dataset, labelled = rows.select(range(9)), []
    for process in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", process)
        labelled.append([bool((batch["labels"] != IGNORED).any()) for batch in sft.get_train_dataloader()])
    assert labelled == [[True, True], [True, False]]


# --- a notice to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(number, tmp_path, sft, goes_on):
    before = signal.getsignal(number)
    sft.add_callback(At(4, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit, match=f"{number.name} at step 5 of 8: checkpoint-5 is saved, and the same command"):
        sft.train()
    assert signal.getsignal(number) == before
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]
    goes_on(at=5)


def test_a_second_ctrl_c_ends_at_once(tmp_path, sft, capfd):
    sft.add_callback(At(1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(KeyboardInterrupt):
        sft.train()
    assert "a second one ends at once" in capfd.readouterr().err and not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_that_is_ignored_stays_ignored():
    """As `nohup` or a shell's `&` have it: a Ctrl-C in the terminal is not meant for this process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with trainer.StopNotice().watching():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGINT, before)


def script(text):
    start = "import os, signal, threading, time\nfrom helpers.processes import end_with_a_word\nend_with_a_word()\n"
    return subprocess.run([sys.executable, "-c", start + text], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_of_training_ends_with_a_word_too(name):
    ended = script(f"os.kill(os.getpid(), signal.{name})\ntime.sleep(60)")
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"{name}: what is done so far is kept, and the same command goes on from there."


FORKED = """
lock, ended = threading.Lock(), []
lock.acquire()
for _ in range(40):
    if not (child := os.fork()):
        lock.acquire()  # for ever
    os.kill(child, signal.SIGINT)  # left to the parent
    os.kill(child, signal.SIGTERM)  # also before the child's first line
    threading.Timer(5, os.kill, (child, signal.SIGKILL)).start()
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.write(1, str(ended).encode())
os._exit(0)
"""


def test_forked_workers_end_by_sigterm_at_any_moment():
    """A pool of processes is ended so; one that is not waits for ever."""
    ended = script(FORKED)
    assert ended.stdout == str([-signal.SIGTERM] * 40), ended.stderr[-2000:]


# --- the disk


@pytest.mark.parametrize("file, error", [
    ("trainable.safetensors", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("optimizer.pt", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 202624 vs 202512")),
    ("trainer_state.json", OSError(errno.ENOSPC, "No space left on device")),
])  # as each library says it, observed on a tmpfs that was full
def test_a_full_disk_ends_in_words_and_the_last_checkpoint_stays(file, error, tmp_path, sft, from_3, goes_on,
                                                                   monkeypatch):
    def full_at_6(real):
        def write(*given, **named):
            for path in map(str, given):
                if path.endswith(f"checkpoint-6/{file}"):
                    Path(path).write_bytes(b"half")
                    raise error
            return real(*given, **named)

        return write

    monkeypatch.setattr(trainer, "save_file", full_at_6(trainer.save_file))
    monkeypatch.setattr(torch, "save", full_at_6(torch.save))
    monkeypatch.setattr(TrainerState, "save_to_json", full_at_6(TrainerState.save_to_json))
    with pytest.raises(OSError, match=r"checkpoint-6 cannot be written .*same command goes on from checkpoint-3\."):
        sft.train(resume_from_checkpoint=from_3)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    goes_on(at=3)


def test_what_is_trained_on_is_in_the_cache_small_pictures_too(tmp_path, rows):
    """Files that vanish in the middle of an epoch are not missed."""
    files = [tmp_path / f"{row['image_id']}.png" for row in rows]
    for row, file in zip(rows, files, strict=True):
        row["image"].save(file)
    on_disk = rows.remove_columns("image").add_column("image", list(map(str, files))).cast_column("image", Image())
    ready = data.prepare({"train": on_disk}, 16 * 784, 16 * 784)["train"]
    for file in files:
        file.unlink()
    assert [row["image"].tobytes() for row in ready] == [row["image"].tobytes() for row in rows]


# --- a loss that goes wrong


def spoilt_weights(weights):
    weights[0].data.fill_(float("nan"))


def spoilt_gradient(weights):
    """The loss of that step is still a number: the next would not be, and a checkpoint may come between."""
    weights[-1].register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("spoil, at, said", [
    (spoilt_weights, 0, "the loss is nan at step 1 of 8; no checkpoint was written yet"),
    (spoilt_weights, 4, "the loss is nan at step 5 of 8; checkpoint-3 is the last good checkpoint"),
    (spoilt_gradient, 5, "the size of the gradient is (nan|inf) at step 6 of 8; checkpoint-3"),
])
def test_a_loss_or_gradient_that_is_no_number_never_reaches_a_checkpoint(spoil, at, said, tmp_path, sft):
    sft.add_callback(At(at, lambda: spoil(list(sft._trainable().values()))))
    with pytest.raises(FloatingPointError, match=rf"{said}.*Lower learning_rate \(now 0.001\)"):
        sft.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == ({"checkpoint-3"} if at else set())


def test_a_loss_that_diverges_is_a_fault_and_noise_and_a_late_plateau_are_none():
    curve = [2.0 + step % 3 for step in range(20)] + [0.1] * 100 + [0.5, 0.1] * 20 + [9.0] + [0.4] * 30
    history = [{"loss": loss, "grad_norm": 1.0} for loss in curve + [12.0] * 20]
    assert not any(trainer.loss_fault(history[:step]) for step in range(1, len(curve) + 2))
    assert "diverges: the loss is" in trainer.loss_fault(history)


# --- memory


def test_out_of_memory_in_training_says_what_to_change(sft, from_3):
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    sft.add_callback(At(3, too_much))
    with pytest.raises(torch.OutOfMemoryError, match="at step 4 .*gradient_checkpointing=True .*half of batch_size .*"
                                                     "max_pixels below 12544"):
        sft.train(resume_from_checkpoint=from_3)


def test_keeping_fewer_activations_is_advised_where_layers_keep_some(tmp_path, processor, rows):
    sft = build("r1-llm-only", tmp_path, processor, rows, gradient_checkpointing=True)
    assert "gradient_checkpointing" not in trainer.advice(sft)
    for what in ("everything", "attention"):
        sft.callback_handler.callbacks[-1] = speed.KeepActivations({sft.model: what})
        assert trainer.advice(sft).startswith("gradient_checkpointing=True keeps fewer activations, and goes on")


# --- logging


def test_services_that_cannot_be_reached_end_no_training(tmp_path, processor, rows, undisturbed, monkeypatch, capsys):
    def lost(self, args, state, control, **kwargs):
        if state.global_step >= 3:
            raise ConnectionError("network is unreachable")

    def unreachable(**kwargs):
        raise wandb.errors.CommError("Run initialization has timed out")

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    monkeypatch.setattr(TensorBoardCallback, "on_log", lost)
    monkeypatch.setattr(wandb, "init", unreachable)
    build("r1-llm-only", tmp_path, processor, rows, report_to=["tensorboard", "wandb"]).train()
    said = capsys.readouterr().out  # once each: a service that has failed is left alone
    assert said.count("TensorBoard fails (ConnectionError: network is unreachable)") == 1
    assert said.count("Wandb fails (CommError: Run initialization has timed out): the training goes on") == 1
    assert losses(tmp_path) == undisturbed[1]


def test_a_killed_run_goes_on_in_the_same_wandb_run(tmp_path, processor, rows, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    killed = build("r1-llm-only", tmp_path / "run", processor, rows, report_to="wandb")
    killed.add_callback(StopAt(4))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    wandb.finish()
    first = read_json(tmp_path / "run" / "manifest.json")["wandb_run_id"]
    build("r1-llm-only", tmp_path / "run", processor, rows, report_to="wandb").train(
        resume_from_checkpoint=trainer.last_checkpoint(tmp_path / "run"))
    assert wandb.run.id == first == read_json(tmp_path / "run" / "manifest.json")["wandb_run_id"]
    assert os.environ["WANDB_RESUME"] == "allow"
    build("r1-llm-only", tmp_path / "next", processor, rows, report_to="wandb", max_steps=1).train()  # a second stage
    assert wandb.run.id == read_json(tmp_path / "next" / "manifest.json")["wandb_run_id"] != first
    wandb.finish()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first}"))) == 2
