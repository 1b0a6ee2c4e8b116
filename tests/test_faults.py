"""What happens to long runs, planted: each ends in words and loses nothing that was saved, or goes on."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_training import StopAt, build
from transformers import TrainerCallback, TrainerState

from helpers import collate, data, runs, trainer
from helpers.runs import read_json
from helpers.settings import ParameterError
from helpers.speed import KeepActivations


@pytest.fixture(scope="module")
def undisturbed(processor, rows, tmp_path_factory):
    """The weights, losses and folder of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    sft = build("r1-llm-only", folder, processor, rows)
    sft.train()
    return {name: weight.detach().clone() for name, weight in sft._trainable().items()}, losses(folder), folder


class At(TrainerCallback):
    """Do something once, as a step begins (steps count from 0)."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def losses(folder):
    return [(line["step"], line["loss"]) for line in trainer.read_log(folder / "log.jsonl")]


def from_3(undisturbed, folder):
    """The checkpoint of step 3, copied into `folder`: what happens later need not wait for the same three steps."""
    shutil.copytree(undisturbed[2] / "checkpoint-3", folder / "checkpoint-3")
    shutil.copy(undisturbed[2] / "log.jsonl", folder)
    return str(folder / "checkpoint-3")


def goes_on(folder, processor, rows, undisturbed, at):
    """The same run again continues from checkpoint `at` and ends as if nothing had happened."""
    checkpoint = trainer.last_checkpoint(folder)
    assert checkpoint.endswith(f"checkpoint-{at}")
    again = build("r1-llm-only", folder, processor, rows)
    again.train(resume_from_checkpoint=checkpoint)
    weights, curve, _ = undisturbed
    assert all(torch.equal(weight, weights[name]) for name, weight in again._trainable().items())
    assert losses(folder) == curve


# --- a notice to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(number, tmp_path, processor, rows, undisturbed):
    before = signal.getsignal(number)
    sft = build("r1-llm-only", tmp_path, processor, rows)
    sft.add_callback(At(4, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit, match=f"{number.name} at step 5 of 8: checkpoint-5 is saved, and the same command"):
        sft.train()
    assert signal.getsignal(number) == before
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]
    goes_on(tmp_path, processor, rows, undisturbed, at=5)


def test_a_second_ctrl_c_ends_at_once(tmp_path, processor, rows, capfd):
    sft = build("r1-llm-only", tmp_path, processor, rows)
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


OUTSIDE_OF_TRAINING = """
import os, signal, time
from helpers.settings import end_with_a_word

end_with_a_word()
os.kill(os.getpid(), signal.{name})
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_of_training_ends_with_a_word_too(name):
    script = OUTSIDE_OF_TRAINING.format(name=name)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"{name}: what is done so far is kept, and the same command goes on from there."


FORKED = """
import os, signal, time
from helpers.settings import end_with_a_word

end_with_a_word()
lock = __import__("threading").Lock()
lock.acquire()
ended = []
for _ in range(40):
    child = os.fork()
    if not child:
        lock.acquire()  # for ever
    os.kill(child, signal.SIGINT)  # left to the parent
    os.kill(child, signal.SIGTERM)  # also before the child's first line
    for _ in range(500):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    ended.append(os.waitstatus_to_exitcode(status))
print(ended)
"""


def test_forked_workers_end_by_sigterm_at_any_moment():
    """A pool of processes is ended so; one that is not waits for ever."""
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300)
    assert ended.stdout == f"{[-signal.SIGTERM] * 40}\n", ended.stderr[-2000:]


# --- the disk


