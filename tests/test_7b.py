"""The 7B model without its download: names, counts and layouts against literals, the checking command made small."""

import json
import math
import re
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipeline_runner import SOURCE
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.quantizers import AutoHfQuantizer

from helpers import model
from helpers.dev import check_7b, random_7b
from helpers.recipes import RECIPES, SCALES

HIDDEN, INTERMEDIATE, KEYS, VISION, RANK = 3584, 18944, 4 * 128, 1280, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shrunken model's folder, laid out like the Hub's."""
    path = tmp_path_factory.mktemp("hub") / "model"
    random_7b.write_model(path, random_7b.SHRUNKEN)
    return path


def on_meta():
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED)).requires_grad_(False)


def pipelines_nf4() -> BitsAndBytesConfig:
    """The quantisation that pipeline.py itself writes down."""
    source = SOURCE.read_text()
    start = source.index("nf4 = BitsAndBytesConfig(")
    names = {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch, "model": model}
    exec(source[start : source.index("\n)", start) + 2], names)
    return names["nf4"]


def test_the_published_configuration_is_read_whole(tmp_path):
    """The flat, older config.json of the Hub: no value falls back to a default of transformers."""
    random_7b.write_json(tmp_path / "config.json", random_7b.PUBLISHED)
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
    assert totals["vision"] == check_7b.VISION == 675_759_104
    assert totals["head"] == 152064 * HIDDEN


# The published files' names, N for a layer's number: how many of each, and its shape. Written by hand.
PUBLISHED_WEIGHTS = {
    "model.embed_tokens.weight": (1, (152064, 3584)),
    "model.layers.N.input_layernorm.weight": (28, (3584,)),
    "model.layers.N.mlp.down_proj.weight": (28, (3584, 18944)),
    "model.layers.N.mlp.gate_proj.weight": (28, (18944, 3584)),
    "model.layers.N.mlp.up_proj.weight": (28, (18944, 3584)),
    "model.layers.N.post_attention_layernorm.weight": (28, (3584,)),
    "model.layers.N.self_attn.k_proj.bias": (28, (512,)),
    "model.layers.N.self_attn.k_proj.weight": (28, (512, 3584)),
    "model.layers.N.self_attn.o_proj.weight": (28, (3584, 3584)),
    "model.layers.N.self_attn.q_proj.bias": (28, (3584,)),
    "model.layers.N.self_attn.q_proj.weight": (28, (3584, 3584)),
    "model.layers.N.self_attn.v_proj.bias": (28, (512,)),
    "model.layers.N.self_attn.v_proj.weight": (28, (512, 3584)),
    "model.norm.weight": (1, (3584,)),
    "lm_head.weight": (1, (152064, 3584)),
    "visual.blocks.N.attn.proj.bias": (32, (1280,)),
    "visual.blocks.N.attn.proj.weight": (32, (1280, 1280)),
    "visual.blocks.N.attn.qkv.bias": (32, (3840,)),
    "visual.blocks.N.attn.qkv.weight": (32, (3840, 1280)),
    "visual.blocks.N.mlp.fc1.bias": (32, (5120,)),
    "visual.blocks.N.mlp.fc1.weight": (32, (5120, 1280)),
    "visual.blocks.N.mlp.fc2.bias": (32, (1280,)),
    "visual.blocks.N.mlp.fc2.weight": (32, (1280, 5120)),
    "visual.blocks.N.norm1.bias": (32, (1280,)),
    "visual.blocks.N.norm1.weight": (32, (1280,)),
    "visual.blocks.N.norm2.bias": (32, (1280,)),
    "visual.blocks.N.norm2.weight": (32, (1280,)),
    "visual.merger.ln_q.bias": (1, (1280,)),
    "visual.merger.ln_q.weight": (1, (1280,)),
    "visual.merger.mlp.0.bias": (1, (5120,)),
    "visual.merger.mlp.0.weight": (1, (5120, 5120)),
    "visual.merger.mlp.2.bias": (1, (3584,)),
    "visual.merger.mlp.2.weight": (1, (3584, 5120)),
    "visual.patch_embed.proj.weight": (1, (1280, 3, 2, 14, 14)),
}


def test_every_weight_has_its_place_in_the_published_files():
    """Names and shapes of the model built here, by the older names, against the literals; so do their sums."""
    built = {}
    for name, weight in on_meta().state_dict().items():
        folded = re.sub(r"\.\d+\.(?!weight|bias)", ".N.", random_7b.hub_name(name))
        count, shapes = built.get(folded, (0, set()))
        built[folded] = (count + 1, shapes | {tuple(weight.shape)})
    assert built == {name: (count, {shape}) for name, (count, shape) in PUBLISHED_WEIGHTS.items()}
    sizes = {name: count * math.prod(shape) for name, (count, shape) in PUBLISHED_WEIGHTS.items()}
    assert sum(sizes.values()) == check_7b.WEIGHTS and sum(count for count, _ in PUBLISHED_WEIGHTS.values()) == 730
    assert sum(size for name, size in sizes.items() if name.startswith("visual.")) == check_7b.VISION


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
    assert (language, vision) == (check_7b.LORA_LANGUAGE, check_7b.LORA_VISION) == (161_480_704, 43_155_456)
    expected = {"vision": vision if "vision" in stage.towers else 0, "language": language, "head": 0}
    assert {tower: row["trainable"] for tower, row in model.parameters_by_tower(vlm).items()} == expected
    assert expected == check_7b.EXPECTED[recipe][-1]


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
    assert len(model.nf4_layers(vlm)) == check_7b.NF4_LAYERS == 196
    model.check_precision(vlm, "nf4")


def weights_on_disk(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


def test_older_key_names_load_to_the_same_weights(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(random_7b, "SHARD", 10**7)
    made = random_7b.write_model(tmp_path / "sharded", random_7b.SHRUNKEN)
    assert made["shards"] > 2
    on_disk = weights_on_disk(tmp_path / "sharded")
    tops = {".".join(name.split(".")[:2]) for name in on_disk}
    assert tops == {"visual.patch_embed", "visual.blocks", "visual.merger", "model.embed_tokens", "model.layers",
                    "model.norm", "lm_head.weight"}
    loaded, report = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "sharded", dtype=torch.bfloat16, device_map={"": "cpu"}, output_loading_info=True)
    assert not any(report.values()), report
    state = loaded.state_dict()
    assert len(state) == len(on_disk)
    for name, weight in state.items():
        assert torch.equal(weight, on_disk[random_7b.hub_name(name)]), name


def test_nf4_of_a_hub_folder_keeps_the_vision_tower_exact(folder):
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=pipelines_nf4())
    model.check_precision(vlm, "nf4")
    on_disk = weights_on_disk(folder)
    for name, weight in vlm.state_dict().items():
        if name.startswith("model.visual."):
            assert torch.equal(weight, on_disk[random_7b.hub_name(name)]), name
    weight = vlm.model.language_model.layers[0].mlp.up_proj.weight
    from bitsandbytes.functional import dequantize_4bit

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
    for width, height in check_7b.SIZES:
        patches = processor.image_processor.get_number_of_image_patches(height, width)
        assert 1270 <= patches // 4 <= 1280


def check(monkeypatch, folder, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_7b", "--tiny", "--folder", str(folder), "--steps", "2", "--accumulation",
                                      "1", "--val", "2", "--new-tokens", "64", *words])
    return check_7b.main()


def rows_of(folder) -> list[dict]:
    return json.loads((folder / "report" / "report.json").read_text())["rows"]


def test_the_check_made_small(monkeypatch, tmp_path, capsys):
    """The command itself: train, be killed, go on, predict, merge in two ways, reload; then a call that has no time."""
    assert check(monkeypatch, tmp_path, "--recipes", "r1-llm-only") == 0, capsys.readouterr().out
    row, = rows_of(tmp_path)
    assert row["codes"] == [-9, 0] and row["resumed_at"] == [1] and row["step_seconds"]["n"] == 2 and row["wrong"] == []
    assert row["nf4_layers"] == [0, 14] and row["trainable"][0]["vision"] == 0 < row["trainable"][0]["language"]
    assert len(row["merge_algebra"]) == 2 and max(row["merge_algebra"]) < 1e-5
    apart, = row["against_as_trained"]
    assert 0 < apart["dequantised"] < apart["full"] < 0.5
    assert set(check_7b.TIMED) <= set(row["seconds"])
    assert not list((tmp_path / "runs").glob("*r1-llm-only*/"))

    model_file = next((tmp_path / "model").glob("*.safetensors"))
    written, shown = model_file.stat().st_mtime_ns, capsys.readouterr().out
    assert re.search(r"\| a step, s: median \(n\) \| [\d.]+ \(2\) \|", shown) and "| wrong | nothing |" in shown
    assert check(monkeypatch, tmp_path, "--recipes", "r2-vision-only", "r4-joint", "--minutes", "0") == 1
    assert model_file.stat().st_mtime_ns == written, "the model of the first call is used again"
    assert [row["recipe"] for row in rows_of(tmp_path)] == ["r1-llm-only", "r2-vision-only", "r4-joint"]
    assert rows_of(tmp_path)[0] == row and rows_of(tmp_path)[1]["codes"] == [None]
    shown = capsys.readouterr().out
    assert "| wrong | nothing | not seen to its end: stopped by --minutes before its first step |" in shown


def test_the_time_that_is_left_stops_a_recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_7b", "--folder", str(tmp_path), "--minutes", "0.02"])
    options, start = check_7b.arguments(), time.monotonic()
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert check_7b.run_until(sleeping, tmp_path / "log", options, [0]) is None
    assert time.monotonic() - start < 10
    row = {"codes": [-9, None], "seconds": {"load": [1.0], "train": [2.0]}}
    found = check_7b.wrong(options, "r1-llm-only", row, True)
    assert found == ["not seen to its end: stopped by --minutes after 'train'"]


@pytest.mark.parametrize(("broken", "said"), [
    ({"codes": [-9, 1]}, r"exit codes \[-9, 1\]"),
    ({"resumed_at": []}, r"resumed at step \[\], expected \[10\]"),
    ({"reserved": 24.5}, "24.5 GiB reserved, over the cap of 24"),
    ({"trainable": [{"vision": 0, "language": 161_480_703, "head": 0}]}, "161480703"),
    ({"nf4_layers": [0, 195]}, "195.* NF4 layers, expected 196"),
])
def test_the_check_says_what_is_wrong(monkeypatch, broken, said):
    monkeypatch.setattr(sys, "argv", ["check_7b"])
    right = {"codes": [-9, 0], "resumed_at": [10], "reserved": 23.0, "cap_gib": 24, "nf4_layers": [0, 196],
             "trainable": check_7b.EXPECTED["r1-llm-only"] * 2}
    assert check_7b.wrong(check_7b.arguments(), "r1-llm-only", right, True) == []
    fault, = check_7b.wrong(check_7b.arguments(), "r1-llm-only", right | broken)
    assert re.search(said, fault)
