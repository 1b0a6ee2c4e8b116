"""The schema, the audit and what it does, splits without leaks, the embedded scenes, pictures prepared once."""

import io
import json
import math
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from finished_model import clear
from PIL import Image
from tiny_exports import HEIGHT, TABLE, WIDTH, jpeg, undecoded

from helpers import data, evaluate, scenes
from helpers.data import embedded
from helpers.data.audit import _twins, audit, clean
from helpers.data.pictures import head, picture_facts
from helpers.data.schema import FEATURES, SPLIT_NAMES, empty_split, objects_of
from helpers.data.splits import carve
from helpers.use.load import open_upright

SIZE = (WIDTH, HEIGHT)
BOX = [0.1, 0.2, 0.5, 0.6]


def boxed(*boxes: list, names: list[str] | None = None, **changed: list) -> dict:
    return {"objects": objects_of(list(boxes), names or [TABLE] * len(boxes)) | changed}


def row(number: int, boxes=(BOX,), barcode: str | None = None, **other) -> dict:
    """A row of the schema with the picture `number`; `other` replaces its fields."""
    meta = {"barcode": f"{number:013d}" if barcode is None else barcode, "off_image_id": "1", "image_url": ""}
    return {"image_id": f"{number:013d}_1", "image": picture(jpeg(number)), "width": WIDTH, "height": HEIGHT,
            "meta": meta, **boxed(*map(list, boxes)), **other}


def splits(train=(), selection=(), val=()) -> datasets.DatasetDict:
    """A raw data set of these rows."""
    lists = zip(SPLIT_NAMES, (list(train), list(selection), list(val)), strict=True)
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows, features=FEATURES) if rows else empty_split()
                                 for name, rows in lists})


def picture(value: bytes) -> dict:
    return {"bytes": value, "path": None}


def found(raw: datasets.DatasetDict) -> dict[str, list[str]]:
    """{fault: image ids} of the audit's table."""
    table = audit(raw).table()
    return dict(zip(table["fault"], table["ids"], strict=True))


def cleaned(raw: datasets.DatasetDict) -> datasets.DatasetDict:
    return clean(raw, audit(raw))


# --- what is wrong with a row -----------------------------------------------------------------------------------------

