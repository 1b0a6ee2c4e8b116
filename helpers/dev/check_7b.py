"""The whole pipeline at 7B without a download: `python -m helpers.dev.check_7b --folder /big/disk/check`.

Builds the published 7B architecture with random weights and pictures at the real pixel budget, then runs pipeline.py
itself for each recipe: train, be killed after a checkpoint, resume, predict a batch, merge, reload. Prints one table of
times and memory, and ends with 1 where a recipe failed or a count is not the published architecture's. Boxes and losses
mean nothing here. With `--gpus 2` each recipe also trains in the other ways of using the GPUs, and the losses must
agree. A second call keeps the model and adds its columns to the report.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from helpers.dev.random_7b import PUBLISHED, SHRUNKEN, write_model, write_pictures
from helpers.recipes import IMAGE_TOKEN, LOW_MEMORY, RECIPES, SCALES
from helpers.runs import read_json, write_json

TRAINED = [recipe for recipe, stages in RECIPES.items() if stages]
WEIGHTS = 8_291_375_616  # the published index: 16,582,751,232 bytes of bf16
# LoRA at rank r on a layer of n inputs and m outputs has r (n + m) weights; at r = 64, summed by hand
LORA_LANGUAGE = 161_480_704  # 28 x 64 x (2 x (3584 + 3584) + 2 x (3584 + 512) + 3 x (3584 + 18944))
LORA_VISION = 43_155_456  # 64 x (32 x ((1280 + 3840) + 2560 + 2 x (1280 + 5120)) + (5120 + 5120) + (5120 + 3584))
VISION = 675_759_104
NF4_LAYERS = 28 * 7
ON_LANGUAGE = {"vision": 0, "language": LORA_LANGUAGE, "head": 0}
WHOLE_VISION = {"vision": VISION, "language": 0, "head": 0}
EXPECTED = {  # weights that train, a row a stage
    "r1-llm-only": [ON_LANGUAGE],
    "r2-vision-only": [WHOLE_VISION],
    "r3-two-stage": [WHOLE_VISION, ON_LANGUAGE],
    "r4-joint": [ON_LANGUAGE | {"vision": LORA_VISION}],
    "r5-reward": [ON_LANGUAGE],  # in both stages
}
CAPPED = ("r1-llm-only", "r4-joint", "base")  # the ones promised to fit a card of 24 GiB, or of 16 with memory=low
WAYS = ("one process", "one GPU", "processes")
TIMED = ("load", "step", "train", "save checkpoint", "load checkpoint", "predict", "merge", "save model",
         "reload and compare")  # fmt: skip
NEW_TOKENS = 128  # random weights never stop sooner


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/check-7b"), help="90 GB free; report in report/")
    parser.add_argument("--recipes", nargs="+", default=TRAINED, choices=list(RECIPES))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help=f"the first runs whole, the others only train "
                        f"(default with several GPUs: {', '.join(WAYS)})")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, help="default: the scale's own")
    parser.add_argument("--memory", choices=["low"], help="the pipeline's parameter, for a card of 16 GiB")
    parser.add_argument("--cap-gib", type=float, help=f"default: 24, or 15 with --memory low, for {', '.join(CAPPED)}")
    parser.add_argument("--no-kill", action="store_true", help="nothing is killed and resumed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything together; then it stops")
    parser.add_argument("--tiny", action="store_true", help="a shrunken model, no GPU needed")
    options = parser.parse_args(words)
    options.values = SCALES["7b"] | (LOW_MEMORY["7b"] if options.memory else {})
    options.accumulation = options.accumulation or options.values["accumulation"]
    options.val = 2 if options.tiny else options.values["predict_batch_size"]
    options.ways = options.ways or (WAYS if options.gpus > 1 else ["one GPU"])
    options.deadline = time.monotonic() + 60 * options.minutes
    return options


def cap(options: argparse.Namespace, recipe: str) -> float:
    """GiB that a recipe may reserve on a GPU; 0: no cap."""
    return options.cap_gib or (recipe in CAPPED and (15 if options.memory else 24)) or 0


def pipeline_arguments(options: argparse.Namespace, recipe: str, runs: Path) -> list[str]:
    """What pipeline.py is called with: the 7B scale's own values, on this model and these pictures."""
    given = {
        "recipe": recipe, "scale": "7b", "model_id": options.folder / "model",
        "dataset_id": options.folder / "pictures", "output_root": runs, "epochs": 1,
        "accumulation": options.accumulation, "save_steps": options.steps // 2, "report_to": "none",
        "max_new_tokens": NEW_TOKENS, "memory": options.memory, "reward_steps": options.steps,
    }  # fmt: skip
    if options.tiny:  # no GPU, so scale 7b would be refused: its values one by one, and small pictures
        values = {name: value for name, value in options.values.items() if not name.endswith("_id")}
        values["reward_completions"] = 2
        pixels = {"min_pixels": 16 * IMAGE_TOKEN, "max_pixels": 64 * IMAGE_TOKEN}
        given = values | given | pixels | {"scale": "tiny"}
    return [f"{name}={value}" for name, value in given.items()]


