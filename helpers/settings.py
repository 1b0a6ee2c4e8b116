"""Parameters -> a run that is settled: the scale, every default, the folders; refused here if it cannot work."""

import ast
import contextlib
import difflib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import recipes
from helpers.messages import check_tokenizer
from helpers.processes import end_with_a_word, is_main, world_size
from helpers.recipes import PARAMETERS, RECIPES, SCALES, Parameter, Stage

PROJECT = "qwen2vl-nutrition-detection"
TINY_BASE = Path(__file__).parent / "tiny"
ARCHITECTURE = "qwen2_vl"  # `model_type` in config.json


class ParameterError(ValueError):
    """One sentence: the parameter, its value, the valid choices."""


@dataclass
class StageRun:
    """One stage of this run: the recipe's stage, with its folder and what it is trained on."""

    stage: Stage
    name: str
    folder: Path
    learning_rate: float
    base: str  # what `from_pretrained` takes: the run's model, or the whole model that the stage before made
    start: Path | None = None  # the adapter that the stage before made, and this one goes on with

    @property
    def result(self) -> Path:
        """Where its weights go."""
        return self.folder / ("model" if self.stage.trains == "full" else "adapter")


@dataclass
class Run:
    """The parameters with every default filled in (`run.epochs`), and what follows from them."""

    values: dict[str, Any]
    given: dict[str, Any]
    model_path: str  # what `from_pretrained` takes: a folder or a Hub id
    stages: list[StageRun]
    folder: Path  # of the last stage: predictions, metrics, figures
    merged_folder: Path
    share: tuple[int, int]  # batch size and accumulation of one process: all together make the recipe's update

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("values", {}):
            return self.values[name]
        raise AttributeError(name)


def settle(namespace: dict) -> Run:
    """Read the parameters from `namespace` (a notebook's or script's `globals()`), check them, fill in the rest.

    Raises ParameterError, before any work, for an unknown or misspelled name, a value of the wrong type or out of
    range, no GPU for the 7B scale, a folder that cannot be written, too little room on its disk.
    """
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process of many speaks; errors go to stderr as ever
    given = read_given(namespace)
    if "In" not in namespace and threading.current_thread() is threading.main_thread():  # a script, not a notebook
        end_with_a_word()
    values = {name: namespace[name] for name in PARAMETERS}
    check(values)
    _refuse_sharding()
    choose_gpus(values["gpus"])
    choose_cache(values["hf_home"])
    scale = values["scale"] = _choose_scale(values["scale"], values["recipe"], values["memory"])
    defaults = SCALES[scale] | (recipes.LOW_MEMORY[scale] if values["memory"] == "low" else {})
    values |= {name: default for name, default in defaults.items() if values[name] is None}
    values["model_revision"] = values["model_revision"] or recipes.REVISIONS.get(values["model_id"])
    check(values)
    values["output_root"] = str(Path(values["output_root"]).expanduser())
    _check_output(values["output_root"], values["recipe"], scale)
    path = local_model(values["model_id"]) or values["model_id"]
    name = values["run_name"] or values["recipe"].replace("r3-two-stage", "r3")
    folder = Path(values["output_root"]) / f"{PROJECT}-{name}"
    stages = _stages(values, path, folder)
    last = stages[-1].folder if stages else folder
    values["report_to"] = _report_target(values["report_to"], last)
    share = _share(values) if stages else (values["batch_size"], 1)
    run = Run(values, given, path, stages, last, folder.with_name(f"{folder.name}-merged"), share)
    _check_base(run)
    return run


def _stages(values: dict, base: str, folder: Path) -> list[StageRun]:
    """The recipe's stages on top of each other; their folders begin as `folder` does."""
    stages: list[StageRun] = []
    for stage in RECIPES[values["recipe"]]:
        before = stages[-1] if stages else None
        if before and before.stage.trains == "full":
            base = str(before.result)
        if values["precision"] and stage.trains == "lora":
            stage = replace(stage, precision=values["precision"])
        rate = values["reward_learning_rate" if stage.reward else "learning_rate"]
        place = folder.with_name(folder.name + stage.suffix)
        stages.append(StageRun(stage, place.name.removeprefix(f"{PROJECT}-"), place,
                               rate or stage.learning_rate[values["scale"]], base,
                               before.result if before and stage.reward else None))
    return stages


# --- what was given -------------------------------------------------------------------------------------------------


