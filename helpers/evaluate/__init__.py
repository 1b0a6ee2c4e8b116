"""Predictions and truth in, matches, metrics and intervals out. Reads files; needs no GPU and no model.

python -m helpers.evaluate table [RUNS_DIR] [--write | --check]
python -m helpers.evaluate compare A B
python -m helpers.evaluate score FOLDER
"""

from helpers.evaluate.confidence import keep_confident
from helpers.evaluate.constant import best_constant_box, constant_predictions
from helpers.evaluate.intervals import interval, paired_bootstrap
from helpers.evaluate.reports import (
    compare,
    find_runs,
    load_score,
    metrics_table,
    rescore,
    results_table,
    unstopped_note,
    with_interval,
    write_metrics,
)
from helpers.evaluate.scoring import score
from helpers.evaluate.seeds import difference_over_seeds, group_seeds, iou_matrix, over_seeds
from helpers.evaluate.threshold import trusted_boxes, trusted_table
