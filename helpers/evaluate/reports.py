"""Scores on disk: a run's metrics.json, the table of all runs, two runs compared."""

import hashlib
import json
from pathlib import Path

import pandas as pd

from helpers.evaluate.intervals import RESAMPLES, paired_bootstrap
from helpers.evaluate.scoring import score
from helpers.evaluate.seeds import group_seeds, summary_over_seeds
from helpers.files import write_text
from helpers.settings import PROJECT, is_main, run_folder

FILES = {
    "fine-tuned": "predictions.jsonl",
    "merged": "merged.jsonl",
    "base": "baseline.jsonl",
    "constant box": "constant.jsonl",
}
PREFIX = f"{PROJECT}-"
ROWS = ("constant box", "base", "r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint")
METRICS = {
    "median": "median_iou",
    "detection": "detection_rate",
    "IoU > .5": "iou_over_50",
    "IoU > .7": "iou_over_70",
    "F1": "f1",
    "AP": "ap",
}


def write_metrics(
    folder: str | Path, named_predictions: dict[str, list[dict]], truth: list[dict], *, resamples: int = RESAMPLES
) -> dict:
    """Score each of "fine-tuned", "merged", "base", "constant box" that is given and write `folder/metrics.json`.

    Also writes truth.jsonl (the rows without their pictures) and the predictions' own files.
    Returns what it wrote: `{"truth": {"pictures", "tables", "hash"}, "scores": {name: score(...)}}`.
    """
    unknown = [name for name in named_predictions if name not in FILES]
    if unknown:
        raise ValueError(f"predictions named {unknown[0]!r}; the names are {', '.join(FILES)}")
    folder = Path(folder)
    rows = [{key: value for key, value in row.items() if key != "image"} for row in truth]
    scores = {name: score(rows, predictions, resamples=resamples) for name, predictions in named_predictions.items()}
    boxes = json.dumps([[row["image_id"], row["objects"]["bbox"]] for row in rows])
    about_truth = {
        "pictures": len(rows),
        "tables": sum(bool(row["objects"]["bbox"]) for row in rows),
        "hash": hashlib.sha256(boxes.encode()).hexdigest()[:12],  # two runs compare when this is equal
    }
    metrics = {"truth": about_truth, "scores": scores}
    if is_main():  # one writer where several processes score the same files
        _write_lines(folder / "truth.jsonl", rows)
        for name, predictions in named_predictions.items():
            _write_lines(folder / FILES[name], predictions)
        write_text(folder / "metrics.json", json.dumps(metrics, allow_nan=False) + "\n")
    return metrics


def metrics_table(metrics: dict) -> pd.DataFrame:
    """What `write_metrics` returned, to look at: a row a score, mean IoU with its 95 % interval."""
    rows = {}
    for name, scored in metrics["scores"].items():
        summary = scored["summary"]
        numbers = {head: number(summary[metric]["value"], metric in _PERCENT) for head, metric in METRICS.items()}
        rows[name] = {"n": summary["mean_iou"]["n"], "mean IoU (95 %)": with_interval(summary["mean_iou"]), **numbers,
                      "never stopped": unstopped(scored)}
    return pd.DataFrame(rows).T


def unstopped(scored: dict) -> str:
    """How many answers of a `score` ran into the token limit, such as "8 of 123"; a dash where nothing says so."""
    rate = scored["summary"]["unstopped_rate"]
    return "–" if rate["value"] is None else f"{round(rate['value'] * rate['n'])} of {rate['n']}"


def unstopped_note(scored: dict) -> str:
    """"; 8 of 123 answers never stopped", or nothing where all did."""
    return f"; {unstopped(scored)} answers never stopped" if scored["summary"]["unstopped_rate"]["value"] else ""


def rescore(folder: str | Path) -> dict:
    """Score the predictions in a run's folder again and rewrite its metrics.json."""
    folder = Path(folder)
    present = {name: folder / file for name, file in FILES.items() if (folder / file).exists()}
    if not (folder / "truth.jsonl").exists() or not present:
        raise FileNotFoundError(f"{folder}: expected truth.jsonl and one of {', '.join(FILES.values())}")
    predictions = {name: _read_lines(path) for name, path in present.items()}
    return write_metrics(folder, predictions, _read_lines(folder / "truth.jsonl"))


def _write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_lines(path: Path) -> list[dict]:
    rows = []
    with path.open(encoding="utf-8") as file:  # not splitlines: a name may hold U+0085
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def find_runs(runs_dir: str | Path = "runs") -> list[dict]:
    """Every scored run: its name and scores, and from its manifest what made it, sorted by name."""
    runs = []
    for path in sorted(Path(runs_dir).glob(f"{PREFIX}*/metrics.json")):
        manifest_path = path.with_name("manifest.json")
        manifest = _read_json(manifest_path) if manifest_path.exists() else {}
        name = path.parent.name.removeprefix(PREFIX)
        command = manifest.get("command", "not recorded")
        runs.append(
            {
                "run": name,
                "recipe": manifest.get("recipe", name),
                "scale": manifest.get("scale", "unknown"),
                "command": command if isinstance(command, str) else " ".join(command),
                "commit": manifest.get("git"),
                "machine": manifest.get("machine"),
                "parameters": manifest.get("parameters", {}),
                "seed": manifest.get("parameters", {}).get("seed"),
                "metrics": _read_json(path),
            }
        )
    return runs