def read_value(written: str) -> Any:
    """A value as papermill's `-p` reads it: whole number, number, True, False, None, else text."""
    named = {"True": True, "False": False, "None": None}
    if written in named:
        return named[written]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(written)
    return written


def read_given(namespace: dict, known: dict[str, Parameter] = PARAMETERS) -> dict[str, Any]:
    """The parameters that someone set from outside: papermill's injected cell, or `key=value` of a script.

    papermill only warns about names that the notebook does not have, so its cell is read from IPython's `In`
    (`globals()` would show a reader's own names too). The values are also put into `namespace`. What is text by its
    rule stays as it was written. Raises ParameterError for a name that is not `known`, with the nearest that is.
    """
    if "In" in namespace:
        cells = [cell for cell in namespace["In"] if cell.startswith("# Parameters\n")]
        assigned = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
        given: dict[str, Any] = dict.fromkeys(ast.unparse(node.targets[0]) for node in assigned)
    else:
        given = dict(map(_name_and_value, sys.argv[1:]))
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ParameterError(f"{name} is not a parameter; {hint}The parameters are {', '.join(known)}.")
        is_text = known[name].rule.is_text
        if "In" in namespace:
            given[name] = namespace[name]
            if is_text and isinstance(given[name], int):  # papermill has read `-p run_name 2024` as a number
                given[name] = str(given[name])
        elif not is_text or given[name] == "None":
            given[name] = read_value(given[name])
    namespace.update(given)
    return given


def _name_and_value(argument: str) -> tuple[str, Any]:
    """A script's argument, its value as it was written."""
    name, equals, written = argument.partition("=")
    if not equals:
        raise ParameterError(f"{argument!r} is not of the form name=value, such as recipe=r4-joint.")
    if written.encode(errors="ignore").decode() != written:
        raise ParameterError(f"{argument!r} is not UTF-8 text, so it cannot be written into the run's files.")
    return name, written


def check(values: dict[str, Any], known: dict[str, Parameter] = PARAMETERS) -> None:
    """Raise ParameterError for the first value that its rule does not accept, and for two that exclude each other."""
    for name, row in known.items():
        if not row.accepts(values[name]):
            raise ParameterError(f"{name}={values[name]!r} is not valid: expected {row.expected}.")
    low, high = values.get("min_pixels"), values.get("max_pixels")
    if low and high and low > high:
        raise ParameterError(f"min_pixels={low} is larger than max_pixels={high}.")
    if values.get("memory") == "low" and values.get("precision") == "bf16":
        raise ParameterError("memory='low' needs the base in nf4, and precision='bf16' asks for all of its 16 GB.")
    if values.get("keep") == "best" and not values.get("eval_steps"):
        raise ParameterError("keep='best' needs eval_steps: the best step is found by measuring every so many steps.")


# --- the machine and the launcher -----------------------------------------------------------------------------------


def choose_gpus(wanted: str | None) -> None:
    """Make only the GPUs of this list visible. Must run before CUDA starts here, or raises ParameterError."""
    if wanted is None:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and os.environ.get("CUDA_VISIBLE_DEVICES") != wanted:
        raise ParameterError(f"gpus={wanted} comes too late: CUDA has started in this process; restart the kernel.")
    if world_size() > 1:
        raise ParameterError(f"gpus={wanted} cannot be combined with a launcher: use its own option (--gpu_ids).")
    os.environ["CUDA_VISIBLE_DEVICES"] = wanted


def choose_cache(hf_home: str | None) -> None:
    """Make `hf_home` the folder of the Hub's downloads and caches, as HF_HOME would.

    Must run before the Hub's libraries are imported. Raises ParameterError where it is too late, and where `datasets`
    cannot write its cache, where prepared pictures go.
    """
    if hf_home is not None:
        wanted = os.path.abspath(os.path.expanduser(hf_home))
        hub = sys.modules.get("huggingface_hub.constants")
        if hub is not None and os.path.abspath(hub.HF_HOME) != wanted:
            raise ParameterError(f"hf_home={hf_home!r} comes too late: this process uses {hub.HF_HOME}; restart the "
                                 "kernel, or set HF_HOME before it starts.")
        os.environ["HF_HOME"] = wanted
    from huggingface_hub.constants import HF_HOME

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser()
    _must_be_writable(cache, f"hf_home={hf_home!r}" if hf_home else f"HF_HOME={HF_HOME}",
                      ", and prepared pictures go there; give hf_home another folder, or HF_DATASETS_CACHE where the "
                      "downloads shall stay")


