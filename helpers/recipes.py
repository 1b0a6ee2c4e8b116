"""The recipes, the two scales and the parameters, as plain data: read them as tables."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from helpers.messages import special_token

# A regular expression works in PEFT only where `target_modules` is ONE string that matches the whole module name;
# inside a list it matches nothing, without a word.
LORA_TARGETS = {
    "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "vision": r"model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|merger\.mlp\.[02])",
}


@dataclass(frozen=True)
class Stage:
    """One training: what is stored how, what trains, what comes out."""

    trains: str  # "lora": adapters on `towers`; "full": all weights of `towers`, in fp32
    towers: tuple[str, ...]  # of "vision" (blocks, patch embedding, merger) and "language"
    precision: str  # of the frozen base: "nf4" (the vision tower stays in bf16) or "bf16"
    learning_rate: dict[str, float]  # per scale
    suffix: str = ""  # appended to the run's name
    reward: bool = False  # GRPO on rewards, on from the adapter of the stage before; else cross-entropy on labels
    same_as: str = ""  # the recipe whose only stage this is too: what one of its runs has trained is taken over

    @property
    def lora_targets(self) -> str:
        """PEFT's `target_modules`: one pattern over the full module names of all `towers`."""
        return "|".join(LORA_TARGETS[tower] for tower in self.towers)


RECIPES: dict[str, tuple[Stage, ...]] = {
    # nothing trains: the zero-shot row, quantized as in r1
    "base": (),
    # published .835 mean IoU (7B, first 50 pictures of val, 2 x RTX 6000 Ada)
    "r1-llm-only": (Stage("lora", ("language",), "nf4", {"7b": 2e-5, "tiny": 1e-3}),),
    # published .833
    "r2-vision-only": (Stage("full", ("vision",), "bf16", {"7b": 1e-5, "tiny": 5e-4}),),
    # published .837
    "r3-two-stage": (
        Stage("full", ("vision",), "bf16", {"7b": 1e-5, "tiny": 5e-4}, suffix="-stage1"),
        Stage("lora", ("language",), "nf4", {"7b": 1e-5, "tiny": 1e-3}, suffix="-stage2"),
    ),
    # published .864
    "r4-joint": (Stage("lora", ("vision", "language"), "nf4", {"7b": 2e-5, "tiny": 1e-3}),),
}
RECIPES["r5-reward"] = (
    replace(RECIPES["r1-llm-only"][0], suffix="-r1", same_as="r1-llm-only"),
    Stage("lora", ("language",), "nf4", {"7b": 5e-6, "tiny": 2e-4}, reward=True),
)

IMAGE_TOKEN = 28 * 28  # pixels: a patch is 14 x 14 and 2 x 2 patches are merged into one image token


class Rule(NamedTuple):
    """What a parameter may be."""

    expected: str  # as a reader would say it
    accepts: Callable[[Any], bool]
    is_text: bool = False  # a value that is written like a number, as in run_name=2024, is text all the same


@dataclass(frozen=True)
class Parameter:
    """A row of the table below."""

    rule: Rule
    scales: dict[str, Any] = field(default_factory=dict)  # what None becomes at each scale
    low: dict[str, Any] = field(default_factory=dict)  # and with memory="low": the same effective batch
    trains: bool = False  # a training depends on it: in one run's folder it stays the same
    optional: bool = False  # None may stay None

    def accepts(self, value: Any) -> bool:
        return self.rule.accepts(value) or (value is None and (self.optional or bool(self.scales)))

    @property
    def expected(self) -> str:
        return self.rule.expected + (" (or None for the default)" if self.optional or self.scales else "")


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, is_text=True)


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    return Rule(f"a number above {low} and at most {high}",
                lambda value: type(value) in (int, float) and low < value <= high)


def text(expected: str, pattern: str = r"(?s).*\S.*") -> Rule:
    """Text that is a whole match of the regular expression."""
    return Rule(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, True)