@pytest.mark.parametrize("file, error", [
    ("trainable.safetensors", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("optimizer.pt", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 202624 vs 202512")),
    ("trainer_state.json", OSError(errno.ENOSPC, "No space left on device")),
])  # as each library says it, seen on a tmpfs that was full
def test_a_full_disk_ends_in_words_and_the_last_checkpoint_stays(file, error, tmp_path, processor, rows, undisturbed,
                                                                   monkeypatch):
    def full_at_6(real):
        def write(*given, **named):
            for path in map(str, given):
                if path.endswith(f"checkpoint-6/{file}"):
                    Path(path).write_bytes(b"half")
                    raise error
            return real(*given, **named)

        return write

    sft = build("r1-llm-only", tmp_path, processor, rows)
    monkeypatch.setattr(trainer, "save_file", full_at_6(trainer.save_file))
    monkeypatch.setattr(torch, "save", full_at_6(torch.save))
    monkeypatch.setattr(TrainerState, "save_to_json", full_at_6(TrainerState.save_to_json))
    with pytest.raises(OSError, match=r"checkpoint-6 cannot be written .*same command goes on from checkpoint-3\."):
        sft.train(resume_from_checkpoint=from_3(undisturbed, tmp_path))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    goes_on(tmp_path, processor, rows, undisturbed, at=3)


def test_a_manifest_is_whole_or_the_old_one_when_the_disk_is_full(tmp_path, monkeypatch):
    from helpers.runs import write_json

    write_json(tmp_path / "manifest.json", {"old": 1})

    def full(path, text, **_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "manifest.json", {"new": 2})
    assert read_json(tmp_path / "manifest.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_output_folder_that_cannot_be_written_is_named(code, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "r4"
    run = type("run", (), {"folder": folder, "stages": [], "keep": "last", "values": dict.fromkeys(runs.TRAINING)})

    def refuses(path, content):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(runs, "_open_manifest", lambda *given: refuses(folder, {}))
    with pytest.raises(ParameterError, match=f"r4 cannot be written .{os.strerror(code)}.; choose another"):
        runs.open_folder(run)


# --- pictures


def test_pictures_that_vanish_in_the_middle_of_an_epoch_are_not_missed(tmp_path, processor, rows):
    """A training reads what `prepare` has put into the cache, small pictures too."""
    for row in rows:
        row["image"].save(tmp_path / f"{row['image_id']}.png")
    paths = [{"path": str(tmp_path / f"{i}.png"), "bytes": None} for i in rows["image_id"]]
    on_disk = rows.cast_column("image", Image(decode=False)).map(
        lambda row, i: {"image": paths[i]}, with_indices=True).cast_column("image", Image())
    ready = data.prepare({"train": on_disk}, 16 * 784, 16 * 784)["train"]
    sft = build("r1-llm-only", tmp_path / "run", processor, ready, max_steps=3)
    sft.add_callback(At(1, lambda: [path.unlink() for path in tmp_path.glob("*.png")]))
    sft.train()
    assert not list(tmp_path.glob("*.png")) and len(losses(tmp_path / "run")) == 3


def test_a_picture_that_is_broken_in_the_cache_is_named(tmp_path, processor, rows):
    def cut(row):
        image = row["image"]
        return {"image": image | {"bytes": image["bytes"][:60]}} if row["image_id"] == "9" else {}

    broken = rows.cast_column("image", Image(decode=False)).map(cut).cast_column("image", Image())
    sft = build("r1-llm-only", tmp_path, processor, broken)
    with pytest.raises(ValueError, match="image_id='9' can no longer be read"):
        sft.train()


# --- a loss that goes wrong


def all_finite(checkpoint):
    return all(weight.isfinite().all() for weight in load_file(Path(checkpoint) / trainer.WEIGHTS).values())


def test_a_loss_that_becomes_nan_stops_with_the_last_good_checkpoint(tmp_path, processor, rows, undisturbed):
    sft = build("r1-llm-only", tmp_path, processor, rows)
    sft.add_callback(At(4, lambda: next(iter(sft._trainable().values())).data.fill_(float("nan"))))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5 of 8; checkpoint-3 is the last good checkpoint"
                                                 r".*Lower learning_rate \(now 0.001\)"):
        sft.train(resume_from_checkpoint=from_3(undisturbed, tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert all_finite(tmp_path / "checkpoint-3")


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(tmp_path, processor, rows, undisturbed):
    """The loss of that step is still a number: the next would not be, and a checkpoint may come between."""
    sft = build("r1-llm-only", tmp_path, processor, rows)
    weight = list(sft._trainable().values())[-1]
    sft.add_callback(At(5, lambda: weight.register_hook(lambda gradient: gradient * float("inf"))))
    with pytest.raises(FloatingPointError, match="the size of the gradient is (nan|inf) at step 6 of 8; checkpoint-3"):
        sft.train(resume_from_checkpoint=from_3(undisturbed, tmp_path))
    assert trainer.last_checkpoint(tmp_path).endswith("checkpoint-3") and all_finite(tmp_path / "checkpoint-3")


def test_a_training_that_diverges_stops(tmp_path, processor, rows, monkeypatch):
    monkeypatch.setattr(trainer, "WINDOW", 2)
    sft = build("r1-llm-only", tmp_path, processor, rows)
    sft.add_callback(At(4, lambda: [weight.data.normal_(0, 1) for weight in sft._trainable().values()]))
    with pytest.raises(FloatingPointError, match="the training diverges: the loss is .* over the last 2 steps"):
        sft.train()


def test_noise_and_a_late_plateau_are_no_divergence():
    curve = [2.0 + step % 3 for step in range(20)] + [0.1] * 100 + [0.5, 0.1] * 20 + [9.0] + [0.4] * 30
    history = [{"loss": loss, "grad_norm": 1.0} for loss in curve + [12.0] * 20]
    assert not any(trainer.loss_fault(history[:step]) for step in range(1, len(curve) + 2))
    assert "diverges: the loss is" in trainer.loss_fault(history)


# --- memory and processes


def test_out_of_memory_in_training_says_what_to_change_with_this_runs_numbers(tmp_path, processor, rows, undisturbed):
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    sft = build("r1-llm-only", tmp_path, processor, rows)
    sft.add_callback(At(4, too_much))
    with pytest.raises(torch.OutOfMemoryError) as error:
        sft.train(resume_from_checkpoint=from_3(undisturbed, tmp_path))
    for words in ("at step 5", "batch_size=2 and accumulation=2 (now 4 and 1)", "gradient_checkpointing=True",
                  "max_pixels below 12544"):
        assert words in str(error.value)
    goes_on(tmp_path, processor, rows, undisturbed, at=3)


def test_keeping_fewer_activations_is_advised_where_some_are_kept(tmp_path, processor, rows):
    sft = build("r1-llm-only", tmp_path, processor, rows, gradient_checkpointing=True)
    sft.model.gradient_checkpointing_enable()  # as Trainer does when a training begins
    assert "gradient_checkpointing" not in trainer._smaller(sft)
    KeepActivations([sft.model.get_base_model().model.language_model.layers[0]]).on_train_begin()
    assert trainer._smaller(sft).startswith("gradient_checkpointing=True keeps fewer activations, and goes on")


class Dies(collate.Collator):
    """In a reading process of the second epoch, which the system kills."""

    armed = False

    def __call__(self, rows):
        if self.armed and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


def test_a_data_loader_worker_that_dies_ends_in_words(tmp_path, processor, rows, undisturbed):
    sft = build("r1-llm-only", tmp_path, processor, rows, dataloader_num_workers=1)
    sft.data_collator = Dies(processor, "Where?")
    sft.add_callback(At(3, lambda: setattr(sft.data_collator, "armed", True)))
    with pytest.raises(RuntimeError, match=r"reads the data died at step 5 .*goes on from checkpoint-3\."):
        sft.train()
    goes_on(tmp_path, processor, rows, undisturbed, at=3)


# --- logging


def test_the_network_lost_while_logging_ends_no_training(tmp_path, processor, rows, undisturbed, monkeypatch, capsys):
    from transformers.integrations import TensorBoardCallback

    def lost(self, args, state, control, **kwargs):
        if state.global_step >= 3:
            raise ConnectionError("network is unreachable")

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    monkeypatch.setattr(TensorBoardCallback, "on_log", lost)
    sft = build("r1-llm-only", tmp_path, processor, rows, report_to="tensorboard")
    sft.train()
    said = capsys.readouterr().out  # once: a service that has failed is not asked again
    assert said.count("TensorBoard fails (ConnectionError: network is unreachable)") == 1
    assert losses(tmp_path) == undisturbed[1]


def test_wandb_that_cannot_be_reached_at_the_start_ends_no_training(tmp_path, processor, rows, monkeypatch, capsys):
    import wandb

    def unreachable(**kwargs):
        raise wandb.errors.CommError("Run initialization has timed out")

    monkeypatch.setattr(wandb, "init", unreachable)
    build("r1-llm-only", tmp_path, processor, rows, report_to="wandb", max_steps=2).train()
    assert "Wandb fails (CommError: Run initialization has timed out): the training goes on" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 2


def test_a_killed_run_goes_on_in_the_same_wandb_run(tmp_path, processor, rows, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
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
