"""The whole pipeline at 7B without a download: `python -m helpers.dev.check_7b --folder /big/disk/check`.

Builds the published 7B architecture with random weights and pictures at the real pixel budget, then runs pipeline.py
itself for each recipe: train, be killed after a checkpoint, go on, predict a batch, merge, reload. Prints a table of
what it took, and ends with 1 where a recipe failed or a count is not the published architecture's. Boxes and losses
mean nothing here. With `--gpus 2` each recipe runs in one process over both GPUs, and for comparison trains on one GPU
and in two processes, a GPU each: the losses must agree. `--minutes 8` stops whatever has not ended by then and reports
what was seen; a second call with other `--recipes` keeps the model and adds its columns. `--tiny` does the same with a
shrunken model on any machine.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from helpers.dev.random_7b import PUBLISHED, SHRUNKEN, write_json, write_model, write_pictures
from helpers.recipes import IMAGE_TOKEN, LOW_MEMORY, RECIPES, SCALES

TRAINED = [recipe for recipe, stages in RECIPES.items() if stages]
WEIGHTS = 8_291_375_616  # the published index: 16,582,751,232 bytes of bf16
# LoRA at rank r on a layer of n inputs and m outputs has r (n + m) weights; at r = 64, summed by hand
LORA_LANGUAGE = 161_480_704  # 28 x 64 x (2 x (3584 + 3584) + 2 x (3584 + 512) + 3 x (3584 + 18944))
LORA_VISION = 43_155_456  # 64 x (32 x ((1280 + 3840) + 2560 + 2 x (1280 + 5120)) + (5120 + 5120) + (5120 + 3584))
VISION = 675_759_104
EXPECTED = {
    "r1-llm-only": [{"vision": 0, "language": LORA_LANGUAGE, "head": 0}],
    "r2-vision-only": [{"vision": VISION, "language": 0, "head": 0}],
    "r3-two-stage": [{"vision": VISION, "language": 0, "head": 0}, {"vision": 0, "language": LORA_LANGUAGE, "head": 0}],
    "r4-joint": [{"vision": LORA_VISION, "language": LORA_LANGUAGE, "head": 0}],
}
NF4_LAYERS = 28 * 7
CAPPED = ("r1-llm-only", "r4-joint", "base")  # the ones promised to fit a card of 24 GiB
WAYS = ("one GPU", "one process", "processes")
TIMED = ("load", "train", "save checkpoint", "load checkpoint", "predict a batch", "merge", "save model",
         "reload and compare")  # fmt: skip
# width, height; 28 x 28 pixels a token: 1280, 1280, 1274 and 1276 image tokens
SIZES = [(1120, 896), (896, 1120), (1372, 728), (812, 1232)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/check-7b"), help="model, pictures, runs; 90 GB free")
    parser.add_argument("--runs", type=Path, help="where runs are written, on another disk (default: in --folder)")
    parser.add_argument("--report", type=Path, help="where logs and report.json go (default: in --folder)")
    parser.add_argument("--recipes", nargs="+", default=TRAINED, choices=list(RECIPES))
    parser.add_argument("--gpus", type=int, default=1, help="how many; above 1 every recipe runs in all of --ways")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help=f"of using the GPUs: {', '.join(WAYS)}")
    parser.add_argument("--whole", nargs="*", default=["one process"], help="ways that go on after the training")
    parser.add_argument("--full-cap-gib", type=float, default=0, help="for the other recipes (default: none)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, help="default: the scale's own")
    parser.add_argument("--cap-gib", type=float, help=f"for {' and '.join(CAPPED)}: 24, low 15")
    parser.add_argument("--memory", choices=["low"], help="the pipeline's parameter, for a card of 16 GiB")
    parser.add_argument("--val", type=int, default=16, help="pictures that are predicted, 16 at a time (low: 4)")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest answer; random weights never stop sooner")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time on a GPU; one trains at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything together; then it stops")
    parser.add_argument("--kill", nargs="*", default=TRAINED, help="recipes that are killed once and go on")
    parser.add_argument("--tiny", action="store_true", help="a shrunken model, no GPU needed")
    parser.add_argument("--keep", action="store_true", help="keep the runs' files")
    options = parser.parse_args()
    options.runs = options.runs or options.folder / "runs"
    options.report = options.report or options.folder / "report"
    options.values = SCALES["7b"] | (LOW_MEMORY["7b"] if options.memory else {})
    options.accumulation = options.accumulation or options.values["accumulation"]
    options.cap_gib = options.cap_gib or (15 if options.memory else 24)
    options.deadline = time.monotonic() + 60 * options.minutes
    options.ways = options.ways or (WAYS if options.gpus > 1 else WAYS[:1])
    options.whole = options.whole if options.gpus > 1 else WAYS
    options.free = [*range(options.gpus)] * options.side_by_side
    options.changed = threading.Condition()
    return options


def pipeline_arguments(options: argparse.Namespace, recipe: str, way: str) -> list[str]:
    """What pipeline.py is called with: the 7B scale's own values, on this model and these pictures."""
    given = {
        "recipe": recipe, "scale": "7b", "model_id": options.folder / "model",
        "dataset_id": options.folder / "pictures", "output_root": options.runs / way.replace(" ", "-"), "epochs": 1,
        "accumulation": options.accumulation, "save_steps": options.steps // 2, "report_to": "none",
        "max_new_tokens": options.new_tokens,
        "predict_batch_size": min(options.val, options.values["predict_batch_size"]), "memory": options.memory,
    }  # fmt: skip
    if options.tiny:  # no GPU, so scale 7b would be refused: its values one by one, and small pictures
        values = {name: value for name, value in options.values.items() if not name.endswith("_id")}
        pixels = {"min_pixels": 16 * IMAGE_TOKEN, "max_pixels": 64 * IMAGE_TOKEN}
        given = values | given | pixels | {"scale": "tiny"}
    return [f"{name}={value}" for name, value in given.items()]


