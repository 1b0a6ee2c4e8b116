"""How fast Unsloth trains the same 7B on the same pictures: rows for the report of `helpers.dev.bench_7b`.

python -m helpers.dev.bench_unsloth --folder DISK --report notebooks/performance_7b.json [--only WORD ...]

Runs after `bench_7b`, on the same GPU, with its `--folder`, in an environment of Unsloth's own: its pinned versions of
transformers, TRL and datasets are not this project's. Unsloth's own way, as its notebooks have it: `FastVisionModel`,
its collator and its checkpointing, TRL's trainer as it patches it, NF4. Equal to ours are the recipe, the size of the
pictures (its collator would shrink them to 512 pixels), what the loss looks at and the optimiser. Each variant is
measured in a process of its own, so that none runs into what another has compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PROMPT = "Detect the bounding box of the nutrition table."  # that of bench_steps, which needs the project's versions
VARIANTS = {
    f"Unsloth, micro-batch {size}{', no dropout' * (not dropout)}{', r1' * (recipe == 'r1-llm-only')}":
        {"recipe": recipe, "micro_batch": size, "dropout": dropout}
    for recipe in ("r4-joint", "r1-llm-only") for size in (2, 8) for dropout in (0.05, 0.0)
}  # fmt: skip
STEPS, ACCUMULATION = 4, 2  # the first step, in which Unsloth compiles, is not counted
PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "trl", "peft", "bitsandbytes", "torch")


def chats(folder: Path, count: int) -> list[dict]:
    """`count` decoded pictures with TRL's conversational `prompt` and `completion`, in order and repeated."""
    from PIL import Image

    from helpers.messages import to_messages

    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": Image.open(folder / line["file_name"]).convert("RGB"), **line} for line in lines]
    return [to_messages(rows[i % len(rows)], PROMPT) for i in range(count)]


def measure(folder: Path, recipe: str, micro_batch: int, dropout: float, workers: int, rank: int) -> dict:
    """Seconds by part for 16 pictures and one update, tokens a picture, losses, peak memory, 4-bit layers by tower."""
    import unsloth  # isort: skip  # before the libraries that it patches
    import torch
    from bitsandbytes.nn import Linear4bit
    from trl import SFTConfig, SFTTrainer
    from unsloth.trainer import UnslothVisionDataCollator

    from helpers.dev.bench_clock import StepClock

    model, processor = unsloth.FastVisionModel.from_pretrained(
        str(folder / "model"), load_in_4bit=True, dtype=torch.bfloat16, use_gradient_checkpointing="unsloth",
        use_exact_model_name=True, local_files_only=True)  # fmt: skip
    model = unsloth.FastVisionModel.get_peft_model(
        model, r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_gradient_checkpointing="unsloth",
        finetune_vision_layers=recipe == "r4-joint", finetune_language_layers=True, random_state=0)  # fmt: skip
    unsloth.FastVisionModel.for_training(model)
    collator = UnslothVisionDataCollator(model, processor, resize="max")
    rows = chats(folder / "pictures" / "train", STEPS * ACCUMULATION * micro_batch)
    tokens = collator(rows[:4])["attention_mask"].sum().item() / 4
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output:
        sft = SFTTrainer(
            model=model, processing_class=processor, train_dataset=rows, data_collator=collator, args=SFTConfig(
                output_dir=output, max_steps=STEPS, per_device_train_batch_size=micro_batch, bf16=True,
                gradient_accumulation_steps=ACCUMULATION, learning_rate=2e-5, lr_scheduler_type="cosine",
                warmup_steps=0.05, max_grad_norm=1.0, optim="adamw_torch_fused", max_length=2048, logging_steps=1,
                remove_unused_columns=False, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True},
                save_strategy="no", report_to="none", seed=0, dataloader_num_workers=workers, use_cpu=not gpu,
                disable_tqdm=True))  # fmt: skip
        clock = StepClock(sft)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        sft.train()
    linear4bit = [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return {
        "split_s": clock.split(ACCUMULATION, micro_batch, 16), "tokens": tokens, "micro_batches": len(clock.batches),
        "losses": [log["loss"] for log in sft.state.log_history if "loss" in log],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "vision_nf4": sum(".visual." in name for name in linear4bit), "layers_nf4": len(linear4bit),
        "vision_trained": sum(".visual." in name for name in trained), "weights_trained": len(trained),
    }  # fmt: skip


def row_of(name: str, variant: dict, found: dict, report: dict) -> dict:
    """The report's row; the operations that a picture needs are those of the stock row of the same recipe."""
    stock = next(row for row in report["train"] if row["kind"] == "stock" and row["recipe"] == variant["recipe"])
    row = {"name": name, "kind": "unsloth", "precision": "nf4", "checkpointing": True, **variant,
           "versions": {package: version(package) for package in PACKAGES}, **found}  # fmt: skip
    if "failed" not in found:
        rate = 16 / sum(found["split_s"].values())
        row |= {"pictures_per_s": rate, "tokens_per_s": rate * row.pop("tokens"),
                "mfu": rate * stock["mfu"] / stock["pictures_per_s"]}  # fmt: skip
    return row


def in_own_process(name: str, options: argparse.Namespace) -> dict:
    """What `measure` found, or `{"failed": why}`."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        quiet = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": scratch}
        command = [sys.executable, "-m", "helpers.dev.bench_unsloth", "--one", name, f"--folder={options.folder}",
                   f"--report={found}", f"--workers={options.workers}", f"--rank={options.rank}"]  # fmt: skip
        done = subprocess.run(command, env=os.environ | quiet, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return {"failed": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "killed"}
        return json.loads(found.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-7b"), help="bench_7b's: model, pictures")
    parser.add_argument("--report", type=Path, default=Path("runs/bench-7b/performance_7b.json"), help="bench_7b's")
    parser.add_argument("--only", nargs="*", default=[""], help="variants whose name holds one of these words")
    parser.add_argument("--workers", type=int, default=4, help="that load pictures")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA; its alpha is twice that")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(options.folder, **VARIANTS[options.one], workers=options.workers, rank=options.rank)
        options.report.write_text(json.dumps(found))
        return 0
    for name, variant in VARIANTS.items():
        if any(word in name for word in options.only):
            start = time.perf_counter()
            found = in_own_process(name, options)
            report = json.loads(options.report.read_text())
            row = row_of(name, variant, found | {"wall_s": time.perf_counter() - start}, report)
            report["train"] = [other for other in report["train"] if other["name"] != name] + [row]
            options.report.write_text(json.dumps(report, indent=2) + "\n")
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
