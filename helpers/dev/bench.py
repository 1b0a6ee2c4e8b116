"""How fast training and generation are, stock TRL against ours and Unsloth: `python -m helpers.dev.bench`.

At 7B, the default where there is a GPU, with the published architecture, random weights and pictures of 1280 image
tokens, without a download; else with the tiny base and the embedded photos. Each variant runs in a process of its own:

- stock: TRL's SFTTrainer and collator on an NF4 base, batches of 2, gradient checkpointing; generation one by one
- ours: pipeline.py as it is, until its training ends; generation is its row `base`
- Unsloth, where --unsloth names the Python of an environment that has it: its own loader, kernels and collator
  (pip install unsloth transformers==5.17.0 trl==1.15.0 'datasets<5')

The report is written after each, so that a call with --only adds to it, at the same commit and on the same machine;
--write puts its summary into README.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import runs
from helpers.dev.check_7b import read_events, values
from helpers.dev.random_7b import PUBLISHED, write_model, write_pictures
from helpers.recipes import RECIPES, SCALES
from helpers.runs import read_json, write_json
from helpers.settings import TINY_BASE

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "notebooks" / "performance_7b.json"
BLOCK = re.compile(r"(<!-- speed: [^\n]* -->\n).*?(<!-- end of speed -->)", re.S)
PROMPT = "Detect the bounding box of the nutrition table."
VAL = 123  # pictures of the real val, for which generation is counted
UPDATES = 4  # of the weights, the first of which is not counted
WAYS: dict[str, dict] = {  # name -> how; what is not said is the scale's own
    "stock": {"kind": "stock", "micro_batch": 2},
    "ours, in 24 GiB": {"kind": "ours", "cap_gib": 24},
    "ours, as the pipeline trains": {"kind": "ours"},
    "Unsloth, micro-batch 2": {"kind": "unsloth", "micro_batch": 2},
    "Unsloth, micro-batch 8": {"kind": "unsloth", "micro_batch": 8},
    "Unsloth, micro-batch 8, no dropout": {"kind": "unsloth", "micro_batch": 8, "dropout": 0.0},
}
VARIANTS = {name + suffix: {"recipe": recipe, **how} for recipe, suffix in (("r4-joint", ""), ("r1-llm-only", ", r1"))
            for name, how in WAYS.items()}


class Clock(TrainerCallback):
    """The moments at which a training's updates end."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(task: dict, vlm, processor, rows, collator=None, **settings) -> dict:
    """Train by TRL's trainer; pictures a second (median over the updates after the first, loading included), peak."""
    gpu, clock = torch.cuda.is_available(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        sft = SFTTrainer(vlm, train_dataset=rows, data_collator=collator, processing_class=processor, args=SFTConfig(
            output_dir=folder, max_steps=UPDATES, per_device_train_batch_size=task["micro_batch"],
            gradient_accumulation_steps=task["pictures"] // task["micro_batch"], learning_rate=2e-5,
            lr_scheduler_type="cosine", warmup_steps=0.05, remove_unused_columns=False, logging_steps=1,
            report_to="none", save_strategy="no", dataloader_num_workers=4 if gpu else 0, use_cpu=not gpu,
            disable_tqdm=True, **settings))
        sft.add_callback(clock)
        sft.train()
    seconds = statistics.median(end - start for start, end in itertools.pairwise(clock.ends))
    return {"checkpointing": sft.args.gradient_checkpointing, "pictures_per_s": task["pictures"] / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            "losses": [log["loss"] for log in sft.state.log_history if "loss" in log]}


def generate(task: dict, vlm, processor, pictures: Sequence) -> dict:
    """Seconds for `pictures` one by one, by `generate` as it is; the first is done once before."""
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    for some in (pictures[:1], pictures):
        start = time.perf_counter()
        for picture in some:
            inputs = processor(text=[text], images=[picture], return_tensors="pt").to(vlm.device)
            vlm.generate(**inputs, max_new_tokens=task["new_tokens"], do_sample=False)
    return {"batch": 1, "pictures": len(pictures), "seconds": time.perf_counter() - start}


def stock(task: dict) -> dict:
    """TRL's trainer on an NF4 base with LoRA, as its own examples have it."""
    from peft import LoraConfig, get_peft_model

    from helpers import data, model
    from helpers.messages import target_text
    from helpers.topics.training import nf4

    dtype, pixels = model.compute_dtype(), {name: task[name] for name in ("min_pixels", "max_pixels")}
    raw = data.load_raw(task["data"], limit={"train": task["train"], "selection": 1, "val": task["val"]})
    rows = data.prepare(data.clean(raw, data.audit(raw)), **pixels)
    processor = transformers.Qwen2VLProcessor.from_pretrained(task["model"], **pixels)
    base = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        task["model"], dtype=dtype, quantization_config=nf4(dtype), device_map=model.device_map())
    tuned = get_peft_model(base.requires_grad_(False), LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], lora_dropout=task["dropout"], task_type="CAUSAL_LM",
        target_modules=RECIPES[task["recipe"]][-1].lora_targets))
    chats = rows["train"].select_columns(["image"])
    for name, role, texts in (("prompt", "user", [PROMPT] * len(chats)),
                              ("completion", "assistant", map(target_text, rows["train"]["objects"]))):
        chats = chats.add_column(name, [[{"role": role, "content": text}] for text in texts])
    found = train(task, tuned, processor, chats, bf16=dtype == torch.bfloat16, gradient_checkpointing=True,
                  max_length=None)
    tuned.eval()
    with tuned.disable_adapter():
        return found | {"generation": generate(task, tuned, processor, rows["val"]["image"][: task["alone"]])}


