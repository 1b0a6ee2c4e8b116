"""Whose pictures are train and val, which are kept together, and what the classes of one's own become."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest
from tiny_exports import BOXES, TABLE, refused, save_picture, voc, write

from helpers import data
from helpers.data.splits import groups_of, is_barcode, product_of, split_of

ROOT = Path("/set")


@pytest.mark.parametrize(("path", "split"), [
    ("train/images", "train"), ("Training/a.jpg", "train"), ("trainset", "train"), ("train2017", "train"),
    ("images/train_images", "train"), ("TrainImages", "train"), ("valid", "val"), ("validation", "val"),
    ("eval", "val"), ("devset", "val"), ("Testing", "test"), ("annotations/instances_val2017.json", "val"),
    ("train/my_test_project.json", "train"), ("train/IMG_3_test.jpg", "train"), ("train/test-shoot/a.jpg", "train"),
    ("my-test-set/train/a.jpg", "train"), ("data/train-00000-of-00001.parquet", "train"),
    ("contrast/a.jpg", ""), ("evaluate", ""), ("étest", ""), ("", ""),
])
def test_a_folder_decides_before_a_word_in_a_longer_name(path, split):
    assert split_of(ROOT / path, ROOT) == split


@pytest.mark.parametrize(("name", "product"), [
    ("4006381333931_1", "4006381333931"), ("4006381333931", "4006381333931"), ("0041129077641_12", "0041129077641"),
    ("4006381333932_1", "4006381333932_1"),  # a wrong check digit
    ("20260325_200528", "20260325_200528"), ("20260320_200528", "20260320_200528"),  # a phone's date, by chance valid
    ("20260325200528", "20260325200528"), ("IMG_4006381333931", "IMG_4006381333931"),
    ("IMG_0_jpg.rf.ab00ab", "IMG_0_jpg"), ("IMG_0_jpg.rf.Ab01", "IMG_0_jpg"),
])
def test_a_product_is_read_from_a_valid_barcode_alone_and_a_photo_from_roboflows_copies(name, product):
    assert product_of(name) == product


def test_a_check_digit_is_that_of_a_gtin():
    assert [digit for digit in "0123456789" if is_barcode(f"400638133393{digit}")] == ["1"]
    assert is_barcode("96385074") and is_barcode("036000291452") and not is_barcode("123")


# --- by place and by list ---------------------------------------------------------------------------------------------

LABEL = "0 0.5 0.5 0.2 0.2\n"


def yolo(root: Path, folders: dict[str, Iterable[str]], yaml: str = "", names: str = f"[{TABLE}]") -> None:
    """A picture with a label for each name (or letter) of `folders` (folder below images/ -> names), and data.yaml."""
    for number, (folder, name) in enumerate((folder, name) for folder, own in folders.items() for name in own):
        save_picture(root / f"images/{folder}/{name}.jpg", number)
        write(root / f"labels/{folder}/{name}.txt", LABEL)
    write(root / "data.yaml", f"names: {names}\n{yaml}")


def lettered(raw: datasets.DatasetDict) -> tuple[str, str]:
    """The pictures of train with selection and those of val, a letter each."""
    train, selection, val = ("".join(raw[name]["image_id"]) for name in ("train", "selection", "val"))
    return "".join(sorted(train + selection)), "".join(sorted(val))


@pytest.mark.parametrize(("yaml", "lists"), [
    ("train: train.txt\nval: ./val.txt\n", ["images/{}.jpg", "./images/{}.jpg"]),
    ("train: train.txt\nval: val.txt\n", ["/content/drive/My Drive/nutri/images/{}.jpg", "images\\{}.png"]),
    ("", ["{}", "{}.jpg"]),
    ("train: [lists/a.txt]\nval: ../lists/b.txt\n", ["C:\\Users\\me\\images\\{}.JPG", "{}\n"]),
])
def test_lists_are_honoured_with_or_without_endings_and_from_whatever_machine(yaml, lists, tmp_path):
    yolo(tmp_path, {".": "abcd"}, yaml)
    names = ("lists/a.txt", "lists/b.txt") if "lists" in yaml else ("train.txt", "val.txt")
    for file, line, letters in zip(names, lists, ("abc", "d"), strict=True):
        write(tmp_path / file, "\r\n".join(line.format(letter) for letter in letters))
    assert lettered(data.load_raw(str(tmp_path))) == ("abc", "d")


def test_lists_of_voc_with_spaces_in_the_names_and_what_they_leave_out(tmp_path, capsys):
    for number, letter in enumerate("abcd"):
        save_picture(tmp_path / f"JPEGImages/photo {letter} 1.jpg", number)
        write(tmp_path / f"Annotations/photo {letter} 1.xml", voc(f"photo {letter} 1", [(TABLE, BOXES[number])]))
    write(tmp_path / "ImageSets/Main/trainval.txt", "photo a 1\nphoto b 1\nphoto c 1\n")
    write(tmp_path / "ImageSets/Main/val.txt", "photo c 1\n")
    write(tmp_path / f"ImageSets/Main/{TABLE}_train.txt", "photo d 1  1\n")
    raw = data.load_raw(str(tmp_path))
    assert raw["val"]["image_id"] == ["photo c 1"] and len(raw["train"]) == len(raw["selection"]) == 1
    assert "not used: in no list (1 pictures)" in capsys.readouterr().out
    (tmp_path / "ImageSets/Main/trainval.txt").unlink()  # of the others nothing is said
    assert len(data.load_raw(str(tmp_path))["train"]) == 2


@pytest.mark.parametrize(("folders", "yaml", "expected", "said"), [
    ({"a": "abc", "b": "d"}, "path: ../other/nutri\ntrain: images/a\nval: images/b\n", ("abc", "d"), ""),
    ({"a": "abc", "b": "d"}, "train: D:\\nutri\\images\\a\nval: D:\\nutri\\images\\b\n", ("abc", "d"), ""),
    ({".": "ab", "b": "cd"}, "train: images\nval: images/b\n", ("ab", "cd"), "2 pictures are in the lists of"),
    ({"Training": "abc", "eval": "d"}, "", ("abc", "d"), "the class is nutrition-table (4 boxes)"),
    ({"train": "abc", "Testing": "d"}, "", ("abc", "d"), "its test (1 pictures) is used as val"),
])  # fmt: skip
def test_folders_are_those_of_the_data_yaml_or_known_by_name(folders, yaml, expected, said, tmp_path, capsys):
    yolo(tmp_path / "nutri", folders, yaml)
    assert lettered(data.load_raw(str(tmp_path / "nutri"))) == expected
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("folders", "yaml", "said"), [
    ({".": "abcdefghijkl"}, "path: .\ntrain: images\nval: images\n", "names the same 12 pictures as train and as val"),
    ({".": "abcdefghijkl"}, "", "has no val: 3 of its 12 pictures become val (val_share=0.25)"),
    ({"my_test_photos": "abcdefghijkl"}, "", "has no val: 3 of its 12 pictures"),
    ({"train": "abcdefghijkl"}, "", "has no val: 3 of its 12 pictures"),
])
def test_one_split_whatever_a_guess_calls_it_is_carved(folders, yaml, said, tmp_path, capsys):
    yolo(tmp_path, folders, yaml)
    raw = data.load_raw(str(tmp_path), val_share=0.25)
    assert {name: len(rows) for name, rows in raw.items()} == {"train": 8, "selection": 1, "val": 3}
    assert said in capsys.readouterr().out
    again = data.load_raw(str(tmp_path), val_share=0.25)
    assert all(again[name]["image_id"] == raw[name]["image_id"] for name in raw)
    assert data.load_raw(str(tmp_path), val_share=0.25, seed=1)["val"]["image_id"] != raw["val"]["image_id"]
    assert {name: len(rows) for name, rows in data.load_raw(str(tmp_path), val_share=1).items()} == {
        "train": 0, "selection": 0, "val": 12}


def test_a_split_named_by_its_folder_stays_what_it_is_and_pictures_of_none_are_refused(tmp_path, capsys):
    yolo(tmp_path / "val", {"valid": "abc"})
    assert lettered(data.load_raw(str(tmp_path / "val"))) == ("", "abc")
    yolo(tmp_path / "mixed", {"train": "abc", "more": "d"})
    refused(tmp_path / "mixed", "1 pictures belong to no split beside ['train']")
    yolo(tmp_path / "one", {".": "a"})
    refused(tmp_path / "one", "has one picture")


def test_the_names_of_a_flat_folder_tell_splits_apart(tmp_path, capsys):
    yolo(tmp_path, {".": ["train_0", "train_1", "val_0"]})
    assert data.load_raw(str(tmp_path))["val"]["image_id"] == ["val_0"]
    assert "train and val are what the names of the pictures say" in capsys.readouterr().out


# --- what is kept together --------------------------------------------------------------------------------------------


def test_copies_products_and_equal_files_go_into_one_split_and_dates_do_not(tmp_path):
    names = [*(f"IMG_{n}_jpg.rf.{copy}{n}" for n in range(4) for copy in "abc"), "4006381333931_1", "4006381333931_2",
             "20260325_200501", "20260325_200502", "twin", "twin (1)"]  # fmt: skip
    yolo(tmp_path, {".": names})
    shutil.copy(tmp_path / "images/twin.jpg", tmp_path / "images/twin (1).jpg")
    everything = data.load_raw(str(tmp_path), val_share=1)["val"]
    groups = dict(zip(everything["image_id"], groups_of(everything), strict=True))
    sizes = sorted(list(groups.values()).count(key) for key in set(groups.values()))
    assert sizes == [1, 1, 2, 2, 3, 3, 3, 3] and groups["twin"] == groups["twin (1)"]
    for seed in range(3):
        raw = data.load_raw(str(tmp_path), val_share=0.3, seed=seed)
        of_split = [{groups[image_id] for image_id in rows["image_id"]} for rows in raw.values()]
        assert sum(map(len, of_split)) == 8 and all(of_split)


def test_a_guess_drops_no_row_of_a_given_split(tmp_path):
    """A phone's photos of one day, and one product's in both splits: only a barcode that the source gives counts."""
    yolo(tmp_path, {"train": ["20260325_1", "4006381333931_1"], "val": ["20260325_2", "4006381333931_2"]})
    raw = data.load_raw(str(tmp_path))
    assert not len(data.audit(raw).table()) and sum(map(len, raw.values())) == 4


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "classes", "expected", "said"), [
    ("[Nutrition Facts, unused]", None, {"Nutrition Facts": 0}, "the class is Nutrition Facts (4 boxes)"),
    ("[栄養成分表示]", None, {"栄養成分表示": 0}, "the class is 栄養成分表示 (4 boxes)"),
    ("Tabla", None, {"Tabla": 0}, "the class is Tabla (4 boxes)"),
    ("[Nutrition_Table]", None, {"nutrition-table": 0}, "the class is nutrition-table (4 boxes)"),
    ("['EU: table (new)']", None, {"EU table new": 0}, "the class is EU table new"),
    ("[Nutrition Facts]", "nutrition-facts=nutrition-table", {"nutrition-table": 0}, "the class is nutrition-table (4"),
])
def test_one_class_is_taken_whatever_it_is_called(names, classes, expected, said, tmp_path, capsys):
    yolo(tmp_path, {"train": "abc", "val": "d"}, names=names)
    assert numbered(data.load_splits(str(tmp_path), classes=classes)) == expected
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "expected", "without", "said"), [
    (None, {"Logo": 0, "price tag": 1, "table": 2}, 0, "3 classes are trained on: table (3 boxes)"),
    ("table", {"table": 0}, 1, "2 boxes are left out, of the classes that classes='table' does not name"),
    ("Table=nutrition-table, LOGO", {"Logo": 0, "nutrition-table": 1}, 0, "2 classes are trained on: nutrition-table"),
    ("table=thing,Logo=thing,price_tag=thing", {"thing": 0}, 0, "the class is thing (5 boxes)"),
])
def test_several_classes_are_taken_as_named_or_as_chosen(classes, expected, without, said, tmp_path, capsys):
    yolo(tmp_path, {"train": "abc", "val": "d"}, names="[table, Logo, price tag]")
    write(tmp_path / "labels/train/a.txt", LABEL + "2 0.2 0.2 0.1 0.1\n")
    write(tmp_path / "labels/train/b.txt", LABEL.replace("0 ", "1 ", 1))
    rows = data.load_splits(str(tmp_path), classes=classes)
    assert numbered(rows) == expected and said in capsys.readouterr().out
    assert sum(not one["bbox"] for split in rows.values() for one in split["objects"]) == without
    assert data.names_in(*rows.values()) == sorted(expected)


def numbered(rows: datasets.DatasetDict) -> dict[str, int]:
    """{class: its category_id} of cleaned rows; the audit has nothing to say about them."""
    found = {(name, number) for split in rows.values() for one in split["objects"]
             for name, number in zip(one["category_name"], one["category_id"], strict=True)}
    assert "category-mismatch" not in set(data.audit(rows).table()["fault"])
    return dict(sorted(found))


def test_a_class_that_is_not_there_or_cannot_be_written_is_refused_with_the_choices(tmp_path):
    yolo(tmp_path, {"train": "abc", "val": "d"}, names="[table]")
    refused(tmp_path, "classes='logo': ", "has no class 'logo'; it has table (4 boxes)", classes="logo")
    write(tmp_path / "data.yaml", "names: ['***']")
    refused(tmp_path, "the class '***' cannot be written", "classes='***=table'")


def test_embedded_scenes_can_be_narrowed_to_some_classes():
    few = {"train": 12, "selection": 1, "val": 1}
    rows = data.load_raw("embedded", classes="nutrition-table=table", limit=few)
    before = data.load_raw("embedded", limit=few)
    names = [name for one in before["train"]["objects"] for name in one["category_name"]]
    assert [name for one in rows["train"]["objects"] for name in one["category_name"]] == [
        "table" for name in names if name == TABLE] and len(set(names)) > 1
