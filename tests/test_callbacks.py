"""IoU during training: the training is not disturbed, the number is right, the best checkpoint really comes back."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import StopAt, build

from helpers import trainer
from helpers.trainer import IoUDuringTraining

RUN = {"eval_steps": 2, "eval_pictures": 3, "prompt": "Where?", "predict_batch_size": 2, "max_new_tokens": 12}


def watched(folder, processor, rows, recipe="r4-joint", **options):
    keep_best, training = options.pop("keep_best", False), options
    sft = build(recipe, folder, processor, rows, **training)
    run = SimpleNamespace(**RUN, keep="best" if keep_best else "last")
    sft.add_callback(IoUDuringTraining(sft, rows, run))
    return sft


def scored_as(monkeypatch, numbers):
    """The scorer says these numbers, one at each measurement (a random model's answers all score 0)."""
    rest = iter(numbers)
    monkeypatch.setattr("helpers.trainer.evaluate.score",
                        lambda *args, **options: {"summary": {"mean_iou": {"value": next(rest)}}})


@pytest.mark.parametrize("recipe, nf4", [("r2-vision-only", False), ("r4-joint", False), ("r4-joint", True)])
def test_the_training_is_as_if_nothing_had_been_generated(recipe, nf4, tmp_path, processor, rows):
    plain = build(recipe, tmp_path / "plain", processor, rows, nf4=nf4)
    plain.train()
    tuned = watched(tmp_path / "watched", processor, rows, recipe, nf4=nf4)
    tuned.train()
    for name, weight in tuned._trainable().items():
        assert torch.equal(weight, plain._trainable()[name]), name
    logs = [trainer.read_log(tmp_path / run / "log.jsonl") for run in ("plain", "watched")]
    losses = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert [line["step"] for line in logs[1] if "eval_iou" in line] == [2, 4, 6, 8]
    assert all("loss" not in line and 0 <= line["eval_iou"] <= 1 for line in logs[1] if "eval_iou" in line)


def test_one_measurement_leaves_mode_random_state_and_weights(tmp_path, processor, rows):
    sft = watched(tmp_path, processor, rows, gradient_checkpointing=True, max_steps=3)
    callback = sft.callback_handler.callbacks[-1]
    sft.model.train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    weights = {name: weight.clone() for name, weight in sft.model.named_parameters()}
    assert callback._measure() == callback._measure()
    assert sft.model.training and torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and (np.random.get_state()[1] == before[2]).all()
    assert all(torch.equal(weight, weights[name]) for name, weight in sft.model.named_parameters())
    sft.train()


def test_the_number_is_the_evaluators_own(tmp_path, processor, rows, monkeypatch):
    sft = watched(tmp_path, processor, rows)
    callback = sft.callback_handler.callbacks[-1]

    def says_the_truth(model, processor, batch, prompt, generation):
        assert not model.training and len(batch) <= 2 and prompt == "Where?" and generation["max_new_tokens"] == 12
        boxes = {row["image_id"]: row["objects"]["bbox"][0] for row in callback.truth}
        found = [(row["image_id"], boxes[row["image_id"]]) for row in batch]
        return [{"image_id": i, "boxes": [[x0, y0, x1, y1]], "labels": ["nutrition-table"], "confidences": [1.0],
                 "rejected": [], "stopped": True} for i, (y0, x0, y1, x1) in found]

    monkeypatch.setattr("helpers.trainer.predict.generate_lines", says_the_truth)
    assert callback._measure() == pytest.approx(1)


def test_the_best_checkpoint_comes_back_also_after_a_kill(tmp_path, processor, rows, monkeypatch):
    options = {"keep_best": True, "save_steps": 3, "save_total_limit": 2}
    scored_as(monkeypatch, [0.5, 0.9, 0.9, 0.2])
    whole = watched(tmp_path / "whole", processor, rows, **options)
    whole.train()
    last = {name: weight.detach().clone() for name, weight in whole._trainable().items()}
    assert whole.load_best() == 4
    best = load_file(tmp_path / "whole" / "checkpoint-4" / trainer.WEIGHTS)
    assert all(torch.equal(weight, best[name]) for name, weight in whole._trainable().items())
    assert any(not torch.equal(weight, last[name]) for name, weight in whole._trainable().items())

    killed = watched(tmp_path / "killed", processor, rows, **options)
    killed.add_callback(StopAt(7))
    scored_as(monkeypatch, [0.5, 0.9, 0.9])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    scored_as(monkeypatch, [0.2])
    resumed = watched(tmp_path / "killed", processor, rows, **options)
    resumed.train(resume_from_checkpoint=trainer.last_checkpoint(tmp_path / "killed"))
    assert resumed.load_best() == 4
    assert all(torch.equal(weight, best[name]) for name, weight in resumed._trainable().items())


def test_what_cannot_work_is_refused(tmp_path, processor, rows):
    sft = build("r4-joint", tmp_path, processor, rows)
    with pytest.raises(ValueError, match="no checkpoint was kept for its score"):
        sft.load_best()
    empty = rows.select([0]).map(lambda row: {"objects": {"bbox": [], "category_id": [], "category_name": []}})
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        IoUDuringTraining(sft, empty, SimpleNamespace(**RUN, keep="last"))


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from helpers import predict
from test_callbacks import watched
from small_training import small_processor, squares

asked, real = [], predict.generate_lines
predict.generate_lines = lambda *given: asked.extend(row["image_id"] for row in given[2]) or real(*given)
sft = watched(Path("run"), small_processor(), squares(), keep_best=True, max_steps=3)
sft.train()
ious = [line["eval_iou"] for line in sft.state.log_history if "eval_iou" in line]
rank, world = sft.accelerator.process_index, sft.accelerator.num_processes
Path(f"rank{rank}.json").write_text(json.dumps([world, asked, ious, sft.state.best_global_step, sft.load_best()]))
"""


def test_two_processes_share_the_pictures_and_agree(repo):
    Path("two.py").write_text(TWO_PROCESSES)
    ended = subprocess.run([Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master-port", "29547",
                            "two.py"], env=os.environ | {"PYTHONPATH": f"{repo}:{repo / 'tests'}"},
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[:2] == [2, ["0", "2"] * 2] and second[:2] == [2, ["1"] * 2]
    assert first[2:] == second[2:] and len(first[2]) == 2 and first[3:] == [2, 2]
