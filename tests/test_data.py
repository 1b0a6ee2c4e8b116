"""The schema, the audit and what it does, splits without leaks, the embedded scenes, pictures prepared once."""

import io
import json
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from finished_model import clear
from PIL import Image

from helpers import data, evaluate, scenes
from helpers.data import embedded
from helpers.data.audit import _twins, audit, clean
from helpers.data.pictures import head, picture_facts
from helpers.data.schema import FEATURES, SPLIT_NAMES, empty_split, objects_of
from helpers.data.splits import carve
from helpers.use.load import open_upright

TABLE = "nutrition-table"


def jpeg(number: int, size: tuple[int, int] = (64, 48), orientation: int | None = None, quality: int = 90) -> bytes:
    """A picture of its own for each `number`: a few large patches of random colour; `size` as stored."""
    patches = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


def row(number: int, boxes=((0.1, 0.2, 0.5, 0.6),), names=None, barcode: str | None = None, **other) -> dict:
    """A row of the schema with the picture `number`; `other` replaces its fields."""
    meta = {"barcode": f"{number:013d}" if barcode is None else barcode, "off_image_id": "1", "image_url": ""}
    objects = objects_of([list(box) for box in boxes], list(names or [TABLE] * len(boxes)))
    return {"image_id": f"{number:013d}_1", "image": picture(jpeg(number)), "width": 64, "height": 48, "meta": meta,
            "objects": objects} | other


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


# --- boxes and categories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "boxes", "names", "left"),
    [
        ("inverted-box", [[0.5, 0.6, 0.1, 0.2]], None, [[0.1, 0.2, 0.5, 0.6]]),
        ("out-of-range-box", [[-0.1, 0.2, 1.3, 0.6]], None, [[0.0, 0.2, 1.0, 0.6]]),
        ("empty-box", [[0.1, 0.2, 0.1, 0.6], [0.1, 0.2, 0.5, 0.6]], None, [[0.1, 0.2, 0.5, 0.6]]),
        ("empty-box", [[0.1, 0.2, 0.5, 0.6], [1.1, 0.2, 1.4, 0.6]], None, [[0.1, 0.2, 0.5, 0.6]]),  # wholly outside
        ("not-a-box", [[0.1, 0.2, 0.5], [0.1, 0.2, 0.5, 0.6]], None, [[0.1, 0.2, 0.5, 0.6]]),
        ("not-a-box", [[0.1, float("nan"), 0.5, 0.6], [0.1, 0.2, 0.5, 0.6]], None, [[0.1, 0.2, 0.5, 0.6]]),
        ("repeated-box", [[0.1, 0.2, 0.5, 0.6]] * 2, None, [[0.1, 0.2, 0.5, 0.6]]),
        ("unknown-category", [[0.1, 0.2, 0.5, 0.6], [0.6, 0.1, 0.9, 0.9]], [TABLE, ""], [[0.1, 0.2, 0.5, 0.6]]),
        ("no-table", [], None, []),
    ],
)
def test_a_planted_box_fault_is_named_and_treated_as_its_rule_says(fault, boxes, names, left):
    raw = splits(val=[row(1), row(2, boxes, names)])
    assert found(raw)[fault] == ["0000000000002_1"]
    assert cleaned(raw)["val"][1]["objects"]["bbox"] == left
    assert cleaned(raw)["val"][0]["objects"] == raw["val"][0]["objects"]
    assert raw["val"].to_list()[1]["objects"]["bbox"][0:1] == boxes[0:1] or np.isnan(boxes[0]).any()  # raw stays raw


def test_a_picture_whose_boxes_cannot_be_known_is_dropped_and_is_none_without_a_table():
    raw = splits(val=[row(1), row(2, [[1.1, 0.2, 1.4, 0.6]]), row(3, [[0.1, 0.2, 0.5]]), row(4, []),
                      row(5, [[0.1, 0.2, 0.1, 0.6]])])  # fmt: skip
    assert found(raw)["no-box-left"] == ["0000000000002_1", "0000000000003_1"]
    assert found(raw)["no-table"] == ["0000000000004_1", "0000000000005_1"]
    assert cleaned(raw)["val"]["image_id"] == [f"{number:013d}_1" for number in (1, 4, 5)]


def test_float32_rounding_is_no_fault_and_leaves_the_unit_square():
    raw = splits(val=[row(1, [[-1e-8, 0.2, 1.0000001, 0.6]])])
    assert found(raw) == {}
    assert cleaned(raw)["val"][0]["objects"]["bbox"] == [[0.0, 0.2, 1.0, 0.6]]