def pixels(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    """Light grey (3/4 of the range) in the left half, black in the right, on its side for EXIF."""
    light = {"uint8": 192, "uint16": 192 * 256, "int32": 192, "float32": 0.75}[mode]
    values = np.zeros(size[::-1], mode)
    values[:, : size[0] // 2] = light
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.fromarray(values).save(file, kind, **({"exif": exif} if kind == "PNG" else {}))
    return file.getvalue()


TREATED = [  # what changes in a sound row, the faults that are found, the boxes that stay (None: the row is dropped)
    (boxed([-1e-8, 0.2, 1.0000001, 0.6]), [], [[0.0, 0.2, 1.0, 0.6]]),  # float32 rounding, and no fault
    (boxed([0.5, 0.6, 0.1, 0.2]), ["inverted-box"], [BOX]),
    (boxed([-0.1, 0.2, 1.3, 0.6]), ["out-of-range-box"], [[0.0, 0.2, 1.0, 0.6]]),
    (boxed([0.1, 0.2, 0.1, 0.6], BOX), ["empty-box"], [BOX]),
    (boxed(BOX, [1.1, 0.2, 1.4, 0.6]), ["out-of-range-box", "empty-box"], [BOX]),  # wholly outside
    (boxed([0.1, 0.2, 0.5], BOX), ["not-a-box"], [BOX]),
    (boxed([0.1, math.nan, 0.5, 0.6], BOX), ["not-a-box"], [BOX]),
    (boxed(BOX, category_id=[]), ["not-a-box", "no-box-left"], None),  # a list that is too short
    (boxed(BOX, BOX), ["repeated-box"], [BOX]),
    (boxed(BOX, [0.6, 0.1, 0.9, 0.9], names=[TABLE, ""]), ["unknown-category"], [BOX]),
    (boxed(BOX, category_id=[2]), ["category-mismatch"], [BOX]),
    (boxed(), ["no-table"], []),
    (boxed([0.1, 0.2, 0.1, 0.6]), ["empty-box", "no-table"], []),
    (boxed([1.1, 0.2, 1.4, 0.6]), ["out-of-range-box", "empty-box", "no-box-left"], None),
    (boxed([0.1, 0.2, 0.5]), ["not-a-box", "no-box-left"], None),
    ({"image": picture(jpeg(2)[:700])}, ["unreadable-picture: truncated"], None),
    ({"image": picture(b"not a picture")}, ["unreadable-picture"], None),
    ({"image": None}, ["unreadable-picture"], None),
    ({"image": {"bytes": None, "path": "/nowhere/5.jpg"}}, ["unreadable-picture"], None),
    ({"image": picture(pixels("TIFF", "int32", SIZE))}, ["unreadable-picture: 32-bit numbers of no known range"], None),
    ({"image": picture(pixels("TIFF", "float32", SIZE))}, ["unreadable-picture: floating point numbers"], None),
    ({"image": picture(jpeg(6, (1000, 4))), "width": 1000, "height": 4}, ["too-thin-picture"], None),
    ({"image": picture(jpeg(1, SIZE[::-1], 6))}, ["exif-as-shown"], [BOX]),
    ({"image": picture(jpeg(2, orientation=3))}, ["exif-undecided"], [BOX]),
    ({"image": picture(jpeg(3, orientation=1))}, [], [BOX]),
    ({"width": 91}, ["wrong-size"], [BOX]),
    ({"image_id": ""}, ["missing-id"], [BOX]),
]


@pytest.mark.parametrize(("changes", "faults", "left"), TREATED)
def test_a_fault_is_named_and_treated_as_its_rule_says(changes, faults, left):
    raw = splits(val=[row(1), row(2, **changes)])
    before, result = raw["val"].select_columns(["width", "objects"]).to_list(), audit(raw)
    for fault, expected in zip(result.faults, faults, strict=True):
        name, _, part = expected.partition(": ")
        assert (fault.fault, fault.index) == (name, 1) and part in fault.found
    sound, *rest = clean(raw, result)["val"]
    assert data.truth_rows(clean(raw, result)["val"])[0] == data.truth_rows(raw["val"])[0]
    assert result.statistics["val"]["pictures"] == 1 + len(rest) and sound["objects"]["bbox"] == [BOX]
    assert [after["objects"]["bbox"] for after in rest] == ([] if left is None else [left])
    for after in rest:
        assert after["objects"]["category_id"] == [0] * len(left)
        assert (after["width"], after["height"]) == after["image"].size == SIZE and after["image_id"]
    np.testing.assert_equal(raw["val"].select_columns(["width", "objects"]).to_list(), before)  # raw stays raw


def test_a_selection_of_which_nothing_is_left_is_empty_and_said(tmp_path, capsys):
    """Ten photos: one of them becomes selection, and it is the one that cannot be read."""
    unreadable = splits(train=[row(1)], selection=[row(2, image=picture(b"broken"))], val=[row(3)])
    twin = splits(train=[row(1)], selection=[row(3, barcode="2")], val=[row(3)])
    for raw in (unreadable, twin):
        rows = data.prepare(cleaned(raw), 784, 16 * 784)
        assert {name: len(split) for name, split in rows.items()} == {"train": 1, "selection": 0, "val": 1}
        assert "data: none of the 1 pictures of selection can be used, such as" in capsys.readouterr().out


def test_a_split_of_which_nothing_is_left_is_an_error():
    raw = splits(train=[row(1)], val=[row(2, image=picture(b"broken")), row(3, image=picture(b""))])
    with pytest.raises(data.DataError, match="none of the 2 pictures of val can be used, such as 0000000000002_1"):
        cleaned(raw)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_stored_picture_turn_with_it(orientation):
    stored = Image.new("RGB", (200, 100), "white")
    stored.paste((0, 0, 0), (20, 10, 120, 40))  # the table, in pixels of the stored picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    box = [0.1, 0.1, 0.4, 0.6]
    raw = splits(val=[row(1, [box], image=picture(file.getvalue()), width=200, height=100)])
    assert list(found(raw)) == ["exif-as-stored"]
    after = cleaned(raw)["val"][0]
    dark = np.argwhere(np.asarray(after["image"].convert("L")) < 128)  # the picture as shown
    shown = [*(dark.min(0) / (200, 100)), *((dark.max(0) + 1) / (200, 100))]
    assert (after["width"], after["height"]) == after["image"].size == (100, 200)
    np.testing.assert_allclose(after["objects"]["bbox"], [shown], atol=1e-9)


def test_scores_count_the_raw_truth_whole_and_the_cleaned_truth_alone():
    boxes = [[0.1, 0.2, 0.5, 0.6]]
    raw = splits(val=[row(1), row(2, [*boxes, [0.3, 0.3, 0.3, 0.9]]), row(3, image=picture(b"broken")),
                      row(4, [[0.1, 0.2, 0.5]]), row(5, objects=None)])  # fmt: skip
    truth, raw_truth = data.truth_rows(cleaned(raw)["val"]), data.raw_truth(raw["val"])
    answers = [{"image_id": r["image_id"], "boxes": [[0.2, 0.1, 0.6, 0.5]], "labels": [TABLE]} for r in truth]
    after = evaluate.score(truth, answers, resamples=0)
    assert (after["pictures"], after["summary"]["mean_iou"]["n"], after["summary"]["mean_iou"]["value"]) == (3, 2, 1.0)
    before = evaluate.score(raw_truth, answers, resamples=0)
    assert (before["pictures"], before["summary"]["mean_iou"]["n"]) == (5, 4)
    assert before["summary"]["mean_iou"]["value"] == (1 + 0.5 + 0 + 0) / 4
    assert before["problems"]["pictures without a prediction"] == ["0000000000003_1", "0000000000004_1"]
    json.dumps(before, allow_nan=False)


def test_the_same_picture_is_found_among_many():
    thumbs = np.random.default_rng(0).integers(0, 256, (1300, 768)).astype(float)
    others = np.concatenate([thumbs[[700, 5]] + 1.0, thumbs[1299:] + 9.0])
    twins = _twins(thumbs, others)
    assert twins[700] == 0 and twins[5] == 1 and (twins >= 0).sum() == 2


# --- across rows and splits -------------------------------------------------------------------------------------------


def test_a_barcode_or_picture_in_two_splits_stays_in_val():
    size = {"width": 320, "height": 240}
    again = picture(jpeg(2, (160, 120), quality=60))  # the same picture, made smaller and saved again
    raw = splits(
        train=[row(1, barcode="7"), row(2, image=picture(jpeg(2, (320, 240))), **size), row(3)],
        selection=[row(4, barcode="8"), row(5, barcode="7")],
        val=[row(6, barcode="8"), row(7, image=again, width=160, height=120)],
    )
    assert found(raw) == {"barcode-in-two-splits": ["0000000000004_1", "0000000000001_1"],
                          "picture-in-two-splits": ["0000000000002_1"]}
    ids = {name: [image_id[12] for image_id in rows["image_id"]] for name, rows in cleaned(raw).items()}
    assert ids == {"train": ["3"], "selection": ["5"], "val": ["6", "7"]}


def test_selection_is_carved_by_whole_barcodes():
    split = splits(train=[row(number, barcode=str(number // 3)) for number in range(60)])["train"]
    rest, taken = carve(split, 10, seed=0)
    assert 10 <= len(taken) <= 12 and len(rest) + len(taken) == 60
    assert not {meta["barcode"] for meta in rest["meta"]} & {meta["barcode"] for meta in taken["meta"]}


# --- the embedded scenes ----------------------------------------------------------------------------------------------

FEW = {"train": 3, "selection": 2, "val": 2}


def test_embedded_rows_are_the_scenes(tmp_path: Path):
    ds = data.load_raw("embedded", cache_dir=str(tmp_path), limit=FEW, seed=5)
    assert {name: len(split) for name, split in ds.items()} == FEW
    assert list(ds["train"].features) == [*FEATURES, "rotation"]
    scene = scenes.render_scene(5, 1, "val")
    value = data.truth_rows(ds["val"])[1]
    assert undecoded(ds["val"])[1]["bytes"] == scene.jpeg
    assert (value["image_id"], value["width"], value["height"]) == (scene.image_id, scene.width, scene.height)
    assert [(y0, x0, y1, x1) for _, (x0, y0, x1, y1) in scene.tables] == [tuple(b) for b in value["objects"]["bbox"]]
    assert ds["val"][1]["image"].size == (scene.width, scene.height)


def test_embedded_scenes_are_rendered_once_until_the_renderer_changes(tmp_path: Path, monkeypatch, capsys):
    drawn = []
    render = scenes.render_scene
    monkeypatch.setattr(scenes, "render_scene", lambda *numbers: drawn.append(numbers) or render(*numbers))
    first = data.load_splits("embedded", cache_dir=str(tmp_path), limit=FEW)
    assert len(drawn) == 7
    start = time.perf_counter()
    second = data.load_splits("embedded", cache_dir=str(tmp_path), limit=FEW)
    assert len(drawn) == 7 and time.perf_counter() - start < 2
    assert [first[name].to_list() for name in first] == [second[name].to_list() for name in second]
    monkeypatch.setattr(embedded, "source_hash", lambda *_: "an edited renderer")
    data.load_splits("embedded", cache_dir=str(tmp_path), limit=FEW)
    assert len(drawn) == 14


# --- prepared pictures ------------------------------------------------------------------------------------------------


def test_prepare_gives_the_size_that_the_processor_would_choose_and_keeps_the_rest():
    big = row(1, image=picture(jpeg(1, (800, 400), orientation=6)), width=400, height=800)
    raw = splits(train=[big, row(2)], val=[row(3)])
    ready = data.prepare(raw, 56 * 56, 200 * 28 * 28 // 4)
    width, height = ready["train"][0]["image"].size
    assert width % 28 == 0 and height % 28 == 0 and width * height <= 200 * 28 * 28 // 4
    assert width < height and abs(height / width - 2) < 0.2
    assert data.truth_rows(ready["train"]) == data.truth_rows(raw["train"])
    assert undecoded(raw["train"])[1] == undecoded(ready["train"])[1]  # small enough: the same bytes
    before = np.asarray(raw["train"][0]["image"].resize((width, height), Image.Resampling.BICUBIC), int)
    assert np.abs(before - np.asarray(ready["train"][0]["image"], int)).mean() < 2


@pytest.mark.parametrize("size", [(800, 400), (56, 28)])  # made smaller, and small enough
def test_a_grey_picture_of_16_bits_is_the_one_of_8_bits(size):
    raw = splits(val=[row(n, image=picture(pixels("PNG", mode, size)), width=size[0], height=size[1])
                      for n, mode in ((1, "uint8"), (2, "uint16"))])
    eight, sixteen = (np.asarray(one["image"].convert("RGB"), int) for one in data.prepare(raw, 1, 56 * 56)["val"])
    assert np.array_equal(eight, sixteen) and eight[:, -4:].mean() > 180 and eight[:, :4].mean() < 10  # turned by EXIF
    thumbs = [picture_facts(picture(pixels("PNG", mode, size)))["thumb"] for mode in ("uint8", "uint16")]
    assert thumbs[0] == thumbs[1]  # what the audit knows a picture by


KINDS_OF_CLEAR = ["RGBA", "LA", "L", "RGB", "1", "16 bits", "P", "P, a value each"]


def is_ink_on_white(picture: Image.Image) -> bool:
    values = np.asarray(picture.convert("RGB"))
    height, width = values.shape[:2]
    return values[:4].min() > 240 and values[height // 2 - 4 : height // 2 + 4, width // 2].max() < 15


@pytest.mark.parametrize("kind", KINDS_OF_CLEAR)
@pytest.mark.parametrize("size", [(800, 400), (56, 56)])  # made smaller, and small enough
def test_what_is_transparent_becomes_white_in_the_prepared_picture_and_for_the_audit(kind, size):
    raw = splits(val=[row(1, image=picture(clear(kind, size)), width=size[0], height=size[1])])
    assert is_ink_on_white(data.prepare(raw, 1, 56 * 56)["val"][0]["image"])
    thumb = np.frombuffer(picture_facts(picture(clear(kind, size)))["thumb"], np.uint8).reshape(16, 16, 3)
    assert is_ink_on_white(Image.fromarray(thumb).resize((64, 64), Image.Resampling.NEAREST))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_a_transparent_picture_on_its_side_is_turned_and_has_one_size_everywhere(kind, tmp_path):
    exif, file = Image.Exif(), tmp_path / "a"
    exif[0x0112] = 6
    Image.new("RGBA", (80, 40)).save(file, kind, exif=exif)
    assert head({"bytes": None, "path": file}).shown == (40, 80) and open_upright(file).size == (40, 80)
    facts = picture_facts({"bytes": None, "path": str(file)})
    assert (facts["stored"], facts["orientation"]) == ([80, 40], 6)
    raw = splits(val=[row(1, image=picture(file.read_bytes()), width=40, height=80)])
    assert data.prepare(raw, 1, 28 * 56)["val"][0]["image"].size == (28, 56)
