"""The progress bar of long work."""

import sys

from tqdm import tqdm


def progress_bar(total: int, done: int, name: str, unit: str, shown: bool = True) -> tqdm:
    """A text bar on stderr; where that is a log and no terminal, a new line at most every two seconds."""
    interval = 0.1 if sys.stderr.isatty() else 2.0
    hidden = {} if shown else {"disable": True}  # TQDM_DISABLE=1 hides those that are shown
    return tqdm(total=total, initial=done, desc=name, unit=unit, mininterval=interval, **hidden)
