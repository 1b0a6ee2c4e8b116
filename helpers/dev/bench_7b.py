"""How fast 7B trains and answers on this GPU, stock against ours: `python -m helpers.dev.bench_7b --folder DISK`.

Builds the published 7B architecture with random weights and pictures of 1280 image tokens, loads it once in NF4 and
once in bf16, and measures the variants below in one process (`bench_steps.measure`); then answers; then whether stock
and ours lose alike from the same start. The report is written after each, so that running out of `--minutes` loses
nothing, and a second call with the same report goes on with what the first left out. `--tiny` does the same with the
tiny base on any machine.

Stock is TRL's SFTTrainer with its own collator: NF4, LoRA of rank 64, batches of 2, gradient checkpointing, as many
workers as ours. Rates are for 16 pictures and one update of the weights.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import concatenate_datasets
from transformers import Qwen2VLProcessor

from helpers import data, fused, model, predict, runs
from helpers.dev import bench_clock, bench_report, bench_steps
from helpers.dev.bench_predict import load
from helpers.dev.bench_steps import PROMPT, Variant
from helpers.dev.random_7b import PUBLISHED, write_json, write_model, write_pictures
from helpers.recipes import IMAGE_TOKEN, SCALES
from helpers.settings import TINY_BASE

SIZES = [(1120, 896), (896, 1120), (1372, 728), (812, 1232)]  # 1280, 1280, 1274, 1276 image tokens
VAL = 123  # pictures of the real val: what answering is scaled to

STOCK = Variant("stock", kind="stock")
NOW = Variant("our trainer, nothing else changed", kind="as-trl")
OPEN = Variant("no checkpointing", checkpointing=False)
EIGHT = Variant("checkpointing, micro-batch 8", micro_batch=8)
FUSED = replace(EIGHT, name="checkpointing, micro-batch 8, fused", fused=True)
OURS = Variant("ours, as the pipeline trains", micro_batch=SCALES["7b"]["batch_size"], checkpointing=None, fused=True)
R1 = {"recipe": "r1-llm-only"}
NF4 = [  # the strongest first
    STOCK,
    OURS,
    replace(STOCK, name="stock, r1", **R1),
    replace(OURS, name="ours, as the pipeline trains, r1", cached=True, **R1),
    EIGHT,
    FUSED,
    replace(FUSED, name="no checkpointing, micro-batch 4, fused, no dropout", micro_batch=4, checkpointing=False,
            dropout=0.0),
    OPEN,
    NOW,
    replace(FUSED, name="checkpointing, micro-batch 8, fused, cached vision, r1", cached=True, **R1),
]  # fmt: skip
BF16 = [
    replace(FUSED, name="bf16 base, checkpointing, micro-batch 8, fused"),
    replace(STOCK, name="stock trainer, bf16 base"),
]
LAST = {  # after the answers: less likely to be worth it
    "nf4": [
        replace(EIGHT, name="checkpointing, micro-batch 8, Liger kernels", liger=True),  # changes classes for good
        Variant("vision lengths stay on the CPU"),
        replace(FUSED, name="checkpointing, micro-batch 16, fused", micro_batch=16),
        replace(NOW, name="logits of every token", kind="all-logits"),
        replace(OPEN, name="no checkpointing, micro-batch 4", micro_batch=4),
        replace(OPEN, name="vision seen once, r1", cached=True, **R1),
        replace(EIGHT, name="checkpointing, micro-batch 8, compiled layers", compiled=True),
    ],
    "bf16": [],
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-7b"), help="model, pictures; 20 GB free")
    parser.add_argument("--report", type=Path, default=Path("runs/bench-7b/performance_7b.json"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything together; then it stops")
    parser.add_argument("--only", nargs="*", help="variants whose name holds one of these words; stock always runs")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer, as random weights never stop")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, VAL], help="pictures answered at once")
    parser.add_argument("--answers", type=int, default=VAL, help="pictures answered")
    parser.add_argument("--steps", type=int, default=10, help="of the loss curves")
    parser.add_argument("--workers", type=int, default=4, help="that load pictures, for stock and ours")
    parser.add_argument("--tiny", action="store_true", help="the tiny base and small pictures, no GPU needed")
    options = parser.parse_args()
    options.deadline = time.monotonic() + 60 * options.minutes
    options.rank = 4 if options.tiny else SCALES["7b"]["lora_rank"]
    return options


class Report:
    """Everything that was measured, in one file that is whole after each addition."""

    def __init__(self, options: argparse.Namespace):
        self.path, self.deadline, self.began = options.report, options.deadline, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
        self.content = {
            "command": "python -m helpers.dev.bench_7b " + " ".join(sys.argv[1:]), "commit": runs.git_revision(),
            "device": gpu.name if gpu else "no GPU", "gpu_gib": gpu.total_memory / 2**30 if gpu else None,
            "torch": torch.__version__, "model": "the tiny base" if options.tiny else "7B, random weights",
            "pictures_per_update": SCALES["7b"]["batch_size"] * SCALES["7b"]["accumulation"],
            "train": [], "answer": [], "curves": {}, "left_out": [],
        }  # fmt: skip
        if self.path.is_file():
            before = json.loads(self.path.read_text())
            if before["device"] == self.content["device"] and before["model"] == self.content["model"]:
                self.content |= {kind: before[kind] for kind in ("train", "answer", "curves")}

    def has(self, kind: str, **values) -> bool:
        """Whether a row with these values was measured, here or by an earlier call."""
        return any(all(row.get(name) == value for name, value in values.items()) for row in self.content[kind])

    def add(self, kind: str, row: dict) -> None:
        if isinstance(self.content[kind], dict):
            self.content[kind] |= row
        else:
            self.content[kind].append(row)
        self.content["seconds"] = round(time.monotonic() - self.began)
        write_json(self.path, self.content)
        print(f"{self.content['seconds']} s:", json.dumps(row)[:400], flush=True)

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether `seconds` more fit before the deadline; what does not is named in the report."""
        fits = time.monotonic() + seconds < self.deadline
        if not fits:
            self.add("left_out", {"what": what})
        return fits


