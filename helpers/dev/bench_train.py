"""Pictures a second of the pipeline's trainer against a bare loop over ready batches, in turns, in one run.

python -m helpers.dev.bench_train [--recipe r1-llm-only] [--steps 24] [--rounds 3]

Both train the same stage of a recipe at the tiny scale's own values on the same pictures. The bare loop has its batches
collated beforehand and does forward, backward, clipping and AdamW, nothing else: what it is faster by is what the
trainer spends on decoding, the processor, logging and itself. Where the vision tower does not train (r1, r3's second
stage), the trainer has it look once, before the first step, and the bare loop has it look in every step. The first two
steps are not counted. CPU time is this process's own: it says more where others use the machine.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLProcessor, TrainerCallback
from trl import SFTConfig

from helpers import collate, data, features, model, runs, trainer
from helpers.dev.bench_predict import PROMPT, load
from helpers.recipes import RECIPES, SCALES
from helpers.settings import TINY_BASE

TINY = SCALES["tiny"]
UNCOUNTED = 2  # steps


class Clock(TrainerCallback):
    """Wall and CPU seconds at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def rates(self) -> tuple[float, float]:
        """Pictures a second of wall time and of CPU time."""
        wall, cpu = (b - a for a, b in zip(self.ends[UNCOUNTED - 1], self.ends[-1], strict=True))
        pictures = TINY["batch_size"] * (len(self.ends) - UNCOUNTED)
        return pictures / wall, pictures / cpu


def tuned(stage) -> torch.nn.Module:
    """The tiny base as the stage trains it."""
    base = load(str(TINY_BASE), stage.precision, dtype=model.compute_dtype()).requires_grad_(False)
    if stage.trains == "full":
        base.model.visual.float().requires_grad_(True)
        return base
    lora = LoraConfig(r=TINY["lora_rank"], lora_alpha=TINY["lora_alpha"], target_modules=stage.lora_targets)
    return get_peft_model(base, lora)


def with_trainer(stage, rows, processor, collator, steps: int) -> tuple[float, float]:
    """The pipeline's own way."""
    clock, gpu = Clock(), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=TINY["batch_size"], learning_rate=1e-4,
            bf16=model.compute_dtype() == torch.bfloat16, gradient_checkpointing=False, max_length=None,
            remove_unused_columns=False, logging_steps=1, save_strategy="no", report_to="none",
            dataloader_num_workers=4 if gpu else 0, use_cpu=not gpu)
        vlm = tuned(stage)
        if features.worth_keeping(stage, False, TINY["epochs"]):
            collator = features.SeenCollator(collator, vlm, rows, Path(folder) / "seen", TINY["batch_size"])
            rows = collator.rows
        sft = trainer.BoxTrainer(vlm, args=settings, data_collator=collator, train_dataset=rows,
                                 processing_class=processor, callbacks=[clock])
        model.trainable_to_fp32(sft.model)
        sft.train()
    return clock.rates()


def bare(stage, batches: list[dict], steps: int) -> tuple[float, float]:
    """Forward, backward, clipping, AdamW."""
    clock, vlm = Clock(), tuned(stage)
    model.trainable_to_fp32(vlm)
    weights = [weight for weight in vlm.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    for batch in itertools.islice(itertools.cycle(batches), steps):
        with torch.autocast(vlm.device.type, torch.bfloat16, enabled=model.compute_dtype() == torch.bfloat16):
            loss = vlm(**{name: tensor.to(vlm.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
    return clock.rates()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="r4-joint", choices=[name for name, stages in RECIPES.items() if stages])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs.quiet_libraries()
    os.environ["TQDM_DISABLE"] = "1"
    budget = {name: TINY[name] for name in ("min_pixels", "max_pixels")}
    raw = data.load_raw("embedded", limit={"train": options.steps * TINY["batch_size"], "selection": 1, "val": 1})
    rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)["train"]
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE, **budget)
    collator, size = collate.Collator(processor, PROMPT), TINY["batch_size"]
    batches = [collator([rows[i] for i in range(start, start + size)]) for start in range(0, len(rows) - size, size)]
    stage, found = RECIPES[options.recipe][-1], []
    for number in range(options.rounds):
        ours, least = with_trainer(stage, rows, processor, collator, options.steps), bare(stage, batches, options.steps)
        found.append({"round": number + 1, "trainer, pictures/s": ours[0], "bare, pictures/s": least[0],
                      "ratio": ours[0] / least[0], "ratio by CPU time": ours[1] / least[1]})  # fmt: skip
    print(f"{options.recipe}, {options.steps} steps of {size}, {runs.machine()}, {torch.get_num_threads()} thread(s)")
    print(pd.DataFrame(found).round(3).to_string(index=False))
    for name in ("ratio", "ratio by CPU time"):
        print(f"median {name}: {statistics.median(row[name] for row in found):.3f}")


if __name__ == "__main__":
    main()
