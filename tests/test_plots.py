"""Figures: what is drawn and where, small enough for a committed notebook, and refused in a sentence."""

import io

import numpy as np
import pytest
from datasets import Dataset
from matplotlib import pyplot as plt
from PIL import Image
from test_data import jpeg, row, splits

from helpers import data, plots
from helpers.plots import sheet

A = [0.1, 0.2, 0.5, 0.6]


@pytest.fixture(scope="module")
def scored():
    """Rows, truth and predictions of fourteen noisy pictures of 400 x 300.

    The true box is A in all but the last, which has no table; the IoU falls with each, p12 has no prediction.
    """
    rng = np.random.default_rng(0)
    images = {f"p{i}": Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)) for i in range(14)}
    truth, predictions = [], []
    for i, name in enumerate(images):
        boxes = [[A[1], A[0], A[3], A[2]]] if i < 13 else []
        truth.append({"image_id": name, "objects": {"bbox": boxes, "category_name": ["nutrition-table"] * len(boxes)}})
        found = [] if i == 12 else [[0.1, 0.2, 0.5, 0.6 - 0.02 * i]]
        predictions.append({"image_id": name, "labels": ["x"] * len(found), "boxes": found,
                            "confidences": [0.5] * len(found)})
    return Dataset.from_dict({"image_id": list(images), "image": list(images.values())}), truth, predictions


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_boxes_are_drawn_where_they_are_and_differ():
    _, axes = plt.subplots()
    plots.draw_boxes(axes, Image.new("L", (1024, 512)), [A], [[0, 0, 1, 1], A])
    truth, whole, _ = axes.patches
    assert axes.images[0].get_array().shape == (128, 256, 3)
    assert (truth.get_x(), truth.get_y()) == pytest.approx((25.6 - 0.5, 25.6 - 0.5))
    assert (truth.get_width(), truth.get_height()) == pytest.approx((0.4 * 256, 0.4 * 128))
    assert (whole.get_width(), whole.get_height()) == (256, 128)
    assert truth.get_linestyle() != whole.get_linestyle() and truth.get_edgecolor() != whole.get_edgecolor()
    plt.close("all")


def test_a_gallery_shows_each_row_in_order_with_its_iou_and_names_several_classes(scored, as_figures):
    rows, truth, predictions = scored
    figure = plots.gallery(rows, truth, predictions, title="all")
    assert len(figure.axes) == 18 and titles(figure)[14:] == [""] * 4
    assert titles(figure)[0] == "IoU 1.00" and titles(figure)[12:14] == ["no box", "no table, false alarm"]
    assert len(figure.axes[0].patches) == 2 and len(figure.axes[13].patches) == 1
    assert titles(plots.gallery(rows.select([13, 2]), truth)) == ["no table", ""]
    truth = [line | {"objects": line["objects"] | {"category_name": [f"kind {i % 2}"] * len(line["objects"]["bbox"])}}
             for i, line in enumerate(truth)]
    predictions = [line | {"labels": ["kind 1"] * len(line["boxes"])} for line in predictions]
    assert titles(plots.gallery(rows.select([0, 1]), truth)) == ["kind 0", "kind 1"]
    assert titles(plots.gallery(rows.select([1, 0]), truth, predictions)) == ["kind 1 IoU 0.95", "kind 1 IoU 0.00"]


