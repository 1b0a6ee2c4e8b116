"""How fast training and generation are, stock TRL against ours and Unsloth: `python -m helpers.dev.bench`.

At 7B, the default where there is a GPU, with the published architecture, random weights and pictures of 1280 image
tokens, without a download; else with the tiny base and the embedded photos. Each variant is a process of its own:

- stock: TRL's SFTTrainer and collator on an NF4 base, batches of 2, gradient checkpointing; generation one by one
- ours: pipeline.py as it is, on a card of 16 or 24 GiB or on all of it; generation by `predict`
- Unsloth, where --unsloth names the Python of an environment that has it: its own loader, kernels and collator
  (pip install unsloth transformers==5.17.0 trl==1.15.0 'datasets<5')

The variants of a group are started once and take turns, in three rounds, on the same warm card: one trains while the
others wait with empty caches. The report has the median and the spread of the rounds and is written after each, so
that another call, of the same commit on the same kind of machine, adds what --minutes or a failure has left out.
--write puts its summary into README.
"""

import argparse
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import runs
from helpers.dev.random_7b import MANY_SIZES, PUBLISHED, SIZES, write_model, write_pictures
from helpers.recipes import RECIPES, SCALES
from helpers.runs import read_json, write_json
from helpers.settings import TINY_BASE
from helpers.trainer import read_log

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "notebooks" / "performance_7b.json"
BLOCK = re.compile(r"(<!-- speed: [^\n]* -->\n).*?(<!-- end of speed -->)", re.S)
PROMPT = "Detect the bounding box of the nutrition table."
VAL = 123  # pictures of the real val, for which generation is counted
ROUNDS = 3
CHILD = "import json, sys; from helpers.dev.bench import child; child(json.loads(sys.argv.pop()))"
UPDATES = 2  # of the weights in a turn
WARM = 5  # of them in the turn before the first round, which is not counted: with them ten losses are logged
WAYS: dict[str, dict] = {  # name -> how; what is not said is the scale's own
    "stock": {"kind": "stock", "micro_batch": 2},
    "Unsloth": {"kind": "unsloth", "micro_batch": 8},
    "ours, in 16 GiB": {"kind": "ours", "cap_gib": 15, "memory": "low"},
    "ours, in 24 GiB": {"kind": "ours", "cap_gib": 24},
    "ours, as the pipeline trains": {"kind": "ours"},
    "Unsloth, beside it": {"kind": "unsloth", "micro_batch": 8},
    "ours, 44 picture sizes": {"kind": "ours", "many_sizes": True},
}
ON_A_GPU = {"cap_gib", "many_sizes"}  # of a way: only there
# Who takes turns. All keep their model: the one that fills the card comes last, and sees what room the others leave.
GROUPS = (("stock", "Unsloth", "ours, in 16 GiB", "ours, in 24 GiB"),
          ("Unsloth, beside it", "ours, as the pipeline trains"), ("ours, 44 picture sizes",))
VARIANTS = {name + suffix: {"recipe": recipe, **how} for recipe, suffix in (("r4-joint", ""), ("r1-llm-only", ", r1"))
            for name, how in WAYS.items()}
GENERATION = {f"ours, {precision}": {"kind": "generation", "recipe": "base", "precision": precision}
           for precision in ("nf4", "bf16")}


class Turns(TrainerCallback):
    """After WARM and each UPDATES steps: free the caches, write what was measured, and wait for a line on stdin."""

    def __init__(self, file: Path, pictures: int):
        self.file, self.pictures, self.seconds, self.peak, self.losses = file, pictures, [], 0.0, []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.perf_counter()
        self.about = {"micro_batch": args.per_device_train_batch_size, "checkpointing": args.gradient_checkpointing}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.losses += [round(logs["loss"], 4)] if "loss" in (logs or {}) else []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**30)
        self.seconds.append(time.perf_counter() - self.start)
        if len(self.seconds) == (UPDATES if self.file.exists() else WARM):
            turn(self.file, pictures_per_s=self.pictures * len(self.seconds) / sum(self.seconds), losses=self.losses,
                 peak_gib=self.peak or None, **self.about)
            self.seconds, self.peak = [], 0.0
        self.start = time.perf_counter()


