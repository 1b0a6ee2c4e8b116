"""Figures of the model and of its quantisation: what is drawn, and where."""

import numpy as np
import pytest
from PIL import Image

from helpers.plots import architecture, quantisation

pytestmark = pytest.mark.usefixtures("as_figures")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_token_and_its_patches_are_numbered_as_in_the_sequence():
    figure = architecture.patch_grid(Image.new("RGB", (112, 56)), (1, 4, 8), (1, 2))
    whole, large = figure.axes
    assert texts(large) == ["24", "25", "26", "27"] and "token 6" in large.get_title()
    assert whole.get_title() == "4 × 8 patches, 2 × 4 image tokens"
    box = whole.patches[0]
    assert (box.get_x(), box.get_y(), box.get_width()) == (56, 28, 28)


def test_positions_stand_in_their_cells():
    seen = np.array([0, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    positions = np.array([[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]])
    left, right = architecture.positions_on_picture(Image.new("RGB", (84, 56)), positions, seen, (2, 3)).axes
    assert texts(left) == ["1\n1", "1\n2", "1\n3", "2\n1", "2\n2", "2\n3"]
    assert left.texts[4].get_position() == (1.5, 1.5)
    for line, expected in zip(right.lines, positions, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected)
    big = np.ones((3, 20 * 20), dtype=int)
    assert not architecture.positions_on_picture(Image.new("RGB", (56, 56)), big, big[0] > 0, (20, 20)).axes[0].texts


def test_attention_lies_on_the_picture_with_its_boxes():
    maps = {"x0": np.eye(4), "y0": np.full((4, 4), 0.01)}
    figure = architecture.attention_maps(Image.new("RGB", (100, 50)), maps, [[0, 0, 0.5, 1]], [[0.1, 0.2, 0.3, 0.4]])
    assert [axes.get_title() for axes in figure.axes] == ["x0 (≤ 100 %)", "y0 (≤ 1 %)"]
    truth, answer = figure.axes[0].patches
    assert (truth.get_width(), truth.get_height()) == (0.5, 1) and truth.get_linestyle() != answer.get_linestyle()
    np.testing.assert_array_equal(figure.axes[0].images[1].get_array(), np.eye(4))


def test_shares_add_up_to_all():
    axes = architecture.shares({"tiny, MB": {"a": 1.0, "b": 3.0}, "7B, GB": {"a": 500.0, "b": 0.0}}).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [25, 75, 100, 0] and texts(axes) == ["25 %", "75 %", "100 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tiny, MB: 4", "7B, GB: 500"]


def test_lines_over_layers():
    axes = architecture.by_layer({"x0": [1, 2, 4], "y0": [1, 1, 1]}, "layer", "lift", level=1).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, 2, 4])
    assert len(axes.lines) == 3 and [text.get_text() for text in axes.get_legend().get_texts()] == ["x0", "y0"]


def test_weights_over_the_levels():
    levels = np.linspace(-1, 1, 16) ** 3
    axes = quantisation.codebook(np.linspace(-1, 1, 640).reshape(10, 64), levels).axes[0]
    drawn = [line.get_xdata()[0] for line in axes.lines[:16]]
    np.testing.assert_allclose(drawn, levels)
    assert sum(bar.get_height() for bar in axes.patches) == 640


def test_errors_by_layer_and_memory():
    figure = quantisation.error_by_layer({"vision": {"fc1": [1, 2]}, "language": {"q_proj": [3, 4], "k_proj": [5, 6]}})
    assert [axes.get_title() for axes in figure.axes] == ["vision", "language"]
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), [5, 6])
    table = {"bf16": {"vision": 1.25, "language": 14.0}, "nf4": {"vision": 1.25, "language": 4.0}}
    axes = quantisation.memory(table, {"24 GiB": 24}).axes[0]
    assert [text.strip() for text in texts(axes)] == ["15.2", "5.2", "24 GiB"]
    assert axes.patches[1].get_x() == 1.25


def test_iou_by_rank():
    scores = [{"value": 0.2, "low": 0.1, "high": 0.4}, {"value": 0.5, "low": 0.4, "high": 0.6}]
    axes = quantisation.rank_curve([2, 8], scores, 0.35).axes[0]
    bars, = axes.collections
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[0.1, 0.4], [0.4, 0.6]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "8"]
