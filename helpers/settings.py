"""Parameters -> a run that is settled: the scale, every default, the folders; refused here if it cannot work."""

import functools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import parameters
from helpers.parameters import PARAMETERS, ParameterError
from helpers.recipes import DISK_GIB, GPU_GIB, LOW_GPU_GIB, LOW_MEMORY, RECIPES, REVISIONS, SCALES, Stage

PROJECT = "qwen2vl-nutrition-detection"
TINY_BASE = Path(__file__).parent / "tiny"


def run_folder(run: str, holds: str, runs: str | Path = "runs") -> Path | None:
    """The folder of a run, given by name or folder, that holds this file; None where there is none."""
    places = [Path(run).expanduser(), Path(runs) / run, Path(runs) / f"{PROJECT}-{run}"]
    places += [Path(runs) / f"{PROJECT}-r3-stage2"] if run == "r3-two-stage" else []
    return next((place for place in places if (place / holds).is_file()), None)


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

    @property
    def model_path(self) -> str:
        """What `from_pretrained` takes: a folder or a Hub id."""
        return local_model(self.values["model_id"]) or self.values["model_id"]

    @property
    def merged_folder(self) -> Path:
        """Where the merged model goes."""
        return Path(self.values["output_root"]) / f"{PROJECT}-{_short(self.values)}-merged"

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"a run has no parameter {name}; it has {', '.join(PARAMETERS)}") from None


def is_main() -> bool:
    """True in the one process that writes (rank 0 under a launcher, or the only one)."""
    return int(os.environ.get("RANK", 0)) == 0