def turn(file: Path, **measured) -> None:
    """Write what a turn has measured, free what is cached, and wait for the next."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with file.open("a") as out:
        out.write(json.dumps(measured) + "\n")
    sys.stdin.readline()


def train(task: dict, vlm, processor, rows, collator=None, **settings) -> None:
    """Train by TRL's trainer, in turns."""
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        sft = SFTTrainer(vlm, train_dataset=rows, data_collator=collator, processing_class=processor, args=SFTConfig(
            output_dir=folder, max_steps=WARM + UPDATES * ROUNDS, per_device_train_batch_size=task["micro_batch"],
            gradient_accumulation_steps=task["pictures"] // task["micro_batch"], learning_rate=2e-5,
            lr_scheduler_type="cosine", warmup_steps=0.05, remove_unused_columns=False, logging_steps=1,
            report_to="none", save_strategy="no", dataloader_num_workers=4 if gpu else 0, use_cpu=not gpu,
            disable_tqdm=True, **settings))
        sft.add_callback(Turns(Path(task["turns"]), task["pictures"]))
        sft.train()


def generate(task: dict, vlm, processor, pictures: Sequence) -> None:
    """Seconds for `pictures` one by one, by `generate` as it is, as the first line of the turns; one before is warm."""
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    for some in (pictures[:1], pictures):
        start = time.perf_counter()
        for picture in some:
            inputs = processor(text=[text], images=[picture], return_tensors="pt").to(vlm.device)
            vlm.generate(**inputs, max_new_tokens=task["new_tokens"], do_sample=False)
    write_json(Path(task["turns"]).with_suffix(".json"), {"batch": 1, "pictures": len(pictures),
                                                         "seconds": time.perf_counter() - start})


def rows_and_processor(task: dict):
    """The prepared rows of the task's data, and the processor of its model with its pixel budget."""
    from helpers import data

    pixels = {name: task[name] for name in ("min_pixels", "max_pixels")}
    raw = data.load_raw(task["data"], limit={"train": task["train"], "selection": 1, "val": task["val"]})
    return (data.prepare(data.clean(raw, data.audit(raw)), **pixels),
            transformers.Qwen2VLProcessor.from_pretrained(task["model"], **pixels))


def base_in(task: dict, precision: str, **options):
    from helpers import model
    from helpers.topics.training import nf4

    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        task["model"], dtype=model.compute_dtype(), quantization_config=nf4() if precision == "nf4" else None,
        device_map=model.device_map(), **options).requires_grad_(False)


def stock(task: dict) -> None:
    """TRL's trainer on an NF4 base with LoRA, as its own examples have it."""
    from peft import LoraConfig, get_peft_model

    from helpers import model
    from helpers.messages import target_text

    rows, processor = rows_and_processor(task)
    base = base_in(task, "nf4")
    model.keep_4bit_trainable(base)
    generate(task, base.eval(), processor, rows["val"]["image"][: task["alone"]])
    tuned = get_peft_model(base, LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], lora_dropout=task["dropout"], task_type="CAUSAL_LM",
        target_modules=RECIPES[task["recipe"]][-1].lora_targets))
    chats = rows["train"].select_columns(["image"])
    for name, role, texts in (("prompt", "user", [PROMPT] * len(chats)),
                              ("completion", "assistant", map(target_text, rows["train"]["objects"]))):
        chats = chats.add_column(name, [[{"role": role, "content": text}] for text in texts])
    train(task, tuned, processor, chats, bf16=model.compute_dtype() == torch.bfloat16, gradient_checkpointing=True,
          max_length=None)


def with_unsloth(task: dict) -> None:
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
    train(task, vlm, processor, chats, UnslothVisionDataCollator(vlm, processor, resize="max"), bf16=True,
          max_length=2048, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True})


