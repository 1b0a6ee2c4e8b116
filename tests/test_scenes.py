"""The embedded photos: their bytes, true boxes, and the faults that they promise."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.scenes import EXTRA_SPLITS, LEAST, SPLITS, TABLES, Scene, compose, planted_faults, render_scene

HASHES = json.loads((Path(__file__).parent / "scene_hashes.json").read_text())


def shown(scene: Scene) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(scene.jpeg)))


def hash_of(scene: Scene) -> str:
    """Of everything in a scene, boxes to a millionth of the picture."""
    boxes = [[name, *(f"{value:.6f}" for value in box)] for name, box in scene.tables + scene.things]
    rest = [scene.image_id, scene.width, scene.height, scene.meta, scene.rotation, len(scene.tables), boxes]
    return hashlib.sha256(scene.jpeg + json.dumps(rest).encode()).hexdigest()


@pytest.mark.parametrize("split, index", [(split, index) for split in HASHES["first"] for index in (2, 1, 0)])
def test_first_scenes_are_those_that_every_committed_number_rests_on(split, index):
    assert hash_of(render_scene(0, index, split)) == HASHES["first"][split][index]


@pytest.mark.slow
@pytest.mark.parametrize("split", [*SPLITS, *EXTRA_SPLITS])
def test_all_scenes_are_those_that_every_committed_number_rests_on(split):
    hashes = [hash_of(render_scene(0, index, split)) for index in range((SPLITS | EXTRA_SPLITS)[split])]
    assert hashlib.sha256("".join(hashes).encode()).hexdigest() == HASHES["all"][split]


def test_extra_splits_show_several_tables_or_none_and_another_table_in_every_second_of_these():
    several = [render_scene(0, index, "val-multi").tables for index in range(6)]
    assert {len(tables) for tables in several} <= {2, 3, 4}
    assert min(min(x1 - x0, y1 - y0) for tables in several for _, (x0, y0, x1, y1) in tables) >= LEAST
    none = [render_scene(0, index, "val-none") for index in range(4)]
    assert not any(scene.tables for scene in none)
    assert [any(name in TABLES for name, _ in scene.things) for scene in none] == [False, True] * 2
    with pytest.raises(ValueError, match="'val-none', whose scenes are 0 to 99"):
        render_scene(0, 100, "val-none")


def white_panels(rng, label, warp, kind, face):
    """In place of the photo: the panels white, everything else black, through the same warp."""
    mask = Image.new("RGB", label.size)
    for _, (x0, y0, x1, y1) in label.tables:
        left, top = x0 - label.origin[0], y0 - label.origin[1]
        mask.paste((255, 255, 255), tuple(int(round(v)) for v in (left, top, left + x1 - x0, top + y1 - y0)))
    return warp.apply(mask, label.origin)


@pytest.mark.slow
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


def test_faults_are_planted_where_promised():
    for split in SPLITS:
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
    assert not any(planted_faults(0, "base").values())


@pytest.mark.parametrize("index, split", [(-1, "val"), (123, "val"), (10**8, "base")])
def test_an_index_outside_of_its_split_is_refused(index, split):
    with pytest.raises(ValueError, match=f"{index}.*{split}"):
        render_scene(0, index, split)