def prepare(options: argparse.Namespace):
    """The model's folder, its processor and the pictures, read as the pipeline reads them."""
    folder, made, shrink = options.folder / "model", options.folder / "model.json", 8 if options.tiny else 1
    if options.tiny:
        folder = TINY_BASE
    elif not made.is_file():
        write_model(folder, PUBLISHED)
        write_json(made, PUBLISHED)
        model.free_memory()
    sizes = [(width // shrink, height // shrink) for width, height in SIZES]
    write_pictures(options.folder / "pictures", {"train": 32, "selection": 1, "val": 16}, sizes)
    pixels = {"min_pixels": 256 * IMAGE_TOKEN // shrink**2, "max_pixels": 1280 * IMAGE_TOKEN // shrink**2}
    raw = data.load_raw(str(options.folder / "pictures"), cache_dir=str(options.folder / "cache"))
    rows = data.prepare(data.clean(raw, data.audit(raw)), **pixels)
    return str(folder), Qwen2VLProcessor.from_pretrained(folder, **pixels), rows


def train(options: argparse.Namespace, report: Report, variants: list[Variant], base, processor, rows) -> None:
    """Those of `variants` that `--only` and the time let through."""
    for variant in variants:
        if report.has("train", name=variant.name):
            continue
        wanted = not options.only or variant.kind == "stock" or any(word in variant.name for word in options.only)
        if not wanted or (variant.liger and not find_spec("liger_kernel")):
            report.add("left_out", {"what": variant.name, "why": "not asked for" if not wanted else "not installed"})
            continue
        if not report.time_for(variant.name, 90 if variant.compiled else 30 if variant.fused else 15):
            continue
        steps, accumulation = (3, 2) if variant.micro_batch < 8 else (4, 1)
        report.add("train", bench_steps.measure(
            variant, base, processor, rows["train"], rank=options.rank, steps=steps, accumulation=accumulation,
            workers=options.workers, rate=report.content["matmul_flops_per_s"],
            pictures=report.content["pictures_per_update"]))  # fmt: skip


def answer(options: argparse.Namespace, report: Report, precision: str, base, processor, rows) -> None:
    """Seconds to answer `VAL` pictures by the pipeline's way, from reading them on; one by one it is scaled from 3."""
    base.set_attn_implementation(model.attention(training=False))
    generation = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
    for batch, compiled in [(1, False), *((batch, False) for batch in options.batches), (max(options.batches), True)]:
        if report.has("answer", precision=precision, batch=batch, compiled=compiled):
            continue
        if not report.time_for(f"answers in {precision}, {batch} at once{', compiled' * compiled}", 30):
            continue
        if compiled:
            fused.compile_between(base)
        count = 3 if batch == 1 else options.answers
        row = {"precision": precision, "batch": batch, "compiled": compiled, "new_tokens": options.new_tokens}
        try:
            with tempfile.TemporaryDirectory() as folder:
                for name, few in (("warm up", min(batch, 4)), ("measured_s", count)):
                    asked = concatenate_datasets([rows["val"]] * (1 + few // len(rows["val"]))).select(range(few))
                    asked = asked.remove_columns("image_id").add_column("image_id", [str(i) for i in range(few)])
                    start = time.perf_counter()
                    predict.predict(base, processor, asked, PROMPT, Path(folder) / f"{name}.jsonl", key=name[:4],
                                    batch_size=batch, **generation)
                    row[name] = time.perf_counter() - start
            row |= {"pictures": count, f"s_for_{VAL}": row["measured_s"] * VAL / count}
        except Exception as error:  # no memory: a bench goes on
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        report.add("answer", row)
    bench_steps.as_loaded(base)


def curves(options: argparse.Namespace, report: Report, base, processor, rows) -> None:
    """Losses of `--steps` steps of 2 pictures from one start in one order, without dropout, for three trainers.

    All see the same labels: those of TRL's own collator hold a line break more, behind the end of the answer.
    """
    both = {"dropout": 0.0}
    for name, variant in (("TRL's trainer", replace(STOCK, kind="trl", **both)),
                          ("ours, as published", replace(NOW, **both)),
                          ("ours, fused", replace(FUSED, micro_batch=2, **both))):  # fmt: skip
        if name not in report.content["curves"] and report.time_for(f"losses: {name}", 3 * options.steps):
            row = bench_steps.measure(variant, base, processor, rows["train"], rank=options.rank, rate=1.0, pictures=2,
                                      steps=options.steps, accumulation=1, workers=options.workers,
                                      learning_rate=2e-4)  # fmt: skip
            report.add("curves", {name: row.get("losses", row.get("failed"))})


def main() -> int:
    options = arguments()
    runs.quiet_libraries()
    report = Report(options)
    folder, processor, rows = prepare(options)
    rate = bench_clock.matmul_rate(*((1024, 5) if options.tiny else (8192, 20)))
    report.content |= {"matmul_flops_per_s": rate, "prepared_s": round(time.monotonic() - report.began)}
    for precision, variants in (("nf4", NF4), ("bf16", BF16)):
        if not report.time_for(f"the base in {precision}", 40):
            continue
        base = load(folder, precision).requires_grad_(False)
        base.set_attn_implementation(model.attention())
        train(options, report, variants, base, processor, rows)
        if precision == "nf4":
            curves(options, report, base, processor, rows)
        answer(options, report, precision, base, processor, rows)
        base.set_attn_implementation(model.attention())
        train(options, report, LAST[precision], base, processor, rows)
        del base
        model.free_memory()
    print(bench_report.table(report.content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
