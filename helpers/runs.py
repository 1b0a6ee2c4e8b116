"""A run: its parameters settled, its folder, its manifest, what is done already and what goes on from where."""

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers import parameters
from helpers.parameters import PARAMETERS, ParameterError
from helpers.recipes import DISK_GIB, GPU_GIB, RECIPES, SCALES, Stage

PROJECT = "qwen2vl-nutrition-detection"
PACKAGES = ("torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
# These may differ between two starts of one run; every other parameter makes it another run.
FREE = {"gpus", "output_root", "run_name", "report_to", "save_steps", "predict_batch_size"}
TINY_BASE = Path(__file__).parent / "tiny"


@dataclass
class StageRun:
    """One stage of this run: the recipe's stage, with its folder."""

    stage: Stage
    name: str
    folder: Path
    learning_rate: float


@dataclass
class Run:
    """The parameters with every default filled in (`run.epochs`), and what follows from them."""

    values: dict[str, Any]
    given: dict[str, Any]
    stages: list[StageRun]
    folder: Path  # of the last stage: predictions, metrics, figures
    manifest: dict = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"a run has no parameter {name}; it has {', '.join(PARAMETERS)}") from None


def is_main() -> bool:
    """True in the one process that writes (rank 0 under a launcher, or the only one)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*words: Any) -> None:
    """print, in one process only."""
    if is_main():
        print(*words, flush=True)


def settle(namespace: dict) -> Run:
    """Read the parameters from `namespace` (a notebook's or script's `globals()`), check them, fill in the rest.

    Raises ParameterError, before any work, for an unknown or misspelled name, a value of the wrong type or out of
    range, no GPU for the 7B scale, a folder that cannot be written, too little room on its disk.
    """
    given = parameters.given(namespace)
    values = {name: namespace[name] for name in PARAMETERS}
    parameters.check(values)
    parameters.choose_gpus(values["gpus"])
    values["scale"] = _choose_scale(values["scale"], values["recipe"])
    for name, default in SCALES[values["scale"]].items():
        values[name] = default if values[name] is None else values[name]
    parameters.check(values)
    if values["model_id"] == "embedded":
        values["model_id"] = str(TINY_BASE)
    elif values["model_id"].startswith((".", "/", "~")) and not Path(values["model_id"]).expanduser().is_dir():
        raise ParameterError(f"model_id={values['model_id']!r}: there is no such folder.")
    _check_output(values)
    name = values["run_name"] or values["recipe"]
    stages = [_stage_run(stage, name, values) for stage in RECIPES[values["recipe"]]]
    folder = stages[-1].folder if stages else Path(values["output_root"]) / f"{PROJECT}-{name}"
    return Run(values, given, stages, folder)


def _stage_run(stage: Stage, name: str, values: dict) -> StageRun:
    if values["precision"] and stage.trains == "lora":
        stage = replace(stage, precision=values["precision"])
    short = name.replace("r3-two-stage", "r3") + stage.suffix
    folder = Path(values["output_root"]) / f"{PROJECT}-{short}"
    return StageRun(stage, short, folder, values["learning_rate"] or stage.learning_rate[values["scale"]])


def _choose_scale(scale: str, recipe: str) -> str:
    """`auto` -> `7b` where the visible GPUs have room for this recipe, else `tiny`; says which and why."""
    import torch

    need = GPU_GIB[recipe]
    sizes = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(torch.cuda.device_count())]
    world = int(os.environ.get("WORLD_SIZE", 1))
    room = (min(sizes) if world > 1 else sum(sizes)) if sizes else 0
    seen = f"{len(sizes)} GPU(s) with {room:.0f} GiB" if sizes else "no GPU"
    if scale == "7b" and room < need:
        raise ParameterError(f"scale=7b with recipe={recipe} needs {need} GiB of GPU memory, and this machine shows "
                             f"{seen}; take a larger GPU, or scale=tiny.")
    if scale == "auto":
        scale = "7b" if room >= need else "tiny"
        say(f"scale auto -> {scale}: {recipe} at 7B needs {need} GiB of GPU memory, and there is {seen}.")
    return scale


def _check_output(values: dict) -> None:
    root = Path(values["output_root"]).expanduser()
    values["output_root"] = str(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ParameterError(f"output_root={str(root)!r} cannot be written ({error.strerror}).") from None
    need = DISK_GIB.get(values["scale"], {}).get(values["recipe"], 0.5)
    free = shutil.disk_usage(root).free / 2**30
    if free < need:
        raise ParameterError(f"output_root={str(root)!r} has {free:.1f} GiB free, and recipe={values['recipe']} at "
                             f"scale={values['scale']} needs about {need}; choose another disk.")


def check_model(model_id: str, revision: str | None) -> None:
    """Raise ParameterError unless the model's config.json is there: a cheap test of the folder or of Hub access."""
    if Path(model_id).expanduser().is_dir():
        if not (Path(model_id).expanduser() / "config.json").is_file():
            raise ParameterError(f"model_id={model_id!r} is a folder without config.json; is it a model's folder?")
        return
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model_id, "config.json", revision=revision)
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ParameterError(
            f"model_id={model_id!r} cannot be had from the Hub ({type(error).__name__}: {why}); check the name, the "
            "network and HF_TOKEN, or give a local folder, or scale=tiny.") from None


