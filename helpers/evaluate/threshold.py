"""The confidence above which boxes can be used unseen: chosen on one split, measured on another."""

import pandas as pd

from helpers.evaluate.confidence import keep_confident, threshold_for_precision
from helpers.evaluate.reports import with_interval
from helpers.evaluate.scoring import score

Scored = tuple[list[dict], list[dict]]  # truth and predictions of one split, as `score` takes them


def trusted_boxes(selection: Scored, val: Scored, precision: float = 0.95) -> dict:
    """Choose the confidence at which `selection` reaches `precision` (0-1, at IoU .5), and apply it to `val`.

    The two splits must share no picture, or the second number would flatter.

    Returns `{"threshold", "selection", "all", "kept", "predictions"}`: the lowest confidence that does it (None where
    none does; then nothing is kept), what it gives on `selection` (`threshold_for_precision`), precision and recall
    on `val` with all boxes and with the kept ones (`{"precision", "recall"}`, each `{"value", "low", "high", "n"}`),
    and val's predictions without the other boxes. Raises ValueError for a picture that stands in both splits.
    """
    shared = {row["image_id"] for row in selection[0]} & {row["image_id"] for row in val[0]}
    if shared:
        raise ValueError(f"image_id={min(shared)!r} stands in both splits; a threshold is chosen on other pictures.")
    chosen = threshold_for_precision(score(*selection, resamples=0)["per_picture"], precision)
    threshold = chosen["threshold"] if chosen else None
    kept = keep_confident(val[1], float("inf") if threshold is None else threshold)
    scores = {"all": score(*val)["summary"], "kept": score(val[0], kept)["summary"]}
    measured = {name: {metric: summary[metric] for metric in ("precision", "recall")}
                for name, summary in scores.items()}
    return {"threshold": threshold, "selection": chosen, **measured, "predictions": kept}


def trusted_table(result: dict) -> pd.DataFrame:
    """`trusted_boxes` for display: boxes, precision and recall on `val`, of all boxes and of the kept ones."""
    threshold = result["threshold"]
    kept = "none can be trusted" if threshold is None else f"confidence >= {threshold:.3f}"
    return pd.DataFrame({name: {"boxes": result[key]["precision"]["n"]} |
                         {metric: with_interval(result[key][metric]) for metric in ("precision", "recall")}
                         for name, key in (("all boxes", "all"), (kept, "kept"))}).T
