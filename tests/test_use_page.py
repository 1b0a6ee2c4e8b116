"""The page: its function, the running app through its API, and in headless Chromium where there is one."""

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import finished_model
import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from helpers.parameters import ParameterError
from helpers.use import load, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


class Browser:
    """As much of Chromium's DevTools protocol as one test needs."""

    def __init__(self, socket_url: str):
        from websocket import create_connection

        self.socket, self.number = create_connection(socket_url, timeout=60), 0

    def call(self, method: str, **values) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": values}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.number:
                return answer["result"]

    def js(self, code: str):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def wait(self, code: str, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.2)
        return value


@contextlib.contextmanager
def chromium(folder: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,1000"]
    process = subprocess.Popen([CHROMIUM, *quiet, f"--user-data-dir={folder}", f"--remote-debugging-port={port}",
                                "--remote-allow-origins=*", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=5))
                break
            except OSError:
                time.sleep(0.2)
        yield Browser(next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_a_click_on_an_example_draws_its_box(address, tmp_path):
    pytest.importorskip("websocket")
    with chromium(tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=address)
        browser.wait("document.querySelectorAll('.gallery-item').length == 6")
        browser.js("document.querySelector('.gallery-item').click()")
        assert "<|box_start|>" in browser.wait("document.querySelector('textarea')?.value")
        browser.wait("[...document.querySelectorAll('.legend-item')].some(item => item.innerText.includes('%'))")

        def red() -> int:
            """Pixels of the box's frame on a picture of the page."""
            shot = Image.open(io.BytesIO(base64.b64decode(browser.call("Page.captureScreenshot")["data"])))
            return sum(r > 200 and g < 60 and b < 60 for r, g, b in shot.convert("RGB").get_flattened_data())

        end = time.monotonic() + 60
        while red() <= 100:  # the picture comes after the words
            assert time.monotonic() < end
            time.sleep(0.5)
