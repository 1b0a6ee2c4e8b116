"""The four recipes and the two scales, as plain data: read them as a table."""

from dataclasses import dataclass

# A regular expression works in PEFT only where `target_modules` is ONE string that matches the whole module name;
# inside a list it matches nothing, without a word.
LORA_TARGETS = {
    "language": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "vision": r"model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|merger\.mlp\.[02])",
}


@dataclass(frozen=True)
class Stage:
    """One training: what is held how, what trains, what comes out."""

    trains: str  # "lora": adapters on `towers`; "full": all weights of `towers`, in fp32
    towers: tuple[str, ...]  # of "vision" (blocks, patch embedding, merger) and "language"
    precision: str  # how the frozen base is held: "nf4" (the vision tower stays in bf16) or "bf16"
    learning_rate: dict[str, float]  # per scale
    suffix: str = ""  # appended to the run's name

    @property
    def lora_targets(self) -> str:
        """PEFT's `target_modules`: one pattern over the full module names of all `towers`."""
        return "|".join(LORA_TARGETS[tower] for tower in self.towers)


RECIPES: dict[str, tuple[Stage, ...]] = {
    # nothing trains: the zero-shot row, held as r1 holds it
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

IMAGE_TOKEN = 28 * 28  # pixels: a patch is 14 x 14 and 2 x 2 patches are merged into one image token

SCALES: dict[str, dict] = {
    "7b": {
        "model_id": "Qwen/Qwen2-VL-7B-Instruct",
        "dataset_id": "openfoodfacts/nutrition-table-detection",
        "epochs": 3,
        "batch_size": 8,  # published: 2, and 8 to add up; one H100 trains r4 1.6 x as fast with 8 and checkpointing
        "accumulation": 2,
        "lora_rank": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.05,
        "min_pixels": 256 * IMAGE_TOKEN,
        "max_pixels": 1280 * IMAGE_TOKEN,
        "gradient_checkpointing": None,  # measured: where a step does not fit without (`speed.checkpointing`)
        "augment": False,
        "save_steps": 25,
        "predict_batch_size": 16,
    },
    "tiny": {  # found by measurement on the embedded scenes (README.md, "Recipes")
        "model_id": "embedded",
        "dataset_id": "embedded",
        "epochs": 2,
        "batch_size": 8,
        "accumulation": 1,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,  # on a CPU its random numbers would take a quarter of a step
        "min_pixels": 16 * IMAGE_TOKEN,
        "max_pixels": 144 * IMAGE_TOKEN,
        "gradient_checkpointing": False,
        "augment": False,
        "save_steps": 50,
        "predict_batch_size": 32,
    },
}

# What `memory="low"` takes in their place, at the same effective batch; merging then happens on the CPU.
LOW_MEMORY: dict[str, dict] = {
    "7b": {"batch_size": 2, "accumulation": 8, "gradient_checkpointing": True, "predict_batch_size": 4},
    "tiny": {"batch_size": 2, "accumulation": 4, "gradient_checkpointing": True, "predict_batch_size": 8},
}

# The commit of each model that this project was written for; model_revision takes another.
REVISIONS = {"Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac"}

# What must be free to start. GPU memory in GiB, from the most that was allocated with the 7B architecture and pictures
# of 1280 image tokens: 15.5 to load, 20.2 for r1 and r4 to merge (`helpers.dev.check_7b`), 18.5 to train r4
# in batches of 8 with checkpointing and 12.1 in batches of 2 (`helpers.dev.bench_7b`, one H100); 25.4 for r2 and r3 in
# batches of 2, to which by arithmetic accumulation adds gradients of 2.5 and batches of 8 the same 6.4 as in r4. With
# `memory="low"` nothing is merged on the GPU. Disk in GiB for the checkpoints, what a frozen tower saw, the model saved
# or merged, and the Hub's download.
GPU_GIB = {"base": 18, "r1-llm-only": 22, "r2-vision-only": 36, "r3-two-stage": 36, "r4-joint": 22}
LOW_GPU_GIB = {"base": 14, "r1-llm-only": 14, "r2-vision-only": 30, "r3-two-stage": 30, "r4-joint": 14}
DISK_GIB = {"7b": {"base": 18, "r1-llm-only": 40, "r2-vision-only": 50, "r3-two-stage": 70, "r4-joint": 40}}
