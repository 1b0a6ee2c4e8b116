"""Pictures a second, one by one against batches, free against constrained, and the share of answers with equal boxes.

python -m helpers.dev.bench_predict [--pictures 32] [--batch-size 32] [--precisions fp32 bf16 nf4] [--model FOLDER]

Every row of the table asks the same pictures of the embedded `val` through `helpers.predict.predict`: greedy, the same
stopping rule (`<|im_end|>` or `--max-new-tokens`), the picture's decoding and the processor's work included. The first
call of each model is not timed. CPU time is this process's own: it says more where others use the machine. Equal boxes
are counted against one by one in the same precision and decoding.

A batch saves on decoding alone: on a CPU the vision tower works as long for a picture in a batch as for one by itself.
So no batch can bring the ratio above "ceiling", the whole time one by one over the vision tower's own.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from helpers import data, model, predict, runs
from helpers.boxes import CATEGORIES
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the nutrition table."


def load(path: str, precision: str, revision: str | None = None, dtype: torch.dtype | None = None
         ) -> Qwen2VLForConditionalGeneration:
    """The model in `fp32`, `bf16` or `nf4` (the vision tower in bf16); what is not NF4 in `dtype` where it is given."""
    dtype = dtype or (torch.float32 if precision == "fp32" else torch.bfloat16)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["model.visual", "lm_head"])
    model.patches_as_product()
    return model.load(
        path, revision=revision, dtype=dtype, attn_implementation=model.attention(training=False),
        device_map=model.device_map(), quantization_config=nf4 if precision == "nf4" else None).eval()


class Watch:
    """The CPU seconds that calls of a function take in all."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.process_time()
        result = self.function(*args, **kwargs)
        self.seconds += time.process_time() - start
        return result


def measure(vlm, processor, rows, options: argparse.Namespace) -> list[dict]:
    """One row of the table for each way to ask `rows` (N pictures of the project's schema)."""
    table, look = [], predict.look
    with tempfile.TemporaryDirectory() as folder:

        def ask(rows, batch_size: int, names: tuple[str, ...] | None) -> tuple[list[dict], float, float, float]:
            predict.look = Watch(look)
            start, cpu = time.perf_counter(), time.process_time()
            lines = predict.predict(vlm, processor, rows, PROMPT, Path(folder) / "lines.jsonl", key="bench",
                                    names=names, batch_size=batch_size, do_sample=False,
                                    max_new_tokens=options.max_new_tokens)
            return lines, time.perf_counter() - start, time.process_time() - cpu, predict.look.seconds

        ask(rows.select([0]), 1, CATEGORIES)
        for decoding, names in (("free", None), ("constrained", CATEGORIES)):
            alone = ask(rows, 1, names)
            for batch_size, result in ((1, alone), (options.batch_size, ask(rows, options.batch_size, names))):
                lines, seconds, cpu, vision = result
                equal = sum(a["boxes"] == b["boxes"] for a, b in zip(alone[0], lines, strict=True))
                table.append({
                    "decoding": decoding, "batch": batch_size, "pictures/s": round(len(rows) / seconds, 2),
                    "ratio": round(alone[1] / seconds, 2), "CPU ms/picture": round(1000 * cpu / len(rows), 1),
                    "of it vision": round(1000 * vision / len(rows), 1), "CPU ratio": round(alone[2] / cpu, 2),
                    "ceiling": round(alone[2] / vision, 1), "equal boxes": f"{equal}/{len(rows)}",
                    "format errors": sum(bool(line["rejected"]) for line in lines),
                    "not stopped": sum(not line["stopped"] for line in lines),
                    "tokens": round(sum(line["new_tokens"] for line in lines) / len(rows), 1),
                })  # fmt: skip
    predict.look = look
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_BASE), help="a model's folder or Hub id; the tiny base by default")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "nf4"], choices=["fp32", "bf16", "nf4"])
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=SCALES["tiny"]["predict_batch_size"])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    runs.quiet_libraries()
    os.environ["TQDM_DISABLE"] = "1"
    budget = {name: SCALES["tiny"][name] for name in ("min_pixels", "max_pixels")}
    raw = data.load_raw("embedded", limit={"train": 1, "selection": 1, "val": options.pictures})
    rows = data.prepare(data.clean(raw, data.audit(raw)), **budget)
    processor = Qwen2VLProcessor.from_pretrained(options.model, **budget)
    table = []
    for precision in options.precisions:
        vlm = load(options.model, precision)
        table += [{"precision": precision} | row for row in measure(vlm, processor, rows["val"], options)]
        del vlm
        model.free_memory()
    print(f"{options.model}, {len(rows['val'])} pictures, {runs.machine()}, {torch.get_num_threads()} thread(s)")
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
