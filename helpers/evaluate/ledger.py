"""The results ledger: every number that the README's results show, with the run, commit and command that made it.

`make table ARGS=--write` writes `results.json` from the runs on disk, and the README's block between the two comments
from `results.json`; `make table ARGS=--check` fails, naming the number, where one of the three says something else.
"""

import itertools
import math
from pathlib import Path

from scipy import stats

from helpers.evaluate.intervals import ALPHA, told_apart
from helpers.evaluate.reports import ROWS, find_runs, number, table_line, with_interval
from helpers.evaluate.seeds import difference_over_seeds, group_seeds, iou_matrix, summary_over_seeds
from helpers.files import read_json, write_json

BEGIN, END = "<!-- results: make table ARGS=--write -->", "<!-- end of results -->"
SHOWN = ("median_iou", "detection_rate", "iou_over_50", "iou_over_70", "f1", "ap", "ap50", "ap75")
HEADS = {"median": "median_iou", "IoU > .5": "iou_over_50", "F1": "f1", "AP": "ap"}
# Mean IoU at 7B on the first 50 pictures of the real val, two RTX 6000 Ada.
PUBLISHED = {"base": 0.098, "r1-llm-only": 0.835, "r2-vision-only": 0.833, "r3-two-stage": 0.837, "r4-joint": 0.864}
PUBLISHED_N = 50


def collect(runs_dir: str | Path = "runs") -> dict:
    """The ledger of the runs in `runs_dir`: `{"rows": {"scale/row": entry}, "comparisons": {"scale/a - b": interval}}`.

    An entry has `run`, `commit`, `command`, `machine` (lists, one for each seed), `mean_iou` (over seeds and pictures),
    `spread` (standard deviation of a picture's IoU) and the other metrics, means over the seeds.
    """
    ledger: dict = {"rows": {}, "comparisons": {}}
    runs = find_runs(runs_dir)
    for scale in sorted({run["scale"] for run in runs}):
        groups = group_seeds([run for run in runs if run["scale"] == scale])
        rows = {_row_name(name, group): group for name, group in groups.items()
                if "fine-tuned" in group[0]["metrics"]["scores"]}
        for which in ("constant box", "base"):
            having = [run for group in groups.values() for run in group if which in run["metrics"]["scores"]]
            if having:
                ledger["rows"][f"{scale}/{which}"] = _entry(having[:1], which)
        ledger["rows"] |= {f"{scale}/{name}": _entry(group, "fine-tuned") for name, group in rows.items()}
        for a, b in itertools.combinations([name for name in reversed(ROWS) if name in rows], 2):
            if rows[a][0]["metrics"]["truth"]["hash"] == rows[b][0]["metrics"]["truth"]["hash"]:
                ledger["comparisons"][f"{scale}/{a} - {b}"] = _rounded(difference_over_seeds(rows[a], rows[b]))
    return ledger


def _row_name(name: str, group: list[dict]) -> str:
    return group[0]["recipe"] if name in (group[0]["recipe"], "r3-stage2") else name


def _entry(group: list[dict], which: str) -> dict:
    values, _ = iou_matrix(group, which)
    summary = summary_over_seeds(group, SHOWN, which)
    return {
        **{key: [run[key] for run in group] for key in ("run", "commit", "command", "machine", "seed")},
        "mean_iou": _rounded(summary.pop("mean_iou")),
        "spread": round(float(values.std(axis=1, ddof=1).mean()), 4) if values.shape[1] > 1 else None,
        **_rounded(summary),
    }


def _rounded(numbers: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}


