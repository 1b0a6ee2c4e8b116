"""Tiny data sets as labelling tools write them: `export(folder, "COCO")` makes three pictures and their boxes."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from helpers import data
from helpers.data.schema import FEATURES

TABLE, TEXT = "nutrition-table", "nutrition-table-text"
IDS = {TABLE: 0, TEXT: 3}
WIDTH, HEIGHT = 90, 120
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0-1 of the picture as shown
Things = dict[str, list[tuple[str, Box]]]  # picture -> [(class, box)]
THINGS: Things = {"a": [(TABLE, (.1, .25, .5, .75))], "b": [(TABLE, (.25, .5, .75, 1)), (TEXT, (0, 0, 1, .25))],
                  "c": []}
BOXES = [(.27, .31, .74, .72), (.1, .3, .55, .78), (.36, .37, .75, .61), (.16, .24, .75, .82), (.11, .23, .79, .79),
         (.08, .07, .85, .97), (.0, .03, .96, .85), (.04, .02, .88, .92), (.12, .05, .94, .96), (.5, .6, .9, .7)]
TEN: Things = {str(number): [(TABLE, box)] for number, box in enumerate(BOXES)}  # enough to find out what they mean


def jpeg(number: int, size=(WIDTH, HEIGHT), orientation: int | None = None, quality: int = 90) -> bytes:
    """A picture of its own for each `number`: a few large patches of random colour; `size` as stored."""
    patches = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


def write(path: Path, content: Any) -> Path:
    """A file with these bytes, this text, or what JSON writes: a line each where its name ends in l."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = "\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_picture(path: Path, number: int, size=(WIDTH, HEIGHT)) -> Path:
    return write(path, jpeg(number, size))


def undecoded(split: datasets.Dataset) -> list[dict]:
    return list(split.cast_column("image", datasets.Image(decode=False))["image"])


def yxyx(boxes: Any) -> np.ndarray:
    """Boxes with x first as the schema has them, or the other way round: [N, 4]."""
    return np.array(boxes, float).reshape(-1, 4)[:, [1, 0, 3, 2]]


# --- how a box is written ---------------------------------------------------------------------------------------------


def pixels(box: Box, width: float = WIDTH, height: float = HEIGHT) -> list[float]:
    return [box[0] * width, box[1] * height, box[2] * width, box[3] * height]


def xywh(box) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def centred(box) -> list[float]:
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]


def keyed(box) -> dict[str, float]:
    return dict(zip(("x", "y", "width", "height"), box, strict=True))


def corners(box) -> list[float]:
    """All four, one after the other."""
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def words(*values) -> str:
    return " ".join(map(str, values))


# --- the formats: what stands in their file, or (of a picture's name and things) in a file for each picture -----------


def coco(things: Things = THINGS, **other: Any) -> dict[str, Any]:
    notes = [{"id": 10 * n + k, "image_id": n, "category_id": 7 + 2 * (kind == TEXT), "bbox": xywh(pixels(box))}
             for n, own in enumerate(things.values()) for k, (kind, box) in enumerate(own)]  # fmt: skip
    images = [{"id": n, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} for n, name in enumerate(things)]
    return {"images": images, "annotations": notes,
            "categories": [{"id": 7, "name": "Nutrition Table"}, {"id": 9, "name": TEXT}]} | other  # fmt: skip


def each(entry: Callable[[str, list], Any]) -> Callable[[Things], list]:
    """Of an entry for a picture's file and its things: a list of all."""
    return lambda things: [entry(f"{name}.jpg", own) for name, own in things.items()]


def metadata(objects: Callable[[list], Any], **more: Any) -> Callable[[Things], list]:
    return each(lambda picture, own: {"file_name": picture, "objects": objects(own), **more})


own_metadata = metadata(lambda own: {"bbox": yxyx([box for _, box in own]).tolist(),
                                     "category_name": [kind for kind, _ in own]}, meta={})  # fmt: skip
hf_metadata = metadata(lambda own: {"bbox": [xywh(pixels(box)) for _, box in own],
                                    "categories": [IDS[kind] for kind, _ in own]})  # fmt: skip
dicts = metadata(lambda own: [{"bbox": [*map(str, xywh(pixels(box)))], "category": kind} for kind, box in own])


def metadata_csv(things: Things) -> str:
    lines = [f'{one["file_name"]},"{one["objects"]}"' for one in hf_metadata(things)]  # as Python writes a dict
    return "\n".join(["file_name,objects", *lines])


def yolo(name: str, own: list) -> str | None:
    """No file for a picture without a box."""
    return "\n".join(words(int(kind != TABLE), *centred(box)) for kind, box in own) or None


