"""Each format of annotations, made here of tiny pictures, becomes the same rows; each bad input has its sentence."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import data
from helpers.data.schema import FEATURES

TABLE = "nutrition-table"
WIDTH, HEIGHT = 80, 60
IDS = {TABLE: 0, "nutrition-table-text": 3}
BOXES = {  # picture -> (category, [y0, x0, y1, x1] in 0-1)
    "a": [(TABLE, [0.25, 0.1, 0.75, 0.5])],
    "b": [(TABLE, [0.5, 0.25, 1.0, 0.75]), ("nutrition-table-text", [0.0, 0.0, 0.25, 1.0])],
    "c": [],
}


def save_picture(path: Path, number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    patches = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def load(root: Path | str, **options) -> datasets.DatasetDict:
    """All as val; what is listed without a box, such as c in COCO, has no table here."""
    return data.load_raw(str(root), **{"unlabelled": "negative", "val_share": 1} | options)


def load_splits(root: Path | str) -> datasets.DatasetDict:
    return data.clean(raw := load(root), data.audit(raw))


def pixels(box: list[float]) -> tuple[float, float, float, float]:
    """[y0, x0, y1, x1] in 0-1 as x0, y0, x1, y1 in pixels."""
    return box[1] * WIDTH, box[0] * HEIGHT, box[3] * WIDTH, box[2] * HEIGHT


def xywh(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = pixels(box)
    return [x0, y0, x1 - x0, y1 - y0]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- the formats: each writes the pictures a, b, c of BOXES into a folder ---------------------------------------------


def write_pictures(folder: Path) -> None:
    for number, name in enumerate(BOXES):
        save_picture(folder / f"{name}.jpg", number)


def write_metadata(root: Path, objects: Callable[[list], dict], **more: dict) -> None:
    write_pictures(root)
    lines = [{"file_name": f"{name}.jpg", "objects": objects(things), **more} for name, things in BOXES.items()]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, lines)))


def write_own_metadata(root: Path) -> None:
    write_metadata(root, lambda things: {"bbox": [box for _, box in things],
                                         "category_name": [kind for kind, _ in things]}, meta={})


def write_hf_metadata(root: Path) -> None:
    write_metadata(root, lambda things: {"bbox": [xywh(box) for _, box in things],
                                         "categories": [IDS[kind] for kind, _ in things]})


def coco(**other) -> dict:
    notes = [
        {"id": 10 * n + k, "image_id": n, "category_id": {TABLE: 7, "nutrition-table-text": 9}[kind], "bbox": xywh(box)}
        for n, things in enumerate(BOXES.values())
        for k, (kind, box) in enumerate(things)
    ]
    images = [{"id": n, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} for n, name in enumerate(BOXES)]
    categories = [{"id": 7, "name": "Nutrition Table"}, {"id": 9, "name": "nutrition-table-text"}]
    return {"images": images, "annotations": notes, "categories": categories} | other


def write_coco(root: Path) -> None:
    write_pictures(root / "images")
    write(root / "annotations.json", json.dumps(coco()))


def write_yolo(root: Path) -> None:
    write_pictures(root / "images")
    write(root / "data.yaml", "names:\n  0: nutrition-table\n  1: nutrition-table-text\n")
    for name, things in BOXES.items():
        lines = [f"{int(kind != TABLE)} {(x0 + x1) / 2} {(y0 + y1) / 2} {x1 - x0} {y1 - y0}"
                 for kind, (y0, x0, y1, x1) in things]
        if lines:  # no file for a picture without a box
            write(root / "labels" / f"{name}.txt", "\n".join(lines) + "\n")


def write_yolo_classes(root: Path) -> None:
    write_yolo(root)
    (root / "data.yaml").unlink()
    write(root / "labels" / "classes.txt", "nutrition-table\nnutrition-table-text\n")


def write_voc(root: Path) -> None:
    write_pictures(root / "JPEGImages")
    for name, things in BOXES.items():
        objects = "".join(
            "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
            "</object>".format(kind, *pixels(box))
            for kind, box in things
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        write(root / "Annotations" / f"{name}.xml", text)


def write_json(root: Path, name: str, entry: Callable[[str, list], dict], whole: Callable = list) -> None:
    """The pictures, and a JSON of one entry each; JSON lines by its ending."""
    write_pictures(root / "images")
    entries = [entry(f"{picture}.jpg", things) for picture, things in BOXES.items()]
    lines = name.endswith("l")
    write(root / name, "\n".join(map(json.dumps, entries)) if lines else json.dumps(whole(entries)))


def write_createml(root: Path) -> None:
    def entry(picture: str, things: list) -> dict:
        notes = [(kind, xywh(box)) for kind, box in things]
        return {"image": picture, "annotations": [{"label": kind, "coordinates": {
            "x": x + w / 2, "y": y + h / 2, "width": w, "height": h}} for kind, (x, y, w, h) in notes]}

    write_json(root, "createml.json", entry)


def write_via(root: Path) -> None:
    def entry(picture: str, things: list) -> dict:
        regions = [{"shape_attributes": dict(zip(["x", "y", "width", "height"], xywh(box), strict=True)),
                    "region_attributes": {"label": kind}} for kind, box in things]
        return {"filename": picture, "regions": regions}

    write_json(root, "via.json", entry, lambda entries: {one["filename"] + "9": one for one in entries})


def write_labelstudio(root: Path) -> None:
    def entry(picture: str, things: list) -> dict:
        result = [{"original_width": WIDTH, "original_height": HEIGHT, "value": {
            "x": 100 * x0, "y": 100 * y0, "width": 100 * (x1 - x0), "height": 100 * (y1 - y0), "rotation": 0,
            "rectanglelabels": [kind]}} for kind, (y0, x0, y1, x1) in things]
        return {"data": {"image": f"/data/upload/1/{picture}"}, "annotations": [{"result": result}]}

    write_json(root, "project.json", entry)


def write_labelme(root: Path) -> None:
    write_pictures(root)
    for name, things in BOXES.items():
        shapes = [{"label": kind, "points": [[x1, y0], [x0, y1]]} for kind, (x0, y0, x1, y1) in
                  ((kind, pixels(box)) for kind, box in things)]
        write(root / f"{name}.json", json.dumps({"shapes": shapes, "imagePath": f"..\\old\\{name}.jpg"}))


def write_cvat(root: Path) -> None:
    write_pictures(root / "images")
    images = ""
    for name, things in BOXES.items():
        boxes = "".join('<box label="{}" xtl="{}" ytl="{}" xbr="{}" ybr="{}"/>'.format(kind, *pixels(box))
                        for kind, box in things)
        images += f'<image name="{name}.jpg" width="{WIDTH}" height="{HEIGHT}">{boxes}</image>'
    write(root / "annotations.xml", f"<annotations>{images}</annotations>")


def write_csv(root: Path) -> None:
    write_pictures(root / "images")
    lines = [f"{name}.jpg,{WIDTH},{HEIGHT},{kind}," + ",".join(map(str, pixels(box)))
             for name, things in BOXES.items() for kind, box in things]
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax", *lines, "c.jpg,80,60,,,,,"]
    write(root / "labels.csv", "\n".join(lines))


def thousandths(box: list[float]) -> list[int]:
    return [round(1000 * box[i]) for i in (1, 0, 3, 2)]


def said(things: list, box: str, none: str) -> str:
    return "".join(box.format(kind, *thousandths(found)) for kind, found in things) or none


def write_qwen(root: Path) -> None:
    form = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
    write_json(root, "all.jsonl", lambda picture, things: {"images": [f"images/{picture}"], "messages": [
        {"role": "user", "content": "<image>Find the tables."},
        {"role": "assistant", "content": said(things, form, "no nutrition table")}]})


def write_qwen25(root: Path) -> None:
    write_json(root, "all.json", lambda picture, things: {"image": picture, "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "```json\n" + json.dumps(
            [{"bbox_2d": pixels(box), "label": kind} for kind, box in things]) + "\n```"}]})


def write_swift(root: Path) -> None:
    write_json(root, "all.jsonl", lambda picture, things: {
        "messages": [{"role": "assistant", "content": "<ref-object><bbox>"}], "images": [f"/mnt/other/{picture}"],
        "objects": {"ref": [kind for kind, _ in things], "bbox": [pixels(box) for _, box in things],
                    "bbox_type": "real"}})


def write_florence(root: Path) -> None:
    write_json(root, "annotations.jsonl", lambda picture, things: {"image": picture, "prefix": "<OD>", "suffix": said(
        things, "{}<loc_{}><loc_{}><loc_{}><loc_{}>", "[]")})


def write_list_of_dicts(root: Path) -> None:
    write_metadata(root, lambda things: [{"bbox": list(map(str, xywh(box))), "category": kind} for kind, box in things])


def write_metadata_csv(root: Path) -> None:
    write_hf_metadata(root)
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "metadata.jsonl").unlink()
    cells = [(one["file_name"], str(one["objects"])) for one in lines]  # as Python writes a dict
    write(root / "metadata.csv", "file_name,objects\n" + "".join(f'{name},"{cell}"\n' for name, cell in cells))


def write_yolo_shapes(root: Path) -> None:
    """a: a polygon and a confidence; b: an oriented box as Roboflow writes it; c: one blank line."""
    write_yolo(root)
    write(root / "labels/a.txt", "0.0 0.1 0.25 0.3 0.25 0.5 0.6 0.2 0.75\n\n")
    x0, y0, x1, y1 = 0.25, 0.5, 0.75, 1.0
    write(root / "labels/b.txt", f"0 {x0} {y0} {x1} {y0} {x1} {y1} {x0} {y1}\n1 0.5 0.125 1.0 0.25 0.93\n")
    write(root / "labels/c.txt", "\n")


def write_dota(root: Path) -> None:
    write_pictures(root / "images")
    for name, things in BOXES.items():
        corners = [(kind, pixels(box)) for kind, box in things]
        write(root / "labelTxt" / f"{name}.txt", "imagesource:GoogleEarth\n" + "".join(
            f"{x0} {y0} {x1} {y0} {x1} {y1} {x0} {y1} {kind} 0\n" for kind, (x0, y0, x1, y1) in corners))


def write_zip(root: Path) -> None:
    write_yolo(root / "export/nutrition.v1i")
    shutil.make_archive(str(root / "nutrition"), "zip", root / "export")
    shutil.rmtree(root / "export")


def write_hub_columns(root: Path) -> None:
    """Pictures and COCO's boxes, the class a ClassLabel, as cppe-5 has them."""
    label = datasets.ClassLabel(names=["nutrition-table-text", TABLE])
    features = datasets.Features({"image_id": datasets.Value("string"), "image": datasets.Image(), "objects": {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}})
    rows = [{"image_id": row["image_id"], "image": row["image"], "objects": {
        "bbox": [xywh(box) for box in row["objects"]["bbox"]], "category": row["objects"]["category_name"]}}
            for row in table_rows().cast_column("image", datasets.Image(decode=False))]
    root.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(root / "val.parquet"))