def generation(task: dict) -> None:
    """Seconds in which the base generates for all pictures of val, as the pipeline does, in turns; and of its parts."""
    from helpers import model, predict

    def timed(part: str, function):
        def measured(*arguments, **options):
            start = time.perf_counter()
            made = function(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            parts[part] = parts.get(part, 0) + time.perf_counter() - start
            return made
        return measured

    model.patches_as_product()
    rows, processor = rows_and_processor(task)
    base = base_in(task, task["precision"], attn_implementation=model.attention(training=False)).eval()
    predict.encode_pictures = timed("vision", predict.encode_pictures)
    predict.complete = timed("prefill and decoding", predict.complete)
    for number in range(ROUNDS + 1):
        parts: dict[str, float] = {}
        start = time.perf_counter()
        predict.predict(base, processor, rows["val"], PROMPT, Path(task["turns"]).with_name(f"{number}.jsonl"), key="0",
                        batch_size=task["predict_batch"], max_new_tokens=task["new_tokens"], do_sample=False)
        turn(Path(task["turns"]), seconds=time.perf_counter() - start, parts=parts)


def pipeline(task: dict) -> None:
    """pipeline.py itself, in turns once it trains."""
    if task["cap_gib"]:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(task["cap_gib"] * 2**30 / whole)
    transformers.trainer.DEFAULT_CALLBACKS.append(Turns(Path(task["turns"]), task["pictures"]))
    given = {"recipe": task["recipe"], "scale": task["scale"], "model_id": task["model"], "dataset_id": task["data"],
             "epochs": 2, "train_limit": task["train"], "val_limit": 1, "max_new_tokens": max(32, task["new_tokens"]),
             "seed": SFTConfig.seed, "save_steps": 1000, "report_to": "none", "memory": task["memory"],
             "output_root": Path(task["turns"]).parent / "runs"}
    sys.argv = ["pipeline.py", *(f"{name}={value}" for name, value in given.items())]
    runpy.run_path(str(ROOT / "pipeline.py"), run_name="__main__")


def child(task: dict) -> None:
    """What one process does: it writes a line a turn to `task["turns"]`, and waits for a line on stdin after each."""
    runs.quiet_libraries()
    {"stock": stock, "unsloth": with_unsloth, "ours": pipeline, "generation": generation}[task["kind"]](task)


class Racer:
    """A variant's process."""

    def __init__(self, task: dict, folder: Path, unsloth: str | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.task, self.log, self.failed = task | {"turns": str(folder / "turns.jsonl")}, folder / "log", ""
        python, first = (unsloth, "import unsloth; ") if task["kind"] == "unsloth" else (sys.executable, "")
        settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1",
                    "UNSLOTH_COMPILE_LOCATION": str(folder), "HF_DATASETS_CACHE": str(folder.parent / "cache")}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [str(python), "-c", first + CHILD, json.dumps(self.task)], env=os.environ | settings, cwd=ROOT,
                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, text=True)

    def turns(self) -> list[dict]:
        """What was measured so far, a line a turn; the first one is not counted."""
        return read_log(Path(self.task["turns"]))

    def wait(self, count: int, until: float) -> None:
        """Wait for the turn of this number; sets `failed` where the process ends before, or time is over."""
        while len(self.turns()) < count and not self.failed:
            if self.process.poll() is not None:
                lines = self.log.read_text().strip().splitlines()
                self.failed = (lines or [f"exit code {self.process.returncode}"])[-1][:200]
            elif time.monotonic() > until:
                self.failed = "not measured: the time was over"
            time.sleep(0.05)

    def go(self) -> None:
        """Begin the next turn."""
        if not self.failed:
            with suppress(BrokenPipeError):  # it has ended: `wait` says how
                print(file=self.process.stdin, flush=True)

    def found(self) -> dict:
        """The row of the report: the median round, the slowest and the fastest."""
        rounds, unit = self.turns()[1:], "seconds" if self.task["kind"] == "generation" else "pictures_per_s"
        row = {name: self.task[name] for name in ("name", "recipe", "kind", "micro_batch", "dropout", "precision")}
        if not rounds:
            return row | {"failed": self.failed}
        rates = [one[unit] for one in rounds]
        return row | rounds[-1] | {unit: statistics.median(rates), "rounds": rates,
                                   "peak_gib": max(one.get("peak_gib") or 0 for one in rounds) or None}


