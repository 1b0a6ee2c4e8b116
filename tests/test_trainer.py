"""Checkpoints hold what trains, a half-written one is never loaded, and a resumed run equals an undisturbed one."""

import json

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor, TrainerCallback, set_seed
from trl import SFTConfig

from helpers import collate, runs, trainer
from helpers.recipes import RECIPES
from helpers.settings import TINY_BASE


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=16 * 784)


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)

    def row(i):
        y0, x0 = draw.uniform(0, 0.5, 2)
        picture = Image.new("RGB", (112, 112), "black")
        ImageDraw.Draw(picture).rectangle([x0 * 112, y0 * 112, x0 * 112 + 40, y0 * 112 + 40], fill="white")
        objects = {"bbox": [[y0, x0, y0 + 0.35, x0 + 0.35]], "category_id": [0], "category_name": ["nutrition-table"]}
        return {"image_id": str(i), "image": picture, "objects": objects}

    return datasets.Dataset.from_list([row(i) for i in range(16)])


def build(recipe, folder, processor, rows, **options):
    stage = RECIPES[recipe][0]
    set_seed(0)
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(TINY_BASE, dtype=torch.bfloat16).requires_grad_(False)
    if stage.trains == "full":
        vlm.model.visual.float().requires_grad_(True)
    else:
        vlm = get_peft_model(vlm, LoraConfig(r=4, lora_dropout=0.1, target_modules=stage.lora_targets))
    options = {"num_train_epochs": 2, "save_steps": 3, "learning_rate": 1e-3} | options
    arguments = SFTConfig(output_dir=str(folder), per_device_train_batch_size=4, bf16=True, max_length=None,
                          gradient_checkpointing=False, remove_unused_columns=False, logging_steps=1,
                          logging_nan_inf_filter=False, report_to="none", use_cpu=True, seed=0, **options)
    sft = trainer.BoxTrainer(vlm, args=arguments, train_dataset=rows, processing_class=processor,
                             data_collator=collate.Collator(processor, "Where?"), callbacks=[trainer.LossLog(folder)])
    return sft


class StopAt(TrainerCallback):
    """A kill: the process is gone in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


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
    checkpoint = runs.last_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-3")

    start = WeightsAtStart()
    resumed = build(recipe, tmp_path / "killed", processor, rows)
    resumed.add_callback(start)
    resumed.train(resume_from_checkpoint=checkpoint)
    saved = load_file(f"{checkpoint}/{trainer.WEIGHTS}")
    assert saved.keys() == start.weights.keys() and all(torch.equal(saved[name], start.weights[name]) for name in saved)
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    for name, weight in resumed._trainable().items():
        assert torch.equal(weight, whole._trainable()[name]), name
    logs = [trainer.read_log(tmp_path / run / "log.jsonl") for run in ("whole", "killed")]
    assert [line["step"] for line in logs[1]] == list(range(1, 9))
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_a_checkpoint_of_other_weights_is_refused(tmp_path, processor, rows):
    build("r1-llm-only", tmp_path, processor, rows, max_steps=3).train()
    other = build("r4-joint", tmp_path, processor, rows)
    with pytest.raises(ValueError, match="holds other weights than the ones that train here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_stops_when_the_loss_is_no_number(tmp_path, processor, rows):
    sft = build("r2-vision-only", tmp_path, processor, rows)
    next(iter(sft._trainable().values())).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; lower learning_rate"):
        sft.train()


def test_a_cut_log_line_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert [line["step"] for line in trainer.read_log(tmp_path / "log.jsonl")] == [1]


def test_no_checkpoint_and_steps_done(tmp_path):
    assert runs.last_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / trainer.COMPLETE).touch()
    assert runs.last_checkpoint(tmp_path).endswith("checkpoint-10")
    assert not runs.is_done(tmp_path, "train", "a")
    runs.mark_done(tmp_path, "train", "a")
    assert runs.is_done(tmp_path, "train", "a") and not runs.is_done(tmp_path, "train", "b")
