"""Checkpoints of a run's folder: which are whole, which goes on, which may go."""

import shutil
from pathlib import Path

from helpers.runs import read_json, write_json

COMPLETE = "complete"  # in a checkpoint: {file: bytes}, written last; without it one was cut off and is never loaded


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: every file's size, so that one which a crash has cut shows too."""
    write_json(checkpoint / COMPLETE, {path.name: path.stat().st_size for path in checkpoint.iterdir()})


def is_complete(checkpoint: Path) -> bool:
    sizes = read_json(checkpoint / COMPLETE)
    return bool(sizes) and all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
                               for name, size in sizes.items())


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest last."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint (its `complete` file is written last), or None."""
    whole = [path for path in checkpoints(folder) if is_complete(path)]
    return str(whole[-1]) if whole else None


def drop_half_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a kill has cut off."""
    for path in checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def drop_old_checkpoints(folder: Path, keep: int | None, best: str | None) -> None:
    """Keep `keep` checkpoints: the newest, and among them the one that is `best` (its path) by its score."""
    others = [path for path in checkpoints(folder) if str(path) != best]
    room = max(1, (keep or len(others)) - bool(best and Path(best).is_dir()))
    for path in others[:-room]:
        (path / COMPLETE).unlink(missing_ok=True)  # first: what is half removed must not look whole
        shutil.rmtree(path)
