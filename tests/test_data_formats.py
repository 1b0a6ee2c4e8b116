"""Each format of annotations becomes the same rows; each bad input has its sentence."""

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny_exports as tiny
from tiny_exports import TABLE, THINGS, coco, export, refused, write

from helpers import data
from helpers.data import formats
from helpers.data.schema import FEATURES


def check_rows(rows: datasets.Dataset) -> None:
    """The rows are those of `THINGS`."""
    for row, (image_id, own) in zip(rows, THINGS.items(), strict=True):
        assert (row["image_id"], row["width"], row["height"]) == (image_id, tiny.WIDTH, tiny.HEIGHT)
        assert row["image"].size == (tiny.WIDTH, tiny.HEIGHT)
        assert row["objects"]["category_name"] == [kind for kind, _ in own]
        assert row["objects"]["category_id"] == [tiny.IDS[kind] for kind, _ in own]
        np.testing.assert_allclose(tiny.yxyx(row["objects"]["bbox"]), np.array([box for _, box in own]).reshape(-1, 4),
                                   atol=1e-5)


@pytest.mark.parametrize("name", [*tiny.FORMATS, *tiny.TABLES])
def test_every_format_gives_the_same_rows(name, tmp_path, capsys):
    rows = tiny.load_clean(export(tmp_path / "set", name))
    assert f"is read as {(tiny.FORMATS | tiny.TABLES)[name][0]} (" in capsys.readouterr().out
    assert rows.features == FEATURES
    check_rows(rows)


def test_a_parquet_or_coco_file_may_be_named_itself(tmp_path):
    export(tmp_path / "parquet", "Parquet")
    assert len(tiny.load(tmp_path / "parquet/data/val-00001-of-00002.parquet")["val"]) == 2
    export(tmp_path / "coco", "COCO")
    for file in ("annotations.json", "annotations/all.json"):
        check_rows(tiny.load_clean(write(tmp_path / "coco" / file, coco())))