def take_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Make `handler` take SIGTERM and SIGINT (Ctrl-C, a notebook's stop button); returns what took them before.

    One that is ignored (`nohup`, a job in the background) stays ignored. Forked workers keep none of it.
    """
    _free_forked_workers()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {number: signal.signal(number, handler) for number, old in before.items() if old != signal.SIG_IGN}


@functools.cache
def _free_forked_workers() -> None:
    """From here on a forked process has the default for SIGTERM, and leaves Ctrl-C to its parent.

    A pool ends its workers by SIGTERM and waits for them: a handler of Python's may never run there (while a library
    waits for a lock), and a signal in the moment of the fork is lost to it. So SIGTERM waits until the default is back.
    """
    def in_child() -> None:
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if callable(taker := signal.getsignal(signal.SIGINT)) and taker is not signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        wait(signal.SIG_UNBLOCK)

    def wait(how: int) -> None:
        signal.pthread_sigmask(how, {signal.SIGTERM})

    os.register_at_fork(before=lambda: wait(signal.SIG_BLOCK), after_in_child=in_child,
                        after_in_parent=lambda: wait(signal.SIG_UNBLOCK))


def end_with_a_word() -> None:
    """Make SIGTERM and Ctrl-C end this process with a sentence and status 1; a training saves first (`faults`)."""
    def stop(number: int, frame: Any) -> None:
        raise SystemExit(f"{signal.Signals(number).name}: what is done so far is kept, and the same command goes on "
                         "from there.")

    take_signals(stop)


def settle(namespace: dict) -> Run:
    """Read the parameters from `namespace` (a notebook's or script's `globals()`), check them, fill in the rest.

    Raises ParameterError, before any work, for an unknown or misspelled name, a value of the wrong type or out of
    range, no GPU for the 7B scale, a folder that cannot be written, too little room on its disk.
    """
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process of many speaks; errors go to stderr as ever
    given = parameters.given(namespace)
    if "In" not in namespace and threading.current_thread() is threading.main_thread():  # a script, not a notebook
        end_with_a_word()
    values = {name: namespace[name] for name in PARAMETERS}
    parameters.check(values)
    parameters.choose_gpus(values["gpus"])
    parameters.choose_cache(values["hf_home"])
    values["scale"] = _choose_scale(values["scale"], values["recipe"], values["memory"])
    low = LOW_MEMORY[values["scale"]] if values["memory"] == "low" else {}
    for name, default in (SCALES[values["scale"]] | low).items():
        values[name] = default if values[name] is None else values[name]
    values["model_revision"] = values["model_revision"] or REVISIONS.get(values["model_id"])
    parameters.check(values)
    _check_output(values)
    stages = [_stage_run(stage, values) for stage in RECIPES[values["recipe"]]]
    folder = stages[-1].folder if stages else Path(values["output_root"]) / f"{PROJECT}-{_short(values)}"
    values["report_to"] = _report_target(values["report_to"], folder)
    run = Run(values, given, stages, folder)
    if local_model(values["model_id"]) is None:
        _check_hub(values["model_id"], values["model_revision"])
    return run


def _short(values: dict) -> str:
    """The run's name in folders: r3's two stages are r3-stage1 and r3-stage2."""
    return values["run_name"] or values["recipe"].replace("r3-two-stage", "r3")


def _stage_run(stage: Stage, values: dict) -> StageRun:
    if values["precision"] and stage.trains == "lora":
        stage = replace(stage, precision=values["precision"])
    name = _short(values) + stage.suffix
    folder = Path(values["output_root"]) / f"{PROJECT}-{name}"
    return StageRun(stage, name, folder, values["learning_rate"] or stage.learning_rate[values["scale"]])


def _choose_scale(scale: str, recipe: str, memory: str | None) -> str:
    """`auto` -> `7b` where the visible GPUs have room for this recipe, else `tiny`; says which and why."""
    import torch

    need, least = (LOW_GPU_GIB if memory == "low" else GPU_GIB)[recipe], LOW_GPU_GIB[recipe]
    needs = f"{need} GiB of GPU memory" + (f" ({least} with memory=low)" if least < need else "")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    sizes, old = [card.total_memory / 2**30 for card in cards], [card.name for card in cards if card.major < 8]
    world = int(os.environ.get("WORLD_SIZE", 1))
    room = (min(sizes) if world > 1 else sum(sizes)) if sizes else 0
    seen = f"{len(sizes)} GPU(s) with {room:.0f} GiB" if sizes else "no GPU"
    if scale == "7b" and room < need:
        raise ParameterError(f"scale=7b with recipe={recipe} needs {needs}, and this machine shows "
                             f"{seen}; take a larger GPU, or scale=tiny.")
    if scale == "7b" and old:
        raise ParameterError(f"scale=7b computes in bf16, for which {old[0]} has no instructions; take a GPU of the "
                             "Ampere generation or newer, or scale=tiny.")
    if scale == "auto":
        scale = "7b" if room >= need and not old else "tiny"
        seen += f", and {old[0]} has no instructions for bf16" if old else ""
        print(f"scale auto -> {scale}: {recipe} at 7B needs {needs}, and there is {seen}.")
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


def local_model(model_id: str) -> str | None:
    """The folder of a model on this machine, None for a Hub id; ParameterError where a folder holds no model."""
    folder = TINY_BASE if model_id == "embedded" else Path(model_id).expanduser()
    if model_id != "embedded" and not model_id.startswith((".", "/", "~")) and not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise ParameterError(f"model_id={model_id!r} is not a model's folder: it has no config.json.")
    return str(folder)


def _check_hub(model_id: str, revision: str | None) -> None:
    """Raise ParameterError unless the Hub gives the model's config.json: a cheap test of access."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    asked = f"model_id={model_id!r} at revision {revision or 'main'}"
    try:
        hf_hub_download(model_id, "config.json", revision=revision)
    except GatedRepoError:
        raise ParameterError(f"{asked} is gated: accept its terms on its page of the Hub, and give a token with access "
                             "(HF_TOKEN, or `hf auth login`).") from None
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise ParameterError(
            f"{asked} cannot be had from the Hub ({type(error).__name__}: {why}); check the name, the network and "
            "HF_TOKEN, or give a local folder, or scale=tiny.") from None


def _report_target(report_to: str, folder: Path) -> str:
    """`auto` -> `wandb` where there are credentials or WANDB_MODE=offline, else `tensorboard`; never a login prompt."""
    mode = os.environ.get("WANDB_MODE")
    netrc = Path.home() / ".netrc"
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())
    if report_to == "wandb" and not (logged_in or mode in ("offline", "disabled")):
        raise ParameterError("report_to=wandb finds no credentials: set WANDB_API_KEY or run `wandb login`, or set "
                             "WANDB_MODE=offline, or choose tensorboard or none.")
    if report_to == "auto":
        report_to = "wandb" if mode == "offline" or (logged_in and mode != "disabled") else "tensorboard"
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    return report_to
