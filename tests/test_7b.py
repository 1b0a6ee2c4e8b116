"""The 7B model without its download: names, counts and layouts against literals, the checking command made small."""

import os
import re
import sys
import time

import psutil
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from pipeline_runner import SOURCE
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.quantizers import AutoHfQuantizer

from helpers import model
from helpers.dev import check_7b, random_7b
from helpers.recipes import RECIPES, SCALES
from helpers.runs import read_json, write_json

HIDDEN, INTERMEDIATE, KEYS, VISION, RANK = 3584, 18944, 4 * 128, 1280, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shrunken model's folder, laid out like the Hub's, in several files."""
    path = tmp_path_factory.mktemp("hub") / "model"
    written = random_7b.write_model(path, random_7b.SHRUNKEN, shard="10MB")
    assert written == sum(weight.numel() for weight in weights_on_disk(path).values())
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def on_meta():
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED)).requires_grad_(False)


def pipelines_nf4() -> BitsAndBytesConfig:
    """The quantization that stands in pipeline.py."""
    source = SOURCE.read_text()
    start = source.index("nf4 = BitsAndBytesConfig(")
    names = {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch, "model": model}
    exec(source[start : source.index("\n)", start) + 2], names)
    return names["nf4"]


def test_the_published_configuration_is_read_whole(tmp_path):
    """The flat, older config.json of the Hub: no value falls back to a default of transformers."""
    write_json(tmp_path / "config.json", random_7b.PUBLISHED)
    config = AutoConfig.from_pretrained(tmp_path)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (HIDDEN, 28, INTERMEDIATE)
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (28, 4, 152064)
    assert text.rope_parameters["rope_theta"] == 1e6 and text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert set(text.layer_types) == {"full_attention"} and text.sliding_window is None
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size, vision.mlp_ratio) == (
        32, VISION, 16, HIDDEN, 4)
    assert (config.image_token_id, config.vision_start_token_id, text.eos_token_id) == (151655, 151652, 151645)
    assert config.tie_word_embeddings is False


def test_the_published_counts():
    totals = {tower: row["total"] for tower, row in model.parameters_by_tower(on_meta()).items()}
    assert sum(totals.values()) == check_7b.WEIGHTS == 16_582_751_232 // 2
    assert totals["vision"] == 675_759_104
    assert totals["head"] == 152064 * HIDDEN


# The published files' names without the numbers of layers, written by hand. Their shapes follow from the configuration.
PUBLISHED_NAMES = {
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "visual.patch_embed.proj.weight",
    *(f"model.layers.{norm}_layernorm.weight" for norm in ("input", "post_attention")),
    *(f"model.layers.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    *(f"model.layers.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"model.layers.self_attn.{part}_proj.bias" for part in "qkv"),
    *(f"visual.blocks.{part}.{kind}" for kind in ("weight", "bias")
      for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *(f"visual.merger.{part}.{kind}" for kind in ("weight", "bias") for part in ("ln_q", "mlp.0", "mlp.2")),
}  # fmt: skip


def test_every_weight_has_its_place_in_the_published_files(folder):
    """Those that are written here, and those of the 7B model."""
    def folded(names):
        return {re.sub(r"(layers|blocks)\.\d+", r"\1", name) for name in names}

    assert folded(weights_on_disk(folder)) == PUBLISHED_NAMES
    built = [name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
             for name in on_meta().state_dict()]
    assert folded(built) == PUBLISHED_NAMES and len(built) == 730


def lora_weights(shapes) -> int:
    """Rank 64 puts an [n, 64] and a [64, m] matrix on a layer of n inputs and m outputs."""
    return sum(RANK * (inputs + outputs) for inputs, outputs in shapes)


LANGUAGE_LAYER = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, INTERMEDIATE)] * 2 + [(INTERMEDIATE, HIDDEN)]
VISION_BLOCK = [(VISION, 3 * VISION), (VISION, VISION), (VISION, 4 * VISION), (4 * VISION, VISION)]
MERGER = [(4 * VISION, 4 * VISION), (4 * VISION, HIDDEN)]


@pytest.mark.parametrize("recipe", ["r1-llm-only", "r3-two-stage", "r4-joint"])
def test_lora_at_rank_64_has_the_weights_that_the_formula_gives(recipe):
    stage = RECIPES[recipe][-1]
    assert SCALES["7b"]["lora_rank"] == RANK
    vlm = get_peft_model(on_meta(), LoraConfig(r=RANK, target_modules=stage.lora_targets, task_type="CAUSAL_LM"))
    language, vision = 28 * lora_weights(LANGUAGE_LAYER), 32 * lora_weights(VISION_BLOCK) + lora_weights(MERGER)
    assert (language, vision) == (161_480_704, 43_155_456)
    expected = {"vision": vision if "vision" in stage.towers else 0, "language": language, "head": 0}
    assert {tower: row["trainable"] for tower, row in model.parameters_by_tower(vlm).items()} == expected


def test_nf4_takes_the_seven_matrices_of_each_language_layer_and_no_other():
    """The pipeline's own configuration, applied to the 7B architecture on the meta device."""
    vlm = on_meta()
    AutoHfQuantizer.from_config(pipelines_nf4())._process_model_before_weight_loading(vlm, device_map={"": "cpu"})
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    assert set(model.nf4_layers(vlm)) == {
        f"model.language_model.layers.{layer}.{part}_proj"
        for layer in range(28)
        for part in [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    }
    assert len(model.nf4_layers(vlm)) == 196
    model.check_precision(vlm, "nf4")


def weights_on_disk(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


def test_a_hub_folder_loads_whole_and_nf4_keeps_the_vision_tower_exact(folder):
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    on_disk = weights_on_disk(folder)
    assert torch.equal(model.load(folder, **options).lm_head.weight, on_disk["lm_head.weight"])
    vlm = model.load(folder, quantization_config=pipelines_nf4(), **options)
    model.check_precision(vlm, "nf4")
    for name, weight in vlm.model.visual.state_dict().items():
        assert torch.equal(weight, on_disk[f"visual.{name}"]), name
    weight = vlm.model.language_model.layers[0].mlp.up_proj.weight
    exact = on_disk["model.layers.0.mlp.up_proj.weight"].float()
    off = (dequantize_4bit(weight.data, weight.quant_state).float() - exact).norm() / exact.norm()
    assert 0.01 < off < 0.15, "NF4 rounds a normal weight by about a tenth"


def test_the_hubs_processor_files_give_the_pixel_budget_and_the_token_ids(folder):
    low, high = SCALES["7b"]["min_pixels"], SCALES["7b"]["max_pixels"]
    processor = Qwen2VLProcessor.from_pretrained(folder, min_pixels=low, max_pixels=high)
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (256 * 784, 1280 * 784)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
    assert ids == [151645, 151655, 151652]
    for width, height in random_7b.SIZES:
        patches = processor.image_processor.get_number_of_image_patches(height, width)
        assert 1270 <= patches // 4 <= 1280


def check(folder, *words: str) -> tuple[int, list[dict]]:
    """The command's exit status and the rows of its report."""
    status = check_7b.main(["--tiny", "--folder", str(folder), "--steps", "2", "--accumulation", "1", *words])
    return status, read_json(folder / "report" / "report.json")["rows"]


@pytest.mark.slow
def test_the_check_made_small(tmp_path, capsys):
    """Train, be killed, resume, predict, merge, reload; then a call that has no time adds to the report."""
    status, (row,) = check(tmp_path, "--recipes", "r1-llm-only")
    shown = capsys.readouterr().out
    assert status == 0 and row["wrong"] == [], shown
    assert row["ends"] == [check_7b.KILLED, 0] and len(row["losses"]) == 2 and row["step_seconds"]
    assert {step.split()[-1] for step in row["seconds"]} >= {"baseline", "train", "predictions", "merge", "merged"}
    assert not list((tmp_path / "runs").iterdir())

    written = next((tmp_path / "model").glob("*.safetensors")).stat().st_mtime_ns
    status, rows = check(tmp_path, "--recipes", "r5-reward", "--no-kill")
    assert status == 0 and rows[0] == row, capsys.readouterr().out
    assert len(rows[1]["losses"]) == 2 + 2

    status, rows = check(tmp_path, "--recipes", "r4-joint", "--minutes", "0")
    assert status == 1 and [row["recipe"] for row in rows] == ["r1-llm-only", "r4-joint", "r5-reward"]
    assert rows[0] == row and "stopped by --minutes" in rows[1]["wrong"][0]
    assert next((tmp_path / "model").glob("*.safetensors")).stat().st_mtime_ns == written, "the model is made once"


@pytest.mark.slow
def test_two_processes_and_one_have_the_same_losses(tmp_path, capsys):
    status, rows = check(tmp_path, "--recipes", "r4-joint", "--gpus", "2", "--ways", "processes", "one GPU")
    assert status == 0, capsys.readouterr().out
    assert [(row["way"], row["ends"]) for row in rows] == [("one GPU", [check_7b.KILLED]),
                                                           ("processes", [check_7b.KILLED, 0])]
    assert len(rows[0]["losses"]) == 2 and not any("merge" in step for step in rows[0]["seconds"])
    rows[1]["losses"] = [1.0, 1.0]
    assert "on one GPU" in check_7b.other_losses(rows[1], rows)[0]


def test_the_time_that_is_left_and_an_event_end_a_run_with_its_children(tmp_path):
    forks = [sys.executable, "-c", "import os, time; os.fork(); open(f'{os.getpid()}', 'w'); time.sleep(60)"]
    for stop, left, end in ((lambda: False, 3, check_7b.LATE), (lambda: len(os.listdir()) > 4, 60, check_7b.KILLED)):
        assert check_7b.run_until(stop, forks, tmp_path / "log", dict(os.environ), time.monotonic() + left) == end
    pids = [int(name) for name in os.listdir() if name.isdigit()]
    assert pids and not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)
