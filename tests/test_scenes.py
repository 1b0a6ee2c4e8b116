"""The embedded photos: the same bytes everywhere, true boxes, the mix and the faults that they promise."""

import hashlib
import io
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.boxes import CATEGORIES
from helpers.scenes import SPLITS, THINGS, barcode_of, compose, planted_faults, render_scene
from helpers.scenes.layout import target_box
from helpers.scenes.text import WORDS
from helpers.scenes.things import DRAW
from helpers.scenes.warp import Warp, outline, visible_hull

PRINT_HASHES = """
import hashlib
from helpers.scenes import render_scene
for index in (7, 3):
    print(hashlib.sha256(render_scene(5, index, "base").jpeg).hexdigest())
"""


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(0, index, "val") for index in range(SPLITS["val"])]


def shown(scene):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(scene.jpeg)))


def test_same_bytes_in_any_process_and_order():
    here = [hashlib.sha256(render_scene(5, index, "base").jpeg).hexdigest() for index in (3, 7)]
    there = subprocess.run([sys.executable, "-c", PRINT_HASHES], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here[::-1]
    assert render_scene(5, 3, "base") == render_scene(5, 3, "base")


@pytest.mark.parametrize("index, name, box, things, brightness", [
    (0, "nutrition-table", (0.462, 0.61, 0.772, 0.899), 12, 176.1),
    (8, "nutrition-table", (0.387, 0.475, 0.613, 0.601), 6, 48.1),
    (14, "nutrition-table", (0.01, 0.215, 0.823, 0.782), 15, 101.0),
])
def test_scenes_are_those_that_the_base_was_trained_on(index, name, box, things, brightness):
    scene = render_scene(0, index, "val")
    assert scene.tables[0][0] == name and scene.tables[0][1] == pytest.approx(box, abs=0.001)
    assert len(scene.things) == things
    assert np.asarray(Image.open(io.BytesIO(scene.jpeg))).mean() == pytest.approx(brightness, abs=0.2)


def test_another_table_stands_in_the_panels_place_for_the_base_alone():
    drawn = [render_scene(0, index, "base") for index in range(60)]
    assert 0.2 < np.mean([bool(scene.tables) for scene in drawn]) < 0.5
    largest = [max((np.prod(np.subtract(box[2:], box[:2])), name) for name, box in scene.things) for scene in drawn
               if not scene.tables]
    assert np.mean([name in compose.STAND_INS for _, name in largest]) > 0.6
    assert {name for _, name in largest} >= {"drug facts", "cooking table"}


def test_seed_split_and_index_each_change_the_picture():
    jpegs = {render_scene(*key).jpeg for key in ((0, 1, "base"), (1, 1, "base"), (0, 2, "base"), (0, 1, "extra"))}
    assert len(jpegs) == 4


@pytest.mark.parametrize("long_side", [192, 320, 1024])
def test_every_size_can_be_drawn(long_side):
    for index in range(10 if long_side > 512 else 60):
        scene = render_scene(0, index, "extra", long_side)
        assert max(scene.width, scene.height) == long_side and shown(scene).size == (scene.width, scene.height)


def test_size_is_the_size_as_shown(scenes):
    for scene in scenes:
        assert shown(scene).size == (scene.width, scene.height)
        assert max(scene.width, scene.height) == 512


def test_boxes_lie_in_the_picture_and_names_are_known(scenes):
    empty = planted_faults(0, "val")["zero_area"]
    for index, scene in enumerate(scenes):
        for name, (x0, y0, x1, y1) in scene.tables + scene.things:
            assert name in CATEGORIES + THINGS
            assert 0 <= y0 < y1 <= 1 and (0 <= x0 < x1 <= 1 or index in empty)


def test_mix_and_geometry_are_near_the_real_data(scenes):
    tables = [table for scene in scenes for table in scene.tables]
    share = np.mean([name == "nutrition-table" for name, _ in tables])
    assert 0.68 < share < 0.9
    box = np.array([box for _, box in tables])
    w, h = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    assert 0.40 < np.median(w) < 0.62 and 0.31 < np.median(h) < 0.50
    assert 0.12 < np.median(w * h) < 0.28
    assert 0.40 < np.median(box[:, [0, 2]].mean(1)) < 0.55
    assert np.mean([any("table" in name for name, _ in scene.things) for scene in scenes]) > 0.6


def test_best_constant_box_is_about_as_bad_as_on_real_photos(scenes):
    truth = np.array([scene.tables[0][1] for scene in scenes if scene.tables])
    guess = np.array([0.1, 0.15, 0.85, 0.8])
    inter = np.clip(np.minimum(guess[2:], truth[:, 2:]) - np.maximum(guess[:2], truth[:, :2]), 0, None).prod(1)
    iou = inter / ((truth[:, 2:] - truth[:, :2]).prod(1) + np.prod(guess[2:] - guess[:2]) - inter)
    assert 0.28 < iou.mean() < 0.42


def white_panels(rng, label, warp, kind, face):
    """In place of the photo: the panels white, everything else black, through the same warp."""
    mask = Image.new("RGB", label.size)
    for _, (x0, y0, x1, y1) in label.tables:
        left, top = x0 - label.origin[0], y0 - label.origin[1]
        mask.paste((255, 255, 255), tuple(int(round(v)) for v in (left, top, left + x1 - x0, top + y1 - y0)))
    return warp.apply(mask, label.origin)


@pytest.mark.parametrize("split", ["base", "train"])
def test_boxes_are_the_hull_of_the_rendered_mask(monkeypatch, split):
    monkeypatch.setattr(compose, "photograph", white_panels)
    indices = [*range(150 if split == "base" else 60), *planted_faults(0, "train")["exif"]]
    found = 0
    for index in set(indices) - set(planted_faults(0, "train")["zero_area"]):
        scene = render_scene(0, index, split)
        if len(scene.tables) != 1:
            continue
        ys, xs = np.nonzero(np.asarray(shown(scene).convert("L")) > 127)
        hull = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        box = np.array(scene.tables[0][1]) * np.array([scene.width, scene.height] * 2)
        assert np.abs(hull - box).max() <= 2, (index, hull, box)
        found += 1
    assert found > 40


@pytest.mark.parametrize("radius, wrinkle", [
    (None, (0, 0, 0, 0)), (180.0, (0, 0, 0, 0)), (None, (6.0, 0.02, 0.015, 1.0))])
def test_forward_and_inverse_agree(radius, wrinkle):
    warp = Warp((300, 400), (140, 210), radius, (0.0 if radius else 0.2, 0.1, 0.05), 600.0, wrinkle)
    uv = np.random.default_rng(0).uniform(-120, 120, (200, 2))
    assert np.abs(warp.inverse(warp.forward(uv)) - uv).max() < 0.2


def test_visible_hull_of_a_clipped_diamond():
    diamond = np.array([[0.0, -10], [10, 0], [0, 10], [-10, 0]])
    assert visible_hull(diamond, 100, 100).tolist() == [0, 0, 10, 10]
    assert visible_hull(diamond + 4, 100, 100).tolist() == [0, 0, 14, 14]
    assert visible_hull(diamond - 50, 100, 100) is None
    assert len(outline((0, 0, 60, 30))) > 20


def test_faults_are_planted_where_promised():
    for split, count in SPLITS.items():
        faults = planted_faults(0, split)
        assert faults == planted_faults(0, split) != planted_faults(1, split)
        assert all(faults.values())
        for index in faults["zero_area"]:
            assert any(x1 <= x0 or y1 <= y0 for _, (x0, y0, x1, y1) in render_scene(0, index, split).tables)
        for index in faults["exif"]:
            assert Image.open(io.BytesIO(render_scene(0, index, split).jpeg)).getexif()[0x0112] in (3, 6, 8)
        for first, second in faults["same_product"]:
            one, two = render_scene(0, first, split), render_scene(0, second, split)
            assert one.meta["barcode"] == two.meta["barcode"] and one.image_id != two.image_id
            assert one.jpeg != two.jpeg
        assert max(max(faults["zero_area"]), max(faults["exif"])) < count
    assert not any(planted_faults(0, "base").values())


def test_barcodes_are_valid_and_stand_in_one_split_only(scenes):
    codes = [barcode_of(0, split, index) for split, count in SPLITS.items() for index in range(count)]
    assert len(set(codes)) == len(codes)
    for code in codes[:50]:
        assert len(code) == 13 and sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(code)) % 10 == 0
    assert len({scene.image_id for scene in scenes}) == len(scenes)


def test_every_language_is_complete():
    for language, words in WORDS.items():
        assert len(words["rows"]) == 8 and len(words["per"]) == 5, language
        assert all(len(words[kind]) >= 7 for kind in ("cooking", "price", "dosage")), language
    assert set(DRAW) == set(THINGS)


def test_target_boxes_of_energy_fields_are_small():
    rng = random.Random(0)
    widths = [box[2] - box[0] for box in (target_box(rng, "nutrition-table-small-energy", 0.75) for _ in range(50))]
    assert max(widths) < 0.31


@pytest.mark.parametrize("arguments, word", [
    ((-1, 0, "base"), "seed"), ((0, -1, "val"), "index"), ((0, 123, "val"), "index"), ((0, 0, "Val!"), "split"),
    ((0, 1.5, "val"), "index"), ((0, 0, "val", 64), "long_side"), ((0, 0, "val", 5000), "long_side"),
    ((True, 0, "val"), "seed"), ((0, 0, ""), "split"), ((0, 10**8, "base"), "index"),
])
def test_bad_input_is_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        render_scene(*arguments)
    assert render_scene(0, 0, "base", 320).width <= 320
