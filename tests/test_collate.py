"""Batches and label masks: what the loss is computed on, as literals. Lengths against the processor's own."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import finished_model
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers import collate, predict
from helpers.boxes import CATEGORIES
from helpers.messages import longest_unit, target_text
from helpers.recipes import SCALES
from helpers.settings import TINY_BASE, ParameterError

PROMPT = "Detect the bounding box of the nutrition table."
COMPLETION = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"


def row(bbox=((0.2, 0.1, 0.6, 0.5),), size=(224, 224)):
    names = ["nutrition-table"] * len(bbox)
    objects = {"bbox": [list(box) for box in bbox], "category_id": [0] * len(bbox), "category_name": names}
    return {"image_id": "a", "image": Image.new("RGB", size), "width": size[0], "height": size[1], "objects": objects}


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=64 * 784)


def kept(processor, batch, i=0):
    """The text that the loss is computed on."""
    return processor.tokenizer.decode(batch["labels"][i][batch["labels"][i] != collate.IGNORED])


def test_golden_row_to_text_to_labels(processor):
    collator = collate.Collator(processor, PROMPT)
    assert collator.texts([row()]) == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + PROMPT + "<|im_end|>\n"
        "<|im_start|>assistant\n" + COMPLETION + "<|im_end|>\n"
    ]
    batch = collator([row()])
    assert kept(processor, batch) == COMPLETION + "<|im_end|>"
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == 64
    assert batch["pixel_values"].shape == (256, 1176) and batch["image_grid_thw"].tolist() == [[1, 16, 16]]


def test_all_text_masks_padding_and_vision_tokens_alone(processor):
    rows = [row(), row(bbox=((0.2, 0.1, 0.6, 0.5), (0.7, 0.1, 0.9, 0.5)))]
    batch = collate.Collator(processor, PROMPT, "all-text")(rows)
    assert kept(processor, batch) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n" + PROMPT + "<|im_end|>\n<|im_start|>assistant\n" + COMPLETION + "<|im_end|>\n"
    )
    assert kept(processor, batch, 1).count("<|box_start|>") == 2


def test_a_batch_is_its_rows_with_padding(processor):
    collator = collate.Collator(processor, PROMPT)
    rows = [row(size=(224, 140)), row(size=(112, 224), bbox=())]
    together, alone = collator(rows), [collator([one]) for one in rows]
    for i, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "labels", "mm_token_type_ids", "attention_mask"):
            assert torch.equal(together[name][i, :length], single[name][0])
        assert (together["labels"][i, length:] == collate.IGNORED).all()
    assert torch.equal(together["pixel_values"], torch.cat([single["pixel_values"] for single in alone]))
    assert kept(processor, together, 1) == "no nutrition table<|im_end|>"


@pytest.mark.parametrize(("lost", "message"), [("<|im_end|>", r"no <\|im_end\|> in its labels"),
                                               ("<|im_start|>", "chat template")])
def test_a_chat_template_without_the_marks_of_a_turn_is_refused(lost, message):
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE)
    processor.chat_template = processor.chat_template.replace(lost, "")
    with pytest.raises(ValueError, match=message):
        collate.Collator(processor, PROMPT)([row()])


def test_a_sequence_that_is_too_long_is_named_and_never_cut(processor, monkeypatch):
    monkeypatch.setattr(collate, "MAX_TOKENS", 100)
    with pytest.raises(ValueError, match="image_id='a' makes 1.. tokens, and at most 100"):
        collate.Collator(processor, PROMPT)([row()])


def table(bboxes, sizes=None):
    """A split of these boxes, with pictures that nobody can open: limits are arithmetic."""
    sizes = sizes or [(224, 224)] * len(bboxes)
    rows = [row(bbox, size) | {"image": {"bytes": b"", "path": None}, "image_id": f"p{i}"}
            for i, (bbox, size) in enumerate(zip(bboxes, sizes, strict=True))]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def limits(processor, train, val=None, selection=None, **values):
    defaults = {"stages": ["a stage"], "constrained": False, "augment": False, "max_new_tokens": 128,
                "min_pixels": 16 * 784, "max_pixels": 64 * 784, "eval_steps": None, "eval_pictures": 2}
    rows = {"train": train, "val": table([()]) if val is None else val, "selection": selection}
    collate.check_limits(rows, collate.Collator(processor, PROMPT), SimpleNamespace(**defaults | values))


BOX = (0.2, 0.1, 0.6, 0.5)


def grid(count):
    return [(0.07 * i, 0.1, 0.07 * i + 0.05, 0.9) for i in range(count)]


def test_a_true_completion_that_does_not_fit_is_refused_with_the_number_that_it_needs(processor):
    completion = target_text(row(grid(12))["objects"]) + "<|im_end|>"
    need = len(processor.tokenizer(completion)["input_ids"])
    train = table([(BOX,), grid(12), ()])
    said = f"max_new_tokens=128 would cut completions: the true one of image_id='p1' in train needs {need}; set max"
    with pytest.raises(ParameterError, match=said):
        limits(processor, train)
    with pytest.raises(ParameterError, match=f"image_id='p1' in val needs {need}"):
        limits(processor, table([(BOX,)]), val=train, stages=[], max_new_tokens=need - 1)
    limits(processor, train, max_new_tokens=need)
    more = 12 * longest_unit(processor.tokenizer, CATEGORIES) + 1  # as `predict.allowed_tokens` counts
    with pytest.raises(ParameterError, match=f"set max_new_tokens={more} or more"):  # which gives each box more room
        limits(processor, train, max_new_tokens=need, constrained=True)
    limits(processor, train, max_new_tokens=more, constrained=True)


def test_the_longest_sequence_is_known_before_any_picture_is_opened(processor, monkeypatch):
    """The arithmetic is the collator's own count, for each picture."""
    whole = [row(bbox, size) for bbox, size in (((BOX,), (224, 300)), ((), (90, 800)), (grid(3), (500, 400)))]
    counted = [collate.Collator(processor, PROMPT)([one])["input_ids"].shape[1] for one in whole]
    for one, tokens in zip(whole, counted, strict=True):
        split = table([one["objects"]["bbox"]], [one["image"].size])
        monkeypatch.setattr(collate, "MAX_TOKENS", tokens)
        limits(processor, split)
        monkeypatch.setattr(collate, "MAX_TOKENS", tokens - 1)
        with pytest.raises(ParameterError, match=f"'p0' in train makes {tokens} tokens, .* at most {tokens - 1}"):
            limits(processor, split)
    split = table([one["objects"]["bbox"] for one in whole], [one["image"].size for one in whole])
    with pytest.raises(ParameterError, match="image_id='p2' in train") as refused:
        limits(processor, split)
    limits(processor, split, stages=[])  # nothing trains on it
    room = int(str(refused.value).split("max_pixels=")[1].split()[0])
    limits(processor, split, max_pixels=room)