FLAG = Rule("True or False", lambda value: type(value) is bool)
SHARE = Rule("a number from 0 to below 1", lambda value: type(value) in (int, float) and 0 <= value < 1)
TIMES = Rule("a number from 0 to 100", lambda value: type(value) in (int, float) and 0 <= value <= 100)
PROMPT = Rule("text for every picture, without special tokens such as <|image_pad|>",
              lambda value: isinstance(value, str) and bool(value.strip()) and not special_token(value), is_text=True)
COUNT = whole(1, 10**9)
PIXELS = whole(IMAGE_TOKEN, 16384 * IMAGE_TOKEN)
REVISION = text("a commit, branch or tag")
BOX_FORMAT = r"(xywh|xyxy|cxcywh|yxyx)(-(pixels|unit|percent|1000)(-(shown|stored|declared))?)?"  # `data.frames`


def both(value: Any) -> dict[str, Any]:
    """The same at both scales."""
    return {"7b": value, "tiny": value}


PARAMETERS: dict[str, Parameter] = {
    "recipe": Parameter(one_of(*RECIPES), trains=True),
    "scale": Parameter(one_of("auto", "7b", "tiny"), trains=True),
    "model_id": Parameter(text("a Hub id, a local folder, or embedded"), trains=True,
                          scales={"7b": "Qwen/Qwen2-VL-7B-Instruct", "tiny": "embedded"}),
    "model_revision": Parameter(REVISION, optional=True, trains=True),
    "dataset_id": Parameter(text("a Hub id, a local folder or file, or embedded"), trains=True,
                            scales={"7b": "openfoodfacts/nutrition-table-detection", "tiny": "embedded"}),
    "dataset_revision": Parameter(REVISION, optional=True, trains=True),
    "classes": Parameter(text("names of classes with commas between them, old=new to rename one"), optional=True),
    "val_share": Parameter(number(0, 1)),
    "box_format": Parameter(text("xywh, xyxy, cxcywh or yxyx, with -pixels, -unit (0-1), -percent or -1000, then "
                                 "-shown, -stored or -declared", BOX_FORMAT), optional=True),
    "unlabelled": Parameter(one_of("negative", "skip"), optional=True),
    "prompt": Parameter(PROMPT, trains=True),
    "loss_scope": Parameter(one_of("assistant", "all-text"), trains=True),
    "precision": Parameter(one_of("nf4", "bf16"), optional=True, trains=True),
    "memory": Parameter(one_of("low"), optional=True),
    "epochs": Parameter(number(0, 1000), {"7b": 3, "tiny": 2}, trains=True),
    "learning_rate": Parameter(number(0, 1), optional=True, trains=True),  # of the recipe's stages
    # published: 2 x 8; one H100 trains r4 1.6 x as fast with 8 x 2 and activations recomputed
    "batch_size": Parameter(whole(1, 4096), both(8), low={"7b": 8, "tiny": 2}, trains=True),
    "accumulation": Parameter(whole(1, 4096), {"7b": 2, "tiny": 1}, low={"7b": 2, "tiny": 4}, trains=True),
    "lora_rank": Parameter(whole(1, 4096), {"7b": 64, "tiny": 16}, trains=True),
    "lora_alpha": Parameter(whole(1, 8192), {"7b": 128, "tiny": 32}, trains=True),
    "lora_dropout": Parameter(SHARE, {"7b": 0.05, "tiny": 0.0}, trains=True),  # on a CPU a quarter of a step
    "min_pixels": Parameter(PIXELS, {"7b": 256 * IMAGE_TOKEN, "tiny": 16 * IMAGE_TOKEN}, trains=True),
    "max_pixels": Parameter(PIXELS, {"7b": 1280 * IMAGE_TOKEN, "tiny": 144 * IMAGE_TOKEN}, trains=True),
    # at 7b None stays: the training tries whether a step fits into memory without
    "gradient_checkpointing": Parameter(FLAG, {"7b": None, "tiny": False}, low=both(True)),
    "augment": Parameter(FLAG, both(False), trains=True),
    "paste": Parameter(TIMES, both(0), trains=True),
    "reward_steps": Parameter(COUNT, {"7b": 100, "tiny": 100}, trains=True),
    "reward_learning_rate": Parameter(number(0, 1), optional=True, trains=True),  # of the recipe's last stage
    "reward_completions": Parameter(whole(2, 1024), {"7b": 8, "tiny": 4}, trains=True),
    "reward_beta": Parameter(SHARE, both(0.04), trains=True),
    "seed": Parameter(whole(0, 2**31 - 1), trains=True),
    "train_limit": Parameter(COUNT, optional=True, trains=True),
    "val_limit": Parameter(COUNT, optional=True),
    "eval_steps": Parameter(COUNT, optional=True),
    "eval_pictures": Parameter(COUNT),
    "keep": Parameter(one_of("last", "best")),
    "save_steps": Parameter(COUNT, {"7b": 25, "tiny": 50}),
    "predict_batch_size": Parameter(whole(1, 4096), {"7b": 128, "tiny": 32}, low={"7b": 16, "tiny": 8}),
    "max_new_tokens": Parameter(whole(8, 4096)),
    "constrained": Parameter(FLAG),
    "passes": Parameter(whole(1, 16)),
    "merge_base": Parameter(one_of("full", "dequantized")),
    "gpus": Parameter(text("GPU numbers such as 0 or 0,1", r"[0-9]+(,[0-9]+)*"), optional=True),
    "output_root": Parameter(text("a folder that can be written")),
    "hf_home": Parameter(text("a folder for the Hub's downloads and caches"), optional=True),
    "run_name": Parameter(text("text of letters, digits, dots, dashes and underscores", r"[\w.-]+"), optional=True),
    "report_to": Parameter(one_of("auto", "wandb", "tensorboard", "none")),
}
# The tables by scale, and the parameters that a training depends on.
SCALES = {scale: {name: row.scales[scale] for name, row in PARAMETERS.items() if row.scales}
          for scale in ("7b", "tiny")}  # fmt: skip