@contextlib.contextmanager
def some_gpus(options: argparse.Namespace, way: str) -> Iterator[list[int]]:
    """Wait for one free GPU, or a place on all of them where the way needs all, and take it."""
    wanted = 1 if way == "one GPU" else options.gpus

    def distinct() -> list[int]:
        return sorted(set(options.free), key=options.free.count, reverse=True)

    with options.changed:
        options.changed.wait_for(lambda: len(distinct()) >= wanted)
        cards = sorted(distinct()[:wanted])
        for card in cards:
            options.free.remove(card)
    try:
        yield cards
    finally:
        with options.changed:
            options.free += cards
            options.changed.notify_all()


def run_recipe(options: argparse.Namespace, recipe: str, way: str) -> dict:
    """Run one recipe in one way, killed at half of its steps and started again; its row of the report."""
    name = f"{recipe}.{way.replace(' ', '-')}"
    events, log = options.report / f"{name}.events.jsonl", options.report / f"{name}.log"
    cap = options.cap_gib if recipe in CAPPED else options.full_cap_gib
    trainings = 0 if way in options.whole else len(RECIPES[recipe])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    kill = recipe in options.kill and RECIPES[recipe] and way in options.whole and way != "processes"
    codes = []
    with some_gpus(options, way) as cards:
        start = time.perf_counter()
        for kill_at in [options.steps // 2, 0] if kill else [0]:
            command = [sys.executable, *(launch if way == "processes" else []), "-m", "helpers.dev.measured",
                       str(events), str(cap), str(kill_at), str(trainings), *pipeline_arguments(options, recipe, way)]
            codes.append(run_until(command, log, options, cards))
            ended = {-9: "killed", None: "stopped by --minutes"}.get(codes[-1], f"ended with {codes[-1]}")
            print(f"{recipe}, {way}: {ended}, {time.perf_counter() - start:.0f} s", flush=True)
            if codes[-1] not in (0, -9):
                print(*(log.read_text().splitlines()[-30:] if codes[-1] else []), sep="\n", flush=True)
                break
    row = {"recipe": recipe, "way": way, "gpus": len(cards), "cap_gib": cap or None, "codes": codes,
           **summary(read(events))}
    row["wall_seconds"] = round(time.perf_counter() - start)
    row["wrong"] = wrong(options, recipe, row, kill)
    root = options.runs / way.replace(" ", "-")
    folders = [path for path in root.glob(f"*-{recipe.replace('-two-stage', '')}*") if path.is_dir()]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    row["disk_gib"] = round(sum(file.stat().st_size for file in files) / 2**30, 1)
    for folder in [] if options.keep else folders:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(options.report / f"{name}.json", row)
    return row


def run_until(command: list[str], log: Path, options: argparse.Namespace, cards: list[int]) -> int | None:
    """The exit code of `command`, whose words go into `log`; None where the time was up before its end."""
    cache = str(options.folder / "huggingface")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": cache, "TQDM_DISABLE": "1"}
    if options.gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cards))
    left = options.deadline - time.monotonic()
    if left <= 0:
        return None
    with log.open("a") as out:
        try:
            return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment,
                                  timeout=left if left < float("inf") else None).returncode
        except subprocess.TimeoutExpired:
            return None


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summary(events: list[dict]) -> dict:
    """The events of a recipe's processes as one row: peaks in GiB, seconds (every time a call was made), counts."""
    calls: dict[str, list[dict]] = {}
    for event in events:
        calls.setdefault(event["call"], []).append(event)
    steps = [event["seconds"] for event in calls.get("step", [])]
    row = {name: max((event.get(name, 0) for event in events), default=0) for name in ("allocated", "reserved")}
    row |= {
        "step_seconds": {"median": statistics.median(steps), "first": steps[0], "n": len(steps)} if steps else None,
        "losses": list({event["step"]: event["loss"] for event in calls.get("loss", [])}.values()),
        "resumed_at": [event["step"] for event in calls.get("train begins", []) if event["step"]],
        "nf4_layers": sorted({event["result"] for event in calls.get("nf4 layers", [])}),
        "trainable": [event["result"] for event in calls.get("trainable", [])],
        "merge_algebra": [event["result"] for event in calls.get("merge", []) if event["result"] is not None],
        "against_as_trained": [event["result"] for event in calls.get("compare", [])],
    }
    for name in ("loss", "step"):
        calls.pop(name, None)
    timed = [name for name in calls if "allocated" in calls[name][0] and name not in ("nf4 layers", "trainable")]
    row["seconds"] = {name: [event["seconds"] for event in calls[name]] for name in timed}
    row["peaks"] = {name: [max(event[held] for event in calls[name]) for held in ("allocated", "reserved")]
                    for name in timed}  # fmt: skip
    return row


