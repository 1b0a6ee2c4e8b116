"""The page: its function, and the running app through its API."""

from pathlib import Path

import finished_model
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from helpers.use import load, page


@pytest.fixture(scope="module")
def find(model):
    """The page's function, called through the running page's API: (boxes drawn, text, crops) of a photo's file."""
    opened = page.build_page(model)
    _, url, _ = opened.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    client = Client(url, verbose=False)
    yield lambda photo: client.predict(handle_file(photo), api_name="/find")
    opened.close()


@pytest.fixture
def photo(tmp_path) -> Path:
    file = tmp_path / "photo.jpg"
    file.write_bytes(finished_model.scene(0))
    return file


def test_the_page_shows_boxes_confidence_text_and_crops(find, photo):
    drawn, text, crops = find(photo)
    assert "<|box_start|>" in text and len(drawn["annotations"]) == len(crops) >= 1
    label = drawn["annotations"][0]["label"]
    assert label.startswith("barcode ") and label.endswith("%") and crops[0]["caption"] == label
    with Image.open(drawn["annotations"][0]["image"]) as mask, Image.open(crops[0]["image"]) as crop:
        x0, y0, x1, y1 = mask.getchannel("A").getbbox()
        assert abs(crop.width - (x1 - x0)) <= 4 and abs(crop.height - (y1 - y0)) <= 4


def test_a_photo_stored_on_its_side_is_shown_upright_with_the_same_box(find, photo):
    png = photo.with_suffix(".png")  # the turned JPEG's own pixels, so that both are the same picture
    photo.write_bytes(finished_model.turned(photo.read_bytes()))
    load.open_upright(photo).save(png)
    drawn, text, _ = find(photo)
    assert text == find(png)[1] != ""
    with Image.open(drawn["image"]) as shown:
        assert shown.size == load.open_upright(finished_model.scene(0)).size


def test_what_is_no_photo_gets_one_sentence(find, photo):
    photo.write_text("hello")
    with pytest.raises(AppError, match=r"^photo.jpg: not a picture that can be read \(its content is no picture\).$"):
        find(photo)
