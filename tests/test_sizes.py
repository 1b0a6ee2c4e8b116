"""Arithmetic about models, beside what the libraries count."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, get_peft_model
from small_training import load_tiny, nf4_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

from helpers import model, sizes
from helpers.dev import random_7b
from helpers.recipes import RECIPES


@pytest.fixture(scope="module")
def tiny():
    return load_tiny(attn_implementation="eager")


@pytest.fixture(scope="module")
def seven():
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(random_7b.config(random_7b.PUBLISHED))


def test_parts_add_up_to_towers(tiny, seven):
    for vlm in (tiny, seven):
        parts, towers = sizes.parameters_by_part(vlm), model.parameters_by_tower(vlm)
        for tower in towers:
            assert sum(n for part, n in parts.items() if part.startswith(tower)) == towers[tower]["total"]
    assert parts["language: layers"] == 6_525_618_176
    with pytest.raises(ValueError, match="'elsewhere.weight' belongs to no part"):
        sizes.part_of("elsewhere.weight")


@pytest.mark.parametrize("rank", [1, 8])
def test_loras_weights_by_formula_and_by_peft(tiny, rank):
    for recipe in ("r1-llm-only", "r4-joint"):
        pattern = RECIPES[recipe][0].lora_targets
        expected = sizes.lora_weights(tiny, pattern, rank)
        tuned = get_peft_model(tiny, LoraConfig(r=rank, target_modules=pattern))
        assert sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad) == expected > 0
        tuned.unload()


@pytest.mark.parametrize(("block", "double"), [(64, False), (64, True), (256, False), (1024, True)])
def test_nf4s_bytes_are_those_that_bitsandbytes_takes(block, double):
    weight = torch.randn(96, 1000)  # no whole number of blocks, nor of 256 scales
    packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=double)
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes + state.offset.nbytes if double else 0)
    assert sizes.nf4_bytes(weight.numel(), block, double) == packed.nbytes + scales


@pytest.mark.parametrize("how", sizes.PRECISIONS)
def test_bytes_of_weights_by_formula_and_as_held(tiny, how):
    int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=nf4_config().llm_int8_skip_modules)
    vlm = load_tiny(quantization_config={"int8": int8, "nf4": nf4_config()}.get(how), dtype=torch.bfloat16)
    assert sizes.weight_bytes(tiny, how) == sizes.held_bytes(vlm.float() if how == "fp32" else vlm)


def test_bytes_of_7b(seven):
    total = {how: sum(sizes.weight_bytes(seven, how).values()) for how in sizes.PRECISIONS}
    assert total["fp32"] == 2 * total["bf16"] == 33_165_502_464
    linear, scales = 28 * 233_046_016, 28 * 233_046_016 // 64
    assert total["nf4"] == total["bf16"] - 2 * linear + linear // 2 + scales + 4 * scales // 256 + 4 * 28 * 7


def picture_batch(vlm, rows=4, columns=6, text=5):
    """One picture of rows x columns patches in a sequence with `text` tokens around it."""
    image = vlm.config.image_token_id
    ids = torch.tensor([[1, *[image] * (rows * columns // 4), *range(2, text + 1)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == image).int(),
            "pixel_values": torch.randn(rows * columns, 1176), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def test_operations_by_formula_are_those_that_torch_counts(tiny):
    batch = picture_batch(tiny)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tiny(**batch)
    formula = sizes.forward_flops(tiny, (1, 4, 6), batch["input_ids"].shape[1])
    assert sum(formula.values()) == counter.get_total_flops()
    counts = {name.rpartition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    for part, name in {"vision: patch embedding": "patch_embed", "vision: merger": "merger", "head": "lm_head",
                       "language: layers": "language_model"}.items():
        assert formula[part] == counts[name], part
    assert sizes.image_tokens((1, 4, 6)) == 6 and sizes.image_tokens((2, 4, 6)) == 12


def test_rope_angles_are_those_of_transformers(tiny, seven):
    for vlm in (tiny, seven):
        text = vlm.config.text_config
        angles = sizes.rope_angles(text.rope_parameters, text.hidden_size // text.num_attention_heads)
        assert [len(part) for part in angles.values()] == text.rope_parameters["mrope_section"]
    frequencies = tiny.model.language_model.rotary_emb.inv_freq
    mine = sizes.rope_angles(tiny.config.text_config.rope_parameters, 2 * len(frequencies))
    np.testing.assert_allclose(np.concatenate(list(mine.values())), np.degrees(frequencies), rtol=1e-5)