def wrong(options: argparse.Namespace, recipe: str, row: dict, killed: bool) -> list[str]:
    """What is not as it should be, in words."""
    expected_codes, resumed = ([-9, 0], [options.steps // 2]) if killed else ([0], [])
    if None in row["codes"]:
        seen = f"after {list(row['seconds'])[-1]!r}" if row["seconds"] else "before its first step"
        return [f"not seen to its end: stopped by --minutes {seen}"]
    faults = [] if row["codes"] == expected_codes else [f"exit codes {row['codes']}, expected {expected_codes}"]
    if row["resumed_at"] != resumed:
        faults.append(f"resumed at step {row['resumed_at']}, expected {resumed}")
    if row["cap_gib"] and row["reserved"] > row["cap_gib"]:
        faults.append(f"{row['reserved']} GiB reserved, over the cap of {row['cap_gib']}")
    if not options.tiny:
        trained = [stage for number, stage in enumerate(row["trainable"]) if stage not in row["trainable"][:number]]
        if trained != EXPECTED.get(recipe, []):
            faults.append(f"trains {row['trainable']}, expected {EXPECTED.get(recipe, [])}")
        if not set(row["nf4_layers"]) <= {0, NF4_LAYERS}:
            faults.append(f"{row['nf4_layers']} NF4 layers, expected {NF4_LAYERS}")
    return faults


def other_losses(row: dict, alike: list[dict]) -> list[str]:
    """Where the same recipe on one GPU (of `alike`) has losses more than 2 % from this row's: dropout explains less."""
    for other in alike:
        both = min(len(row["losses"]), len(other["losses"]))
        if other["way"] == "one GPU" and not np.allclose(row["losses"][:both], other["losses"][:both], rtol=0.02):
            return [f"losses {row['losses']}, and {other['losses']} on one GPU"]
    return []


def table(rows: list[dict]) -> str:
    """The report in Markdown, a column a recipe."""

    def peak(row: dict, call: str) -> str:
        return f"{row['peaks'][call][0]:.1f}" if call in row["peaks"] else "-"

    def seconds(row: dict, call: str) -> str:
        times = row["seconds"].get(call)
        return f"{len(times)} x {statistics.median(times):.1f}" if times else "-"

    def step(row: dict) -> str:
        return "{median:.2f} ({n})".format(**row["step_seconds"]) if row["step_seconds"] else "-"

    def apart(row: dict) -> str:
        return ", ".join(f"{kind} {value:.3f}" for found in row["against_as_trained"] for kind, value in found.items())

    lines = {
        "on": lambda row: row["way"],
        "cap, GiB": lambda row: row["cap_gib"] or "none",
        "most allocated on a GPU, GiB": lambda row: row["allocated"],
        "most reserved, GiB": lambda row: row["reserved"],
        "allocated in training, GiB": lambda row: peak(row, "train"),
        "in predicting a batch, GiB": lambda row: peak(row, "predict a batch"),
        "in merging, GiB": lambda row: peak(row, "merge"),
        "a step, s: median (n)": step,
        "losses": lambda row: " ".join(f"{loss:.3f}" for loss in row["losses"]) or "-",
        "went on at step": lambda row: ", ".join(map(str, row["resumed_at"])) or "-",
        **{f"{call}, times x s": lambda row, call=call: seconds(row, call) for call in TIMED},
        "applied against merged": lambda row: " ".join(f"{value:.1e}" for value in row["merge_algebra"]) or "-",
        "merged against as trained": lambda row: apart(row) or "-",
        "disk, GiB": lambda row: row["disk_gib"],
        "all of it, s": lambda row: row["wall_seconds"],
        "wrong": lambda row: "; ".join(row["wrong"]) or "nothing",
    }
    body = [[name, *(str(show(row)) for row in rows)] for name, show in lines.items()]
    head = [["", *(row["recipe"] for row in rows)], ["---"] * (len(rows) + 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in head + body)


def prepare_inputs(options: argparse.Namespace) -> None:
    """Write the model, unless an earlier call has, and the pictures. SystemExit where it has other counts."""
    start, model, made = time.perf_counter(), options.folder / "model", options.folder / "model.json"
    published = SHRUNKEN if options.tiny else PUBLISHED
    if not made.is_file() or json.loads(made.read_text())["config"] != published:
        made.unlink(missing_ok=True)
        counts = write_model(model, published)
        if not options.tiny and counts["weights"] != WEIGHTS:
            raise SystemExit(f"the model has {counts['weights']} weights, and the published one {WEIGHTS}.")
        write_json(made, {"config": published, **counts})
        torch.cuda.empty_cache()
        print(f"model written: {counts}, {time.perf_counter() - start:.0f} s", flush=True)
    batch = options.values["batch_size"] * options.accumulation
    sizes = [(width // 4, height // 4) for width, height in SIZES] if options.tiny else SIZES
    counts = {"train": options.steps * batch, "selection": 1, "val": options.val}
    write_pictures(options.folder / "pictures", counts, sizes)
    print(f"pictures written, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> int:
    options = arguments()
    for folder in (options.folder, options.runs, options.report):
        folder.mkdir(parents=True, exist_ok=True)
    for old in [file for recipe in options.recipes for file in options.report.glob(f"{recipe}.*")]:
        old.unlink()
    prepare_inputs(options)
    with ThreadPoolExecutor(options.side_by_side * options.gpus) as side_by_side:
        pairs = [(recipe, way) for way in options.ways for recipe in options.recipes]
        list(side_by_side.map(lambda pair: run_recipe(options, *pair), pairs))
    rows = [json.loads(file.read_text()) for file in sorted(options.report.glob("*.*.json")) if file.stem != "events"]
    for row in rows:
        row["wrong"] += other_losses(row, [other for other in rows if other["recipe"] == row["recipe"]])
    device = f"{options.gpus} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    machine = f"{device}, torch {torch.__version__}, batch {options.values['batch_size']} x {options.accumulation}"
    write_json(options.report / "report.json", {"command": sys.argv, "machine": machine, "rows": rows})
    print(machine, table(rows), sep="\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
