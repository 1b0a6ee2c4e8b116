"""Parameters: what each may be, where the values came from, what is refused before any work starts."""

import ast
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from helpers.messages import special_token
from helpers.recipes import RECIPES, SCALES


class Rule(NamedTuple):
    """What a parameter may be."""

    expected: str  # as a reader would say it
    accepts: Callable[[Any], bool]
    is_text: bool = False  # a value that is written like a number, as in run_name=2024, is text all the same


class ParameterError(ValueError):
    """One sentence: the parameter, its value, the valid choices."""


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, is_text=True)


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    def test(value: Any) -> bool:
        return type(value) in (int, float) and low < value <= high

    return Rule(f"a number above {low} and at most {high}", test)


def share() -> Rule:
    return Rule("a number from 0 to below 1", lambda value: type(value) in (int, float) and 0 <= value < 1)


def text(expected: str) -> Rule:
    return Rule(expected, lambda value: isinstance(value, str) and bool(value.strip()), is_text=True)


def matching(pattern: str, expected: str) -> Rule:
    """Text that is a whole match of the regular expression."""
    def test(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    return Rule(expected, test, is_text=True)


def prompt_text() -> Rule:
    def test(value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip()) and not special_token(value)

    return Rule("the question asked of every picture, without special tokens such as <|image_pad|>", test, is_text=True)


def flag() -> Rule:
    return Rule("True or False", lambda value: type(value) is bool)


def default(rule: Rule) -> Rule:
    """The rule, or None for the scale's own value."""
    return rule._replace(expected=f"{rule.expected} (or None for the default)",
                         accepts=lambda value: value is None or rule.accepts(value))


PARAMETERS: dict[str, Rule] = {
    "recipe": one_of(*RECIPES),
    "scale": one_of("auto", *SCALES),
    "model_id": default(text("a Hub id, a local folder, or embedded")),
    "model_revision": default(text("a commit, branch or tag")),
    "dataset_id": default(text("a Hub id, a local folder or file, or embedded")),
    "dataset_revision": default(text("a commit, branch or tag")),
    "prompt": prompt_text(),
    "loss_scope": one_of("assistant", "all-text"),
    "precision": default(one_of("nf4", "bf16")),
    "memory": default(one_of("low")),
    "epochs": default(number(0, 1000)),
    "learning_rate": default(number(0, 1)),
    "batch_size": default(whole(1, 4096)),
    "accumulation": default(whole(1, 4096)),
    "lora_rank": default(whole(1, 4096)),
    "lora_alpha": default(whole(1, 8192)),
    "lora_dropout": default(share()),
    "min_pixels": default(whole(28 * 28, 16384 * 28 * 28)),
    "max_pixels": default(whole(28 * 28, 16384 * 28 * 28)),
    "gradient_checkpointing": default(flag()),
    "augment": default(flag()),
    "seed": whole(0, 2**31 - 1),
    "train_limit": default(whole(1, 10**9)),
    "val_limit": default(whole(1, 10**9)),
    "eval_steps": default(whole(1, 10**9)),
    "eval_pictures": whole(1, 10**9),
    "keep": one_of("last", "best"),
    "save_steps": default(whole(1, 10**9)),
    "predict_batch_size": default(whole(1, 4096)),
    "max_new_tokens": whole(8, 4096),
    "constrained": flag(),
    "merge_base": one_of("full", "dequantised"),
    "gpus": default(matching(r"[0-9]+(,[0-9]+)*", "GPU numbers such as 0 or 0,1")),
    "output_root": text("a folder that can be written"),
    "hf_home": default(text("a folder for the Hub's downloads and caches")),
    "run_name": default(matching(r"[\w.-]+", "text of letters, digits, dots, dashes and underscores")),
    "report_to": one_of("auto", "wandb", "tensorboard", "none"),
}


def read_value(written: str) -> Any:
    """A value as papermill's `-p` reads it: whole number, number, True, False, None, else text."""
    named = {"True": True, "False": False, "None": None}
    if written in named:
        return named[written]
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            pass
    return written


def refuse_unknown(names: list[str], known: dict[str, Rule]) -> None:
    """Raise ParameterError for the first name that is not a parameter, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ParameterError(f"{name} is not a parameter; {hint}The parameters are {', '.join(known)}.")


def given(namespace: dict, known: dict[str, Rule] = PARAMETERS) -> dict[str, Any]:
    """The parameters that someone set from outside: papermill's injected cell, or `key=value` of a script.

    papermill only warns about names that the notebook does not have, so its cell is read from IPython's `In`
    (`globals()` would show a reader's own names too). A script's values are also put into `namespace`. What is text by
    its rule stays as it was written: of papermill, which has read `-p run_name 2024` as a number before, whole numbers
    and True and False become text again, and other numbers, whose spelling is lost, are refused.
    """
    if "In" in namespace:
        injected = [cell for cell in namespace["In"] if cell.startswith("# Parameters\n")]
        names = [ast.unparse(node.targets[0]) for cell in injected for node in ast.parse(cell).body
                 if isinstance(node, ast.Assign)]
        refuse_unknown(names, known)
        values = {name: _as_text(name, namespace[name]) if known[name].is_text else namespace[name] for name in names}
    else:
        values = {}
        for argument in sys.argv[1:]:
            name, equals, written = argument.partition("=")
            if not equals:
                raise ParameterError(f"{argument!r} is not of the form name=value, such as recipe=r4-joint.")
            if not written.encode(errors="ignore").decode() == written:
                raise ParameterError(f"{argument!r} is not UTF-8 text, so it cannot be written into the run's files.")
            values[name] = written
        refuse_unknown(list(values), known)
        values = {name: written if known[name].is_text and written != "None" else read_value(written)
                  for name, written in values.items()}
    namespace.update(values)
    return values


def _as_text(name: str, value: Any) -> Any:
    if isinstance(value, float):
        raise ParameterError(f"{name} is text, and papermill has read it as the number {value}; give it with -r in the "
                             f"place of -p: -r {name} TEXT.")
    return str(value) if isinstance(value, int) else value


def check(values: dict[str, Any], known: dict[str, Rule] = PARAMETERS) -> None:
    """Raise ParameterError for the first value that its rule does not accept."""
    for name, rule in known.items():
        if not rule.accepts(values[name]):
            raise ParameterError(f"{name}={values[name]!r} is not valid: expected {rule.expected}.")
    low, high = values.get("min_pixels"), values.get("max_pixels")
    if low and high and low > high:
        raise ParameterError(f"min_pixels={low} is larger than max_pixels={high}.")
    if values.get("memory") == "low" and values.get("precision") == "bf16":
        raise ParameterError("memory='low' needs the base in nf4, and precision='bf16' asks for all of its 16 GB.")
    if values.get("keep") == "best" and not values.get("eval_steps"):
        raise ParameterError("keep='best' needs eval_steps: the best step is found by measuring every so many steps.")


def choose_gpus(wanted: str | None) -> None:
    """Make only the GPUs of this list visible. Must run before CUDA starts here, or raises ParameterError."""
    if wanted is None:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and os.environ.get("CUDA_VISIBLE_DEVICES") != wanted:
        raise ParameterError(f"gpus={wanted} comes too late: CUDA has started in this process; restart the kernel.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ParameterError(f"gpus={wanted} cannot be combined with a launcher: use its own option (--gpu_ids).")
    os.environ["CUDA_VISIBLE_DEVICES"] = wanted


def choose_cache(hf_home: str | None) -> None:
    """Make `hf_home` the folder of the Hub's downloads and caches, as HF_HOME would.

    Must run before the Hub's libraries are imported, or raises ParameterError.
    """
    if hf_home is None:
        return
    wanted = os.path.abspath(os.path.expanduser(hf_home))
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None and os.path.abspath(hub.HF_HOME) != wanted:
        raise ParameterError(f"hf_home={hf_home!r} comes too late: this process uses {hub.HF_HOME}; restart the "
                             "kernel, or set HF_HOME before it starts.")
    os.environ["HF_HOME"] = wanted
