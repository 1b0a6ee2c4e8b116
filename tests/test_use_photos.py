"""Many photos: kills, bad pictures, several processes, COCO, crops; and what is refused."""

import functools
import http.server
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import finished_model
import fsspec
import pyarrow.parquet
import pytest
import requests
from PIL import Image

from helpers import data, parity, predict
from helpers.data import pictures
from helpers.runs import exclusive, read_json, write_json
from helpers.settings import ParameterError
from helpers.use import inputs, load
from helpers.use import photos as many
from helpers.use.inputs import find_pictures
from helpers.use.photos import main, predict_photos, summary

GOOD, BAD = ["1.jpg", "2.jpg", "4.JPG", "5.jpg", "b/1.jpg"], ["cut.jpg", "empty.jpg", "strip.png", "text.jpg"]


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
    (folder / "notes.txt").write_text("no picture by its name or content")
    return folder


@pytest.fixture
def generated(monkeypatch) -> list[str]:
    """The image ids of all that the model is run on, in turn."""
    names = []

    def generate(self, pictures, opened, real=many.Predictor.generate):
        names.extend(one.image_id for one, image in zip(pictures, opened, strict=True) if hasattr(image, "width"))
        return real(self, pictures, opened)

    monkeypatch.setattr(many.Predictor, "generate", generate)
    return names


@pytest.fixture(scope="module")
def alone(model, photos):
    """What predict says of each good picture, alone in its batch."""
    loaded, processor, prompt = load.load_model(model)
    rows = [load.as_row(name, load.open_upright(photos / name)) for name in GOOD]
    return {row["image_id"]: predict.generate_lines(loaded, processor, [row], prompt, {"do_sample": False})[0]
            for row in rows}


def run(photos, output, model, **options):
    return predict_photos(str(photos), output, model, **{"batch_size": 1} | options)


def lines_of(output: Path) -> dict[str, dict]:
    return {line["image_id"]: line for line in predict.read_jsonl(output / "predictions.jsonl")}


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as refused:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_picture_gets_its_line_and_a_bad_one_ends_nothing(model, photos, alone, tmp_path, capsys):
    out = tmp_path / "out"
    counts = run(photos, out, model, coco=True, crops=True)
    assert "1 files are no pictures by name or content, such as notes.txt" in capsys.readouterr().out
    lines = lines_of(out)
    assert [*lines] == [*GOOD, *BAD] and (counts["pictures"], counts["unreadable"]) == (9, 4)
    assert counts["never stopped"] == sum(not line["stopped"] for line in alone.values())
    for name, line in alone.items():
        assert line == {key: lines[name][key] for key in line}
        assert (lines[name]["width"], lines[name]["height"]) == load.open_upright(photos / name).size
    assert all(set(alone["1.jpg"]) < set(lines[name]) and lines[name]["error"] for name in BAD)
    assert len([*out.rglob("crops/**/*.jpg")]) == sum(len(line["boxes"]) for line in lines.values())
    line = lines["1.jpg"]
    x0, y0, x1, y1 = load.to_pixels(line["boxes"][0], (line["width"], line["height"]))
    assert Image.open(out / line["crops"][0]).size == (x1 - x0, y1 - y0)


def test_a_model_is_used_with_the_passes_of_its_run(model, photos, alone, tmp_path):
    twice = Path(shutil.copytree(model, tmp_path / "model"))
    parity.note_use(twice, passes=2)
    run(photos, tmp_path / "out", twice)
    lines = lines_of(tmp_path / "out")
    more = [len(lines[name]["boxes"]) - len(line["boxes"]) for name, line in alone.items()]
    assert min(more) >= 0 and sum(more) > 0
    assert (load.passes_of(model), load.passes_of(twice)) == (1, 2)


def test_coco_results_are_read_by_coco_and_tell_the_same_boxes(tmp_path):
    from pycocotools.coco import COCO

    line = {"image_id": "a.jpg", "labels": ["nutrition-table", "barcode"], "boxes": [[0.1, 0.2, 0.3, 0.6]] * 2,
            "confidences": [0.7, 0.9], "width": 200, "height": 100, "stopped": False, "stamp": ""}
    none = line | {"image_id": "no box.jpg", "boxes": [], "labels": [], "confidences": [], "stopped": True}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(none) + "\n" + json.dumps(line) + "\n")
    assert summary(tmp_path, coco=True) == {"pictures": 2, "with a box": 1, "without": 1, "unreadable": 0,
                                            "never stopped": 1}
    truth = COCO(str(tmp_path / "coco_images.json"))
    found, other = truth.loadRes(str(tmp_path / "coco_results.json")).dataset["annotations"]
    assert found["bbox"] == [20, 20, 40, 40] and found["score"] == 0.7
    assert truth.loadImgs(found["image_id"])[0]["file_name"] == "a.jpg"
    names = [truth.loadCats(one["category_id"])[0]["name"] for one in (found, other)]
    assert names == ["nutrition-table", "barcode"]


