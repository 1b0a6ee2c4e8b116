"""The bugs of notebooks/05_debug_dtype_issue happen today, and this project's fix of each of them works.

Where a test says that a bug is gone, a library has repaired it: take its section out of the notebook.
"""

import pytest
import torch
from small_training import load_tiny, nf4_config, small_processor, squares
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from helpers import collate, messages, model, predict, trainer
from helpers.topics import bugs
from helpers.topics.training import PROMPT, nf4, trainer_for

GONE = "is gone: a library has repaired it, so its section of notebooks/05_debug_dtype_issue can go."


@pytest.fixture(scope="module")
def batch(processor, rows):
    return collate.Collator(processor, PROMPT)([rows[i] for i in range(4)])


@pytest.fixture(scope="module")
def material():
    return squares().select(range(4)), small_processor()


def load(dtype=torch.bfloat16):
    return load_tiny(dtype=dtype, attn_implementation="eager")


def test_a_tower_of_two_dtypes_breaks_and_autocast_mends_it(batch):
    vlm = load()
    whole = bugs.outcome(vlm, **batch)
    vlm.model.visual.merger.float()
    assert whole.startswith("loss") and "RuntimeError" in bugs.outcome(vlm, **batch), f"the tower in two dtypes {GONE}"
    with torch.autocast("cpu", torch.bfloat16):
        assert bugs.outcome(vlm, **batch).startswith("loss")


def test_an_nf4_tower_turns_pixels_into_bytes_without_an_error_and_is_refused(batch):
    wrong = load_tiny(quantization_config=nf4(torch.bfloat16, skip=["visual", "lm_head"]))
    as_bytes = batch | {"pixel_values": batch["pixel_values"].to(wrong.model.visual.get_dtype())}
    assert as_bytes["pixel_values"].dtype == torch.uint8, f"the NF4 vision tower {GONE}"
    assert bugs.outcome(wrong, **as_bytes).startswith("loss")
    with pytest.raises(ValueError, match="is NF4 and should not be"):
        model.check_precision(wrong, "nf4")


def test_trainer_multiplies_the_batch_where_it_sees_two_gpus_and_the_projects_does_not(material, tmp_path):
    one, spread = {"": "cpu"}, {"model.visual": 0, "model.language_model": 1}
    found = bugs.on_two_gpus(load(), one, *material, tmp_path, Trainer)
    assert found == {"GPUs counted": 2, "batch": 8, "model": "DataParallel"}, f"Trainer's larger batch {GONE}"
    assert bugs.on_two_gpus(load(), spread, *material, tmp_path, Trainer)["batch"] == 4
    lora = trainer_for(load(), *material, tmp_path).model
    found = bugs.on_two_gpus(lora, one, *material, tmp_path, trainer.BoxTrainer)
    assert found == {"GPUs counted": 1, "batch": 4, "model": "Qwen2VLForConditionalGeneration"}


def test_a_small_step_is_lost_in_bf16_and_kept_in_fp32():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 300).mul(0.04).bfloat16())
    weight.grad = torch.randn(300, 300).bfloat16()
    in_bf16, in_fp32 = (bugs.walk([weight], 1e-5, 20, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert in_bf16["moved"].iloc[-1] == in_bf16["moved"].iloc[0] < 0.15  # nothing adds up
    assert in_bf16["way"].iloc[-1] < 4 and in_fp32["moved"].iloc[0] > 0.999
    assert in_fp32["way"].iloc[-1] == pytest.approx(20, rel=0.02)


def test_trl_casts_lora_on_a_quantized_base_and_the_projects_trainer_keeps_fp32(material, tmp_path):
    from peft import LoraConfig, get_peft_model

    for kind, dtype in ((SFTTrainer, torch.bfloat16), (trainer.BoxTrainer, torch.float32)):
        vlm = get_peft_model(load_tiny(quantization_config=nf4_config()), LoraConfig(r=2, target_modules=r".*\.q_proj"))
        trainer_for(vlm, *material, tmp_path, kind)
        assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {dtype}, f"TRL's cast of LoRA {GONE}"


@pytest.mark.parametrize("kind", [SFTTrainer, trainer.BoxTrainer])
def test_trainer_resumes_from_the_base_and_box_trainer_from_the_checkpoint(kind, material, tmp_path):
    base = {name: weight.float() for name, weight in load().named_parameters()}
    trained, start = bugs.resumed(kind, load, *material, tmp_path)
    assert trained.keys() == start.keys() and any(not torch.equal(trained[name], base[name]) for name in trained)
    expected = base if kind is SFTTrainer else trained
    assert all(torch.equal(start[name], expected[name]) for name in trained), f"the resume from the base {GONE}"


def test_autocast_makes_no_master_weights_and_adam_in_bf16_forgets_nothing(batch):
    for dtype, kept in ((torch.float32, 0.999), (torch.bfloat16, 1.0)):
        step = bugs.one_step(load(dtype), batch, autocast=True)
        assert {step["weights"], step["gradient"], step["second moment"]} == {dtype}
        assert step[".999 of a moment of 1"] == pytest.approx(kept, abs=1e-6)


def test_a_large_residual_stream_is_nan_in_fp16_and_the_same_model_in_fp32(batch):
    loss = {dtype: bugs.outcome(bugs.scale_residual(load(dtype), 2**14), **batch)
            for dtype in (torch.float32, torch.float16)}
    assert loss[torch.float16] == "loss nan" and loss[torch.float32] == bugs.outcome(load(torch.float32), **batch)


def test_without_the_end_in_its_labels_a_model_never_stops_and_the_collator_refuses(batch, material):
    rows, processor = material
    end = processor.tokenizer.convert_tokens_to_ids(messages.END_OF_TURN)
    masked = batch["labels"].masked_fill(batch["input_ids"] == end, collate.IGNORED)
    with pytest.raises(ValueError, match="never learn to stop"):
        collate.check_end_token(masked, end)
    for labels, stops in ((batch["labels"], True), (masked, False)):
        learned = bugs.learn_head(load(torch.float32), batch, labels, end)
        lines = predict.generate_lines(learned, processor, list(rows), PROMPT,
                                       {"max_new_tokens": 64, "do_sample": False})
        assert any(line["stopped"] for line in lines) == stops
        assert any(line["boxes"] for line in lines)  # the first box hides the fault
