"""A training made small: white squares on black, the tiny base, a few steps."""

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from transformers import Qwen2VLProcessor, TrainerCallback, set_seed
from trl import SFTConfig

from helpers import collate, model, parity, trainer
from helpers.recipes import RECIPES
from helpers.settings import TINY_BASE


def small_processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=16 * 784)


def squares():
    draw = np.random.default_rng(0)

    def row(i):
        y0, x0 = draw.uniform(0, 0.5, 2)
        picture = Image.new("RGB", (112, 112), "black")
        ImageDraw.Draw(picture).rectangle([x0 * 112, y0 * 112, x0 * 112 + 40, y0 * 112 + 40], fill="white")
        objects = {"bbox": [[y0, x0, y0 + 0.35, x0 + 0.35]], "category_id": [0], "category_name": ["nutrition-table"]}
        return {"image_id": str(i), "image": picture, "objects": objects}

    return datasets.Dataset.from_list([row(i) for i in range(16)])


def load_tiny(**options):
    """The tiny base, frozen, on the CPU; in what this machine computes in if `options` do not say otherwise."""
    options = {"dtype": model.compute_dtype(), "device_map": {"": "cpu"}} | options
    return model.load(TINY_BASE, **options).requires_grad_(False).eval()


nf4_config = model.nf4  # the pipeline's quantization


def build(recipe, folder, processor, rows, nf4=False, dtype=None, **options):
    stage, dtype = RECIPES[recipe][0], dtype or model.compute_dtype()
    set_seed(0)
    vlm = load_tiny(quantization_config=nf4_config(dtype) if nf4 else None, dtype=dtype)
    if stage.trains == "full":
        vlm.model.visual.float().requires_grad_(True)
    else:
        vlm = get_peft_model(vlm, LoraConfig(r=4, lora_dropout=0.1, target_modules=stage.lora_targets))
    options = {"num_train_epochs": 2, "save_steps": 3, "learning_rate": 1e-3, "gradient_checkpointing": False,
               "report_to": "none"} | options
    made_with = parity.record(processor, "Where?")
    arguments = SFTConfig(output_dir=str(folder), per_device_train_batch_size=4, bf16=dtype == torch.bfloat16,
                          max_length=None, remove_unused_columns=False, logging_steps=1,
                          logging_nan_inf_filter=False, use_cpu=True, seed=0, **options)
    return trainer.BoxTrainer(vlm, args=arguments, train_dataset=rows, processing_class=processor,
                              data_collator=collate.Collator(processor, "Where?"),
                              callbacks=[trainer.LossLog(folder)], made_with=made_with, base=parity.base_of(TINY_BASE))


class StopAt(TrainerCallback):
    """A kill: the process is gone in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