def test_the_same_command_goes_on_after_the_last_whole_line_and_does_nothing_twice(
        model, photos, tmp_path, monkeypatch, generated):
    run(photos, tmp_path / "out", model)
    path, parts = tmp_path / "out" / "predictions.jsonl", tmp_path / "out" / "predictions.parts"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.unlink()
    parts.mkdir()
    (parts / "lines.0.jsonl").write_text("".join(lines[:2]) + lines[2][:50])  # as a kill leaves it
    generated.clear()
    run(photos, tmp_path / "out", model)
    assert generated == ["4.JPG", "5.jpg", "b/1.jpg"] and path.read_text() == whole and not parts.exists()
    monkeypatch.setattr(load, "load_model", None)  # all is there: no model is loaded
    assert run(photos, tmp_path / "out", model)["pictures"] == 9


def test_a_picture_is_known_by_its_content_and_none_is_left_out(tmp_path):
    """Every file that is a picture by name or content, in linked folders too; hidden ones and leftovers never."""
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("IMG_1", "2.jpeg.bak", "sub/4.GIF", ".hidden.jpg", "._5.jpg", ".ipynb_checkpoints/6.jpg",
                 "__MACOSX/7.jpg", "sub/.thumbnails/8.jpg", "@eaDir/9.jpg", "../elsewhere/10.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(finished_model.scene(0))
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # round and round
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "notes.txt").write_text("hello")
    os.mkfifo(folder / "pipe.jpg")  # whoever opened it would wait for ever
    (folder / "11").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (folder / "12.svg").write_text("<svg/>")
    found, read = find_pictures(str(folder), "val", tmp_path / "out")
    places = {one.image_id: read(one.place) for one in found}
    assert [*places] == ["11", "12.svg", "2.jpeg.bak", "IMG_1", "gone.jpg", "linked/10.jpg", "loop.jpg", "sub/4.GIF"]
    assert load.open_upright(places["IMG_1"]) == load.open_upright(places["linked/10.jpg"])
    for name, said in {"gone.jpg": "FileNotFoundError", "loop.jpg": "OSError", "12.svg": "is no picture"}.items():
        with pytest.raises(ValueError, match=said):
            load.open_upright(places[name])
    assert [one.image_id for one in find_pictures(str(folder / "IMG_1"), "val", tmp_path)[0]] == ["IMG_1"]


@pytest.mark.parametrize("place", ["photos/out", "photos", "."])
def test_what_it_wrote_itself_is_no_photo_wherever_it_writes(model, tmp_path, place):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(finished_model.scene(0))
    for _ in range(2):
        assert run(tmp_path / "photos", tmp_path / place, model, crops=True)["pictures"] == 1
    assert [*(tmp_path / place).rglob("crops/**/*.jpg")]


def test_a_replaced_or_new_photo_is_predicted_and_the_others_are_not(model, tmp_path, generated):
    folder, path = tmp_path / "photos", tmp_path / "out" / "predictions.jsonl"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(finished_model.scene(number))
    run(folder, tmp_path / "out", model)
    before = predict.read_jsonl(path)
    stat = (folder / "2.jpg").stat()
    Image.new("RGB", (90, 120), "teal").save(folder / "2.jpg")
    os.utime(folder / "2.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does it: the size tells
    (folder / "3.jpg").write_bytes(finished_model.scene(3))
    generated.clear()
    run(folder, tmp_path / "out", model)
    after = predict.read_jsonl(path)
    assert generated == ["2.jpg", "3.jpg"] and len(after) == 4
    assert after[:2] == before[:2] and (after[2]["width"], after[2]["height"]) == (90, 120)
    os.utime(folder / "0.jpg", (1, 1))
    (folder / "1.jpg").unlink()
    run(folder, tmp_path / "out", model)
    assert generated[2:] == ["0.jpg"] and len(predict.read_jsonl(path)) == 3


def test_every_file_name_is_written_escaped_and_read_back(model, tmp_path, capsys):
    names = [b"caf\xe9.jpg", "a\u0085b\u2028.jpg".encode(), b"it's \"best\"\n.jpg", "é".encode() * 120]
    folder, output = tmp_path / "my photos", tmp_path / os.fsdecode(b"\xe9 out")
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / os.fsdecode(name)).write_bytes(finished_model.scene(number))
    (folder / os.fsdecode(b"n\xf6tes.txt")).touch()
    main([str(folder), str(output), "--crops", "--coco", "--model", str(model)])
    assert "such as n\\udcf6tes.txt" in (said := capsys.readouterr().out) and "\\udce9 out/predictions.jsonl" in said
    text = (output / "predictions.jsonl").read_bytes()
    assert text.isascii() and len(text.splitlines()) == len(names)
    lines = [json.loads(line) for line in text.decode().splitlines()]
    assert {os.fsencode(line["image_id"]) for line in lines} == set(names)
    crops = [output / crop for line in lines for crop in line["crops"]]
    assert crops and all(crop.is_file() for crop in crops)
    shown = read_json(output / "coco_images.json")["images"]
    assert {os.fsencode(image["file_name"]) for image in shown} == set(names)


