"""The zero-shot score is a question of the prompt: some prompts, in NF4 and in bf16, on the same pictures of `val`.

python -m helpers.dev.prompts [--scale tiny] [--pictures N] [--precisions nf4 bf16] [--folder runs/prompts]

Each answer set is kept under a hash of model, revision, prompt, precision, pixel budget and pictures, so the command
goes on where it was stopped. The table is printed and written to `FOLDER/prompts.json`.
"""

import argparse
from pathlib import Path

import pandas as pd
from transformers import Qwen2VLProcessor

from helpers import data, evaluate, model, predict, runs
from helpers.dev.bench_predict import PROMPT, load
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE

PROMPTS = (
    PROMPT,
    "Detect the bounding box of the nutrition-table.",
    "Where is the nutrition facts label? Answer with its bounding box.",
    "Detect all nutrition tables in this picture. Answer with name(x0,y0),(x1,y1) in thousandths for each.",
    "Find the table of energy, fat, carbohydrates, protein and salt.",
)


def measure(rows, folder: Path, *, scale: str = "tiny", model_id: str | None = None, revision: str | None = None,
            precisions: tuple[str, ...] = ("nf4", "bf16"), prompts: tuple[str, ...] = PROMPTS,
            max_new_tokens: int = 128) -> list[dict]:
    """Ask every prompt about `rows` (a prepared split) at every precision; answers already in `folder` are kept.

    Returns, and writes to `folder/prompts.json`, for each: `{"prompt", "precision", "mean_iou", "detection_rate",
    "format_error_rate", "unstopped_rate", "to_first"}`, intervals as `evaluate.score` gives them; `to_first` is the
    paired difference in mean IoU to the first prompt at the same precision.
    """
    values = SCALES[scale]
    path = model_id or (str(TINY_BASE) if values["model_id"] == "embedded" else values["model_id"])
    budget = {name: values[name] for name in ("min_pixels", "max_pixels")}
    truth, processor, table = data.truth_rows(rows), None, []
    inputs = {"model": runs.files_hash(path), "revision": revision, "val": runs.rows_hash(rows),
              "tokens": max_new_tokens}
    for precision in precisions:
        vlm, first = None, None
        for prompt in prompts:
            key = runs.key(prompt=prompt, precision=precision, **budget, **inputs)
            file = folder / key / "baseline.jsonl"
            if not runs.is_done(file.parent, file.name, key):
                processor = processor or Qwen2VLProcessor.from_pretrained(path, revision=revision, **budget)
                vlm = vlm or load(path, precision, revision)
                predict.predict(vlm, processor, rows, prompt, file, batch_size=values["predict_batch_size"], key=key,
                                max_new_tokens=max_new_tokens, do_sample=False)
                runs.mark_done(file.parent, file.name, key)
            scored = evaluate.score(truth, predict.read_jsonl(file))
            first = first or scored
            summary = scored["summary"]
            table.append({"prompt": prompt, "precision": precision} | {name: summary[name] for name in (
                "mean_iou", "detection_rate", "format_error_rate", "unstopped_rate")} | {
                "to_first": evaluate.paired_bootstrap(scored["per_picture"], first["per_picture"])["difference"]})
        del vlm
        model.free_memory()
    runs.write_json(folder / "prompts.json", table)
    return table


def table_of(measured: list[dict]) -> pd.DataFrame:
    """`measure`'s result for display: a row a prompt and precision."""
    rates = {"detection": "detection_rate", "format errors": "format_error_rate", "not stopped": "unstopped_rate"}
    return pd.DataFrame([{
        "prompt": row["prompt"], "precision": row["precision"], "n": row["mean_iou"]["n"],
        "mean IoU (95 %)": evaluate.with_interval(row["mean_iou"]),
        "minus the first prompt": evaluate.with_interval(row["to_first"]),
        **{head: f"{100 * row[metric]['value']:.0f} %" for head, metric in rates.items()},
    } for row in measured])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="tiny", choices=list(SCALES))
    parser.add_argument("--model", help="a model's folder or Hub id; the scale's own by default")
    parser.add_argument("--revision", help="commit, branch or tag of the model on the Hub")
    parser.add_argument("--pictures", type=int, help="the first so many of val; all by default")
    parser.add_argument("--precisions", nargs="+", default=["nf4", "bf16"], choices=["nf4", "bf16", "fp32"])
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"))
    options = parser.parse_args()
    runs.quiet_libraries()
    limit = {"train": 1, "selection": 1} | ({"val": options.pictures} if options.pictures else {})
    rows = data.load_splits(SCALES[options.scale]["dataset_id"], limit=limit)
    rows = data.prepare(rows, SCALES[options.scale]["min_pixels"], SCALES[options.scale]["max_pixels"])["val"]
    measured = measure(rows, options.folder, scale=options.scale, model_id=options.model, revision=options.revision,
                       precisions=tuple(options.precisions))
    print(table_of(measured).to_string(index=False))


if __name__ == "__main__":
    main()
