"""Many photos: kills, bad pictures, several processes, COCO, crops; and what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finished_model
import pytest
from PIL import Image

from helpers import finished, many, predict
from helpers.parameters import ParameterError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return finished_model.make(tmp_path_factory.mktemp("runs") / "x-merged")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five good pictures (one below a folder, one stored on its side) and four bad ones."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    for number, name in enumerate(["1.jpg", "2.jpg", "b/1.jpg", "4.JPG"]):
        (folder / name).write_bytes(finished_model.scene(number))
    (folder / "5.jpg").write_bytes(finished_model.turned(finished_model.scene(4)))
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.jpg").write_bytes(finished_model.scene(0)[:3000])
    Image.new("RGB", (2010, 10)).save(folder / "strip.png")
    (folder / "notes.txt").write_text("no picture by its name: not even looked at")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(many, "PART", 2)


@pytest.fixture(scope="module")
def answers(model, photos):
    """What predict says of each good picture, alone in its batch."""
    loaded, processor, prompt = finished.load(model)
    greedy = {"max_new_tokens": finished.MAX_NEW_TOKENS, "do_sample": False}
    good = ["1.jpg", "2.jpg", "4.JPG", "5.jpg", "b/1.jpg"]
    rows = [finished.as_row(name, finished.open_upright(photos / name)) for name in good]
    return {row["image_id"]: predict.generate_lines(loaded, processor, [row], prompt, greedy)[0] for row in rows}


def run(photos, output, model, **options):
    return many.predict_many(str(photos), output, model, **{"batch_size": 1} | options)


def test_every_picture_gets_its_line_and_a_bad_one_ends_nothing(model, photos, answers, tmp_path):
    counts = run(photos, tmp_path / "out", model, coco=True, crops=True)
    lines = predict.read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [line["image_id"] for line in lines] == ["1.jpg", "2.jpg", "4.JPG", "5.jpg", "b/1.jpg", "cut.jpg",
                                                    "empty.jpg", "strip.png", "text.jpg"]
    assert counts["pictures"] == 9 and counts["unreadable"] == 4
    for line in lines[:5]:
        assert {name: line[name] for name in answers[line["image_id"]]} == answers[line["image_id"]]
        assert (line["width"], line["height"]) == finished.open_upright(photos / line["image_id"]).size
    for line in lines[5:]:
        assert set(answers["1.jpg"]) < set(line) and line["boxes"] == [] and line["error"]
    boxes = sum(len(line["boxes"]) for line in lines)
    crops = sorted((tmp_path / "out").rglob("crops/**/*.jpg"))
    assert len(crops) == boxes >= 1
    line = next(line for line in lines if line["boxes"])
    x0, y0, x1, y1 = finished.to_pixels(line["boxes"][0], (line["width"], line["height"]))
    assert Image.open(tmp_path / "out" / line["crops"][0]).size == (x1 - x0, y1 - y0)


def test_coco_results_are_read_by_coco_and_tell_the_same_boxes(tmp_path):
    from pycocotools.coco import COCO

    line = {"image_id": "a.jpg", "labels": ["nutrition-table", "barcode"], "boxes": [[0.1, 0.2, 0.3, 0.6]] * 2,
            "confidences": [0.7, 0.9], "width": 200, "height": 100}
    part = tmp_path / "0.jsonl"
    part.write_text(json.dumps(line | {"image_id": "no box.jpg", "boxes": [], "labels": [], "confidences": []}) + "\n"
                    + json.dumps(line) + "\n")
    assert many.join(tmp_path, [part], coco=True) == {"pictures": 2, "with a box": 1, "without": 1, "unreadable": 0}
    truth = COCO(str(tmp_path / "coco_images.json"))
    (found,) = truth.loadRes(str(tmp_path / "coco_results.json")).dataset["annotations"]
    assert found["bbox"] == [20, 20, 40, 40] and found["score"] == 0.7
    assert truth.loadImgs(found["image_id"])[0]["file_name"] == "a.jpg"
    assert truth.loadCats(found["category_id"])[0]["name"] == "nutrition-table"


def test_the_same_command_does_nothing_twice_and_goes_on_where_a_part_is_missing(model, photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "out", model)
    whole = (tmp_path / "out" / "predictions.jsonl").read_text()
    (tmp_path / "out" / "parts" / "0000001.jsonl").unlink()
    (tmp_path / "out" / "predictions.jsonl").unlink()
    asked = []
    monkeypatch.setattr(many, "answer", lambda *a, real=many.answer: asked.append(a[2]) or real(*a))
    run(photos, tmp_path / "out", model)
    assert [row["image_id"] for rows in asked for row in rows] == ["4.JPG", "5.jpg"]
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == whole
    monkeypatch.setattr(finished, "load", None)  # all is there: no model is loaded
    assert run(photos, tmp_path / "out", model)["pictures"] == 9


def test_shards_give_the_whole_in_any_order_and_run_twice(model, photos, tmp_path):
    run(photos, tmp_path / "whole", model)
    assert run(photos, tmp_path / "out", model, shard=(1, 2)) is None
    assert run(photos, tmp_path / "out", model, shard=(1, 2)) is None
    assert run(photos, tmp_path / "out", model, shard=(0, 2))["pictures"] == 9
    assert run(photos, tmp_path / "out", model, shard=(0, 2))["pictures"] == 9
    assert (tmp_path / "out/predictions.jsonl").read_text() == (tmp_path / "whole/predictions.jsonl").read_text()


def test_a_data_set_is_asked_too_and_its_split_is_named(model, tmp_path):
    with pytest.raises(ParameterError, match="no pictures in the split 'test'; there is train, selection, val"):
        many.find_pictures(str(embedded(tmp_path)), "test", tmp_path)
    ids, opened = many.find_pictures(str(embedded(tmp_path)), "val", tmp_path)
    assert len(ids) == 2 and opened(1).mode == "RGB"


def embedded(folder: Path) -> Path:
    """A data set without picture files of its own: the embedded scenes as Parquet."""
    from helpers import data

    place = folder / "set"
    if not place.exists():
        place.mkdir()
        for split, rows in data.load_raw("embedded", limit={"train": 2, "selection": 2, "val": 2}).items():
            rows.to_parquet(place / f"{split}-0.parquet")
    return place


def test_a_batch_that_is_too_large_is_halved(monkeypatch):
    sizes = []

    def small_memory(model, processor, rows, prompt, generation):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise RuntimeError("CUDA out of memory.")
        return rows

    monkeypatch.setattr(predict, "generate_lines", small_memory)
    assert many.answer(None, None, [1, 2, 3], "") == [1, 2, 3] and sizes == [3, 1, 2, 1, 1]
    monkeypatch.setattr(predict, "generate_lines", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        many.answer(None, None, [1, 2, 3], "")


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as refused:
        many.main([str(argument) for argument in arguments])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_done_is_said_in_one_sentence(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "is not there" in refusal("./nowhere", out, "--model", model)
    assert "is no file or folder" in refusal("nowhere", out, "--model", model)
    assert "from 1/16 to 16/16" in refusal(photos, out, "--model", model, "--shard", "3/2")
    (tmp_path / "none").mkdir()
    assert "holds no known format" in refusal(tmp_path / "none", out, "--model", model)
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(photos, tmp_path / "file", "--model", model)
    many.open_job(out, {"model": "1", "pictures": 9})
    assert "holds the answers of another job (model was '1', now" in refusal(photos, out, "--model", model)
    monkeypatch.setattr(os, "listdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ParameterError, match=r"cannot be read \(Permission denied\); check its rights"):
        many.find_pictures(str(photos), "val", tmp_path / "o")


def test_a_full_disk_is_said_before_the_work_and_when_it_happens(model, photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(many, "write_text", full)
    assert "is on a disk that is full: what is done is kept" in refusal(photos, tmp_path / "o", "--model", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 100))
    assert "MiB free" in refusal(photos, tmp_path / "p", "--model", model)


def test_two_processes_under_a_launcher_do_it_together(model, photos, tmp_path):
    run(photos, tmp_path / "alone", model, batch_size=16)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "-m", "helpers.many", str(photos), str(tmp_path / "out"), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = predict.read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert len(lines) == 9 and sum("error" in line for line in lines) == 4


def test_a_killed_command_goes_on(model, photos, tmp_path):
    """Copies of one picture in parts of 64: killed when the first part is there, then run to its end."""
    many_photos = tmp_path / "many"
    many_photos.mkdir()
    for number in range(66):
        shutil.copy(photos / "1.jpg", many_photos / f"{number}.jpg")
    command = [sys.executable, "-m", "helpers.many", str(many_photos), str(tmp_path / "out"), "--model", str(model)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    first = tmp_path / "out" / "parts" / "0000000.jsonl"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    stamp = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "66 pictures" in done.stdout
    assert first.stat().st_mtime_ns == stamp and not list((tmp_path / "out").rglob("*.part*-*"))
    assert len(predict.read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 66