def table_rows() -> datasets.Dataset:
    """The pictures a, b, c as a data set with their bytes, float32 boxes as on the Hub and a column too many."""
    write_own_metadata(Path("source"))
    rows = []
    for name, things in BOXES.items():
        kinds = [kind for kind, _ in things]
        named = {"category_id": [IDS[kind] for kind in kinds], "category_name": kinds}
        rows.append({"image_id": name, "image": {"bytes": Path("source", f"{name}.jpg").read_bytes(), "path": None},
                     "width": WIDTH, "height": HEIGHT, "meta": {"barcode": "", "off_image_id": "", "image_url": ""},
                     "objects": {"bbox": [box for _, box in things]} | named, "note": "a column too many"})
    objects = {**FEATURES["objects"], "bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    features = datasets.Features({**FEATURES, "objects": objects, "note": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def write_saved(root: Path) -> None:
    table_rows().save_to_disk(str(root))


def write_parquet(root: Path) -> None:
    """Two shards, as on the Hub."""
    (root / "data").mkdir(parents=True)
    for number, rows in enumerate(([0], [1, 2])):
        table_rows().select(rows).to_parquet(str(root / "data" / f"val-0000{number}-of-00002.parquet"))


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "own metadata.jsonl": (write_own_metadata, "metadata"),
    "COCO boxes in metadata.jsonl": (write_hf_metadata, "metadata"),
    "COCO": (write_coco, "COCO"),
    "YOLO": (write_yolo, "YOLO"),
    "YOLO classes.txt": (write_yolo_classes, "YOLO"),
    "Pascal VOC": (write_voc, "Pascal VOC"),
    "save_to_disk": (write_saved, "save_to_disk"),
    "Parquet": (write_parquet, "Parquet"),
    "cppe-5": (write_hub_columns, "Parquet"),
    "objects as a list of dicts": (write_list_of_dicts, "metadata"),
    "metadata.csv": (write_metadata_csv, "metadata"),
    "YOLO polygons": (write_yolo_shapes, "YOLO"),
    "DOTA": (write_dota, "YOLO"),
    "a zip": (write_zip, "YOLO"),
    "CVAT": (write_cvat, "CVAT"),
    "Label Studio": (write_labelstudio, "Label Studio"),
    "labelme": (write_labelme, "labelme"),
    "VIA": (write_via, "VIA"),
    "CreateML": (write_createml, "CreateML"),
    "CSV": (write_csv, "CSV"),
    "Qwen2-VL": (write_qwen, "chat"),
    "Qwen2.5-VL": (write_qwen25, "chat"),
    "ms-swift": (write_swift, "chat"),
    "Florence-2": (write_florence, "chat"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path, capsys):
    make, said = FORMATS[name]
    make(tmp_path / "set")
    ds = load_splits(tmp_path / "set")
    assert f"is read as {said} (" in capsys.readouterr().out
    assert {split: len(rows) for split, rows in ds.items()} == {"train": 0, "selection": 0, "val": 3}
    assert ds["val"].features == FEATURES == ds["train"].features
    for row, (image_id, things) in zip(ds["val"], BOXES.items(), strict=True):
        assert (row["image_id"], row["width"], row["height"]) == (image_id, WIDTH, HEIGHT)
        assert row["image"].size == (WIDTH, HEIGHT)
        assert row["objects"]["category_name"] == [kind for kind, _ in things]
        assert row["objects"]["category_id"] == [IDS[kind] for kind, _ in things]
        assert np.allclose(row["objects"]["bbox"] or np.zeros((0, 4)), [box for _, box in things] or np.zeros((0, 4)))


def test_a_parquet_or_coco_file_may_be_named_itself(tmp_path: Path):
    write_parquet(tmp_path / "parquet")
    assert len(load(tmp_path / "parquet/data/val-00001-of-00002.parquet")["val"]) == 2
    write_coco(tmp_path / "coco")
    assert len(load(tmp_path / "coco/annotations.json")["val"]) == 3
    write(tmp_path / "coco/annotations/all.json", json.dumps(coco()))
    assert len(load(tmp_path / "coco/annotations/all.json")["val"]) == 3


def undecoded(split: datasets.Dataset) -> list[dict]:
    return list(split.cast_column("image", datasets.Image(decode=False))["image"])


# --- one bad picture, caches ------------------------------------------------------------------------------------------


def test_missing_and_corrupt_pictures_are_listed_and_the_rest_is_used(tmp_path: Path, capsys):
    write_coco(tmp_path)
    (tmp_path / "images/a.jpg").unlink()
    (tmp_path / "images/b.jpg").write_bytes((tmp_path / "images/b.jpg").read_bytes()[:300])
    raw = load(tmp_path)
    table = data.audit(raw).table().set_index("fault")
    assert table.loc["unreadable-picture", "ids"] == ["a", "b"]
    assert data.clean(raw, data.audit(raw))["val"]["image_id"] == ["c"]


def test_a_missing_picture_is_never_replaced_by_one_of_another_split(tmp_path: Path):
    write_pictures(tmp_path / "train2017")
    write_pictures(tmp_path / "val2017")
    (tmp_path / "train2017/a.jpg").unlink()
    for split in ("train", "val"):
        write(tmp_path / f"annotations/instances_{split}2017.json", json.dumps(coco()))
    raw = load(tmp_path)
    assert data.audit(raw).table().set_index("fault").loc["unreadable-picture", "ids"] == ["a"]
    folders = {Path(image["path"]).parent.name for name in ("train", "selection") for image in undecoded(raw[name])}
    assert "val2017" not in folders


def test_two_files_of_one_name_are_not_guessed_between(tmp_path: Path):
    write_coco(tmp_path)
    write_pictures(tmp_path / "copy")
    refused(tmp_path, "annotations.json", "'a.jpg' is", "expected one file of that name")


def test_files_written_on_windows_are_read(tmp_path: Path):
    """A byte order mark, backslashes, CR LF."""
    write_coco(tmp_path / "coco")
    found = coco()
    for picture in found["images"]:
        picture["file_name"] = f"images\\{picture['file_name']}"
    (tmp_path / "coco/annotations.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(found).encode())
    write_own_metadata(tmp_path / "own")
    file = tmp_path / "own/metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    write_yolo_classes(tmp_path / "yolo")
    for file in (tmp_path / "yolo/labels").iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    for name in ("coco", "own", "yolo"):
        ds = load_splits(tmp_path / name)
        assert ds["val"]["image_id"] == ["a", "b", "c"], name
        assert [row["category_name"] for row in ds["val"]["objects"]] == [[k for k, _ in t] for t in BOXES.values()]


# --- bad input: each has its sentence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["COCO", "YOLO classes.txt", "Pascal VOC", "Parquet"])
def test_hidden_files_and_leftovers_of_programs_are_never_data(name: str, tmp_path: Path):
    """As macOS puts them into a zip, as Jupyter and a labelling tool leave them: copies, and files of another kind."""
    root = tmp_path / "set"
    FORMATS[name][0](root)
    before = load(root)
    files = [file for file in root.rglob("*") if file.is_file()]
    for folder in (".ipynb_checkpoints", "__MACOSX", ".cache/huggingface", "@eaDir"):
        for file in files:
            copy = root / folder / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for file in files:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7 of macOS")
    after = load(root)
    assert {split: rows["image_id"] for split, rows in after.items()} == {
        split: rows["image_id"] for split, rows in before.items()}


def refused(dataset_id: Path | str, *words: str) -> None:
    """Loading ends in a `DataError` of one line that has all these words."""
    with pytest.raises(data.DataError) as error:
        load(dataset_id, val_share=0.1)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def lines(*objects) -> str:
    """A metadata.jsonl that says of a.jpg each of these."""
    return "\n".join(json.dumps({"file_name": "a.jpg", "objects": one}) for one in objects)


EMPTY = {"bbox": [], "categories": []}
BAD = [  # format, file, what stands in it, words of the sentence
    (write_own_metadata, "metadata.jsonl", lines(EMPTY) + '\n{"file', ["metadata.jsonl line 2", "not valid JSON"]),
    (write_own_metadata, "metadata.jsonl", lines([[1, 2, 3, 4]]), ["line 1", "objects is [[1, 2, 3, 4]]", "a dict"]),
    (write_own_metadata, "metadata.jsonl", lines({"bbox": [[1, 2, 3, 4]]}), ["objects has ['bbox']", "category_name"]),
    (write_own_metadata, "metadata.jsonl", lines({"bbox": [[50, 40, 79, 59]], "categories": [0]}),
     ["[50, 40, 79, 59]", "box_format", "xyxy-pixels"]),
    (write_own_metadata, "metadata.jsonl", lines({"bbox": [[0.5, 0.5, 0.2, 0.1]], "categories": [0]}),
     ["[0.5, 0.5, 0.2, 0.1]", "may be [x, y, width, height] in 0-1"]),
    (write_own_metadata, "metadata.jsonl", "\n", ["metadata.jsonl (a list)", "no known format"]),
    (write_own_metadata, "annotations.json", json.dumps(coco(annotations=coco()["annotations"][1:])),
     ["COCO and metadata, which differ"]),
    (write_coco, "annotations.json", '{"images": []}', ["annotations.json (has ['images'])", "images, annotations"]),
    (write_coco, "annotations.json", json.dumps(coco(annotations=[])), ["objects.bbox is empty in all 3 pictures"]),
    (write_coco, "annotations.json", json.dumps(coco(annotations=["x"])), ["annotations[0] is 'x'", "an object"]),
    (write_coco, "annotations.json", json.dumps(coco(annotations=[
        {"id": 4, "image_id": 99, "category_id": 7, "bbox": [0, 0, 9, 9]}])),
     ["annotations, such as 4", "an image_id that no picture has"]),
    (write_coco, "annotations.json", json.dumps(coco(categories=[{"id": [1], "name": TABLE}])),
     ["id of categories[0] is '[1]'", "expected a number"]),
    (write_yolo, "labels/a.txt", "0 .5 .5 .2 .2\n0 .5 .5\n", ["a.txt: line 2", "'0 .5 .5'", "class cx cy"]),
    (write_yolo, "data.yaml", "names: [a\n", ["data.yaml", "not valid YAML"]),
    (write_yolo, "data.yaml", "names: [nutrition-table, nutrition-table-text]\ntrain: 3\n",
     ["train is '3'", "expected a folder"]),
    (write_voc, "Annotations/b.xml", "<annotation><filename>b.jpg</filename>", ["b.xml", "not valid XML"]),
]


@pytest.mark.parametrize(("make", "file", "text", "words"), BAD)
def test_a_file_that_cannot_be_used_is_named_with_the_place_and_what_was_expected(make, file, text, words, tmp_path):
    make(tmp_path)
    write(tmp_path / file, text)
    refused(tmp_path, *words)


def test_what_is_no_data_set_is_refused_with_the_choices(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no known format", "COCO", "YOLO", "metadata.jsonl")
    refused("embeded", "'embeded'", "no file or folder", "expected embedded")
    write_parquet(tmp_path / "cut")
    file = tmp_path / "cut/data/val-00001-of-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut", file.name, "not a whole Parquet file")
    table_rows().remove_columns(["width", "objects"]).to_parquet(str(file))
    refused(tmp_path / "cut", file.name, "lacks ['objects']", "expected ['image_id', 'image'")


@pytest.mark.parametrize("file_name", ["../outside.jpg", "/etc/hostname", "link/outside.jpg"])
def test_a_path_that_leaves_the_folder_is_refused(file_name: str, tmp_path: Path):
    root = tmp_path / "set"
    write_coco(root)
    save_picture(tmp_path / "elsewhere/outside.jpg", 1)
    save_picture(tmp_path / "outside.jpg", 1)
    os.symlink(tmp_path / "elsewhere", root / "link")
    found = coco()
    found["images"][0]["file_name"] = file_name
    write(root / "annotations.json", json.dumps(found))
    refused(root, "annotations.json", repr(file_name), "leads out of")
    write(root / "metadata.jsonl", json.dumps({"file_name": file_name, "objects": {"bbox": [], "category_name": []}}))
    (root / "annotations.json").unlink()
    refused(root, "metadata.jsonl", repr(file_name), "leads out of")


@pytest.mark.parametrize(("column", "refusal"), [
    (lambda file: file.name, None),
    (lambda file: file.read_bytes(), None),
    (lambda file: 7, "the columns {'image': Value('int64')} cannot be read"),
    (lambda file: {"bytes": None, "path": "/etc/hostname"}, "'/etc/hostname' leads out of"),
])
def test_the_pictures_of_a_table_are_bytes_or_paths_inside_its_folder(column, refusal, tmp_path: Path):
    write_pictures(tmp_path / "set")
    notes = {name: {"bbox": [xywh(box) for _, box in BOXES[name]], "category": [kind for kind, _ in BOXES[name]]}
             for name in "ab"}  # fmt: skip
    table = pd.DataFrame({"image": [column(tmp_path / f"set/{name}.jpg") for name in notes], "objects": notes.values()})
    table.to_parquet(tmp_path / "set/val.parquet")
    if refusal:
        refused(tmp_path / "set", refusal)
    else:
        found = load(tmp_path / "set")["val"]["objects"]
        for name, objects in zip(notes, found, strict=True):
            np.testing.assert_allclose(objects["bbox"], [box for _, box in BOXES[name]], atol=0.01)


def test_the_hub_offline_is_an_error_and_never_another_data_set():
    refused(data.HUB_ID, data.HUB_ID, data.HUB_REVISION, "HF_HUB_OFFLINE", "Parquet")


def test_the_hubs_splits_are_used_as_they_are(monkeypatch):
    asked = []

    def served(name, revision, cache_dir):
        asked.append((name, revision))
        rows = table_rows()
        return datasets.DatasetDict(train=rows, val=rows.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", served)
    ds = data.load_raw(data.HUB_ID)
    assert asked == [(data.HUB_ID, data.HUB_REVISION)] and re.fullmatch("[0-9a-f]{40}", data.HUB_REVISION)
    assert {name: len(split) for name, split in ds.items()} == {"train": 2, "selection": 1, "val": 1}
    assert ds["train"].features == FEATURES


def test_a_cache_of_another_revision_is_refused(monkeypatch, tmp_path: Path):
    table_rows().save_to_disk(str(tmp_path / ("0" * 40)))  # where `datasets` keeps what it loaded from that commit
    cached = datasets.load_from_disk(str(tmp_path / ("0" * 40)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(val=cached))
    refused(data.HUB_ID, "the cache has", "0" * 40, f"expected {data.HUB_REVISION}")
    assert len(data.load_raw(data.HUB_ID, revision="0" * 40)["val"]) == 3