def readme_block(ledger: dict, scale: str = "tiny") -> str:
    """The README's results, in Markdown: the table, what the recipes' differences are, what 50 pictures can tell."""
    rows = {row: ledger.get("rows", {}).get(f"{scale}/{row}") for row in ROWS}
    head = ["", "n", "embedded: mean IoU (95 %)", *HEADS, "run", "commit", "7B, published"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for row, entry in rows.items():
        published = number(PUBLISHED.get(row))
        if entry is None:
            lines.append(table_line([row, *["–"] * (len(head) - 2), published]))
            continue
        percent = [number(entry[metric], metric == "iou_over_50") for metric in HEADS.values()]
        seeds = f", {len(entry['run'])} seeds" if len(entry["run"]) > 1 else ""
        lines.append(table_line([row + seeds, str(entry["mean_iou"]["n"]), with_interval(entry["mean_iou"]), *percent,
                                 ", ".join(entry["run"]), ", ".join(dict.fromkeys(map(str, entry["commit"]))),
                                 published]))
    said = [f"- {key.split('/')[1].replace(' - ', ' minus ')}: {with_interval(value)}, {_verdict(value)}"
            for key, value in ledger.get("comparisons", {}).items() if key.startswith(f"{scale}/")]
    if "collators" in ledger:
        both = ledger["collators"]
        said.append(f"- loss on the answer alone minus on all text ({both['recipe']}, {both['seeds']} seeds each): "
                    f"{with_interval(both['difference'])}, {both['verdict']}")
    told = what_fifty_tell(ledger, scale)
    return "\n".join([*lines, *([""] if said else []), *said, *(["", told] if told else [])])


def _verdict(difference: dict) -> str:
    return f"{told_apart(difference)} by {difference['n']} pictures"


def what_fifty_tell(ledger: dict, scale: str = "tiny") -> str:
    """What the published table's 50 pictures can tell apart, by the spreads measured here; "" where there are none."""
    rows, comparisons = ledger.get("rows", {}), ledger.get("comparisons", {})
    entries = [rows[f"{scale}/{row}"] for row in ROWS[2:] if f"{scale}/{row}" in rows]
    paired = [value["spread"] for key, value in comparisons.items() if key.startswith(f"{scale}/")]
    if not entries or not paired:
        return ""
    root, z = math.sqrt(PUBLISHED_N), stats.norm.ppf(1 - ALPHA / 2)
    alone = sum(entry["spread"] for entry in entries) / len(entries)
    pairs = sum(paired) / len(paired)
    needed = (z + stats.norm.ppf(0.8)) * pairs / root
    recipes = [value for row, value in PUBLISHED.items() if row != "base"]
    largest = max(recipes) - min(recipes)
    verdict = "too little to rank" if largest < needed else "enough to tell"
    return (f"A picture's IoU spreads by {number(alone)} here, so {PUBLISHED_N} pictures give a mean to within "
            f"± {number(z * alone / root)}. The difference of two recipes on one picture spreads by {number(pairs)}: "
            f"{PUBLISHED_N} pictures tell them apart, four times in five, from a difference of {number(needed)} on. "
            f"The published recipes lie {number(largest)} apart at most: {verdict} these by {PUBLISHED_N} pictures.")


def write(runs_dir: str | Path, ledger_path: str | Path, readme: str | Path) -> str:
    """Write the ledger from the runs on disk (rows of runs that are not there stay) and the README's block from it."""
    found, path = collect(runs_dir), Path(ledger_path)
    if not found["rows"]:
        raise FileNotFoundError(f"no scored run in {runs_dir}; make one: make run RECIPE=r4-joint")
    before, readme_before, text = read_json(path), _block(Path(readme)), Path(readme).read_text(encoding="utf-8")
    ledger = before | {part: before.get(part, {}) | found[part] for part in ("rows", "comparisons")}
    write_json(path, ledger)
    text = text.replace(f"{BEGIN}\n{readme_before}\n{END}", f"{BEGIN}\n{readme_block(ledger)}\n{END}")
    Path(readme).write_text(text, encoding="utf-8")
    return f"{len(found['rows'])} rows of {runs_dir} written into {ledger_path}, and the results into {readme}"


def stale(runs_dir: str | Path, ledger_path: str | Path, readme: str | Path) -> list[str]:
    """Each number that is not what its run gave, in one sentence; [] where README, ledger and runs on disk agree."""
    path = Path(ledger_path)
    if not path.is_file():
        return [f"{path} is missing; write it with make table ARGS=--write"]
    ledger, found, problems = read_json(path), collect(runs_dir), []
    for part in ("rows", "comparisons"):
        for key, now in found[part].items():
            was = ledger.get(part, {}).get(key)
            problems += [f"{path}, {key}: {name} is {was and was.get(name)!r}, the run on disk says {value!r}"
                         for name, value in now.items() if was is None or was.get(name) != value]
    shown, expected = _block(Path(readme)).splitlines(), readme_block(ledger).splitlines()
    problems += [f"{readme} says {said!r}, and {path} {wanted!r}"
                 for said, wanted in itertools.zip_longest(shown, expected, fillvalue="nothing") if said != wanted]
    return problems


def _block(readme: Path) -> str:
    text = readme.read_text(encoding="utf-8")
    if text.count(f"{BEGIN}\n") != 1 or f"\n{END}" not in text.split(BEGIN)[1]:
        raise ValueError(f"{readme} must hold the lines {BEGIN!r} and {END!r} once; the results stand between them.")
    return text.split(f"{BEGIN}\n")[1].split(f"\n{END}")[0]
