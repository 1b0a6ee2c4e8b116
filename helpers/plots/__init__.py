"""Figures. A leaf: only notebooks import it.

Each function returns the finished figure as a picture for the end of a notebook's cell, and writes it to `path` where
one is given. Truth is solid blue, a prediction dashed orange, both with a white edge, so that they are told apart by
the colour-blind and on any photo. The white ground is the figure's own, for light and dark themes. Photos are scaled
down and shown as JPEG, charts as PNG, so that a committed notebook stays small.
"""

from helpers.plots.audit import audit_sheet
from helpers.plots.charts import errors_by, iou_curves, loss_curves, reliability_diagram
from helpers.plots.dataset import coverage, picture_sizes, position_maps, power_curves, spreads
from helpers.plots.labels import label_mask
from helpers.plots.photos import before_after, best, draw_boxes, gallery, panels, worst
from helpers.plots.preprocessing import budget_curves, padded_batches, seen_picture, token_grids
