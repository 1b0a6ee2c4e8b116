"""pipeline.py run small, in this process, with its source changed where a test breaks something."""

import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "pipeline.py"
SMALL = ("scale=tiny", "train_limit=32", "val_limit=8", "epochs=1", "max_new_tokens=64", "reward_steps=3",
         "report_to=none")


def run(*arguments: str, edits: tuple[tuple[str, str], ...] = ()) -> dict:
    """The pipeline's namespace after it ran with `name=value` arguments, a few pictures, one epoch.

    Each edit is (a piece of pipeline.py that stands there exactly once, what stands there instead).
    """
    source = SOURCE.read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in pipeline.py"
        source = source.replace(old, new)
    before, sys.argv = sys.argv, ["pipeline.py", *SMALL, *arguments]
    namespace = {"__name__": "__main__", "__file__": str(SOURCE)}
    try:
        exec(compile(source, "pipeline.py", "exec"), namespace)
    finally:
        sys.argv = before
    return namespace
