"""Kill small runs at random moments and start them again: `python -m helpers.dev.kill_resume` (or `make kill-test`).

Each recipe runs once undisturbed and once with a SIGKILL in every kind of moment: while it starts, between two steps,
while a checkpoint is written, while it predicts, while the model is saved or merged. Then it must have lost at most
the steps since its last whole checkpoint, and end with the same losses, answers and weights, bit for bit. It needs a
CPU only, and some minutes. The last lines are a table of what was killed when and what was lost.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.checkpoints import checkpoints, is_complete, last_checkpoint
from helpers.files import file_hash
from helpers.recipes import RECIPES
from helpers.settings import PROJECT
from helpers.trainlog import read_log

PIPELINE = Path(__file__).resolve().parents[2] / "pipeline.py"
SAVE_STEPS = 2
SMALL = ("scale=tiny", "train_limit=24", "val_limit=4", "epochs=2", "batch_size=4", f"save_steps={SAVE_STEPS}",
         "predict_batch_size=2", "max_new_tokens=48", "report_to=none")
MOMENTS = ("start", "step", "checkpoint", "step", "evaluation", "saving")
PATIENCE = 600  # seconds until a run that does not end counts as hung
LONGEST_START, LONGEST_WAIT = 8.0, {"step": 0.3, "checkpoint": 0.03, "evaluation": 0.6, "saving": 0.4}


@dataclass
class Kill:
    """One kill: which moment was meant, what stood there then. Steps are of the stage that was training."""

    recipe: str
    moment: str
    stage: str
    step: int  # the last one logged
    checkpoint: int  # the last whole checkpoint, 0 for none
    half: int  # checkpoints that were cut off

    @property
    def lost(self) -> int:
        return self.step - self.checkpoint


def start(recipe: str, root: Path, log: Path) -> subprocess.Popen:
    """`pipeline.py`, small, in a session of its own, so that all of its processes can be killed at once."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1",
                                "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, str(PIPELINE), f"recipe={recipe}", *SMALL, f"output_root={root}"],
                                stdout=file, stderr=file, env=environment, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for its end; AssertionError with its last words where it fails."""
    status = process.wait(PATIENCE)
    assert status == 0, f"the run ended with {status}: {log.read_text()[-3000:]}"


def stages(recipe: str, root: Path) -> list[Path]:
    name = recipe.replace("r3-two-stage", "r3")
    return [root / f"{PROJECT}-{name}{stage.suffix}" for stage in RECIPES[recipe]]


def reached(moment: str, recipe: str, root: Path, after: int) -> bool:
    """Is the run in this moment? `after`: steps or checkpoints of all stages that must be there already."""
    folders = stages(recipe, root)
    if moment == "step":
        return sum(len(read_log(folder / "log.jsonl")) for folder in folders) > after
    if moment == "checkpoint":
        found = [path for folder in folders for path in checkpoints(folder)]
        return any(not is_complete(path) for path in found) and sum(map(is_complete, found)) >= min(after, 2)
    if moment == "evaluation":
        return (folders[-1] / "predictions.parts").exists()
    return any(root.glob("*-merged.part")) or (folders[-1] / "model.part").exists()


def kill_at(moment: str, recipe: str, root: Path, draw: random.Random) -> Kill | None:
    """Start the run, kill it in that moment and a little later; None where it had ended before."""
    log = root.with_suffix(".log")
    process = start(recipe, root, log)
    began, wait = time.monotonic(), draw.uniform(0, LONGEST_WAIT.get(moment, LONGEST_START))
    done = sum(len(read_log(folder / "log.jsonl")) for folder in stages(recipe, root))
    after = done + draw.randrange(4) if moment == "step" else draw.randrange(3)
    while moment != "start" and not reached(moment, recipe, root, after):
        if process.poll() is not None:
            finish(process, log)
            return None
        assert time.monotonic() - began < PATIENCE, f"{recipe} hangs before {moment}"
        time.sleep(0.001)
    time.sleep(wait)
    if process.poll() is not None:
        finish(process, log)
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return what_stands(moment, recipe, root)


def what_stands(moment: str, recipe: str, root: Path) -> Kill:
    """What the killed run has left, in the stage that was training last."""
    begun = [folder for folder in stages(recipe, root) if read_log(folder / "log.jsonl")] or stages(recipe, root)[:1]
    folder, last = begun[-1], last_checkpoint(begun[-1])
    steps = read_log(folder / "log.jsonl")
    return Kill(recipe, moment, folder.name.removeprefix(f"{PROJECT}-"), steps[-1]["step"] if steps else 0,
                int(last.rpartition("-")[2]) if last else 0, sum(not is_complete(path) for path in checkpoints(folder)))


def results(recipe: str, root: Path) -> Iterator[tuple[str, object]]:
    """(What, its value) of all that must be the same: losses, answers, scores, weights."""
    for folder in stages(recipe, root):
        yield f"losses of {folder.name}", [(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl")]
    for name in ("baseline.jsonl", "predictions.jsonl", "merged.jsonl"):
        path = stages(recipe, root)[-1] / name
        yield name, path.read_text() if path.is_file() else None
    for path in sorted(root.glob(f"{PROJECT}-*/**/*.safetensors")):
        yield str(path.relative_to(root)), file_hash(path)


def trial(recipe: str, folder: Path, moments: tuple[str, ...], seed: int) -> list[Kill]:
    """Kill one recipe's run in each of `moments` and let it end; AssertionError where anything differs or is lost."""
    draw, kills = random.Random(f"{seed} {recipe}"), []
    folder.mkdir(parents=True, exist_ok=True)
    whole, killed = folder / f"{recipe}-whole", folder / f"{recipe}-killed"
    for root in (whole, killed):
        assert not root.exists(), f"{root} is left from an earlier trial; delete it"
    finish(start(recipe, whole, whole.with_suffix(".log")), whole.with_suffix(".log"))
    if RECIPES[recipe][-1].trains == "full":  # its model is saved before it predicts; others are merged after
        moments = tuple(sorted(moments, key=lambda moment: moment == "evaluation"))
    for moment in moments:
        kill = kill_at(moment, recipe, killed, draw)
        if kill:
            kills.append(kill)
            print(f"{recipe}: killed at {moment}, {kill.stage} step {kill.step}, last whole checkpoint "
                  f"{kill.checkpoint}, {kill.half} cut off", flush=True)
            assert kill.lost <= SAVE_STEPS, f"{kill.lost} steps are lost, and a checkpoint comes every {SAVE_STEPS}"
    finish(start(recipe, killed, killed.with_suffix(".log")), killed.with_suffix(".log"))
    expected, found = dict(results(recipe, whole)), dict(results(recipe, killed))
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    assert not different, f"{recipe} differs after {len(kills)} kills: {', '.join(different)}"
    print(f"{recipe}: the same losses, answers and weights after {len(kills)} kills", flush=True)
    return kills


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.kill_resume", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-test"), help="where it works (must be new)")
    parser.add_argument("--recipes", nargs="*", default=[name for name, stages in RECIPES.items() if stages])
    parser.add_argument("--moments", nargs="*", default=MOMENTS, choices=sorted(set(MOMENTS)))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    kills: list[Kill] = []
    try:
        for recipe in chosen.recipes:
            kills += trial(recipe, chosen.folder.resolve(), tuple(chosen.moments), chosen.seed)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    print("| moment | kills | checkpoints cut off | most steps lost |\n|---|---|---|---|")
    for moment in dict.fromkeys(MOMENTS):
        own = [kill for kill in kills if kill.moment == moment]
        if own:
            print(f"| {moment} | {len(own)} | {sum(kill.half for kill in own)} | {max(kill.lost for kill in own)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
