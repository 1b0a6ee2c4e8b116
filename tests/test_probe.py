"""A look inside a running model: shapes, costs of a step, attention of a coordinate."""

import io

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from small_training import load_tiny, small_processor, squares
from transformers import Qwen2VLProcessor

from helpers import collate, model, probe
from helpers.recipes import RECIPES
from helpers.scenes import render_scene
from helpers.settings import TINY_BASE


@pytest.fixture(scope="module")
def tiny():
    return load_tiny(attn_implementation="eager")


@pytest.fixture(scope="module")
def batch():
    return collate.Collator(small_processor(), "Where?")([squares()[i] for i in range(2)])


def test_shapes_on_the_way(tiny, batch):
    tower = tiny.model.visual
    seen = probe.shapes(tiny, batch, {"in": (tower.merger.mlp, "in"), "out": (tower.merger, "out")})
    width, hidden = tower.config.embed_dim, tiny.config.text_config.hidden_size
    assert seen == {"in": (32, 4 * width), "out": (32, hidden)}
    assert not tower.merger._forward_hooks and not tower.merger.mlp._forward_hooks


@pytest.mark.parametrize("recipe", ["r1-llm-only", "r4-joint"])
def test_a_frozen_tower_keeps_nothing_and_has_no_backward(tiny, batch, recipe):
    tuned = get_peft_model(tiny, LoraConfig(r=2, target_modules=RECIPES[recipe][0].lora_targets))
    model.trainable_to_fp32(tuned)
    costs = probe.step_costs(tuned, batch, repeats=1)
    tower = [costs[part] for part in ("vision: blocks", "vision: merger")]
    if recipe == "r1-llm-only":
        assert all(cost["kept"] == cost["backward"] == 0 for cost in tower)
    else:
        assert all(cost["kept"] > 0 and cost["backward"] > 0 for cost in tower)
    language = costs["language: layers"]
    tokens, text = batch["input_ids"].numel(), tiny.config.text_config
    least = tokens * text.hidden_size * 2 * text.num_hidden_layers  # one hidden state in bf16 a layer
    assert least < language["kept"] < 100 * least
    assert all(cost["forward"] >= 0 for cost in costs.values()) and language["backward"] > 0
    assert costs["head"]["backward"] > 0 and set(costs) == {*probe.PARTS, probe.REST}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tuned.modules())
    assert all(weight.grad is None for weight in tuned.parameters())
    tuned.unload()


def test_where_each_coordinate_is_chosen():
    pieces = ["7", "<|box_start|>", *"(27,4),(1000,9)", "<|box_end|>"]
    assert probe.coordinate_places(pieces) == [2, 5, 9, 14]
    assert probe.coordinate_places(pieces, start=3) == [9, 14]
    assert probe.coordinate_places(["no", " table"]) == []


def test_a_look_gives_maps_of_the_picture(tiny):
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=32 * 784)
    images = [Image.open(io.BytesIO(render_scene(0, i, "base").jpeg)).resize((224, 112)) for i in range(4)]
    looks = [probe.look(tiny, processor, image, "Detect the bounding box of the barcode.") for image in images]
    looks = [look for look in looks if look is not None]
    assert looks, "the base answers with a box when asked for a barcode"
    for look in looks:
        assert look.maps.shape == (tiny.config.text_config.num_hidden_layers, 4, 4, 8)
        shares = look.maps.sum((2, 3))
        assert (look.maps >= 0).all() and (shares > 0).all() and (shares < 1).all()
        assert "(" in look.text and look.boxes.shape[1] == 4
    nowhere = probe.look(tiny, processor, images[0], "Detect the bounding box of the barcode.", max_new_tokens=2)
    assert nowhere is None
    sdpa = load_tiny(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attention is sdpa; load the model with eager"):
        probe.look(sdpa, processor, images[0], "Where?")


def test_lift_and_centres_of_a_known_map():
    maps = np.zeros((1, 4, 4, 8))
    maps[0, :, 1, 6] = 0.5  # one cell: x .75 to .875, y .25 to .5
    look = probe.Look("", np.array([[0.75, 0.25, 0.875, 0.5]]), maps)
    np.testing.assert_allclose(probe.lift(look, look.boxes[0]), 32)  # all of it on one of 32 cells
    np.testing.assert_allclose(probe.lift(look, np.array([0, 0, 1, 1])), 1)
    np.testing.assert_allclose(probe.centre(maps)[0, 0], [0.8125, 0.375])
    distances = probe.edge_distances([look, look], 0)["x0"]
    assert distances == pytest.approx({"x0": 0.0625, "y0": 0.125, "x1": 0.0625, "y1": 0.125})


def test_cells_inside_a_box():
    cover = probe.inside(np.array([0.125, 0.0, 1.0, 0.5]), 2, 4)
    np.testing.assert_allclose(cover, [[0.5, 1, 1, 1], [0, 0, 0, 0]])
