"""How the time of a training step and of answering grows with pictures and with processes, at equal threads in all.

python -m helpers.dev.bench_growth [--pictures 2 8 32] [--processes 1 2]

The tiny model on this machine's CPU cores. One update of r4 picture by picture, its gradients added up over the
processes; and as many answers, one by one, 16 tokens each. The smallest number is done once before, uncounted. Seconds
are the clock's, for the whole update and for all answers: nothing is scaled up from a part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import concatenate_datasets
from transformers import Qwen2VLProcessor, TrainerCallback

from helpers import data, model, predict, runs
from helpers.dev import bench_steps
from helpers.dev.bench_predict import PROMPT, load
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE

TINY = SCALES["tiny"]
FEW = 1  # pictures of a micro-batch


class Update(TrainerCallback):
    """The clock's seconds from an update's first micro-batch to its end."""

    seconds = 0.0

    def on_step_begin(self, *args, **kwargs) -> None:
        self.seconds = -time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds += time.perf_counter()


def measure(pictures: Sequence[int], processes: Sequence[int] = (1,)) -> list[dict]:
    """`{"processes", "pictures", "training", "answering" (s)}` for each pair; each number of processes starts anew.

    Raises RuntimeError with what the processes said where one fails.
    """
    found = []
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m",
                     "helpers.dev.bench_growth", "--folder", folder, "--pictures", *map(str, pictures)]
            threads = max(1, len(os.sched_getaffinity(0)) // count)
            ended = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                                   cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": str(threads)})
            if ended.returncode:
                raise RuntimeError(f"{count} process(es) ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
            found += json.loads((Path(folder) / "found.json").read_text())
    return found


def in_this_process(pictures: Sequence[int], folder: Path) -> None:
    """Measure what falls to this process; the first one writes `found.json`."""
    runs.quiet_libraries()
    world, budget = int(os.environ["WORLD_SIZE"]), {name: TINY[name] for name in ("min_pixels", "max_pixels")}
    base = load(str(TINY_BASE), "nf4", dtype=model.compute_dtype()).requires_grad_(False)
    processor, found = Qwen2VLProcessor.from_pretrained(TINY_BASE, **budget), []
    with runs.main_first():
        raw = data.load_raw("embedded", limit={"train": 16, "selection": 1, "val": 16})
        rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
    variant = bench_steps.Variant("growth", micro_batch=FEW, checkpointing=False)
    for count in (pictures[0], *pictures):
        base.set_attn_implementation(model.attention())
        sft = bench_steps.build(variant, base, processor, rows["train"], str(folder / "training"),
                                rank=TINY["lora_rank"], steps=1, accumulation=count // FEW // world, workers=0)
        update = Update()
        sft.add_callback(update)
        sft.train()
        bench_steps.release(sft)
        base.set_attn_implementation(model.attention(training=False))
        asked = concatenate_datasets([rows["val"]] * -(-count // len(rows["val"]))).select(range(count))
        asked = asked.remove_columns("image_id").add_column("image_id", [str(i) for i in range(count)])
        start = time.perf_counter()
        predict.predict(base, processor, asked, PROMPT, folder / f"{count}.jsonl", batch_size=FEW, key="growth",
                        min_new_tokens=16, max_new_tokens=16, do_sample=False)
        found.append({"processes": world, "pictures": count, "training": update.seconds,
                      "answering": time.perf_counter() - start})  # fmt: skip
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the processes started here get
    options = parser.parse_args()
    if options.folder:
        in_this_process(options.pictures, options.folder)
        return
    found = pd.DataFrame(measure(options.pictures, options.processes))
    print(f"{runs.machine()}\n{found.round(2).to_string(index=False)}")


if __name__ == "__main__":
    main()
