"""Runs killed at random moments end as undisturbed ones do: the same losses, completions and weights, bit for bit.

A small run gets a SIGKILL while it starts, after the baseline, between two steps, while a checkpoint is written, while
it predicts, while its model is saved or merged, and is started again each time. It may lose no more than the steps
since its last whole checkpoint.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline_runner import SOURCE

from helpers.recipes import RECIPES
from helpers.runs import file_hash
from helpers.settings import PROJECT
from helpers.trainer import is_complete, last_checkpoint, read_log

SAVE_STEPS = 2
SMALL = ("scale=tiny", "train_limit=24", "val_limit=4", "epochs=2", "batch_size=4", f"save_steps={SAVE_STEPS}",
         "predict_batch_size=2", "max_new_tokens=64", "reward_steps=4", "report_to=none")
SEED = os.environ.get("KILL_TEST", "")  # another one: other moments
MOMENTS = ("start", "baseline", "step", "checkpoint", "step", "evaluation", "saving")
PATIENCE = 600  # seconds until a run that does not end counts as hung
LONGEST_WAIT = {"start": 8.0, "baseline": 0.0, "step": 0.3, "checkpoint": 0.03, "evaluation": 0.6, "saving": 0.4}


def start(recipe: str, root: Path) -> subprocess.Popen:
    """`pipeline.py`, small, in a session of its own, so that all of its processes can be killed at once."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(root / "cache")}
    with root.with_suffix(".log").open("a") as file:
        return subprocess.Popen([sys.executable, str(SOURCE), f"recipe={recipe}", *SMALL, f"output_root={root}"],
                                stdout=file, stderr=file, env=environment, start_new_session=True)


def finish(process: subprocess.Popen, root: Path) -> None:
    """Wait for its end; it must be a good one."""
    assert process.wait(PATIENCE) == 0, root.with_suffix(".log").read_text()[-3000:]


def stages(recipe: str, root: Path) -> list[Path]:
    name = recipe.replace("r3-two-stage", "r3")
    return [root / f"{PROJECT}-{name}{stage.suffix}" for stage in RECIPES[recipe]]


def steps_done(folders: list[Path]) -> int:
    return sum(len(read_log(folder / "log.jsonl")) for folder in folders)


def reached(moment: str, folders: list[Path], after: int) -> bool:
    """Is the run in this moment? `after`: steps or checkpoints of all stages that must be there already."""
    if moment == "step":
        return steps_done(folders) > after
    if moment == "checkpoint":
        found = [path for folder in folders for path in folder.glob("checkpoint-*")]
        return any(not is_complete(path) for path in found) and sum(map(is_complete, found)) >= min(after, 2)
    if moment == "baseline":  # the next start finds it, and must begin to train as one that makes it does
        return any(folders[-1].parent.glob("baselines/*/baseline.jsonl"))
    if moment == "evaluation":
        return (folders[-1] / "predictions.parts").exists()
    return moment == "start" or any(folders[-1].parent.glob("*-merged.part")) or (folders[-1] / "model.part").exists()


def killed_at(moment: str, recipe: str, root: Path, draw: random.Random) -> bool:
    """Start the run, kill it in that moment and a little later; False where it had ended before."""
    process, folders, began = start(recipe, root), stages(recipe, root), time.monotonic()
    after = steps_done(folders) + draw.randrange(4) if moment == "step" else draw.randrange(3)
    while not reached(moment, folders, after) and process.poll() is None:
        assert time.monotonic() - began < PATIENCE, f"{recipe} hangs before {moment}"
        time.sleep(0.001)
    time.sleep(draw.uniform(0, LONGEST_WAIT[moment]))
    if process.poll() is not None:
        finish(process, root)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def steps_lost(folders: list[Path]) -> int:
    """Steps of the stage that was training, since its last whole checkpoint."""
    folder = next((folder for folder in reversed(folders) if read_log(folder / "log.jsonl")), folders[0])
    log, last = read_log(folder / "log.jsonl"), last_checkpoint(folder)
    return (log[-1]["step"] if log else 0) - (int(last.rpartition("-")[2]) if last else 0)


def results(recipe: str, root: Path) -> Iterator[tuple[str, object]]:
    """(What, its value) of all that must be the same: losses, completions, weights."""
    for folder in stages(recipe, root):
        yield f"losses of {folder.name}", [(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl")]
    for name in ("baseline.jsonl", "predictions.jsonl", "merged.jsonl"):
        path = stages(recipe, root)[-1] / name
        yield name, path.read_text() if path.is_file() else None
    for path in sorted(root.glob(f"{PROJECT}-*/**/*.safetensors")):
        yield str(path.relative_to(root)), file_hash(path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name, stages in RECIPES.items() if stages])
def test_sigkill_at_random_moments_loses_nothing(recipe, tmp_path):
    draw, kills = random.Random(f"{SEED} {recipe}"), 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(recipe, whole), whole)
    moments = MOMENTS
    if RECIPES[recipe][-1].trains == "full":  # its model is saved before it predicts; others are merged after
        moments = sorted(MOMENTS, key=lambda moment: moment == "evaluation")
    for moment in moments:
        if killed_at(moment, recipe, killed, draw):
            kills += 1
            lost = steps_lost(stages(recipe, killed))
            print(f"{recipe}: killed at {moment}, {lost} steps lost", flush=True)
            assert lost <= SAVE_STEPS, f"{lost} steps are lost, and a checkpoint comes every {SAVE_STEPS}"
    assert kills >= 2  # a fast machine may end before the last
    finish(start(recipe, killed), killed)
    expected, found = dict(results(recipe, whole)), dict(results(recipe, killed))
    assert [name for name in expected | found if expected.get(name) != found.get(name)] == []
