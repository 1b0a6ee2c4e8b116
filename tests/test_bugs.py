"""The bugs of notebooks/05_debug_dtype_issue happen today, and this project's way round each of them works.

Where a test says that a bug is gone, a library has repaired it: take its section out of the notebook.
"""

import gc

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from peft import LoraConfig, get_peft_model
from small_training import load_tiny, nf4_config, small_processor, squares
from transformers import BitsAndBytesConfig, Trainer
from trl import SFTTrainer

from helpers import bugs, collate, messages, model, predict, trainer
from helpers.plots import precision
from helpers.recipes import RECIPES

GONE = "is gone: a library has repaired it, so its section of notebooks/05_debug_dtype_issue can go."
ROWS, PROCESSOR = squares().select(range(4)), small_processor()
COLLATOR = collate.Collator(PROCESSOR, "Detect the bounding box of the nutrition table.")
BATCH = COLLATOR(list(ROWS))
MATERIAL = {"data_collator": COLLATOR, "train_dataset": ROWS, "processing_class": PROCESSOR}
END = PROCESSOR.tokenizer.convert_tokens_to_ids(messages.END_OF_TURN)


def load(dtype=torch.bfloat16, nf4=None):
    return load_tiny(dtype=dtype, quantization_config=nf4, attn_implementation="eager")


def loss_of(vlm, **changed):
    return bugs.outcome(lambda: vlm(**BATCH | changed).loss)


def test_a_tower_of_two_dtypes_breaks_and_autocast_mends_it():
    vlm = load()
    assert loss_of(vlm).startswith("loss"), "a bf16 model no longer casts fp32 pixels by itself: section 1 says it does"
    vlm.model.visual.merger.float()
    assert "RuntimeError" in loss_of(vlm), f"the error of a tower in two dtypes {GONE}"
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(vlm).startswith("loss")


def test_an_nf4_tower_turns_pixels_into_bytes_without_an_error_and_is_refused():
    wrong = load(nf4=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                        llm_int8_skip_modules=["visual", "lm_head"]))
    assert wrong.model.visual.get_dtype() == torch.uint8, f"the NF4 vision tower {GONE}"
    pixels = BATCH["pixel_values"].to(wrong.model.visual.get_dtype())
    assert set(pixels.unique().tolist()) <= {0, 1, 2, 254, 255}
    silent = loss_of(wrong, pixel_values=pixels)
    assert silent.startswith("loss") and silent != loss_of(wrong), f"the picture of bytes {GONE}"
    with pytest.raises(ValueError, match="is NF4 and should not be"):
        model.check_precision(wrong, "nf4")


def test_trainer_multiplies_the_batch_where_it_sees_two_gpus_and_not_where_layers_are_spread(tmp_path):
    one, spread = {"": "cpu"}, {"model.visual": 0, "model.language_model": 1}
    lora = get_peft_model(load(nf4=nf4_config(torch.bfloat16)), LoraConfig(r=2, target_modules=r".*\.q_proj"))
    for vlm, called in ((load(), "DataParallel"), (lora, "PeftModel")):
        seen = bugs.on_two_gpus(Trainer, vlm, one, tmp_path, **MATERIAL)
        assert seen == {"n_gpu": 2, "batch": 8, "model": called}, f"Trainer's larger batch {GONE}"
        assert bugs.on_two_gpus(Trainer, vlm, spread, tmp_path, **MATERIAL)["n_gpu"] == 1
    assert "DataParallel" in bugs.on_two_gpus(SFTTrainer, load(), one, tmp_path, **MATERIAL)["refused"]
    assert bugs.on_two_gpus(trainer.BoxTrainer, lora, spread, tmp_path, **MATERIAL)["batch"] == 4


def test_data_parallel_cuts_patches_and_not_pictures():
    small, large = ROWS[0], ROWS[1] | {"image": ROWS[1]["image"].resize((112, 280))}
    processor = small_processor()
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 64 * 784}
    two = collate.Collator(processor, "Where?")([small, large])
    halves = bugs.halves(two)
    assert [len(half["image_grid_thw"]) for half in halves] == [1, 1]
    assert all(len(half["pixel_values"]) != half["image_grid_thw"].prod() for half in halves)
    vlm = load()
    assert all("Error" in bugs.outcome(lambda half=half: vlm(**half).loss) for half in halves)