def race(tasks: list[dict], folder: Path, unsloth: str | None, until: float) -> list[Racer]:
    """Start the variants one after the other, then let them take turns; all end here."""
    racers: list[Racer] = []
    try:
        for number, task in enumerate(tasks):
            racers.append(Racer(task, folder / f"{number}-{task['kind']}", unsloth))
            racers[-1].wait(1, until)
        for count in range(2, ROUNDS + 2):
            for racer in racers:
                racer.go()
                racer.wait(count, until)
    finally:
        for racer in racers:
            racer.process.kill()
            racer.process.wait()
    return racers


def prepare(folder: Path, scale: str) -> dict:
    """What all variants share: model, pictures, counts, LoRA's size."""
    given = SCALES[scale]
    pictures = given["batch_size"] * given["accumulation"]
    task = {"scale": scale, "pictures": pictures, "train": (WARM + UPDATES * ROUNDS) * pictures // 2,
            "rank": given["lora_rank"], "alpha": given["lora_alpha"], "dropout": given["lora_dropout"],
            "micro_batch": given["batch_size"], "predict_batch": given["predict_batch_size"], "precision": "nf4",
            "min_pixels": given["min_pixels"], "max_pixels": given["max_pixels"], "cap_gib": None, "memory": None}
    if scale == "tiny":
        return task | {"model": str(TINY_BASE), "data": "embedded", "val": 24, "alone": 8, "new_tokens": 64}
    if not (folder / "model" / "tokenizer.json").is_file():
        write_model(folder / "model", PUBLISHED)
        for name, sizes in (("pictures", SIZES), ("many", MANY_SIZES)):
            write_pictures(folder / name, {"train": task["train"], "selection": 1, "val": VAL}, sizes=sizes)
        torch.cuda.empty_cache()
    return task | {"model": str(folder / "model"), "data": str(folder / "pictures"), "val": VAL, "alone": 3,
                   "new_tokens": 26}  # a box and its end; random weights never stop before


def times_unsloth(row: dict, rows: Iterable[dict]) -> str:
    """The median of a row's rounds over those of Unsloth beside it; of their medians, in brackets, where it was not."""
    if "unsloth" in row:
        return f"{statistics.median(one / other for one, other in zip(row['rounds'], row['unsloth'], strict=True)):.2f}"
    peers = [other["pictures_per_s"] for other in rows if other["kind"] == "unsloth"
             and other["recipe"] == row["recipe"] and "failed" not in other]
    if not peers or row["kind"] == "unsloth":
        return "1.00" if peers else "–"
    return f"({row['pictures_per_s'] / statistics.median(peers):.2f})"


def summary(report: dict) -> str:
    """The report as README has it: a line on the machine, training as a table, generation in a line."""
    rows = {row["name"]: row for row in report["train"] if row["name"] in VARIANTS}
    training = [["training", "pictures/s", "× Unsloth", "peak GiB"]]
    for name in (name for name in VARIANTS if name in rows):
        row, first = rows[name], f"{rows[name]['recipe']}, {name.removesuffix(', r1')}"
        spread = f" ({min(row['rounds']):.2f}–{max(row['rounds']):.2f})" if "rounds" in row else ""
        training.append([first, row["failed"], "–", "–"] if "failed" in row else [
            f"{first}{_of(row)}", f"{row['pictures_per_s']:.2f}{spread}", times_unsloth(row, rows.values()),
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "–"])
    generation = "; ".join(f"{row['name']} ({row['precision']}, {row['batch']} at once) {row['s_for_123']:.1f} s"
                           + _of(row) for row in report["generation"])
    head = (f"`{report['command']}` ({report['device']}, {report['model']}, torch {report['torch']}, commit "
            f"{report['commit']}; {report['pictures_per_update']} pictures an update; median of {ROUNDS} rounds in "
            "turns, and the slowest and fastest; × Unsloth round by round, in brackets against another call's):")
    table = "\n".join(f"| {' | '.join(row)} |" for row in [training[0], ["---"] * len(training[0]), *training[1:]])
    return "\n\n".join([head, table, f"Generation for {VAL} pictures: {generation}."])


