"""Checkpoints hold what trains, a half-written one is never loaded, and a resumed run equals an undisturbed one."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_training import StopAt, build
from transformers import TrainerCallback

from helpers import trainer
from helpers.runs import write_json


class WeightsAtStart(TrainerCallback):
    """What the model holds when the training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}


@pytest.mark.parametrize("recipe", ["r1-llm-only", "r2-vision-only", "r4-joint"])
def test_a_killed_run_goes_on_and_equals_an_undisturbed_one(recipe, tmp_path, processor, rows):
    whole = build(recipe, tmp_path / "whole", processor, rows)
    whole.train()

    killed = build(recipe, tmp_path / "killed", processor, rows)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    (tmp_path / "killed" / "checkpoint-4").mkdir()  # a checkpoint that was being written: no `complete` file
    checkpoint = trainer.last_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-3")

    start = WeightsAtStart()
    resumed = build(recipe, tmp_path / "killed", processor, rows)
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    saved = load_file(f"{checkpoint}/{trainer.WEIGHTS}")
    assert saved.keys() == start.weights.keys() and all(torch.equal(saved[name], start.weights[name]) for name in saved)
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    for name, weight in resumed._trainable().items():
        assert torch.equal(weight, whole._trainable()[name]), name
    logs = [trainer.read_log(tmp_path / run / "log.jsonl") for run in ("whole", "killed")]
    assert [line["step"] for line in logs[1]] == list(range(1, 9))
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_trainer_never_counts_two_gpus_in_one_process(tmp_path, processor, rows, monkeypatch):
    """A stand-in for two visible GPUs: Trainer would wrap the model in DataParallel and double the batch."""
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 1 if self._n_gpu == 1 else 2))
    sft = build("r1-llm-only", tmp_path, processor, rows, max_steps=1)
    assert sft.args.n_gpu == 1 and sft.args.train_batch_size == 4
    sft.train()
    assert not isinstance(sft.model_wrapped, torch.nn.DataParallel)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path, processor, rows):
    build("r1-llm-only", tmp_path, processor, rows, max_steps=3).train()
    other = build("r4-joint", tmp_path, processor, rows)
    with pytest.raises(ValueError, match="holds other weights than the ones that train here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_stops_when_the_loss_is_no_number(tmp_path, processor, rows):
    sft = build("r2-vision-only", tmp_path, processor, rows)
    next(iter(sft._trainable().values())).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1 of 8; no checkpoint.*Lower learning_rate"):
        sft.train()


def test_a_cut_log_line_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert [line["step"] for line in trainer.read_log(tmp_path / "log.jsonl")] == [1]


def test_no_checkpoint_and_steps_done(tmp_path):
    assert trainer.last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("whole")
        write_json(tmp_path / f"checkpoint-{step}" / trainer.COMPLETE, {"weights": 5})
    (tmp_path / "checkpoint-11" / "weights").write_text("")  # a crash of the machine: the name is there, not the bytes
    assert trainer.last_checkpoint(tmp_path).endswith("checkpoint-10")