def test_the_runs_own_token_limit_is_used_and_completions_that_are_cut_are_counted(tmp_path, photos, capsys):
    model = finished_model.make(tmp_path / "x-merged")
    write_json(model / "parity.json", read_json(model / "parity.json") | {"max_new_tokens": 5})
    main([str(photos / "b"), str(tmp_path / "out"), "--model", str(model)])
    assert "1 never stopped" in capsys.readouterr().out
    assert lines_of(tmp_path / "out")["1.jpg"]["new_tokens"] == 5
    write_json(model / "parity.json", read_json(model / "parity.json") | {"max_new_tokens": 64})
    assert "max_new_tokens was 5, now 64" in refusal(photos / "b", tmp_path / "out", "--model", model)


def test_a_data_set_without_picture_files_is_read_and_its_split_is_named(tmp_path):
    for split, rows in data.load_raw("embedded", limit={"train": 2, "selection": 2, "val": 2}).items():
        rows.to_parquet(tmp_path / f"{split}-0.parquet")
    with pytest.raises(ParameterError, match="no pictures in the split 'test'; there is train, selection, val"):
        find_pictures(str(tmp_path), "test", tmp_path / "out")
    found, read = find_pictures(str(tmp_path), "val", tmp_path / "out")
    assert len({one.image_id for one in found}) == 2 and load.open_upright(read(found[1].place)).mode == "RGB"
    assert find_pictures(str(tmp_path), "val", tmp_path / "out")[0] == found


