"""The whole pipeline at 7B without a download: `python -m helpers.dev.check_7b --folder /big/disk/check`.

Builds the published 7B architecture with random weights and pictures at the real pixel budget, then runs pipeline.py
itself for each recipe: train, be killed after a checkpoint, resume, predict a batch, merge, reload. Prints one table of
times and memory, and ends with 1 where a recipe failed. Boxes and losses mean nothing here. With `--gpus 2` each recipe
also trains in the other ways of using the GPUs, and the losses must agree. A second call keeps the model and adds its
columns to the report.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from helpers.dev.random_7b import PUBLISHED, SHRUNKEN, write_model, write_pictures
from helpers.recipes import IMAGE_TOKEN, LOW_MEMORY, RECIPES, SCALES
from helpers.runs import read_json, write_json
from helpers.settings import PROJECT
from helpers.trainer import is_complete, read_log

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
TRAINED = [recipe for recipe, stages in RECIPES.items() if stages]
WEIGHTS = 8_291_375_616  # the published index: 16,582,751,232 bytes of bf16
CAPPED = ("r1-llm-only", "r4-joint", "base")  # the ones promised to fit a card of 24 GiB, or of 16 with memory=low
WAYS = ("one process", "one GPU", "processes")
NEW_TOKENS = 128  # random weights never stop sooner
KILLED, LATE = "killed as planned", "stopped by --minutes"  # how a run ended, else its exit code


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/check-7b"), help="90 GB free; report in report/")
    parser.add_argument("--recipes", nargs="+", default=TRAINED, choices=list(RECIPES))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help=f"the first runs whole, the others only train "
                        f"(default with several GPUs: {', '.join(WAYS)})")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, help="default: the scale's own")
    parser.add_argument("--completions", type=int, help="sampled of each picture by r5; default: the scale's own")
    parser.add_argument("--memory", choices=["low"], help="the pipeline's parameter, for a card of 16 GiB")
    parser.add_argument("--cap-gib", type=float, help=f"default: 24, or 15 with --memory low, for {', '.join(CAPPED)}")
    parser.add_argument("--no-kill", action="store_true", help="nothing is killed and resumed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything together; then it stops")
    parser.add_argument("--tiny", action="store_true", help="a shrunken model, no GPU needed")
    options = parser.parse_args(words)
    options.values = SCALES["7b"] | (LOW_MEMORY["7b"] if options.memory else {})
    options.accumulation = options.accumulation or options.values["accumulation"]
    options.completions = options.completions or (2 if options.tiny else options.values["reward_completions"])
    options.val = 2 if options.tiny else options.values["predict_batch_size"]
    options.ways = options.ways or (WAYS if options.gpus > 1 else ["one GPU"])
    options.deadline = time.monotonic() + 60 * options.minutes
    return options


def cap(options: argparse.Namespace, recipe: str) -> float:
    """GiB that PyTorch may reserve on a GPU; 0: no cap."""
    return options.cap_gib or (recipe in CAPPED and (15 if options.memory else 24)) or 0


def pipeline_arguments(options: argparse.Namespace, recipe: str, runs: Path) -> list[str]:
    """What pipeline.py is called with: the 7B scale's own values, on this model and these pictures."""
    given = {
        "recipe": recipe, "scale": "7b", "model_id": options.folder / "model",
        "dataset_id": options.folder / "pictures", "output_root": runs, "epochs": 1,
        "accumulation": options.accumulation, "save_steps": options.steps // 2, "report_to": "none",
        "max_new_tokens": NEW_TOKENS, "memory": options.memory, "reward_steps": options.steps,
        "reward_completions": options.completions,
    }  # fmt: skip
    if options.tiny:  # no GPU, so scale 7b would be refused: its values one by one, and small pictures
        values = {name: value for name, value in options.values.items() if not name.endswith("_id")}
        pixels = {"min_pixels": 16 * IMAGE_TOKEN, "max_pixels": 64 * IMAGE_TOKEN}
        given = values | given | pixels | {"scale": "tiny"}
    return [f"{name}={value}" for name, value in given.items()]


