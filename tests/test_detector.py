"""The plain detector: labels from rows, a training that learns, boxes in predict's lines, a head for other classes."""


import numpy as np
import pytest
import torch
from torchvision.ops import box_convert
from transformers import Trainer, TrainingArguments

from helpers.augment import Augment
from helpers.boxes import CATEGORIES, yxyx_unit_to_xyxy_unit
from helpers.settings import TINY_BASE, ParameterError
from helpers.topics import detector
from helpers.topics.training import rows_and_processor

NAMES = ["nutrition-table"]


@pytest.fixture(scope="module")
def rows():
    return rows_and_processor(train=8, selection=2, val=12)[0]


def test_labels_are_the_rows_boxes_and_the_picture_is_squeezed(rows):
    _, processor = detector.small(NAMES, 64)
    few = [rows["val"][i] for i in range(12)]
    batch = detector.Collator(processor, NAMES)(few)
    assert batch["pixel_values"].shape == (12, 3, 64, 64) and 0 <= batch["pixel_values"].min()
    assert batch["pixel_values"].max() <= 1
    for row, label in zip(few, batch["labels"], strict=True):
        boxes = box_convert(label["boxes"].reshape(-1, 4), "cxcywh", "xyxy")
        assert np.allclose(boxes, yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), atol=1e-5)
        assert label["class_labels"].tolist() == [0] * len(boxes)
    assert any(not len(label["boxes"]) for label in batch["labels"])  # a picture without a table stays
    kinds = detector.Collator(processor, CATEGORIES)(few)["labels"]
    assert [label["class_labels"].tolist() for label in kinds] == [row["objects"]["category_id"] for row in few]
    changed = detector.Collator(processor, NAMES, Augment(0))(few)
    assert not torch.equal(batch["pixel_values"], changed["pixel_values"])
    assert [len(label["boxes"]) for label in batch["labels"]] == [len(label["boxes"]) for label in changed["labels"]]


def test_it_learns_and_finds_the_same_boxes_from_its_folder(rows, tmp_path):
    torch.manual_seed(0)
    model, processor = detector.small(NAMES, 64)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "training"), num_train_epochs=12, per_device_train_batch_size=4, learning_rate=1e-3,
        remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True)
    trainer = Trainer(model, arguments, data_collator=detector.Collator(processor, NAMES), train_dataset=rows["train"])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, its_processor = detector.load(tmp_path / "model")
    found = detector.predict(again, its_processor, rows["val"])
    assert found == detector.predict(model, processor, rows["val"])
    assert [line["image_id"] for line in found] == rows["val"]["image_id"]


def test_a_detector_of_other_classes_gets_a_new_head_and_keeps_the_rest(tmp_path):
    coco, processor = detector.small([f"thing {i}" for i in range(80)], 64)
    coco.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, its_processor = detector.load(tmp_path, CATEGORIES)
    assert dict(model.config.id2label) == dict(enumerate(CATEGORIES)) and its_processor.size == processor.size
    kept, loaded = coco.state_dict(), model.state_dict()
    other = {name for name in kept if not torch.equal(kept[name], loaded[name])}
    assert other and all("class_embed" in name or "score_head" in name for name in other)


def test_what_is_no_detector_is_refused_in_one_sentence(tmp_path):
    for words, place in (("cannot be loaded", tmp_path / "nothing"), ("is a qwen2_vl; expected an RT-DETR", TINY_BASE)):
        with pytest.raises(ParameterError, match=words) as said:
            detector.load(place)
        assert "\n" not in str(said.value)
