"""Augmentation: boxes stay the hull of what they framed, none is lost, and a draw depends on its three keys alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import StopAt, build
from torchvision import tv_tensors

from helpers import augment, collate, trainer
from helpers.augment import Augment


def drawn(number: int, size: tuple[int, int]) -> tuple[Image.Image, list[float]]:
    """A grey picture with one white box on whole pixels, at least 8 wide and high; and the box, y first, in 0-1."""
    width, height = size
    rng = np.random.default_rng(number)
    x0, y0 = rng.integers(0, (width - 8, height - 8))
    x1, y1 = rng.integers((x0 + 8, y0 + 8), (width + 1, height + 1))
    pixels = np.full((height, width, 3), augment.GREY, np.uint8)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels), [y0 / height, x0 / width, y1 / height, x1 / width]


@pytest.mark.parametrize("size", [(200, 150), (97, 171), (60, 60), (28, 300)])
def test_a_box_is_the_tight_hull_of_what_it_framed(size):
    for number in range(150):
        picture, box = drawn(number, size)
        torch.manual_seed(number)
        warped, boxes = augment.warp(tv_tensors.Image(picture), [box])
        rows, columns = np.where(warped.numpy()[0] > augment.GREY + 20)
        hull = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(boxes - hull).max() < 1.2, (number, boxes, hull)  # pixels
        assert boxes.min() >= 0 and (boxes[0, 2:] <= np.array(warped.shape[:0:-1])).all()


def row(number: int, boxes=None) -> dict:
    picture, box = drawn(number, (120, 100))
    boxes = [box] if boxes is None else boxes
    names = ["nutrition-table", "nutrition-table-text", "nutrition-table-small"][: len(boxes)]
    return {"image_id": str(number), "image": picture, "width": 120, "height": 100, "meta": {"barcode": "1"},
            "objects": {"bbox": boxes, "category_id": list(range(len(boxes))), "category_name": names}}


def test_a_draw_depends_on_seed_epoch_and_image_id_and_on_nothing_else():
    def view(seed=0, epoch=0, number=1):
        change = Augment(seed)
        change.epoch = epoch
        return change(row(number))

    first = view()
    for start in (torch.manual_seed, random.seed, np.random.seed):
        start(5)
    before = torch.get_rng_state()
    views = [view(), view(seed=1), view(epoch=1), view(number=2)]
    assert torch.equal(torch.get_rng_state(), before), "the training's own random numbers went on"
    same = [one["image"].tobytes() == first["image"].tobytes() and one["objects"] == first["objects"] for one in views]
    assert same == [True, False, False, False]


def test_no_box_is_lost_and_names_stay_with_their_boxes():
    many = [[0.0, 0.0, 0.3, 1.0], [0.5, 0.1, 0.502, 0.4], [0.6, 0.6, 1.0, 1.0]]
    for epoch in range(60):
        change = Augment(0)
        change.epoch = epoch
        after = change(row(1, many))
        assert after["objects"]["category_name"] == row(1, many)["objects"]["category_name"]
        boxes = np.array(after["objects"]["bbox"])
        assert boxes.shape == (3, 4) and (boxes >= 0).all() and (boxes <= 1).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (after["width"], after["height"]) == after["image"].size and after["meta"] == {"barcode": "1"}
        assert change(row(1, []))["objects"]["bbox"] == []


def test_a_draw_that_thins_a_box_is_drawn_again_and_in_the_end_left_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(augment, "GEOMETRY", lambda picture, boxes: calls.append(1) or (picture, boxes * 0.01))
    picture, box = drawn(1, (120, 100))
    warped, boxes = augment.warp(tv_tensors.Image(picture), [box])
    assert len(calls) == augment.TRIES and np.allclose(boxes[0, [1, 0, 3, 2]] / (100, 120, 100, 120), box)
    assert torch.equal(warped, tv_tensors.Image(picture))


def test_a_picture_never_gets_too_thin_for_the_model():
    thin = tv_tensors.Image(torch.zeros(3, 10, 1990, dtype=torch.uint8))
    for number in range(40):
        torch.manual_seed(number)
        short, long = sorted(augment.warp(thin, [[0.1, 0.4, 0.9, 0.6]] if number % 2 else [])[0].shape[-2:])
        assert long <= 200 * short


def augmented(folder, processor, rows, shown, **options):
    """A small training whose augmentation writes down (epoch, image_id) of every row."""

    class Noted(Augment):
        def __call__(self, row):
            shown.append((self.epoch, row["image_id"]))
            return super().__call__(row)

    change = Noted(0)
    sft = build("r1-llm-only", folder, processor, rows, **options)
    sft.data_collator = collate.Collator(processor, "Where?", augment=change)
    sft.add_callback(change)
    return sft


def test_each_epoch_shows_other_views_and_a_killed_or_shared_run_shows_the_same_ones(tmp_path, processor, rows):
    whole = augmented(tmp_path / "whole", processor, rows, shown := [])
    whole.train()
    assert sorted(shown) == sorted((epoch, name) for epoch in (0, 1) for name in rows["image_id"])
    with pytest.raises(KeyboardInterrupt):
        killed = augmented(tmp_path / "killed", processor, rows, [])
        killed.add_callback(StopAt(7))
        killed.train()
    resumed = augmented(tmp_path / "killed", processor, rows, [])
    checkpoint = trainer.last_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-6"), "in the middle of the second epoch"
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in resumed._trainable().items():
        assert torch.equal(weight, whole._trainable()[name]), name
    shared = augmented(tmp_path / "shared", processor, rows, [], dataloader_num_workers=2)
    shared.train()
    logs = [trainer.read_log(tmp_path / name / "log.jsonl") for name in ("whole", "killed", "shared")]
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] == losses[2]