def run_recipe(options: argparse.Namespace, recipe: str, way: str) -> None:
    """Run one recipe in one way, killed at half of its steps and started again, and write its row of the report."""
    report, name = options.folder / "report", f"{recipe}.{way.replace(' ', '-')}"
    runs, events, log = options.folder / "runs" / name, report / f"{name}.jsonl", report / f"{name}.log"
    for old in (events, log):
        old.unlink(missing_ok=True)
    whole = way == options.ways[0]
    kill_at = options.steps // 2 if whole and RECIPES[recipe] and not options.no_kill else 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    codes, start = [], time.perf_counter()
    for this_kill in [kill_at, 0] if kill_at else [0]:
        command = [sys.executable, *(launch if way == "processes" else []), "-m", "helpers.dev.measured", events,
                   cap(options, recipe), this_kill, 0 if whole else len(RECIPES[recipe]),
                   *pipeline_arguments(options, recipe, runs)]
        codes.append(run_until([str(word) for word in command], log, options, 1 if way == "one GPU" else options.gpus))
        print(f"{recipe}, {way}: exit code {codes[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
        if codes[-1] != 0 and not this_kill:
            print(*log.read_text().splitlines()[-30:] if log.is_file() else [], sep="\n", flush=True)
    row = {"recipe": recipe, "way": way, "cap_gib": cap(options, recipe), "kill_at": kill_at, "codes": codes,
           "events": read_events(events), "total_seconds": round(time.perf_counter() - start)}
    row["disk_gib"] = sum(file.stat().st_size for file in runs.rglob("*") if file.is_file()) / 2**30
    row["wrong"] = wrong(row, options.tiny)
    write_json(report / f"{name}.json", row)
    shutil.rmtree(runs, ignore_errors=True)


def run_until(command: list[str], log: Path, options: argparse.Namespace, gpus: int) -> int | None:
    """The exit code of `command`, its output going to `log`; None where `--minutes` were over before its end."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[:gpus]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(options.folder / "huggingface"),
                                "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ",".join(shown)}
    left = options.deadline - time.monotonic()
    if left <= 0:
        return None
    with log.open("a") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            return child.wait(None if left == float("inf") else left)
        except subprocess.TimeoutExpired:
            child.terminate()  # torchrun then ends its processes
            child.wait()
            return None


def read_events(path: Path) -> list[dict]:
    """What `helpers.dev.measured` has written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def values(row: dict, name: str, *calls: str) -> list:
    """The `name` ("seconds", "allocated", "reserved", "result") of all events, or of those of `calls`, in order."""
    return [event[name] for event in row["events"] if name in event and (not calls or event["call"] in calls)]


def wrong(row: dict, tiny: bool) -> list[str]:
    """What is not as it should be, a sentence each."""
    codes, killed, faults = row["codes"], [row["kill_at"]] * bool(row["kill_at"]), []
    if None in codes:
        return [f"stopped by --minutes, after {row['events'][-1]['call'] if row['events'] else 'the start'}"]
    if codes[-1] != 0 or (killed and codes[0] not in (-9, 1)):  # torchrun's own code is 1
        faults.append(f"exit codes {codes}")
    resumed = [training["step"] for training in values(row, "result", "training") if training["step"]]
    if resumed != killed:
        faults.append(f"resumed at step {resumed}, killed at step {killed}")
    reserved = max(values(row, "reserved"), default=0)
    if row["cap_gib"] and reserved > row["cap_gib"]:
        faults.append(f"{reserved} GiB reserved, over the cap of {row['cap_gib']}")
    trained, expected = values(row, "result", "trainable"), EXPECTED.get(row["recipe"], [])
    if not tiny and [stage for number, stage in enumerate(trained) if stage not in trained[:number]] != expected:
        faults.append(f"trains {trained}, expected {expected}")
    if not tiny and not set(values(row, "result", "nf4 layers")) <= {0, NF4_LAYERS}:
        faults.append(f"{values(row, 'result', 'nf4 layers')} NF4 layers, expected {NF4_LAYERS}")
    return faults


def other_losses(row: dict, rows: list[dict]) -> list[str]:
    """A sentence where the recipe's losses on one GPU are more than 2 % from this row's: dropout explains less."""
    alone = [other for other in rows if (other["recipe"], other["way"]) == (row["recipe"], "one GPU")]
    pairs = list(zip(*(values(one, "result", "loss") for one in [row, *alone]), strict=False)) if alone else []
    return [] if np.allclose(*np.transpose(pairs or [(0, 0)]), rtol=0.02) else [f"losses, and on one GPU: {pairs}"]


def table(rows: list[dict]) -> str:
    """The report in Markdown, a column a recipe and way; times as how often × the median."""
    lines: dict[str, list[str]] = {"": [], "---": []}
    for row in rows:
        shown = {"": f"{row['recipe']}, {row['way']}", "---": "---", "cap, GiB": f"{row['cap_gib'] or 'none'}"}
        for name in ("allocated", "reserved"):
            shown[f"most {name}, GiB"] = f"{max(values(row, name), default=0):.1f}"
        for call in ("train", "predict", "merge"):
            shown[f"allocated in {call}, GiB"] = f"{max(values(row, 'allocated', call), default=0):.1f}"
        for call in TIMED:
            seconds = values(row, "seconds", call)
            shown[f"{call}, s"] = f"{len(seconds)} × {statistics.median(seconds):.2f}" if seconds else "–"
        shown["losses"] = " ".join(f"{loss:.3f}" for loss in values(row, "result", "loss"))
        shown["applied against merged"] = " ".join(f"{off:.1e}" for off in values(row, "result", "merge") if off)
        shown |= {"disk, GiB": f"{row['disk_gib']:.1f}", "all of it, s": f"{row['total_seconds']}",
                  "wrong": "; ".join(row["wrong"]) or "nothing"}
        for name, cell in shown.items():
            lines.setdefault(name, []).append(cell)
    return "\n".join(f"| {' | '.join([name, *cells])} |" for name, cells in lines.items())


def prepare(options: argparse.Namespace) -> None:
    """Write the pictures, and the model where no earlier call has. SystemExit where it has other counts."""
    published, made = (SHRUNKEN if options.tiny else PUBLISHED), options.folder / "model.json"
    if read_json(made) != published:
        made.unlink(missing_ok=True)
        weights = write_model(options.folder / "model", published)
        if not options.tiny and weights != WEIGHTS:
            raise SystemExit(f"the model has {weights} weights, and the published one {WEIGHTS}.")
        write_json(made, published)  # written last: now the folder is whole
        torch.cuda.empty_cache()
    batch = options.values["batch_size"] * options.accumulation
    counts = {"train": options.steps * batch, "selection": 1, "val": options.val}
    write_pictures(options.folder / "pictures", counts, 0.25 if options.tiny else 1)


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = arguments(words)
    report = options.folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    prepare(options)
    for way in options.ways:
        for recipe in options.recipes:  # rewards need a process a GPU
            if options.gpus == 1 or way != "one process" or not any(stage.reward for stage in RECIPES[recipe]):
                run_recipe(options, recipe, way)
    rows = [read_json(file) for file in sorted(report.glob("r*.*.json")) + sorted(report.glob("base.*.json"))]
    for row in rows:
        row["wrong"] += other_losses(row, rows)
    device = f"{options.gpus} × {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    machine = f"{device}, torch {torch.__version__}, batch {options.values['batch_size']} × {options.accumulation}"
    write_json(report / "report.json", {"command": sys.argv, "machine": machine, "rows": rows})
    print(machine, table(rows), sep="\n\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