def test_where_category_id_and_name_disagree_the_name_counts():
    objects = {"bbox": [[0.1, 0.2, 0.5, 0.6]], "category_id": [0], "category_name": ["nutrition-table-text"]}
    raw = splits(val=[row(1, objects=objects)])
    assert list(found(raw)) == ["category-mismatch"]
    assert cleaned(raw)["val"][0]["objects"]["category_id"] == [3]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_does_not_decode_to_its_end_is_dropped_and_the_others_stay():
    whole = jpeg(2)
    raw = splits(val=[row(1), row(2, image=picture(whole[: len(whole) // 2])), row(3, image=picture(b"not a picture")),
                      row(4, image=None), row(5, image={"bytes": None, "path": "/nowhere/5.jpg"}),
                      row(6, image=picture(jpeg(6, (1000, 4))), width=1000, height=4)])
    result = audit(raw)
    assert found(raw)["unreadable-picture"] == [f"{number:013d}_1" for number in (2, 3, 4, 5)]
    assert found(raw)["too-thin-picture"] == ["0000000000006_1"]
    assert "truncated" in next(fault.found for fault in result.faults if fault.index == 1)
    assert cleaned(raw)["val"]["image_id"] == ["0000000000001_1"]
    assert result.statistics["val"]["pictures"] == 1


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


def test_exif_that_the_boxes_follow_or_that_leaves_no_trace_is_named_and_kept():
    raw = splits(val=[row(1, image=picture(jpeg(1, orientation=6)), width=48, height=64),
                      row(2, image=picture(jpeg(2, orientation=3))), row(3, image=picture(jpeg(3, orientation=1)))])
    assert found(raw) == {"exif-as-shown": ["0000000000001_1"], "exif-undecided": ["0000000000002_1"]}
    assert cleaned(raw)["val"].to_list() == raw["val"].to_list()
    assert raw["val"][0]["image"].size == (48, 64)


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


def test_selection_is_carved_by_whole_barcodes_the_same_way_each_time():
    rows = [row(number, barcode=str(number // 3)) for number in range(60)]
    split = splits(train=rows)["train"]
    rest, taken = carve(split, 10, seed=0)
    assert 10 <= len(taken) <= 12 and len(rest) + len(taken) == 60
    assert not {meta["barcode"] for meta in rest["meta"]} & {meta["barcode"] for meta in taken["meta"]}
    assert carve(split, 10, seed=0)[1]["image_id"] == taken["image_id"] == sorted(taken["image_id"])
    assert carve(split, 10, seed=1)[1]["image_id"] != taken["image_id"]
    assert len(carve(split.select([0]), 1, seed=0)[0]) == 1  # the rest is never empty


# --- the embedded scenes ----------------------------------------------------------------------------------------------

FEW = {"train": 3, "selection": 2, "val": 2}


def test_embedded_rows_are_the_scenes(tmp_path: Path):
    ds = data.load_raw("embedded", cache_dir=str(tmp_path), limit=FEW, seed=5)
    assert {name: len(split) for name, split in ds.items()} == FEW
    assert list(ds["train"].features) == [*FEATURES, "rotation"]
    scene = scenes.render_scene(5, 1, "val")
    value = ds["val"].cast_column("image", datasets.Image(decode=False))[1]
    assert value["image"]["bytes"] == scene.jpeg
    assert (value["image_id"], value["width"], value["height"]) == (scene.image_id, scene.width, scene.height)
    assert [(y0, x0, y1, x1) for _, (x0, y0, x1, y1) in scene.tables] == [tuple(b) for b in value["objects"]["bbox"]]
    assert ds["val"][1]["image"].size == (scene.width, scene.height)
    assert data.truth_rows(ds["val"])[1] == {k: v for k, v in value.items() if k != "image"}


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
    undecoded = [ds["train"].cast_column("image", datasets.Image(decode=False))[1] for ds in (raw, ready)]
    assert undecoded[0] == undecoded[1]  # small enough: the same bytes
    before = np.asarray(raw["train"][0]["image"].resize((width, height), Image.Resampling.BICUBIC), int)
    assert np.abs(before - np.asarray(ready["train"][0]["image"], int)).mean() < 2


def grey(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    """Light grey (3/4 of the range) in the left half, black in the right, on its side for EXIF."""
    light = {"uint8": 192, "uint16": 192 * 256, "int32": 192, "float32": 0.75}[mode]
    pixels = np.zeros(size[::-1], mode)
    pixels[:, : size[0] // 2] = light
    exif = Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"exif": exif} if kind == "PNG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("size", [(800, 400), (56, 28)])  # made smaller, and small enough
def test_a_grey_picture_of_16_bits_is_the_one_of_8_bits(size):
    raw = splits(val=[row(n, image=picture(grey("PNG", mode, size)), width=size[0], height=size[1])
                      for n, mode in ((1, "uint8"), (2, "uint16"))])
    eight, sixteen = (np.asarray(one["image"].convert("RGB"), int) for one in data.prepare(raw, 1, 56 * 56)["val"])
    assert np.array_equal(eight, sixteen) and eight[:, -4:].mean() > 180 and eight[:, :4].mean() < 10  # turned by EXIF
    thumbs = [picture_facts(picture(grey("PNG", mode, size)))["thumb"] for mode in ("uint8", "uint16")]
    assert thumbs[0] == thumbs[1]  # what the audit knows a picture by


@pytest.mark.parametrize("mode, said", [("int32", "32-bit"), ("float32", "floating point")])
def test_a_picture_of_numbers_without_a_range_is_named_and_dropped(mode, said):
    raw = splits(val=[row(1), row(2, image=picture(grey("TIFF", mode, (64, 48))))])
    assert found(raw) == {"unreadable-picture": ["0000000000002_1"]}
    assert f"{said} numbers of no known range" in audit(raw).faults[0].found
    assert cleaned(raw)["val"]["image_id"] == ["0000000000001_1"]


KINDS_OF_CLEAR = ["RGBA", "LA", "L", "RGB", "1", "16 bits", "P", "P, a value each"]


def is_ink_on_white(picture: Image.Image) -> bool:
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    return pixels[:4].min() > 240 and pixels[height // 2 - 4 : height // 2 + 4, width // 2].max() < 15


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
