"""A box is right or refused: what its numbers mean, which picture it belongs to, what cannot be read, by kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import data
from helpers.data.frames import ANY, to_unit
from helpers.data.matching import Found, Pictures
from helpers.data.pictures import Head
from helpers.data.schema import DataError

WIDTH, HEIGHT = 90, 120


def framed(boxes, head, declared):
    return Found("a.jpg", boxes, "", [""] * len(boxes), declared, head=head)


def wanted(name, file, split, stem=""):
    return Found(name, [], "", [], split=split, stem=stem, file=file)


BOXES = [(.27, .31, .74, .72), (.1, .3, .55, .78), (.36, .37, .75, .61), (.16, .24, .75, .82), (.11, .23, .79, .79),
         (.08, .07, .85, .97), (.0, .03, .96, .85), (.04, .02, .88, .92), (.12, .05, .94, .96), (.5, .6, .9, .7)]


def pixels(box: tuple, width: float = WIDTH, height: float = HEIGHT) -> list[float]:
    return [box[0] * width, box[1] * height, box[2] * width, box[3] * height]


def xywh(box: list | tuple) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def centred(box: list | tuple) -> list[float]:
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]


def before_exif(box: tuple, orientation: int) -> tuple:
    """The box in the picture as stored, which `orientation` turns into `box`."""
    x0, y0, x1, y1 = box
    return {3: (1 - x1, 1 - y1, 1 - x0, 1 - y0), 6: (y0, 1 - x1, y1, 1 - x0), 8: (1 - y1, x0, 1 - y0, x1)}[orientation]


# --- unit, order and frame --------------------------------------------------------------------------------------------

UPRIGHT = Head((WIDTH, HEIGHT), 1)
SMALL = [tuple(np.array([.1, .1, .3, .25]) + i / 100) for i in range(10)]
LARGE = Head((3000, 4000), 1)
TWICE, HALF, LYING = (2 * WIDTH, 2 * HEIGHT), (WIDTH // 2, HEIGHT // 2), (HEIGHT, WIDTH)
Written = Callable[[tuple], list]

RIGHT: dict[str, tuple[str, Written, Head, tuple[int, int]]] = {  # what the format says, a box as written, the sizes
    "as the format says": ("xywh-pixels", lambda box: xywh(pixels(box)), UPRIGHT, (WIDTH, HEIGHT)),
    "as text": ("xywh-pixels", lambda box: [f"{v:.4f}" for v in xywh(pixels(box))], UPRIGHT, (WIDTH, HEIGHT)),
    "shares for pixels": ("xywh-pixels", xywh, UPRIGHT, (WIDTH, HEIGHT)),
    "corners for sizes": ("xywh-pixels", pixels, UPRIGHT, (0, 0)),
    "corners for a centre": ("cxcywh-unit", list, UPRIGHT, (0, 0)),
    "pixels for shares": ("cxcywh-unit", lambda box: centred(pixels(box)), UPRIGHT, (0, 0)),
    "nothing said: sizes": ("", lambda box: xywh(pixels(box)), UPRIGHT, (0, 0)),
    "nothing said: corners in shares": ("", list, UPRIGHT, (0, 0)),
    "nothing said: thousandths of a large picture": ("xyxy", lambda box: pixels(box, 1000, 1000), LARGE, (0, 0)),
    "nothing said: pixels of a small picture": ("xyxy", pixels, UPRIGHT, (0, 0)),
    "made smaller after labelling": ("xyxy-pixels", lambda box: pixels(box, *TWICE), UPRIGHT, TWICE),
    "a size that is wrong": ("xyxy-pixels", pixels, UPRIGHT, HALF),
    "a size with its sides swapped": ("xyxy-pixels", pixels, UPRIGHT, LYING),
    "EXIF 6, all as shown": ("xyxy-pixels", pixels, Head(LYING, 6), (WIDTH, HEIGHT)),
    "EXIF 6, the size as stored, boxes as shown": ("xyxy-pixels", pixels, Head(LYING, 6), LYING),
    "EXIF 8, all as stored": ("xyxy-pixels", lambda box: pixels(before_exif(box, 8), *LYING), Head(LYING, 8), LYING),
    "EXIF 6 in shares": ("cxcywh-unit", centred, Head(LYING, 6), (0, 0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_the_numbers_of_a_box_mean_is_found_from_all_boxes(name):
    kind, written, head, declared = RIGHT[name]
    found = to_unit([framed([written(box)], head, declared) for box in BOXES], kind, None, "set")
    np.testing.assert_allclose([boxes[0] for boxes in found], np.array(BOXES)[:, [1, 0, 3, 2]], atol=1e-3)


AMBIGUOUS: dict[str, tuple[str, list, Written, Head, tuple[int, int], str]] = {  # and the box_format that decides
    "in the upper left": ("", SMALL, pixels, UPRIGHT, (0, 0), "xyxy-pixels"),
    "in any order": (ANY, BOXES, list, UPRIGHT, (0, 0), "xyxy-unit"),
    "a picture of a thousand pixels": ("xyxy", BOXES, lambda box: pixels(box, 1000, 1000), Head((1000, 990), 1), (0, 0),
                                       "xyxy-1000"),
    "upside down": ("xyxy-pixels", BOXES, pixels, Head((WIDTH, HEIGHT), 3), (WIDTH, HEIGHT), "xyxy-pixels-shown"),
    "lying, small boxes": ("xyxy-pixels", SMALL, pixels, Head(LYING, 6), LYING, "xyxy-pixels-shown"),
    "twice as large, small boxes": ("xyxy-pixels", SMALL, lambda box: pixels(box, *TWICE), UPRIGHT, TWICE,
                                    "xyxy-pixels-declared"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_two_readings_fit_the_set_is_refused_and_box_format_decides(name):
    kind, boxes, written, head, declared, box_format = AMBIGUOUS[name]
    pictures = [framed([written(box)], head, declared) for box in boxes]
    with pytest.raises(DataError, match="10 of 10 pictures have boxes that may be .* give box_format, one of") as error:
        to_unit(pictures, kind, None, "set")
    assert box_format.removesuffix("-shown") in str(error.value)
    found = to_unit(pictures, kind, box_format, "set")
    np.testing.assert_allclose([one[0] for one in found], np.array(boxes)[:, [1, 0, 3, 2]], atol=1e-3)


def test_boxes_that_fit_nowhere_are_refused_and_a_few_that_leave_stay_for_the_audit():
    inside = [framed([pixels(box)], UPRIGHT, (WIDTH, HEIGHT)) for box in BOXES]
    outside = [framed([[900, 900, 950, 990]], UPRIGHT, (WIDTH, HEIGHT))]
    with pytest.raises(DataError, match=r"too many boxes, such as \[900.*do not lie in their pictures"):
        to_unit(outside * 6 + inside[:4], "xyxy-pixels", None, "set")
    assert to_unit(inside + outside, "xyxy-pixels", None, "set")[-1] == [[7.5, 10, 8.25, 950 / WIDTH]]
    assert to_unit([framed([], None, (0, 0))], "xyxy-pixels", None, "set") == [[]]


def test_pictures_that_two_readings_would_put_elsewhere_are_left_out_where_they_are_few(capsys):
    upside_down = framed([pixels(BOXES[0])], Head((WIDTH, HEIGHT), 3), (WIDTH, HEIGHT))
    sound = [framed([pixels(box)], UPRIGHT, (WIDTH, HEIGHT)) for box in BOXES]
    found = to_unit([*sound * 3, upside_down], "xyxy-pixels", None, "set")
    assert found[-1] is None and None not in found[:-1] and "1 of 31 pictures" in capsys.readouterr().out
    sideways = framed([pixels(BOXES[0])], Head(LYING, 6), (WIDTH, HEIGHT))  # the tool knows EXIF
    np.testing.assert_allclose(to_unit([*sound, sideways, upside_down], "xyxy-pixels", None, "set")[-1][0],
                               np.array(BOXES[0])[[1, 0, 3, 2]])


# --- which picture ----------------------------------------------------------------------------------------------------

NAMES = [  # the files, the name in x.xml, the file that is meant or words of the refusal
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
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    names = [wanted(name, tmp_path / "x.xml", "", "x")]
    if isinstance(expected, list):
        with pytest.raises(DataError) as error:
            Pictures(tmp_path).find(names)
        assert all(word in str(error.value) for word in expected)
    else:
        found, = Pictures(tmp_path).find(names)
        assert found == tmp_path / (expected or name) and found.exists() == bool(expected)
        assert (f"-> {expected}" in capsys.readouterr().out) == (expected not in (name, None))


def test_a_picture_that_another_annotation_names_is_never_taken_for_a_missing_one(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.jpg").touch()
    found = Pictures(tmp_path).find([wanted(f"{folder}/1.jpg", tmp_path / "all.json", "") for folder in "ab"])
    assert found == [tmp_path / "1.jpg", tmp_path / "b/1.jpg"] and not found[0].exists()


# --- sets: what is no data, what cannot be read, what is said twice ---------------------------------------------------


def save(path: Path, number: int, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    patches = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(patches).resize((WIDTH, HEIGHT), 3).save(path, exif=exif)


def coco(root: Path, name: str = "annotations.json", count: int = 10, **changes) -> dict:
    """Ten pictures and their COCO file; `changes`: to its annotations, by number."""
    notes = [{"image_id": n, "category_id": 1, "bbox": xywh(pixels(box))} for n, box in enumerate(BOXES[:count])]
    for number in range(len(BOXES)):
        save(root / "images" / f"{number}.jpg", number)
    found = {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(count)], "annotations": notes,
             "categories": [{"id": 1, "name": "table"}]}
    (root / name).write_text(json.dumps(found))
    return found


def rewrite(root: Path, change: Callable[[dict], object]) -> None:
    found = json.loads((root / "annotations.json").read_text())
    change(found)
    (root / "annotations.json").write_text(json.dumps(found))


def polygons(found: dict) -> None:
    for note in found["annotations"]:
        x, y, w, h = note.pop("bbox")
        note["segmentation"] = [[x, y, x + w, y], [x + w, y + h, x, y + h]]


def masks(found: dict) -> None:
    for note in found["annotations"]:
        x, y, w, h = (round(value) for value in note.pop("bbox"))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + h, x : x + w] = 1
        runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))
        counts = np.diff(np.concatenate([[0], runs, [WIDTH * HEIGHT]])).tolist()
        note["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}


def stray(root: Path) -> None:
    (root / "predictions.json").write_text('[{"image_id": 0, "bbox": [0, 0, 1, 1]}]')
    (root / "settings.json").write_text("{")
    (root / "results.csv").write_text("epoch,loss\n1,2\n")
    (root / "notes.xml").write_text("<project/>")
    save(root / "runs/detect/labels.jpg", 1)
    (root / "runs/detect/labels.txt").write_text("0 .5 .5 .1 .1\n")


def beside(root: Path) -> None:
    for number, box in enumerate(BOXES):
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{number}.txt").write_text("0 {} {} {} {}\n".format(*centred(box)))


def shorten(root: Path, count: int) -> None:
    file = root / "images/3.jpg"
    file.write_bytes(file.read_bytes()[:-count])


SETS: dict[str, tuple[Callable[[Path], object], list[str] | int]] = {  # a change; the refusal, or how many stay
    "as it is": (lambda root: None, 10),
    "polygons": (lambda root: rewrite(root, polygons), 10),
    "masks": (lambda root: rewrite(root, masks), 10),
    "UTF-16": (lambda root: (root / "annotations.json").write_bytes(
        (root / "annotations.json").read_text().encode("utf-16")), 10),
    "no names of classes": (lambda root: rewrite(root, lambda found: found.pop("categories")), 10),
    "stray files": (stray, 10),
    "a copy of the file": (lambda root: shutil.copy(root / "annotations.json", root / "backup.json"), 10),
    "another format of the same": (beside, 10),
    "a JPEG without its last bytes": (lambda root: shorten(root, 3), 10),
    "a JPEG without its half": (lambda root: shorten(root, 700), 9),
    "an annotation of no picture": (lambda root: rewrite(root, lambda found: found["annotations"].append(
        {"image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 4]})), 10),
    "boxes that cannot be read": (
        lambda root: rewrite(root, lambda found: found["annotations"][4].update(bbox=[1, "x"])),
        ["1 of 10 pictures have boxes that cannot be read", "4 (annotations.json: [1, 'x'])"]),
    "pictures without a box": (lambda root: rewrite(root, lambda found: found["annotations"].pop()),
                               ["1 of 10 pictures are listed without a box", "unlabelled='negative' or 'skip'"]),
    "another format, other boxes": (lambda root: (beside(root), (root / "labels/2.txt").write_text("0 .5 .5 .9 .9")),
                                    ["holds COCO and YOLO, which differ"]),
    "a picture twice, other boxes": (lambda root: rewrite(root, lambda found: found["images"].append(
        {"id": 10, "file_name": "3.jpg"}) or found["annotations"].append(
        {"image_id": 10, "category_id": 1, "bbox": [1, 2, 30, 4]})), ["3 (annotations.json)", "annotated twice"]),
    "a lone surrogate": (lambda root: rewrite(root, lambda found: found["categories"][0].update(name="a\ud800b")), 10),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_right_or_refused_by_name(name, tmp_path):
    change, expected = SETS[name]
    coco(tmp_path)
    change(tmp_path)
    if isinstance(expected, list):
        with pytest.raises(DataError) as error:
            data.load_raw(str(tmp_path), val_share=1)
        assert all(word in str(error.value) for word in expected) and "\n" not in str(error.value)
        return
    rows = data.load_splits(str(tmp_path), val_share=1)["val"]
    assert len(rows) == expected
    for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True):
        np.testing.assert_allclose(objects["bbox"], [np.array(BOXES[int(image_id)])[[1, 0, 3, 2]]], atol=0.01)


def test_a_few_unreadable_or_unlabelled_pictures_of_many_are_left_out_and_said(tmp_path, capsys):
    coco(tmp_path)
    def more(found: dict) -> None:
        for n in range(10, 40):
            save(tmp_path / f"images/{n}.jpg", n)
            found["images"].append({"id": n, "file_name": f"{n}.jpg"})
            found["annotations"].append({"image_id": n, "category_id": 1, "bbox": xywh(pixels(BOXES[n % 10]))})
        found["annotations"][12]["bbox"] = None
        found["annotations"].pop(20)
    rewrite(tmp_path, more)
    rows = data.load_raw(str(tmp_path), val_share=1)["val"]
    assert len(rows) == 38 and not {"12", "20"} & set(rows["image_id"])
    said = capsys.readouterr().out
    assert "1 of 39 pictures have boxes that cannot be read: left out, such as 12" in said
    assert "1 of 40 pictures are listed without a box" in said
    assert len(data.load_raw(str(tmp_path), val_share=1, unlabelled="negative")["val"]) == 39


@pytest.mark.parametrize(("labels", "expected"), [
    ({"3": None}, 1),  # absent beside labelled ones
    ({"3": "\n"}, 1),
    ({str(n): None for n in range(7)}, ["7 of 10 pictures are listed without a box"]),  # not labelled yet
    ({"3": None, "%33": "0 .5 .5 .2 .2"}, 0),  # the name as a URL has it
    ({"3": "1 .5 .5 .2 .2"}, ["line 1 is of class 1, which is not among ['table']"]),
])
def test_an_absent_label_of_yolo_is_a_picture_without_a_table_only_beside_labelled_ones(labels, expected, tmp_path):
    for number in range(10):
        save(tmp_path / f"images/{number}.jpg", number)
    save(tmp_path / "elsewhere/cover.jpg", 99)
    (tmp_path / "labels").mkdir()
    for name, text in ({str(n): "0 .5 .5 .2 .2" for n in range(10)} | labels).items():
        if text:
            (tmp_path / f"labels/{name}.txt").write_text(text)
    (tmp_path / "classes.txt").write_text("table")
    if isinstance(expected, list):
        with pytest.raises(DataError) as error:
            data.load_raw(str(tmp_path))
        assert all(word in str(error.value) for word in expected)
    else:
        rows = data.load_raw(str(tmp_path), val_share=1)["val"]
        assert len(rows) == 10 and sum(not objects["bbox"] for objects in rows["objects"]) == expected
