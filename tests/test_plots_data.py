"""Figures of a data set and of preprocessing: what is drawn is what was given."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from helpers import plots
from helpers.settings import TINY_BASE

pytestmark = pytest.mark.usefixtures("as_figures")


def test_panels_draw_both_kinds_of_boxes_and_name_them():
    picture = Image.new("RGB", (100, 50))
    pictures = [("a", picture, [[0, 0, 0.5, 1]], [[0.1, 0.1, 0.2, 0.2]]), ("b", picture, [], [])]
    figure = plots.panels(pictures, columns=4, names=("truth", "answer"))
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"] and not second.patches
    assert [patch.get_width() for patch in first.patches] == pytest.approx([50, 10])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "answer"]
    assert len(plots.panels(pictures).legends[0].get_texts()) == 1


def test_coverage_is_the_share_of_boxes_at_a_place():
    cover = plots.coverage([[0, 0, 0.5, 1], [0, 0, 1, 0.5]], cells=10)
    assert cover.shape == (10, 10)
    assert (cover[0, 0], cover[0, 9], cover[9, 0], cover[9, 9]) == (1, 0.5, 0.5, 0)
    assert plots.coverage([], cells=4).max() == 0


def test_position_maps_share_their_colours_and_show_the_marked_box():
    figure = plots.position_maps({"a": [[0, 0, 1, 1]], "b": [[0, 0, 0.5, 1]]}, [[0.2, 0.2, 0.8, 0.8]])
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_clim() for axes in maps] == [(0, 1), (0, 1)]
    assert all(len(axes.patches) == 1 for axes in maps)
    assert maps[1].get_title() == "b\nn = 1"


def test_sizes_and_spreads_are_those_of_the_data():
    left, right = plots.picture_sizes({"val": [(300, 400), (300, 400), (800, 400)], "empty": []}).axes
    assert left.collections[0].get_offsets().tolist() == [[300, 400], [800, 400]]
    assert right.lines[0].get_xdata().tolist() == [0.75, 0.75, 2.0]
    axes = plots.spreads({"width": [3, 1, 2]}, {"width": {0.5: 2.0}}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 1 / 3], [2, 2 / 3], [3, 1]]
    assert axes.lines[1].get_xydata().tolist() == [[2.0, 0.5]]


def test_power_curves_show_line_and_points_of_one_name_in_one_colour():
    axes = plots.power_curves({"a": ([10, 100], [0.1, 0.9])}, {"a": ([50], [0.5])}, {"fifty": 50}).axes[0]
    line, points, *_ = axes.lines
    assert line.get_color() == points.get_color() and points.get_xydata().tolist() == [[50, 0.5]]
    assert "fifty" in [text.get_text() for text in axes.texts]


def test_the_seen_picture_is_the_one_that_went_in():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (112, 168, 3), np.uint8))  # multiples of 28: not resized
    images = Qwen2VLProcessor.from_pretrained(TINY_BASE).image_processor
    made = images(picture, return_tensors="pt", min_pixels=28 * 28, max_pixels=10**6)
    seen = plots.seen_picture(made["pixel_values"], made["image_grid_thw"][0], images)
    assert seen.size == picture.size
    assert np.abs(np.asarray(seen, int) - np.asarray(picture, int)).max() <= 1
    broken = plots.seen_picture(made["pixel_values"].roll(1, 0), made["image_grid_thw"][0], images)
    assert np.abs(np.asarray(broken, int) - np.asarray(picture, int)).max() > 100


def test_token_grids_draw_a_line_between_two_tokens():
    axes = plots.token_grids([("t", Image.new("RGB", (84, 56)), [[0, 0, 1, 1]])]).axes[0]
    across, down = axes.collections
    assert len(across.get_segments()) == 2 and len(down.get_segments()) == 1
    assert across.get_segments()[0][0].tolist() == [27.5, -0.5]


def test_budgets_and_padding_are_drawn_as_given():
    axes = plots.budget_curves({"7b": ([1, 2], [100, 200])}, {"phone": 1.5}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 100], [2, 200]]
    axes = plots.padded_batches({"shuffled": [[(10, 5), (4, 5)], [(3, 3)]]}).axes[0]
    widths = torch.tensor([bar.get_width() for bar in axes.patches]).view(-1, 3)  # image, text, padding
    assert widths.tolist() == [[10, 5, 0], [4, 5, 6], [3, 3, 0]]