def test_a_small_step_is_lost_in_bf16_and_kept_in_fp32_and_by_chance():
    torch.manual_seed(0)
    start = [torch.randn(300, 300).mul(0.04).bfloat16()]
    gradients = [torch.randn(300, 300)]
    walks = {held: bugs.walk(start, gradients, 1e-5, 20, held) for held in ("bf16", "fp32", "stochastic")}
    expected = (bugs.half_gap(start[0]) < 1e-5).float().mean().item()
    assert expected < 0.15 and walks["bf16"]["moved"][0] == pytest.approx(expected, abs=0.01)
    assert walks["bf16"]["moved"][-1] == pytest.approx(expected, abs=0.01)  # nothing adds up
    assert walks["fp32"]["moved"][0] > 0.999
    for held, way in (("fp32", 20), ("stochastic", 20)):
        assert walks[held]["distance"][-1] == pytest.approx(way, rel=0.02), held
    assert walks["bf16"]["distance"][-1] < 4


def test_stochastic_rounding_is_right_on_average_and_leaves_bf16_numbers_alone():
    torch.manual_seed(0)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(bugs.stochastic_round(exact.float()), exact)
    between = torch.full((200_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next bf16 number, 1 + 2**-7
    rounded = bugs.stochastic_round(between).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean().item() == pytest.approx(between[0].item(), abs=1e-4)


def test_half_a_gap_is_where_rounding_turns():
    weights = torch.randn(1000).bfloat16()
    for times, stays in ((0.99, True), (1.01, False)):
        there = (weights.float() + weights.sign().float() * bugs.half_gap(weights) * times).bfloat16()
        assert ((there == weights) == stays).all()
    assert bugs.half_gap(torch.zeros(1)) == 0


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 1.0])
def test_the_chart_of_lost_updates_splits_the_weights_at_the_step(rate, as_figures):
    gaps = bugs.half_gap(torch.randn(1000).mul(0.04).bfloat16()).numpy()
    figure = precision.lost_updates(gaps, rate, {"fp32": [1.0, 2.0, 3.0], "bf16": [0.1, 0.2, 0.3]})
    left, right = figure.axes
    heights = {bars.get_label().split(":")[0]: sum(bar.get_height() for bar in bars) for bars in left.containers}
    assert sum(heights.values()) == pytest.approx(100)
    assert heights["larger"] == pytest.approx(100 * (gaps > rate).mean())
    assert [list(line.get_ydata()) for line in right.lines] == [[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]]


def test_trl_casts_lora_on_a_quantised_base_and_trainable_to_fp32_casts_back(tmp_path):
    stage = RECIPES["r1-llm-only"][0]
    vlm = get_peft_model(load(nf4=nf4_config(torch.bfloat16)), LoraConfig(r=2, target_modules=stage.lora_targets))
    SFTTrainer(vlm, bugs.config(tmp_path), **MATERIAL)
    assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.bfloat16}, f"TRL's cast of LoRA {GONE}"
    model.trainable_to_fp32(vlm)
    model.check_trainable(vlm, stage)


def test_trainer_resumes_from_the_base_and_box_trainer_from_the_checkpoint(tmp_path):
    base = {name: weight.float() for name, weight in load().named_parameters()}
    for kind, begins_with in ((SFTTrainer, base), (trainer.BoxTrainer, None)):
        trained, start = bugs.resumed(kind, load, tmp_path / kind.__name__, **MATERIAL)
        assert start.step == 2 and trained.keys() == start.weights.keys() and len(trained) > 50
        assert any(not torch.equal(trained[name], base[name]) for name in trained)
        right = begins_with or trained
        assert all(torch.equal(start.weights[name], right[name]) for name in trained), (
            f"the resume from the base {GONE}" if kind is SFTTrainer else "BoxTrainer did not resume exactly")


def test_autocast_makes_no_master_weights_and_adam_in_bf16_forgets_nothing():
    held = {(dtype, autocast): bugs.one_step(load(dtype), BATCH, autocast)
            for dtype in (torch.float32, torch.bfloat16) for autocast in (True, False)}
    for (dtype, _), row in held.items():
        assert {row["weights"], row["gradient"], row["Adam"]} == {str(dtype).removeprefix("torch.")}
        assert row["bytes a weight"] == 4 * dtype.itemsize
        assert row["1 · .999 ^ 1000"] == (1.0 if dtype == torch.bfloat16 else pytest.approx(0.999**1000, rel=1e-3))
    exact, mixed = held[torch.float32, False]["logits"], held[torch.float32, True]["logits"]
    assert 0 < (mixed - exact).norm() / exact.norm() < 0.1


