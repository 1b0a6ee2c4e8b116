"""Figures that two notebooks draw. A leaf: only notebooks import it.

Each function returns the finished figure as a picture for the end of a notebook's cell, and writes it to `path` where
one is given. Truth is solid blue, a prediction dashed orange, both with a white edge, so that the colour-blind can
distinguish them, on any photo. The white ground is the figure's own, for light and dark themes. Photos are scaled
down and shown as JPEG, charts as PNG, so that a committed notebook stays small.
"""

from helpers.plots.audit import audit_sheet
from helpers.plots.charts import iou_curves, loss_curves
from helpers.plots.figure import COLOURS, finish
from helpers.plots.labels import label_mask
from helpers.plots.overview import overview
from helpers.plots.photos import before_after, draw_boxes, gallery, panels