def with_unsloth(task: dict) -> dict:
    """Unsloth's own way, in its environment; the size of the pictures is ours (it would shrink them to 512 pixels)."""
    from PIL import Image
    from unsloth import FastVisionModel
    from unsloth.trainer import UnslothVisionDataCollator

    from helpers.messages import to_messages

    vlm, processor = FastVisionModel.from_pretrained(
        task["model"], load_in_4bit=True, dtype=torch.bfloat16, use_gradient_checkpointing="unsloth",
        use_exact_model_name=True, local_files_only=True)
    vlm = FastVisionModel.get_peft_model(
        vlm, r=task["rank"], lora_alpha=task["alpha"], lora_dropout=task["dropout"], random_state=0,
        finetune_vision_layers=task["recipe"] == "r4-joint", use_gradient_checkpointing="unsloth")
    FastVisionModel.for_training(vlm)
    folder = Path(task["data"]) / "train"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [Image.open(folder / line["file_name"]).convert("RGB") for line in lines]
    chats = [to_messages(line | {"image": picture}, PROMPT) for line, picture in zip(lines, pictures, strict=True)]
    found = train(task, vlm, processor, chats, UnslothVisionDataCollator(vlm, processor, resize="max"), bf16=True,
                  max_length=2048, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True})
    FastVisionModel.for_inference(vlm)
    return found | {"generation": generate(task, vlm, processor, pictures[: task["alone"]])}


def child(task: dict) -> None:
    """Measure stock or Unsloth in this process; what was found goes to `task["found"]`."""
    runs.quiet_libraries()
    write_json(Path(task["found"]), (stock if task["kind"] == "stock" else with_unsloth)(task))


def command(task: dict, scratch: Path, unsloth: str | None) -> list[str]:
    """The command that measures one variant, into a file of `scratch`; ours is pipeline.py until its training ends."""
    if task["kind"] == "ours":
        given = {"recipe": task["recipe"], "scale": task["scale"], "model_id": task["model"],
                 "dataset_id": task["data"], "epochs": 2, "train_limit": task["train"], "val_limit": task["val"],
                 "max_new_tokens": task["new_tokens"], "save_steps": 1000, "report_to": "none", "output_root": scratch}
        return [sys.executable, "-m", "helpers.dev.measured", f"{scratch}/events.jsonl", str(task["cap_gib"] or 0), "0",
                "1", *(f"{name}={value}" for name, value in given.items())]
    python, first = (unsloth, "import unsloth; ") if task["kind"] == "unsloth" else (sys.executable, "")
    code = f"{first}import json, sys; from helpers.dev.bench import child; child(json.loads(sys.argv.pop()))"
    return [str(python), "-c", code, json.dumps(task | {"found": f"{scratch}/found.json"})]


def measure(task: dict, folder: Path, unsloth: str | None) -> dict:
    """What a process of its own has found, or `{"failed": the last line of its output}`."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1",
                    "UNSLOTH_COMPILE_LOCATION": name, "HF_DATASETS_CACHE": str(folder / "cache")}
        ended = subprocess.run(command(task, Path(name), unsloth), env=os.environ | settings, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found, row = read_json(Path(name) / "found.json"), {"events": read_events(Path(name) / "events.jsonl")}
    if values(row, "seconds", "train"):  # ours
        training, steps = values(row, "result", "training")[0], values(row, "seconds", "step")[1:]
        found = {"micro_batch": training["micro_batch"], "checkpointing": training["checkpointing"],
                 "pictures_per_s": task["pictures"] / statistics.median(steps),
                 "peak_gib": max(values(row, "allocated", "train")) or None, "losses": values(row, "result", "loss"),
                 "generation": {"batch": SCALES[task["scale"]]["predict_batch_size"], "pictures": task["val"],
                                "seconds": values(row, "seconds", "predict")[0]}}
    return found or {"failed": (ended.stdout.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:200]}


def prepare(folder: Path, scale: str) -> dict:
    """What all variants share: model, pictures, counts, LoRA's size."""
    given = SCALES[scale]
    pictures = given["batch_size"] * given["accumulation"]
    task = {"scale": scale, "pictures": pictures, "train": UPDATES * pictures // 2, "rank": given["lora_rank"],
            "alpha": given["lora_alpha"], "dropout": given["lora_dropout"], "micro_batch": given["batch_size"],
            "min_pixels": given["min_pixels"], "max_pixels": given["max_pixels"], "cap_gib": None}
    if scale == "tiny":
        return task | {"model": str(TINY_BASE), "data": "embedded", "val": 24, "alone": 8, "new_tokens": 64}
    if not (folder / "model" / "tokenizer.json").is_file():
        write_model(folder / "model", PUBLISHED)
        write_pictures(folder / "pictures", {"train": task["train"], "selection": 1, "val": VAL})
        torch.cuda.empty_cache()
    return task | {"model": str(folder / "model"), "data": str(folder / "pictures"), "val": VAL, "alone": 3,
                   "new_tokens": 32}  # random weights never stop before


