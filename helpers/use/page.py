"""`make app`: one page to try a finished model: a photo in; boxes with confidence, the raw text and the crops out.

    python -m helpers.use.page runs/qwen2vl-nutrition-detection-r4-joint-merged --port 7860
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it sends nothing

import gradio as gr
from PIL.Image import Image

from helpers import runs, scenes
from helpers.parameters import ParameterError
from helpers.predict import generate_lines
from helpers.use import load

EXAMPLES = (0, 2, 5, 7, 9, 12)  # scenes of val
Found = tuple[tuple[Image, list[tuple[tuple[int, int, int, int], str]]] | None, str, list[tuple[Image, str]]]


def finder(model: Any, processor: Any, prompt: str) -> Callable[[str | None], Found]:
    """What the page calls with a photo's path: (picture, [(box in pixels, label)]), the raw text, [(crop, label)]."""

    def find(photo: str | None) -> Found:
        """Find the nutrition tables in a photo."""
        if not photo:
            return None, "", []
        try:
            picture = load.open_upright(photo)
        except ValueError as error:
            raise gr.Error(f"{Path(photo).name}: {error}.", print_exception=False) from None
        (line,) = generate_lines(model, processor, [load.as_row("photo", picture)], prompt,
                                 {"do_sample": False})
        boxes = [load.to_pixels(box, picture.size) for box in line["boxes"]]
        labels = [f"{label or 'box'} {confidence:.0%}" for label, confidence
                  in zip(line["labels"], line["confidences"], strict=True)]
        crops = [(picture.crop(box), label) for box, label in zip(boxes, labels, strict=True)]
        return (picture, list(zip(boxes, labels, strict=True))), line["text"], crops

    return find


def example_photos(folder: Path) -> list[str]:
    """Some embedded photos, as files in `folder`."""
    files = []
    for number in EXAMPLES:
        file = folder / f"example-{number}.jpg"
        file.write_bytes(scenes.render_scene(0, number, "val").jpeg)
        files.append(str(file))
    return files


def build_page(model: str | Path) -> gr.Blocks:
    """The page for the merged model in folder `model`, which is checked and loaded first."""
    loaded, processor, prompt = load.load_model(model)
    find = finder(loaded, processor, prompt)
    folder = Path(tempfile.mkdtemp(prefix="nutrition-examples-"))
    with gr.Blocks(title="Nutrition tables", analytics_enabled=False) as page:
        gr.Markdown(f"# Where is the nutrition table?\n`{Path(model).resolve().name}` answers in text; the boxes are "
                    "read out of it. The confidence is the model's own, from the probabilities of the digits.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(type="filepath", label="A photo", sources=["upload", "clipboard"], height=420)
                photo.preprocess = lambda file: file.path if file else None  # type: ignore  # gradio opens it
                button = gr.Button("Find the table", variant="primary")
                gr.Examples(example_photos(folder), photo, label="Rendered examples: click one")
            with gr.Column():
                drawn = gr.AnnotatedImage(label="Boxes", height=420)
                text = gr.Textbox(label="What the model wrote", lines=2)
                crops = gr.Gallery(label="Cut out", columns=2, fit_columns=False, object_fit="contain")
        button.click(find, photo, [drawn, text, crops], api_name="find")
        photo.change(find, photo, [drawn, text, crops], api_visibility="private")  # uploaded, pasted or an example
    return page


def main(arguments: list[str] | None = None) -> None:
    chosen = load.parse("page", "A page to try a finished model.", 7860, arguments)
    runs.quiet_libraries()
    try:
        page = build_page(chosen.model or load.newest())
    except ParameterError as error:
        sys.exit(str(error))
    page.launch(server_name=chosen.host, server_port=chosen.port, show_error=True)


if __name__ == "__main__":
    main()