def report_target(report_to: str, scale_folder: Path) -> str:
    """`auto` -> `wandb` where there are credentials, else `tensorboard`; never a login prompt."""
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    netrc = Path.home() / ".netrc"
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())
    if report_to == "wandb" and not (logged_in or offline):
        raise ParameterError("report_to=wandb finds no credentials: set WANDB_API_KEY or run `wandb login`, or set "
                             "WANDB_MODE=offline, or choose tensorboard or none.")
    if report_to == "auto":
        report_to = "wandb" if logged_in and not offline else "tensorboard"
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(scale_folder))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(scale_folder / "tensorboard"))
    return report_to


def write_json(path: Path, content: Any) -> None:
    """Write all or nothing: a killed process never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".part-{os.getpid()}")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def key(**inputs: Any) -> str:
    """A hash over everything a step depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def files_hash(folder: str | Path) -> str:
    """A hash over a model folder's files (name and content; for a Hub id, of the name)."""
    folder = Path(folder)
    if not folder.is_dir():
        return str(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        if path.suffix == ".json" or path.stat().st_size < 2**28:
            digest.update(path.read_bytes())
        else:
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def open_folder(run: Run, **inputs: Any) -> None:
    """Make the run's folders and manifests; refuse a folder that holds a run with other parameters or inputs.

    `inputs` are hashes of what the run reads (data, base model). Raises ParameterError that names the differences.
    """
    fixed = {name: value for name, value in run.values.items() if name not in FREE} | inputs
    for folder in {run.folder, *(stage.folder for stage in run.stages)}:
        before = read_json(folder / "manifest.json")
        if before:
            old = before["parameters"] | before["inputs"]
            changed = [f"{name} was {old.get(name)!r}, now {value!r}" for name, value in fixed.items()
                       if json.dumps(old.get(name), default=str) != json.dumps(value, default=str)]
            if changed:
                raise ParameterError(f"{folder} holds a run with other parameters ({'; '.join(changed)}); give this "
                                     "one a run_name of its own, or delete that folder.")
        run.manifest = before or {}
        run.manifest |= {
            "run": folder.name, "recipe": run.recipe, "scale": run.scale, "command": command(run),
            "parameters": run.values, "inputs": inputs, "versions": {name: version(name) for name in PACKAGES},
            "python": platform.python_version(), "git": git_revision(), "machine": machine(),
            "timings": run.manifest.get("timings", {}), "peak_memory": run.manifest.get("peak_memory", {}),
        }
        if is_main():
            write_json(folder / "manifest.json", run.manifest)


@contextlib.contextmanager
def timed(folder: Path, step: str) -> Iterator[None]:
    """Add a step's seconds and the process's peak memory to the folder's manifest, and print them."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    manifest = read_json(folder / "manifest.json")
    memory = peak_memory()
    manifest["timings"][step] = round(manifest["timings"].get(step, 0) + seconds, 2)
    manifest["peak_memory"] |= {where: max(gib, manifest["peak_memory"].get(where, 0)) for where, gib in memory.items()}
    if is_main():
        write_json(folder / "manifest.json", manifest)
    say(f"{step}: {seconds:.1f} s, peak memory " + ", ".join(f"{gib:.2f} GiB {name}" for name, gib in memory.items()))


def peak_memory() -> dict[str, float]:
    """GiB: this process's largest resident set, and the largest allocation on each GPU."""
    import torch

    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss: bytes on macOS, KiB on Linux
    peaks = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    for i in range(torch.cuda.device_count()):
        peaks[f"gpu{i}"] = round(torch.cuda.max_memory_allocated(i) / 2**30, 2)
    return peaks


def is_done(folder: Path, step: str, step_key: str) -> bool:
    """Was this step finished with exactly these inputs? A file's existence alone proves nothing."""
    return read_json(folder / "steps.json").get(step) == step_key


def mark_done(folder: Path, step: str, step_key: str) -> None:
    if is_main():
        write_json(folder / "steps.json", read_json(folder / "steps.json") | {step: step_key})


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint (its `complete` file is written last), or None."""
    whole = [path.parent for path in folder.glob("checkpoint-*/complete")]
    return str(max(whole, key=lambda path: int(re.search(r"\d+$", path.name)[0]))) if whole else None


def command(run: Run) -> str:
    """The command that makes this run again."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        words = [word for name, value in run.given.items() for word in ("-p", name, str(value))]
        return shlex.join(["papermill", "pipeline.ipynb", "out.ipynb", *words])
    return shlex.join(["python", "pipeline.py", *(f"{name}={value}" for name, value in run.given.items())])


def git_revision() -> str | None:
    """The commit, with `+` where files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None


def machine() -> str:
    """Cores and GPUs, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} CPU cores, {', '.join(gpus) if gpus else 'no GPU'}"