def test_augmented_pictures_count_as_the_largest(processor, monkeypatch):
    small = table([()], [(112, 112)])
    monkeypatch.setattr(collate, "MAX_TOKENS", 100)
    limits(processor, small)
    with pytest.raises(ParameterError, match="image_id='p0' in train makes 1.. tokens"):
        limits(processor, small, augment=True)


@pytest.mark.parametrize("boxes, pictures, said", [([(), (), (BOX,)], 2, "2 pictures"), ([], 2, "0 pictures"),
                                                   ([(), (), (BOX,)], 3, None)])
def test_iou_during_training_needs_a_box_to_measure(boxes, pictures, said, processor):
    train = table([(BOX,)])
    options = {"selection": table(boxes) if boxes else train.select([]), "eval_pictures": pictures}
    limits(processor, train, **options)
    limits(processor, train, eval_steps=5, stages=[], **options)  # nothing trains
    with pytest.raises(ParameterError, match=f"eval_steps=5 finds no box on {said}") if said else nullcontext():
        limits(processor, train, eval_steps=5, **options)


def test_a_transparent_picture_is_trained_on_white(processor):
    pixels = {}
    for name in ("clear", "white"):
        picture = Image.open(io.BytesIO(finished_model.clear("RGBA", (224, 224))))
        if name == "white":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        rows = [row() | {"image": picture}]
        pixels[name] = collate.Collator(processor, PROMPT)(rows)["pixel_values"]
        assert torch.equal(pixels[name], predict.model_inputs(rows, processor, PROMPT)["pixel_values"])
    assert torch.equal(pixels["clear"], pixels["white"])


@pytest.mark.parametrize("scale", SCALES)
def test_image_tokens_are_those_of_the_processor(processor, scale):
    budget = {name: SCALES[scale][name] for name in ("min_pixels", "max_pixels")}
    sizes = [(300, 400), (1000, 90), (60, 50), (1280, 960)]
    grids = [processor.image_processor(Image.new("RGB", size), **budget, return_tensors="pt")["image_grid_thw"]
             for size in sizes]
    assert collate.image_tokens(sizes, **budget).tolist() == (torch.cat(grids).prod(1) // 4).tolist()
    assert collate.image_tokens([], **budget).tolist() == []
