"""A finished model is found, checked and opened, or refused in one sentence."""

import io
import os
import shutil
import socket

import finished_model
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import parity
from helpers.model import compute_dtype
from helpers.runs import read_json, write_json
from helpers.settings import ParameterError
from helpers.use import load, page, serve


@pytest.fixture
def own(tmp_path, model):
    """A finished model to change, as a run leaves it."""
    return shutil.copytree(model, tmp_path / "runs" / "x-merged")


def refusal(call, *arguments) -> str:
    with pytest.raises(ParameterError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_newest_merged_model_is_found_in_runs_and_in_the_demo(tmp_path, own):
    runs, demo = tmp_path / "runs", tmp_path / "runs" / "demo" / "y-merged"
    assert load.newest(runs) == own
    shutil.copytree(own, demo)
    os.utime(own / "parity.json", (1, 1))
    (runs / "z-merged").mkdir()  # a merge that was killed has no parity.json
    assert load.newest(runs) == demo
    assert "run `make demo` first" in refusal(load.newest, tmp_path)


def test_a_good_model_passes_and_loads(model):
    assert load.check(model)["prompt"] == finished_model.PROMPT
    loaded, processor, prompt = load.load_model(model)
    assert loaded.dtype == compute_dtype() and not loaded.training and prompt == finished_model.PROMPT
    assert loaded.generation_config.max_new_tokens == load.MAX_NEW_TOKENS
    assert processor.image_processor.size["longest_edge"] == finished_model.BUDGET["max_pixels"]


def test_a_folder_that_is_none_an_adapter_or_half_a_model_is_refused(tmp_path, own):
    assert "is no folder" in refusal(load.check, tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "runs/…-merged" in refusal(load.check, tmp_path)
    run = tmp_path / "runs" / "x"  # the run that `own` was merged from
    (run / "adapter").mkdir(parents=True)
    for file, kind in (("manifest.json", "a run, and no model"), ("adapter/adapter_config.json", "an adapter")):
        (run / file).write_text("{}")
        assert f"holds {kind}" in (said := refusal(load.check, (run / file).parent)) and str(own) in said
    for name in ("parity.json", "config.json", "model.safetensors"):
        (own / name).rename(tmp_path / "away")
        assert f"has no {name.replace('model', '*')}" in refusal(load.check, own)
        (tmp_path / "away").rename(own / name)


def edit(folder, name, change):
    """`change` takes a JSON file's content and returns the new one."""
    write_json(folder / name, change(read_json(folder / name)))


def other_weights(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def other_budget(config):
    config["image_processor"]["size"]["longest_edge"] *= 2
    return config


def half(name):
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:40])


@pytest.mark.parametrize(("change", "said"), [
    (other_weights, "are not those that were saved there"),
    (lambda folder: edit(folder, "processor_config.json", other_budget), f"{2 * finished_model.BUDGET['max_pixels']}"),
    (lambda folder: edit(folder, "parity.json", lambda made: {"weights": made["weights"]}), "cannot be read"),
    (lambda folder: edit(folder, "config.json", lambda old: old | {"model_type": "qwen3_vl"}), "of type 'qwen3_vl'"),
    *((half(name), "cannot be read") for name in ("parity.json", "config.json", "tokenizer.json"))])  # fmt: skip
def test_a_model_that_was_changed_is_refused(own, change, said):
    change(own)
    assert f"MODEL={own} " in (sentence := refusal(load.check, own)) and said in sentence


def test_a_model_that_lacks_weights_is_refused(own):
    tensors = load_file(own / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    parity.write(own, read_json(own / "parity.json"))
    assert "1 missing, such as lm_head.weight" in refusal(load.load_model, own)


# --- pictures


def as_file(picture, kind, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("content, most, said", [
    (b"hello", None, "no picture"), (finished_model.scene(0)[:999], None, "OSError"),
    (as_file(Image.new("RGB", (1005, 5)), "PNG"), None, "1005 x 5 pixels"),
    (finished_model.scene(0)[:999], 1000, "and 1,000 at most are taken"),  # before it is decoded
])  # fmt: skip
def test_what_cannot_be_opened_says_why(content, most, said):
    with pytest.raises(ValueError, match=said):
        load.open_upright(content, most)


@pytest.mark.parametrize("kind", ["moving GIF", "moving WebP", "MPO of a phone", "CMYK", "16 bit", "palette"])
def test_pictures_of_rarer_kinds_are_read(kind):
    still = load.open_upright(finished_model.scene(0)).resize((96, 128))
    two = {"save_all": True, "append_images": [still.rotate(90)]}
    grey = Image.fromarray(np.asarray(still.convert("L")).astype("uint16") * 256)
    picture, name, more = {"moving GIF": (still, "GIF", two), "moving WebP": (still, "WEBP", two),
                           "MPO of a phone": (still, "MPO", two), "CMYK": (still.convert("CMYK"), "JPEG", {}),
                           "16 bit": (grey, "PNG", {}), "palette": (still.convert("P"), "PNG", {})}[kind]
    shown = load.open_upright(as_file(picture, name, **more))
    assert shown.size == (96, 128) and shown.mode == "RGB"
    expected = (still.convert("L") if kind == "16 bit" else picture).convert("RGB")
    difference = np.asarray(shown).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 15  # of 255: a GIF's palette is coarse


def test_boxes_in_pixels_are_never_empty():
    assert load.to_pixels([0.1, 0.2, 0.5, 1.0], (200, 100)) == (20, 20, 100, 100)
    assert load.to_pixels([0.5, 0.5, 0.501, 0.501], (10, 10)) == (5, 5, 6, 6)
    assert load.to_pixels([0.999, 0.999, 1.0, 1.0], (10, 10)) == (9, 9, 10, 10)


# --- ports


@pytest.mark.parametrize("port", [0, -1, 65536, 10**30])
def test_a_port_that_is_none_is_said(port):
    with pytest.raises(SystemExit, match=f"PORT={port} cannot be opened .*from 1 to 65535.*PORT=8001") as refused:
        load.parse_port("serve", "", 8000, [f"--port={port}"])
    assert "\n" not in str(refused.value)


def test_a_port_that_is_taken_and_a_host_that_is_none_are_said_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(load, "newest", lambda: 1 / 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for main in (serve.main, page.main):
            with pytest.raises(SystemExit, match=rf"PORT={port} cannot be opened .*\(Address already in use\)"):
                main(["--port", str(port)])
    assert load.parse_port("page", "", 7860, ["--port", str(port)]).port == port  # free again at once
    with pytest.raises(SystemExit, match="PORT=7860 cannot be opened on no.such.host"):
        load.parse_port("page", "", 7860, ["--host", "no.such.host"])


@pytest.mark.parametrize("program", [serve, page])
def test_a_model_that_is_none_ends_the_command_with_a_sentence(tmp_path, monkeypatch, program):
    monkeypatch.setattr(load.newest, "__defaults__", (tmp_path / "runs",))
    (tmp_path / "adapter_config.json").write_text("{}")
    for given, said in (([str(tmp_path)], "holds an adapter"), ([], "run `make demo` first")):
        with pytest.raises(SystemExit, match=said):
            program.main([*given, "--port", "47860"])
