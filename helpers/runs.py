"""A run's folder: its manifest, its steps, files that are whole or not there."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from helpers.processes import is_main, together, world_size
from helpers.recipes import TRAINING, Stage
from helpers.settings import PROJECT, ParameterError, Run, StageRun, read_value

PACKAGES = ("torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
WHOLE = 2**24  # bytes: a larger file is hashed by samples of it
SAMPLES, SAMPLE = 64, 2**16  # how many, and the bytes of each


def write_text(path: Path, text: str) -> None:
    """Write all or nothing: a killed process never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".part-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of `content` as JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """What a JSON file holds; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def file_hash(path: Path) -> str:
    """A hash over a file's content; of a large one over its size and 64 samples of 64 KiB, spread over all of it."""
    size = path.stat().st_size
    if size <= WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek((size - SAMPLE) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def progress_bar(total: int, done: int, name: str, unit: str, shown: bool = True) -> tqdm:
    """A text bar on stderr; where that is a log and no terminal, a new line at most every two seconds."""
    interval = 0.1 if sys.stderr.isatty() else 2.0
    hidden = {} if shown else {"disable": True}  # TQDM_DISABLE=1 hides those that are shown
    return tqdm(total=total, initial=done, desc=name, unit=unit, mininterval=interval, **hidden)


def quiet_libraries() -> None:
    """Keep notices that no reader can act on out of the outputs; errors and this project's own words stay."""
    for name in ("bitsandbytes", "torch.utils.cpp_extension"):  # the second: CUDA is installed, and there is no GPU
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of weights being loaded
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock beside `path`: two runs started side by side never make the same file at the same time.

    With `wait=False` ParameterError, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    if is_main():
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise ParameterError(f"another process is at work on {path}; wait for its end, or name another folder "
                                 "(a run: another run_name).") from None
    together().wait_for_everyone()
    try:
        yield
        together().wait_for_everyone()
    finally:
        lock.release()


def key(**inputs: Any) -> str:
    """A hash over everything a step depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rows_hash(rows: Any) -> str:
    """A hash over a `datasets.Dataset` of the project's schema: every picture's bytes, every box."""
    from datasets import Image

    digest = hashlib.sha256()
    for row in rows.cast_column("image", Image(decode=False)):
        digest.update(row["image"]["bytes"] or row["image"]["path"].encode())
        digest.update(json.dumps([row["image_id"], row["objects"]]).encode())
    return digest.hexdigest()[:16]


def training_values(run: Run, stage: Stage | None = None) -> dict[str, Any]:
    """The parameters that a training depends on: one stage, or all of the run's."""
    chosen_by = ("keep", "eval_steps", "eval_pictures", "max_new_tokens") if run.keep == "best" else ()
    values = {name: run.values[name] for name in (*TRAINING, *chosen_by)}
    if not any(one.reward for one in ([stage] if stage else [one.stage for one in run.stages])):
        values = {name: value for name, value in values.items() if not name.startswith("reward_")}
    return values | ({"recipe": stage.same_as} if stage and stage.same_as else {})


def trained_elsewhere(stage_run: StageRun, inputs: dict[str, Any]) -> bool:
    """Copy what a run beside this one has trained of exactly these `inputs`, and its log; False where there is none."""
    for steps in sorted(stage_run.folder.parent.glob(f"{PROJECT}-*/steps.json")):
        made, log = steps.parent / stage_run.result.name, steps.parent / "log.jsonl"
        if stage_run.stage.same_as and read_json(steps).get("train") == key(**inputs) and made.is_dir():
            if is_main():
                shutil.copytree(made, stage_run.result, dirs_exist_ok=True)
                shutil.copy(log, stage_run.folder)
            print(f"{stage_run.name}: taken over from {steps.parent}, which was trained with the same inputs")
            return True
    return False


def open_folder(run: Run, **inputs: Any) -> None:
    """Make the run's folders and manifests; refuse a folder that holds a run with other parameters or inputs.

    `inputs` are hashes of what the run reads (data, base model). Raises ParameterError that names the differences, or
    says that a process on another machine does not see the folder.
    """
    fixed = training_values(run) | inputs
    for folder in dict.fromkeys([run.folder, *(stage.folder for stage in run.stages)]):
        try:
            with exclusive(folder / "manifest.json"):
                _open_manifest(run, folder, fixed, inputs)
        except OSError as error:
            raise ParameterError(f"{folder} cannot be written ({error.strerror or error}); choose another output_root "
                                 "or run_name.") from None


def _open_manifest(run: Run, folder: Path, fixed: dict[str, Any], inputs: dict[str, Any]) -> None:
    before = read_json(folder / "manifest.json")
    if before:
        old = before["parameters"] | before["inputs"]
        changed = [f"{name} was {old.get(name)!r}, now {value!r}" for name, value in fixed.items()
                   if json.dumps(old.get(name), default=str) != json.dumps(value, default=str)]
        if changed:
            raise ParameterError(f"{folder} holds a run with other parameters ({'; '.join(changed)}); give this "
                                 "one a run_name of its own, or delete that folder.")
    manifest = before | {
        "run": folder.name, "recipe": run.recipe, "scale": run.scale, "command": command(run),
        "parameters": run.values, "inputs": inputs, "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(), "git": git_revision(), "machine": machine(),
        "processes": world_size(),
        "timings": before.get("timings", {}), "peak_memory": before.get("peak_memory", {}),
    }
    if is_main():
        write_json(folder / "manifest.json", manifest)
    together().wait_for_everyone()
    if not (folder / "manifest.json").is_file():
        raise ParameterError(f"{folder} is not seen by all machines: output_root must be a folder they share.")


def continue_wandb(folder: Path) -> None:
    """Make W&B go on with this folder's run, whose id the manifest keeps; each stage has a run of its own."""
    import wandb

    manifest = read_json(folder / "manifest.json")
    run_id = manifest.get("wandb_run_id") or uuid.uuid4().hex[:8]
    if is_main():
        if wandb.run is None or wandb.run.id != run_id:
            wandb.finish()  # the run of a stage before this one
            wandb.teardown()  # W&B reads the environment anew only after it
        write_json(folder / "manifest.json", manifest | {"wandb_run_id": run_id})
    os.environ.update(WANDB_RUN_ID=run_id, WANDB_RESUME="allow")


@contextlib.contextmanager
def step(folder: Path, name: str, inputs: dict[str, Any], made: Path | None = None, *, run_folder: Path | None = None,
         wait: bool = True) -> Iterator[bool]:
    """One step of a run: `with runs.step(folder, "merge", inputs, made=path) as todo:`, and in it `if todo:`.

    `todo` is False where `folder` says that the step was finished with exactly these `inputs` (anything that JSON can
    hold) and `made` is still there: a file's existence alone proves nothing. Other processes wait (or, with
    `wait=False`, are refused by ParameterError). A step that ends without an error is marked as done, and its seconds
    and peak memory go into the manifest of `run_folder` (None: `folder`) and are printed.
    """
    step_key = key(**inputs)
    with exclusive(folder / name, wait):
        done = read_json(folder / "steps.json").get(name) == step_key and (made is None or made.exists())
        if done:
            yield False
            return
        start = time.perf_counter()
        yield True
        if is_main():
            write_json(folder / "steps.json", read_json(folder / "steps.json") | {name: step_key})
        _note_time(run_folder or folder, Path(name).stem, time.perf_counter() - start)


def _note_time(folder: Path, name: str, seconds: float) -> None:
    manifest, memory = read_json(folder / "manifest.json"), peak_memory()
    manifest["timings"][name] = round(manifest["timings"].get(name, 0) + seconds, 2)
    manifest["peak_memory"] |= {where: max(gib, manifest["peak_memory"].get(where, 0)) for where, gib in memory.items()}
    if is_main():
        write_json(folder / "manifest.json", manifest)
    peaks = ", ".join(f"{gib:.2f} GiB {where}" for where, gib in memory.items())
    print(f"{name}: {seconds:.1f} s, peak memory {peaks}")


def peak_memory() -> dict[str, float]:
    """GiB: this process's largest resident set, and the largest allocation on each GPU."""
    import torch

    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, KiB on Linux
    peaks = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    for i in range(torch.cuda.device_count()):
        peaks[f"gpu{i}"] = round(torch.cuda.max_memory_allocated(i) / 2**30, 2)
    return peaks


def report(run: Run) -> dict[str, Any]:
    """Seconds of each step and peak memory in GiB of all stages, from their manifests."""
    folders = [stage.folder for stage in run.stages] or [run.folder]
    manifests = [read_json(folder / "manifest.json") for folder in folders]
    return {m["run"]: {"seconds": m["timings"], "peak memory (GiB)": m["peak_memory"]} for m in manifests}


def command(run: Run) -> str:
    """The command that makes this run again."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        words = ["papermill", "pipeline.ipynb", "out.ipynb"]
        for name, value in run.given.items():  # -r: text that papermill would otherwise take for a number
            words += ["-r" if isinstance(value, str) and read_value(value) != value else "-p", name, str(value)]
        return shlex.join(words)
    return shlex.join(["python", "pipeline.py", *(f"{name}={value}" for name, value in run.given.items())])


def git_revision() -> str | None:
    """The commit, with `+` where files differ from it that a run could depend on; None outside a repository.

    No run depends on notebooks' outputs, nor on the results that `make table ARGS=--write` has just written.
    """
    made = ("*.ipynb", "*.png", "results.json", "README.md")
    here, no_outputs = Path(__file__).parent, (":/", *(f":(top,exclude){name}" for name in made))
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno", "--", *no_outputs], cwd=here,
                               capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None


def machine() -> str:
    """Cores and GPUs, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} CPU cores, {', '.join(gpus) if gpus else 'no GPU'}"
