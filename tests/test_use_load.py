"""A finished model is found, checked and opened, or refused in one sentence."""

import io
import json
import os
import socket

import finished_model
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import parity
from helpers.data import pictures
from helpers.model import compute_dtype
from helpers.runs import read_json, write_json
from helpers.settings import ParameterError
from helpers.use import load, page, serve


@pytest.fixture
def model(tmp_path):
    return finished_model.make(tmp_path / "runs" / "x-merged")


def refusal(call, *arguments) -> str:
    with pytest.raises(ParameterError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_newest_merged_model_is_found_in_runs_and_in_the_demo(tmp_path, model):
    runs = tmp_path / "runs"
    assert load.newest(runs) == model
    demo = finished_model.make(runs / "demo" / "y-merged")
    os.utime(model / "parity.json", (1, 1))
    assert load.newest(runs) == demo
    (runs / "z-merged").mkdir()  # a merge that was killed has no parity.json
    assert load.newest(runs) == demo


def test_without_any_the_sentence_names_the_command(tmp_path):
    assert "run `make demo` first" in refusal(load.newest, tmp_path)


def test_a_good_model_passes_and_loads(model):
    assert load.check(model)["prompt"] == finished_model.PROMPT
    loaded, processor, prompt = load.load_model(model)
    assert loaded.dtype == compute_dtype() and not loaded.training and prompt == finished_model.PROMPT
    assert processor.image_processor.size["longest_edge"] == finished_model.BUDGET["max_pixels"]


def test_a_folder_that_is_none_an_adapter_or_half_a_model_is_refused(tmp_path, model):
    assert "is no folder" in refusal(load.check, tmp_path / "nothing")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(load.check, adapter)
    run = tmp_path / "runs" / "x"  # the run that `model` was merged from
    (run / "adapter").mkdir(parents=True)
    for file in ("manifest.json", "adapter/adapter_config.json"):
        (run / file).write_text("{}")
        assert str(model) in refusal(load.check, (run / file).parent)
    for name in ("parity.json", "config.json", "model.safetensors"):
        (model / name).rename(tmp_path / "away")
        assert f"has no {name.replace('model', '*')}" in refusal(load.check, model)
        (tmp_path / "away").rename(model / name)


def test_another_pixel_budget_than_it_was_made_with_is_refused(model):
    config = read_json(model / "processor_config.json")
    config["image_processor"]["size"]["longest_edge"] *= 2
    write_json(model / "processor_config.json", config)
    said = refusal(load.check, model)
    was = finished_model.BUDGET["max_pixels"]
    assert f"max_pixels={was}" in said and str(2 * was) in said


def test_other_weights_than_were_saved_are_refused(model):
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    assert "are not those that were saved there" in refusal(load.check, model)


@pytest.mark.parametrize("name", ["parity.json", "config.json", "tokenizer.json"])
def test_half_a_file_is_refused(model, name):
    (model / name).write_text((model / name).read_text()[:40])
    assert "cannot be read" in refusal(load.check, model)


def test_a_folder_without_the_right_to_read_is_refused(model, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(load, "read_json", denied)
    assert "cannot be read" in refusal(load.check, model) and "Permission denied" in refusal(load.check, model)


def test_a_parity_file_that_lacks_the_prompt_is_refused(model):
    write_json(model / "parity.json", {"weights": json.loads((model / "parity.json").read_text())["weights"]})
    assert "cannot be read" in refusal(load.check, model)


def test_a_model_that_lacks_weights_or_is_another_is_refused(model):
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    parity.write(model, read_json(model / "parity.json"))
    assert "1 missing, such as lm_head.weight" in refusal(load.load_model, model)
    write_json(model / "config.json", read_json(model / "config.json") | {"model_type": "qwen3_vl"})
    assert f"MODEL={model} is a model of type 'qwen3_vl'" in refusal(load.check, model)


def test_a_picture_is_opened_as_exif_shows_it():
    upright = load.open_upright(finished_model.scene(0))
    assert load.open_upright(finished_model.turned(finished_model.scene(0))).size == upright.size
    assert upright.mode == "RGB"


@pytest.mark.parametrize("content, said", [(b"hello", "no picture"), (finished_model.scene(0)[:999], "OSError")])
def test_what_is_no_picture_says_why(content, said):
    with pytest.raises(ValueError, match=said):
        load.open_upright(content)


def test_a_strip_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (1005, 5)).save(file, "PNG")
    with pytest.raises(ValueError, match="1005 x 5 pixels"):
        load.open_upright(file.getvalue())


def test_boxes_in_pixels_are_never_empty():
    assert load.to_pixels([0.1, 0.2, 0.5, 1.0], (200, 100)) == (20, 20, 100, 100)
    assert load.to_pixels([0.5, 0.5, 0.501, 0.501], (10, 10)) == (5, 5, 6, 6)
    assert load.to_pixels([0.999, 0.999, 1.0, 1.0], (10, 10)) == (9, 9, 10, 10)


@pytest.mark.parametrize("kind", ["moving GIF", "moving WebP", "MPO of a phone", "CMYK", "16 bit", "palette"])
def test_pictures_of_rarer_kinds_are_read(kind):
    still = load.open_upright(finished_model.scene(0)).resize((96, 128))
    two = {"save_all": True, "append_images": [still.rotate(90)]}
    grey = Image.fromarray(np.asarray(still.convert("L")).astype("uint16") * 256)
    picture, name, more = {"moving GIF": (still, "GIF", two), "moving WebP": (still, "WEBP", two),
                           "MPO of a phone": (still, "MPO", two), "CMYK": (still.convert("CMYK"), "JPEG", {}),
                           "16 bit": (grey, "PNG", {}), "palette": (still.convert("P"), "PNG", {})}[kind]
    file = io.BytesIO()
    picture.save(file, name, **more)
    shown = load.open_upright(file.getvalue())
    assert shown.size == (96, 128) and shown.mode == "RGB"
    expected = (still.convert("L") if kind == "16 bit" else picture).convert("RGB")
    difference = np.asarray(shown).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 15  # of 255: a GIF's palette is coarse


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match="and 1,000 at most are taken"):
        load.open_upright(finished_model.scene(0)[:999], most=1000)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "L", "RGB", "1", "16 bits", "P"])
