"""Run a command on a free group of GPUs: `python -m helpers.dev.gpus "0,1 2,3" COMMAND ...`.

Each group of the list is one lock; the command takes the first free one, sees only its GPUs and holds it to its end.
So `make -j2 recipes GPUS='0,1 2,3'` runs two recipes side by side, each on its own GPUs, and a third waits. An empty
list is one group that hides nothing: commands then run one after the other.
"""

import fcntl
import os
import re
import sys
import time
from pathlib import Path

LOCKS = Path("runs/.locks")
EVERYTHING = "all"


def groups_of(written: str) -> list[str]:
    """"0,1 2,3" -> ["0,1", "2,3"]; "" -> ["all"]. ValueError for anything else, or for a GPU in two groups."""
    groups = written.split() or [EVERYTHING]
    for group in groups:
        if group != EVERYTHING and not re.fullmatch(r"\d+(,\d+)*", group):
            raise ValueError(f"GPUS={written!r} is not valid: expected GPU numbers such as 0, 0,1 or '0,1 2,3'.")
    numbers = [number for group in groups for number in group.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"GPUS={written!r} names a GPU twice; groups must not share one.")
    return groups


def take(groups: list[str], locks: Path = LOCKS, pause: float = 1.0) -> tuple[str, int]:
    """Wait for the first free group; returns it and the open file that holds its lock until it is closed."""
    locks.mkdir(parents=True, exist_ok=True)
    waiting = False
    while True:
        for group in groups:
            held = os.open(locks / group, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return group, held
            except BlockingIOError:
                os.close(held)
        if not waiting:
            print(f"waiting for a free group of GPUs ({' or '.join(groups)})", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(pause)


def main() -> int:
    """Become the command, with CUDA_VISIBLE_DEVICES set; returns 2 where the command line is not understood."""
    try:
        groups = groups_of(sys.argv[1])
        command = sys.argv[2:]
        if not command:
            raise ValueError("there is no command after the groups of GPUs.")
    except (ValueError, IndexError) as error:
        print(str(error) or __doc__, file=sys.stderr)
        return 2
    group, held = take(groups)
    os.set_inheritable(held, True)  # the lock ends with the command
    if group != EVERYTHING:
        os.environ["CUDA_VISIBLE_DEVICES"] = group
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started ({error.strerror}).", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
