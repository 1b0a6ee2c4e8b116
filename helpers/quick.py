"""A finished model in a minute, for a notebook that needs one: a few LoRA steps on the embedded photos, merged."""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLProcessor
from trl import SFTConfig

from helpers import collate, data, merge, model, parity, trainer
from helpers.recipes import RECIPES, SCALES
from helpers.settings import TINY_BASE


def finished_model(folder: Path, prompt: str, steps: int, seed: int = 0) -> Path:
    """Train the tiny base with LoRA on its language model for `steps` steps, and write the merged model to `folder`.

    Far from a whole run, and of the same form: weights in bf16, processor, parity.json.
    """
    tiny, stage = SCALES["tiny"], RECIPES["r1-llm-only"][0]
    budget = {name: tiny[name] for name in ("min_pixels", "max_pixels")}
    limit = {"train": steps * tiny["batch_size"], "selection": 1, "val": 1}
    rows = data.prepare(data.load_splits("embedded", limit=limit), **budget)["train"]
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE, **budget)
    transformers.set_seed(seed)
    model.patches_as_product()
    base = model.load(TINY_BASE, dtype=model.compute_dtype(), attn_implementation=model.attention(),
                      device_map=model.device_map())
    tuned = get_peft_model(base.requires_grad_(False), LoraConfig(
        r=tiny["lora_rank"], lora_alpha=tiny["lora_alpha"], target_modules=stage.lora_targets, task_type="CAUSAL_LM"))
    arguments = SFTConfig(
        output_dir=str(folder.with_name(folder.name + "-training")), max_steps=steps, seed=seed,
        per_device_train_batch_size=tiny["batch_size"], learning_rate=stage.learning_rate["tiny"],
        lr_scheduler_type="cosine", warmup_steps=0.05, bf16=model.compute_dtype() == torch.bfloat16,
        gradient_checkpointing=False, max_length=None, remove_unused_columns=False, save_strategy="no",
        report_to="none", logging_steps=steps, use_cpu=not torch.cuda.is_available())
    sft = trainer.BoxTrainer(tuned, args=arguments, train_dataset=rows, processing_class=processor,
                             data_collator=collate.Collator(processor, prompt))
    model.trainable_to_fp32(tuned)  # TRL has just cast LoRA to bf16
    model.check_trainable(tuned, stage)
    sft.train()
    merge.save_whole(tuned.merge_and_unload(safe_merge=True), processor, folder)
    parity.write(folder, parity.record(processor, prompt), parity.base_of(TINY_BASE))
    return folder