def summary(report: dict) -> str:
    """The report as README has it: a line on the machine, training and generation as tables."""
    rows = {row["name"]: row for row in report["train"] if row["name"] in VARIANTS}
    stocks = {row["recipe"]: row["pictures_per_s"] for row in rows.values() if row["kind"] == "stock"
              and "failed" not in row}
    training = [["training", "pictures/s", "× stock", "peak GiB"]]
    for name in (name for name in VARIANTS if name in rows):
        row, first = rows[name], f"{rows[name]['recipe']}, {name.removesuffix(', r1')}"
        rate, base = row.get("pictures_per_s", 0), stocks.get(row["recipe"], math.nan)
        training.append([first, row["failed"], "–", "–"] if "failed" in row else [
            first, f"{rate:.2f}", f"{rate / base:.2f}", f"{row['peak_gib'] or math.nan:.1f}"])
    generation = [["generation", "base", "at once", f"s for {VAL}", "× one by one"]] + [
        [row["name"], row["precision"], str(row["batch"]), f"{row['s_for_123']:.1f}",
         f"{report['answer'][0]['s_for_123'] / row['s_for_123']:.1f}"] for row in report["answer"]]
    head = (f"`{report['command']}` ({report['device']}, {report['model']}, torch {report['torch']}, commit "
            f"{report['commit']}; {report['pictures_per_update']} pictures an update):")
    tables = ["\n".join(f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]])
              for table in (training, generation)]
    return "\n\n".join([head, *tables]).replace("nan", "–")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="model and pictures; 40 GB free at 7B")
    parser.add_argument("--only", nargs="*", default=[""], help="variants whose recipe or name holds one of these")
    parser.add_argument("--unsloth", metavar="PYTHON", help="of an environment that has Unsloth")
    parser.add_argument("--write", action="store_true", help="only put the report's summary into README.md")
    options = parser.parse_args(arguments)
    scale = "7b" if torch.cuda.is_available() else "tiny"
    if options.write:
        text, block = (ROOT / "README.md").read_text(), summary(read_json(REPORT))
        (ROOT / "README.md").write_text(BLOCK.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text))
        return 0
    possible = {name: f"{how['recipe']}, {name}" for name, how in VARIANTS.items()
                if (how["kind"] != "unsloth" or options.unsloth) and (scale == "7b" or "cap_gib" not in how)}
    wanted = [name for name, words in possible.items() if any(word in words for word in options.only)]
    if not wanted:
        parser.error(f"--only {' '.join(options.only)} names no variant; they are {'; '.join(possible.values())}.")
    folder = options.folder.resolve()
    path = REPORT if scale == "7b" else folder / "performance_tiny.json"
    folder.mkdir(parents=True, exist_ok=True)
    shared = prepare(folder, scale)
    about = {"command": "python -m helpers.dev.bench", "commit": runs.git_revision(),
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else runs.machine(),
             "torch": torch.__version__, "model": "the tiny base" if scale == "tiny" else "7B, random weights",
             "pictures_per_update": shared["pictures"]}
    before = read_json(path)
    if not about.items() <= before.items():
        before = {}  # rows of another commit or machine do not stand beside these
    found, generated = ({row["name"]: row for row in before.get(part, [])} for part in ("train", "answer"))
    for name in wanted:
        task = shared | VARIANTS[name] | {"name": name}
        row = {key: task[key] for key in ("name", "recipe", "kind", "micro_batch", "dropout")} | {
            "precision": "nf4", "cached": task["kind"] == "ours" and task["recipe"] == "r1-llm-only",
            **measure(task, folder, options.unsloth)}
        made, found[name] = row.pop("generation", None), row
        if made and task["recipe"] == "r4-joint":  # the base is r1's too
            made[f"s_for_{VAL}"] = VAL * made["seconds"] / made["pictures"]
            generated[name] = {"name": name, "precision": "nf4", "new_tokens": task["new_tokens"], **made}
        write_json(path, about | {"train": list(found.values()), "answer": list(generated.values())})
        print(f"{name}:", row.get("failed") or f"{row['pictures_per_s']:.2f} pictures/s", flush=True)
    print(summary(read_json(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