def _refuse_sharding() -> None:
    """Raise ParameterError under a launcher that would shard the weights (`accelerate launch --use_fsdp`)."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise ParameterError(f"accelerate's {kind} shards weights over processes, and checkpoints, inference in "
                                 "training and saving need them whole in one process here; start without a launcher "
                                 "(one process spreads a model over all GPUs of the machine), or with --multi_gpu, "
                                 "where each GPU has room for all of the recipe.")


def _choose_scale(scale: str, recipe: str, memory: str | None) -> str:
    """`auto` -> `7b` where the visible GPUs have room for this recipe, else `tiny`; says which and why.

    Raises ParameterError where 7B has no room, and where rewards would train one model over several GPUs: TRL's
    GRPOTrainer cannot.
    """
    import torch

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    spread, alone = len(cards) > 1 and world_size() == 1, recipes.ONE_GPU_GIB.get(recipe, 0)
    least = (recipes.GPU_GIB if spread else recipes.LOW_GPU_GIB)[recipe]  # nothing is offloaded from several GPUs
    need = least if memory == "low" else recipes.GPU_GIB[recipe]
    needs = f"{need} GiB of GPU memory" + (f" ({least} with memory=low)" if least < need else "")
    sizes, old = [card.total_memory / 2**30 for card in cards], [card.name for card in cards if card.major < 8]
    if spread and any(stage.reward for stage in RECIPES[recipe]):
        raise ParameterError(f"recipe={recipe} trains on one GPU a process, and this one shows {len(cards)}; give "
                             "gpus=0, or start a process a GPU (accelerate launch).")
    room = (min if world_size() > 1 else sum)(sizes or [0])
    seen = f"{len(sizes)} GPU(s) with {room:.0f} GiB" if sizes else "no GPU"
    if room < need <= sum(sizes):
        seen += f" for each process (one process, started without a launcher, uses all {sum(sizes):.0f})"
    if len(sizes) > 1 and min(sizes) < alone and room >= need:
        room, seen = 0, f"{seen}, {min(sizes):.0f} each, and the one with the vision tower takes {alone}"
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


def divide(batch_size: int, accumulation: int, processes: int) -> tuple[int, int] | None:
    """(batch size, accumulation) of one of several processes that together make the same update; None: impossible.

    The accumulation is divided first, because a larger batch is faster.
    """
    divided = math.gcd(accumulation, processes)
    left = processes // divided
    return None if batch_size % left else (batch_size // left, accumulation // divided)


def _share(values: dict) -> tuple[int, int]:
    """`divide` among the processes of this launch, said in a line; ParameterError where it does not go."""
    batch_size, accumulation, world = values["batch_size"], values["accumulation"], world_size()
    update = f"batch_size={batch_size} x accumulation={accumulation}"
    share = divide(batch_size, accumulation, world)
    if share is None:
        fitting = [n for n in range(1, min(batch_size * accumulation, 1024) + 1) if divide(batch_size, accumulation, n)]
        nearest = min(fitting, key=lambda n: (abs(n - world), -n))
        raise ParameterError(f"{world} processes cannot share the {batch_size * accumulation} pictures of an update "
                             f"({update}) evenly; start {nearest} instead (of {', '.join(map(str, fitting))}), or set "
                             f"accumulation={world * max(1, round(accumulation / world))}.")
    if world > 1:
        print(f"{world} processes share each update ({update}): {share[0]} x {share[1]} each.")
    return share


# --- folders and logs -----------------------------------------------------------------------------------------------


def _must_be_writable(folder: Path, given: str, what_else: str) -> None:
    """Make the folder; ParameterError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ParameterError(f"{given} cannot be written ({error.strerror}: {folder}){what_else}.") from None


def _check_output(root: str, recipe: str, scale: str) -> None:
    """Raise ParameterError unless `output_root` can be written and has room for what the recipe leaves there."""
    _must_be_writable(Path(root), f"output_root={root!r}", "; choose another folder")
    need = recipes.DISK_GIB.get(scale, {}).get(recipe, 0.5)
    free = shutil.disk_usage(root).free / 2**30
    if free < need:
        raise ParameterError(f"output_root={root!r} has {free:.1f} GiB free, and recipe={recipe} at scale={scale} "
                             f"needs about {need}; choose another disk.")