def test_the_page_of_make_data_shows_pictures_boxes_guesses_and_findings(tmp_path, monkeypatch, capsys):
    for number, name in enumerate("abcdefgh"):
        (tmp_path / f"set/train/{name}.jpg").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/train/{name}.jpg").write_bytes(jpeg(number, (120, 80)))
        (tmp_path / f"set/train/{name}.txt").write_text(f"{number % 2} 0.5 0.5 0.2 0.5\n")
    (tmp_path / "set/train/h.jpg").write_bytes(b"no picture")
    (tmp_path / "set/data.yaml").write_text("names: ['<table>', logo]")
    page = tmp_path / "audit.html"
    monkeypatch.setattr("sys.argv", ["sheet", f"dataset_id={tmp_path / 'set'}", "val_share=0.25", f"page={page}"])
    sheet.main()
    text = page.read_text()
    assert "audit: 1 × unreadable-picture: row dropped" in capsys.readouterr().out
    for words in ("is read as YOLO", "2 of its 8 pictures become val (val_share=0.25)", "2 classes are trained on",
                  "unreadable-picture", "cannot be read", "of 2 pictures, with the boxes as trained on",
                  "left:40.00%;top:25.00%;width:20.00%;height:50.00%", "120 × 80 px"):
        assert words in text, words
    assert text.count("data:image/jpeg;base64,") == 7 and text.count("src=") == 7 and "http" not in text
    monkeypatch.setattr("sys.argv", ["sheet", f"dataset_id={tmp_path / 'set'}", "classes=price"])
    with pytest.raises(SystemExit, match="has no class 'price'; it has"):
        sheet.main()


def test_figures_are_written_closed_and_small(scored, tmp_path, monkeypatch):
    rows, truth, predictions = scored
    shown = plots.gallery(rows, truth, predictions)
    assert shown.data.startswith(b"\xff\xd8") and len(shown.data) < 300_000  # even for pure noise
    chart = plots.iou_curves({"a": predictions}, truth, path=tmp_path / "figures" / "iou.png")
    assert Image.open(tmp_path / "figures" / "iou.png").format == "PNG"
    assert Image.open(io.BytesIO(chart.data)).format == "PNG" and len(chart.data) < 40_000
    assert not plt.get_fignums()
    monkeypatch.setenv("RANK", "1")
    plots.iou_curves({"a": predictions}, truth, path=tmp_path / "second.png")
    assert not (tmp_path / "second.png").exists()


def test_loss_curves(as_figures):
    log = [{"step": i, "loss": 1 / i} for i in range(1, 21)] + [{"train_loss": 0.3}]
    training, smooth = plots.loss_curves({"r4-joint": log}, smooth=5).axes[0].lines
    np.testing.assert_allclose(training.get_ydata(), [1 / i for i in range(1, 21)])
    assert (smooth.get_xdata()[0], smooth.get_ydata()[0]) == (3, pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5))


def test_the_audits_sheet_draws_raw_boxes_where_they_can_be(as_figures):
    nan = float("nan")
    boxes = [[0.1, 0.2, 0.5, 0.6], [0.5, 0.6, 0.1, 0.2], [0.2, 0.2, 0.2, 0.9], [nan] * 4, [0.1, 0.2]]
    raw = splits(val=[row(1, boxes), row(2, [[0.1, 0.2, 0.5, 0.2]]) | {"image": {"bytes": b"none", "path": None}}])
    figure = plots.audit_sheet(raw, data.audit(raw), each=1)
    axes, unreadable = (next(one for one in figure.axes if one.get_title().startswith(fault))
                        for fault in ("empty-box", "unreadable-picture"))
    height, width = axes.images[0].get_array().shape[:2]
    assert len(axes.patches) == 3 and not unreadable.patches
    (cross,) = axes.collections  # the one without area
    assert cross.get_offsets().tolist()[0] == pytest.approx([0.55 * width - 0.5, 0.2 * height - 0.5])


def test_label_mask_marks_what_is_trained_and_escapes_the_tokens():
    class Words:
        """A tokenizer whose token i is the i-th of a few words."""

        def decode(self, ids):
            return ("<|im_start|>", "<|image_pad|>", "user", "\n", "7", "<|im_end|>")[ids[0]]

    ids = [0, *[1] * 64, 2, 3, 4, 4, 5]
    labels = [-100] * 67 + [4, 4, 5]
    page = plots.label_mask(Words(), np.array(ids), np.array(labels)).data
    assert "&lt;|image_pad|&gt; × 64" in page and "<|" not in page and page.count("<br>") == 1
    assert page.count("border-bottom") == 3 and "3 of 70 tokens" in page
    with pytest.raises(ValueError, match="zip"):
        plots.label_mask(Words(), ids, labels[:-1])
