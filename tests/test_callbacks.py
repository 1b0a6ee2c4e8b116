"""IoU during training: the training is not disturbed, the number is right, the best checkpoint really comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file
from small_training import StopAt, build

from helpers import trainer
from helpers.trainer import IoUDuringTraining

RUN = {"eval_steps": 2, "eval_pictures": 3, "prompt": "Where?", "predict_batch_size": 2, "max_new_tokens": 12}


def watched(folder, processor, rows, recipe="r4-joint", keep="last", **options):
    sft = build(recipe, folder, processor, rows, **options)
    sft.add_callback(IoUDuringTraining(sft, rows, SimpleNamespace(**RUN, keep=keep)))
    return sft


def scored_as(monkeypatch, numbers):
    """The scorer says these numbers, one at each measurement (a random model's completions all score 0)."""
    rest = iter(numbers)
    monkeypatch.setattr("helpers.trainer.evaluate.score",
                        lambda *args, **options: {"summary": {"mean_iou": {"value": next(rest)}}})


@pytest.mark.parametrize("recipe, nf4, recomputed", [("r2-vision-only", False, False), ("r4-joint", True, True)])
def test_the_training_is_as_if_nothing_had_been_generated(recipe, nf4, recomputed, tmp_path, processor, rows):
    options = {"nf4": nf4, "gradient_checkpointing": recomputed}
    plain = build(recipe, tmp_path / "plain", processor, rows, **options)
    plain.train()
    tuned = watched(tmp_path / "watched", processor, rows, recipe, **options)
    tuned.train()
    for name, weight in tuned._trainable().items():
        assert torch.equal(weight, plain._trainable()[name]), name
    logs = [trainer.read_log(tmp_path / run / "log.jsonl") for run in ("plain", "watched")]
    losses = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert [line["step"] for line in logs[1] if "eval_iou" in line] == [2, 4, 6, 8]
    assert all("loss" not in line and 0 <= line["eval_iou"] <= 1 for line in logs[1] if "eval_iou" in line)


def test_the_number_is_the_evaluators_own(tmp_path, processor, rows, monkeypatch):
    sft = watched(tmp_path, processor, rows)
    callback = sft.callback_handler.callbacks[-1]

    def writes_the_truth(model, processor, encoded, generation, names):
        assert not model.training and len(encoded) <= 2 and generation["max_new_tokens"] == 12
        boxes = {row["image_id"]: row["objects"]["bbox"][0] for row in callback.truth}
        found = [(one["image_id"], boxes[one["image_id"]]) for one in encoded]
        return [{"image_id": i, "boxes": [[x0, y0, x1, y1]], "labels": ["nutrition-table"], "confidences": [1.0],
                 "rejected": [], "stopped": True} for i, (y0, x0, y1, x1) in found]

    monkeypatch.setattr("helpers.predict.complete", writes_the_truth)
    assert callback._measure() == pytest.approx(1)


def test_the_best_checkpoint_comes_back_also_after_a_kill(tmp_path, processor, rows, monkeypatch):
    options = {"keep": "best", "save_steps": 3, "save_total_limit": 2}
    scored_as(monkeypatch, [0.5, 0.9, 0.9])
    killed = watched(tmp_path / "run", processor, rows, **options)
    killed.add_callback(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    scored_as(monkeypatch, [0.2])
    resumed = watched(tmp_path / "run", processor, rows, **options)
    resumed.train(resume_from_checkpoint=trainer.last_checkpoint(tmp_path / "run"))
    last = {name: weight.detach().clone() for name, weight in resumed._trainable().items()}
    best = load_file(tmp_path / "run" / "checkpoint-4" / trainer.WEIGHTS)  # the earlier of equal ones, not rotated away
    assert any(not torch.equal(weight, best[name]) for name, weight in last.items())
    for keep, expected in (("last", last), ("best", best)):
        resumed.save_result(tmp_path / keep, keep)
        saved = load_peft_weights(tmp_path / keep)
        assert len(saved) == len(expected)
        assert all(torch.equal(weight, saved[name.replace(".default", "")]) for name, weight in expected.items())


TWO_PROCESSES = """
import json, os, signal
from pathlib import Path
from helpers import predict
from test_callbacks import watched
from small_training import build, small_processor, squares
from test_trainer import At

mine, real = [], predict.complete
predict.complete = lambda *given: mine.extend(one["image_id"] for one in given[2]) or real(*given)
sft = watched(Path("run"), small_processor(), squares(), keep="best", max_steps=3)
sft.train()
ious = [line["eval_iou"] for line in sft.state.log_history if "eval_iou" in line]
rank, world = sft.accelerator.process_index, sft.accelerator.num_processes
stopped = build("r1-llm-only", Path("stopped"), small_processor(), squares())
stopped.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank else None))
try:
    stopped.train()
except SystemExit as end:
    Path(f"rank{rank}.json").write_text(json.dumps([world, mine, ious, sft.state.best_global_step, str(end)]))
"""


def test_two_processes_share_the_pictures_agree_and_stop_together(repo):
    Path("two.py").write_text(TWO_PROCESSES)
    ended = subprocess.run([Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2",
                            "two.py"], env=os.environ | {"PYTHONPATH": f"{repo}:{repo / 'tests'}"},
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[:2] == [2, ["0", "2"] * 2] and second[:2] == [2, ["1"] * 2]
    assert first[2:4] == second[2:4] and len(first[2]) == 2 and first[3] == 2
    assert first[4].startswith("another process was told to stop at step 2 of 4: checkpoint-2 is saved")
    assert second[4].startswith("SIGTERM at step 2 of 4: checkpoint-2 is saved")