def test_a_large_residual_stream_is_no_number_in_fp16_and_the_same_model_in_bf16():
    plain = {dtype: float(loss_of(load(dtype)).split()[1]) for dtype in (torch.bfloat16, torch.float16)}
    large = {dtype: bugs.scale_residual(load(dtype), 2**14) for dtype in plain}
    assert float(loss_of(large[torch.bfloat16]).split()[1]) == pytest.approx(plain[torch.bfloat16], rel=0.02)
    assert loss_of(large[torch.float16]) == "loss nan" and plain[torch.float16] > 0
    assert bugs.largest_activation(large[torch.bfloat16], BATCH) > torch.finfo(torch.float16).max
    line, = predict.generate_lines(large[torch.float16], PROCESSOR, [ROWS[0]], COLLATOR.prompt,
                                   {"max_new_tokens": 4, "do_sample": False})
    assert line["text"] == PROCESSOR.tokenizer.decode([0]) * 4 and not line["boxes"]


def test_without_the_end_in_its_labels_a_model_never_stops_and_the_collator_refuses():
    masked = BATCH["labels"].masked_fill(BATCH["input_ids"] == END, collate.IGNORED)
    with pytest.raises(ValueError, match="never learn to stop"):
        collate.check_end_token(masked, END)
    for labels, stops in ((BATCH["labels"], True), (masked, False)):
        learned = bugs.learn_head(load(torch.float32), BATCH, labels, END)
        lines = predict.generate_lines(learned, PROCESSOR, list(ROWS), COLLATOR.prompt,
                                       {"max_new_tokens": 64, "do_sample": False})
        assert any(line["stopped"] for line in lines) == stops
        assert any(line["boxes"] for line in lines)  # the first box hides the fault
        assert (bugs.strict_detection([line["text"] for line in lines]) > 0) == stops


def test_stripped_marks_and_an_uncut_prompt_read_as_no_detection_by_a_strict_pattern_alone():
    answer = messages.target_text(ROWS[0]["objects"])
    kept = PROCESSOR.tokenizer.encode(answer + messages.END_OF_TURN, add_special_tokens=False)
    texts = {strip: PROCESSOR.decode(kept, skip_special_tokens=strip) for strip in (False, True)}
    uncut = COLLATOR.texts([ROWS[0]])[0]
    assert [bugs.strict_detection([text]) for text in (texts[False], texts[True], uncut)] == [1, 0, 0]
    assert all(len(messages.parse_text(text).boxes_xyxy_unit) == 1 for text in (*texts.values(), uncut))


def test_a_trainer_and_an_error_hold_the_model_until_they_are_collected(tmp_path):
    def held():
        return bugs.living_weights() - before

    def broken_run():
        vlm = load()
        vlm(input_ids=torch.tensor([[10**9]]))

    gc.collect()
    before = bugs.living_weights()
    sft = SFTTrainer(load(), bugs.config(tmp_path), **MATERIAL)
    size = held()
    del sft
    assert held() == size > 5, f"the ring of trainer and model {GONE}"
    model.free_memory()
    assert held() == 0
    with pytest.raises(IndexError) as error:
        broken_run()
    model.free_memory()
    assert held() == size
    del error
    model.free_memory()
    assert held() == 0


def test_out_and_the_last_error_hold_what_they_were_given_as_the_notebook_says():
    """In a kernel, with a small object in the model's place: `True` where it is still held."""
    begin = "import gc, weakref\nclass M: pass\nmodel = M(); held = weakref.ref(model)"
    look = "gc.collect(); print(held() is not None)"
    died = "def run():\n    x = M(); globals()['held'] = weakref.ref(x); 1 / 0\nrun()"
    sources = [begin, "model", "%reset -f out", "del model", look,
               begin, "model", "%xdel model", look, died, look, "1 / 0", look]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, allow_errors=True, kernel_name="python3").execute()
    printed = [cell.outputs[0].text.strip() for cell in notebook.cells if cell.source == look]
    assert printed == ["True", "False", "True", "False"]
