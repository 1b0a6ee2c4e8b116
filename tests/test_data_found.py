"""A box is right or refused: what its numbers mean, which picture it belongs to, what cannot be read, by kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_exports as tiny
from tiny_exports import BOXES, HEIGHT, TEN, WIDTH, pixels, refused, write, yxyx

from helpers import data
from helpers.data.frames import ANY, to_unit
from helpers.data.matching import Found, Pictures
from helpers.data.pictures import Head
from helpers.data.schema import DataError

# --- unit, order and frame --------------------------------------------------------------------------------------------

UPRIGHT = Head((WIDTH, HEIGHT), 1)
SIZE, TWICE, HALF, LYING = (WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT), (WIDTH // 2, HEIGHT // 2), (HEIGHT, WIDTH)
SMALL = [tuple(np.array([.1, .1, .3, .25]) + i / 100) for i in range(10)]
LARGE = Head((3000, 4000), 1)
Written = Callable[[tuple], list]


def framed(box: list, head: Head | None = UPRIGHT, size: tuple[int, int] = SIZE) -> Found:
    return Found("a.jpg", [box], "", [""], size, head=head)


def before_exif_8(box: tuple) -> tuple:
    """The box in the picture as stored, which EXIF 8 turns into `box`."""
    return 1 - box[3], box[0], 1 - box[1], box[2]


def thousandths(box: tuple) -> list[float]:
    return pixels(box, 1000, 1000)


RIGHT: dict[str, tuple[str, Written, Head, tuple[int, int]]] = {  # what the format says, a box as written, the sizes
    "as the format says": ("xywh-pixels", lambda box: tiny.xywh(pixels(box)), UPRIGHT, SIZE),
    "as text": ("xywh-pixels", lambda box: [f"{v:.4f}" for v in tiny.xywh(pixels(box))], UPRIGHT, SIZE),
    "shares for pixels": ("xywh-pixels", tiny.xywh, UPRIGHT, SIZE),
    "corners for sizes": ("xywh-pixels", pixels, UPRIGHT, (0, 0)),
    "corners for a centre": ("cxcywh-unit", list, UPRIGHT, (0, 0)),
    "pixels for shares": ("cxcywh-unit", lambda box: tiny.centred(pixels(box)), UPRIGHT, (0, 0)),
    "nothing said: sizes": ("", lambda box: tiny.xywh(pixels(box)), UPRIGHT, (0, 0)),
    "nothing said: corners in shares": ("", list, UPRIGHT, (0, 0)),
    "nothing said: thousandths of a large picture": ("xyxy", thousandths, LARGE, (0, 0)),
    "nothing said: pixels of a small picture": ("xyxy", pixels, UPRIGHT, (0, 0)),
    "made smaller after labelling": ("xyxy-pixels", lambda box: pixels(box, *TWICE), UPRIGHT, TWICE),
    "a size that is wrong": ("xyxy-pixels", pixels, UPRIGHT, HALF),
    "a size with its sides swapped": ("xyxy-pixels", pixels, UPRIGHT, LYING),
    "EXIF 6, all as shown": ("xyxy-pixels", pixels, Head(LYING, 6), SIZE),
    "EXIF 6, the size as stored, boxes as shown": ("xyxy-pixels", pixels, Head(LYING, 6), LYING),
    "EXIF 8, all as stored": ("xyxy-pixels", lambda box: pixels(before_exif_8(box), *LYING), Head(LYING, 8), LYING),
    "EXIF 6 in shares": ("cxcywh-unit", tiny.centred, Head(LYING, 6), (0, 0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_the_numbers_of_a_box_mean_is_found_from_all_boxes(name):
    kind, written, head, size = RIGHT[name]
    found = to_unit([framed(written(box), head, size) for box in BOXES], kind, None, "set")
    np.testing.assert_allclose([boxes[0] for boxes in found], yxyx(BOXES), atol=1e-3)


AMBIGUOUS: dict[str, tuple[str, list, Written, Head, tuple[int, int], str]] = {  # and the box_format that decides
    "in the upper left": ("", SMALL, pixels, UPRIGHT, (0, 0), "xyxy-pixels"),
    "in any order": (ANY, BOXES, list, UPRIGHT, (0, 0), "xyxy-unit"),
    "a picture of a thousand pixels": ("xyxy", BOXES, thousandths, Head((1000, 990), 1), (0, 0), "xyxy-1000"),
    "upside down": ("xyxy-pixels", BOXES, pixels, Head(SIZE, 3), SIZE, "xyxy-pixels-shown"),
    "lying, small boxes": ("xyxy-pixels", SMALL, pixels, Head(LYING, 6), LYING, "xyxy-pixels-shown"),
    "twice as large, small boxes": ("xyxy-pixels", SMALL, lambda box: pixels(box, *TWICE), UPRIGHT, TWICE,
                                    "xyxy-pixels-declared"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_two_readings_fit_the_set_is_refused_and_box_format_decides(name):
    kind, boxes, written, head, size, box_format = AMBIGUOUS[name]
    pictures = [framed(written(box), head, size) for box in boxes]
    with pytest.raises(DataError, match="10 of 10 pictures have boxes that may be .* give box_format, one of") as error:
        to_unit(pictures, kind, None, "set")
    assert box_format.removesuffix("-shown") in str(error.value)
    found = to_unit(pictures, kind, box_format, "set")
    np.testing.assert_allclose([one[0] for one in found], yxyx(boxes), atol=1e-3)


def test_boxes_that_fit_nowhere_are_refused_and_a_few_that_leave_stay_for_the_audit():
    inside, outside = [framed(pixels(box)) for box in BOXES], [framed([900, 900, 950, 990])]
    with pytest.raises(DataError, match=r"too many boxes, such as \[900.*do not lie in their pictures"):
        to_unit(outside * 6 + inside[:4], "xyxy-pixels", None, "set")
    assert to_unit(inside + outside, "xyxy-pixels", None, "set")[-1] == [[7.5, 10, 8.25, 950 / WIDTH]]
    assert to_unit([Found("a.jpg", [], "", [])], "xyxy-pixels", None, "set") == [[]]


def test_pictures_that_two_readings_would_put_elsewhere_are_left_out_where_they_are_few(capsys):
    upside_down, sound = framed(pixels(BOXES[0]), Head(SIZE, 3)), [framed(pixels(box)) for box in BOXES]
    found = to_unit([*sound * 3, upside_down], "xyxy-pixels", None, "set")
    assert found[-1] is None and None not in found[:-1] and "1 of 31 pictures" in capsys.readouterr().out
    sideways = framed(pixels(BOXES[0]), Head(LYING, 6))  # the tool knows EXIF
    found = to_unit([*sound, sideways, upside_down], "xyxy-pixels", None, "set")
    np.testing.assert_allclose(found[-1], yxyx(BOXES[:1]))


# --- which picture ----------------------------------------------------------------------------------------------------

NAMES = [  # the files, the name in x.xml, the file that is meant or parts of the refusal
    (["a.jpg", "b/a.jpg"], "a.jpg", "a.jpg"),
    (["images/a.jpg"], "C:\\Users\\me\\images\\a.jpg", "images/a.jpg"),
    (["images/a.jpg"], "/home/me/data/a.jpg", "images/a.jpg"),
    (["images/a.jpg"], "..\\..\\media\\upload\\4\\a.jpg", "images/a.jpg"),
    (["images/a.JPG"], "a.jpg", "images/a.JPG"),
    (["images/a.png"], "a.jpg", "images/a.png"),
    (["images/a.jpg"], "a", "images/a.jpg"),
    (["images/é b.jpg"], "%C3%A9%20b.jpg", "images/é b.jpg"),
    (["images/é.jpg"], "é.jpg", "images/é.jpg"),
    (["images/a.jpg", "thumbs/a.jpg"], "a.jpg", "images/a.jpg"),
    (["day1/a.jpg", "day2/a.jpg"], "old/day2/a.jpg", "day2/a.jpg"),
    (["x.jpg", "y.jpg"], "stale.jpg", "x.jpg"),
    (["day1/a.jpg", "day2/a.jpg"], "a.jpg", ["day1/a.jpg or", "day2/a.jpg; expected one file"]),
    (["x.jpg", "y.jpg"], "y.jpg", ["names the picture 'y.jpg'", "beside it lies", "correct the name"]),
    (["runs/a.jpg", "y.jpg"], "a.jpg", None),
]


@pytest.mark.parametrize(("files", "name", "expected"), NAMES)
def test_a_picture_is_found_by_its_name_from_strict_to_loose(files, name, expected, tmp_path, capsys):
    for file in files:
        write(tmp_path / file, "")
    wanted = [Found(name, [], "", [], file=tmp_path / "x.xml", alone=True)]
    if isinstance(expected, list):
        with pytest.raises(DataError) as error:
            Pictures(tmp_path).find(wanted)
        assert all(part in str(error.value) for part in expected)
    else:
        found, = Pictures(tmp_path).find(wanted)
        assert found == tmp_path / (expected or name) and found.exists() == bool(expected)
        assert (f"-> {expected}" in capsys.readouterr().out) == (expected not in (name, None))


def test_a_picture_that_another_annotation_names_is_never_taken_for_a_missing_one(tmp_path):
    write(tmp_path / "b/1.jpg", "")
    wanted = [Found(f"{folder}/1.jpg", [], "", [], file=tmp_path / "all.json") for folder in "ab"]
    found = Pictures(tmp_path).find(wanted)
    assert found == [tmp_path / "1.jpg", tmp_path / "b/1.jpg"] and not found[0].exists()


# --- sets: what is no data, what cannot be read, what is said twice ---------------------------------------------------


def rewritten(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A change to what annotations.json of COCO holds, as one to its folder."""
    def of_folder(root: Path) -> None:
        found = json.loads((root / "annotations.json").read_text())
        change(found)
        write(root / "annotations.json", found)

    return of_folder


