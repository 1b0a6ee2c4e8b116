"""A training step taken apart: stock TRL and the pipeline's trainer in variants, on one model, in one process.

Each variant attaches fresh adapters to the same frozen base, trains a few steps through its trainer's own loop, and is
measured by `bench_clock`: medians over the micro-batches after the first step.
"""

import copy
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Qwen2VLForConditionalGeneration, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import collate, features, fused, model, sizes, trainer
from helpers.dev.bench_clock import StepClock
from helpers.messages import target_text
from helpers.recipes import RECIPES, Stage

PROMPT = "Detect the bounding box of the nutrition table."
GIB = 2**30


class AsTRL(trainer.BoxTrainer):
    """Our trainer with TRL's own way to the loss."""

    compute_loss = SFTTrainer.compute_loss


class AllLogits(trainer.BoxTrainer):
    """Our trainer with the loss as Trainer and older TRL make it: from the logits of every token."""

    compute_loss = Trainer.compute_loss
    log = Trainer.log


# stock: TRL's trainer and collator; trl: TRL's trainer with our collator
KINDS = {"stock": SFTTrainer, "trl": SFTTrainer, "as-trl": AsTRL, "all-logits": AllLogits, "ours": trainer.BoxTrainer}


@dataclass(frozen=True)
class Variant:
    """One way to train; the defaults are the published configuration's."""

    name: str
    recipe: str = "r4-joint"
    kind: str = "ours"  # a key of KINDS
    micro_batch: int = 2
    checkpointing: bool | None = True  # None: where memory needs it, as the pipeline chooses
    dropout: float = 0.05  # LoRA's
    cached: bool = False  # the frozen vision tower's features computed beforehand
    fused: bool = False  # LoRA added in place, what stands between matrix products compiled (helpers/fused.py)
    compiled: bool = False
    liger: bool = False

    @property
    def stage(self) -> Stage:
        return RECIPES[self.recipe][-1]


def as_chats(rows: Dataset) -> Dataset:
    """Rows as TRL wants them: `image`, conversational `prompt` and `completion`."""

    def chat(row: dict) -> dict:
        return {"prompt": [{"role": "user", "content": PROMPT}],
                "completion": [{"role": "assistant", "content": target_text(row["objects"])}]}  # fmt: skip

    texts = [chat({"objects": objects}) for objects in rows["objects"]]
    chats = rows.select_columns(["image"])
    for name in ("prompt", "completion"):
        chats = chats.add_column(name, [text[name] for text in texts])
    return chats


def build(variant: Variant, base: torch.nn.Module, processor, rows: Dataset, folder: str, *, rank: int, steps: int,
          accumulation: int, workers: int, learning_rate: float = 2e-5) -> SFTTrainer:
    """The variant's trainer: on fresh adapters, alike for all variants, or on a copy where a whole tower trains."""
    set_seed(0)
    if variant.stage.trains == "full":  # on a copy, whose weights may change
        tuned = copy.deepcopy(base)
        tuned.model.visual.float().requires_grad_(True)
    else:
        tuned = get_peft_model(base, LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=variant.dropout, target_modules=variant.stage.lora_targets,
            task_type="CAUSAL_LM"))  # fmt: skip
    if variant.fused:
        fused.fuse_lora(tuned)
        fused.compile_between(tuned)
    collator, checkpointing = collate.Collator(processor, PROMPT), variant.checkpointing
    kept: list[torch.nn.Module] = []
    if checkpointing is None:  # as the pipeline does
        first = collator([rows[i] for i in range(variant.micro_batch)])
        checkpointing = not model.fits_whole(tuned, first)
        kept = model.layers_that_fit(tuned, first) if checkpointing else []
    arguments = SFTConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=variant.micro_batch,
        gradient_accumulation_steps=accumulation, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=0.05, max_grad_norm=1.0, bf16=base.dtype == torch.bfloat16,
        gradient_checkpointing=checkpointing, max_length=None, remove_unused_columns=False, logging_steps=1,
        save_strategy="no", report_to="none", seed=0, dataloader_num_workers=workers,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True)  # fmt: skip
    enough = [i % len(rows)
              for i in range(steps * accumulation * variant.micro_batch * arguments.world_size)]  # one epoch
    if variant.kind == "stock":
        chats = as_chats(rows.select(enough))
        sft = SFTTrainer(tuned, args=arguments, train_dataset=chats, processing_class=processor)
        sft.remove_callback(PrinterCallback)
        return sft
    made: collate.Collator | features.SeenCollator = collator
    if variant.cached:
        made = features.SeenCollator(collator, tuned, rows, Path(folder) / "seen", variant.micro_batch, workers)
        rows = made.rows
    sft = KINDS[variant.kind](tuned, args=arguments, train_dataset=rows.select(enough), processing_class=processor,
                              data_collator=made)  # fmt: skip
    sft.add_callback(model.KeepActivations(kept))
    if variant.kind != "trl":
        model.trainable_to_fp32(tuned)
    return sft