def yolo_shapes(name: str, own: list) -> str:
    """a: a polygon and a blank line; b: an oriented box as Roboflow writes it, a confidence; c: one blank line."""
    return {"a": "0.0 0.1 0.25 0.3 0.25 0.5 0.6 0.2 0.75\n\n", "c": "\n",
            "b": "0 0.25 0.5 0.75 0.5 0.75 1.0 0.25 1.0\n1 0.5 0.125 1.0 0.25 0.93\n"}[name]  # fmt: skip


def dota(name: str, own: list) -> str:
    return "\n".join(["imagesource:GoogleEarth", *(words(*corners(pixels(box)), kind, 0) for kind, box in own)])


def voc(name: str, own: list) -> str:
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}" + "".join(
        f"<object><name>{kind}</name>{box.format(*pixels(one))}</object>" for kind, one in own) + "</annotation>"


def cvat(things: Things) -> str:
    box = '<box label="{}" xtl="{}" ytl="{}" xbr="{}" ybr="{}"/>'
    return "<annotations>" + "".join(
        f'<image name="{name}.jpg" width="{WIDTH}" height="{HEIGHT}">'
        + "".join(box.format(kind, *pixels(one)) for kind, one in own) + "</image>"
        for name, own in things.items()) + "</annotations>"  # fmt: skip


def csv(things: Things) -> str:
    lines = [",".join(map(str, (f"{name}.jpg", WIDTH, HEIGHT, kind, *pixels(box)))) for name, own in things.items()
             for kind, box in own or [("", [""] * 4)]]  # fmt: skip
    return "\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *lines])


def labelme(name: str, own: list) -> dict:
    boxes = [(kind, *pixels(box)) for kind, box in own]
    return {"shapes": [{"label": kind, "points": [[x1, y0], [x0, y1]]} for kind, x0, y0, x1, y1 in boxes],
            "imagePath": f"..\\old\\{name}.jpg"}  # fmt: skip


labelstudio = each(lambda picture, own: {"data": {"image": f"/data/upload/1/{picture}"}, "annotations": [{"result": [
    {"original_width": WIDTH, "original_height": HEIGHT, "value": {
        **keyed(xywh(pixels(box, 100, 100))), "rotation": 0, "rectanglelabels": [kind]}}
    for kind, box in own]}]})  # fmt: skip
createml = each(lambda picture, own: {"image": picture, "annotations": [
    {"label": kind, "coordinates": keyed(centred(pixels(box)))} for kind, box in own]})  # fmt: skip
via = each(lambda picture, own: {"filename": picture, "regions": [
    {"shape_attributes": keyed(xywh(pixels(box))), "region_attributes": {"label": kind}} for kind, box in own]})


def spoken(own: list, box: str, none: str) -> str:
    return "".join(box.format(kind, *map(round, pixels(one, 1000, 1000))) for kind, one in own) or none


QWEN = "<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>"
qwen = each(lambda picture, own: {"images": [f"images/{picture}"], "messages": [
    {"role": "user", "content": "<image>Find the tables."},
    {"role": "assistant", "content": spoken(own, QWEN, "no nutrition table")}]})  # fmt: skip
qwen25 = each(lambda picture, own: {"image": picture, "conversations": [
    {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "```json\n" + json.dumps(
        [{"bbox_2d": pixels(box), "label": kind} for kind, box in own]) + "\n```"}]})  # fmt: skip
swift = each(lambda picture, own: {
    "messages": [{"role": "assistant", "content": "<ref-object><bbox>"}], "images": [f"/mnt/other/{picture}"],
    "objects": {"ref": [kind for kind, _ in own], "bbox": [pixels(box) for _, box in own], "bbox_type": "real"}})
florence = each(lambda picture, own: {"image": picture, "prefix": "<OD>", "suffix": spoken(
    own, "{}<loc_{}><loc_{}><loc_{}><loc_{}>", "[]")})  # fmt: skip


class Format(NamedTuple):
    read_as: str  # what the loader says
    pictures: str  # their folder
    file: str  # {} stands for the picture, where each has one
    content: Callable[..., Any]
    beside: dict[str, str] = {}  # other files