def _of(row: dict) -> str:
    return f" (commit {row['commit']})" if "commit" in row else ""


def generation_row(racer: Racer) -> dict[str, dict]:
    """Generation's row of the report, if there is one: what stock has made one by one, or `predict` at once."""
    task, made = racer.task, read_json(Path(racer.task["turns"]).with_suffix(".json"))
    if task["kind"] == "generation" and racer.turns()[1:]:
        row = racer.found()
        made = {"batch": task["predict_batch"], "pictures": task["val"], "seconds": row["seconds"],
                "rounds": row["rounds"], "parts": row.get("parts")}
    if not made or task["recipe"] == "r1-llm-only":  # the base is r4's too
        return {}
    return {task["name"]: {"name": task["name"], "precision": task["precision"], "new_tokens": task["new_tokens"],
                           f"s_for_{VAL}": VAL * made["seconds"] / made["pictures"], **made}}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="model and pictures; 40 GB free at 7B")
    parser.add_argument("--only", nargs="*", default=[""], help="variants whose recipe or name holds one of these")
    parser.add_argument("--unsloth", metavar="PYTHON", help="of an environment that has Unsloth")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for everything; what is left out comes next")
    parser.add_argument("--write", action="store_true", help="only put the report's summary into README.md")
    options = parser.parse_args(arguments)
    until, scale = time.monotonic() + 60 * options.minutes, "7b" if torch.cuda.is_available() else "tiny"
    if options.write:
        text, block = (ROOT / "README.md").read_text(), summary(read_json(REPORT))
        (ROOT / "README.md").write_text(BLOCK.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text))
        return 0
    possible = {name: f"{how['recipe']}, {name}" for name, how in {**VARIANTS, **GENERATION}.items()
                if (how["kind"] != "unsloth" or options.unsloth) and (scale == "7b" or not {*how} & ON_A_GPU)}
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
    found, generated = ({row["name"]: row for row in before.get(part, [])} for part in ("train", "generation"))
    for group in [[name + suffix for name in names] for suffix in ("", ", r1") for names in GROUPS] + [[*GENERATION]]:
        names = [name for name in group if name in wanted]
        done = {name for name, row in {**found, **generated}.items() if len(row.get("rounds", [])) == ROUNDS}
        if {*names} <= done or time.monotonic() > until:
            continue
        tasks = [shared | {**VARIANTS, **GENERATION}[name] | {"name": name} for name in names]
        for task in tasks:
            task["data"] = str(folder / "many") if task.get("many_sizes") else task["data"]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            racers = race(tasks, Path(scratch), options.unsloth, until)
            beside = next((row["rounds"] for row in map(Racer.found, racers) if row["kind"] == "unsloth"
                           and len(row.get("rounds", [])) == ROUNDS), None)
            for racer in racers:
                row, name = racer.found(), racer.task["name"]
                if beside and row["kind"] != "unsloth" and len(row.get("rounds", [])) == ROUNDS:
                    row["unsloth"] = beside
                rate = f"{row['pictures_per_s']:.2f} pictures/s" if "pictures_per_s" in row else ""
                print(f"{name}:", row.get("failed") or rate or f"{row['seconds']:.1f} s", flush=True)
                if "failed" in row:
                    print(racer.log.read_text()[-1500:], flush=True)
                if racer.task["kind"] != "generation":
                    found[name] = row
                generated |= generation_row(racer)
        write_json(path, about | {"train": list(found.values()), "generation": list(generated.values())})
    print(summary(about | {"train": list(found.values()), "generation": list(generated.values())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
