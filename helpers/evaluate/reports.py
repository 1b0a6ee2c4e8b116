"""Scores on disk: a run's metrics.json, the runs found, two of them compared."""

import hashlib
import json
from pathlib import Path

import pandas as pd

from helpers.evaluate.intervals import RESAMPLES, number, paired_bootstrap, with_interval
from helpers.evaluate.scoring import score, unstopped, unstopped_note
from helpers.processes import is_main
from helpers.runs import read_json, write_text
from helpers.settings import PROJECT

FILES = {"fine-tuned": "predictions.jsonl", "merged": "merged.jsonl", "base": "baseline.jsonl",
         "constant box": "constant.jsonl"}  # fmt: skip
PREFIX = f"{PROJECT}-"
METRICS = {"median": "median_iou", "detection": "detection_rate", "IoU > .5": "iou_over_50",
           "IoU > .7": "iou_over_70", "F1": "f1", "AP": "ap"}  # fmt: skip
PERCENT = ("detection_rate", "iou_over_50", "iou_over_70")


def write_metrics(
    folder: str | Path, named_predictions: dict[str, list[dict]], truth: list[dict], *, resamples: int = RESAMPLES
) -> dict:
    """Score each of "fine-tuned", "merged", "base", "constant box" that is given and write `folder/metrics.json`.

    Also writes truth.jsonl (the rows without their pictures) and the predictions' own files.
    Returns what it wrote: `{"truth": {"pictures", "tables", "hash"}, "scores": {name: score(...)}}`.
    """
    rows = [{key: value for key, value in row.items() if key != "image"} for row in truth]
    scores = {name: score(rows, predictions, resamples=resamples) for name, predictions in named_predictions.items()}
    boxes = json.dumps([[row["image_id"], row["objects"]["bbox"]] for row in rows])
    tables = sum(bool(row["objects"]["bbox"]) for row in rows)
    same = hashlib.sha256(boxes.encode()).hexdigest()[:12]  # two runs compare when this is equal
    metrics = {"truth": {"pictures": len(rows), "tables": tables, "hash": same}, "scores": scores}
    if is_main():  # one writer where several processes score the same files
        for file, lines in {"truth.jsonl": rows, **{FILES[name]: named_predictions[name] for name in scores}}.items():
            write_text(Path(folder, file), "".join(json.dumps(line) + "\n" for line in lines))
        write_text(Path(folder, "metrics.json"), json.dumps(metrics, allow_nan=False) + "\n")
    return metrics


def rescore(folder: str | Path) -> dict:
    """Score the predictions in a run's folder again and rewrite its metrics.json."""
    lines = {name: _read_lines(path) for name, file in FILES.items() if (path := Path(folder, file)).exists()}
    if not Path(folder, "truth.jsonl").exists() or not lines:
        raise FileNotFoundError(f"{folder}: expected truth.jsonl and one of {', '.join(FILES.values())}")
    return write_metrics(folder, lines, _read_lines(Path(folder, "truth.jsonl")))


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def find_runs(runs_dir: str | Path = "runs") -> list[dict]:
    """Every scored run, sorted by name: its manifest, "run" (the name), "commit", "seed" and "metrics"."""
    runs = []
    for path in sorted(Path(runs_dir).glob(f"{PREFIX}*/metrics.json")):
        manifest = read_json(path.with_name("manifest.json"))
        own = {"run": path.parent.name.removeprefix(PREFIX), "metrics": read_json(path)}
        runs.append(manifest | own | {"commit": manifest["git"], "seed": manifest["parameters"]["seed"]})
    return runs


def load_score(name: str, runs_dir: str | Path = "runs") -> tuple[str, dict]:
    """A run's score by name or folder: `("r4-joint", score)`; "name:base" takes another score than the run's own."""
    run, _, which = name.partition(":")
    known = Path(runs_dir, PREFIX + ("r3-stage2" if run == "r3-two-stage" else run))
    folder = next((place for place in (known, Path(run).expanduser()) if (place / "metrics.json").is_file()), None)
    if folder is None:
        found = ", ".join(one["run"] for one in find_runs(runs_dir)) or "none yet"
        raise FileNotFoundError(f"no scored run {run!r} in {runs_dir}; the runs there: {found}")
    scores = read_json(folder / "metrics.json")["scores"]
    which = which or next(iter(scores))
    if which not in scores:
        raise ValueError(f"run {run!r} has no score {which!r}; it has {', '.join(scores)}")
    return name, scores[which]


def compare(a: str, b: str, runs_dir: str | Path = "runs") -> str:
    """Two runs on the same pictures, in Markdown: means, paired difference, verdict, pictures needed.

    Each is a run's name or folder, with `:base` or `:constant box` behind it for that score of the run.
    """
    (name_a, score_a), (name_b, score_b) = load_score(a, runs_dir), load_score(b, runs_dir)
    result = paired_bootstrap(score_a["per_picture"], score_b["per_picture"])
    difference, needed = result["difference"], result["pictures_needed"]
    lines = [
        f"{name_a}: mean IoU {with_interval(score_a['summary']['mean_iou'])}{unstopped_note(score_a)}",
        f"{name_b}: mean IoU {with_interval(score_b['summary']['mean_iou'])}{unstopped_note(score_b)}",
        f"difference on the same {difference['n']} pictures: {difference['value']:+.3f} "
        f"({number(difference['low'])} to {number(difference['high'])})",
        f"verdict: {result['verdict']}",
        f"pictures needed to find this difference with a power of 80 %: about {needed}" if needed else "",
        f"left out, in one run only: {', '.join(result['left_out'])}" if result["left_out"] else "",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def metrics_table(metrics: dict) -> pd.DataFrame:
    """What `write_metrics` returned, to look at: a row a score, mean IoU with its 95 % interval."""
    rows = {}
    for name, scored in metrics["scores"].items():
        summary = scored["summary"]
        numbers = {head: number(summary[metric]["value"], metric in PERCENT) for head, metric in METRICS.items()}
        rows[name] = {"n": summary["mean_iou"]["n"], "mean IoU (95 %)": with_interval(summary["mean_iou"]), **numbers,
                      "never stopped": unstopped(scored)}  # fmt: skip
    return pd.DataFrame(rows).T


def class_table(scored: dict) -> pd.DataFrame:
    """One score of `write_metrics`, to look at: a row a class of the truth, with mean IoU and recall at IoU .5."""
    return pd.DataFrame({name: {"boxes": one["recall"]["n"], "mean IoU (95 %)": with_interval(one["mean_iou_boxes"]),
                                "found": number(one["recall"]["value"], True)}
                         for name, one in scored["by_category"].items()}).T  # fmt: skip


def table_line(cells: list[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
