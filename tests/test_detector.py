"""The plain detector: labels from rows, a training that learns, boxes in predict's lines, a head for other classes."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import RTDetrV2ForObjectDetection, TrainingArguments

from helpers import data, detector, topic
from helpers.augment import Augment
from helpers.boxes import CATEGORIES, cxcywh_unit_to_xyxy_unit, yxyx_unit_to_xyxy_unit
from helpers.evaluate import reports
from helpers.parameters import ParameterError
from helpers.plots import detector as draw
from helpers.recipes import SCALES

NAMES = ["nutrition-table"]


@pytest.fixture(scope="module")
def rows():
    raw = data.load_raw("embedded", limit={"train": 8, "selection": 2, "val": 12})
    return data.prepare(data.clean(raw, data.audit(raw)), SCALES["tiny"]["min_pixels"], SCALES["tiny"]["max_pixels"])


def test_labels_are_the_rows_boxes_and_the_picture_is_squeezed(rows):
    _, processor = detector.small(NAMES, 64)
    few = [rows["val"][i] for i in range(12)]
    batch = detector.Collator(processor, NAMES)(few)
    assert batch["pixel_values"].shape == (12, 3, 64, 64) and 0 <= batch["pixel_values"].min()
    assert batch["pixel_values"].max() <= 1
    for row, label in zip(few, batch["labels"], strict=True):
        boxes = cxcywh_unit_to_xyxy_unit(label["boxes"].numpy().reshape(-1, 4))
        assert np.allclose(boxes, yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]), atol=1e-5)
        assert label["class_labels"].tolist() == [0] * len(boxes)
    assert any(not len(label["boxes"]) for label in batch["labels"])  # a picture without a table stays
    kinds = detector.Collator(processor, CATEGORIES)(few)["labels"]
    assert [label["class_labels"].tolist() for label in kinds] == [row["objects"]["category_id"] for row in few]


def test_augmented_rows_give_other_pictures_and_their_boxes(rows):
    _, processor = detector.small(NAMES, 64)
    few = [rows["train"][i] for i in range(4)]
    plain, changed = (detector.Collator(processor, NAMES, augment)(few) for augment in (None, Augment(0)))
    assert not torch.equal(plain["pixel_values"], changed["pixel_values"])
    assert [len(label["boxes"]) for label in plain["labels"]] == [len(label["boxes"]) for label in changed["labels"]]


def test_it_learns_is_kept_in_half_the_size_and_answers_the_same_from_its_folder(rows, tmp_path):
    torch.manual_seed(0)
    model, processor = detector.small(NAMES, 64)
    assert 1e6 < sum(weight.numel() for weight in model.parameters()) < 1.5e6
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "training"), num_train_epochs=12, per_device_train_batch_size=4, learning_rate=1e-3,
        remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none")
    trained = detector.train(model, arguments, detector.Collator(processor, NAMES), rows["train"])
    losses = [line["loss"] for line in trained["log"] if "loss" in line]
    assert len(losses) == 12 * math.ceil(len(rows["train"]) / 4) and all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert trained["seconds"] > 0 and trained["pictures"] == len(rows["train"])
    detector.save(model, processor, tmp_path / "model", {"epochs": 12})
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert size < 2.3 * sum(weight.numel() for weight in model.parameters())
    again, its_processor = detector.load(str(tmp_path / "model"))
    assert again.dtype == torch.float32 and json.loads((tmp_path / "model/trained.json").read_text()) == {"epochs": 12}
    model.half().float()  # what rounding leaves, in place
    assert detector.predict(model, processor, rows["val"]) == detector.predict(again, its_processor, rows["val"])
    few = detector.predict(again, its_processor, rows["val"], batch_size=5, least=0.5)
    assert [line["image_id"] for line in few] == rows["val"]["image_id"]
    assert all(value >= 0.5 for line in few for value in line["confidences"])


def test_lines_are_those_of_predict_and_the_evaluator_reads_them(rows, tmp_path):
    found = {"scores": torch.tensor([0.9, 0.4, 0.3]), "labels": torch.tensor([1, 0, 0]),
             "boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6], [-0.1, 0.0, 0.5, 1.2], [0.3, 0.3, 0.3, 0.4]])}
    line = detector.line("a", found, {0: "x", 1: "y"})
    assert line == {"image_id": "a", "text": "", "labels": ["y", "x"], "confidences": [0.9, 0.4], "rejected": [],
                    "boxes": [[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 0.5, 1.0]], "stopped": True, "new_tokens": 0}
    truth = data.truth_rows(rows["val"])
    perfect = [detector.line(row["image_id"], {
        "scores": torch.full((len(row["objects"]["bbox"]),), 0.8), "labels": torch.zeros(len(row["objects"]["bbox"])),
        "boxes": torch.from_numpy(yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]))}, {0: NAMES[0]}) for row in truth]
    metrics = reports.write_metrics(tmp_path / "run", {"fine-tuned": perfect}, truth)
    summary = metrics["scores"]["fine-tuned"]["summary"]
    assert summary["mean_iou"]["value"] > 0.99 and summary["f1"]["value"] == 1 and summary["ap"]["value"] > 0.99
    assert summary["format_error_rate"]["value"] == 0 and not metrics["scores"]["fine-tuned"]["problems"]
    assert topic.scored_run(str(tmp_path / "run"))["summary"] == summary
    with pytest.raises(ParameterError, match="run='nothing': no scored run 'nothing'"):
        topic.scored_run("nothing")


def test_the_threshold_keeps_right_boxes_and_drops_wrong_ones(rows):
    truth = data.truth_rows(rows["val"])
    lines = [detector.line(row["image_id"], {
        "scores": torch.tensor([0.62] * len(row["objects"]["bbox"]) + [0.47]),
        "labels": torch.zeros(len(row["objects"]["bbox"]) + 1),
        "boxes": torch.tensor([*yxyx_unit_to_xyxy_unit(row["objects"]["bbox"]).tolist(), [0.0, 0.0, 0.02, 0.02]])},
        {0: NAMES[0]}) for row in truth]  # fmt: skip
    threshold, f1 = detector.best_threshold(truth, lines)
    assert 0.47 < threshold <= 0.62 and f1 == 1
    nothing = [line | {"boxes": [], "labels": [], "confidences": []} for line in lines]
    assert detector.best_threshold(truth, nothing)[1] == 0


def test_a_detector_of_other_classes_gets_a_new_head_and_keeps_the_rest(tmp_path):
    coco, processor = detector.small([f"thing {i}" for i in range(80)], 64)
    coco.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, its_processor = detector.load(str(tmp_path), CATEGORIES)
    assert dict(model.config.id2label) == dict(enumerate(CATEGORIES)) and its_processor.size == processor.size
    assert model.model.decoder.class_embed[0].out_features == model.model.enc_score_head.out_features == 4
    kept, loaded = coco.state_dict(), model.state_dict()
    other = {name for name in kept if not torch.equal(kept[name], loaded[name])} if set(kept) == set(loaded) else None
    assert other and all("class_embed" in name or "score_head" in name for name in other)
    assert isinstance(model, RTDetrV2ForObjectDetection)


def test_what_is_no_detector_is_refused_in_one_sentence(tmp_path):
    for words, place in (("cannot be loaded", str(tmp_path / "nothing")), ("is a qwen2_vl; expected an RT-DETR v2",
                                                                         topic.model_path("tiny"))):
        with pytest.raises(ParameterError, match=words) as said:
            detector.load(place)
        assert "\n" not in str(said.value)
    assert topic.detector_path("tiny") is None
    with pytest.raises(ParameterError, match="needs a GPU"):
        topic.detector_path("7b")


def test_times_and_peaks_are_those_of_the_call():
    taken = detector.seconds({"short": lambda: None, "long": lambda: sum(range(10**6))}, repeats=2)
    assert taken["short"] < taken["long"]
    peak = detector.peak_bytes(lambda: torch.ones(20_000_000))
    assert peak is None or 70e6 <= peak < 120e6


def test_the_kept_detector_belongs_to_the_notebook():
    story = json.loads((detector.LONGER / "trained.json").read_text())
    assert {"epochs", "learning_rate", "augment", "seed", "train", "seconds", "cpu_seconds", "machine"} <= set(story)
    model, processor = detector.load(str(detector.LONGER))
    assert list(model.config.id2label.values()) == NAMES and processor.size["height"] % 32 == 0
    assert (detector.LONGER / "model.safetensors").stat().st_size < 3.1e6


def test_the_figure_shows_photo_and_square_with_the_same_boxes(rows, monkeypatch):
    monkeypatch.setattr(draw, "finish", lambda figure, path, photos: figure)
    few = [rows["val"][i] for i in range(2)]
    figure = draw.as_seen(few, detector.Collator(detector.small(NAMES, 64)[1], NAMES)(few))
    assert [axes.get_title() for axes in figure.axes][1] == "seen: 64 × 64 px"
    photo, square = figure.axes[:2]
    assert len(photo.patches) == len(square.patches) == len(few[0]["objects"]["bbox"])
