"""Figures: what is drawn, told apart, small enough for a committed notebook, and refused in a sentence."""

import io

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402

from helpers import plots  # noqa: E402
from helpers.evaluate import score  # noqa: E402

A = [0.1, 0.2, 0.5, 0.6]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def pictures():
    """Fourteen noisy pictures of 400 x 300, the true box A in all but the last, IoU falling from picture to picture."""
    rng = np.random.default_rng(0)
    images = {f"p{i}": Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)) for i in range(14)}
    truth, predictions = [], []
    for i, name in enumerate(images):
        boxes = [[A[1], A[0], A[3], A[2]]] if i < 13 else []
        objects = {"bbox": boxes, "category_name": ["nutrition-table"] * len(boxes)}
        truth.append({"image_id": name, "objects": objects, "rotation": 90 * (i % 2)})
        found = [] if i == 12 else [[0.1, 0.2, 0.5, 0.6 - 0.02 * i]]
        confidences = [1 - i / 20] * len(found)
        predictions.append({"image_id": name, "labels": ["x"] * len(found), "boxes": found, "confidences": confidences})
    return images, score(truth, predictions, resamples=50)


def png_size(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.tell()


def test_boxes_are_drawn_where_they_are_and_told_apart():
    _, axes = plt.subplots()
    plots.draw_boxes(axes, Image.new("L", (1024, 512)), [A], [[0, 0, 1, 1], A])
    truth, whole, _ = axes.patches
    assert axes.images[0].get_array().shape == (128, 256, 3)
    assert (truth.get_x(), truth.get_y()) == pytest.approx((25.6 - 0.5, 25.6 - 0.5))
    assert (truth.get_width(), truth.get_height()) == pytest.approx((0.4 * 256, 0.4 * 128))
    assert (whole.get_width(), whole.get_height()) == (256, 128)
    assert truth.get_linestyle() != whole.get_linestyle() and truth.get_edgecolor() != whole.get_edgecolor()
    plots.draw_boxes(axes, Image.new("RGB", (10, 10)))
    assert len(axes.patches) == 3


def test_worst_and_best_leave_out_pictures_without_a_table(pictures):
    records = pictures[1]["per_picture"]
    assert [record["image_id"] for record in plots.worst(records, 2)] == ["p12", "p11"]
    assert [record["image_id"] for record in plots.best(records, 2)] == ["p0", "p1"]
    assert len(plots.worst(records, 99)) == 13


def test_gallery_shows_each_record_in_order(pictures):
    images, result = pictures
    figure = plots.gallery(images, result["per_picture"], title="all")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "IoU 1.00" and titles[12] == "no box" and titles[13] == "no table, false alarm"
    assert len(titles) == 18 and titles[14:] == [""] * 4
    assert len(figure.axes[0].patches) == 2 and len(figure.axes[13].patches) == 1


def test_galleries_stay_small_in_a_notebook(pictures):
    images, result = pictures
    shown = plots.compact(plots.gallery(images, plots.worst(result["per_picture"])))
    assert shown.data.startswith(b"\xff\xd8") and len(shown.data) < 300_000  # even for pure noise
    assert not plt.get_fignums()


def test_before_and_after_show_the_same_pictures(pictures):
    images, result = pictures
    records = result["per_picture"]
    figure = plots.before_after(
        images, records, [r | {"predicted": r["true"], "iou": 1.0} for r in records], ["p3", "p5"]
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"IoU {records[3]['iou']:.2f}", f"IoU {records[5]['iou']:.2f}", "IoU 1.00", "IoU 1.00"]


def test_curves_show_the_share_above_each_iou(pictures):
    figure = plots.iou_curves({"a": pictures[1]["per_picture"], "b": pictures[1]["per_picture"][:5]})
    left, right = figure.axes
    curve = right.lines[0].get_xydata()
    iou = np.array([r["iou"] for r in pictures[1]["per_picture"] if r["iou"] is not None])
    x, y = curve[4]
    assert y == pytest.approx((iou > x).mean())
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["a (n = 13)", "b (n = 5)"]
    assert right.lines[0].get_linestyle() != right.lines[1].get_linestyle()
    assert png_size(figure) < 60_000


@pytest.mark.parametrize(
    ("group", "ticks"),
    [
        ("by_size", ["below 10 %\nn = 0", "10 to 30 %\nn = 13", "30 % and more\nn = 0"]),
        ("by_rotation", ["0\nn = 7", "90\nn = 6"]),
        ("by_category", ["nutrition-table\nn = 13"]),
    ],
)
def test_errors_by_group(pictures, group, ticks):
    figure = plots.errors_by({"a": pictures[1], "b": pictures[1]}, group)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ticks
    points = figure.axes[0].containers[0].lines[0].get_ydata()
    key = "mean_iou" if group == "by_rotation" else "mean_iou_boxes"
    expected = [g[key]["value"] for g in pictures[1][group].values() if g[key]["value"] is not None]
    np.testing.assert_allclose(points, expected)
    assert png_size(figure) < 60_000


def test_errors_by_an_unknown_group_is_refused(pictures):
    with pytest.raises(ValueError, match="'by_colour'; the groups are by_size, by_rotation, by_category"):
        plots.errors_by({"a": pictures[1]}, "by_colour")


def test_reliability_diagram_shows_the_bins(pictures):
    reliability = pictures[1]["confidence"]["reliability"]
    axes = plots.reliability_diagram(reliability).axes[0]
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points, [[row["confidence"], row["right"]] for row in reliability["bins"]])


def test_loss_curve():
    log = [{"step": i, "loss": 1 / i} for i in range(1, 21)] + [{"step": 10, "eval_loss": 0.2}, {"train_loss": 0.3}]
    axes = plots.loss_curve(log, smooth=5).axes[0]
    training, smooth, held_out = axes.lines
    np.testing.assert_allclose(training.get_ydata(), [1 / i for i in range(1, 21)])
    assert smooth.get_xdata()[0] == 3 and smooth.get_ydata()[0] == pytest.approx(
        np.mean([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    )
    assert len(held_out.get_xdata()) == 1
    with pytest.raises(ValueError, match="no line with 'loss'"):
        plots.loss_curve([{"train_loss": 0.3}])


def test_label_mask_marks_what_is_trained_and_escapes_the_tokens():
    tokens = ["<|im_start|>", *["<|image_pad|>"] * 64, "user", "\n", "277", "<|im_end|>"]
    trained = [False] * 67 + [True] * 2
    page = plots.label_mask_html(tokens, trained)
    assert "&lt;|image_pad|&gt; × 64" in page and "<|" not in page
    assert page.count("border-bottom") == 2 and "2 of 69 tokens" in page
    with pytest.raises(ValueError, match="zip"):
        plots.label_mask_html(tokens, trained[:-1])