def results_table(runs_dir: str | Path = "runs") -> str:
    """The results of all runs found, in Markdown, a table for each scale; says what is missing and how to make it."""
    runs = find_runs(runs_dir)
    if not runs:
        return f"No scored run in {runs_dir}. Make one: `make run RECIPE=r4-joint`; all of them: `make recipes`."
    scales = sorted({run["scale"] for run in runs})
    return "\n\n".join(_scale_table(scale, [run for run in runs if run["scale"] == scale]) for scale in scales)


def _scale_table(scale: str, runs: list[dict]) -> str:
    rows, missing, shown, scored = [], [], [], {}
    for name in ROWS:
        run, which = _run_of_row(name, runs), name if name in FILES else "fine-tuned"
        if run is None:
            missing.append(name)
        else:
            rows.append(_row(name, [run], which))
            scored[name] = run["metrics"]["scores"][which]
            shown += [run["run"]] if name == run["run"] or name not in FILES else []
    rows += [_row(f"{name}, mean of {len(group)} seeds", group) for name, group in group_seeds(runs).items()
             if len(group) > 1]
    own = [run for run in runs if run["run"] not in shown and "fine-tuned" in run["metrics"]["scores"]]
    rows += [_row(run["recipe"], [run]) for run in own]
    scored |= {run["run"]: run["metrics"]["scores"]["fine-tuned"] for run in own}
    head = ["model", "n", "mean IoU (95 %)", *METRICS, "run", "command"]
    lines = [f"Scale `{scale}`, intervals by bootstrap over pictures (and over seeds, where there are several):", "",
             table_line(head), table_line(["---"] * len(head))]
    notes = [f"Missing: {name}. Make it: `make run RECIPE={name}`." for name in missing if name != "constant box"]
    notes += [name + unstopped_note(score) + "." for name, score in scored.items() if unstopped_note(score)]
    if len({run["metrics"]["truth"]["hash"] for run in runs}) > 1:
        notes.append("These runs were not all scored on the same truth: compare only those that share it.")
    return "\n".join([*lines, *rows, *([""] if notes else []), *notes])


def _run_of_row(row: str, runs: list[dict]) -> dict | None:
    """The run that a row of the table shows: the recipe's own, or for base and constant box any that has them."""
    if row in FILES:
        having = [run for run in runs if row in run["metrics"]["scores"]]
        return next((run for run in having if run["run"] == "base"), having[0] if having else None)
    own_name = "r3-stage2" if row == "r3-two-stage" else row
    return next((run for run in runs if run["run"] == own_name and "fine-tuned" in run["metrics"]["scores"]), None)


def _row(name: str, runs: list[dict], which: str = "fine-tuned") -> str:
    """One run, or the mean over the seeds of a recipe with its interval over seeds and pictures."""
    shown = summary_over_seeds(runs, METRICS.values(), which)
    numbers = [number(shown[metric], metric in _PERCENT) for metric in METRICS.values()]
    command = f"`{runs[0]['command']}`" if len(runs) == 1 else "–"
    return table_line([name, str(shown["mean_iou"]["n"]), with_interval(shown["mean_iou"]), *numbers,
                       ", ".join(run["run"] for run in runs), command])


_PERCENT = ("detection_rate", "iou_over_50", "iou_over_70")


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def number(value: float | None, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if percent else f"{value:.3f}".replace("0.", ".", 1)


def with_interval(metric: dict) -> str:
    """A metric or difference of `score` or `paired_bootstrap` as text: `.712 (.671 to .750)`."""
    return f"{number(metric['value'])} ({number(metric['low'])} to {number(metric['high'])})"


def compare(a: str, b: str, runs_dir: str | Path = "runs") -> str:
    """Two runs on the same pictures, in Markdown: means, paired difference, verdict, what 50 pictures could tell.

    Each is a run's name or folder, with `:base` or `:constant box` behind it for that score of the run.
    """
    (name_a, score_a), (name_b, score_b) = load_score(a, runs_dir), load_score(b, runs_dir)
    result = paired_bootstrap(score_a["per_picture"], score_b["per_picture"])
    difference, needed = result["difference"], result["pictures_needed"]
    lines = [
        f"- {name_a}: mean IoU {with_interval(score_a['summary']['mean_iou'])}{unstopped_note(score_a)}",
        f"- {name_b}: mean IoU {with_interval(score_b['summary']['mean_iou'])}{unstopped_note(score_b)}",
        f"- difference on the same {difference['n']} pictures: {difference['value']:+.3f} "
        f"({number(difference['low'])} to {number(difference['high'])})",
        f"- verdict: {result['verdict']}",
        f"- 50 pictures would have told them apart {100 * result['power_50']:.0f} times in 100",
    ]
    if needed is not None:
        lines.append(f"- pictures needed to see this difference four times in five: about {needed}")
    if result["left_out"]:
        lines.append(f"- left out, in one run only: {', '.join(result['left_out'])}")
    return "\n".join(lines)


def load_score(name: str, runs_dir: str | Path = "runs") -> tuple[str, dict]:
    """A run's score by name or folder: `("r4-joint", score)`; "name:base" takes another score than the run's own."""
    run, _, which = name.partition(":")
    folder = run_folder(run, "metrics.json", runs_dir)
    if folder is None:
        found = ", ".join(known["run"] for known in find_runs(runs_dir)) or "none yet"
        raise FileNotFoundError(f"no scored run {run!r} in {runs_dir}; the runs there: {found}")
    scores = _read_json(folder / "metrics.json")["scores"]
    which = which or next(iter(scores))
    if which not in scores:
        raise ValueError(f"run {run!r} has no score {which!r}; it has {', '.join(scores)}")
    return name, scores[which]
