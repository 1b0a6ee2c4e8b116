"""The page: its function, and the running app through its API."""

from pathlib import Path

import finished_model
import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from helpers.settings import ParameterError
from helpers.use import load, page


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    opened = page.build_page(finished_model.make(tmp_path_factory.mktemp("runs") / "x-merged"))
    _, url, _ = opened.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    yield url
    opened.close()


@pytest.fixture
def photo(tmp_path) -> Path:
    file = tmp_path / "photo.jpg"
    file.write_bytes(finished_model.scene(0))
    return file


def test_the_page_answers_with_boxes_confidence_text_and_crops(address, photo):
    drawn, text, crops = Client(address, verbose=False).predict(handle_file(photo), api_name="/find")
    assert "<|box_start|>" in text and len(drawn["annotations"]) == len(crops) >= 1
    label = drawn["annotations"][0]["label"]
    assert label.startswith("barcode ") and label.endswith("%") and crops[0]["caption"] == label
    with Image.open(drawn["annotations"][0]["image"]) as mask, Image.open(crops[0]["image"]) as crop:
        x0, y0, x1, y1 = mask.getchannel("A").getbbox()
        assert abs(crop.width - (x1 - x0)) <= 4 and abs(crop.height - (y1 - y0)) <= 4


def test_a_photo_stored_on_its_side_is_shown_upright_with_the_same_box(address, photo):
    client = Client(address, verbose=False)
    _, upright, _ = client.predict(handle_file(photo), api_name="/find")
    png = photo.with_suffix(".png")  # the turned JPEG's own pixels, so that both are the same picture
    load.open_upright(finished_model.turned(photo.read_bytes())).save(png)
    photo.write_bytes(finished_model.turned(photo.read_bytes()))
    drawn, turned, _ = client.predict(handle_file(photo), api_name="/find")
    assert turned == client.predict(handle_file(png), api_name="/find")[1] and upright
    with Image.open(drawn["image"]) as shown:
        assert shown.size == load.open_upright(finished_model.scene(0)).size


def test_what_is_no_photo_gets_one_sentence(address, photo):
    photo.write_text("hello")
    with pytest.raises(AppError, match=r"^photo.jpg: not a picture that can be read \(its content is no picture\).$"):
        Client(address, verbose=False).predict(handle_file(photo), api_name="/find")


def test_nothing_chosen_shows_nothing():
    assert page.finder(None, None, "")(None) == (None, "", [])


def test_a_picture_that_is_a_strip_is_refused(tmp_path):
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    with pytest.raises(gr.Error, match="2010 x 10"):
        page.finder(None, None, "")(str(tmp_path / "strip.png"))


def test_without_a_model_the_command_says_what_to_do(monkeypatch, tmp_path):
    def none_yet():
        raise ParameterError(f"{tmp_path} holds no merged model yet: run `make demo` first.")

    monkeypatch.setattr(load, "newest", none_yet)
    with pytest.raises(SystemExit, match="run `make demo` first"):
        page.main(["--port", "47860"])