def run_recipe(options: argparse.Namespace, recipe: str, way: str) -> None:
    """Run one recipe in one way, killed at half of its steps and started again, and write its row of the report."""
    report, name, start = options.folder / "report", f"{recipe}.{way.replace(' ', '-')}", time.perf_counter()
    runs, log = options.folder / "runs" / name, report / f"{name}.log"
    if not runs.exists():  # else --minutes stopped it, and it goes on
        log.unlink(missing_ok=True)
    folders = [runs / f"{PROJECT}-{recipe.replace('r3-two-stage', 'r3')}{stage.suffix}" for stage in RECIPES[recipe]]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    command = [sys.executable, *(launch if way == "processes" else []), str(PIPELINE),
               *pipeline_arguments(options, recipe, runs)]
    seconds: list[float] = []
    started = partial(run_until, command=command, log=log, deadline=options.deadline, folders=folders, seconds=seconds,
                      environment=surroundings(options, recipe, 1 if way == "one GPU" else options.gpus))
    whole, half, ends, expected = way == options.ways[0], options.steps // 2, [], []
    if whole and folders and not options.no_kill:
        ends.append(started(lambda: is_complete(folders[0] / f"checkpoint-{half}")))
        expected.append(KILLED)
    ends.append(started(lambda: not whole and "train" in read_json(folders[-1] / "manifest.json").get("timings", {})))
    expected.append(0 if whole else KILLED)
    print(f"{recipe}, {way}: {', '.join(map(str, ends))}, {time.perf_counter() - start:.0f} s", flush=True)
    said = log.read_text() if log.is_file() else ""
    if ends != expected:
        print(*said.splitlines()[-30:], sep="\n", flush=True)
    row = {"recipe": recipe, "way": way, "cap_gib": cap(options, recipe), "ends": ends, "step_seconds": seconds,
           "total_seconds": round(time.perf_counter() - start)} | measured(runs, folders)  # fmt: skip
    row["wrong"] = [] if ends == expected else [f"ended with {ends}, expected {expected}"]
    if len(ends) > 1 and f"goes on from checkpoint-{half}" not in said:
        row["wrong"].append(f"does not go on from checkpoint-{half}")
    write_json(report / f"{name}.json", row)
    if LATE not in ends:
        shutil.rmtree(runs, ignore_errors=True)


def measured(runs: Path, folders: list[Path]) -> dict:
    """What a run has left: the losses of its stages, each step's seconds, the fullest GPU's peak and disk in GiB."""
    manifests = [read_json(file) for file in sorted(runs.glob(f"{PROJECT}-*/manifest.json"))]
    peaks = [gib for one in manifests for where, gib in one["peak_memory"].items() if where != "host"]
    return {
        "losses": [line["loss"] for folder in folders for line in read_log(folder / "log.jsonl") if "loss" in line],
        "seconds": {f"{one['run'].removeprefix(f'{PROJECT}-')} {step}": took
                    for one in manifests for step, took in one["timings"].items()},
        "gib": max(peaks, default=0),
        "disk_gib": sum(file.stat().st_size for file in runs.rglob("*") if file.is_file()) / 2**30,
    }  # fmt: skip


def surroundings(options: argparse.Namespace, recipe: str, gpus: int) -> dict[str, str]:
    """The environment of a run: so many GPUs, of each no more than the cap."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[:gpus]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(options.folder / "huggingface"),
                                "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ",".join(shown)}
    if cap(options, recipe) and torch.cuda.is_available():
        share = cap(options, recipe) * 2**30 / torch.cuda.get_device_properties(0).total_memory
        environment["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
    return environment


def run_until(stop: Callable[[], bool], command: list[str], log: Path, environment: dict[str, str], deadline: float,
              folders: Sequence[Path] = (), seconds: list[float] | None = None) -> int | str:  # fmt: skip
    """Run `command`, its output going to `log`: its exit code, or why it and its children got a SIGKILL.

    `seconds` grows by what each step took, as the logs of `folders` tell it; the first one after a start takes longer.
    """
    if time.monotonic() > deadline:
        return LATE
    with log.open("a") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    steps, last = 0, time.perf_counter()
    while child.poll() is None:
        logged, now = sum(len(read_log(folder / "log.jsonl")) for folder in folders), time.perf_counter()
        if logged != steps:
            if logged == steps + 1 and seconds is not None:
                seconds.append(round(now - last, 3))
            steps, last = logged, now
        if stop() or time.monotonic() > deadline:
            children = psutil.Process(child.pid).children(recursive=True)
            for process in [*children, child]:
                process.kill()
            child.wait()
            psutil.wait_procs(children, timeout=10)  # what they have of a GPU's memory is free then
            return LATE if time.monotonic() > deadline else KILLED
        time.sleep(0.01)
    return child.returncode


def other_losses(row: dict, rows: list[dict]) -> list[str]:
    """A sentence where the recipe's losses on one GPU are more than 2 % from this row's: dropout explains less."""
    alone = [other for other in rows if (other["recipe"], other["way"]) == (row["recipe"], "one GPU")]
    pairs = list(zip(row["losses"], alone[0]["losses"], strict=False)) if alone else []
    return [] if np.allclose(*np.transpose(pairs or [(0, 0)]), rtol=0.02) else [f"losses, and on one GPU: {pairs}"]


def table(rows: list[dict]) -> str:
    """The report in Markdown, a line a recipe and way."""
    heads = ["", "cap, GiB", "most GiB", "steps, s", "and, s", "losses", "disk, GiB", "all of it, s", "wrong"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        steps = row["step_seconds"]
        lines.append([
            f"{row['recipe']}, {row['way']}", f"{row['cap_gib'] or 'none'}", f"{row['gib']:.1f}",
            f"{len(steps)} × {statistics.median(steps):.2f}" if steps else "–",
            ", ".join(f"{step} {took:.1f}" for step, took in row["seconds"].items()),
            " ".join(f"{loss:.3f}" for loss in row["losses"]), f"{row['disk_gib']:.1f}", f"{row['total_seconds']}",
            "; ".join(row["wrong"]) or "nothing"])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