@pytest.fixture
def site(photos):
    """A web server of the photos: under /moved/ it leads on to them by another name of this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{server.server_port}/{self.path[7:]}")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=photos)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_a_zip_and_a_list_of_paths_and_urls_give_the_lines_of_the_folder(model, photos, alone, site, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in sorted(photos.rglob("*.*")):
            archive.write(file, file.relative_to(photos))
        archive.writestr("__MACOSX/._1.jpg", b"")
    run(tmp_path / "photos.zip", tmp_path / "zip", model)
    zipped = lines_of(tmp_path / "zip")
    assert set(zipped) == {*GOOD, *BAD} and all(zipped[name]["text"] == line["text"] for name, line in alone.items())
    names = {"1.jpg": "1.jpg", f"{photos}/2.jpg": "2.jpg", f"{site}/moved/4.JPG": "4.JPG", f"{site}/b/1.jpg": "b/1.jpg"}
    shutil.copy(photos / "1.jpg", tmp_path)
    (tmp_path / "list.txt").write_text("\n".join([*names, "", "1.jpg", f"{site}/none.jpg"]))
    run(tmp_path / "list.txt", tmp_path / "list", model, private=True, parquet=True)
    listed = lines_of(tmp_path / "list")
    assert set(listed) == {*names, f"{site}/none.jpg"} and "404" in listed[f"{site}/none.jpg"]["error"]
    assert all(listed[one]["text"] == alone[name]["text"] for one, name in names.items())
    table = pyarrow.parquet.read_table(tmp_path / "list" / "predictions.parquet").to_pylist()
    assert [{name: value for name, value in row.items() if value is not None} for row in table] == [*listed.values()]


def test_addresses_of_ones_own_network_are_refused_unless_allowed(photos, site, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text(f"https://example.com/1.jpg\n{site}/1.jpg")
    with pytest.raises(ParameterError, match="localhost is an address of your own network"):
        find_pictures(str(tmp_path / "list.txt"), "val", tmp_path)
    checked = []
    monkeypatch.setattr(inputs, "_refuse_private", checked.append)
    assert inputs.read_place(f"{site}/moved/1.jpg", private=False) == (photos / "1.jpg").read_bytes()
    assert checked == ["localhost", "127.0.0.1"]  # at the redirect too
    assert inputs.read_place(f"{site}/1.jpg", private=True) and len(checked) == 2


def test_a_bucket_whose_rights_end_says_so_and_the_same_command_goes_on(model, photos, tmp_path, monkeypatch):
    source, out, files, allowed = "memory://photos", tmp_path / "out", fsspec.filesystem("memory"), 0
    for name in GOOD:
        files.pipe(f"/photos/{name}", (photos / name).read_bytes())

    def guarded(real):
        def call(*given, **named):
            nonlocal allowed
            allowed -= 1
            if allowed < 0:
                raise PermissionError("Access Denied")
            return real(*given, **named)

        return call

    monkeypatch.setattr(files, "cat_file", guarded(files.cat_file))  # no file may be read
    said = refusal(source, out, "--model", model)
    assert "INPUT=memory://photos holds no picture that can be opened (b/1.jpg: Access Denied)" in said
    monkeypatch.setattr(files, "info", guarded(files.info))  # nor the bucket, after four files
    allowed = 4
    said = refusal(source, out, "--model", model, "--batch-size", "1")
    assert "INPUT=memory://photos cannot be read any more (Access Denied); check your rights" in said
    kept = (out / "predictions.parts" / "lines.0.jsonl").read_text().split("\n")[1:]
    assert len(kept) == 3  # two pictures, and the end of their lines
    monkeypatch.setattr(files, "find", guarded(files.find))
    assert "INPUT=memory://photos cannot be listed (Access Denied)" in refusal(source, out, "--model", model)
    allowed = 99
    run(source, out, model)
    written = (out / "predictions.jsonl").read_text().split("\n")
    assert len(written) == 6 and set(kept) < set(written) and set(lines_of(out)) == set(GOOD)


def test_a_bucket_is_read_and_what_cannot_be_is_said(model, photos, alone, tmp_path, monkeypatch):
    s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b",
                        "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    files, out = s3fs.S3FileSystem(), tmp_path / "out"
    files.mkdir("photos")
    files.put(f"{photos}/", "photos/some", recursive=True)
    run("s3://photos/some", out, model)
    lines = lines_of(out)
    assert set(lines) == {*GOOD, *BAD} and all(lines[name]["text"] == line["text"] for name, line in alone.items())
    said = refusal("s3://elsewhere", out, "--model", model)
    assert "INPUT=s3://elsewhere cannot be listed (The specified bucket does not exist)" in said
    assert "(it names none)" in refusal("s3://photos/none", out, "--model", model)
    found, read = find_pictures("s3://photos/some", "val", out)
    requests.post(f"http://{host}:{port}/moto-api/reset-auth", data="0").raise_for_status()  # now no key is good
    with pytest.raises(ParameterError, match="^INPUT=s3://photos/some cannot be read any more .*; check your rights"):
        read(found[0].place)
    assert "INPUT=s3://photos/some cannot be listed" in refusal("s3://photos/some", out, "--model", model)
    server.stop()


def test_a_batch_that_is_too_large_is_made_smaller_for_good(model, photos, tmp_path, monkeypatch):
    def small_memory(*arguments, real=predict.complete):
        sizes.append(len(arguments[2]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return real(*arguments)

    sizes = []
    monkeypatch.setattr(predict, "complete", small_memory)
    assert run(photos, tmp_path / "out", model, batch_size=4)["pictures"] == 9
    assert sizes[0] == 4 and max(sizes[1:]) == 2


@pytest.mark.parametrize(("files", "source", "said"), [
    ({}, "./nowhere", "is no file or folder"),
    ({}, "gs://bucket/photos", "cannot be listed (Please install gcsfs"),
    ({"none.zip": b"PK"}, "none.zip", "cannot be listed (File is not a zip file)"),
    ({"none/.hidden.jpg": b"hello"}, "none", "holds no picture files, and as a data set"),
    ({"a.jpg": b"hello"}, "a.jpg", "opened (a.jpg: its content is no picture)"),
    ({"none/a.jpg": b"hello", "none/b.heic": b"\0\0\0\x18ftypheic" + bytes(99)}, "none",
     "b.heic: a HEIC, which Python reads with pillow-heif alone: pip install pillow-heif")])
def test_where_no_pictures_are_is_said_in_one_sentence(model, tmp_path, monkeypatch, files, source, said):
    monkeypatch.setattr(pictures, "KINDS", [kind for kind in pictures.KINDS if kind != "HEIF"])
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    sentence = refusal(source, "out", "--model", model)
    assert said in sentence and not Path("out").exists()


def test_what_cannot_be_read_or_written_is_said_in_one_sentence(model, photos, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(photos, tmp_path / "file", "--model", model)
    with exclusive(tmp_path / ".job"):
        assert f"another process is at work on {tmp_path}" in refusal(photos, tmp_path, "--model", model)
    write_json(tmp_path / "job.json", {"model": "1"})
    assert "holds the predictions of another job (model was '1', now" in refusal(photos, tmp_path, "--model", model)

    def full(path, *_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("helpers.use.photos.write_json", full)
    assert "(No space left on device); what is done is kept" in refusal(photos, tmp_path / "o", "--model", model)
    monkeypatch.setattr(Path, "iterdir", full)
    assert f"{photos} cannot be read (No space left on device)" in refusal(photos, tmp_path / "o", "--model", model)
