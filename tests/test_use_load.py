"""A finished model is found, checked and opened, or refused in one sentence."""

import io
import os
import shutil
import socket

import finished_model
import numpy as np
import pytest
from PIL import Image

from helpers.model import compute_dtype
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


def test_a_good_model_passes_and_loads(model):
    assert load.check(model)["prompt"] == finished_model.PROMPT
    loaded, processor, prompt = load.load_model(model)
    assert loaded.dtype == compute_dtype() and not loaded.training and prompt == finished_model.PROMPT
    assert loaded.generation_config.max_new_tokens == load.MAX_NEW_TOKENS
    assert processor.image_processor.size["longest_edge"] == finished_model.BUDGET["max_pixels"]


def test_a_folder_that_is_none_an_adapter_or_half_a_model_is_refused(tmp_path, own):
    assert "is no folder" in refusal(load.check, tmp_path / "nothing")
    for file, kind in (("manifest.json", "a run"), ("adapter_config.json", "an adapter")):
        (tmp_path / file).write_text("{}")
        assert f"holds {kind}" in refusal(load.check, tmp_path)
    for name in ("parity.json", "config.json", "model.safetensors"):
        (own / name).rename(tmp_path / "away")
        assert f"has no {name.replace('model', '*')}" in refusal(load.check, own)
        (tmp_path / "away").rename(own / name)


@pytest.mark.parametrize(("name", "old", "new", "said"), [
    ("model.safetensors", b"lm_head", b"lm_haed", "are not those that were saved there"),
    ("processor_config.json", b'"longest_edge": 112896', b'"longest_edge": 225792', "would be used with 225792"),
    ("parity.json", b"prompt", b"pormpt", "cannot be read"),
    ("config.json", b'"qwen2_vl"', b'"qwen3_vl"', "of type 'qwen3_vl'"),
    *((name, b"}", b"", "cannot be read") for name in ("parity.json", "config.json", "tokenizer.json"))])  # fmt: skip
def test_a_model_that_was_changed_is_refused(own, name, old, new, said):
    content = (own / name).read_bytes()
    assert old in content
    (own / name).write_bytes(content.replace(old, new))
    assert str(own) in (sentence := refusal(load.check, own)) and said in sentence


# --- pictures


def as_file(picture, kind, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


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


@pytest.mark.parametrize("given", ["--port=0", f"--port={10**30}", "--host=no.such.host", "taken"])
def test_a_port_that_cannot_be_opened_is_said_before_a_model_is_loaded(monkeypatch, given):
    monkeypatch.setattr(load, "newest", lambda: 1 / 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = f"--port={taken.getsockname()[1]}" if given == "taken" else given
        for main in (serve.main, page.main):
            with pytest.raises(SystemExit, match="PORT=.* cannot be opened on .*from 1 to 65535") as refused:
                main([given])
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("program", [serve, page])
def test_a_model_that_is_none_ends_the_command_with_a_sentence(tmp_path, monkeypatch, program):
    monkeypatch.setattr(load.newest, "__defaults__", (tmp_path / "runs",))
    (tmp_path / "adapter_config.json").write_text("{}")
    for given, said in (([str(tmp_path)], "holds an adapter"), ([], "run `make demo` first")):
        with pytest.raises(SystemExit, match=said):
            program.main([*given, "--port", "47860"])