def polygons(found: dict) -> None:
    for note in found["annotations"]:
        x, y, w, h = note.pop("bbox")
        note["segmentation"] = [tiny.corners((x, y, x + w, y + h))[:4], tiny.corners((x, y, x + w, y + h))[4:]]


def masks(found: dict) -> None:
    for note in found["annotations"]:
        x, y, w, h = (round(value) for value in note.pop("bbox"))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + h, x : x + w] = 1
        runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))
        counts = np.diff(np.concatenate([[0], runs, [WIDTH * HEIGHT]])).tolist()
        note["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}


def stray(root: Path) -> None:
    write(root / "predictions.json", '[{"image_id": 0, "bbox": [0, 0, 1, 1]}]')
    write(root / "settings.json", "{")
    write(root / "results.csv", "epoch,loss\n1,2\n")
    write(root / "notes.xml", "<project/>")
    tiny.save_picture(root / "runs/detect/labels.jpg", 1)
    write(root / "runs/detect/labels.txt", "0 .5 .5 .1 .1\n")


def beside(root: Path, **changed: str) -> None:
    for name, ((_, box),) in TEN.items():
        write(root / f"labels/{name}.txt", changed.get(f"label_{name}", tiny.words(0, *tiny.centred(box))))


def shorten(root: Path, count: int) -> None:
    file = root / "images/3.jpg"
    file.write_bytes(file.read_bytes()[:-count])


LOST = {"image_id": 77, "category_id": 7, "bbox": [1, 2, 3, 4]}
AGAIN = {"images": [{"id": 10, "file_name": "3.jpg"}], "annotations": [LOST | {"image_id": 10}]}
SETS: dict[str, tuple[Callable[[Path], object], list[str] | int]] = {  # a change; the refusal, or how many stay
    "as it is": (lambda root: None, 10),
    "polygons": (rewritten(polygons), 10),
    "masks": (rewritten(masks), 10),
    "UTF-16": (lambda root: write(root / "annotations.json", json.dumps(tiny.coco(TEN)).encode("utf-16")), 10),
    "no names of classes": (rewritten(lambda found: found.pop("categories")), 10),
    "stray files": (stray, 10),
    "a copy of the file": (lambda root: shutil.copy(root / "annotations.json", root / "backup.json"), 10),
    "another format of the same": (beside, 10),
    "a JPEG without its last bytes": (lambda root: shorten(root, 3), 10),
    "a JPEG without its half": (lambda root: shorten(root, 700), 9),
    "a picture that is gone": (lambda root: (root / "images/3.jpg").unlink(), 9),
    "an annotation of no picture": (rewritten(lambda found: found["annotations"].append(LOST)), 10),
    "a lone surrogate": (rewritten(lambda found: found["categories"][0].update(name="a\ud800b")), 10),
    "boxes that cannot be read": (
        rewritten(lambda found: found["annotations"][4].update(bbox=[1, "x"])),
        ["1 of 10 pictures have boxes that cannot be read", "4 (annotations.json: [1, 'x'])"]),
    "pictures without a box": (
        rewritten(lambda found: found["annotations"].pop()),
        ["1 of 10 pictures are listed without a box", "unlabelled='negative' or 'skip'"]),
    "another format, other boxes": (
        lambda root: beside(root, label_2="0 .5 .5 .9 .9"), ["holds COCO and YOLO, which differ"]),
    "a picture twice, other boxes": (
        rewritten(lambda found: [found[key].extend(more) for key, more in AGAIN.items()]),
        ["3 (annotations.json)", "annotated twice"]),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_right_or_refused_by_name(name, tmp_path):
    change, expected = SETS[name]
    change(tiny.export(tmp_path, "COCO", TEN))
    if isinstance(expected, list):
        return refused(tmp_path, *expected)
    rows = tiny.load_clean(tmp_path, unlabelled=None)
    assert len(rows) == expected
    for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True):
        np.testing.assert_allclose(objects["bbox"], yxyx(BOXES[int(image_id)]), atol=0.01)


def test_a_few_unreadable_or_unlabelled_pictures_of_many_are_left_out_and_said(tmp_path, capsys):
    tiny.export(tmp_path, "COCO", {str(n): TEN[str(n % 10)] for n in range(40)})
    rewritten(lambda found: found["annotations"][12].update(bbox=None) or found["annotations"].pop(20))(tmp_path)
    rows = data.load_raw(str(tmp_path), val_share=1)["val"]
    assert len(rows) == 38 and not {"12", "20"} & set(rows["image_id"])
    printed = capsys.readouterr().out
    assert "1 of 39 pictures have boxes that cannot be read: left out, such as 12" in printed
    assert "1 of 40 pictures are listed without a box" in printed
    assert len(data.load_raw(str(tmp_path), val_share=1, unlabelled="negative")["val"]) == 39


@pytest.mark.parametrize(("labels", "expected"), [
    ({"3": None}, 1),  # absent beside labelled ones
    ({"3": "\n"}, 1),
    ({str(n): None for n in range(7)}, ["7 of 10 pictures are listed without a box"]),  # not labelled yet
    ({"3": None, "%33": "0 .5 .5 .2 .2"}, 0),  # the name as a URL has it
    ({"3": "1 .5 .5 .2 .2"}, ["line 1 is of class 1, which is not among ['table']"]),
])
def test_an_absent_label_of_yolo_is_a_picture_without_a_table_only_beside_labelled_ones(labels, expected, tmp_path):
    tiny.save_picture(tmp_path / "elsewhere/cover.jpg", 99)
    write(tmp_path / "classes.txt", "table")
    for name in TEN:
        tiny.save_picture(tmp_path / f"images/{name}.jpg", int(name))
    for name, text in (dict.fromkeys(TEN, "0 .5 .5 .2 .2") | labels).items():
        if text:
            write(tmp_path / f"labels/{name}.txt", text)
    if isinstance(expected, list):
        return refused(tmp_path, *expected)
    rows = tiny.load_clean(tmp_path, unlabelled=None)
    assert len(rows) == 10 and sum(not objects["bbox"] for objects in rows["objects"]) == expected
