"""`make app`: one page to try a finished model: a photo in; boxes with confidence, the raw text and the crops out.

    python -m helpers.use.page runs/qwen2vl-nutrition-detection-r4-joint-merged --port 7860
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it sends nothing

import gradio as gr
from PIL.Image import Image

from helpers import predict, scenes
from helpers.use import load

EXAMPLES = (0, 2, 5, 7, 9, 12)  # scenes of val
# (picture, [(box in pixels, label)]), the raw text, [(crop, label)]
Found = tuple[tuple[Image, list[tuple[tuple[int, int, int, int], str]]] | None, str, list[tuple[Image, str]]]


def build_page(model: str | Path) -> gr.Interface:
    """The page for the merged model in folder `model`, which is checked and loaded first."""
    vlm, processor, prompt = load.load_model(model)
    passes = load.passes_of(model)

    def find(photo: str | None) -> Found:
        """Find the nutrition tables in a photo."""
        if not photo:
            return None, "", []
        try:
            picture = load.open_upright(photo)
        except ValueError as error:
            raise gr.Error(f"{Path(photo).name}: {error}.", print_exception=False) from None
        (line,) = predict.generate_lines(vlm, processor, [load.as_row("photo", picture)], prompt, {"do_sample": False},
                                         passes=passes)
        drawn = [(load.to_pixels(box, picture.size), f"{label or 'box'} {confidence:.0%}") for box, label, confidence
                 in zip(line["boxes"], line["labels"], line["confidences"], strict=True)]
        return (picture, drawn), line["text"], [(picture.crop(box), label) for box, label in drawn]

    folder = Path(tempfile.mkdtemp(prefix="nutrition-examples-"))
    examples = [folder / f"example-{number}.jpg" for number in EXAMPLES]
    for number, file in zip(EXAMPLES, examples, strict=True):
        file.write_bytes(scenes.render_scene(0, number, "val").jpeg)
    photo = gr.Image(type="filepath", label="A photo", sources=["upload", "clipboard"], height=420)
    photo.preprocess = lambda file: file.path if file else None  # type: ignore  # gradio opens it
    found = [gr.AnnotatedImage(label="Boxes", height=420), gr.Textbox(label="What the model wrote", lines=2),
             gr.Gallery(label="Cut out", columns=2, fit_columns=False, object_fit="contain")]
    return gr.Interface(
        find, photo, found, examples=[[str(file)] for file in examples], cache_examples=False, live=True,
        api_name="find", flagging_mode="never", analytics_enabled=False, title="Where is the nutrition table?",
        description=f"`{Path(model).resolve().name}` generates text, and the boxes are read out of it. The confidence "
                    "is the model's own, from the probabilities that a box begins and of its digits.")


def main(arguments: list[str] | None = None) -> None:
    chosen = load.parse_port("page", "A page to try a finished model.", 7860, arguments)
    with load.one_sentence():
        page = build_page(chosen.model or load.newest())
    page.launch(server_name=chosen.host, server_port=chosen.port, show_error=True)


if __name__ == "__main__":
    main()
