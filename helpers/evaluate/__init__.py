"""Predictions and truth in, matches, metrics and intervals out. Reads files; needs no GPU and no model.

Scores on disk and their tables are in `reports` and `ledger`; from the command line:

python -m helpers.evaluate table [RUNS_DIR] [--write | --check]
python -m helpers.evaluate compare A B
python -m helpers.evaluate score FOLDER
"""

from helpers.evaluate.confidence import keep_confident
from helpers.evaluate.constant import best_constant_box, constant_predictions
from helpers.evaluate.intervals import interval, paired_bootstrap, with_interval
from helpers.evaluate.scoring import score, unstopped_note