def test_a_missing_picture_is_never_replaced_by_one_of_another_split(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(THINGS):
            tiny.save_picture(tmp_path / f"{split}2017/{name}.jpg", number)
        write(tmp_path / f"annotations/instances_{split}2017.json", coco())
    (tmp_path / "train2017/a.jpg").unlink()
    raw = tiny.load(tmp_path)
    assert data.audit(raw).table().set_index("fault").loc["unreadable-picture", "ids"] == ["a"]
    folders = {name: {Path(image["path"]).parent.name for image in tiny.undecoded(rows)} for name, rows in raw.items()}
    assert folders["val"] == {"val2017"} and "val2017" not in folders["train"] | folders["selection"]


@pytest.mark.parametrize("name", ["COCO", "own metadata", "YOLO classes.txt"])
def test_files_written_on_windows_are_read(name, tmp_path):
    """A byte order mark, backslashes, CR LF."""
    export(tmp_path, name)
    for file in (file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl", ".txt")):
        text = file.read_bytes().replace(b"\n", b"\r\n").replace(b'"file_name": "', b'"file_name": ".\\\\')
        file.write_bytes(b"\xef\xbb\xbf" + text)
    check_rows(tiny.load_clean(tmp_path))


@pytest.mark.parametrize("name", ["COCO", "YOLO classes.txt", "Pascal VOC", "Parquet"])
def test_hidden_files_and_leftovers_of_programs_are_never_data(name, tmp_path):
    """As macOS puts them into a zip, as Jupyter and a labelling tool leave them: copies, and files of another kind."""
    export(tmp_path, name)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        for folder in (".ipynb_checkpoints", "__MACOSX", ".cache/huggingface", "@eaDir"):
            write(tmp_path / folder / file.relative_to(tmp_path), file.read_bytes())
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7 of macOS")
    check_rows(tiny.load_clean(tmp_path))


TURNED = '<annotations><image name="a"><{}</image></annotations>'
POLYGON = "<annotation><object><polygon>{}</polygon></object></annotation>"
VALUE = {"x": 10, "y": 20, "width": 30, "height": 10, "rotation": 90, "rectanglelabels": ["t"]}
SHAPES = [  # format, what its file holds, the corners of the box around the shape
    ("CVAT", TURNED.format('box label="t" xtl="10" ytl="20" xbr="50" ybr="40" rotation="90"/>'), (20, 10, 40, 50)),
    ("CVAT", TURNED.format('polygon label="t" points="1,2;30,4;5,60"/>'), (1, 2, 30, 60)),
    ("Pascal VOC", POLYGON.format("<x1>1</x1><y1>2</y1><x2>7</x2><y2>9</y2>"), (1, 2, 7, 9)),
    ("Pascal VOC", POLYGON.format("<pt><x>1</x><y>9</y></pt><pt><x>5</x><y>2</y></pt>"), (1, 2, 5, 9)),
    ("Label Studio", [{"data": {"image": "a.jpg"}, "annotations": [{"result": [
        {"original_width": 100, "original_height": 200, "value": VALUE}]}]}], (-10, 20, 10, 35)),
    ("Label Studio", [{"data": {"image": "a.jpg"}, "annotations": [{"result": [
        {"value": {"points": [[1, 2], [3, 4], [9, 1]], "polygonlabels": ["t"]}}]}]}], (1, 1, 9, 4)),
    ("VIA", {"a": {"filename": "a.jpg", "regions": {"0": {"shape_attributes": {
        "all_points_x": [1, 5, 3], "all_points_y": [2, 4, 9]}, "region_attributes": {"t": {"yes": True}}}}}},
     (1, 2, 5, 9)),
    ("COCO", {"images": [{"id": 0, "file_name": "a.jpg"}], "annotations": [
        {"image_id": 0, "category_id": 0, "segmentation": [[1, 2, 7, 9, 3, 3]]}]}, (1, 2, 7, 9)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "around"), SHAPES)
def test_of_a_turned_box_or_a_polygon_the_box_around_it_is_taken(name, content, around):
    content = ElementTree.fromstring(content) if isinstance(content, str) else content
    (found,) = formats.FORMATS[name].read(Path("file"), content)
    np.testing.assert_allclose(found.boxes, [around], atol=1e-9)
    assert isinstance(found.boxes[0], tuple) and len(found.names) == 1  # corners, whatever the format's order


# --- bad input: each has its sentence ---------------------------------------------------------------------------------


def lines(*objects) -> list[dict]:
    """A metadata.jsonl that says of a.jpg each of these."""
    return [{"file_name": "a.jpg", "objects": one} for one in objects]


NAMED = f"names: [{TABLE}, nutrition-table-text]\n"
LOST = {"id": 4, "image_id": 99, "category_id": 7, "bbox": [0, 0, 9, 9]}
BAD = [  # format, file, what stands in it, parts of the sentence
    ("own metadata", "metadata.jsonl", json.dumps(lines({"bbox": []})[0]) + '\n{"file_name": "objects"',
     ["metadata.jsonl: not whole", "line 2 column 24"]),
    ("own metadata", "metadata.jsonl", lines({"bbox": [[1, 2, 3, 4]]}), ["objects has ['bbox']", "category_name"]),
    ("own metadata", "metadata.jsonl", lines({"bbox": [[50, 40, 79, 59]], "categories": [0]}),
     ["[50, 40, 79, 59]", "box_format", "xyxy-pixels"]),
    ("own metadata", "metadata.jsonl", lines({"bbox": [[0.5, 0.5, 0.2, 0.1]], "categories": [0]}),
     ["[0.5, 0.5, 0.2, 0.1]", "may be [x, y, width, height] in 0-1"]),
    ("own metadata", "metadata.jsonl", [lines({"bbox": [], "category_name": []})[0] | {"file_name": "a\0.jpg"}],
     ["metadata.jsonl: the picture path 'a\\x00.jpg' cannot be read"]),
    ("own metadata", "metadata.jsonl", "\n", ["metadata.jsonl (a list)", "no known format"]),
    ("own metadata", "annotations.json", coco(annotations=coco()["annotations"][1:]),
     ["COCO and metadata, which differ"]),
    ("COCO", "annotations.json", {"images": []}, ["annotations.json (has ['images'])", "images, annotations"]),
    ("COCO", "annotations.json", coco(annotations=[]), ["objects.bbox is empty in all 3 pictures"]),
    ("COCO", "annotations.json", coco(annotations=[LOST]),
     ["annotations, such as 4", "an image_id that no picture has"]),
    ("COCO", "annotations.json", coco(images=[{"id": None, "file_name": "a.jpg"}]),
     ["entry 1 cannot be read (TypeError: id is None)"]),
    ("COCO", "annotations.json", coco(images=[{"id": 0}]), ["entry 1 cannot be read (KeyError: 'file_name')"]),
    ("YOLO", "labels/a.txt", "0 .5 .5 .2 .2\n0 .5 .5\n", ["a.txt: line 2", "'0 .5 .5'", "class cx cy"]),
    ("YOLO", "data.yaml", "names: [a\n", ["data.yaml cannot be read", "expected names: [...]"]),
    ("YOLO", "data.yaml", "names: 3\n", ["data.yaml cannot be read", "a list of class names"]),
    ("YOLO", "data.yaml", NAMED + "train: train.txt\n", ["data.yaml: train", "'train.txt' is not there"]),
    ("Pascal VOC", "Annotations/b.xml", "<annotation><filename>b.jpg</filename>", ["b.xml: not whole"]),
    ("CVAT", "annotations.xml", "<annotations><track/></annotations>", ["entry 1", "it has tracks of a video"]),
    ("Qwen2.5-VL", "all.json", [{"image": "a.jpg", "suffix": ""}, {"suffix": ""}],
     ["all.json: entry 2", "it names no picture"]),
    ("CSV", "labels.csv", "filename,class,xmin,ymin,xmax,ymax\n", ["labels.csv (has ['filename'"]),
    ("COCO", "a.parquet", b"PAR1", ["a.parquet: not whole"]),
]


@pytest.mark.parametrize(("name", "file", "content", "parts"), BAD)
def test_a_file_that_cannot_be_used_is_named_with_the_place_and_what_was_expected(name, file, content, parts, tmp_path):
    export(tmp_path, name)
    write(tmp_path / file, content)
    refused(tmp_path, *parts, unlabelled="negative")


def test_what_is_no_data_set_is_refused_with_the_choices(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no known format", "COCO", "YOLO", "metadata.jsonl")
    refused("embeded", "'embeded'", "no file or folder", "expected embedded")
    refused(write(tmp_path / "set.zip", b"PK"), "set.zip cannot be read", "a whole archive")
    export(tmp_path / "cut", "Parquet")
    file = tmp_path / "cut/data/val-00001-of-00002.parquet"
    tiny.table_rows().remove_columns(["width", "objects"]).to_parquet(str(file))
    refused(tmp_path / "cut", file.name, "lacks ['objects']", "expected ['image_id', 'image'")


@pytest.mark.parametrize("file_name", ["../outside.jpg", "/etc/hostname", "link/outside.jpg"])
def test_a_path_that_leaves_the_folder_is_refused(file_name, tmp_path):
    tiny.save_picture(tmp_path / "elsewhere/outside.jpg", 1)
    tiny.save_picture(tmp_path / "outside.jpg", 1)
    for name, file in (("COCO", "annotations.json"), ("own metadata", "metadata.jsonl")):
        root = export(tmp_path / name, name)
        os.symlink(tmp_path / "elsewhere", root / "link")
        write(root / file, (root / file).read_text().replace("a.jpg", file_name))
        refused(root, file, repr(file_name), "leads out of")


@pytest.mark.parametrize(("column", "refusal"), [
    (lambda file: file.name, None),
    (lambda file: file.read_bytes(), None),
    (lambda file: 7, "Unsupported cast from int64"),
    (lambda file: {"bytes": None, "path": "/etc/hostname"}, "'/etc/hostname' leads out of"),
])
def test_the_pictures_of_a_table_are_bytes_or_paths_inside_its_folder(column, refusal, tmp_path):
    notes = {name: {"bbox": [tiny.xywh(tiny.pixels(box)) for _, box in own], "category": [kind for kind, _ in own]}
             for name, own in THINGS.items() if own}  # fmt: skip
    files = [tiny.save_picture(tmp_path / f"{name}.jpg", number) for number, name in enumerate(notes)]
    table = pd.DataFrame({"image": list(map(column, files)), "objects": notes.values()})
    table.to_parquet(tmp_path / "val.parquet")
    if refusal:
        return refused(tmp_path, refusal)
    rows = tiny.load(tmp_path)["val"]
    for row, name, file in zip(rows, notes, files, strict=True):
        assert row["image"].tobytes() == datasets.Image().decode_example({"path": str(file), "bytes": None}).tobytes()
        np.testing.assert_allclose(tiny.yxyx(row["objects"]["bbox"]), [box for _, box in THINGS[name]], atol=0.01)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_offline_is_an_error_and_never_another_data_set():
    refused(data.HUB_ID, data.HUB_ID, data.HUB_REVISION, "HF_HUB_OFFLINE", "Parquet")


def test_the_hubs_splits_are_used_as_they_are_and_a_cache_of_another_revision_is_refused(monkeypatch, tmp_path):
    tiny.table_rows().save_to_disk(str(tmp_path / ("0" * 40)))  # where `datasets` keeps what it loaded from that commit
    cached, calls = datasets.load_from_disk(str(tmp_path / ("0" * 40))), []

    def served(name, revision, cache_dir):
        calls.append((name, revision))
        return datasets.DatasetDict(train=tiny.table_rows(), val=tiny.table_rows().select([0]) if given else cached)

    monkeypatch.setattr(datasets, "load_dataset", served)
    given = True
    ds = data.load_raw(data.HUB_ID)
    assert calls == [(data.HUB_ID, data.HUB_REVISION)] and re.fullmatch("[0-9a-f]{40}", data.HUB_REVISION)
    assert {name: len(split) for name, split in ds.items()} == {"train": 2, "selection": 1, "val": 1}
    assert ds["train"].features == FEATURES
    given = False
    refused(data.HUB_ID, "the cache has", "0" * 40, f"expected {data.HUB_REVISION}")
    assert len(data.load_raw(data.HUB_ID, revision="0" * 40)["val"]) == 3


def test_the_name_of_a_picture_that_is_not_utf_8_is_kept_escaped(tmp_path):
    root = export(tmp_path, "YOLO")
    for file in (root / "images/a.jpg", root / "labels/a.txt"):
        os.rename(file, os.fsencode(file).replace(b"/a.", b"/\xe9."))
    rows = tiny.load_clean(root)
    assert "\\udce9" in rows["image_id"][-1] + rows["image_id"][0] and len(rows) == 3
    assert tiny.jpeg(0) in [image["bytes"] for image in tiny.undecoded(rows)]