def _report_target(report_to: str, folder: Path) -> str:
    """`auto` -> `wandb` where there are credentials or WANDB_MODE=offline, else `tensorboard`; never a login prompt.

    WANDB_DISABLED=true, which transformers has given up, keeps `auto` from W&B as WANDB_MODE=disabled does.
    """
    off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    mode, netrc = os.environ.get("WANDB_MODE"), Path.home() / ".netrc"
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and b"wandb" in netrc.read_bytes())
    if report_to == "wandb" and (off or not (logged_in or mode in ("offline", "disabled"))):
        found = f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}" if off else "no credentials"
        raise ParameterError(f"report_to=wandb finds {found}: set WANDB_API_KEY or run `wandb login`, or set "
                             "WANDB_MODE=offline, without WANDB_DISABLED; or choose tensorboard or none.")
    if report_to == "auto":
        report_to = "wandb" if not off and (mode == "offline" or (logged_in and mode != "disabled")) else "tensorboard"
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    return report_to


# --- the base model -------------------------------------------------------------------------------------------------


def local_model(model_id: str) -> str | None:
    """The folder of a model on this machine, None for a Hub id; ParameterError where a folder holds no model."""
    folder = TINY_BASE if model_id == "embedded" else Path(model_id).expanduser()
    if model_id != "embedded" and not model_id.startswith((".", "/", "~")) and not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise ParameterError(f"model_id={model_id!r} is not a model's folder: it has no config.json.")
    return str(folder)


def check_architecture(name: str, config: dict[str, Any]) -> None:
    """Raise ParameterError unless `config`, the config.json of the model called `name`, is a Qwen2-VL's."""
    if config.get("model_type") != ARCHITECTURE:
        raise ParameterError(f"{name} is a model of type {config.get('model_type')!r}, and only {ARCHITECTURE} works "
                             "here, such as Qwen/Qwen2-VL-2B-Instruct or Qwen/Qwen2-VL-7B-Instruct.")


def _check_weights(name: str, folder: Path) -> None:
    """Raise ParameterError where a folder's safetensors are not all there, or one of them was cut in copying."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for file in sorted(names):
        try:
            with safe_open(folder / file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ParameterError(f"{name} is not whole: {file} cannot be read ({error}); copy it again, in "
                                 "safetensors.") from None


def _check_base(run: Run) -> None:
    """Raise ParameterError where the base cannot work with this recipe, by its small files and its weights' heads."""
    from transformers import PreTrainedConfig, Qwen2VLProcessor

    path, revision, name = run.model_path, run.values["model_revision"], f"model_id={run.values['model_id']!r}"

    def read(load: Callable[..., Any]) -> Any:
        try:
            return load(path, revision=revision)
        except Exception as error:  # of the file system, the Hub, the network, the tokenizer
            why = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ParameterError(
                f"{name} cannot be used ({type(error).__name__}: {why}); check the name, model_revision={revision}, "
                "the files, the network and HF_TOKEN (a gated model also needs its terms accepted on its page), or "
                "give a local folder, or scale=tiny.") from None

    def with_tokenizer(path: str, revision: str | None) -> Any:
        processor = Qwen2VLProcessor.from_pretrained(path, revision=revision)
        check_tokenizer(processor.tokenizer)
        return processor

    if (Path(path) / "adapter_config.json").exists():
        raise ParameterError(f"{name} holds an adapter, which transformers would load in place of the model; name a "
                             "folder without adapter_config.json.")
    if Path(path).is_dir():
        _check_weights(name, Path(path))
    config, _ = read(PreTrainedConfig.get_config_dict)
    check_architecture(name, config)
    stored = config.get("quantization_config")
    if stored and run.stages:
        raise ParameterError(f"{name} is quantized already ({stored.get('quant_method')}), and recipe={run.recipe} "
                             "trains and merges on the full weights; take the model it was made from, or recipe=base.")
    if stored and not (stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"):
        raise ParameterError(f"{name} is quantized ({stored.get('quant_method')}) and not to bitsandbytes' NF4, the "
                             "one that works here; take the model it was made from.")
    processor = read(with_tokenizer)
    if not processor.chat_template:
        raise ParameterError(f"{name} has no chat template; take an Instruct model, or copy its chat_template.jinja.")

