"""What the topic notebooks share, what one of them needs, and that each stays short."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_training import load_tiny, small_processor, squares

from helpers import collate, model
from helpers.recipes import RECIPES, SCALES
from helpers.settings import TINY_BASE, ParameterError
from helpers.topics import sizes
from helpers.topics.opening import model_path, opening
from helpers.topics.serving import served

RULES = {"scale": ("tiny", "7b"), "pictures": range(8, 124), "rate": (0.0, 1e-4), "only": bool,
         "run": "a run's name, or None", "ranks": [range(1, 1000)]}  # fmt: skip


def opened(monkeypatch, *arguments):
    """The parameters of a notebook that ran as a script with these arguments."""
    monkeypatch.setattr("sys.argv", ["notebook.py", *arguments])
    namespace = {"max_pixels": None, "scale": "tiny", "pictures": 8, "rate": 1e-5, "only": True, "run": None,
                 "ranks": "2,8"}  # fmt: skip
    opening(namespace, "max_pixels", **RULES)
    return namespace


def test_an_opening_fills_in_what_the_scale_says(monkeypatch):
    assert opened(monkeypatch) == {"max_pixels": SCALES["tiny"]["max_pixels"], "scale": "tiny", "pictures": 8,
                                   "rate": 1e-5, "only": True, "run": None, "ranks": [2, 8]}  # fmt: skip
    given = opened(monkeypatch, "pictures=9", "max_pixels=784", "ranks=4", "run=r4-joint", "scale=7b", "only=False")
    assert (given["pictures"], given["max_pixels"], given["ranks"], given["run"]) == (9, 784, [4], "r4-joint")


@pytest.mark.parametrize(("given", "said"), [
    ("pictures=7", "pictures=7 is not valid: expected a whole number from 8 to 123."),
    ("rate=1", "rate=1 is not valid: expected a number above 0.0 and at most 0.0001."),
    ("only=yes", "only='yes' is not valid: expected True or False."),
    ("run= ", "run=' ' is not valid: expected a run's name (or None for the default)."),
    ("ranks=0,2", "ranks='0,2' is not valid: expected whole numbers from 1 to 999 with commas between them"),
    ("scale=7B", "scale='7B' is not valid: expected one of tiny, 7b."),
    ("max_pixels=3", "max_pixels=3 is not valid: expected a whole number from 784"),
    ("picture=9", "picture is not a parameter; did you mean pictures?"),
])  # fmt: skip
def test_an_opening_refuses_in_one_sentence(monkeypatch, given, said):
    with pytest.raises(ParameterError) as refused:
        opened(monkeypatch, given)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_models_path(monkeypatch, tmp_path):
    assert model_path("tiny", None) == model_path("tiny", "embedded") == str(TINY_BASE)
    assert model_path("tiny", "someone/model") == "someone/model"
    with pytest.raises(ParameterError, match=r"has no config\.json"):
        model_path("tiny", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="scale='7b' needs a GPU"):
        model_path("7b", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model_path("7b", None) == "Qwen/Qwen2-VL-7B-Instruct"


@pytest.fixture(scope="module")
def tiny():
    return load_tiny(attn_implementation="eager")


def test_the_parts_of_7b_add_up(tiny):
    for vlm in (tiny, sizes.seven_b()):
        parts, towers = sizes.parameters_by_part(vlm), model.parameters_by_tower(vlm)
        for tower in towers:
            assert sum(n for part, n in parts.items() if part.startswith(tower)) == towers[tower]["total"]
    assert parts["language: layers"] == 6_525_618_176 and sum(parts.values()) == 8_291_375_616


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(tiny):
    batch, kept = collate.Collator(small_processor(), "Where?")([squares()[i] for i in range(2)]), {}
    for recipe in ("r1-llm-only", "r4-joint"):
        targets = RECIPES[recipe][0].lora_targets
        by_hand = sizes.lora_weights(tiny, targets, 2)
        tuned = get_peft_model(tiny, LoraConfig(r=2, target_modules=targets))
        model.trainable_to_fp32(tuned)
        assert by_hand == sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad) > 0
        with sizes.kept_bytes(tuned) as counted, torch.autocast("cpu", torch.bfloat16):
            tuned.get_base_model().model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        kept[recipe] = counted["kept"]
        tuned.unload()
    width, rows = tiny.config.vision_config.embed_dim, len(batch["pixel_values"])
    assert kept["r1-llm-only"] == 0
    assert kept["r4-joint"] > 2 * rows * width * tiny.config.vision_config.depth  # a state in bf16 a block, at least


@pytest.mark.parametrize(("program", "patience", "said"), [
    ("import sys; sys.exit('nonsense')", 60, "no server: .*nonsense"), ("import time; time.sleep(60)", 1, "no server")])
def test_a_command_that_serves_nothing_is_an_error_with_its_own_words(program, patience, said):
    with pytest.raises(RuntimeError, match=said), served(sys.executable, "-c", program, patience=patience):
        pass
