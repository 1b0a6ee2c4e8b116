"""The audit's picture sheet: up to three pictures of each kind of fault, unreadable ones and raw boxes included."""

import io

from PIL import Image
from test_data import row, splits

from helpers import data, plots
from helpers.data.planted import plant_each


def test_the_sheet_shows_each_kind_of_fault(as_figures):
    raw, _ = plant_each(row(1))
    audit = data.audit(raw)
    shown = [axes.get_title().split("\n") for axes in plots.audit_sheet(raw, audit).axes if axes.get_title()]
    counts = audit.table().set_index("fault")["count"]
    assert [line[0] for line in shown] == [
        f"{fault} {n} of {count}" for fault, count in counts.items() for n in range(1, min(count, 3) + 1)]
    assert all(line[1].split()[0] in raw for line in shown)


def test_raw_boxes_are_drawn_where_they_can_be(as_figures):
    nan = float("nan")
    boxes = [[0.1, 0.2, 0.5, 0.6], [0.5, 0.6, 0.1, 0.2], [0.2, 0.2, 0.2, 0.9], [nan] * 4, [0.1, 0.2]]
    raw = splits(val=[row(1, boxes)])
    axes = plots.audit_sheet(raw, data.audit(raw), each=1).axes[0]
    assert len(axes.patches) == 3
    (crosses,) = axes.collections
    assert crosses.get_offsets().tolist() == [[0.55, 0.8]]  # the one without area, from the lower left


def test_the_finished_sheet_is_a_picture_and_nothing_found_is_said():
    raw, _ = plant_each(row(1))
    sheet = plots.audit_sheet(raw, data.audit(raw))
    assert Image.open(io.BytesIO(sheet.data)).size[0] > 600 and len(sheet.data) < 400_000
    clean = splits(val=[row(1)])
    assert plots.audit_sheet(clean, data.audit(clean)).data