NAMES = {"data.yaml": f"names:\n  0: {TABLE}\n  1: {TEXT}\n"}
FORMATS = {
    "own metadata": Format("metadata", "", "metadata.jsonl", own_metadata),
    "COCO boxes in metadata": Format("metadata", "", "metadata.jsonl", hf_metadata),
    "objects as a list of dicts": Format("metadata", "", "metadata.jsonl", dicts),
    "metadata.csv": Format("metadata", "", "metadata.csv", metadata_csv),
    "COCO": Format("COCO", "images", "annotations.json", coco),
    "YOLO": Format("YOLO", "images", "labels/{}.txt", yolo, NAMES),
    "YOLO classes.txt": Format("YOLO", "images", "labels/{}.txt", yolo, {"classes.txt": f"{TABLE}\n{TEXT}\n"}),
    "YOLO polygons": Format("YOLO", "images", "labels/{}.txt", yolo_shapes, NAMES),
    "DOTA": Format("YOLO", "images", "labelTxt/{}.txt", dota),
    "Pascal VOC": Format("Pascal VOC", "JPEGImages", "Annotations/{}.xml", voc),
    "CVAT": Format("CVAT", "images", "annotations.xml", cvat),
    "Label Studio": Format("Label Studio", "images", "project.json", labelstudio),
    "labelme": Format("labelme", "", "{}.json", labelme),
    "VIA": Format("VIA", "images", "via.json", lambda things: {one["filename"] + "9": one for one in via(things)}),
    "CreateML": Format("CreateML", "images", "createml.json", createml),
    "CSV": Format("CSV", "images", "labels.csv", csv),
    "Qwen2-VL": Format("chat", "images", "all.jsonl", qwen),
    "Qwen2.5-VL": Format("chat", "images", "all.json", qwen25),
    "ms-swift": Format("chat", "images", "all.jsonl", swift),
    "Florence-2": Format("chat", "images", "annotations.jsonl", florence),
}


def export(root: Path, name: str, things: Things = THINGS) -> Path:
    """A folder with the pictures of `things` and their boxes in the format `name`, a key of `FORMATS` or `TABLES`."""
    if name in TABLES:
        TABLES[name][1](root)
        return root
    form = FORMATS[name]
    for number, picture in enumerate(things):
        save_picture(root / form.pictures / f"{picture}.jpg", number)
    files = {form.file.format(picture): form.content(picture, own) for picture, own in things.items()} if (
        "{}" in form.file) else {form.file: form.content(things)}  # fmt: skip
    for file, content in (files | form.beside).items():
        if content is not None:
            write(root / file, content)
    return root


# --- tables with pictures ---------------------------------------------------------------------------------------------


def table_rows() -> datasets.Dataset:
    """`THINGS` as a data set with their bytes, float32 boxes as on the Hub and a column too many."""
    rows = []
    for number, (name, own) in enumerate(THINGS.items()):
        kinds = [kind for kind, _ in own]
        rows.append({
            "image_id": name, "image": {"bytes": jpeg(number), "path": None}, "width": WIDTH, "height": HEIGHT,
            "meta": dict.fromkeys(FEATURES["meta"], ""), "note": "a column too many",
            "objects": {"bbox": yxyx([box for _, box in own]).tolist(), "category_name": kinds,
                        "category_id": [IDS[kind] for kind in kinds]}})  # fmt: skip
    objects = {**FEATURES["objects"], "bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    features = datasets.Features({**FEATURES, "objects": objects, "note": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def parquet(root: Path) -> None:
    """Two shards, as on the Hub."""
    (root / "data").mkdir(parents=True)
    for number, rows in enumerate(([0], [1, 2])):
        table_rows().select(rows).to_parquet(str(root / "data" / f"val-0000{number}-of-00002.parquet"))


def cppe5(root: Path) -> None:
    """Pictures and COCO's boxes, the class a ClassLabel, as cppe-5 has them."""
    label = datasets.ClassLabel(names=[TEXT, TABLE])
    features = datasets.Features({"image_id": datasets.Value("string"), "image": datasets.Image(), "objects": {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}})
    rows = [{"image_id": name, "image": {"bytes": jpeg(number), "path": None}, "objects": {
        "bbox": [xywh(pixels(box)) for _, box in own], "category": [kind for kind, _ in own]}}
            for number, (name, own) in enumerate(THINGS.items())]  # fmt: skip
    root.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(root / "val.parquet"))


def zipped(root: Path) -> None:
    export(root / "export/nutrition.v1i", "YOLO")
    shutil.make_archive(str(root / "nutrition"), "zip", root / "export")
    shutil.rmtree(root / "export")


TABLES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "save_to_disk": ("save_to_disk", lambda root: table_rows().save_to_disk(str(root))),
    "Parquet": ("Parquet", parquet), "cppe-5": ("Parquet", cppe5), "a zip": ("YOLO", zipped)}  # fmt: skip


# --- what becomes of it -----------------------------------------------------------------------------------------------


def load(root: Path | str, **options: Any) -> datasets.DatasetDict:
    """All as val; what is listed without a box, such as c in COCO, has no table here."""
    return data.load_raw(str(root), **{"unlabelled": "negative", "val_share": 1} | options)


def load_clean(root: Path | str, **options: Any) -> datasets.Dataset:
    raw = load(root, **options)
    return data.clean(raw, data.audit(raw))["val"]


def refused(dataset_id: Path | str, *parts: str, **options: Any) -> None:
    """Loading ends in a `DataError` of one line that has all these parts."""
    try:
        data.load_raw(str(dataset_id), **options)
    except data.DataError as error:
        assert "\n" not in str(error)
        for part in parts:
            assert part in str(error), f"{part} is not in: {error}"
    else:
        raise AssertionError(f"{dataset_id} is not refused")