LOW_MEMORY = {scale: {name: row.low[scale] for name, row in PARAMETERS.items() if row.low} for scale in SCALES}
TRAINING = tuple(name for name, row in PARAMETERS.items() if row.trains)

# The commit of each model that this project was written for; model_revision takes another.
REVISIONS = {"Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac"}

# What must be free to start. GPU memory in GiB, from the most that was allocated with the 7B architecture and pictures
# of 1280 image tokens: 15.5 to load, 20.2 for r1 and r4 to merge (`helpers.dev.check_7b`), 18.5 to train r4
# with checkpointing and 12.8 with `memory="low"` (`helpers.dev.bench`, one H100); 25.4 for r2 and r3 in batches of 2,
# to which by arithmetic accumulation adds gradients of 2.5 and batches of 8 what they do in r4: 6.4, or .7. r5 took
# 19.2 for 8 pictures with 4 completions each (`notebooks/rewards_7b.json`); what its default of 2 x 8 pictures with 8
# adds is arithmetic: keys, values and a prefill of so many sequences. With `memory="low"` nothing is merged on the GPU.
# Disk in GiB for the checkpoints, cached vision features, the model saved or merged, and the Hub's download.
GPU_GIB = {"base": 18, "r1-llm-only": 22, "r2-vision-only": 36, "r3-two-stage": 36, "r4-joint": 22, "r5-reward": 40}
LOW_GPU_GIB = {"base": 14, "r1-llm-only": 14, "r2-vision-only": 30, "r3-two-stage": 30, "r4-joint": 14, "r5-reward": 22}
# Of that on a single GPU, however many one process spreads the model over: a vision tower that trains lies on one. With
# two H100 cut to 26 GiB each, r2 ran out in its second step (`notebooks/several_gpus_7b.json`). `memory="low"` changes
# nothing there: TRL's offloading takes activations back to one GPU, whichever they came from, so it is off.
ONE_GPU_GIB = {"r2-vision-only": 30, "r3-two-stage": 30}
DISK_GIB = {"7b": {"base": 18, "r1-llm-only": 40, "r2-vision-only": 50, "r3-two-stage": 70, "r4-joint": 40,
                   "r5-reward": 45}}  # fmt: skip