def release(sft: SFTTrainer) -> None:
    """Take the adapters and everything the trainer did to the base off again."""
    if not isinstance(sft.model, PeftModel):  # a copy: nothing was done to the base
        return
    base = sft.model.unload()
    base.__dict__.pop("peft_config", None)
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    base.requires_grad_(False)
    as_loaded(base)
    sft.model = sft.model_wrapped = sft.optimizer = sft.callback_handler = None
    model.free_memory()


def as_loaded(base: torch.nn.Module) -> None:
    """Take off the base what TRL, accelerate, `fused`, `compile` and a clock whose step failed have put on it."""
    for module in base.modules():
        module.__dict__.pop("forward", None)
        module._compiled_call_impl = None
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    fused.plain_rotations()
    model.free_memory()


def measure(variant: Variant, base: torch.nn.Module, processor, rows: Dataset, *, rank: int, rate: float,
            pictures: int, steps: int = 3, accumulation: int = 2, workers: int = 0,
            learning_rate: float = 2e-5) -> dict:
    """One row of the report: how fast the variant trains `pictures` pictures with one update, and on what.

    `rate` is `bench_clock.matmul_rate`'s, `rows` a `Dataset` of the project's schema. A variant that fails (no memory)
    gives `{"failed": why}` beside its values.
    """
    row = {**vars(variant), "precision": "nf4" if model.nf4_layers(base) else "bf16"}
    sft, why = None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            sft = build(variant, base, processor, rows, folder, rank=rank, steps=steps, accumulation=accumulation,
                        workers=workers, learning_rate=learning_rate)
            row |= _timed(variant, sft, base, rank, rate, pictures, accumulation)
        except Exception as error:  # a bench goes on, and says what it could not do
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if sft is not None:
        release(sft)
    del sft
    gc.collect()
    return row | ({"failed": why} if why else {})


def _timed(variant: Variant, sft: SFTTrainer, base, rank: int, rate: float, pictures: int, accumulation: int) -> dict:
    if variant.compiled:
        for layer in [*base.model.language_model.layers, *base.model.visual.blocks]:
            layer.compile(dynamic=True)
    if variant.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl

        apply_liger_kernel_to_qwen2_vl(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
    clock = StepClock(sft)
    flops, tokens = needed(variant, sft, rank)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    sft.train()
    split = clock.split(accumulation, variant.micro_batch, pictures)
    seconds = sum(split.values())
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    return {"pictures_per_s": pictures / seconds, "tokens_per_s": pictures * tokens / seconds, "peak_gib": peak,
            "mfu": pictures * flops / seconds / rate, "split_s": split,
            "checkpointing": sft.args.gradient_checkpointing, "micro_batches": len(clock.batches),
            "losses": [log["loss"] for log in sft.state.log_history if "loss" in log],
            "wall_s": time.perf_counter() - start}  # fmt: skip


def needed(variant: Variant, sft: SFTTrainer, rank: int, batches: int = 2) -> tuple[float, float]:
    """Needed operations and tokens a picture, means over the first `batches` batches of the trainer's data."""
    count, flops, tokens = 0, 0.0, 0.0
    with torch.device("meta"):
        plain = Qwen2VLForConditionalGeneration(sft.model.config)  # before PEFT: its layers by name
    for number in range(batches):
        first = number * variant.micro_batch
        batch = sft.data_collator([sft.train_dataset[i % len(sft.train_dataset)]
                                   for i in range(first, first + variant.micro_batch)])  # fmt: skip
        lengths, answers = batch["attention_mask"].sum(1).tolist(), (batch["labels"] != -100).sum(1).tolist()
        for grid, length, answer in zip(batch["image_grid_thw"].tolist(), lengths, answers, strict=True):
            parts = sizes.training_flops(plain, variant.stage, rank, grid, length, answer, variant.cached)
            flops += sum(parts.values())
            tokens += length
            count += 1
    return flops / count, tokens / count