def test_a_transparent_picture_is_shown_on_white(kind):
    pixels = load.open_upright(finished_model.clear(kind))
    assert pixels.mode == "RGB" and pixels.getpixel((0, 0)) == (255, 255, 255) and max(pixels.getpixel((32, 32))) < 15


def test_a_heic_says_which_package_reads_it(monkeypatch):
    monkeypatch.setattr(pictures, "KINDS", [kind for kind in pictures.KINDS if kind != "HEIF"])
    with pytest.raises(ValueError, match=r"^not a picture that can be read \(a HEIC, .* pip install pillow-heif\)$"):
        load.open_upright(b"\0\0\0\x18ftypheic" + bytes(100))


@pytest.mark.parametrize("port", [0, -1, 65536, 10**30])
def test_a_port_that_is_none_is_said(port, capsys):
    with pytest.raises(SystemExit, match=f"PORT={port} cannot be opened .*from 1 to 65535.*PORT=8001") as refused:
        load.parse_port("serve", "", 8000, [f"--port={port}"])
    assert "\n" not in str(refused.value)


def test_a_port_that_is_taken_and_a_host_that_is_none_are_said_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(load, "load_model", None)
    monkeypatch.setattr(load, "newest", lambda: 1 / 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for main in (serve.main, page.main):
            with pytest.raises(SystemExit, match=rf"PORT={port} cannot be opened .*\(Address already in use\)"):
                main(["--port", str(port)])
    assert load.parse_port("page", "", 7860, ["--port", str(port)]).port == port  # free again at once
    with pytest.raises(SystemExit, match="PORT=7860 cannot be opened on no.such.host"):
        load.parse_port("page", "", 7860, ["--host", "no.such.host"])


def test_the_longest_answer_is_the_runs_own(model):
    assert load.load_model(model)[0].generation_config.max_new_tokens == load.MAX_NEW_TOKENS
    write_json(model / "parity.json", read_json(model / "parity.json") | {"max_new_tokens": 300})
    assert load.load_model(model)[0].generation_config.max_new_tokens == 300
