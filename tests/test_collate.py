"""Batches and label masks: what the loss sees, as literals."""

import io

import finished_model
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers import collate, predict
from helpers.settings import TINY_BASE

PROMPT = "Detect the bounding box of the nutrition table."
ANSWER = "<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(100,200),(500,600)<|box_end|>"


def row(bbox=((0.2, 0.1, 0.6, 0.5),), size=(224, 224)):
    names = ["nutrition-table"] * len(bbox)
    objects = {"bbox": [list(box) for box in bbox], "category_id": [0] * len(bbox), "category_name": names}
    return {"image_id": "a", "image": Image.new("RGB", size), "width": size[0], "height": size[1], "objects": objects}


@pytest.fixture(scope="module")
def processor():
    return Qwen2VLProcessor.from_pretrained(TINY_BASE, min_pixels=16 * 784, max_pixels=64 * 784)


def kept(processor, batch, i=0):
    """The text that the loss looks at."""
    return processor.tokenizer.decode(batch["labels"][i][batch["labels"][i] != collate.IGNORED])


def test_golden_row_to_text_to_labels(processor):
    collator = collate.Collator(processor, PROMPT)
    assert collator.texts([row()]) == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + PROMPT + "<|im_end|>\n"
        "<|im_start|>assistant\n" + ANSWER + "<|im_end|>\n"
    ]
    batch = collator([row()])
    assert kept(processor, batch) == ANSWER + "<|im_end|>"
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == 64
    assert batch["pixel_values"].shape == (256, 1176) and batch["image_grid_thw"].tolist() == [[1, 16, 16]]


def test_all_text_masks_padding_and_vision_tokens_alone(processor):
    rows = [row(), row(bbox=((0.2, 0.1, 0.6, 0.5), (0.7, 0.1, 0.9, 0.5)))]
    batch = collate.Collator(processor, PROMPT, "all-text")(rows)
    assert kept(processor, batch) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n" + PROMPT + "<|im_end|>\n<|im_start|>assistant\n" + ANSWER + "<|im_end|>\n"
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


def test_labels_without_the_end_token_stop_the_run(repo):
    processor = Qwen2VLProcessor.from_pretrained(TINY_BASE)
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match=r"no <\|im_end\|> in its labels"):
        collate.Collator(processor, PROMPT)([row()])


def test_a_foreign_chat_template_and_a_wrong_scope_are_refused(processor):
    with pytest.raises(ValueError, match="chat template"):
        collate.answer_start([1, 2, 3], [9, 9])
    with pytest.raises(ValueError, match="loss_scope='answer'.*assistant, all-text"):
        collate.Collator(processor, PROMPT, "answer")


def test_a_sequence_that_is_too_long_is_named_and_never_cut(processor, monkeypatch):
    monkeypatch.setattr(collate, "MAX_TOKENS", 100)
    with pytest.raises(ValueError, match="image_id='a' makes 1.. tokens, and at most 100"):
        collate.Collator(processor, PROMPT)([row()])


def test_a_transparent_picture_is_trained_on_white(processor):
    seen = {}
    for name in ("clear", "white"):
        picture = Image.open(io.BytesIO(finished_model.clear("RGBA", (224, 224))))
        if name == "white":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        seen[name] = collate.Collator(processor, PROMPT)([row() | {"image": picture}])["pixel_values"]
        assert torch.equal(seen[name], predict.prepare([row() | {"image": picture}], processor, PROMPT)["pixel_values"])
    assert torch.equal(seen["clear"], seen["white"])
