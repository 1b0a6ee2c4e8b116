"""NF4's rounding, by hand and in a model; what is left of an adapter; how far boxes move."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type
from peft import LoraConfig, get_peft_model
from small_training import load_tiny, nf4_config, small_processor, squares

from helpers import collate, model, quantisation, sizes
from helpers.recipes import RECIPES


@pytest.fixture(scope="module")
def batch():
    return collate.Collator(small_processor(), "Where?")([squares()[i] for i in range(2)])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 256])
def test_unpacking_is_bitsandbytes_where_that_is_right(block, double):
    values, packed, state = quantisation.nf4(torch.randn(40, 512), block, double)
    torch.testing.assert_close(values, dequantize_4bit(packed, state), rtol=0, atol=1e-6)


def test_rows_that_are_no_whole_number_of_blocks():
    """Nearest level x scale is the truth; bitsandbytes' kernel for AVX-512 takes wrong scales, its plain one does not.

    When it unpacks this right everywhere, `unpack` is not needed any more.
    """
    weight = torch.randn(32, 96)
    blocks, levels = weight.reshape(-1, 64), get_4bit_type("nf4", device="cpu")
    scales = blocks.abs().amax(1, keepdim=True)
    truth = (levels[((blocks / scales)[..., None] - levels).abs().argmin(-1)] * scales).reshape(32, 96)
    values, packed, state = quantisation.nf4(weight, double=False)
    assert torch.equal(values, truth) and quantisation.relative_error(values, weight) < 0.12
    right = torch.allclose(dequantize_4bit(packed, state), truth, rtol=0, atol=1e-6)
    assert right == (torch.backends.cpu.get_cpu_capability() != "AVX512")


def test_bytes_in_the_order_for_answers_are_refused():
    _, packed, state = quantisation.nf4(torch.randn(32, 64))
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="look at the weights of a model that has not answered yet"):
        quantisation.unpack(packed, state)


def test_every_row_of_the_tiny_base_is_a_whole_number_of_blocks():
    """On a CPU, bitsandbytes 0.50 would train and merge with wrong weights otherwise."""
    layers = sizes.linear_layers(load_tiny(), RECIPES["r1-llm-only"][0].lora_targets)
    assert layers and all(inputs % 64 == 0 for inputs, _ in layers.values())


def test_errors_of_layers(batch):
    vlm = load_tiny()
    errors = quantisation.layer_errors(vlm, {name: tensor for name, tensor in batch.items() if name != "labels"})
    assert set(errors) == set(sizes.linear_layers(vlm)) - {"lm_head"}
    assert all(0.05 < error["weights"] < 0.15 and 0 < error["outputs"] < 0.5 for error in errors.values())
    assert not any(module._forward_hooks for module in vlm.modules())


def test_logits_that_choose_the_answer(batch):
    vlm = load_tiny()
    logits = quantisation.answer_logits(vlm, batch)
    assert logits.shape == ((batch["labels"] != -100).sum(), vlm.config.text_config.vocab_size)
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"][batch["labels"] != -100])
    assert loss.item() == pytest.approx(vlm(**batch).loss.item(), rel=0.02)


LORA = LoraConfig(r=4, target_modules=RECIPES["r1-llm-only"][0].lora_targets)


def adapted(size):
    """LoRA of the language model on the NF4 base, its B matrices random numbers of `size`."""
    torch.manual_seed(0)
    tuned = get_peft_model(load_tiny(quantization_config=nf4_config()), LORA)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) * size
    model.trainable_to_fp32(tuned)
    return tuned


def test_a_small_adapter_is_lost_in_nf4_and_kept_in_16_bits():
    left = {}
    for size in (1e-4, 0.3):
        tuned = adapted(size)
        of_weights = quantisation.adapter_size(tuned)
        assert (of_weights < 0.01) if size == 1e-4 else (of_weights > 0.2)
        left[size, "nf4"] = quantisation.adapter_left(tuned, adapted(size).merge_and_unload())
        base = adapted(size).unload().dequantize().float()
        merged = get_peft_model(base, LORA)
        merged.load_state_dict({k: v for k, v in tuned.state_dict().items() if "lora_" in k}, strict=False)
        left[size, "dequantised"] = quantisation.adapter_left(tuned, merged.merge_and_unload())
    assert left[1e-4, "nf4"] < 0.3 < 0.7 < left[0.3, "nf4"]
    assert left[1e-4, "dequantised"] == pytest.approx(1, abs=0.02)
    assert left[0.3, "dequantised"] == pytest.approx(1, abs=0.01)


def test_how_far_boxes_move():
    a, b = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.503, 0.498]
    before = [{"boxes": [a]}, {"boxes": [a]}, {"boxes": []}, {"boxes": [a, b]}]
    after = [{"boxes": [a]}, {"boxes": [b]}, {"boxes": []}, {"boxes": [a]}]
    np.testing.assert_allclose(quantisation.box_shifts(before, after), [0, 3, 0, np.nan], atol=1e-9)
