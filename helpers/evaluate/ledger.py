"""The results ledger: every number that the README's results show, with the run, commit and command that made it.

`make table` shows the results of the runs on disk. `make table ARGS=--write` writes `results.json` from them, and the
README's block between the two comments from `results.json`; `make table ARGS=--check` fails, naming the number, where
one of the three says something else.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from helpers.evaluate.intervals import number, over_seeds, significance, with_interval
from helpers.evaluate.reports import METRICS, PERCENT, find_runs, table_line
from helpers.evaluate.scoring import unstopped_note
from helpers.recipes import TRAINING
from helpers.runs import read_json, write_json, write_text

BLOCK = re.compile(r"(?<=<!-- results: make table ARGS=--write -->\n).*?(?=\n<!-- end of results -->)", re.S)
ROWS = ("constant box", "base", "r1-llm-only", "r2-vision-only", "r3-two-stage", "r4-joint", "r5-reward")
SHOWN = (*METRICS.values(), "ap50", "ap75")
SAME = {*TRAINING, "keep", "constrained", "passes"} - {"seed"}  # parameters in which the seeds of one recipe agree
# Mean IoU at 7B on the first 50 pictures of the real val, two RTX 6000 Ada.
PUBLISHED = {"base": 0.098, "r1-llm-only": 0.835, "r2-vision-only": 0.833, "r3-two-stage": 0.837, "r4-joint": 0.864}


def collect(runs_dir: str | Path = "runs") -> dict:
    """The ledger of the runs in `runs_dir`: `{"rows": {"scale/row": entry}, "comparisons": {"scale/a - b": interval}}`.

    An entry has `run`, `commit`, `command`, `machine` (lists, one for each seed), `mean_iou` (over seeds and pictures)
    and the other metrics, means over the seeds.
    """
    ledger: dict = {"rows": {}, "comparisons": {}}
    runs = find_runs(runs_dir)
    for scale in sorted({run["scale"] for run in runs}):
        groups = group_seeds([run for run in runs if run["scale"] == scale])
        rows = {group[0]["recipe"] if name in (group[0]["recipe"], "r3-stage2") else name: group
                for name, group in groups.items() if "fine-tuned" in group[0]["metrics"]["scores"]}
        for which in ("constant box", "base"):
            having = [run for group in groups.values() for run in group if which in run["metrics"]["scores"]]
            if having:
                ledger["rows"][f"{scale}/{which}"] = _entry(having[:1], which)
        ledger["rows"] |= {f"{scale}/{name}": _entry(group, "fine-tuned") for name, group in rows.items()}
        for a, b in itertools.combinations([name for name in reversed(ROWS) if name in rows], 2):
            if rows[a][0]["metrics"]["truth"]["hash"] == rows[b][0]["metrics"]["truth"]["hash"]:
                seeds = min(len(rows[a]), len(rows[b]))
                values = _ious(rows[a][:seeds], "fine-tuned") - _ious(rows[b][:seeds], "fine-tuned")
                ledger["comparisons"][f"{scale}/{a} - {b}"] = _rounded(over_seeds(values))
    return ledger


def group_seeds(runs: list[dict]) -> dict[str, list[dict]]:
    """`find_runs`' runs by the name of the first: `{"r4-joint": [run of r4-joint, of r4-joint-s1, ...]}`.

    Fine-tuned runs of one group share scale, truth and every parameter but the seed (`-p seed 1 -p run_name ...`).
    """
    groups: dict[tuple, list[dict]] = {}
    known: Counter = Counter()
    for run in sorted(runs, key=lambda run: (run["seed"], run["run"])):
        parameters = {name: value for name, value in run["parameters"].items() if name in SAME}
        kind = json.dumps([run["scale"], run["recipe"], run["metrics"]["truth"]["hash"], parameters], sort_keys=True)
        kind = kind if "fine-tuned" in run["metrics"]["scores"] else run["run"]
        known[kind, run["seed"]] += 1  # a second run of one seed begins a group of its own
        groups.setdefault((kind, known[kind, run["seed"]]), []).append(run)
    return {group[0]["run"]: group for group in groups.values()}


def _ious(group: list[dict], which: str) -> np.ndarray:
    """IoU of each run and picture [S, P], of runs of one truth; pictures without a table take no part."""
    return np.array([[one["iou"] for one in run["metrics"]["scores"][which]["per_picture"] if one["iou"] is not None]
                     for run in group])


def _entry(group: list[dict], which: str) -> dict:
    summaries = [run["metrics"]["scores"][which]["summary"] for run in group]
    each = {metric: [summary[metric]["value"] for summary in summaries] for metric in SHOWN}
    return {
        **{key: [run[key] for run in group] for key in ("run", "commit", "command", "machine", "seed")},
        "mean_iou": _rounded(over_seeds(_ious(group, which)) if len(group) > 1 else summaries[0]["mean_iou"]),
        **_rounded({name: None if None in one else float(np.mean(one)) for name, one in each.items()}),
    }


def _rounded(numbers: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}


def results(ledger: dict, scale: str = "tiny", rows: Iterable[str] = ROWS) -> str:
    """Results of one scale in Markdown: a table of these rows, and the differences from the best of them.

    A row without a run has dashes, or is left out where nothing was published of it either.
    """
    head = ["", "n", "mean IoU (95 %)", *METRICS, "run", "commit", "7B, published"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    entries = {row: ledger.get("rows", {}).get(f"{scale}/{row}") for row in rows}
    for row in (row for row in rows if entries[row] or row in PUBLISHED):
        cells = dict.fromkeys(head, "–") | {"": row, "7B, published": number(PUBLISHED.get(row))}
        if entry := entries[row]:
            cells[""] += f", {len(entry['run'])} seeds" if len(entry["run"]) > 1 else ""
            cells |= {"n": str(entry["mean_iou"]["n"]), "mean IoU (95 %)": with_interval(entry["mean_iou"])}
            cells |= {name: number(entry[metric], metric in PERCENT) for name, metric in METRICS.items()}
            cells |= {name: ", ".join(dict.fromkeys(map(str, entry[name]))) for name in ("run", "commit")}
        lines.append(table_line(list(cells.values())))
    best = max((row for row in rows if entries[row]), key=lambda row: entries[row]["mean_iou"]["value"], default="")
    differences = {pair.partition("/")[2].replace(" - ", " minus "): value
                   for pair, value in ledger.get("comparisons", {}).items()
                   if pair.startswith(f"{scale}/") and best in pair.partition("/")[2].split(" - ")}
    lines += ["", *(f"- {name}: {with_interval(one)}, {significance(one)}, n = {one['n']}, seeds: {one['seeds']}"
                    for name, one in differences.items())]
    return "\n".join(lines).strip()


def results_table(runs_dir: str | Path = "runs") -> str:
    """The results of all runs found, in Markdown, a table for each scale; says what is missing and how to make it."""
    ledger, parts = collect(runs_dir), []
    if not ledger["rows"]:
        return f"No scored run in {runs_dir}. Make one: `make run RECIPE=r4-joint`; all of them: `make recipes`."
    for scale in dict.fromkeys(key.split("/")[0] for key in ledger["rows"]):
        found = [key.split("/")[1] for key in ledger["rows"] if key.startswith(f"{scale}/")]
        parts += [f"Scale `{scale}`:\n\n{results(ledger, scale, dict.fromkeys([*ROWS, *found]))}\n"]
        parts += [f"Missing: {row}. Make it: `make run RECIPE={row}`." for row in ROWS[1:] if row not in found]
        runs = [run for run in find_runs(runs_dir) if run["scale"] == scale]
        notes = {run["run"]: unstopped_note(next(iter(run["metrics"]["scores"].values()))) for run in runs}
        parts += [f"{run}{note}." for run, note in notes.items() if note]
        if len({run["metrics"]["truth"]["hash"] for run in runs}) > 1:
            parts += ["These runs were not all scored on the same truth: compare only those that share it."]
    return "\n".join(parts).strip()


def write(runs_dir: str | Path, ledger_path: str | Path, readme: str | Path) -> str:
    """Write the ledger from the runs on disk (rows of runs that are not there stay) and the README's block from it."""
    found, path, readme = collect(runs_dir), Path(ledger_path), Path(readme)
    if not found["rows"]:
        raise FileNotFoundError(f"no scored run in {runs_dir}; make one: make run RECIPE=r4-joint")
    before = read_json(path)
    ledger = {part: before.get(part, {}) | rows for part, rows in found.items()}
    write_json(path, ledger)
    write_text(readme, BLOCK.sub(lambda _: results(ledger), readme.read_text(encoding="utf-8")))
    return f"{len(found['rows'])} rows of {runs_dir} written into {ledger_path}, and the results into {readme}"


def stale(runs_dir: str | Path, ledger_path: str | Path, readme: str | Path) -> list[str]:
    """Each number that is not what its run gave, in one sentence; [] where README, ledger and runs on disk agree."""
    ledger, found, problems = read_json(Path(ledger_path)), collect(runs_dir), []
    for part in ("rows", "comparisons"):
        for key, now in found[part].items():
            was = ledger.get(part, {}).get(key, {})
            problems += [f"{ledger_path}, {key}: {name} is {was.get(name)!r}, the run on disk says {value!r}"
                         for name, value in now.items() if was.get(name) != value]
    block = BLOCK.search(Path(readme).read_text(encoding="utf-8"))
    shown, expected = (block[0] if block else "").splitlines(), results(ledger).splitlines()
    problems += [f"{readme} says {said!r}, and {ledger_path} {wanted!r}"
                 for said, wanted in itertools.zip_longest(shown, expected, fillvalue="nothing") if said != wanted]
    return problems
